"""Fleet: every worker as it is now, and in which status. No clock.

Lag is the larger of the staleness of a worker's last push and the updates since it last took
parameters, so it grows while a worker hangs. Ratio is lag beside the fair share, (A - 1) * (n_fetch
/ n_push + 1) / 2 with A workers that push. In a fleet of one or two that is 0 or 1, so it is held
against one update at least.

    status       comes                                              goes
    starting     is known and has not pushed                        its first push
    watch        trend above 1.5 for 15 s                           below 1.3 for 15 s
    slow         trend above 2 for 30 s                             below 1.5 for 30 s
    stalled      no push for max(10 s, 8 of its own steps)          a push
    down         the launcher says so; or nobody has heard of it    it is heard
    recovering   is back, for 30 s and 5 pushes
    draining, left: the launcher says so

Trend is the ratio smoothed over some seconds, with one push never counting for more than CLIP: a
single very stale one, as at the start of a worker, is no trouble.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, compress, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbelief.chronicle import RunReport
from distbelief.monitor.source import PHASES, STATUSES
from distbelief.param_server.report import EVERY_S, ShardReport, WorkerReport, every_s

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

WORKERS_MAX = 5000
SHARDS_MAX = 256
STARTING, OK, WATCH, SLOW, STALLED, DOWN, RECOVERING, DRAINING, LEFT = range(len(STATUSES))

SMOOTH_S = 4.0
"""Time constant of the trend."""
CLIP = 8.0
PHASE_S = 8.0
"""Time constant of a worker's mean phases, in seconds of its own work."""
WATCH_ABOVE, WATCH_BELOW, WATCH_S = 1.5, 1.3, 15.0
SLOW_ABOVE, SLOW_BELOW, SLOW_S = 2.0, 1.5, 30.0
STALL_S, STALL_STEPS = 10.0, 8.0
SILENT_S = 30.0
"""Nobody has heard of it for so long, and the launcher says nothing: it is taken for lost."""
VOUCH_S = 5.0
"""The launcher's word counts for so long."""
RECOVER_S, RECOVER_PUSHES = 30.0, 5
KEPT_STEPS = 15
TEXT_MAX = 64
INBOX_MAX = 2000
HUGE = float(1 << 50)
"""No count that is told is larger: whatever a peer says fits into our arrays."""

UNTOLD, TOLD_STARTING, TOLD_TRAINING, TOLD_DRAINING, TOLD_LEFT, TOLD_LOST = range(6)
_TOLD = {
    "starting": TOLD_STARTING,
    "training": TOLD_TRAINING,
    "draining": TOLD_DRAINING,
    "left": TOLD_LEFT,
    "ended": TOLD_LEFT,
    "lost": TOLD_LOST,
    "given-up": TOLD_LOST,
}

