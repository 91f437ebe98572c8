"""ShardServer: the process around one Shard: a socket, one poll loop, snapshots.

One thread owns the shard and the socket; there are no locks. A second thread, alive only while
a snapshot is written, sees nothing but pinned tensors that nobody changes.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from distbelief.param_server.errors import RemoteProtocolError, SnapshotFailed
from distbelief.param_server.image import PartImage, ShardImage
from distbelief.param_server.part import Part
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
from distbelief.param_server.shard import CREDITS_MAX, Payload, Reply, Shard
from distbelief.param_server.shared import Shared
from distbelief.param_server.snapshot import SnapshotStore
from distbelief.param_server.transport import Delivery, Frame, ServerTransport
from distbelief.param_server.wire import sayable

logger = logging.getLogger(__name__)

TICK_S = 0.02
"""How long the loop waits for a message, and how often at least it looks at everything else."""

SWEEP_S = 1.0
"""How often it looks whether the processes whose memory it has mapped still live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotConfig:
    """When a shard saves itself."""

    every_s: float = 30.0
    """Seconds from one snapshot to the next while pushes arrive; 0 saves only at the end."""

    def __post_init__(self) -> None:
        if self.every_s < 0:
            raise ValueError(f"snapshot every_s must be at least 0, got {self.every_s}")


@dataclass(frozen=True, slots=True)
class Saved:
    """The newest snapshot on disk."""

    name: str
    version: int
    samples: int
    """Of the part furthest behind, both."""
    taken_at: float
    """When its image was taken, on the server's clock."""


def respond(
    shard: Shard, peer: bytes, frames: Sequence[Frame], now: float, shared: Shared | None = None
) -> Reply:
    """Decode one message, let the shard handle it; junk gets one short refusal and is counted."""
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
    reply = shard.handle(peer, message, payload, now)
    if shared is not None:
        reply = _share(shard, peer, message, reply, shared)
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
    ) -> None:
        """store: None keeps nothing on disk. shared: the one that made the shard's home; None
        serves over the transport alone. It is the caller's to close."""
        self.shard = shard
        self._transport = transport
        self._store = store
        self._config = config or SnapshotConfig()
        self._clock = clock
        self._sending: list[tuple[Delivery, Reply]] = []
        self._shared = shared
        self._swept_at = clock()
        self._saver: _Saver | None = None
        self._saved_pushes = _pushes(shard.parts.values())
        self._saved_at = clock()
        self.storage_error: str | None = None
        """Why the last snapshot failed; None while snapshots succeed."""
        self.saved: Saved | None = None
        """The newest snapshot that this process has written."""

    def serve(self, is_stopping: Callable[[], bool]) -> None:
        """Answer messages until `is_stopping`, asked each TICK_S, says so; then save."""
        while not is_stopping():
            until = self._clock() + TICK_S
            while self.answer(TICK_S) and self._clock() < until:
                pass
            self.look()
        self._finish()

    def serve_once(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for one message, answer it, and do what else is due."""
        self.answer(timeout_s)
        self.look()

    def answer(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` for one message and answer it. Returns: there was one."""
        try:
            received = self._transport.recv(timeout_s)
        except RemoteProtocolError as error:
            self.shard.counts["junk"] += 1
            logger.debug("junk shard=%d: %s", self.shard.config.index, error)
            return True
        if received is not None:
            peer, frames = received
            reply = respond(self.shard, peer, frames, self._clock(), self._shared)
            del received, frames  # the memory of a push goes back before that of the next comes
            delivery = self._transport.send(peer, [encode(reply.message), *reply.payload])
            if delivery is None:
                self.shard.counts["unsent"] += 1  # the peer asks again; the table makes it safe
                reply.release()
            elif reply.pins:
                self._sending.append((delivery, reply))
            self._release_sent()
            return True
        self._release_sent()
        return False

    def look(self) -> None:
        """Do what is due besides messages: snapshots, and letting go of dead workers' memory."""
        self._save_if_due()
        if self._shared is not None and self._clock() - self._swept_at >= SWEEP_S:
            self._swept_at = self._clock()
            self._shared.sweep()

    def _release_sent(self) -> None:
        if self._sending:
            still: list[tuple[Delivery, Reply]] = []
            for delivery, reply in self._sending:
                if delivery.is_done:
                    reply.release()
                else:
                    still.append((delivery, reply))
            self._sending = still

    # Snapshots

    def _save_if_due(self) -> None:
        if self._saver is not None:
            if self._saver.is_alive():
                return
            self._collect()
        every = self._config.every_s
        if (
            every
            and self._store is not None
            and self.shard.is_ready
            and _pushes(self.shard.parts.values()) > self._saved_pushes
            and self._clock() - self._saved_at >= every
        ):
            self._start_saving()

    def _start_saving(self) -> None:
        assert self._store is not None
        self._saver = _Saver(self._store, self.shard.image(), self._clock())
        self._saver.start()

    def _collect(self) -> None:
        """Take the result of a snapshot that has been written, or has failed."""
        assert self._saver is not None
        self._saver.join()
        image, error = self._saver.image, self._saver.error
        path, taken_at = self._saver.path, self._saver.taken_at
        self._saver = None
        self._saved_at = self._clock()
        image.release()
        if error is None:
            self._saved_pushes = _pushes(image.parts)
            self.shard.mark_durable(image)
            samples = min(part.samples for part in image.parts)
            self.saved = Saved(path.name, image.version, samples, taken_at)
            logger.info("saved shard=%d version=%d", image.index, image.version)
        elif self.storage_error is None:
            logger.error("%s", error)
        self.storage_error = None if error is None else str(error)

    def _finish(self) -> None:
        if self._saver is not None:
            self._collect()
        if self._store is not None and self.shard.is_ready:
            self._start_saving()
            self._collect()


def _pushes(parts: Iterable[Part | PartImage]) -> int:
    """Pushes taken by all parts: it rises too where one part refuses what the others take."""
    return sum(part.version for part in parts)


class _Saver(threading.Thread):
    """Writes one image; `error` is what went wrong, and None only once it is on disk."""

    def __init__(self, store: SnapshotStore, image: ShardImage, taken_at: float) -> None:
        super().__init__(name="snapshot")
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
