"""ShardServer: the process around one Shard: a socket, one poll loop, snapshots.

One thread owns the shard and the socket; there are no locks. A second thread, alive only while
a snapshot is written, sees nothing but pinned tensors that nobody changes.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from distbelief.param_server.backup import window_of
from distbelief.param_server.carrier import Carrier
from distbelief.param_server.errors import RemoteProtocolError, SnapshotFailed, SnapshotFenced
from distbelief.param_server.image import ShardImage
from distbelief.param_server.ledger import Ledger
from distbelief.param_server.protocol import (
    REQUESTS,
    SHARED,
    AnyRequest,
    Hello,
    Left,
    Push,
    Refusal,
    Welcome,
    encode,
)
from distbelief.param_server.register import Register, Saving
from distbelief.param_server.report import ShardReport
from distbelief.param_server.reporter import Head, Reporter
from distbelief.param_server.shard import CREDITS_MAX, Payload, Reply, Shard
from distbelief.param_server.shared import Shared
from distbelief.param_server.snapshot import SnapshotStore
from distbelief.param_server.transport import Delivery, Frame, ServerTransport
from distbelief.param_server.wire import sayable

logger = logging.getLogger(__name__)

TICK_S = 0.02
"""How long the loop waits for a message, and how often at least it looks at everything else."""

IDLE_S = 0.5
"""Without a change for so long, what is not durable yet is saved: it cannot become less."""

AGAIN_S = 1.0
"""From a snapshot that failed to the next try, at least."""

AT_ONCE_S = 2e-4
"""A message that came within so short a wait was there already."""

FINISH_S = 40.0
"""For the last snapshot to be copied to where other hosts find it."""

SWEEP_S = 1.0
"""How often it looks whether the processes whose memory it has mapped still live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotConfig:
    """When a shard saves itself."""

    every_s: float = 30.0
    """Seconds from one snapshot to the next while pushes arrive; 0 saves only at the end."""
    backup_bytes: int = 0
    """What each worker keeps of its pushes until they are durable. Half of that in no snapshot
    yet, or a worker that waits, or a pause, brings a snapshot at once. 0: workers keep none."""

    def __post_init__(self) -> None:
        for name in ("every_s", "backup_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"snapshot {name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Saved:
    """The newest snapshot that is durable."""

    name: str
    version: int
    samples: int
    """Of the part furthest behind, both."""
    taken_at: float
    """When its image was taken, on the server's clock."""


def respond(
    shard: Shard,
    peer: bytes,
    frames: Sequence[Frame],
    now: float,
    shared: Shared | None = None,
    speaker: str | None = None,
    on_handled: Callable[[AnyRequest, Reply], None] | None = None,
) -> Reply:
    """Decode one message, let the shard handle it; junk gets one short refusal and is counted.

    speaker: as of `ServerTransport`. on_handled: called with what was no junk.
    """
    try:
        if not frames:
            raise RemoteProtocolError("a message without a header")
        message = REQUESTS.decode(frames[0])
        assert isinstance(message, AnyRequest)  # the codec knows no other messages
        payload: Payload = frames[1:]
        if isinstance(message, Push) and message.dt == SHARED:
            payload = _gradients(shard, peer, message, shared)
    except RemoteProtocolError as error:
        shard.counts["junk"] += 1
        logger.debug("junk shard=%d: %s", shard.config.index, error)
        return Reply(Refusal(code="junk", text=sayable(str(error))))
    reply = shard.handle(peer, message, payload, now, speaker)
    if shared is not None:
        reply = _share(shard, peer, message, reply, shared)
    if on_handled is not None:
        on_handled(message, reply)
    return reply


def _gradients(shard: Shard, peer: bytes, push: Push, shared: Shared | None) -> Payload:
    """The gradients of a push in shared memory; none where nothing is shared on its connection.

    The shard then refuses it: first of all for want of a hello, which the worker makes up for.
    """
    if shared is None or shard.contract is None:
        return []
    return shared.gradients(peer, push, shard.contract.layout) or []


def _share(shard: Shard, peer: bytes, message: AnyRequest, reply: Reply, shared: Shared) -> Reply:
    """Map the memory of a worker that is welcome, and let go of one that leaves."""
    if isinstance(message, Hello) and isinstance(reply.message, Welcome):
        assert shard.contract is not None
        address = shared.attach(peer, message.memory, shard.contract.layout)
        # What is shared needs no memory here.
        credits = CREDITS_MAX if address else reply.message.credits
        return replace(reply, message=replace(reply.message, memory=address, credits=credits))
    if isinstance(reply.message, Left):
        shared.detach(peer)
    return reply


class ShardServer:
    """Serves one shard until it is told to stop, then saves it."""

    def __init__(
        self,
        shard: Shard,
        transport: ServerTransport,
        store: SnapshotStore | None = None,
        config: SnapshotConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        shared: Shared | None = None,
        ledger: Ledger | None = None,
        reporter: Reporter | None = None,
        carrier: Carrier | None = None,
    ) -> None:
        """store: None keeps nothing on disk. ledger: the one that the shard's `on_push` writes.
        shared: the one that made the shard's home; None
        serves over the transport alone. reporter: tells the monitor; None tells nobody. carrier:
        copies snapshots to where they have to be to be durable; None: on disk they are. All three
        are the caller's to close."""
        self.shard = shard
        self._transport = transport
        self._store = store
        self._config = config or SnapshotConfig()
        self._clock = clock
        self._sending: list[tuple[Delivery, Reply, bytes]] = []
        """Replies whose values are not gone yet, with whom they are for."""
        self._unread: dict[bytes, int] = {}
        """By peer, bytes of the replies to it that are still held here."""
        self._shared = shared
        self._swept_at = clock()
        self._reporter = reporter
        self._register = None if reporter is None else Register(shard)
        self._save_s = 0.0
        """That the newest snapshot took to write."""
        self._saver: _Saver | None = None
        shard.is_stalled = store is None
        self._ledger = ledger
        self._saved_changes = shard.num_changes
        self._seen_changes = shard.num_changes
        self._changed_at = self._failed_at = float("-inf")
        self._saved_at = clock()
        self.is_suspended = False
        """Another process may be this shard by now: messages are left without an answer."""
        self._carrier = carrier
        self._carried: dict[str, tuple[Saved | None, ShardImage]] = {}
        """By name, what is on its way to be durable; images without values."""
        self._error: SnapshotFailed | None = None
        self.storage_error: str | None = None
        """Why the last snapshot failed; None while snapshots succeed."""
        self.saved: Saved | None = None
        """The newest durable snapshot that this process has written."""

    def carry(self, name: str, image: ShardImage) -> None:
        """The shard goes on from a snapshot that has yet to be copied to where it is durable."""
        self.shard.mark_undurable()
        self._carry(name, None, image)  # when it was taken only an earlier process knew

    def serve(self, is_stopping: Callable[[], bool]) -> None:
        """Answer messages until `is_stopping`, asked each TICK_S, says so; then save.

        A shard that was deposed, or is spoiled, ends at once, and saves nothing.
        """
        while not (self.shard.is_deposed or self.shard.spoiled or is_stopping()):
            until = self._clock() + TICK_S
            while self.answer(TICK_S) and self._clock() < until:
                pass
            self.look()
        # Nobody pushes any more. While the last snapshot is written it finds its way.
        if self._reporter is not None:
            self._reporter.tell(self._report)
        self._finish()

    def serve_once(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for one message, answer it, and do what else is due."""
        self.answer(timeout_s)
        self.look()

    def answer(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` for one message and answer it. Returns: there was one."""
        asked_at = self._clock()
        try:
            received = self._transport.recv(timeout_s)
        except RemoteProtocolError as error:
            self.shard.counts["junk"] += 1
            logger.debug("junk shard=%d: %s", self.shard.config.index, error)
            return True
        if received is not None:
            peer, frames = received
            if self.is_suspended:
                self.shard.counts["suspended"] += 1
                return True
            if self._reads_not(peer):
                self.shard.counts["unread"] += 1
                return True
            speaker = self._transport.speaker
            began = self._clock()

            def note(request: AnyRequest, reply: Reply) -> None:
                assert self._register is not None
                # Frames are of bytes: their length is their size, and 0.3 us a part cheaper.
                payload = sum(map(len, frames)) - len(frames[0]), sum(map(len, reply.payload))
                seconds, has_waited = self._clock() - began, began - asked_at > AT_ONCE_S
                self._register.note(request, reply.message, seconds, payload, has_waited=has_waited)

            on_handled = None if self._register is None else note
            reply = respond(self.shard, peer, frames, began, self._shared, speaker, on_handled)
            del received, frames  # the memory of a push goes back before that of the next comes
            delivery = self._transport.send(peer, [encode(reply.message), *reply.payload])
            if delivery is None:
                self.shard.counts["unsent"] += 1  # the peer asks again; the table makes it safe
                reply.release()
            elif reply.pins:
                self._sending.append((delivery, reply, peer))
                self._unread[peer] = self._unread.get(peer, 0) + _size(reply)
            self._release_sent()
            return True
        self._release_sent()
        return False

    def look(self) -> None:
        """Do what is due besides messages: snapshots, and letting go of dead workers' memory."""
        self._save_if_due()
        self._look_at_carrier()
        ended = self._transport.bound_intake(self.shard.allowance)
        if ended != self.shard.counts["flooded"]:
            if ended >= 2 * self.shard.counts["flooded"]:  # not a line for each of thousands
                logger.warning("%d connections that brought no whole message were ended", ended)
            self.shard.counts["flooded"] = ended
        if self._shared is not None and self._clock() - self._swept_at >= SWEEP_S:
            self._swept_at = self._clock()
            self._shared.sweep()
        if self._reporter is not None and self._reporter.is_due:
            self._reporter.tell(self._report)

    def _report(self, head: Head) -> ShardReport:
        assert self._register is not None
        saved = self.saved
        saving = Saving(
            name="" if saved is None else saved.name,
            at=0.0 if saved is None else head["at"] - (self._clock() - saved.taken_at),
            seconds=self._save_s,
            error=sayable(self.storage_error or ""),
        )
        return self._register.report(head, saving)

    def _reads_not(self, peer: bytes) -> bool:
        """It asks and does not read: twice what it has credits for is held here for it.

        What it asks for now is left without an answer; it hurts nobody else.
        """
        if peer not in self._unread:
            return False
        self._release_sent()
        return self._unread.get(peer, 0) > 2 * self.shard.share_bytes

    def _release_sent(self) -> None:
        if self._sending:
            still: list[tuple[Delivery, Reply, bytes]] = []
            for delivery, reply, peer in self._sending:
                if delivery.is_done:
                    reply.release()
                    self._unread[peer] -= _size(reply)
                    if not self._unread[peer]:
                        del self._unread[peer]
                else:
                    still.append((delivery, reply, peer))
            self._sending = still

    # Snapshots

    def _save_if_due(self) -> None:
        if self._saver is not None:
            if self._saver.is_alive():
                return
            self._collect()
        if self._store is None or self.shard.num_changes == self._saved_changes:
            self.shard.is_waited_for = False
            return
        if self.shard.is_ready and self._is_due(self._clock()):
            self._start_saving()

    def _is_due(self, now: float) -> bool:
        shard, config = self.shard, self._config
        if shard.num_changes != self._seen_changes:
            self._seen_changes, self._changed_at = shard.num_changes, now
        if shard.is_stalled and now - self._failed_at < AGAIN_S:
            return False
        if config.every_s and now - self._saved_at >= config.every_s:
            return True
        if not config.backup_bytes:
            return False
        if now - self._changed_at >= IDLE_S:
            return True
        if self._carrier is not None and not self._carrier.is_idle:
            return False  # a newer one would not be durable any sooner
        assert shard.contract is not None
        window = window_of(4 * shard.contract.layout.total, config.backup_bytes)
        return shard.is_waited_for or 2 * shard.num_undurable >= window

    def _start_saving(self) -> None:
        assert self._store is not None
        if not self.shard.check_values():  # the snapshot before this one is better
            return
        self.shard.is_waited_for = False
        start = "" if self._ledger is None else self._ledger.turn()
        changes = self.shard.num_changes
        self._saver = _Saver(self._store, self.shard.image(), self._clock(), changes, start)
        self._saver.start()

    def _collect(self) -> None:
        """Take the result of a snapshot that has been written, or has failed."""
        assert self._saver is not None
        self._saver.join()
        image, error = self._saver.image, self._saver.error
        path, taken_at = self._saver.path, self._saver.taken_at
        changes, start = self._saver.changes, self._saver.start_of_ledger
        self._saver = None
        self._saved_at = self._clock()
        self._save_s = self._saved_at - taken_at
        image.release()
        before, self._error = self._error, error
        if error is None:
            self._saved_changes = changes
            if self._ledger is not None and self._store is not None:
                self._ledger.forget(start, self._store.keep)
            saved = _saved_of(path.name, image, taken_at)
            if self._carrier is None:
                self._mark_durable(saved, image)
            else:
                self._carry(path.name, saved, image)
            logger.info("saved shard=%d version=%d", image.index, image.version)
        elif isinstance(error, SnapshotFenced):
            self._depose(error)
        elif before is None:
            logger.error("%s", error)
        if error is not None:
            self._failed_at = self._clock()
        self._tell_storage()

    def _carry(self, name: str, saved: Saved | None, image: ShardImage) -> None:
        assert self._carrier is not None
        self._carried.pop(name, None)
        self._carried[name] = saved, image.bare()
        self._carrier.carry(name)

    def _look_at_carrier(self) -> None:
        """See which snapshot has become durable, or what keeps it."""
        if self._carrier is None:
            return
        done = self._carrier.take_done()
        if done in self._carried:
            self._mark_durable(*self._carried[done])
            names = list(self._carried)
            for name in names[: names.index(done) + 1]:
                del self._carried[name]
        if isinstance(self._carrier.error, SnapshotFenced) and not self.shard.is_deposed:
            self._depose(self._carrier.error)
        self._tell_storage()

    def _mark_durable(self, saved: Saved | None, image: ShardImage) -> None:
        self.shard.mark_durable(image)
        self.saved = saved or self.saved

    def _depose(self, error: SnapshotFenced) -> None:
        logger.error("%s", error)
        self.shard.is_deposed = True

    def _tell_storage(self) -> None:
        error = self._error or (None if self._carrier is None else self._carrier.error)
        self.shard.is_stalled = error is not None
        self.storage_error = None if error is None else str(error)

    def _finish(self) -> None:
        if self._saver is not None:
            self._collect()
        if self._store is not None and self.shard.is_ready and not self.shard.is_deposed:
            self._start_saving()
            if self._saver is not None:
                self._collect()
        if self._carrier is not None and not self.shard.is_deposed:
            self._carrier.finish(FINISH_S)
            self._look_at_carrier()


def _saved_of(name: str, image: ShardImage, taken_at: float) -> Saved:
    samples = min(part.samples for part in image.parts)
    return Saved(name, image.version, samples, taken_at)


def _size(reply: Reply) -> int:
    return sum(memoryview(frame).nbytes for frame in reply.payload)


class _Saver(threading.Thread):
    """Writes one image; `error` is what went wrong, and None only once it is on disk."""

    def __init__(
        self,
        store: SnapshotStore,
        image: ShardImage,
        taken_at: float,
        changes: int,
        start_of_ledger: str,
    ) -> None:
        """changes: `Shard.num_changes` when it was taken. start_of_ledger: as of `Ledger.turn`."""
        super().__init__(name="snapshot")
        self.changes = changes
        self.start_of_ledger = start_of_ledger
        self.image = image
        self.taken_at = taken_at
        self.path = store.folder
        self.error: SnapshotFailed | None = SnapshotFailed("the snapshot thread ended early")
        self._store = store

    def run(self) -> None:
        try:
            self.path = self._store.save(self.image)
        except SnapshotFailed as error:
            self.error = error
        else:
            self.error = None
