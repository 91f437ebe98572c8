"""Simulate: asynchronous SGD by discrete events, told in the very messages of a real run. No clock.

Workers on nodes do steps; each push goes to all shards, waits there in one queue, is applied, and
its answer brings the parameters of that moment. So staleness follows from the order in which pushes
are applied; nothing of it is drawn. How long a phase takes is drawn around its usual length, and
faults make it longer. Loss, norms of gradients, memory and bytes are made up.

    for message in Simulation(num_workers=64, faults=[straggler("w5", 6.0, start=60)]).until(300):
        store.take(message, message.at)

With `fresh` and n_fetch = n_push the mean of staleness is W - 1 whoever is slow (see
param_server/staleness.py), which is a test of this file and of all that counts.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from random import Random
from typing import Literal

from distbelief.chronicle import AnyEntry, Begin, End, Event, RunReport, ShardState, WorkerState
from distbelief.param_server.report import (
    EVERY_S,
    STEPS_MAX,
    TRIPS_MAX,
    UNKNOWN,
    WORKERS_MAX,
    AnyReport,
    ShardReport,
    WorkerReport,
    every_s,
)

START_AT = 1_800_000_000.0
"""Unix time at which a simulation begins, unless it is told another."""
SHARE = {"data": 0.03, "fetch": 0.06, "compute": 0.82, "push": 0.06, "other": 0.01}
"""Of a step, in a fleet where nothing is amiss; what is left is the way to the shards and back."""
LOAD = 0.3
"""Share of the time in which a shard is at work."""
HEARD_S = 0.3
"""From a loss to when the launcher knows."""
FOREVER = math.inf

Kind = Literal["slow", "hot", "crash", "hang", "freeze", "late", "drain", "storage"]
AnyMessage = AnyEntry | AnyReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that goes wrong with a worker, with all of a node, or with a shard."""

    kind: Kind
    """slow: a phase takes longer. hot: a shard's work does. crash: lost, and back at `end`.
    hang: no step, but it reports. freeze: nothing at all, as after SIGSTOP. late: joins at `start`.
    drain: leaves at `start`. storage: a shard cannot write."""
    who: str
    """w5, node-1 or shard0."""
    start: float
    """Seconds since the simulation began."""
    end: float = FOREVER
    phase: str = "compute"
    factor: float = 1.0

    def is_on(self, t: float) -> bool:
        return self.start <= t < self.end


def straggler(
    who: str, factor: float, start: float, end: float = FOREVER, phase: str = "compute"
) -> Fault:
    """A worker, or a whole node, of which one phase takes `factor` times as long."""
    return Fault(kind="slow", who=who, start=start, end=end, phase=phase, factor=factor)


