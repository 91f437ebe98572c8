"""Controller: knows who takes part, where the shards are, and who trains on what.

A state machine like the shard: `handle` takes one note and gives the answer to it; no socket, no
thread, no clock. It holds no parameters. The launcher runs it.
"""

import hmac
import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from distbelief.param_server.staleness import Staleness
from distbelief.workers.control import (
    AnyAnswer,
    AnyNote,
    Bad,
    Beat,
    Denied,
    Ended,
    Halt,
    Next,
    Noted,
    Over,
    Serving,
    Shards,
    Stepped,
    Wait,
    Where,
    Work,
)
from distbelief.workers.lease import LeaseQueue, Position

LEASE_BATCHES = 4
"""Batches in one lease: so much of a lost worker's data waits until others have time for it."""
GATHER_S = 60.0
"""The first worker waits so long for the others before it begins: what is wrong with one of
them, such as data that is missing there, is then known before anything was trained."""
LOSSES_MAX = 10_000
"""Samples whose mean loss is shown while the length of an epoch is not known."""
POSITIONS_MAX = 600
"""Moments of the data's position that are remembered."""
POSITION_EVERY_S = 1.0
RATE_WINDOW_S = 5.0
"""The live rate is of the last so many seconds."""


@dataclass(frozen=True, slots=True)
class Member:
    """A process that has reported."""

    name: str
    inc: int
    pid: int
    host: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the run is, for a person to look at."""

    samples: int
    total_samples: int | None
    updates: int
    """Smallest version of a part that a worker has heard of."""
    loss: float | None
    samples_per_s: float
    staleness: Staleness
    eta_s: float | None
    num_workers: int
    refused: int


@dataclass(frozen=True, slots=True)
class Saved:
    """The newest snapshot of a shard."""

    name: str
    epoch: int
    version: int
    samples: int
    taken_at: float
    """On the controller's clock."""


@dataclass(slots=True)
class _Window:
    """Losses and times of the newest steps."""

    losses: deque[tuple[float, int]] = field(default_factory=deque)
    num_losses: int = 0
    times: deque[tuple[float, int]] = field(default_factory=deque)


