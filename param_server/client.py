"""Client: a worker's view of all shards: fetch and push whole vectors, hide parts and shards.

Used by one thread. `start_*` send and return a Ticket at once; `poll` takes replies in; `wait`
does so until a ticket is done. What a single shard is told and asked again is link.py's.

With shards of its own host a client shares memory (shared.py): gradients that lie in a `vector`
are pushed by saying where they are, and fresh values are copied out of the shard's slab when its
reply says that they are there.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TypedDict

import torch
from torch import Tensor

from distbelief.param_server.backup import Backup, Kept, Parcel, window_of
from distbelief.param_server.compress import Compression, Encoder, Scratch, decode_, frame_bytes
from distbelief.param_server.contract import Contract
from distbelief.param_server.errors import (
    LocalError,
    Refused,
    RemoteProtocolError,
    ShardUnavailable,
)
from distbelief.param_server.history import History
from distbelief.param_server.identity import Identity
from distbelief.param_server.layout import Layout, PartRange
from distbelief.param_server.link import Link, Make, Patience, Take, Ticket
from distbelief.param_server.memory import Memory, MemoryRefused, is_supported, without_memory
from distbelief.param_server.partition import Partition
from distbelief.param_server.protocol import (
    MESSAGE_BYTES,
    SHARED,
    Ack,
    AnyReply,
    Fetch,
    Hello,
    Init,
    Leave,
    Merge,
    Merged,
    Params,
    Push,
    Query,
    Sync,
    Synced,
    Welcome,
    as_frame,
    checksum,
)
from distbelief.param_server.shared import VECTORS, vector_bytes, worker_bytes
from distbelief.param_server.slab import SlabReader
from distbelief.param_server.traffic import Traffic
from distbelief.param_server.transport import ClientTransport, Frame

logger = logging.getLogger(__name__)

MESSAGE_PARTS = 4
"""Parts in one message, at most, if that does not make too many messages: while the shard applies
one message, the next one is on its way."""

SYNC_S = 0.02
"""Between two questions of what is durable, while somebody waits for it."""

LOCATE_S = 0.5
"""A shard that is gone for so long may be elsewhere."""

MESSAGES_MAX = 32
"""Messages to one shard for one push or fetch. Far below the queue's limit (transport.HWM): a
client that sends without reading must never fill the queue of its own replies."""

SHARED_CUTS = (0.0, 0.1, 0.25, 0.55, 1.0)
"""How a push in shared memory is cut for a shard that has nothing else to do. The layers near the
loss, at the end of the vector, go first: the values of one message are copied out while the shard
applies the next, and what is applied and copied last, when backward has ended, should be little.
A busy shard gets a single message: headers are its cost."""


class _Who(TypedDict):
    """The fields that every request begins with."""

    run: str
    w: str
    inc: int
    ep: int


class Fetched:
    """A worker's copy of the flat vector, and at which version each of its parts was fetched."""

    def __init__(self, layout: Layout) -> None:
        self.values = torch.zeros(layout.total)
        """1-D float32 [layout.total]."""
        parts = len(layout.parts)
        self.epoch = [0] * parts
        """Of the shard; versions of two epochs cannot be compared."""
        self.version = [0] * parts
        self.bseq = [0] * parts
        """Per part, the last own push it had in it when it was fetched."""
        self.samples = [0] * parts
        """Per part, samples applied when it was fetched."""


@dataclass(slots=True)
class Pushed:
    """What became of one push, over all its parts."""

    seq: int
    statuses: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    """Why parts were refused, one text each."""
    staleness: int = 0
    """Of the step: the maximum over its parts."""
    version: int = 0
    """The smallest version of a part after this push."""
    samples: int = 0
    """The smallest number of samples applied to a part after this push."""

    @property
    def is_partial(self) -> bool:
        """Some parts refused the push: it counts for the others only."""
        return self.statuses["applied"] + self.statuses["dup"] < sum(self.statuses.values())


