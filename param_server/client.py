"""Client: a worker's view of all shards: fetch and push whole vectors, hide parts, ask again.

Used by one thread. `start_*` send and return a Ticket at once; `poll` takes replies in; `wait`
does so until a ticket is done. Requests on one link are answered in their order. A reply that
does not come closes the link, opens a new one, says hello and sends every open request again:
the shard's table of applied seqs makes that harmless.
"""

import time
from collections import Counter, deque
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
from distbelief.param_server.partition import Partition
from distbelief.param_server.protocol import (
    DTYPE,
    REPLIES,
    Ack,
    AnyReply,
    AnyRequest,
    Fetch,
    Hello,
    Init,
    Leave,
    Left,
    Merge,
    Merged,
    Params,
    Push,
    Query,
    Ready,
    Refusal,
    Report,
    Welcome,
    as_frame,
    as_tensor,
    checksum,
    encode,
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


_REPLY_OF: dict[type, type] = {
    Hello: Welcome,
    Init: Ready,
    Fetch: Params,
    Push: Ack,
    Merge: Merged,
    Leave: Left,
    Query: Report,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a client is."""

    run: str
    w: str
    inc: int = 0
    """Granted by the controller and rising; 0 for readers such as an evaluator."""
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a client waits, in seconds."""

    retry_s: float = 30.0
    """Without a reply for this long, the link is opened anew and the request sent again."""
    give_up_s: float = 120.0
    """Without a reply for this long, in all, the shard counts as unavailable."""
    pause_s: float = 0.05
    """Between two questions to a shard that is not ready yet."""


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


class Ticket:
    """Something asked for. `is_done` once every shard concerned has answered."""

    def __init__(self, pending: int, pushed: Pushed | None = None) -> None:
        self.pushed = pushed
        self.frames: list[Frame] = []
        """Payload of the last reply; only for replies that `into` does not take."""
        self.reply: AnyReply | None = None
        self.error: Exception | None = None
        self._pending = pending

    @property
    def is_done(self) -> bool:
        return self._pending == 0 or self.error is not None

    def count_down(self) -> None:
        self._pending -= 1


@dataclass(slots=True)
class _Open:
    """A request without its reply."""

    message: AnyRequest
    payload: Sequence[Frame]
    ticket: Ticket
    take: Callable[[AnyReply, list[Frame]], None]
    asked_at: float
    first_asked_at: float


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
        self._endpoints = list(endpoints)
        self._contract = contract
        self._patience = patience or Patience()
        self._clock = clock
        self._sleep = sleep
        self._epochs = [0] * len(self._endpoints)
        self._is_ready = [False] * len(self._endpoints)
        self._open: list[deque[_Open]] = [deque() for _ in self._endpoints]
        self._messages: tuple[tuple[int, tuple[PartRange, ...]], ...] = ()

    @property
    def contract(self) -> Contract:
        """The job's contract; known after `connect`."""
        assert self._contract is not None, "connect first"
        return self._contract

    @property
    def layout(self) -> Layout:
        return self.contract.layout

    # Whole conversations

    def connect(self) -> None:
        """Say hello to every shard. A client without a contract waits until the shards have one.

        Raises: Refused (another model, wrong token, replaced by a newer incarnation);
            ShardUnavailable.
        """
        for link, endpoint in enumerate(self._endpoints):
            self._transport.connect(link, endpoint)
        for link in range(len(self._endpoints)):
            self._until_ready(partial(self._greet, link))
        partition = Partition(self.layout, len(self._endpoints))
        self._messages = tuple(
            (shard, parts[start : start + length])
            for shard in self._links
            for parts in (partition.parts_of(shard),)
            for length in (max(MESSAGE_PARTS, -(-len(parts) // MESSAGES_MAX)),)
            for start in range(0, len(parts), length)
        )

    def initialise(self, values: Tensor) -> None:
        """Bring the first values to every shard that has none yet.

        values: 1-D float32 [layout.total]; read only.
        """
        partition = Partition(self.layout, len(self._endpoints))
        for link, is_ready in enumerate(self._is_ready):
            if is_ready:
                continue
            parts = partition.parts_of(link)
            slices = [values[part.start : part.stop] for part in parts]
            message = Init(
                **self._who(link),
                part=tuple(part.index for part in parts),
                numel=tuple(part.numel for part in parts),
                crc=tuple(checksum(piece) for piece in slices),
            )
            try:
                self.wait(self._ask(link, message, [as_frame(piece) for piece in slices]))
            except Refused as error:
                if error.code != "ready":  # somebody was first, or our first try did arrive
                    raise
            self._is_ready[link] = True

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
        tickets = [self._ask(link, Query(**self._who(link))) for link in self._links]
        return [bytes(self.wait(ticket).frames[0]) for ticket in tickets]

    def leave(self) -> None:
        """Say that this worker pushes no more."""
        for ticket in [self._ask(link, Leave(**self._who(link))) for link in self._links]:
            self.wait(ticket)

    def close(self) -> None:
        self._transport.close()

    # Pieces

    def start_fetch(self, into: Fetched) -> Ticket:
        """Ask for the whole vector. `into` belongs to the client until the ticket is done."""
        ticket = Ticket(len(self._messages))
        for link, parts in self._messages:
            message = Fetch(**self._who(link), part=tuple(part.index for part in parts))
            self._send(link, message, (), ticket, lambda r, f: self._take_params(into, r, f))
        return ticket

    def start_push(
        self,
        grad: Tensor,
        samples: int,
        base: Fetched,
        absent: Sequence[bytes],
        into: Fetched | None,
    ) -> Ticket:
        """Push the whole gradient; its `pushed` tells what became of it.

        grad: 1-D float32 [layout.total], zero where a tensor is absent; it must not change
        until the ticket is done. base: the copy it was computed on. absent: one mask a part, as
        `Layout.absent_masks` gives. into: filled with the fresh parameters of the reply, and
        the client's until the ticket is done; None asks for none.
        """
        self.seq += 1
        ticket = Ticket(len(self._messages), Pushed(self.seq))
        for link, parts in self._messages:
            slices = [grad[part.start : part.stop] for part in parts]
            message = Push(
                **self._who(link),
                seq=self.seq,
                samples=samples,
                dt=DTYPE,
                fetch=into is not None,
                part=tuple(part.index for part in parts),
                base=tuple(base.version[part.index] for part in parts),
                bseq=tuple(base.bseq[part.index] for part in parts),
                numel=tuple(part.numel for part in parts),
                crc=tuple(checksum(piece) for piece in slices),
                absent=tuple(absent[part.index] for part in parts),
            )
            frames = [as_frame(piece) for piece in slices]
            self._send(link, message, frames, ticket, self._taker(ticket, into))
        return ticket

    def start_merge(self, samples: int, floats: Tensor, integers: Tensor) -> Ticket:
        """As `merge`; the buffers live on shard 0."""
        message = Merge(
            **self._who(0), samples=samples, floats=floats.numel(), integers=integers.numel()
        )
        return self._ask(0, message, [as_frame(floats), as_frame(integers)])

    def poll(self, timeout_s: float) -> None:
        """Take in one reply, or see that one is overdue.

        Raises: ShardUnavailable when a shard has been silent for too long.
        """
        received = self._transport.recv(timeout_s)
        if received is not None:
            self._take(*received)
        now = self._clock()
        for link in self._links:
            if self._open[link] and now - self._open[link][0].asked_at > self._patience.retry_s:
                self._ask_again(link, now)

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
        return any(self._open)

    # Inside

    @property
    def _links(self) -> range:
        return range(len(self._endpoints))

    def _who(self, link: int) -> "_Who":
        me = self.identity
        return {"run": me.run, "w": me.w, "inc": me.inc, "ep": self._epochs[link]}

    def _greet(self, link: int) -> None:
        ticket = Ticket(1)
        self._say_hello(link, ticket)
        self.wait(ticket)

    def _say_hello(self, link: int, ticket: Ticket) -> None:
        me = self.identity
        message = Hello(run=me.run, w=me.w, inc=me.inc, ep=0, token=me.token)
        payload = () if self._contract is None else (self._contract.to_json(),)
        self._send(link, message, payload, ticket, lambda r, f: self._take_welcome(link, r, f))

    def _ask(self, link: int, message: AnyRequest, payload: Sequence[Frame] = ()) -> Ticket:
        ticket = Ticket(1)

        def keep(reply: AnyReply, frames: list[Frame]) -> None:
            ticket.reply, ticket.frames = reply, frames

        self._send(link, message, payload, ticket, keep)
        return ticket

    def _send(
        self,
        link: int,
        message: AnyRequest,
        payload: Sequence[Frame],
        ticket: Ticket,
        take: Callable[[AnyReply, list[Frame]], None],
    ) -> None:
        now = self._clock()
        self._open[link].append(_Open(message, payload, ticket, take, now, now))
        self._transport.send(link, [encode(message), *payload])

    def _take(self, link: int, frames: list[Frame]) -> None:
        if not self._open[link]:
            return  # the reply to a request that was given up
        head = self._open[link][0]
        try:
            reply = REPLIES.decode(frames[0])
            assert isinstance(reply, AnyReply)  # the codec knows no other messages
            if not _answers(head.message, reply):
                raise RemoteProtocolError(f"{reply.op} in answer to {head.message.op}")
            if isinstance(reply, Refusal) and reply.code == "hello":
                raise RemoteProtocolError("our hello was lost, or the shard is another process now")
            if isinstance(reply, Refusal):
                refused = Refused(reply.code, reply.text)
                head.ticket.error = refused
                if isinstance(head.message, Hello):  # what follows it can only be "no hello"
                    for entry in self._open[link]:
                        entry.ticket.error = entry.ticket.error or refused
            else:
                head.take(reply, frames[1:])
        except RemoteProtocolError:
            # One reply is missing or damaged, so the order is lost: begin the link anew.
            self._ask_again(link, self._clock())
            return
        self._open[link].popleft()
        head.ticket.count_down()
        if self._open[link]:  # a shard that answers one after the other is not silent
            following = self._open[link][0]
            following.asked_at = self._clock()
            if not isinstance(head.message, Hello):
                following.first_asked_at = following.asked_at

    def _ask_again(self, link: int, now: float) -> None:
        """Open the link anew and send every open request again, behind a new hello."""
        waiting = [entry for entry in self._open[link] if not isinstance(entry.message, Hello)]
        hellos = [entry for entry in self._open[link] if isinstance(entry.message, Hello)]
        oldest = self._open[link][0]
        if now - oldest.first_asked_at > self._patience.give_up_s:
            asked = (waiting or hellos)[0].message.op
            raise ShardUnavailable(
                f"shard {link} at {self._endpoints[link]} has not answered {asked} for "
                f"{now - oldest.first_asked_at:.0f} s: is its process alive, and is its port "
                "open from this host?"
            )
        self._open[link].clear()
        self._transport.connect(link, self._endpoints[link])
        self._say_hello(link, hellos[0].ticket if hellos else Ticket(1))
        self._open[link][0].first_asked_at = oldest.first_asked_at
        for entry in waiting:
            entry.asked_at = now
            self._open[link].append(entry)
            self._transport.send(link, [encode(entry.message), *entry.payload])

    def _take_welcome(self, link: int, reply: AnyReply, frames: list[Frame]) -> None:
        assert isinstance(reply, Welcome)
        if reply.shard != link or reply.shards != len(self._endpoints):
            raise LocalError(
                f"{self._endpoints[link]} is shard {reply.shard} of {reply.shards}, expected "
                f"{link} of {len(self._endpoints)}: the list of endpoints is wrong"
            )
        if self._contract is None:
            if len(frames) != 1:
                raise RemoteProtocolError("a welcome without the contract that was asked for")
            self._contract = Contract.from_json(bytes(frames[0]))
        self._epochs[link] = reply.ep
        self._is_ready[link] = reply.is_ready

    def _taker(
        self, ticket: Ticket, into: Fetched | None
    ) -> Callable[[AnyReply, list[Frame]], None]:
        return lambda reply, frames: self._take_ack(ticket, into, reply, frames)

    def _take_ack(
        self, ticket: Ticket, into: Fetched | None, reply: AnyReply, frames: list[Frame]
    ) -> None:
        assert isinstance(reply, Ack)
        if into is not None:
            self._fill(into, reply, frames)
        pushed = ticket.pushed
        assert pushed is not None
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


def _answers(request: AnyRequest, reply: AnyReply) -> bool:
    """A reply of the right kind to this very request; a refusal answers anything."""
    if isinstance(reply, Refusal):
        return True
    if type(reply) is not _REPLY_OF[type(request)]:
        return False
    if isinstance(request, Push) and isinstance(reply, Ack):
        return (reply.seq, reply.part) == (request.seq, request.part)
    if isinstance(request, Fetch) and isinstance(reply, Params):
        return reply.part == request.part
    return True
