"""Control: the conversation of workers and shards with the controller; the worker's side of it.

    message = header                              header: see param_server/wire.py
    where   -> shards | wait | halt               a worker asks for the shards' endpoints
    serving -> noted                              a shard tells its endpoint
    beat    -> noted | halt                       a process asks whether it is still wanted
    next    -> work | wait | halt                 a worker asks for a lease
                 | over | denied
    stepped    (no reply)                         a worker tells what a step brought
    bad        (no reply)                         a worker could not read some samples
    ended   -> noted                              a process ends, with or without an error

Every message names the run and shows its token. No tensor passes here.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, TypedDict, TypeVar

from distbelief.param_server import wire
from distbelief.param_server.errors import DistBeliefError, RemoteProtocolError
from distbelief.param_server.transport import ClientTransport

EPOCHS_END = 2**31
"""Later than any epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What every message to the controller begins with."""

    run: str
    token: str = field(repr=False)
    name: str
    """Of the process: w0, w1, ... or shard0, ..."""
    inc: int
    """Its incarnation or epoch."""


class Who(TypedDict):
    """The fields that every note begins with."""

    run: str
    token: str
    name: str
    inc: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Where(Note):
    op: ClassVar[str] = "where"
    pid: int
    host: str
    num_samples: int = 0
    """In the training split as this worker sees it; 0 where a script brings its own data."""
    digest: str = ""
    """Of that split; see `Split.digest`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving(Note):
    op: ClassVar[str] = "serving"
    endpoint: str
    pid: int
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat(Note):
    op: ClassVar[str] = "beat"
    storage_error: str = ""
    """Why the last snapshot failed; empty while they succeed."""
    saved: str = ""
    """Name of the last snapshot on disk; empty if there is none."""
    version: int = 0
    """Of its part furthest behind, in the snapshot."""
    samples: int = 0
    """Applied by its part furthest behind, in the snapshot."""
    age_s: float = 0.0
    """Seconds since the moment that the snapshot holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Next(Note):
    op: ClassVar[str] = "next"
    taken: int
    """Leases that this incarnation was given; the same number again gets the same lease."""
    upto: int = EPOCHS_END
    """The worker takes no lease of a later epoch. Our own loop has no such end."""
    num_samples: int = 0
    """As in `Where`, for a script: its loader learns the data's length only when it is made."""
    batch_size: int = 0
    """Of that loader."""
    is_first: bool = False
    """Of an iteration over that loader: what was left of the iteration before goes to others."""
    kept: int = 0
    """But for so many samples of it, whose gradient waits for its step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped(Note):
    op: ClassVar[str] = "stepped"
    answered: int
    """Samples whose pushes were answered, since this incarnation began; so a lost note heals."""
    samples: int
    """Samples of this step's batch."""
    loss: float
    pushed: bool
    """Some push was answered in this step; the numbers below speak of the last one."""
    staleness: int
    version: int
    refused: int
    """Parts of it that were refused."""
    reason: str
    """Why the first of them was."""
    knows_loss: bool = True
    """A script does not tell its loss, unless it gives `step` a closure."""
    skipped: int = 0
    """Samples, as `answered`, whose gradient was thrown away: nothing of them was pushed."""