class PushTicket(Ticket):
    """The ticket of a push, with what became of it."""

    def __init__(
        self, pending: int, seq: int, samples: int, base: Fetched, into: Fetched | None
    ) -> None:
        super().__init__(pending)
        self.pushed = Pushed(seq)
        self.samples = samples
        self.base = base
        self.into = into
        self.unsent = pending
        self.vector: Tensor | None = None
        """Once it is done: what the next gradient may be written to; the caller's. None: the one
        that was pushed."""
        self.kept: Kept | None = None

    @property
    def is_answered(self) -> bool:
        """It waits for nothing but the backup; of one that is kept."""
        return self.kept is not None and not self.unsent and self.num_pending == 1


_Message = tuple[Link, tuple[PartRange, ...]]
"""Parts of one shard that travel together."""


class Client:
    """See the top of this file."""

    def __init__(
        self,
        transport: ClientTransport,
        endpoints: Sequence[str],
        identity: Identity,
        contract: Contract | None = None,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        *,
        memory: bool = False,
        compression: Compression | None = None,
        backup_bytes: int = 0,
        waits: bool = False,
        locate: Callable[[], Sequence[str]] | None = None,
        history: History | None = None,
    ) -> None:
        """endpoints: one a shard, in order; the client closes the transport.

        contract: None asks the shards for theirs, as an evaluator does.
        memory: share memory with the shards of this host; without a contract it does not.
        compression: of what goes over the network; what is shared is not compressed.
        backup_bytes: about so much of pushed gradients is kept until it is durable, to be sent
        again to shards that were restarted; 0 keeps none. waits: a push is done when it is durable.
        locate: asked for the endpoints where a shard has been gone for a while: it may be elsewhere
        by then; none if nobody knows. history: written along; the client closes it.
        """
        self.identity = identity
        self.seq = 0
        """Pushes made by this incarnation."""
        self._transport = transport
        self._contract = contract
        self._patience = patience or Patience()
        self._clock = clock
        self._sleep = sleep
        self.traffic = Traffic()
        """What passes; any thread may look."""
        hooks = (self._hello, self._take_welcome, self.traffic)
        self._links = [
            Link(index, endpoint, transport, self._patience, clock, *hooks)
            for index, endpoint in enumerate(endpoints)
        ]
        self._messages: tuple[_Message, ...] = ()
        self._few_messages: tuple[_Message, ...] = ()
        self._is_alone = True
        """No other worker's push came between the last two of this one."""
        self._is_sharing = memory and contract is not None and is_supported()
        self._compression = compression or Compression()
        self._encoders: dict[int, tuple[Encoder, Tensor]] = {}
        """By part: its encoder, and its frame until the push is answered."""
        self._scratch: Scratch | None = None
        self._last_push: PushTicket | None = None
        self._backup_bytes = 0 if contract is None else backup_bytes
        self._waits = waits
        self._locate = locate
        self._history = history
        self._located_at = float("-inf")
        self._backup: Backup | None = None
        self._unsettled: list[PushTicket] = []
        """Pushes that are not done yet, where they are kept."""
        self._syncing: dict[int, Ticket] = {}
        """By shard: a question of what is durable that has no answer yet."""
        self._synced_at = float("-inf")
        self._stalled: set[int] = set()
        """Shards that cannot save."""
        self.num_resent = 0
        """Messages that were sent again after a restart of a shard."""
        self._memory: Memory | None = None
        self._memory_start = 0
        self._num_vectors = 0
        self._slabs: dict[int, tuple[Memory, SlabReader]] = {}
        """By shard: what it shares with this process."""

    @property
    def contract(self) -> Contract:
        """The job's contract; known after `connect`."""
        assert self._contract is not None, "connect first"
        return self._contract

    @property
    def layout(self) -> Layout:
        return self.contract.layout

    @property
    def messages(self) -> tuple[tuple[PartRange, ...], ...]:
        """The parts that travel in each message of a push; known after `connect`."""
        return tuple([parts for _, parts in self._messages])

    @property
    def is_shared(self) -> bool:
        """Every shard is on this host and shares its memory; known after `connect`."""
        return len(self._slabs) == len(self._links)

    def vector(self) -> Tensor:
        """A zeroed 1-D float32 [layout.total] for gradients, where the shards can read it.

        In ordinary memory if no shard shares any, and after the first VECTORS of a client. Call
        it after `connect`. The caller's, until it is pushed where pushes are kept: then see
        `PushTicket.vector`. It stays usable after `close`.
        """
        backup = self._backup
        return self._make_vector() if backup is None else backup.take_vector()

    def _make_vector(self) -> Tensor:
        step = vector_bytes(self.layout)
        place = self._num_vectors * step
        if self._memory is None or not self._slabs or place == self._memory.size:
            return torch.zeros(self.layout.total)
        self._num_vectors += 1
        return self._memory.vector(place, self.layout.total)

    # Whole conversations

    def connect(self) -> None:
        """Say hello to every shard. A client without a contract waits until the shards have one.

        Raises: Refused (another model, wrong token, replaced by a newer incarnation);
            ShardUnavailable. ValueError where the compression does not suit the contract.
        """
        if self._contract is not None:
            self._compression.check(self._contract.rule, self._contract.clip_part_norm)
        if self._contract is not None and self._backup_bytes:
            layout = self._contract.layout
            window = window_of(4 * layout.total, self._backup_bytes)
            self._backup = Backup(len(layout.parts), window, self._make_vector, waits=self._waits)
        if self._is_sharing:
            self._make_memory()
        for link in self._links:
            link.connect()
        for link in self._links:
            self._until_ready(partial(self._greet, link))
        partition = Partition(self.layout, len(self._links))
        messages: list[_Message] = []
        few: list[_Message] = []
        for link in self._links:
            parts = partition.parts_of(link.index)
            if link.index in self._slabs:
                at = sorted({round(share * len(parts)) for share in SHARED_CUTS})
                messages += [(link, parts[i:j]) for i, j in pairwise(at)]
                few.append((link, parts))
            else:
                length = min(MESSAGE_PARTS, max(1, MESSAGE_BYTES // (4 * self.layout.part_numel)))
                length = max(length, -(-len(parts) // MESSAGES_MAX))
                cut = [(link, parts[i : i + length]) for i in range(0, len(parts), length)]
                messages += cut
                few += cut
        self._messages, self._few_messages = tuple(messages), tuple(few)

    def initialise(self, values: Tensor) -> None:
        """Bring the first values to every shard that has none yet.

        values: 1-D float32 [layout.total]; read only.
        """
        while True:
            for link in self._links:
                if not link.is_ready:
                    self._bring(link, values)
            # Until they are on disk only this worker could bring them again.
            if self._backup is None or self._is_saved():
                return

    def _bring(self, link: Link, values: Tensor) -> None:
        parts = Partition(self.layout, len(self._links)).parts_of(link.index)
        slices = [values[part.start : part.stop] for part in parts]
        message = Init(
            **self._who(link),
            part=tuple(part.index for part in parts),
            numel=tuple(part.numel for part in parts),
            crc=tuple(checksum(piece) for piece in slices),
        )
        try:
            self.wait(link.ask(message, [as_frame(piece) for piece in slices]))
        except Refused as error:
            if error.code != "ready":  # somebody was first, or our first try did arrive
                raise
        link.is_ready = True

    def _is_saved(self) -> bool:
        """Wait until every shard has a snapshot; False if one has no values to save any more."""
        for link in self._links:
            while True:
                try:
                    reply = self.wait(link.ask(Sync(**self._who(link), wants=True))).reply
                except Refused as error:
                    if error.code != "not-ready":
                        raise
                    link.is_ready = False
                    return False
                assert isinstance(reply, Synced)
                if reply.is_saved:
                    break
                if reply.is_stalled:
                    logger.warning("shard %d cannot save the first values", link.index)
                    break
                self._sleep(SYNC_S)
        return True

    def fetch(self, into: Fetched) -> None:
        """Fetch the whole vector; waits until all shards have parameters."""
        self._until_ready(lambda: self.wait(self.start_fetch(into)))

    def fetch_average(self, into: Fetched) -> None:
        """Fetch the shards' average of the vector, whose versions are its own (average.py); parts
        that have none yet as they are, at version 0. Nobody's training waits for it."""

        def ask() -> None:
            ticket = Ticket(len(self._few_messages))
            for link, parts in self._few_messages:
                self._ask_for(link, parts, into, ticket, values=True, average=True)
            self.wait(ticket)

        self._until_ready(ask)

    def merge(self, samples: int, floats: Tensor, integers: Tensor) -> tuple[Tensor, Tensor] | None:
        """Contribute buffers (samples > 0) and return the merged ones; None if there are none.

        floats: 1-D float32, integers: 1-D int64, as `BufferLayout.read` gives them.
        """
        ticket = self.wait(self.start_merge(samples, floats, integers))
        reply = ticket.reply
        assert isinstance(reply, Merged)
        if not reply.floats and not reply.integers:
            return None
        return (
            torch.frombuffer(bytearray(ticket.frames[0]) or bytearray(4), dtype=torch.float32)[
                : reply.floats
            ],
            torch.frombuffer(bytearray(ticket.frames[1]) or bytearray(8), dtype=torch.int64)[
                : reply.integers
            ],
        )

    def query(self) -> list[bytes]:
        """Statistics of every shard, as JSON texts in the order of the shards."""
        tickets = [link.ask(Query(**self._who(link))) for link in self._links]
        return [bytes(self.wait(ticket).frames[0]) for ticket in tickets]

    def leave(self) -> None:
        """Say that this worker pushes no more, once all it has pushed is durable."""
        backup = self._backup
        while backup is not None and backup.kept and not self._stalled:
            self.poll(SYNC_S)
            self._sync(self._clock())
        for ticket in [link.ask(Leave(**self._who(link))) for link in self._links]:
            self.wait(ticket)

    def close(self) -> None:
        self._transport.close()
        if self._history is not None:
            self._history.close()
        for memory, _ in self._slabs.values():
            memory.close()
        self._slabs.clear()
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    # Pieces

    def start_fetch(self, into: Fetched) -> Ticket:
        """Ask for the whole vector. `into` belongs to the client until the ticket is done."""
        ticket = Ticket(len(self._few_messages))
        for link, parts in self._few_messages:
            self._ask_for(link, parts, into, ticket, values=link.index not in self._slabs)
        return ticket

    def start_push(
        self,
        grad: Tensor,
        samples: int,
        base: Fetched,
        absent: Sequence[bytes],
        into: Fetched | None,
    ) -> PushTicket:
        """Push the whole gradient; its `pushed` tells what became of it.

        grad: 1-D float32 [layout.total], zero where a tensor is absent; it must not change
        until the ticket is done. base: the copy it was computed on. absent: one mask a part, as
        `Layout.absent_masks` gives. into: filled with the fresh parameters of the reply, and
        the client's until the ticket is done; None asks for none.
        """
        messages = self._messages if self._is_alone else self._few_messages
        ticket = self._begin_push(len(messages), samples, base, into, grad)
        for link, parts in reversed(messages):  # as backward completes them
            self._send_push(ticket, link, parts, grad, absent)
        return ticket

    def begin_push(
        self, samples: int, base: Fetched, into: Fetched | None, grad: Tensor
    ) -> PushTicket:
        """Begin a push whose messages are sent one by one; arguments as of `start_push`.

        Every message has to be sent once, in any order, before the next push begins.
        """
        return self._begin_push(len(self._messages), samples, base, into, grad)

    def send_push(
        self, ticket: PushTicket, index: int, grad: Tensor, absent: Sequence[bytes]
    ) -> None:
        """Send message `index` of a push; see `messages`."""
        link, parts = self._messages[index]
        self._send_push(ticket, link, parts, grad, absent)

    def start_merge(self, samples: int, floats: Tensor, integers: Tensor) -> Ticket:
        """As `merge`; the buffers live on shard 0."""
        first = self._links[0]
        message = Merge(
            **self._who(first), samples=samples, floats=floats.numel(), integers=integers.numel()
        )
        return first.ask(message, [as_frame(floats), as_frame(integers)])

    def poll(self, timeout_s: float) -> None:
        """Take in one reply, or see that one is overdue.

        Raises: ShardUnavailable when a shard has been silent for too long.
        """
        if any([ticket.is_answered for ticket in self._unsettled]):
            timeout_s = min(timeout_s, SYNC_S)
        received = self._transport.recv(timeout_s)
        if received is not None:
            index, frames = received
            self._links[index].take(frames)
        now = self._clock()
        for link in self._links:
            link.look(now)
            if link.cut_at is not None and now - max(link.cut_at, self._located_at) > LOCATE_S:
                self._find_shards()
        if self._unsettled:
            self._settle(now)

    def wait(self, ticket: Ticket) -> Ticket:
        """Poll until the ticket is done, and raise its error if it has one."""
        while not ticket.is_done:
            self.poll(0.1)
        if ticket.error is not None:
            raise ticket.error
        return ticket

    def wake(self) -> None:
        """Make a `poll` that waits in another thread return."""
        self._transport.wake()

    @property
    def has_open(self) -> bool:
        """Some request has no reply yet."""
        return bool(self._unsettled) or any(link.has_open for link in self._links)

    # Inside

    def _find_shards(self) -> None:
        endpoints = self._locate() if self._locate is not None else ()
        self._located_at = self._clock()
        for link, endpoint in zip(self._links, endpoints, strict=False):
            if endpoint and link.endpoint != endpoint:
                logger.info("shard %d has moved to %s", link.index, endpoint)
                link.move(endpoint)

    def _who(self, link: Link) -> _Who:
        me = self.identity
        return {"run": me.run, "w": me.w, "inc": me.inc, "ep": link.epoch}

    def _greet(self, link: Link) -> None:
        self.wait(link.greet())

    def _hello(self, link: Link) -> tuple[Hello, Sequence[Frame]]:
        me = self.identity
        address = "" if self._memory is None else self._memory.address
        message = Hello(
            run=me.run,
            w=me.w,
            inc=me.inc,
            ep=link.epoch,
            token=me.token,
            memory=address,
            first=self._first(link),
        )
        return message, () if self._contract is None else (self._contract.to_json(),)

    def _first(self, link: Link) -> int:
        """The smallest seq that can still be sent to a shard."""
        if self.identity.inc == 0:
            return 0
        if self._backup is not None and self._backup.first is not None:
            return self._backup.first
        last = self._last_push
        following = self.seq if last is not None and last.unsent else self.seq + 1
        return following if link.first_push is None else min(link.first_push, following)

    def _take_welcome(
        self, link: Link, reply: Welcome, frames: list[Frame]
    ) -> Sequence[tuple[Make, Take]]:
        if reply.shard != link.index or reply.shards != len(self._links):
            raise LocalError(
                f"{link.endpoint} is shard {reply.shard} of {reply.shards}, expected "
                f"{link.index} of {len(self._links)}: the list of endpoints is wrong"
            )
        if self._contract is None:
            if len(frames) != 1:
                raise RemoteProtocolError("a welcome without the contract that was asked for")
            self._contract = Contract.from_json(bytes(frames[0]))
        self._open_slab(link, reply.memory)
        self._syncing.pop(link.index, None)
        if self._backup is None:
            return []
        if self._history is not None:
            self._history.welcome(link.index, reply)
        again = self._backup.lacking(reply.part, reply.bseq)
        self.num_resent += len(again)
        if again:
            logger.info(
                "shard %d is in epoch %d: %d messages from push %d on are sent again",
                *(link.index, reply.ep, len(again), again[0].seq),
            )
        take = partial(self._take_resent, link)
        return [(partial(self._make_push, link, parcel, None), take) for parcel in again]

    def _take_resent(self, link: Link, reply: AnyReply, frames: list[Frame]) -> None:
        assert isinstance(reply, Ack)
        assert self._backup is not None
        if self._history is not None:
            self._history.ack(link.index, reply, again=True)
        self._backup.note(reply.part, reply.durable)
        odd = set(reply.status) - {"applied", "dup"}
        if odd:
            logger.warning("push %d, sent again: %s %s", reply.seq, sorted(odd), reply.text)

    def _begin_push(
        self, num_messages: int, samples: int, base: Fetched, into: Fetched | None, grad: Tensor
    ) -> PushTicket:
        is_open = self._last_push is not None and not self._last_push.is_done
        if is_open and self._compression.push != "float32":
            raise LocalError(
                "a compressed push begins before the last one was answered: its frames would be "
                "overwritten on the way"
            )
        self.seq += 1
        if self._history is not None:
            self._history.push(self.seq, samples)
        ticket = PushTicket(num_messages, self.seq, samples, base, into)
        self._last_push = ticket
        if self._backup is not None:
            ticket.kept = self._backup.begin(self.seq, grad)
            ticket.count_up()  # it is done when the backup has room again
            self._unsettled.append(ticket)
        return ticket

    def _send_push(
        self,
        ticket: PushTicket,
        link: Link,
        parts: Sequence[PartRange],
        grad: Tensor,
        absent: Sequence[bytes],
    ) -> None:
        ticket.unsent -= 1
        base, indices = ticket.base, [part.index for part in parts]
        parcel = Parcel(
            seq=ticket.pushed.seq,
            samples=ticket.samples,
            parts=tuple(parts),
            grad=grad,
            masks=tuple([absent[index] for index in indices]),
            base=tuple([base.version[index] for index in indices]),
            bseq=tuple([base.bseq[index] for index in indices]),
            ep=link.epoch,
        )
        if any([base.epoch[index] != link.epoch for index in indices]):
            parcel.ep = 0
        make = partial(self._make_push, link, parcel, ticket.into)
        message, payload = make()
        take = partial(self._take_ack, link, ticket, parcel)
        link.ask(message, payload, ticket, take, make)

    def _make_push(
        self, link: Link, parcel: Parcel, into: Fetched | None
    ) -> tuple[Push, list[Frame]]:
        """The message of a parcel, for the epoch and the memory that the link has now."""
        parcel.rebase(link.epoch, link.floor)
        parts, masks = parcel.parts, parcel.masks
        place = None if parcel.frames else self._place(link, parcel.grad)
        is_shared = place is not None
        if is_shared:
            frames = []
        elif parcel.frames or self._compression.push != "float32":
            frames = parcel.frames = parcel.frames or [
                self._encode(part, parcel.grad, mask)
                for part, mask in zip(parts, masks, strict=True)
            ]
        else:
            frames = [parcel.grad[part.start : part.stop] for part in parts]
        message = Push(
            **self._who(link),
            seq=parcel.seq,
            samples=parcel.samples,
            dt=SHARED if is_shared else self._compression.push,
            fetch=into is not None and not is_shared,
            part=tuple([part.index for part in parts]),
            base=parcel.base,
            bseq=parcel.bseq,
            numel=() if is_shared else tuple([part.numel for part in parts]),
            crc=() if link.is_local else tuple([checksum(frame) for frame in frames]),
            absent=masks if any(masks) else (),
            place=place or 0,
            back=self._back(link),
        )
        return message, [as_frame(frame) for frame in frames]

    def _back(self, link: Link) -> str:
        """The form that values come back in: what is shared is not compressed."""
        return "float32" if link.index in self._slabs else self._compression.fetch

    def _encode(self, part: PartRange, grad: Tensor, mask: bytes) -> Tensor:
        """An encoder's frame of a part's gradient; overwritten by the next push if none is kept."""
        form, top = self._compression.push, self._compression.top
        size = frame_bytes(form, part.numel, top)
        if part.index not in self._encoders:
            scratch = self._scratch = self._scratch or Scratch(self.layout.part_numel)
            frame = torch.empty(size, dtype=torch.uint8)
            self._encoders[part.index] = Encoder(form, part.numel, scratch, top), frame
        encoder, frame = self._encoders[part.index]
        if self._backup is not None:
            frame = torch.empty(size, dtype=torch.uint8)
        present = self.layout.present_runs(part.index, mask) if mask else None
        encoder.encode_(grad[part.start : part.stop], frame, present)
        return frame

    def _ask_for(
        self,
        link: Link,
        parts: Sequence[PartRange],
        into: Fetched,
        ticket: Ticket,
        *,
        values: bool,
        average: bool = False,
    ) -> None:
        def make() -> tuple[Fetch, Sequence[Frame]]:
            message = Fetch(
                **self._who(link),
                part=tuple([part.index for part in parts]),
                values=values or link.index not in self._slabs,
                back="float32" if average else self._back(link),
                average=average,
            )
            return message, ()

        take = partial(self._take_params, link, ticket, into, average)
        link.ask(*make(), ticket, take, make)

    def _take_ack(
        self,
        link: Link,
        ticket: PushTicket,
        parcel: Parcel,
        reply: AnyReply,
        frames: list[Frame],
    ) -> None:
        assert isinstance(reply, Ack)
        if link.index in self._slabs and not parcel.frames:
            self.traffic.sent_bytes += 4 * sum(part.numel for part in parcel.parts)
        if ticket.into is not None:
            self._fill(link, ticket, ticket.into, reply, frames, self._back(link))
        pushed = ticket.pushed
        is_first = not pushed.statuses
        pushed.statuses.update(reply.status)
        pushed.reasons.extend(text for text in reply.text if text)
        pushed.staleness = max(pushed.staleness, *reply.staleness)
        self._is_alone = pushed.staleness == 0
        version, samples = min(reply.version), min(reply.samples)
        pushed.version = version if is_first else min(pushed.version, version)
        pushed.samples = samples if is_first else min(pushed.samples, samples)
        if self._history is not None:
            self._history.ack(link.index, reply, again=False)
        if self._backup is not None and ticket.kept is not None:
            self._backup.note(reply.part, reply.durable)
            ticket.kept.parcels.append(parcel)

    # Durability

    def _settle(self, now: float) -> None:
        """End pushes that the backup has room behind, and ask for snapshots where it has none."""
        backup = self._backup
        assert backup is not None
        answered = [ticket for ticket in self._unsettled if ticket.is_answered]
        for ticket in answered:
            assert ticket.kept is not None
            ticket.kept.is_answered = True
        backup.release()
        is_waiting = False
        for ticket in answered:
            if self._stalled and not backup.waits and not backup.is_settled(ticket.pushed.seq):
                self._drop_oldest()
            if backup.is_settled(ticket.pushed.seq):
                ticket.vector = backup.take_vector()
                ticket.count_down()
            else:
                is_waiting = True
        self._unsettled = [ticket for ticket in self._unsettled if not ticket.is_done]
        if is_waiting:
            self._sync(now)

    def _drop_oldest(self) -> None:
        """Training goes on where shards cannot save."""
        backup = self._backup
        assert backup is not None
        backup.drop_oldest()
        if backup.num_dropped == 1:
            logger.warning(
                "shards %s cannot save: pushes before %d are lost if one is restarted",
                *(sorted(self._stalled), backup.first),
            )

    def _sync(self, now: float) -> None:
        """Ask the shards what is durable, and to save."""
        assert self._backup is not None
        if now - self._synced_at < SYNC_S:
            return
        self._synced_at = now
        for link in self._links:
            if link.index not in self._syncing:
                ticket = Ticket(1)
                self._syncing[link.index] = ticket
                take = partial(self._take_synced, link)
                link.ask(Sync(**self._who(link), wants=True), (), ticket, take)

    def _take_synced(self, link: Link, reply: AnyReply, frames: list[Frame]) -> None:
        assert isinstance(reply, Synced)
        assert self._backup is not None
        self._syncing.pop(link.index, None)
        self._backup.note(reply.part, reply.durable)
        self._backup.release()
        (self._stalled.add if reply.is_stalled else self._stalled.discard)(link.index)

    # Values

    def _take_params(
        self,
        link: Link,
        ticket: Ticket,
        into: Fetched,
        is_average: bool,
        reply: AnyReply,
        frames: list[Frame],
    ) -> None:
        assert isinstance(reply, Params)
        form = "float32" if is_average else self._back(link)
        self._fill(link, ticket, into, reply, frames, form)

    def _fill(
        self,
        link: Link,
        ticket: Ticket,
        into: Fetched,
        reply: Params | Ack,
        frames: list[Frame],
        form: str,
    ) -> None:
        """Bring the parts of a reply into a worker's copy. Everything is looked at first."""
        began = self._clock()
        try:
            self._fill_parts(link, ticket, into, reply, frames, form)
        finally:
            self.traffic.fill_s += self._clock() - began

    def _fill_parts(
        self,
        link: Link,
        ticket: Ticket,
        into: Fetched,
        reply: Params | Ack,
        frames: list[Frame],
        form: str,
    ) -> None:
        parts = [self.layout.parts[index] for index in reply.part]
        if link.index in self._slabs and not reply.numel and not frames:
            self._read(link, ticket, into, parts, reply.bseq)
            self.traffic.received_bytes += 4 * sum(part.numel for part in parts)
            return
        sizes = [memoryview(frame).nbytes for frame in frames]
        if sizes != [frame_bytes(form, part.numel) for part in parts]:
            raise RemoteProtocolError(f"parameters of parts {reply.part} in frames of other sizes")
        for column, (part, frame) in enumerate(zip(parts, frames, strict=True)):
            decode_(form, frame, into.values[part.start : part.stop])
            into.epoch[part.index] = reply.ep
            into.version[part.index] = reply.version[column]
            into.samples[part.index] = reply.samples[column]
            into.bseq[part.index] = reply.bseq[column]

    # Shared memory

    def _make_memory(self) -> None:
        try:
            more = 0 if self._backup is None else self._backup.window
            size = worker_bytes(self.layout, VECTORS + more)
            self._memory = Memory.create("worker", size)
        except OSError as error:
            logger.warning("%s: everything goes over TCP", without_memory(error))
            self._is_sharing = False
            return
        self._memory_start = self._memory.array().ctypes.data

    def _open_slab(self, link: Link, address: str) -> None:
        """Map what a shard shares; without it this link goes over TCP."""
        old = self._slabs.pop(link.index, None)
        if old is not None:
            old[0].close()
        if not address:
            return
        try:
            memory = Memory.open(address, "shard")
        except MemoryRefused as error:
            logger.warning("shard %d is spoken to over TCP: %s", link.index, error)
            return
        parts = Partition(self.layout, len(self._links)).parts_of(link.index)
        try:
            self._slabs[link.index] = memory, SlabReader(memory.array(), parts)
        except ValueError as error:
            memory.close()
            logger.warning("shard %d is spoken to over TCP: %s", link.index, error)

    def _place(self, link: Link, grad: Tensor) -> int | None:
        """Where a gradient lies in this worker's memory; None if the shard cannot read it."""
        if self._memory is None or link.index not in self._slabs:
            return None
        place = grad.data_ptr() - self._memory_start
        return place if 0 <= place < self._memory.size else None

    def _read(
        self,
        link: Link,
        ticket: Ticket,
        into: Fetched,
        parts: list[PartRange],
        bseq: Sequence[int],
    ) -> None:
        """Copy fresh values out of the slab; those that are not there are asked for."""
        missing = {part.index for part in parts}
        for part, seq in zip(parts, bseq, strict=True):
            into.bseq[part.index] = seq
            into.epoch[part.index] = link.epoch

        def take(part: PartRange, version: int, samples: int) -> None:
            into.version[part.index], into.samples[part.index] = version, samples
            missing.remove(part.index)

        # Values that have a later push of ours in them would be booked as without it.
        is_exact = not link.has_push_after(max(bseq))
        if not (is_exact and self._read_slab(link, parts, into.values, take)):
            ticket.count_up()
            some = [part for part in parts if part.index in missing]
            self._ask_for(link, some, into, ticket, values=True)

    def _read_slab(
        self,
        link: Link,
        parts: list[PartRange],
        values: Tensor,
        take: Callable[[PartRange, int, int], None],
    ) -> bool:
        try:
            return self._slabs[link.index][1].read(parts, values, take)
        except ValueError as error:
            logger.warning("shard %d: %s; its values are asked for", link.index, error)
            return False

    def _until_ready(self, ask: Callable[[], object]) -> None:
        """Ask until the shards have what is asked for: the first worker is still bringing it."""
        began = self._clock()
        while True:
            try:
                ask()
                return
            except Refused as error:
                if error.code != "not-ready":
                    raise
                if self._clock() - began > self._patience.give_up_s:
                    raise ShardUnavailable(
                        f"no first worker has brought the parameters for "
                        f"{self._patience.give_up_s:.0f} s"
                    ) from error
            while self.has_open:  # let the other shards' replies to the same question come in
                self.poll(0.1)
            self._sleep(self._patience.pause_s)
