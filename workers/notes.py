"""Notes: what workers and shards and the controller say to each other. No socket, no clock.

    message = header                              header: see param_server/wire.py
    where   -> shards | wait | halt               a worker joins: it asks for the shards' endpoints
    find    -> shards | wait | halt               a worker asks where the shards are by now
    serving -> noted                              a shard tells its endpoint
    beat    -> noted | halt | drain | fence       a process asks whether it is still wanted
    fenced  -> noted | halt | fence               a shard tells what it has of a worker that is gone
    next    -> work | wait | halt | drain         a worker asks for a lease
                 | over | denied
    stepped    (no reply)                         a worker tells what a step brought
    bad        (no reply)                         a worker could not read some samples
    leaving    (no reply)                         a worker ends its step, pushes, and goes
    ended   -> noted                              a process ends, with or without an error

Every message names the run and shows its token. No tensor passes here.
"""

from dataclasses import dataclass, field
from typing import ClassVar, TypedDict

from distbelief.param_server import wire
from distbelief.param_server.place import NAME

QUARANTINED = "DB-RUN-015"
"""Code of a worker whose pushes a shard will not take any more: it is lost, and the run goes on."""

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

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.run) or not NAME.fullmatch(self.name):
            raise ValueError(f"names must match {NAME.pattern}, got {self.run!r} and {self.name!r}")


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
class Find(Note):
    op: ClassVar[str] = "find"


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving(Note):
    op: ClassVar[str] = "serving"
    endpoint: str
    pid: int
    host: str
    samples: tuple[int, ...] = ()
    """Applied to each of its parts in the snapshot that it goes on from; empty without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fenced(Note):
    """The shard takes nothing of a worker's process any more, and has this of it: see `Tally`."""

    op: ClassVar[str] = "fenced"
    w: str
    of_inc: int
    num_parts: int
    least: int
    most: int
    total: int
    least_refused: int
    most_refused: int


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
    left_out: int = 0
    """Samples, as `answered`, that could not be read."""
    partial: int = 0
    """Of those answered: some parts have refused them."""
    missed: int = 0
    """Of the partial ones, samples times the parts that have."""
    spoiled: int = 0
    """Of those answered: every part has refused them."""


class Outcome(TypedDict):
    """What became of a push, and of all so far, as `Stepped` tells it."""

    pushed: bool
    staleness: int
    version: int
    refused: int
    reason: str
    partial: int
    missed: int
    spoiled: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad(Note):
    op: ClassVar[str] = "bad"
    samples: tuple[str, ...]
    """Names of samples that could not be read, such as a file's path."""
    reasons: tuple[str, ...]
    """Why, one for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving(Note):
    """A worker that was drained, or was told by SIGTERM that its machine goes away: what becomes of
    it from here on is no loss."""

    op: ClassVar[str] = "leaving"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Note):
    op: ClassVar[str] = "ended"
    code: str
    """Empty, or a code of the documentation's table of errors."""
    text: str
    why: str = ""
    fix: str = ""
    is_drained: bool = False
    """A worker has left before the end of the run, as it was asked to."""


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
class Drain:
    """This worker is to leave, and the run goes on: the rest of its lease is for others."""

    op: ClassVar[str] = "drain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """This shard is to take nothing more of a worker's process, and to say what it has of it."""

    op: ClassVar[str] = "fence"
    w: str
    inc: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    op: ClassVar[str] = "noted"


AnyNote = Where | Find | Serving | Fenced | Beat | Next | Stepped | Bad | Leaving | Ended
AnyAnswer = Shards | Work | Wait | Over | Denied | Halt | Drain | Fence | Noted

NOTES = wire.Codec(Where, Find, Serving, Fenced, Beat, Next, Stepped, Bad, Leaving, Ended)
ANSWERS = wire.Codec(Shards, Work, Wait, Over, Denied, Halt, Drain, Fence, Noted)