class Controller:
    """See the top of this file."""

    def __init__(
        self,
        run: str,
        token: str,
        queue: LeaseQueue,
        num_shards: int,
        num_epochs: int | None = None,
        num_updates: int | None = None,
        limit_s: float | None = None,
        *,
        num_workers: int = 1,
        digest: str = "",
        bad_max: int | None = None,
    ) -> None:
        """num_epochs, num_updates, limit_s: where to stop handing out work; the queue knows
        about epochs itself. num_workers: so many are waited for before the first one begins.
        digest: of the training split as the launcher sees it. bad_max: unreadable samples that
        the run puts up with; None is any number.
        """
        self.queue = queue
        self.members: dict[str, Member] = {}
        self.ended: dict[str, tuple[str, str]] = {}
        """Processes that have said their last word: (code, text), code empty if all was well."""
        self.explained: dict[str, tuple[str, str]] = {}
        """Why, and what to do, of those that ended with an error."""
        self.endpoints: dict[int, str] = {}
        self.storage_errors: dict[str, str] = {}
        self.lost: list[str] = []
        """Workers that vanished without a word."""
        self.saved: dict[str, Saved] = {}
        """The newest snapshot of each shard that has one."""
        self.is_halting_shards = False
        self.num_strangers = 0
        """Notes with a wrong run or token."""
        self.began_at: float | None = None
        """When the first worker had fetched its parameters."""
        self.last_step_at: float | None = None
        self.refused = 0
        self.refused_reason = ""
        self.skipped_samples = 0
        """Samples whose gradient a script threw away, as a GradScaler does."""
        self.bad_samples: dict[str, str] = {}
        """Samples that could not be read, and why."""
        self.worker_samples: Counter[str] = Counter()
        """Samples of each worker whose pushes were answered, over all its incarnations."""
        self.staleness = Staleness()
        """Of steps: the maximum over the parts of each push."""
        self._run = run
        self._token = token
        self._num_shards = num_shards
        self._total = None if num_epochs is None else num_epochs * queue.num_samples
        self._num_updates = num_updates
        self._limit_s = limit_s
        self._num_workers = num_workers
        self._digest = digest
        self._bad_max = bad_max
        self._failure: tuple[str, str, str] | None = None
        self._gathering_since: float | None = None
        self.is_initialised = False
        """A worker has its parameters, so the shards have them too."""
        self._ready: set[str] = set()
        """Workers that have their parameters."""
        self._has_started = False
        self._positions: list[tuple[float, Position]] = [(-math.inf, queue.position)]
        self._skipped: dict[str, int] = {}
        self._initialiser: str | None = None
        self._alive: dict[str, int] = {}
        self._gone: dict[str, int] = {}
        self._heard: dict[str, float] = {}
        self._given: dict[str, tuple[int, Work]] = {}
        self._answered: dict[str, int] = {}
        self._version = 0
        self._window = _Window()

    def handle(self, note: AnyNote, now: float) -> AnyAnswer | None:
        """Take one note and give its answer; None where none is expected."""
        is_ours = note.run == self._run and hmac.compare_digest(
            note.token.encode(), self._token.encode()
        )
        if not is_ours:
            self.num_strangers += 1
            return Halt()
        if note.inc <= self._gone.get(note.name, 0) and not isinstance(note, Ended):
            return None  # it was still on its way; a lease for the dead would never come back
        self._heard[note.name] = now
        if isinstance(note, Stepped):
            self._stepped(note, now)
            return None
        if isinstance(note, Bad):
            self._bad(note)
            return None
        if isinstance(note, Where):
            return self._where(note, now)
        if isinstance(note, Next):
            return self._next(note, now)
        if isinstance(note, Serving):
            self.members[note.name] = Member(note.name, note.inc, note.pid, note.host)
            self.endpoints[int(note.name.removeprefix("shard"))] = note.endpoint
            return Noted()
        if isinstance(note, Beat):
            return self._beat(note, now)
        return self._end(note)

    def lose(self, name: str) -> int:
        """A worker's process has vanished without a word. Returns the samples given back."""
        self.lost.append(name)
        self._forget(name)
        return self.queue.give_back(name)

    def silent(self, now: float, patience_s: float) -> list[str]:
        """Workers that take part and have said nothing for longer than that."""
        return [w for w in self._alive if now - self._heard.get(w, now) > patience_s]

    def tick(self, now: float) -> None:
        """Remember the position, and stop handing out work when the time is up."""
        if now - self._positions[-1][0] >= POSITION_EVERY_S:
            self._remember(now)
        if (
            self._limit_s is not None
            and self.began_at is not None
            and now - self.began_at >= self._limit_s
        ):
            self.queue.stop()

    @property
    def first_error(self) -> tuple[str, str, str] | None:
        """(process, code, text) of the first thing that ends the run with an error."""
        if self._failure is not None:
            return self._failure
        for name, (code, text) in self.ended.items():
            if code:
                return name, code, text
        return None

    @property
    def updates(self) -> int:
        """Smallest version of a part that a worker has heard of."""
        return self._version

    @property
    def train_s(self) -> float:
        """Seconds from the first fetch to the last step heard of."""
        if self.began_at is None or self.last_step_at is None:
            return 0.0
        return self.last_step_at - self.began_at

    @property
    def mean_loss(self) -> float | None:
        """Mean loss over the newest samples, at most an epoch of them."""
        losses = self._window.losses
        total = sum(n for _, n in losses)
        return sum(loss * n for loss, n in losses) / total if total else None

    def progress(self, now: float) -> Progress:
        times = self._window.times
        while times and now - times[0][0] > RATE_WINDOW_S:
            times.popleft()
        # Early in a run the window is not full yet: count from its beginning.
        seconds = min(RATE_WINDOW_S, now - self.began_at) if self.began_at is not None else 0.0
        rate = sum(n for _, n in times) / seconds if seconds > 0.5 else 0.0
        return Progress(
            samples=self.queue.done_samples,
            total_samples=self._total,
            updates=self._version,
            loss=self.mean_loss,
            samples_per_s=rate,
            staleness=self.staleness,
            eta_s=self._eta_s(now, rate),
            num_workers=len(self._alive),
            refused=self.refused,
        )

    def checkpoint(self) -> dict[str, object] | None:
        """The snapshots of all shards and a position of the data that fits them, as JSON.

        The position is of a moment not after them: between the two a sample may be trained on
        twice, but none is passed over. None as long as some shard has saved nothing.
        """
        if len(self.saved) < self._num_shards:
            return None
        saved = self.saved.values()
        oldest = min(one.taken_at for one in saved)
        fitting = [position for at, position in self._positions if at <= oldest]
        shards = {name: asdict(one) for name, one in sorted(self.saved.items())}
        for shard in shards.values():
            del shard["taken_at"]  # of no use on another clock
        return {
            "samples": min(one.samples for one in saved),
            "updates": min(one.version for one in saved),
            "shards": shards,
            "position": fitting[-1].as_dict(),
        }

    def halt_shards(self, now: float) -> None:
        """All workers have ended: shards may save themselves and end."""
        self.is_halting_shards = True
        self._remember(now)

    def workers(self) -> dict[str, dict[str, object]]:
        """What each worker that has ever reported is doing, as JSON."""
        names = sorted(set(self._alive) | set(self._gone), key=lambda name: (len(name), name))
        return {
            name: {
                "state": "training"
                if name in self._alive
                else ("ended" if name in self.ended else "lost"),
                "samples": self.worker_samples[name],
            }
            for name in names
        }

    def processes(self) -> list[Mapping[str, object]]:
        """Who runs where, as JSON."""
        return [
            {"name": m.name, "inc": m.inc, "pid": m.pid, "host": m.host}
            for m in self.members.values()
        ]

    # Inside

    def _remember(self, now: float) -> None:
        """The first position stays, and the others are the further apart the older they are: a
        shard that has not saved for hours still finds one that is not after its snapshot."""
        self._positions.append((now, self.queue.position))
        if len(self._positions) > POSITIONS_MAX:
            del self._positions[1:-1:2]

    def _where(self, note: Where, now: float) -> AnyAnswer:
        self.members[note.name] = Member(note.name, note.inc, note.pid, note.host)
        self._alive[note.name] = note.inc
        self._ready.discard(note.name)
        if note.digest != self._digest:
            text = (
                f"{note.name} on {note.host} sees other data than the launcher: "
                f"{note.num_samples} samples, the launcher {self.queue.num_samples}"
                + (", of other names or sizes" * (note.num_samples == self.queue.num_samples))
            )
            self._failure = self._failure or (note.name, "DB-DATA-002", text)
            return Halt()
        if len(self.endpoints) < self._num_shards or not self._has_gathered(now):
            return Wait()
        self._initialiser = self._initialiser or note.name
        if not self.is_initialised and self._initialiser != note.name:
            return Wait()  # until the parameters are there; if their bringer dies, it is its turn
        return Shards(
            endpoints=tuple(self.endpoints[i] for i in range(self._num_shards)),
            initialise=self._initialiser == note.name,
        )

    def _has_gathered(self, now: float) -> bool:
        """All workers have reported, or we have waited for them for long enough."""
        if self._gathering_since is None:
            self._gathering_since = now
        known = len(self._alive) + len(self._gone)
        return known >= self._num_workers or now - self._gathering_since >= GATHER_S

    def _may_start(self, now: float) -> bool:
        """All workers have their parameters: in a short run the first would else do it alone."""
        if not self._has_started:
            patience_is_over = now - (self._gathering_since or 0.0) >= GATHER_S
            self._has_started = patience_is_over or self._ready.issuperset(self._alive)
        return self._has_started

    def _next(self, note: Next, now: float) -> AnyAnswer:
        # A script may look at its data before it makes its model: then it has no parameters yet.
        if not (note.num_samples and note.name not in self._alive):
            self.is_initialised = True
            self._ready.add(note.name)
            if not self._may_start(now):
                return Wait()
            self._begin(now)
        number, work = self._given.get(note.name, (0, None))
        if work is not None and note.taken < number:
            return work  # the answer was lost
        if note.num_samples:
            try:
                # Small data is cut finer, so that every worker has something of an epoch.
                share = note.num_samples // max(1, self._num_workers * note.batch_size)
                batches = min(LEASE_BATCHES, max(1, share))
                self.queue.size(note.num_samples, batches * note.batch_size)
            except ValueError as error:
                return Denied(text=f"{note.name}: {error}")
        if note.is_first:
            self.queue.give_back(note.name, note.kept)
        lease = self.queue.take(note.name, note.upto)
        if lease is not None:
            work = Work(epoch=lease.epoch, start=lease.start, stop=lease.stop)
            self._given[note.name] = (note.taken + 1, work)
            return work
        if note.num_samples and self.queue.is_over(note.upto):
            return Over()
        # Nothing for now: another worker may still be lost, and its lease come back.
        return Halt() if self.queue.is_stopped or self.queue.is_finished else Wait()

    def _begin(self, now: float) -> None:
        if self.began_at is None:
            self.began_at = now

    def _beat(self, note: Beat, now: float) -> AnyAnswer:
        if note.name not in self._alive:  # a shard
            if note.storage_error:
                self.storage_errors[note.name] = note.storage_error
            else:
                self.storage_errors.pop(note.name, None)
            if note.saved:
                self._take_saved(note, now - note.age_s)
            return Halt() if self.is_halting_shards else Noted()
        return Halt() if self.queue.is_stopped else Noted()

    def _take_saved(self, note: Beat, taken_at: float) -> None:
        before = self.saved.get(note.name)
        if before is not None and (before.name, before.epoch) == (note.saved, note.inc):
            late_s = taken_at - before.taken_at
            if late_s < POSITION_EVERY_S:  # this note was longer on its way, or shorter
                taken_at = min(taken_at, before.taken_at)
        self.saved[note.name] = Saved(note.saved, note.inc, note.version, note.samples, taken_at)

    def _bad(self, note: Bad) -> None:
        self.bad_samples.update(zip(note.samples, note.reasons, strict=False))
        if self._bad_max is not None and len(self.bad_samples) > self._bad_max:
            name, why = next(iter(self.bad_samples.items()))
            text = (
                f"{len(self.bad_samples)} of {self.queue.num_samples} samples cannot be read, "
                f"more than the {self._bad_max} that data.max_bad allows; the first is {name}: "
                f"{why}"
            )
            self._failure = self._failure or (note.name, "DB-DATA-003", text)

    def _stepped(self, note: Stepped, now: float) -> None:
        self.is_initialised = True
        self._ready.add(note.name)
        if note.samples:
            self._begin(now)
        # An older note may come last, over a link that was given up: it tells nothing new.
        answered = max(0, note.answered - self._answered.get(note.name, 0))
        skipped = max(0, note.skipped - self._skipped.get(note.name, 0))
        self._answered[note.name] = self._answered.get(note.name, 0) + answered
        self._skipped[note.name] = self._skipped.get(note.name, 0) + skipped
        self.worker_samples[note.name] += answered
        self.skipped_samples += skipped
        self.queue.advance(note.name, answered + skipped)
        self.last_step_at = now
        if note.samples and note.knows_loss:
            window = self._window
            window.losses.append((note.loss, note.samples))
            window.num_losses += note.samples
            while window.num_losses - window.losses[0][1] >= (self.queue.num_samples or LOSSES_MAX):
                window.num_losses -= window.losses.popleft()[1]
        if note.samples:
            window = self._window
            window.times.append((now, note.samples))
        if note.pushed:
            self.staleness.add(note.staleness)
            self._version = max(self._version, note.version)
            if note.refused:
                self.refused += note.refused
                self.refused_reason = note.reason
            if self._num_updates is not None and self._version >= self._num_updates:
                self.queue.stop()

    def _end(self, note: Ended) -> AnyAnswer:
        self.ended[note.name] = (note.code, note.text)
        self.explained[note.name] = (note.why, note.fix)
        self._forget(note.name)
        self.queue.give_back(note.name)
        return Noted()

    def _forget(self, name: str) -> None:
        if name in self._alive:
            self._gone[name] = self._alive.pop(name)
        self._given.pop(name, None)
        self._answered.pop(name, None)
        self._skipped.pop(name, None)
        if self._initialiser == name and not self.is_initialised:
            self._initialiser = None  # the next one to ask brings the first parameters

    def _eta_s(self, now: float, rate: float) -> float | None:
        if self._limit_s is not None:
            return None if self.began_at is None else max(0.0, self._limit_s - now + self.began_at)
        if self._num_updates is not None and self.began_at is not None and self._version:
            pace = self._version / max(now - self.began_at, 1e-9)
            return max(0.0, (self._num_updates - self._version) / pace)
        if self._total is None or not rate:
            return None
        return max(0.0, (self._total - self.queue.done_samples) / rate)