class Outcome(TypedDict):
    """What became of a push, as `Stepped` tells it."""

    pushed: bool
    staleness: int
    version: int
    refused: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad(Note):
    op: ClassVar[str] = "bad"
    samples: tuple[str, ...]
    """Names of samples that could not be read, such as a file's path."""
    reasons: tuple[str, ...]
    """Why, one for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Note):
    op: ClassVar[str] = "ended"
    code: str
    """Empty, or a code of the documentation's table of errors."""
    text: str
    why: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    op: ClassVar[str] = "shards"
    endpoints: tuple[str, ...]
    initialise: bool
    """This worker brings the first parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    op: ClassVar[str] = "work"
    epoch: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    op: ClassVar[str] = "wait"


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """No more leases up to the epoch that was named."""

    op: ClassVar[str] = "over"


@dataclass(frozen=True, slots=True, kw_only=True)
class Denied:
    """What was asked for cannot be: the worker ends with this text."""

    op: ClassVar[str] = "denied"
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Halt:
    op: ClassVar[str] = "halt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    op: ClassVar[str] = "noted"


AnyNote = Where | Serving | Beat | Next | Stepped | Bad | Ended
AnyAnswer = Shards | Work | Wait | Over | Denied | Halt | Noted

NOTES = wire.Codec(Where, Serving, Beat, Next, Stepped, Bad, Ended)
ANSWERS = wire.Codec(Shards, Work, Wait, Over, Denied, Halt, Noted)

PAUSE_S = 0.1
"""Between two questions when the answer was to wait."""

RETRY_S = 5.0
"""A note without an answer for so long is sent again, over a new link; all may come twice."""

_A = TypeVar("_A")


class ControllerGone(DistBeliefError):
    """The controller has not answered for too long: this process is an orphan and should end."""


class Control:
    """One process's line to the controller. Used by one thread."""

    def __init__(
        self,
        transport: ClientTransport,
        endpoint: str,
        give_up_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._transport = transport
        self._endpoint = endpoint
        self._give_up_s = give_up_s
        self._clock = clock
        self._sleep = sleep
        self._asked_at = self._answered_at = clock()
        self._is_beat_open = False
        self._is_gone = False
        transport.connect(0, endpoint)

    def tell(self, note: Stepped | Bad) -> None:
        """Send a note that has no reply; it may be lost with the controller."""
        self._transport.send(0, [wire.encode(note)])

    def ask(self, note: AnyNote) -> AnyAnswer:
        """Send a note and wait for its answer, asking again where that does not come.

        Raises: ControllerGone after `give_up_s`, and at once from then on; RemoteProtocolError.
        """
        if self._is_beat_open:  # or its answer would be taken for this note's
            self._connect_anew()
        began = self._clock()
        while not self._is_gone and self._clock() - began < self._give_up_s:
            self._transport.send(0, [wire.encode(note)])
            asked = self._clock()
            while self._clock() - asked < RETRY_S:
                received = self._transport.recv(0.5)
                if received is not None:
                    answer = ANSWERS.decode(received[1][0])
                    assert isinstance(answer, AnyAnswer)  # the codec knows no other messages
                    return answer
            self._connect_anew()
        self._is_gone = True
        raise ControllerGone(
            f"the controller at {self._endpoint} has not answered {note.op} for "
            f"{self._give_up_s:.0f} s: was the launcher killed?"
        )

    def until(
        self, note: AnyNote, kind: type[_A], on_idle: Callable[[], None] | None = None
    ) -> _A | None:
        """Ask until the answer is not to wait; None if it is to halt.

        on_idle: called each time before waiting or halting, to finish what is half done.

        Raises: as `ask`; RemoteProtocolError for an answer of another kind.
        """
        while True:
            answer = self.ask(note)
            if isinstance(answer, kind):
                return answer
            if on_idle is not None:
                on_idle()
            if isinstance(answer, Halt):
                return None
            if not isinstance(answer, Wait):
                raise RemoteProtocolError(f"{answer.op} in answer to {note.op}")
            self.pause()

    def pause(self) -> None:
        """Let the time between two questions pass."""
        self._sleep(PAUSE_S)

    def is_told(self, note: Beat, every_s: float, kind: type[AnyAnswer]) -> bool:
        """Send a note every so often without waiting; True once an answer of `kind` came.

        Raises: ControllerGone if no answer has come for `give_up_s`.
        """
        now = self._clock()
        received = self._transport.recv(0)
        if received is not None:
            self._answered_at = now
            self._is_beat_open = False
            return isinstance(ANSWERS.decode(received[1][0]), kind)
        # One at a time: a queue full of notes to a controller that is gone would block `send`.
        if now - self._asked_at >= (max(every_s, RETRY_S) if self._is_beat_open else every_s):
            if self._is_beat_open:
                self._connect_anew()
            self._transport.send(0, [wire.encode(note)])
            self._asked_at = now
            self._is_beat_open = True
        if now - self._answered_at > self._give_up_s:
            self._is_gone = True
            raise ControllerGone(f"the controller at {self._endpoint} is silent")
        return False

    def close(self) -> None:
        self._transport.close()

    def _connect_anew(self) -> None:
        self._transport.connect(0, self._endpoint)
        self._is_beat_open = False