_IS_PART = np.array([s not in (STALLED, DOWN, LEFT) for s in range(len(STATUSES))])
_IS_ALIVE = np.array([s not in (STARTING, DOWN, LEFT) for s in range(len(STATUSES))])
_NAN = math.nan
_COLUMNS: dict[str, tuple[type, float]] = {
    "inc": (np.int64, -1),
    "n": (np.int64, 0),
    "pid": (np.int64, 0),
    "status": (np.int64, STARTING),
    "grade": (np.int64, OK),
    "since": (np.float64, _NAN),
    "heard_at": (np.float64, _NAN),
    "seen_at": (np.float64, _NAN),
    "told": (np.int64, UNTOLD),
    "told_at": (np.float64, _NAN),
    "pushed_at": (np.float64, _NAN),
    "fetched_at": (np.float64, _NAN),
    "back_at": (np.float64, _NAN),
    "back_pushes": (np.int64, 0),
    "stale": (np.float64, _NAN),
    "mean_stale": (np.float64, _NAN),
    "lag": (np.float64, _NAN),
    "ratio": (np.float64, _NAN),
    "trend": (np.float64, _NAN),
    "level": (np.float64, _NAN),
    "over_watch": (np.float64, _NAN),
    "over_slow": (np.float64, _NAN),
    "under_watch": (np.float64, _NAN),
    "under_slow": (np.float64, _NAN),
    "step_s": (np.float64, _NAN),
    "compute": (np.float64, _NAN),
    "fetch": (np.float64, _NAN),
    "push": (np.float64, _NAN),
    "data": (np.float64, _NAN),
    "other": (np.float64, _NAN),
    "busy_s": (np.float64, 0),
    "steps": (np.int64, 0),
    "samples": (np.int64, 0),
    "pushes": (np.int64, 0),
    "all_samples": (np.int64, 0),
    "samples_per_s": (np.float64, _NAN),
    "restarts": (np.int64, 0),
    "loss": (np.float64, _NAN),
    "rss": (np.int64, 0),
    "sent": (np.int64, 0),
    "received": (np.int64, 0),
    "retries": (np.int64, 0),
    "place": (np.int64, 0),
    "new_stale": (np.float64, _NAN),
    "new_compute": (np.float64, _NAN),
    "new_fetch": (np.float64, _NAN),
    "new_push": (np.float64, _NAN),
    "new_data": (np.float64, _NAN),
    "new_other": (np.float64, _NAN),
    "new_steps": (np.float64, _NAN),
    "new_loss": (np.float64, _NAN),
    "sum_stale": (np.float64, 0),
    "num_stale": (np.float64, 0),
    "recent_pushes": (np.float64, 0),
}
"""Of each worker: type, and what it is before anything is known. new_: of the open second."""


@dataclass(frozen=True, slots=True)
class StepColumns:
    """Steps of some workers, one after the other."""

    row: Ints
    end: Floats
    loss: Floats
    has_loss: Bools
    stale: Floats
    has_push: Bools
    norm: Floats


