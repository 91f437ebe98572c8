"""Shards: every shard as it is now, and the round trips to it. No clock.

A shard is hot where it holds the others up: its queue is above 8 while it has no time to spare, or
its updates take twice as long as those of the others, or round trips to it do, for 10 s.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from distbelief.chronicle import RunReport
from distbelief.monitor.fleet import HUGE, TEXT_MAX, Fleet
from distbelief.monitor.source import Json
from distbelief.param_server.report import ShardReport, WorkerReport

QUEUE_HOT = 8
BUSY_HOT = 0.8
"""A queue alone says little: a push may be several messages, and all workers may push at once."""
APPLY_HOT, APPLY_LEAST_S = 2.0, 0.001
TRIP_HOT = 2.0
HOT_S = 10.0
SILENT_S = 10.0
RATE_S = 10.0
KEPT_S = 10
BINS, PER_OCTAVE, LO = 240, 8, -20.0
"""Of round trips: 8 bins in an octave from a microsecond."""

_NAN = math.nan


@dataclass(slots=True)
class ShardView:
    """One shard."""

    name: str
    host: str = ""
    pid: int = 0
    inc: int = -1
    n: int = 0
    heard_at: float = _NAN
    told: str = ""
    told_at: float = _NAN
    restarts: int = 0
    version: int = 0
    updates: int = 0
    samples: int = 0
    parameters: int = 0
    queue: int = 0
    busy_share: float = _NAN
    bytes_per_s: float = _NAN
    saved: str = ""
    saved_at: float = 0.0
    save_s: float = 0.0
    storage_error: str = ""
    refused: int = 0
    p50: float = _NAN
    p95: float = _NAN
    """Of the seconds that a push takes to be applied."""
    since: dict[str, float] = field(default_factory=dict)
    """Reason to be hot -> since when."""
    rates: deque[tuple[float, int]] = field(default_factory=deque)
    """(when, updates) of the last seconds."""
    applied: deque[NDArray[np.float64]] = field(default_factory=lambda: deque(maxlen=3))

    def rate(self) -> float | None:
        """Updates a second."""
        if len(self.rates) < 2:
            return None
        (begin, first), (end, last) = self.rates[0], self.rates[-1]
        return max(0, last - first) / (end - begin) if end > begin else None

    def is_hot(self, now: float) -> bool:
        return any(now - since >= HOT_S for since in self.since.values())


class Shards:
    """See the top of this file. In the order of the fleet's rows of shards."""

    def __init__(self) -> None:
        self.items: list[ShardView] = []
        self.num_lost = 0
        self.num_taken = 0
        self.num_old = 0
        self._advanced_at = math.inf
        self.steady: deque[tuple[float, int, int, int]] = deque()
        """(when, parts, sum, what the law says of the sum) of ten minutes."""
        self.updates_told = 0
        """Updates at the first shard since we listen, from its totals."""
        self.trips: NDArray[np.int64] = np.zeros((KEPT_S, 0, 2, BINS), np.int64)
        """Counts of round trips: [second, shard, fetch or push, bin]."""
        self._open: tuple[list[int], list[int], list[bool], list[float]] = ([], [], [], [])

    def take(self, r: ShardReport, now: float, fleet: Fleet) -> bool:
        """Returns: whether it counts."""
        s = fleet.shard_row(r.name)
        if s < 0:
            return False
        self.grow(fleet)
        item = self.items[s]
        if r.inc < item.inc or (r.inc == item.inc and r.n <= item.n):
            self.num_old += 1
            return False
        if r.inc > item.inc:
            item.inc = min(r.inc, 1 << 50)
            item.rates.clear()
        elif item.n:
            self.num_lost += min(r.n - item.n - 1, 1000)
        is_first = item.heard_at != item.heard_at
        self.num_taken += 1
        item.n, item.heard_at = min(r.n, 1 << 50), now
        item.host, item.pid = r.host[:TEXT_MAX], min(r.pid, 1 << 40)
        updates = min(r.updates, 1 << 50)
        if s == 0 and not is_first:
            self.updates_told += max(0, updates - item.updates)
        item.version, item.updates = min(r.version, 1 << 50), updates
        item.samples, item.parameters = min(r.samples, 1 << 50), min(r.parameters, 1 << 50)
        span = min(max(r.span_s, 0.05), 60.0)
        item.queue, item.busy_share = min(r.queue, 1 << 40), min(max(r.busy_share, 0.0), 1.0)
        item.bytes_per_s = min(float(r.sent_bytes + r.received_bytes), HUGE) / span
        item.refused += min(r.refused_parts, 1 << 40)
        item.saved, item.saved_at = r.saved[:TEXT_MAX], min(max(r.saved_at, 0.0), now)
        item.save_s = min(max(r.save_s, 0.0), 1e6)
        item.storage_error = r.storage_error[:200]
        item.rates.append((now, updates))
        while len(item.rates) > 2 and item.rates[0][0] < now - RATE_S:
            item.rates.popleft()
        if r.apply_s:
            item.applied.append(np.clip(np.array(r.apply_s[-512:], np.float64), 0.0, 1e6))
            values = np.sort(np.concatenate(item.applied))
            item.p50 = float(values[len(values) // 2])
            item.p95 = float(values[int(0.95 * len(values))])
        if r.steady_parts:
            parts, total = min(r.steady_parts, 1 << 40), min(r.steady_sum, 1 << 50)
            self.steady.append((now, parts, total, parts * max(0, min(r.num_workers, 1 << 20) - 1)))
        while self.steady and self.steady[0][0] < now - 600.0:
            self.steady.popleft()
        return True

    def take_run(self, r: RunReport, now: float, fleet: Fleet) -> None:
        for told in r.shards:
            s = fleet.shard_row(told.name)
            if s < 0:
                continue
            self.grow(fleet)
            item = self.items[s]
            item.told, item.told_at = told.state[:TEXT_MAX], now
            item.restarts = min(max(told.restarts, 0), 1 << 40)
            item.host = item.host or told.host[:TEXT_MAX]
            item.pid = item.pid or min(told.pid, 1 << 40)
            if told.storage_error and not item.storage_error:
                item.storage_error = told.storage_error[:200]

    def take_trips(self, row: int, r: WorkerReport) -> None:
        if not r.trip_s:
            return
        rows, shards, pushes, seconds = self._open
        if len(rows) < 200_000:
            rows.extend(repeat(row, len(r.trip_s)))
            shards.extend(r.trip_shard)
            pushes.extend(r.trip_is_push)
            seconds.extend(r.trip_s)

    def grow(self, fleet: Fleet) -> None:
        """One item for each of the fleet's rows of shards."""
        while len(self.items) < len(fleet.shard_names):
            self.items.append(ShardView(fleet.shard_names[len(self.items)]))
        if self.trips.shape[1] < len(self.items):
            new = np.zeros((KEPT_S, len(self.items), 2, BINS), np.int64)
            new[:, : self.trips.shape[1]] = self.trips
            self.trips = new

    def advance(self, now: float, fleet: Fleet, step_s: float | None) -> None:
        """Close a second. step_s: median of the fleet's steps."""
        self.grow(fleet)
        gap = now - self._advanced_at
        if gap > 3.0:
            # We were not awake: no shard is late for that.
            for item in self.items:
                item.heard_at += gap
        self._advanced_at = now
        self._close_trips(int(now), fleet)
        alone = len(self.items) == 1
        push = [self.trip_s(s, 1) for s in range(len(self.items))]
        for s, item in enumerate(self.items):
            others = [o for o in self.items if o is not item]
            why = {
                "queue": item.queue > QUEUE_HOT and item.busy_share > BUSY_HOT,
                "apply": not alone
                and item.p95 > APPLY_HOT * _median([o.p95 for o in others])
                and item.p95 > APPLY_LEAST_S
                and item.busy_share > 0.2,
                "trip": False,
            }
            trip, rest = push[s], [t for i, t in enumerate(push) if i != s and t is not None]
            if trip is not None and rest and step_s is not None:
                usual = _median(rest)
                # A trip that is no large share of a step holds nobody up.
                why["trip"] = trip > TRIP_HOT * usual and trip - usual > 0.25 * step_s
            is_heard = now - item.heard_at < SILENT_S
            for reason, true in why.items():
                if true and is_heard:
                    item.since.setdefault(reason, now)
                else:
                    item.since.pop(reason, None)

    def trip_s(self, s: int | None, push: int, share: float = 0.5) -> float | None:
        """Quantile of the round trips of the last ten seconds to a shard, or to all."""
        if not self.items:
            return None
        of = self.trips[:, :, push] if s is None else self.trips[:, s, push][:, None]
        total = np.cumsum(of.sum(axis=(0, 1)))
        if not total[-1]:
            return None
        place = int(np.searchsorted(total, share * total[-1]))
        return float(2 ** ((place + 0.5) / PER_OCTAVE + LO))

    def law(self) -> tuple[int, float, float] | None:
        """(parts, their mean staleness, what it should be) of ten minutes."""
        parts = sum(one[1] for one in self.steady)
        if not parts:
            return None
        return parts, sum(o[2] for o in self.steady) / parts, sum(o[3] for o in self.steady) / parts

    def status(self, item: ShardView, now: float) -> str:
        """starting, serving, silent, lost or ended."""
        if item.told in ("lost", "ended"):
            return item.told
        if item.heard_at != item.heard_at:
            return item.told or "starting"
        return "serving" if now - item.heard_at < SILENT_S else "silent"

    def as_json(self, now: float) -> list[Json]:
        """As Source.shards has it."""
        rates = [item.rate() for item in self.items]
        total = sum(rate or 0.0 for rate in rates)
        out: list[Json] = []
        for s, (item, rate) in enumerate(zip(self.items, rates, strict=True)):
            known = item.heard_at == item.heard_at
            out.append(
                {
                    "id": item.name,
                    "node": item.host,
                    "host": item.host,
                    "pid": item.pid or None,
                    "inc": item.inc if item.inc >= 0 else None,
                    "status": self.status(item, now),
                    "updates_per_s": tidy(rate),
                    "share": tidy(rate / total) if rate is not None and total > 0 else None,
                    "queue": item.queue if known else None,
                    "busy_share": tidy(item.busy_share),
                    "apply_ms": {"p50": tidy(item.p50 * 1e3), "p95": tidy(item.p95 * 1e3)},
                    "trip_ms": {
                        "fetch": _ms(self.trip_s(s, 0, 0.95)),
                        "push": _ms(self.trip_s(s, 1, 0.95)),
                    },
                    "version": item.version if known else None,
                    "samples": item.samples if known else None,
                    "bytes_per_s": tidy(item.bytes_per_s),
                    "parameters": item.parameters if known else None,
                    "restarts": item.restarts,
                    "saved": item.saved or None,
                    "saved_age_s": tidy(now - item.saved_at) if item.saved_at else None,
                    "save_s": tidy(item.save_s) if item.saved_at else None,
                    "storage_error": item.storage_error or None,
                    "age_s": tidy(now - item.heard_at),
                    "hot": item.is_hot(now),
                }
            )
        return out

    def _close_trips(self, second: int, fleet: Fleet) -> None:
        place = second % KEPT_S
        self.trips[place] = 0
        if not self._open[0]:
            return
        rows = np.array(self._open[0], np.int64)
        # By number, as workers do not know names: shard3 is the row of that name.
        number = np.array(self._open[1], np.float64)
        names = {int(name[5:]): i for name, i in fleet.shard_rows.items() if name[5:].isdigit()}
        push = np.array(self._open[2], np.int64)
        seconds = np.clip(np.array(self._open[3], np.float64), 0.0, 1e6)
        for column in self._open:
            column.clear()
        top = max(names, default=-1) + 1
        if not 0 < top <= 1 << 16:
            return
        table = np.full(top, -1, np.int64)
        for key, value in names.items():
            table[key] = value
        shard = np.where(number < top, table[np.minimum(number, top - 1).astype(np.int64)], -1)
        known = shard >= 0
        rows, shard, push, seconds = rows[known], shard[known], push[known], seconds[known]
        if not len(rows):
            return
        bins = ((np.log2(np.maximum(seconds, 1e-6)) - LO) * PER_OCTAVE).astype(np.int64)
        cells = (shard * 2 + push) * BINS + np.clip(bins, 0, BINS - 1)
        counts = np.bincount(cells, minlength=self.trips[place].size)
        self.trips[place] = counts.reshape(self.trips[place].shape)
        # Each worker's mean to each shard, of pushes where there are any.
        chosen = push == 1 if push.any() else push == 0
        width = len(fleet.names)
        flat = shard[chosen] * width + rows[chosen]
        size = len(fleet.shard_names) * width
        count = np.bincount(flat, minlength=size).reshape(-1, width)
        total = np.bincount(flat, weights=seconds[chosen], minlength=size).reshape(-1, width)
        old = fleet.trip[:, :width]
        with np.errstate(invalid="ignore", divide="ignore"):
            new = total / count
        mixed = np.where(np.isnan(old), new, old + 0.2 * (new - old))
        fleet.trip[:, :width] = np.where(count > 0, mixed, old)


def tidy(value: float | None) -> float | None:
    """Six digits; None for what is missing or not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else tidy(seconds * 1e3)


def _median(values: list[float]) -> float:
    known = [v for v in values if v == v]
    return float(np.median(known)) if known else math.inf
