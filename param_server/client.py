"""Client: a worker's view of all shards: fetch and push whole vectors, hide parts and shards.

Used by one thread. `start_*` send and return a Ticket at once; `poll` takes replies in; `wait`
does so until a ticket is done. What a single shard is told and asked again is link.py's.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypedDict

import torch
from torch import Tensor

from distbelief.param_server.contract import Contract
from distbelief.param_server.errors import (
    LocalError,
    Refused,
    RemoteProtocolError,
    ShardUnavailable,
)
from distbelief.param_server.layout import Layout, PartRange
from distbelief.param_server.link import Link, Patience, Ticket
from distbelief.param_server.partition import Partition
from distbelief.param_server.protocol import (
    DTYPE,
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
    Welcome,
    as_frame,
    as_tensor,
    checksum,
)
from distbelief.param_server.transport import ClientTransport, Frame

MESSAGE_PARTS = 4
"""Parts in one message, if that does not make too many messages: while the shard applies one
message, the next one is on its way."""

MESSAGES_MAX = 16
"""Messages to one shard for one push or fetch. Far below the queue's limit (transport.HWM): a
client that sends without reading must never fill the queue of its own replies."""


class _Who(TypedDict):
    """The fields that every request begins with."""

    run: str
    w: str
    inc: int
    ep: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a client is."""

    run: str
    w: str
    inc: int = 0
    """Granted by the controller and rising; 0 for readers such as an evaluator."""
    token: str = field(repr=False)