class Fleet:
    """See the top of this file. Rows are in the order in which workers were first heard of."""

    inc: Ints
    n: Ints
    pid: Ints
    status: Ints
    grade: Ints
    since: Floats
    heard_at: Floats
    seen_at: Floats
    told: Ints
    told_at: Floats
    pushed_at: Floats
    fetched_at: Floats
    back_at: Floats
    back_pushes: Ints
    stale: Floats
    mean_stale: Floats
    lag: Floats
    ratio: Floats
    trend: Floats
    level: Floats
    over_watch: Floats
    over_slow: Floats
    under_watch: Floats
    under_slow: Floats
    step_s: Floats
    compute: Floats
    fetch: Floats
    push: Floats
    data: Floats
    other: Floats
    busy_s: Floats
    steps: Ints
    samples: Ints
    pushes: Ints
    all_samples: Ints
    samples_per_s: Floats
    restarts: Ints
    loss: Floats
    rss: Ints
    sent: Ints
    received: Ints
    retries: Ints
    place: Ints
    new_stale: Floats
    new_compute: Floats
    new_fetch: Floats
    new_push: Floats
    new_data: Floats
    new_other: Floats
    new_steps: Floats
    new_loss: Floats
    sum_stale: Floats
    num_stale: Floats
    recent_pushes: Floats

    def __init__(self) -> None:
        self.names: list[str] = []
        self.hosts: list[str] = []
        self.devices: list[str] = []
        self.rows: dict[str, int] = {}
        self.per_fetch = 1.0
        """n_fetch / n_push."""
        self.n_push = 1
        self.order = 0
        """How often the list of workers has changed."""
        self.fair: float | None = None
        self.num_lost = 0
        """Reports of workers that never came."""
        self.num_taken = 0
        self.num_old = 0
        """Reports of incarnations that are over."""
        self.num_odd = 0
        """Names beyond WORKERS_MAX."""
        self.steps_told = 0
        """Steps of all workers since we listen, from their totals."""
        self.shard_names: list[str] = []
        self.shard_rows: dict[str, int] = {}
        self.version: Floats = np.zeros(0)
        self.base: Floats = np.zeros((0, 0))
        """[shards, workers]: version taken; NaN where it is not known."""
        self.shard_stale: Floats = np.zeros((0, 0))
        self.trip: Floats = np.zeros((0, 0))
        """Mean round trip of a push, or of a fetch where there is no push."""
        self.recent: Floats = np.full((0, KEPT_STEPS), np.nan)
        self.steps_read: list[StepColumns] = []
        """For whoever counts single steps; to be cleared by him."""
        self._inbox: dict[int, tuple[WorkerReport, float]] = {}
        self._width = 0
        self.advanced_at: float | None = None
        self._resize(64)

    def __len__(self) -> int:
        return len(self.names)

    def view(self, name: str) -> NDArray[Any]:  # Any: as _COLUMNS says
        """A column, of the workers that there are."""
        column: NDArray[Any] = getattr(self, name)
        return column[: len(self.names)]

    # What is told.

    def row(self, name: str) -> int:
        """A worker's row, made if it is new; -1 where there are too many."""
        i = self.rows.get(name)
        if i is not None:
            return i
        i = len(self.names)
        if i >= WORKERS_MAX or not name or len(name) > TEXT_MAX:
            self.num_odd += 1
            return -1
        self.names.append(name)
        self.hosts.append("")
        self.devices.append("")
        self.rows[name] = i
        if i >= self._width:
            self._resize(self._width * 2)
        self.order += 1
        return i

    def shard_row(self, name: str) -> int:
        """A shard's row, made if it is new; -1 where there are too many."""
        s = self.shard_rows.get(name)
        if s is not None:
            return s
        if len(self.shard_names) >= SHARDS_MAX:
            return -1
        self.shard_rows[name] = len(self.shard_names)
        self.shard_names.append(name)
        self.version = np.append(self.version, np.nan)
        line = np.full((1, self._width), np.nan)
        self.base = np.concatenate([self.base, line])
        self.shard_stale = np.concatenate([self.shard_stale, line])
        self.trip = np.concatenate([self.trip, line])
        return len(self.shard_names) - 1

    def take_worker(self, r: WorkerReport, now: float) -> int:
        """Its columns are read with those of others, by `flush`: a thousand reports a second are
        1 ms so, and 70 ms one by one.

        Returns: its row; -1 if the report was not taken.
        """
        i = self.row(r.name)
        if i < 0:
            return -1
        inc = r.inc
        if inc < self.inc[i]:
            self.num_old += 1
            return -1
        last = self.n[i]
        if inc > self.inc[i]:
            self._renew(i, min(inc, 1 << 50), now)
        elif last:
            if r.n <= last:
                return -1  # told twice, or out of order
            self.num_lost += min(r.n - int(last) - 1, 1000)
        self.n[i] = min(r.n, 1 << 50)
        self.num_taken += 1
        self.heard_at[i] = now
        if r.host != self.hosts[i]:
            self.hosts[i] = r.host[:TEXT_MAX]
            self.order += 1
        if r.device != self.devices[i]:
            self.devices[i] = r.device[:TEXT_MAX]
        if i in self._inbox or len(self._inbox) >= INBOX_MAX:
            self.flush()
        self._inbox[i] = (r, now)
        return i

    def flush(self) -> None:
        """Read the reports that wait, at most one of each worker."""
        if not self._inbox:
            return
        rows = np.fromiter(self._inbox, np.int64, len(self._inbox))
        reports = [r for r, _ in self._inbox.values()]
        now = np.array([at for _, at in self._inbox.values()])
        self._inbox.clear()
        self.pid[rows] = _whole(r.pid for r in reports)
        self.rss[rows] = _whole(r.rss_bytes for r in reports)
        self.busy_s[rows] = np.clip(np.array([r.busy_s for r in reports]), 0.0, 1e9)
        self.sent[rows] += _whole(r.sent_bytes for r in reports)
        self.received[rows] += _whole(r.received_bytes for r in reports)
        self.retries[rows] += _whole(r.retries for r in reports)
        steps = _whole(r.num_steps for r in reports)
        samples = _whole(r.num_samples for r in reports)
        fresh = np.maximum(0, samples - self.samples[rows])
        self.steps_told += int(np.maximum(0, steps - self.steps[rows]).sum())
        self.all_samples[rows] += fresh
        self.steps[rows], self.samples[rows] = steps, samples
        span = np.clip(np.array([r.span_s for r in reports]), 0.05, 60.0)
        _blend(self.samples_per_s, rows, fresh / span, 1.0 - np.exp(-span / 5.0))
        counts = np.array([len(r.end) for r in reports])
        if counts.any():
            self._flush_steps(rows, reports, now, counts)

    def _flush_steps(
        self, rows: Ints, reports: list[WorkerReport], now: Floats, counts: Ints
    ) -> None:
        """Steps of all reports, in one column; `owner` is the place of each one's report."""
        num, total = len(rows), int(counts.sum())
        owner = np.repeat(np.arange(num), counts)

        def column(name: str) -> Floats:
            values = chain.from_iterable(getattr(r, name) for r in reports)
            return np.fromiter(values, np.float64, total)

        def by_worker(values: Floats) -> Floats:
            sums: Floats = np.bincount(owner, weights=values, minlength=num).astype(np.float64)
            return sums

        step_s = np.clip(column("step_s"), 0.0, 1e6)
        names = ("compute_s", "fetch_s", "push_s", "data_s")
        phases = [np.clip(by_worker(np.maximum(column(n), 0.0)), 0.0, 1e6) for n in names]
        wall = np.clip(by_worker(step_s), 1e-9, 1e6)
        phases.append(np.maximum(0.0, wall - sum(phases)))
        some = counts > 0
        chosen, many = rows[some], counts[some]
        # Reports without a step say nothing of phases.
        weight = 1.0 - np.exp(-wall[some] / PHASE_S)
        _blend(self.step_s, chosen, wall[some] / many, weight)
        for mean, new, sums in zip(self._phases, self._new_phases, phases, strict=True):
            _blend(mean, chosen, sums[some] / many, weight)
            _add(new, chosen, sums[some])
        _add(self.new_steps, chosen, many.astype(np.float64))
        nth = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        newest = nth >= counts[owner] - KEPT_STEPS
        place = (self.place[rows][owner] + nth) % KEPT_STEPS
        self.recent[rows[owner[newest]], place[newest]] = step_s[newest]
        self.place[rows] += counts
        loss, has_loss = column("loss"), column("has_loss") > 0
        # Where one worker is named more than once, the last value stays.
        self.loss[rows[owner[has_loss]]] = loss[has_loss]
        self.new_loss[rows[owner[has_loss]]] = loss[has_loss]
        stale, has_push = np.clip(column("staleness"), 0.0, HUGE), column("has_push") > 0
        end, norm = column("end"), column("grad_norm")
        pushed = owner[has_push]
        self.stale[rows[pushed]] = stale[has_push]
        self.sum_stale[rows] += np.bincount(pushed, weights=stale[has_push], minlength=num)
        pushes = np.bincount(pushed, minlength=num)
        self.num_stale[rows] += pushes
        top = np.full(num, np.nan)
        np.fmax.at(top, pushed, stale[has_push])
        self.new_stale[rows] = np.fmax(self.new_stale[rows], top)
        self.pushes[rows] += pushes
        self.back_pushes[rows] += pushes
        did = pushes > 0
        self.pushed_at[rows[did]] = now[did]
        end = np.minimum(end, now[owner])
        if self.per_fetch <= 1:
            last = np.full(num, np.nan)
            last[pushed] = end[has_push]
            self.fetched_at[rows] = np.fmax(self.fetched_at[rows], last)
        self.steps_read.append(StepColumns(rows[owner], end, loss, has_loss, stale, has_push, norm))

    def take_shard(self, r: ShardReport, now: float) -> Floats | None:
        """What a shard says of workers. Returns: the staleness of those that pushed."""
        s = self.shard_row(r.name)
        if s < 0:
            return None
        self.version[s] = min(float(r.version), HUGE)
        if not r.w:
            return None
        rows = np.fromiter(map(self.rows.get, r.w, repeat(-1)), np.int64, len(r.w))
        for k in np.flatnonzero(rows < 0).tolist():
            if r.pushes[k]:  # the launcher, which fetches to evaluate, is no worker
                rows[k] = self.row(r.w[k])
        inc = np.minimum(np.array(r.w_inc, np.float64), HUGE).astype(np.int64)
        known = rows >= 0
        known[known] = inc[known] >= self.inc[rows[known]]
        rows, inc = rows[known], inc[known]
        for i, one in zip(rows[inc > self.inc[rows]], inc[inc > self.inc[rows]], strict=True):
            self._renew(int(i), int(one), now)
        base = np.minimum(np.array(r.base, np.float64)[known], HUGE)
        pushes = np.minimum(np.array(r.pushes, np.float64)[known], HUGE)
        stale = np.minimum(np.array(r.staleness, np.float64)[known], HUGE)
        moved = self.base[s, rows] != base
        self.base[s, rows] = base
        self.seen_at[rows] = now
        self.fetched_at[rows[moved]] = np.fmax(self.fetched_at[rows[moved]], now - 0.5)
        has = pushes > 0
        self.shard_stale[s, rows[has]] = stale[has]
        between_s = every_s(len(self.names))
        if between_s > EVERY_S:
            # Workers of a large fleet speak seldom: until they do, this is the newest word.
            pushed = rows[has]
            self.new_stale[pushed] = np.fmax(self.new_stale[pushed], stale[has])
            self.pushed_at[pushed] = np.fmax(self.pushed_at[pushed], now)
        if s == 0:
            # Where the worker's own reports are lost, this is all that is known of its pushes.
            deaf = has & ~(now - self.heard_at[rows] < max(3.0, 2.5 * between_s))
            self.flush()
            for i, num, one in zip(rows[deaf], pushes[deaf], stale[deaf], strict=True):
                self.stale[i] = self.mean_stale[i] = one
                self.new_stale[i] = np.fmax(self.new_stale[i], one)
                self._pushed(int(i), int(num), now)
        return stale[has]

    def take_run(self, r: RunReport, now: float) -> None:
        """The launcher's word on each worker."""
        workers = r.workers[:WORKERS_MAX]
        rows = np.array([self.row(w.name) for w in workers], np.int64)
        inc = _whole(w.inc for w in workers)
        known = (rows >= 0) & (inc >= self.inc[rows])
        for k in np.flatnonzero(known & (inc > self.inc[rows])).tolist():
            self._renew(int(rows[k]), int(inc[k]), now)
        rows = rows[known]
        self.told[rows] = np.array([_TOLD.get(w.state, UNTOLD) for w in workers], np.int64)[known]
        self.told_at[rows] = now
        self.restarts[rows] = _whole(w.restarts for w in workers)[known]
        pid = _whole(w.pid for w in workers)[known]
        self.pid[rows] = np.where(pid > 0, pid, self.pid[rows])
        for i, w in zip(rows.tolist(), compress(workers, known), strict=True):
            if w.host and not self.hosts[i]:
                self.hosts[i] = w.host[:TEXT_MAX]
                self.order += 1

    def tell(self, name: str, kind: str, now: float) -> None:
        """An event of a worker."""
        told = {"crash": TOLD_LOST, "leave": TOLD_LEFT, "drain": TOLD_DRAINING}.get(kind)
        if kind in ("join", "recover"):
            told = TOLD_TRAINING
        if told is None or (name not in self.rows and kind != "join"):
            return
        i = self.row(name)
        if i >= 0:
            self.told[i], self.told_at[i] = told, now
            if kind == "recover":
                self.back_at[i], self.back_pushes[i] = now, 0

    def _pushed(self, i: int, num: int, now: float) -> None:
        num = min(num, 1 << 40)
        self.pushes[i] += num
        self.recent_pushes[i] += num
        self.pushed_at[i] = now
        self.back_pushes[i] += num

    def _renew(self, i: int, inc: int, now: float) -> None:
        """A worker is there as another incarnation: what was measured of the last one is over."""
        self.flush()
        was = int(self.inc[i])
        self.inc[i], self.n[i] = inc, 0
        if was <= 0:  # 0: started, and not heard of yet
            return
        self.back_at[i], self.back_pushes[i] = now, 0
        self.steps[i] = self.samples[i] = 0
        for name in ("stale", "mean_stale", "trend", "level", "lag", "ratio", "pushed_at"):
            getattr(self, name)[i] = _NAN
        self.grade[i] = OK
        self.base[:, i] = self.shard_stale[:, i] = self.trip[:, i] = np.nan
        if self.told[i] == TOLD_LOST:
            self.told[i] = UNTOLD

    # What follows, once a second.

    def advance(self, now: float, is_training: bool = True, *, is_deaf: bool = False) -> Ints:
        """Lag, ratio and status of all. Returns: rows whose status has changed.

        is_deaf: no report comes at all, so that silence says nothing of a worker."""
        self.flush()
        num = len(self.names)
        last, self.advanced_at = self.advanced_at, now
        gap = 1.0 if last is None else now - last
        if gap > 3.0 or is_deaf:
            self._shift(gap if is_deaf else gap - 1.0)
        a = slice(0, num)
        pushed = ~np.isnan(self.pushed_at[a])
        limit = self.stall_limit()
        quiet = now - self.pushed_at[a]
        gone = self._is_down(now) | (self.told[a] == TOLD_LEFT)
        active = pushed & ~gone & (quiet <= limit)
        count = int(active.sum())
        if count:
            self.fair = (count - 1) * (self.per_fetch + 1) / 2
        elif not pushed.any():
            self.fair = None
        self._lag(now, gone)
        status = self._judge(now, pushed, gone, quiet > limit, is_training)
        changed = np.flatnonzero(status != self.status[a])
        self.status[changed] = status[changed]
        self.since[changed] = now
        fresh = np.isnan(self.since[a])
        self.since[a][fresh] = now
        return changed

    def stall_limit(self) -> Floats:
        """How long each may take between two pushes."""
        recent = np.sort(self.recent[: len(self.names)], axis=1)  # NaN comes last
        known = (~np.isnan(recent)).sum(axis=1)
        median = recent[np.arange(len(recent)), np.maximum(0, (known - 1) // 2)]
        told = known > 0
        # Whose own reports have not come yet is taken for one of many, and waited for.
        median = np.where(told, median, np.median(median[told]) if told.any() else 0.0)
        limit: Floats = np.maximum(STALL_S, STALL_STEPS * median * self.n_push)
        limit[~told] += every_s(len(self.names))
        return limit

    def _is_down(self, now: float) -> Bools:
        a = slice(0, len(self.names))
        heard = np.fmax(self.heard_at[a], self.seen_at[a])
        told = self.told[a] == TOLD_LOST
        # A late word of the launcher does not outweigh a report that came after it.
        told &= ~(self.heard_at[a] > self.told_at[a] + 2.0)
        vouched = (self.told[a] != UNTOLD) & (now - self.told_at[a] < VOUCH_S)
        result: Bools = told | (~vouched & (now - heard > SILENT_S))
        return result

    def _shift(self, gap: float) -> None:
        """We were not awake for so long: nobody is late for that."""
        for name in ("heard_at", "seen_at", "pushed_at", "told_at", "over_watch", "over_slow"):
            self.view(name)[:] += gap
        self.view("under_watch")[:] += gap
        self.view("under_slow")[:] += gap

    def _lag(self, now: float, gone: Bools) -> None:
        num = len(self.names)
        a = slice(0, num)
        some = self.num_stale[a] > 0
        self.mean_stale[a][some] = self.sum_stale[a][some] / self.num_stale[a][some]
        self.sum_stale[a] = 0
        self.num_stale[a] = 0
        behind = np.full(num, np.nan)
        for s in range(len(self.shard_names)):
            behind = np.fmax(behind, np.maximum(0.0, self.version[s] - self.base[s, a]))
        self.lag[a] = np.where(gone, np.nan, np.fmax(self.stale[a], behind))
        never = np.isnan(self.pushed_at[a])
        scale = max(self.fair or 0.0, 1.0)
        self.ratio[a] = self.lag[a] / scale if self.fair is not None else np.nan
        self.ratio[a][never] = np.nan
        # Own pushes since the fetch are in `behind` too; with n_fetch > n_push it is no excess.
        grown = behind if self.per_fetch <= 1 else behind / self.per_fetch
        raw = np.fmax(self.mean_stale[a], grown) / scale
        raw[never | gone] = np.nan
        weight = 1.0 - math.exp(-1.0 / SMOOTH_S)
        for column, value in ((self.trend, np.minimum(raw, CLIP)), (self.level, raw)):
            old = column[a]
            start = np.where(np.isnan(old), np.minimum(value, 1.0), old)
            column[a] = np.where(np.isnan(value), np.nan, start + weight * (value - start))

    def _judge(
        self, now: float, pushed: Bools, gone: Bools, late: Bools, is_training: bool
    ) -> Ints:
        a = slice(0, len(self.names))
        trend, grade = self.trend[a], self.grade[a]
        for column, true in (
            (self.over_watch, trend > WATCH_ABOVE),
            (self.over_slow, trend > SLOW_ABOVE),
            (self.under_watch, ~(trend >= WATCH_BELOW)),
            (self.under_slow, ~(trend >= SLOW_BELOW)),
        ):
            since = column[a]
            since[true & np.isnan(since)] = now
            since[~true] = np.nan
        told, was = self.told[a], self.status[a]
        if is_training:
            grade[(grade == SLOW) & (now - self.under_slow[a] >= SLOW_S)] = WATCH
            grade[(grade == WATCH) & (now - self.under_watch[a] >= WATCH_S)] = OK
            grade[(grade == OK) & (now - self.over_watch[a] >= WATCH_S)] = WATCH
            grade[(grade <= WATCH) & (now - self.over_slow[a] >= SLOW_S)] = SLOW
        back = now - self.back_at[a]
        status = grade.copy()
        if is_training:
            status[pushed & late] = STALLED
        else:
            status[pushed & (was == STALLED) & late] = STALLED
        status[(back < RECOVER_S) | ((back >= 0) & (self.back_pushes[a] < RECOVER_PUSHES))] = (
            RECOVERING
        )
        if is_training:
            # Back, and then stuck: that is not recovering.
            status[pushed & late & ~np.isnan(back)] = STALLED
        status[~pushed & np.isnan(back)] = STARTING
        status[told == TOLD_DRAINING] = DRAINING
        down = gone & (told != TOLD_LEFT)
        status[down] = DOWN
        status[told == TOLD_LEFT] = LEFT
        result: Ints = status
        return result

    def close_second(self) -> dict[str, Floats]:
        """What History keeps of a second; lag is inf for a worker that is down."""
        num = len(self.names)
        a = slice(0, num)
        now = self.advanced_at or 0.0
        lag = np.fmax(self.lag[a], self.new_stale[a])
        status = self.status[a]
        lag[status == DOWN] = np.inf
        lag[(status == LEFT) | (status == STARTING)] = np.nan
        age = np.maximum(0.0, now - self.fetched_at[a])
        age[(status == DOWN) | (status == LEFT)] = np.nan
        values = {"lag": lag, "age": age, "steps": self.new_steps[a].copy()}
        for phase, new in zip((*PHASES, "other"), self._new_phases, strict=True):
            values[phase] = new[a].copy()
            new[a] = np.nan
        values["loss"] = self.new_loss[a].copy()
        for column in (self.new_steps, self.new_loss, self.new_stale):
            column[a] = np.nan
        return values

    # What may be asked.

    def is_active(self) -> Bools:
        """Workers that take part: they have pushed, and are not down, stalled or gone."""
        status = self.view("status")
        pushed = ~np.isnan(self.view("pushed_at"))
        result: Bools = pushed & _IS_PART[status]
        return result

    def medians(self, of: Bools | None = None) -> dict[str, float | None]:
        """Of the workers that are well, where there are enough of them; else of all that work."""
        active = self.is_active()
        well = active & (self.view("grade") == OK)
        chosen = well if well.sum() * 3 >= active.sum() else active
        if of is not None and (chosen & of).any():
            chosen &= of
        out: dict[str, float | None] = {}
        for name in ("lag", "ratio", "step_s", *PHASES, "other"):
            values = self.view(name)[chosen]
            values = values[~np.isnan(values)]
            out[name] = float(np.median(values)) if len(values) else None
        return out

    def skew(self, i: int) -> float | None:
        """Largest less smallest staleness over the shards."""
        values = self.shard_stale[:, i]
        values = values[~np.isnan(values)]
        return float(values.max() - values.min()) if len(values) > 1 else None

    def nodes(self) -> list[str]:
        """Names of the hosts, in the order of numbers in them."""
        return sorted(set(self.hosts), key=natural)

    @property
    def num_alive(self) -> int:
        status = self.view("status")
        return int(_IS_ALIVE[status].sum())

    def by_status(self) -> dict[str, int]:
        counts = np.bincount(self.view("status"), minlength=len(STATUSES))
        return {name: int(n) for name, n in zip(STATUSES, counts, strict=True)}

    # What is kept on disk.

    def dump(self) -> dict[str, NDArray[Any]]:  # Any: as _COLUMNS says
        columns = {name: self.view(name) for name in _COLUMNS}
        num = len(self.names)
        extra = {"base": self.base, "shard_stale": self.shard_stale, "trip": self.trip}
        columns |= {f"s_{name}": table[:, :num] for name, table in extra.items()}
        return columns | {"recent": self.recent[:num], "version": self.version}

    def load(
        self,
        names: Iterable[str],
        hosts: Iterable[str],
        devices: Iterable[str],
        shards: Iterable[str],
        columns: dict[str, NDArray[Any]],  # Any: as _COLUMNS says
    ) -> None:
        """As it was dumped. Raises: ValueError, KeyError, IndexError if that is damaged."""
        for name in names:
            self.row(name)
        self.hosts, self.devices = list(hosts), list(devices)
        for shard in shards:
            self.shard_row(shard)
        for name in _COLUMNS:
            self.view(name)[:] = columns[name]
        num = len(self.names)
        for name in ("base", "shard_stale", "trip"):
            getattr(self, name)[:, :num] = columns[f"s_{name}"]
        self.recent[:num] = columns["recent"]
        self.version[:] = columns["version"]
        if len(self.hosts) != num or len(self.devices) != num:
            raise ValueError("names and hosts of unlike length")

    def _resize(self, width: int) -> None:
        old = self._width
        for name, (kind, fill) in _COLUMNS.items():
            new: NDArray[Any] = np.full(width, fill, kind)  # Any: as _COLUMNS says
            if old:
                new[:old] = getattr(self, name)
            setattr(self, name, new)
        for name in ("base", "shard_stale", "trip"):
            table = np.full((len(self.shard_names), width), np.nan)
            table[:, :old] = getattr(self, name)[:, :old]
            setattr(self, name, table)
        recent = np.full((width, KEPT_STEPS), np.nan)
        recent[:old] = self.recent[:old]
        self.recent = recent
        self._width = width
        self._phases = [self.compute, self.fetch, self.push, self.data, self.other]
        self._new_phases = [
            self.new_compute,
            self.new_fetch,
            self.new_push,
            self.new_data,
            self.new_other,
        ]


def natural(name: str) -> tuple[Any, ...]:  # Any: text and numbers by turns
    """w2 comes before w10."""
    head = name.rstrip("0123456789")
    tail = name[len(head) :]
    return (head, int(tail) if tail else -1)


def _whole(values: Iterable[int]) -> Ints:
    return np.minimum(np.array(list(values), np.float64), HUGE).astype(np.int64)


def _blend(column: Floats, rows: Ints, new: Floats, weight: Floats) -> None:
    """Move means towards new values; where there was none the new one is the mean."""
    old = column[rows]
    column[rows] = np.where(np.isnan(old), new, old + weight * (new - old))


def _add(column: Floats, rows: Ints, new: Floats) -> None:
    old = column[rows]
    column[rows] = np.where(np.isnan(old), new, old + new)