@dataclass(slots=True, eq=False)
class _Worker:
    name: str
    node: str
    pace: float
    """Of its steps, beside the fleet's."""
    shards: int
    faults: list[Fault]
    inc: int = 1
    life: int = 0
    """Rises when it is lost: what was under way then is void."""
    state: str = "starting"
    is_alive: bool = False
    restarts: int = 0
    total: int = 0
    """Samples of all its incarnations."""
    n: int = 0
    reported_at: float = 0.0
    num_steps: int = 0
    num_samples: int = 0
    pushes: int = 0
    """Since it last took parameters."""
    has_pushed: bool = False
    began_at: float = 0.0
    phases: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """data, compute, push and other of the step under way."""
    left_at: float = 0.0
    """When its push had left."""
    open: int = 0
    """Answers that are still to come."""
    back_at: float = 0.0
    stale: int = 0
    low: int = 0
    """Smallest version of a part after the push."""
    base: list[int] = field(default_factory=list)
    """By shard: the version it took."""
    steps: list[tuple[float, ...]] = field(default_factory=list)
    trips: list[tuple[int, float]] = field(default_factory=list)
    meter: list[tuple[int, float, float, float]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Shard:
    name: str
    faults: list[Fault]
    n: int = 0
    reported_at: float = 0.0
    version: int = 0
    free_at: float = 0.0
    waiting: deque[float] = field(default_factory=deque)
    """When each message that is there will be done."""
    queue: int = 0
    busy_s: float = 0.0
    applied: list[float] = field(default_factory=list)
    seen: dict[str, list[int]] = field(default_factory=dict)
    """Worker -> inc, base, pushes and largest staleness in the span."""
    counts: dict[int, int] = field(default_factory=dict)
    steady_parts: int = 0
    steady_sum: int = 0


_ARRIVE, _END, _REPORT, _SHARD, _RUN, _START, _CRASH, _HEARD, _BACK, _DRAIN = range(10)


class Simulation:
    """See the top of this file."""

    def __init__(
        self,
        num_workers: int = 64,
        num_shards: int = 4,
        *,
        per_node: int = 8,
        step_s: float = 0.84,
        noise: float = 0.06,
        n_fetch: int = 1,
        n_push: int = 1,
        batch_size: int = 32,
        parameters: int = 7_000_000,
        faults: Iterable[Fault] = (),
        seed: int = 0,
        start: float = START_AT,
        run: str = "simulated",
        token: str = "",
        minutes: float = 60.0,
        grad_norm: bool = True,
        meter: float = 0.0,
        talks: bool = True,
    ) -> None:
        """noise: of a step's length, as a share. minutes: the run's target. meter: share of steps
        that are measured again. talks: False tells nothing; only the counts are kept."""
        if num_workers < 1 or num_shards < 1 or n_push < 1 or n_fetch % n_push:
            raise ValueError("there must be a worker and a shard, and n_fetch a multiple of n_push")
        self.now = 0.0
        """Seconds since it began."""
        self.updates = 0
        self.stale_sum = 0
        """Over parts applied, as `stale_parts` counts them."""
        self.stale_parts = 0
        self.counts: dict[int, int] = {}
        """Staleness of parts -> how many."""
        self.by_worker: dict[str, int] = {}
        """Pushes that were applied."""
        self.faults = list(faults)
        self.per_fetch = n_fetch // n_push
        self._random = Random(seed)
        self._step_s, self._noise, self._n_push = step_s, noise, n_push
        self._batch, self._parameters, self._start = batch_size, parameters, start
        self._n_fetch, self._run, self._token = n_fetch, run, token
        self._every_s = every_s(num_workers)
        self._minutes, self._grad_norm, self._meter, self._talks = minutes, grad_norm, meter, talks
        self._apply_s = min(0.002, LOAD * step_s * n_push / num_workers)
        self._way_s = 0.002 * step_s
        self._heap: list[tuple[float, int, int, int, int, int]] = []
        self._order = 0
        self._out: list[AnyMessage] = []
        self._losses: deque[tuple[float, int, float]] = deque()
        self._rate_samples = 0
        self._samples = 0
        self._steady: set[str] = set()
        self._was_steady = False
        self._shards = [
            _Shard(f"shard{i}", [f for f in self.faults if f.who == f"shard{i}"])
            for i in range(num_shards)
        ]
        self._workers = [self._worker(i, per_node) for i in range(num_workers)]
        self._begin()

    def until(self, t: float) -> Iterator[AnyMessage]:
        """What is told up to t seconds after the beginning, in the order of time."""
        heap = self._heap
        while heap and heap[0][0] <= t:
            now, _, kind, who, shard, life = heappop(heap)
            self.now = now
            if kind == _ARRIVE:
                self._arrive(self._workers[who], who, shard, life)
            elif kind == _END:
                self._end(self._workers[who], who, life)
            elif kind == _REPORT:
                self._report(self._workers[who], who, life)
            elif kind == _SHARD:
                self._report_shard(self._shards[shard], shard)
            elif kind == _RUN:
                self._report_run()
            else:
                self._happen(kind, self._workers[who], who, life)
            if self._out:
                yield from self._out
                self._out.clear()
        self.now = t

    def end(self, exit_word: str = "done") -> End:
        """The run's last line."""
        result = {"exit": exit_word, "updates": self.updates, "samples": self._samples}
        return End(at=self._start + self.now, result=result)

    @property
    def mean_staleness(self) -> float | None:
        return self.stale_sum / self.stale_parts if self.stale_parts else None

    def forget(self) -> None:
        """Count anew, as after the warm-up."""
        self.updates = self.stale_sum = self.stale_parts = 0
        self.counts, self.by_worker = {}, {}

    # What happens.

    def _worker(self, i: int, per_node: int) -> _Worker:
        name, node = f"w{i}", f"node-{i // per_node}"
        pace = math.exp(self._random.gauss(0.0, self._noise / 2))
        return _Worker(
            name,
            node,
            pace,
            len(self._shards),
            [f for f in self.faults if f.who in (name, node)],
            base=[0] * len(self._shards),
        )

    def _begin(self) -> None:
        num = len(self._workers)
        if self._talks:
            model = {"factory": "simulated"}
            train = {"n_fetch": self._n_fetch, "n_push": self._n_push, "fetch_policy": "fresh"}
            train |= {"optimizer": "adagrad", "lr": 0.01, "batch_size": self._batch}
            train |= {"log_grad_norm": self._grad_norm, "meter": self._meter}
            self._out.append(
                Begin(
                    at=self._start,
                    run=self._run,
                    name="simulated",
                    attempt=1,
                    version="simulated",
                    engine="simulated",
                    num_workers=num,
                    num_shards=len(self._shards),
                    config={"model": model, "data": {"source": "none"}, "train": train},
                    parameters=self._parameters,
                    unit="seconds",
                    target=self._minutes * 60.0,
                    run_path="",
                )
            )
            for i in range(len(self._shards)):
                self._at(0.5 + i / len(self._shards), _SHARD, shard=i)
            self._at(0.2, _RUN)
        for i, worker in enumerate(self._workers):
            late = [f for f in worker.faults if f.kind == "late"]
            # A fleet comes over some seconds, not at once.
            begin = late[0].start if late else self._random.uniform(0.3, 2.0)
            self._at(begin, _START, i)
            for fault in worker.faults:
                if fault.kind == "crash":
                    self._at(fault.start, _CRASH, i)
                    if fault.end < FOREVER:
                        self._at(fault.end, _BACK, i)
                elif fault.kind == "drain":
                    self._at(fault.start, _DRAIN, i)

    def _at(self, t: float, kind: int, who: int = 0, shard: int = 0, life: int = 0) -> None:
        self._order += 1
        heappush(self._heap, (t, self._order, kind, who, shard, life))

    def _happen(self, kind: int, worker: _Worker, who: int, life: int) -> None:
        """What happens seldom."""
        if kind in (_START, _BACK):
            if worker.is_alive or worker.state == "left":
                return
            worker.is_alive, worker.state = True, "training"
            if kind == _BACK:
                worker.inc += 1
                worker.restarts += 1
            worker.reported_at, worker.began_at = self.now, self.now
            worker.n = worker.num_steps = worker.num_samples = worker.pushes = 0
            worker.base = [shard.version for shard in self._shards]
            for shard in self._shards:
                self._seen(shard, worker)[1] = shard.version
            text = f"{worker.name} has joined" if kind == _START else f"{worker.name} is back"
            self._tell("join" if kind == _START else "recover", worker, text)
            self._step(worker, who)
            if self._talks:
                offset = self._random.random()  # reports do not come all at once
                self._at(self.now + offset * self._every_s, _REPORT, who, life=worker.life)
        elif kind == _CRASH and worker.is_alive:
            worker.is_alive = False
            worker.life += 1
            worker.steps.clear()
            worker.trips.clear()
            self._was_steady = True
            self._steady.clear()
            self._at(self.now + HEARD_S, _HEARD, who)
        elif kind == _HEARD and not worker.is_alive:
            worker.state = "lost"
            self._tell("crash", worker, f"{worker.name} was killed by signal 9")
        elif kind == _DRAIN and worker.is_alive:
            worker.state = "draining"
            self._tell("drain", worker, f"{worker.name} was asked to leave")

    def _step(self, worker: _Worker, who: int) -> None:
        """Begin the next step, or the next few of which the last one pushes."""
        now, draw = self.now, self._random.gauss
        worker.began_at = now
        usual = self._step_s * worker.pace * self._n_push
        data = usual * SHARE["data"] * abs(1 + draw(0.0, 0.3))
        compute = usual * SHARE["compute"] * max(0.2, 1 + draw(0.0, self._noise))
        push = usual * SHARE["push"] * abs(1 + draw(0.0, 0.2))
        for fault in worker.faults:
            if not fault.is_on(now):
                continue
            if fault.kind == "slow":
                data *= fault.factor if fault.phase == "data" else 1.0
                compute *= fault.factor if fault.phase == "compute" else 1.0
                push *= fault.factor if fault.phase == "push" else 1.0
            elif fault.kind in ("hang", "freeze"):
                compute += fault.end - now
        other = usual * SHARE["other"]
        worker.phases = (data, compute, push, other)
        worker.left_at = left = now + data + compute + push + other
        worker.open, worker.stale, worker.low, worker.back_at = worker.shards, 0, -1, left
        if left < FOREVER:
            for i in range(worker.shards):
                way = self._way_s * (0.5 + self._random.random())
                self._at(left + way, _ARRIVE, who, i, worker.life)

    def _arrive(self, worker: _Worker, who: int, i: int, life: int) -> None:
        """A push is at a shard, which takes one after the other."""
        if worker.life != life:
            return
        now, shard = self.now, self._shards[i]
        took = self._apply_s * (0.7 + 0.6 * self._random.random())
        for fault in shard.faults:
            if fault.kind == "hot" and fault.is_on(now):
                took *= fault.factor
        done = max(now, shard.free_at) + took
        shard.free_at = done
        # The order in which they come is the order in which they are applied.
        stale = shard.version - worker.base[i] - worker.pushes
        shard.version += 1
        self._count(shard, worker, stale)
        if worker.pushes + 1 >= self.per_fetch:
            worker.base[i] = shard.version
        if self._talks:
            waiting = shard.waiting
            while waiting and waiting[0] <= now:
                waiting.popleft()
            waiting.append(done)
            shard.queue = max(shard.queue, len(waiting))
            shard.busy_s += took
            shard.applied.append(took)
            seen = self._seen(shard, worker)
            seen[1] = worker.base[i]
            seen[2] += 1
            seen[3] = max(seen[3], stale)
        fetch = self._step_s * self._n_push * SHARE["fetch"] * (0.7 + 0.6 * self._random.random())
        for fault in worker.faults:
            if fault.kind == "slow" and fault.phase == "fetch" and fault.is_on(now):
                fetch *= fault.factor
        back = done + fetch
        worker.stale = max(worker.stale, stale)
        worker.low = shard.version if worker.low < 0 else min(worker.low, shard.version)
        worker.back_at = max(worker.back_at, back)
        worker.open -= 1
        if self._talks:
            worker.trips.append((i, back - worker.left_at + worker.phases[2]))
        if not worker.open:
            self._at(worker.back_at, _END, who, life=life)

    def _count(self, shard: _Shard, worker: _Worker, stale: int) -> None:
        self.stale_sum += stale
        self.stale_parts += 1
        self.counts[stale] = self.counts.get(stale, 0) + 1
        if shard is self._shards[0]:
            self.updates += 1
            self.by_worker[worker.name] = self.by_worker.get(worker.name, 0) + 1
            if not self._was_steady and not worker.has_pushed:
                worker.has_pushed = True
                self._steady.add(worker.name)
        if self._talks:
            shard.counts[stale] = shard.counts.get(stale, 0) + 1
            if self.per_fetch == 1 and len(self._steady) == len(self._workers):
                shard.steady_parts += 1
                shard.steady_sum += stale

    def _end(self, worker: _Worker, who: int, life: int) -> None:
        """All answers are there."""
        if worker.life != life:
            return
        now = self.now
        worker.pushes = (worker.pushes + 1) % self.per_fetch
        worker.num_steps += self._n_push
        worker.num_samples += self._batch * self._n_push
        worker.total += self._batch * self._n_push
        self._samples += self._batch * self._n_push
        if self._talks:
            self._note(worker, now)
        if worker.state == "draining":
            if self._talks:
                self._report(worker, who, life)
            worker.is_alive, worker.state = False, "left"
            worker.life += 1
            self._was_steady = True
            self._steady.clear()
            self._tell("leave", worker, f"{worker.name} has left")
            return
        self._step(worker, who)

    # What is told.

    def _note(self, worker: _Worker, now: float) -> None:
        """Keep the step, or the few since the last push, for the next report."""
        draw, num = self._random.gauss, self._n_push
        data, compute, push, _other = (value / num for value in worker.phases)
        fetch = (now - worker.left_at) / num
        fair = max(1.0, len(self._workers) - 1.0)
        # Made up: it falls as a power of the samples, and stale gradients shake it.
        loss = 6.9 * (1 + self._samples / 20_000) ** -0.25
        shake = 0.04 * (1 + 0.2 * worker.stale / fair)
        for i in range(num):
            one = max(0.01, loss * (1 + draw(0.0, shake)))
            self._losses.append((now, self._batch, one))
            norm = math.exp(draw(0.5, 0.25)) if self._grad_norm else UNKNOWN
            has_push = i == num - 1
            end = now - (num - 1 - i) * (now - worker.began_at) / num
            worker.steps.append(
                (
                    end,
                    data,
                    fetch,
                    compute,
                    push,
                    (now - worker.began_at) / num,
                    one,
                    worker.stale if has_push else 0,
                    has_push,
                    worker.low,
                    norm,
                )
            )
        if self._meter and self._random.random() < self._meter:
            near = math.exp(-0.15 * worker.stale / fair)
            cosine = max(-1.0, min(1.0, near + draw(0.0, 0.05)))
            gap = -0.004 * loss * worker.stale / fair + draw(0.0, 0.01)
            worker.meter.append((worker.stale, cosine, gap, cosine * (1 + draw(0.0, 0.05))))
        if len(worker.steps) > STEPS_MAX:
            del worker.steps[:-STEPS_MAX]
        if len(worker.trips) > TRIPS_MAX:
            del worker.trips[:-TRIPS_MAX]

    def _report(self, worker: _Worker, who: int, life: int) -> None:
        if worker.life != life:
            return
        self._at(self.now + self._every_s, _REPORT, who, life=life)
        if any(f.kind == "freeze" and f.is_on(self.now) for f in worker.faults):
            return
        worker.n += 1
        steps, trips = worker.steps, worker.trips
        columns = list(zip(*steps, strict=True)) if steps else [()] * 11
        end, data, fetch, compute, push, step, loss, stale, has_push, version, norm = columns
        meter = list(zip(*worker.meter, strict=True)) if worker.meter else [()] * 4
        num_bytes = sum(map(bool, has_push)) * self._parameters * 4
        self._out.append(
            WorkerReport(
                run=self._run,
                token=self._token,
                name=worker.name,
                inc=worker.inc,
                n=worker.n,
                at=self._start + self.now,
                span_s=self.now - worker.reported_at,
                pid=10_000 + who,
                host=worker.node,
                rss_bytes=900_000_000 + who * 4096,
                device="cpu",
                num_steps=worker.num_steps,
                num_samples=worker.num_samples,
                busy_s=self.now - worker.began_at,
                end=tuple(self._start + t for t in end),
                data_s=data,
                fetch_s=fetch,
                compute_s=compute,
                push_s=push,
                step_s=step,
                samples=(self._batch,) * len(steps),
                loss=loss,
                has_loss=(True,) * len(steps),
                staleness=stale,
                has_push=has_push,
                version=version,
                grad_norm=norm,
                trip_shard=tuple(i for i, _ in trips),
                trip_is_push=(True,) * len(trips),
                trip_s=tuple(s for _, s in trips),
                meter_staleness=meter[0],
                meter_cosine=meter[1],
                meter_gap=meter[2],
                meter_rate=meter[3],
                sent_bytes=num_bytes,
                received_bytes=num_bytes,
                retries=0,
            )
        )
        worker.steps, worker.trips, worker.meter = [], [], []
        worker.reported_at = self.now

    def _seen(self, shard: _Shard, worker: _Worker) -> list[int]:
        seen = shard.seen.get(worker.name)
        if seen is None or seen[0] != worker.inc:
            seen = shard.seen[worker.name] = [worker.inc, 0, 0, 0]
        return seen

    def _report_shard(self, shard: _Shard, i: int) -> None:
        shard.n += 1
        names = list(shard.seen)[-WORKERS_MAX:]
        rows = [shard.seen[name] for name in names]
        span = self.now - shard.reported_at
        num_bytes = len(shard.applied) * self._parameters * 4 // len(self._shards)
        is_broken = any(f.kind == "storage" and f.is_on(self.now) for f in shard.faults)
        saved_at = math.floor(self.now / 60.0) * 60.0
        self._out.append(
            ShardReport(
                run=self._run,
                token=self._token,
                name=shard.name,
                inc=1,
                n=shard.n,
                at=self._start + self.now,
                span_s=span,
                pid=9_000 + i,
                host=f"node-{i}",
                rss_bytes=400_000_000,
                num_parts=1,
                parameters=self._parameters // len(self._shards),
                version=shard.version,
                updates=shard.version,
                samples=shard.version * self._batch * self._n_push,
                num_workers=sum(w.is_alive for w in self._workers),
                w=tuple(names),
                w_inc=tuple(row[0] for row in rows),
                base=tuple(row[1] for row in rows),
                pushes=tuple(row[2] for row in rows),
                staleness=tuple(row[3] for row in rows),
                stale_value=tuple(shard.counts),
                stale_count=tuple(shard.counts.values()),
                steady_parts=shard.steady_parts,
                steady_sum=shard.steady_sum,
                queue=shard.queue,
                apply_s=tuple(shard.applied[-512:]),
                busy_share=min(1.0, shard.busy_s / span) if span > 0 else 0.0,
                refused_parts=0,
                sent_bytes=num_bytes,
                received_bytes=num_bytes,
                saved=f"s{int(saved_at)}" if saved_at else "",
                saved_at=self._start + saved_at if saved_at else 0.0,
                save_s=0.4 if saved_at else 0.0,
                storage_error="no space left on device" if is_broken else "",
            )
        )
        shard.queue, shard.busy_s, shard.applied, shard.seen = len(shard.waiting), 0.0, [], {}
        shard.counts, shard.steady_parts, shard.steady_sum = {}, 0, 0
        shard.reported_at = self.now
        self._at(self.now + EVERY_S, _SHARD, shard=i)

    def _report_run(self) -> None:
        while self._losses and self._losses[0][0] < self.now - 10.0:
            self._losses.popleft()
        losses = [loss for _, _, loss in self._losses]
        recent = sum(n for t, n, _ in self._losses if t >= self.now - 5.0)
        target = self._minutes * 60.0
        self._out.append(
            RunReport(
                at=self._start + self.now,
                state="training" if self.updates else "starting",
                samples=self._samples,
                total_samples=None,
                updates=self.updates,
                loss=sum(losses) / len(losses) if losses else None,
                samples_per_s=recent / min(5.0, max(1.0, self.now)),
                eta_s=max(0.0, target - self.now),
                epoch=None,
                refused=0,
                workers=[
                    WorkerState(
                        name=w.name,
                        inc=w.inc,
                        pid=10_000 + i,
                        host=w.node,
                        state=w.state,
                        samples=w.total,
                        restarts=w.restarts,
                    )
                    for i, w in enumerate(self._workers)
                    if w.is_alive or w.state != "starting" or not self._is_late(w)
                ],
                shards=[
                    ShardState(
                        name=s.name,
                        inc=1,
                        pid=9_000 + i,
                        host=f"node-{i}",
                        state="serving",
                    )
                    for i, s in enumerate(self._shards)
                ],
                controller_restarts=0,
                dropped=0,
            )
        )
        self._at(self.now + 1.0, _RUN)

    def _is_late(self, worker: _Worker) -> bool:
        return any(f.kind == "late" for f in worker.faults)

    def _tell(self, kind: str, worker: _Worker, text: str) -> None:
        if self._talks:
            self._out.append(
                Event(
                    at=self._start + self.now,
                    kind=kind,
                    who=worker.name,
                    text=text,
                    node=worker.node,
                )
            )
