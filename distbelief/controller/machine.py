"""Machine: the controller as a state machine, like the shard.

`handle` takes one note and gives the answer to it; no socket, no thread, no clock. It holds no
parameters.
"""

import hmac
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field

from distbelief.controller.account import Account, Told
from distbelief.controller.fences import Fences
from distbelief.controller.pace import Pace, Progress
from distbelief.controller.saves import Saves
from distbelief.param_server.staleness import Staleness
from distbelief.workers.lease import LeaseQueue
from distbelief.workers.notes import (
    QUARANTINED,
    AnyAnswer,
    AnyNote,
    Bad,
    Beat,
    Denied,
    Drain,
    Ended,
    Fenced,
    Find,
    Halt,
    Leaving,
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

CONTROLLER = "controller"
"""Name of its process, beside w0 and shard0."""
LEASE_BATCHES = 4
"""Batches in one lease: so much of a lost worker's data waits until others have time for it."""
GATHER_S = 60.0
"""The first worker waits so long for the others before it begins: what is wrong with one of
them, such as data that is missing there, is then known before anything was trained."""
STALL_S = 1.0
"""A controller that is not ticked for so long has not listened either."""
ELASTIC_GATHER_S = 10.0
"""The same where a run may go on with fewer, and those are there: others may have no room yet."""


@dataclass(frozen=True, slots=True)
class Member:
    """A process that has reported."""

    name: str
    inc: int
    pid: int
    host: str


@dataclass(eq=False)
class Controller:
    """See the top of this file.

    All that it knows is in its fields, and what it does depends on nothing else: given the same
    calls in the same order, a copy of it comes to the same state (see standby.py).
    """

    run: str
    token: str = field(repr=False)
    queue: LeaseQueue
    num_shards: int
    num_epochs: int | None = None
    """Where to stop handing out work; so are the next two. The queue knows about epochs itself."""
    num_updates: int | None = None
    limit_s: float | None = None
    _: KW_ONLY
    num_workers: int = 1
    """So many are waited for before the first one begins."""
    min_workers: int = 0
    """So many are, unless it is 0, when that takes long."""
    digest: str = ""
    """Of the training split as the launcher sees it."""
    bad_max: int | None = None
    """Unreadable samples that the run puts up with; None is any number."""

    members: dict[str, Member] = field(default_factory=dict)
    ended: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Processes that have said their last word: (code, text), code empty if all was well."""
    explained: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Why, and what to do, of those that ended with an error."""
    endpoints: dict[int, str] = field(default_factory=dict)
    storage_errors: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    """Workers that vanished without a word."""
    drained: list[str] = field(default_factory=list)
    """Workers that left before the end because they were asked to."""
    quarantined: dict[str, str] = field(default_factory=dict)
    """Workers that a shard takes nothing of any more, and why; until another one is started."""
    is_halting_shards: bool = False
    num_strangers: int = 0
    """Notes with a wrong run or token, by another's key, or that their sender has no business
    to send."""
    pace: Pace = field(default_factory=Pace)
    refused: int = 0
    refused_reason: str = ""
    skipped_samples: int = 0
    """Samples whose gradient a script threw away, as a GradScaler does."""
    bad_samples: dict[str, str] = field(default_factory=dict)
    """Samples that could not be read, and why."""
    worker_samples: Counter[str] = field(default_factory=Counter)
    """Samples of each worker whose pushes were answered, over all its incarnations."""
    staleness: Staleness = field(default_factory=Staleness)
    """Of steps: the maximum over the parts of each push."""
    is_initialised: bool = False
    """A worker has its parameters, so the shards have them too."""
    account: Account = field(default_factory=Account)
    samples_before: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By shard: applied to each part when it first served."""
    num_pushed: int = 0
    """Pushes that all shards have answered."""
    pushed: Counter[str] = field(default_factory=Counter)
    """Those of which nothing was refused, by the process that pushed, since it was started."""
    ticked_at: float = -math.inf
    _drains: set[str] = field(default_factory=set)
    """Workers that are to leave."""
    _leaving: set[str] = field(default_factory=set)
    """Workers that have said that they do."""
    _failure: tuple[str, str, str] | None = None
    _gathering_since: float | None = None
    _ready: set[str] = field(default_factory=set)
    """Workers that have their parameters."""
    _has_started: bool = False
    _told: dict[str, Told] = field(default_factory=dict)
    _fences: Fences = field(default_factory=Fences)
    _initialiser: str | None = None
    _newest: dict[str, int] = field(default_factory=dict)
    """By name, the number of the process that is of that name now."""
    _alive: dict[str, int] = field(default_factory=dict)
    _gone: dict[str, int] = field(default_factory=dict)
    _heard: dict[str, float] = field(default_factory=dict)
    _given: dict[str, tuple[int, Work]] = field(default_factory=dict)
    _version: int = 0
    saves: Saves = field(default_factory=Saves)

    def __post_init__(self) -> None:
        self.saves.begin = self.saves.begin or self.queue.position

    def handle(self, note: AnyNote, now: float, speaker: str | None = None) -> AnyAnswer | None:
        """Take one note and give its answer; None where none is expected.

        speaker: whose key it was sent with; None where there are no keys.
        """
        is_ours = note.run == self.run and hmac.compare_digest(
            note.token.encode(), self.token.encode()
        )
        if not is_ours or speaker not in (None, note.name) or not self._may_say(note):
            self.num_strangers += 1
            return Halt()
        newest = max(self._newest.get(note.name, 0), self._gone.get(note.name, 0) + 1)
        if note.inc < newest and not (isinstance(note, Ended) and note.inc == newest - 1):
            # A ghost's, or one that was still on its way: a lease for the dead would not come back.
            return None if isinstance(note, Stepped | Bad | Leaving) else Halt()
        self._heard[note.name] = now
        if isinstance(note, Stepped):
            self._stepped(note, now)
            return None
        if isinstance(note, Bad):
            self._bad(note)
            return None
        if isinstance(note, Where | Next) and self._fences.is_open(note.name):
            return Wait()  # of the one before it is not known yet what was done
        if isinstance(note, Leaving):
            self._leaving.add(note.name)
            return None
        if isinstance(note, Where):
            return Drain() if note.name in self._drains else self._where(note, now)
        if isinstance(note, Find):
            is_whole = len(self.endpoints) == self.num_shards
            return self._shards(initialise=False) if is_whole else Wait()
        if isinstance(note, Next):
            return Drain() if note.name in self._drains else self._next(note, now)
        if isinstance(note, Serving):
            self._newest[note.name] = note.inc
            self.members[note.name] = Member(note.name, note.inc, note.pid, note.host)
            self.endpoints[int(note.name.removeprefix("shard"))] = note.endpoint
            self.samples_before.setdefault(note.name, note.samples)
            self._fences.renew(note.name)
            return Noted()
        if isinstance(note, Fenced):
            self._take_fenced(note)
            return self._command(note.name)
        if isinstance(note, Beat):
            return self._beat(note, now)
        return self._end(note)

    def serve(self, inc: int, pid: int, host: str) -> None:
        """A process has this controller now, and listens: the launcher's one."""
        self.members[CONTROLLER] = Member(CONTROLLER, inc, pid, host)

    def lose(self, name: str) -> int:
        """A worker's process has vanished without a word. Returns the samples that it held.

        Those that no shard has anything of go to others.
        """
        (self.drained if name in self._leaving else self.lost).append(name)
        self._part_with(name)
        return self.queue.held_by(name)

    def drain(self, name: str) -> None:
        """Have a worker leave, the run goes on: it is told with its next question."""
        self._drains.add(name)

    def is_asked_to_leave(self, name: str) -> bool:
        return name in self._drains

    def is_leaving(self, name: str) -> bool:
        """A worker has said that it leaves: should it vanish now, that is no loss."""
        return name in self._leaving

    def admit(self, name: str) -> None:
        """A process of this name is started: what became of the one before is forgotten."""
        self.ended.pop(name, None)
        self.explained.pop(name, None)
        self.quarantined.pop(name, None)
        self._drains.discard(name)
        self._leaving.discard(name)

    def silent(self, now: float, patience_s: float) -> list[str]:
        """Workers that take part and have said nothing for longer than that."""
        return [w for w in self._alive if now - self._heard.get(w, now) > patience_s]

    def lose_shard(self, name: str) -> str:
        """A shard's process has vanished; until another one serves, nobody is told where it is.

        Returns: its endpoint, empty if it had told none.
        """
        self._heard.pop(name, None)
        return self.endpoints.pop(int(name.removeprefix("shard")), "")

    def heard(self, name: str) -> float | None:
        """When a process has said something last."""
        return self._heard.get(name)

    def tick(self, now: float) -> None:
        """Remember the position, and stop handing out work when the time is up.

        To be called often. Where nobody did for a while the process was stopped, or another one
        begins: nobody has listened, so it was no silence of the others.
        """
        idle_s = now - self.ticked_at
        if idle_s > STALL_S:
            self._heard = {name: min(at + idle_s, now) for name, at in self._heard.items()}
        self.ticked_at = now
        if self.saves.is_due(now):
            self.saves.remember(self.queue.position, now)
        if (
            self.limit_s is not None
            and self.pace.began_at is not None
            and now - self.pace.began_at >= self.limit_s
        ):
            self.queue.stop()

    @property
    def is_settling(self) -> bool:
        """It is not known yet what shards have of some worker that is gone."""
        return self._fences.are_open

    @property
    def adds_up(self) -> bool:
        """Every sample that was handed out is done with, returned, or in flight."""
        queue = self.queue
        return queue.handed_out == (
            self.account.num_done + queue.returned_samples + queue.in_flight
        )

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

    def progress(self, now: float) -> Progress:
        rate = self.pace.rate(now)
        return Progress(
            samples=self.queue.done_samples,
            total_samples=self._total_samples,
            updates=self._version,
            loss=self.pace.mean_loss,
            samples_per_s=rate,
            staleness=self.staleness,
            eta_s=self._eta_s(now, rate),
            num_workers=len(self._alive),
            refused=self.refused,
        )

    def checkpoint(self) -> dict[str, object] | None:
        """What `resume` can go on from, as JSON; see `Saves.checkpoint`."""
        return self.saves.checkpoint(self.num_shards)

    def halt_shards(self, now: float) -> None:
        """All workers have ended: shards may save themselves and end."""
        self.is_halting_shards = True
        self.saves.remember(self.queue.position, now)

    def workers(self) -> dict[str, dict[str, object]]:
        """What each worker that has ever reported is doing, as JSON."""
        names = sorted(set(self._alive) | set(self._gone), key=lambda name: (len(name), name))
        return {
            name: {
                "state": self._state_of(name),
                "samples": self.worker_samples[name],
            }
            for name in names
        }

    def _state_of(self, name: str) -> str:
        if name in self._alive:
            return "leaving" if name in self._leaving | self._drains else "training"
        if name in self._leaving:
            return "drained"
        return "ended" if name in self.ended else "lost"

    def processes(self) -> list[Mapping[str, object]]:
        """Who runs where, as JSON."""
        return [
            {"name": m.name, "inc": m.inc, "pid": m.pid, "host": m.host}
            for m in self.members.values()
        ]

    # Inside

    def _may_say(self, note: AnyNote) -> bool:
        """Shards of this run serve, and nobody else; what workers say a shard does not."""
        if isinstance(note, Beat | Ended):
            return True
        shards = {f"shard{index}" for index in range(self.num_shards)}
        return (note.name in shards) == isinstance(note, Serving | Fenced)

    def _where(self, note: Where, now: float) -> AnyAnswer:
        self._newest[note.name] = note.inc
        self.members[note.name] = Member(note.name, note.inc, note.pid, note.host)
        self._alive[note.name] = note.inc
        self._ready.discard(note.name)
        if note.digest != self.digest:
            text = (
                f"{note.name} on {note.host} sees other data than the launcher: "
                f"{note.num_samples} samples, the launcher {self.queue.num_samples}"
                + (", of other names or sizes" * (note.num_samples == self.queue.num_samples))
            )
            self._failure = self._failure or (note.name, "DB-DATA-002", text)
            return Halt()
        if len(self.endpoints) < self.num_shards or not self._has_gathered(now):
            return Wait()
        self._initialiser = self._initialiser or note.name
        if not self.is_initialised and self._initialiser != note.name:
            return Wait()  # until the parameters are there; if their bringer dies, it is its turn
        return self._shards(initialise=self._initialiser == note.name)

    def _shards(self, *, initialise: bool) -> Shards:
        endpoints = tuple(self.endpoints[i] for i in range(self.num_shards))
        return Shards(endpoints=endpoints, initialise=initialise)

    def _has_gathered(self, now: float) -> bool:
        """All workers have reported, or we have waited for them for long enough."""
        if self._gathering_since is None:
            self._gathering_since = now
        known = len(self._alive) + len(self._gone)
        waited_s = now - self._gathering_since
        if self.min_workers and known >= self.min_workers and waited_s >= ELASTIC_GATHER_S:
            return True
        return known >= self.num_workers or waited_s >= GATHER_S

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
            self.pace.begin(now)
        number, work = self._given.get(note.name, (0, None))
        if work is not None and note.taken < number:
            return work  # the answer was lost
        if note.num_samples:
            try:
                # Small data is cut finer, so that every worker has something of an epoch.
                share = note.num_samples // max(1, self.num_workers * note.batch_size)
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

    def _beat(self, note: Beat, now: float) -> AnyAnswer:
        if note.name not in self._alive:  # a shard
            if note.storage_error:
                self.storage_errors[note.name] = note.storage_error
            else:
                self.storage_errors.pop(note.name, None)
            self.saves.take(note, now - note.age_s)
            return self._command(note.name)
        if self.queue.is_stopped:
            return Halt()
        return Drain() if note.name in self._drains else Noted()

    def _bad(self, note: Bad) -> None:
        self.bad_samples.update(zip(note.samples, note.reasons, strict=False))
        if self.bad_max is not None and len(self.bad_samples) > self.bad_max:
            name, why = next(iter(self.bad_samples.items()))
            text = (
                f"{len(self.bad_samples)} of {self.queue.num_samples} samples cannot be read, "
                f"more than the {self.bad_max} that data.max_bad allows; the first is {name}: "
                f"{why}"
            )
            self._failure = self._failure or (note.name, "DB-DATA-003", text)

    def _stepped(self, note: Stepped, now: float) -> None:
        self.is_initialised = True
        self._ready.add(note.name)
        told = Told(
            answered=note.answered,
            partial=note.partial,
            missed=note.missed,
            refused=note.spoiled,
            skipped=note.skipped,
            left_out=note.left_out,
        )
        before = self._told.get(note.name, Told())
        # An older note may come last, over a link that was given up: it tells nothing new.
        self._told[note.name] = told = before.newest(told)
        news = told.since(before)
        self.worker_samples[note.name] += news.answered
        self.skipped_samples += news.skipped
        self.account.tell(news, self.queue.advance(note.name, news.total))
        loss = note.loss if note.knows_loss else None
        self.pace.step(note.samples, loss, self.queue.num_samples, now)
        if note.pushed:
            self.num_pushed += 1
            if not note.refused:
                self.pushed[note.name] += 1
            self.staleness.add(note.staleness)
            self._version = max(self._version, note.version)
            if note.refused:
                self.refused += note.refused
                self.refused_reason = note.reason
            if self.num_updates is not None and self._version >= self.num_updates:
                self.queue.stop()

    def _end(self, note: Ended) -> AnyAnswer:
        if note.code == QUARANTINED:
            self.quarantined[note.name] = note.text
            return Noted()
        if note.is_drained and note.name not in self.ended:  # it may be told twice
            self.drained.append(note.name)
            self._leaving.add(note.name)
        self.ended[note.name] = (note.code, note.text)
        self.explained[note.name] = (note.why, note.fix)
        self._part_with(note.name)
        return Noted()

    # Workers that are gone

    def _part_with(self, name: str) -> None:
        """A process is gone. If a worker held samples, shards are asked what they have of it."""
        inc, told = self._alive.get(name, 0), self._told.get(name, Told())
        self._forget(name)
        if self._fences.is_open(name):
            return  # it has not begun
        if inc:
            self._fences.put(name, inc)
        if not self.queue.held_by(name) or not inc or not self.is_initialised:
            self.queue.give_back(name)
            return
        self._fences.ask(name, inc, told)

    def _command(self, shard: str) -> AnyAnswer:
        """What a shard is told with its next beat."""
        return self._fences.next(shard) or (Halt() if self.is_halting_shards else Noted())

    def _take_fenced(self, note: Fenced) -> None:
        found = self._fences.take(note, self.num_shards)
        if found is None:
            return
        more = self.account.settle(*found)
        self.worker_samples[note.w] += more
        self.account.beyond += more - self.queue.advance(note.w, more)
        self.queue.give_back(note.w)

    def _forget(self, name: str) -> None:
        if name in self._alive:
            self._gone[name] = self._alive.pop(name)
        self._given.pop(name, None)
        self.pushed.pop(name, None)
        self._told.pop(name, None)
        if self._initialiser == name and not self.is_initialised:
            self._initialiser = None  # the next one to ask brings the first parameters

    @property
    def _total_samples(self) -> int | None:
        return None if self.num_epochs is None else self.num_epochs * self.queue.num_samples

    def _eta_s(self, now: float, rate: float) -> float | None:
        began_at, total = self.pace.began_at, self._total_samples
        if self.limit_s is not None:
            return None if began_at is None else max(0.0, self.limit_s - now + began_at)
        if self.num_updates is not None and began_at is not None and self._version:
            pace = self._version / max(now - began_at, 1e-9)
            return max(0.0, (self.num_updates - self._version) / pace)
        if total is None or not rate:
            return None
        return max(0.0, (total - self.queue.done_samples) / rate)