class Fetched:
    """A worker's copy of the flat vector, and at which version each of its parts was fetched."""

    def __init__(self, layout: Layout) -> None:
        self.values = torch.zeros(layout.total)
        """1-D float32 [layout.total]."""
        parts = len(layout.parts)
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
    ) -> None:
        """endpoints: one a shard, in order; the client closes the transport.

        contract: None asks the shards for theirs, as an evaluator does.
        """
        self.identity = identity
        self.seq = 0
        """Pushes made by this incarnation."""
        self._transport = transport
        self._contract = contract
        self._patience = patience or Patience()
        self._clock = clock
        self._sleep = sleep
        self._links = [
            Link(index, endpoint, transport, self._patience, clock, self._hello, self._take_welcome)
            for index, endpoint in enumerate(endpoints)
        ]
        self._messages: tuple[tuple[Link, tuple[PartRange, ...]], ...] = ()

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
        return tuple(parts for _, parts in self._messages)

    # Whole conversations

    def connect(self) -> None:
        """Say hello to every shard. A client without a contract waits until the shards have one.

        Raises: Refused (another model, wrong token, replaced by a newer incarnation);
            ShardUnavailable.
        """
        for link in self._links:
            link.connect()
        for link in self._links:
            self._until_ready(partial(self._greet, link))
        partition = Partition(self.layout, len(self._links))
        self._messages = tuple(
            (link, parts[start : start + length])
            for link in self._links
            for parts in (partition.parts_of(link.index),)
            for length in (max(MESSAGE_PARTS, -(-len(parts) // MESSAGES_MAX)),)
            for start in range(0, len(parts), length)
        )

    def initialise(self, values: Tensor) -> None:
        """Bring the first values to every shard that has none yet.

        values: 1-D float32 [layout.total]; read only.
        """
        partition = Partition(self.layout, len(self._links))
        for link in self._links:
            if link.is_ready:
                continue
            parts = partition.parts_of(link.index)
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

    def fetch(self, into: Fetched) -> None:
        """Fetch the whole vector; waits until all shards have parameters."""
        self._until_ready(lambda: self.wait(self.start_fetch(into)))

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
        """Say that this worker pushes no more."""
        for ticket in [link.ask(Leave(**self._who(link))) for link in self._links]:
            self.wait(ticket)

    def close(self) -> None:
        self._transport.close()

    # Pieces

    def start_fetch(self, into: Fetched) -> Ticket:
        """Ask for the whole vector. `into` belongs to the client until the ticket is done."""
        ticket = Ticket(len(self._messages))
        for link, parts in self._messages:
            message = Fetch(**self._who(link), part=tuple(part.index for part in parts))
            link.ask(message, (), ticket, partial(self._take_params, into))
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
        ticket = self.begin_push(samples, base, into)
        for index in range(len(self._messages)):
            self.send_push(ticket, index, grad, absent)
        return ticket

    def begin_push(self, samples: int, base: Fetched, into: Fetched | None) -> PushTicket:
        """Begin a push whose messages are sent one by one; arguments as of `start_push`.

        Every message has to be sent once, in any order, before the next push begins.
        """
        self.seq += 1
        return PushTicket(len(self._messages), self.seq, samples, base, into)

    def send_push(
        self, ticket: PushTicket, index: int, grad: Tensor, absent: Sequence[bytes]
    ) -> None:
        """Send message `index` of a push; see `messages`."""
        ticket.unsent -= 1
        link, parts = self._messages[index]
        slices = [grad[part.start : part.stop] for part in parts]
        message = Push(
            **self._who(link),
            seq=ticket.pushed.seq,
            samples=ticket.samples,
            dt=DTYPE,
            fetch=ticket.into is not None,
            part=tuple(part.index for part in parts),
            base=tuple(ticket.base.version[part.index] for part in parts),
            bseq=tuple(ticket.base.bseq[part.index] for part in parts),
            numel=tuple(part.numel for part in parts),
            crc=tuple(checksum(piece) for piece in slices),
            absent=tuple(absent[part.index] for part in parts),
        )
        frames = [as_frame(piece) for piece in slices]
        link.ask(
            message, frames, ticket, lambda r, f: self._take_ack(ticket.pushed, ticket.into, r, f)
        )

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
        received = self._transport.recv(timeout_s)
        if received is not None:
            index, frames = received
            self._links[index].take(frames)
        now = self._clock()
        for link in self._links:
            link.look(now)

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
        return any(link.has_open for link in self._links)

    # Inside

    def _who(self, link: Link) -> _Who:
        me = self.identity
        return {"run": me.run, "w": me.w, "inc": me.inc, "ep": link.epoch}

    def _greet(self, link: Link) -> None:
        self.wait(link.greet())

    def _hello(self) -> tuple[Hello, Sequence[Frame]]:
        me = self.identity
        message = Hello(run=me.run, w=me.w, inc=me.inc, ep=0, token=me.token)
        return message, () if self._contract is None else (self._contract.to_json(),)

    def _take_welcome(self, link: Link, reply: Welcome, frames: list[Frame]) -> None:
        if reply.shard != link.index or reply.shards != len(self._links):
            raise LocalError(
                f"{link.endpoint} is shard {reply.shard} of {reply.shards}, expected "
                f"{link.index} of {len(self._links)}: the list of endpoints is wrong"
            )
        if self._contract is None:
            if len(frames) != 1:
                raise RemoteProtocolError("a welcome without the contract that was asked for")
            self._contract = Contract.from_json(bytes(frames[0]))

    def _take_ack(
        self, pushed: Pushed, into: Fetched | None, reply: AnyReply, frames: list[Frame]
    ) -> None:
        assert isinstance(reply, Ack)
        if into is not None:
            self._fill(into, reply, frames)
        is_first = not pushed.statuses
        pushed.statuses.update(reply.status)
        pushed.reasons.extend(text for text in reply.text if text)
        pushed.staleness = max(pushed.staleness, *reply.staleness)
        version, samples = min(reply.version), min(reply.samples)
        pushed.version = version if is_first else min(pushed.version, version)
        pushed.samples = samples if is_first else min(pushed.samples, samples)

    def _take_params(self, into: Fetched, reply: AnyReply, frames: list[Frame]) -> None:
        assert isinstance(reply, Params)
        self._fill(into, reply, frames)

    def _fill(self, into: Fetched, reply: Params | Ack, frames: list[Frame]) -> None:
        """Copy the parts of a reply into a worker's copy. Everything is looked at first."""
        parts = [self.layout.parts[index] for index in reply.part]
        values = [as_tensor(frame) for frame in frames]
        if [None if v is None else v.numel() for v in values] != [part.numel for part in parts]:
            raise RemoteProtocolError(f"parameters of parts {reply.part} in frames of other sizes")
        for column, (part, value) in enumerate(zip(parts, values, strict=True)):
            assert value is not None
            into.values[part.start : part.stop].copy_(value)
            into.version[part.index] = reply.version[column]
            into.samples[part.index] = reply.samples[column]
            into.bseq[part.index] = reply.bseq[column]

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
