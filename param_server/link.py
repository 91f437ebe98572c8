"""Link: one client's conversation with one shard: requests, their replies in order, asking again.

A request is open until its reply is there; replies come in the order of the requests, so none
has an id. A reply that is missing, odd or late closes the connection, opens a new one, says
hello and sends every open request again: the shard's table of applied seqs makes that harmless.
A connection is never kept: it would deliver the later half of its queue without the message
that was on the way when the shard died.

Only so many requests are under way as the shard has credits for; the others wait here, where their
payload is no copy, instead of filling the shard's memory.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from distbelief.param_server.errors import Refused, RemoteProtocolError, ShardUnavailable
from distbelief.param_server.protocol import (
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
    Sync,
    Synced,
    Welcome,
    encode,
)
from distbelief.param_server.traffic import Traffic, Trip
from distbelief.param_server.transport import ClientTransport, Frame

_REPLY_OF: dict[type, type] = {
    Hello: Welcome,
    Init: Ready,
    Fetch: Params,
    Push: Ack,
    Merge: Merged,
    Leave: Left,
    Sync: Synced,
    Query: Report,
}

Take = Callable[[AnyReply, list[Frame]], None]
"""What a reply is given to; raises RemoteProtocolError if it is not what was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a client waits, in seconds."""

    retry_s: float = 30.0
    """Without a reply for this long, the link is opened anew and the request sent again."""
    give_up_s: float = 120.0
    """Without a reply for this long, in all, the shard counts as unavailable."""
    pause_s: float = 0.05
    """Between two questions to a shard that is not ready yet."""


class _Later(Exception):
    """The reply was none; the link will be opened anew by and by."""


class Ticket:
    """Something asked for. `is_done` once every shard concerned has answered, or one refused."""

    def __init__(self, pending: int) -> None:
        """pending: how many replies it waits for."""
        self.reply: AnyReply | None = None
        """The last reply, and its payload; only where nothing else takes them."""
        self.frames: list[Frame] = []
        self.error: Exception | None = None
        self.unsent = 0
        """Messages that belong to it and are not sent yet."""
        self._pending = pending

    @property
    def is_done(self) -> bool:
        return self._pending == 0 or self.error is not None

    @property
    def num_pending(self) -> int:
        """Replies that it waits for."""
        return self._pending

    def count_down(self) -> None:
        self._pending -= 1

    def count_up(self) -> None:
        """One more reply is to be waited for."""
        self._pending += 1

    def keep(self, reply: AnyReply, frames: list[Frame]) -> None:
        """Take a reply by keeping it."""
        self.reply, self.frames = reply, frames


Make = Callable[[], tuple[AnyRequest, Sequence[Frame]]]
"""Makes a request anew, for the epoch that the link is in now."""


@dataclass(slots=True)
class _Open:
    """A request without its reply."""

    message: AnyRequest
    payload: Sequence[Frame]
    ticket: Ticket
    take: Take
    asked_at: float
    first_asked_at: float
    make: Make | None = None
    sent_at: float = 0.0


class Link:
    """See the top of this file. `index` is the shard's, and the transport's number of the link."""

    def __init__(
        self,
        index: int,
        endpoint: str,
        transport: ClientTransport,
        patience: Patience,
        clock: Callable[[], float],
        hello: Callable[["Link"], tuple[Hello, Sequence[Frame]]],
        take_welcome: Callable[["Link", Welcome, list[Frame]], Sequence[tuple[Make, Take]]],
        traffic: Traffic | None = None,
    ) -> None:
        """hello: makes the message that opens a connection. take_welcome: gets the answer, and
        returns what has to be sent again before everything that is open. traffic: where it is
        counted what passes."""
        self.index = index
        self.endpoint = endpoint
        self.cut_at: float | None = None
        """Since when the shard is not there; None while it is."""
        self.epoch = 0
        """The shard's, as its welcome said."""
        self.is_ready = False
        """The shard has parameters, as its welcome said."""
        self.floor: Mapping[int, tuple[int, int]] = {}
        """By part, its version and the last own push in it when the shard's epoch began."""
        self.credits = 1
        """Requests that may be under way, as the shard said last."""
        self._transport = transport
        self._patience = patience
        self._clock = clock
        self._hello = hello
        self._take_welcome = take_welcome
        self._traffic = traffic or Traffic()
        self._has_left = False
        self._again_at = float("inf")
        self._open: deque[_Open] = deque()
        self._num_sent = 0
        """How many of the open requests, from the oldest on, are under way."""

    @property
    def is_local(self) -> bool:
        """Nothing of it leaves this host."""
        return self.endpoint.startswith(("tcp://127.", "tcp://[::1]", "tcp://localhost:"))

    def move(self, endpoint: str) -> None:
        """The shard is elsewhere now."""
        self.endpoint = endpoint
        self._ask_again(self._clock())

    @property
    def has_open(self) -> bool:
        """Some request has no reply yet."""
        return bool(self._open)

    def has_push_after(self, seq: int) -> bool:
        """A push with a later seq has no reply yet."""
        return any(isinstance(e.message, Push) and e.message.seq > seq for e in self._open)

    @property
    def first_push(self) -> int | None:
        """The smallest seq of a push that has no reply yet."""
        return min((e.message.seq for e in self._open if isinstance(e.message, Push)), default=None)

    def connect(self) -> None:
        self._transport.connect(self.index, self.endpoint)

    def greet(self) -> Ticket:
        """Say hello."""
        ticket = Ticket(1)
        self._greet(ticket, self._hello(self))
        return ticket

    def ask(
        self,
        message: AnyRequest,
        payload: Sequence[Frame] = (),
        ticket: Ticket | None = None,
        take: Take | None = None,
        make: Make | None = None,
    ) -> Ticket:
        """Send a request; its ticket is counted down by the reply, which `take` is given.

        make: of one that cannot be sent as it is to a shard in another epoch.
        """
        ticket = ticket or Ticket(1)
        self._has_left = isinstance(message, Leave)
        now = self._clock()
        self._open.append(_Open(message, payload, ticket, take or ticket.keep, now, now, make))
        self._send_on()
        return ticket

    def take(self, frames: list[Frame]) -> None:
        """A message has come: it is the reply to the oldest open request, or the order is lost.

        frames: none where the link was cut.
        Raises: ShardUnavailable.
        """
        if not frames:
            if not self._has_left:
                self._ask_again(self._clock())
            return
        if not self._open:
            return  # the reply to a request that was given up
        head, came_at = self._open[0], self._clock()
        self._traffic.received_bytes += sum(memoryview(frame).nbytes for frame in frames[1:])
        try:
            reply = REPLIES.decode(frames[0])
            assert isinstance(reply, AnyReply)  # the codec knows no other messages
            if not _answers(head.message, reply):
                raise RemoteProtocolError(f"{reply.op} in answer to {head.message.op}")
            if not isinstance(reply, Refusal) and reply.ep < self.epoch:
                raise RemoteProtocolError(f"epoch {reply.ep} after {self.epoch}: a ghost")
            if isinstance(reply, Refusal):
                self._refuse(head, reply)
            else:
                head.take(reply, frames[1:])
        except RemoteProtocolError:
            self._ask_again(self._clock())
            return
        except _Later:
            return
        self._open.popleft()
        self._num_sent -= 1
        if isinstance(reply, Welcome | Params | Ack) and reply.credits:
            self.credits = reply.credits
        head.ticket.count_down()
        if isinstance(reply, Params | Ack):
            seconds = came_at - head.sent_at
            self._traffic.trips.append(Trip(self.index, isinstance(reply, Ack), seconds))
        self._send_on()
        if self._open:  # a shard that answers one after the other is not silent
            following = self._open[0]
            following.asked_at = self._clock()
            if not isinstance(head.message, Hello):
                following.first_asked_at = following.asked_at

    def look(self, now: float) -> None:
        """Ask again if the oldest open request is overdue.

        Raises: ShardUnavailable if it has been for too long.
        """
        if now >= self._again_at or (
            self._open and now - self._open[0].asked_at > self._patience.retry_s
        ):
            self._ask_again(now)

    def _send_on(self) -> None:
        """Send what waits, as far as the credits reach; nothing before a hello was answered."""
        is_greeting = bool(self._open) and isinstance(self._open[0].message, Hello)
        limit = 1 if is_greeting else self.credits
        while self._num_sent < min(len(self._open), limit):
            entry = self._open[self._num_sent]
            self._num_sent += 1
            self._transport.send(self.index, [encode(entry.message), *entry.payload])
            entry.sent_at = self._clock()
            self._traffic.sent_bytes += sum(memoryview(one).nbytes for one in entry.payload)

    def _greet(self, ticket: Ticket, hello: tuple[Hello, Sequence[Frame]]) -> None:
        message, payload = hello

        def take(reply: AnyReply, frames: list[Frame]) -> None:
            assert isinstance(reply, Welcome)
            before = self.epoch
            if reply.ep != before:
                begun = zip(reply.restored, reply.bseq, strict=True)
                self.floor = dict(zip(reply.part, begun, strict=True))
            self.epoch, self.is_ready = reply.ep, reply.is_ready
            self.cut_at = None
            again = self._take_welcome(self, reply, frames)
            if before:
                self._begin_again(again)

        self.ask(message, payload, ticket, take)

    def _begin_again(self, first: Sequence[tuple[Make, Take]]) -> None:
        """The shard may be another process now: what it has forgotten goes before what is open."""
        now = self._clock()
        head, *waiting = self._open
        self._open = deque([head])
        for make, take in first:
            self._open.append(_Open(*make(), Ticket(1), take, now, now, make))
        for entry in waiting:
            if entry.make is not None:
                entry.message, entry.payload = entry.make()
            else:
                entry.message = replace(entry.message, ep=self.epoch)
            self._open.append(entry)

    def _refuse(self, head: _Open, reply: Refusal) -> None:
        if reply.code in ("hello", "epoch"):
            raise RemoteProtocolError("our hello was lost, or the shard is another process now")
        if reply.code == "deposed":  # whoever has taken its place may not be there yet
            self._again_at = self._clock() + self._patience.pause_s
            raise _Later
        refused = Refused(reply.code, reply.text)
        head.ticket.error = refused
        if isinstance(head.message, Hello):  # what follows it can only be "no hello"
            for entry in self._open:
                entry.ticket.error = entry.ticket.error or refused

    def _ask_again(self, now: float) -> None:
        """Open a new connection and send every open request again, behind a new hello."""
        waiting = [entry for entry in self._open if not isinstance(entry.message, Hello)]
        hellos = [entry for entry in self._open if isinstance(entry.message, Hello)]
        since = self._open[0].first_asked_at if self._open else now
        if now - since > self._patience.give_up_s:
            asked = (waiting or hellos)[0].message.op
            raise ShardUnavailable(
                f"shard {self.index} at {self.endpoint} has not answered {asked} for "
                f"{now - since:.0f} s: is its process alive, and is its port open from this host?"
            )
        self._again_at = float("inf")
        self._traffic.retries += 1
        self.cut_at = now if self.cut_at is None else self.cut_at
        hello = self._hello(self)  # it tells of what is open
        self._open.clear()
        self._num_sent = 0
        self.connect()
        self._greet(hellos[0].ticket if hellos else Ticket(1), hello)
        self._open[0].first_asked_at = since
        for entry in waiting:
            entry.asked_at = now
            self._open.append(entry)
        self._send_on()


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
