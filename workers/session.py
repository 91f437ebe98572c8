"""Session: the part that a process running a user's script has in a run.

The launcher's process sets the session before it runs the script; `Downpour` and `DataLoader`
find it here. Where none was set the script was started by itself: then it trains alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from distbelief.param_server.client import Pushed
from distbelief.param_server.contract import Contract
from distbelief.param_server.traffic import Traffic
from distbelief.workers.comm import Calls
from distbelief.workers.exchange import Exchange
from distbelief.workers.lease import Lease
from distbelief.workers.notes import Outcome
from distbelief.workers.staging import Reading


class Stopped(SystemExit):
    """The run is being stopped: ends the script, from inside `step` or a loader."""

    def __init__(self) -> None:
        super().__init__(0)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """Which worker a script runs in."""

    index: int
    """From 0; a script that writes files does so where this is 0."""
    count: int
    """Workers that the run was started with; 1 alone."""
    incarnation: int = 1
    """Rises each time this worker is started again."""


class Replica(Protocol):
    """What a session asks of the Downpour of its process; see there what the words mean."""

    num_steps: int
    last_samples: int
    num_answered: int
    answered_samples: int
    skipped_samples: int

    @property
    def last_loss(self) -> float | None: ...

    exchange: Exchange

    measures_norm: bool

    @property
    def last_pushed(self) -> Pushed | None: ...

    @property
    def traffic(self) -> Traffic: ...

    @property
    def grad_norm(self) -> Reading | None: ...

    @property
    def device(self) -> str: ...

    @property
    def claimed_samples(self) -> int: ...

    @property
    def has_unanswered(self) -> bool: ...

    def outcome(self, is_new: bool) -> Outcome: ...

    def flush(self) -> None: ...

    def merge_buffers(self) -> None: ...

    def leave(self) -> None: ...


class Session(Protocol):
    """What Downpour and DataLoader need of the run around them. Used by one thread."""

    @property
    def info(self) -> WorkerInfo: ...

    @property
    def seed(self) -> int:
        """Of the run: the order of shared data follows from it."""
        ...

    @property
    def is_shared(self) -> bool:
        """Whether there are others to share the data with."""
        ...

    def join(self, contract: Contract) -> tuple[Calls, bool]:
        """Connect to the shards; also tells whether this process brings the first parameters.

        Raises: ValueError if the process has joined already; Refused, ShardUnavailable; Stopped.
        """
        ...

    def begin(self, downpour: Replica) -> None:
        """The parameters are there."""
        ...

    def stepped(self, downpour: Replica) -> None:
        """A step was taken. Raises: Stopped if the run is to end."""
        ...

    def iterate(self) -> int:
        """A new iteration over shared data begins: its number, of this process. The one before
        is over: what nobody has computed a gradient of goes to others."""
        ...

    def take(self, num_samples: int, batch_size: int, iteration: int) -> Lease | None:
        """One more lease for an iteration; None when its epoch has been handed out.

        Raises: Stopped; ValueError where the data has another length than on other workers, or
            a later iteration has begun.
        """
        ...

    def forget_count(self) -> None:
        """What was handed out and is not counted yet was only looked at."""
        ...

    def count(self, num_samples: int, iteration: int) -> None:
        """A batch of so many samples was handed to the script.

        Raises: ValueError where a later iteration has begun.
        """
        ...

    def wait_for_data(self, seconds: float) -> None:
        """So long a batch was waited for."""
        ...

    def uncount(self, num_samples: int) -> None:
        """So many samples that were taken will not be trained on (`drop_last`)."""
        ...

    def take_count(self) -> int:
        """Samples counted since the last call; 0 where nobody counts."""
        ...


_session: Session | None = None
_make_default: Callable[[], Session] | None = None


def current() -> Session:
    """The session of this process; the first call without a launcher makes one that is alone."""
    global _session
    if _session is None:
        assert _make_default is not None, "import distbelief, not its parts"
        _session = _make_default()
    return _session


def set_current(session: Session | None) -> None:
    """For whoever runs a script: its session, and None when it has ended."""
    global _session
    _session = session


def set_default(make: Callable[[], Session]) -> None:
    """How to make the session of a script that was started by itself."""
    global _make_default
    _make_default = make


def worker() -> WorkerInfo:
    """Which worker this script runs in: `worker().index == 0` writes the files."""
    return current().info
