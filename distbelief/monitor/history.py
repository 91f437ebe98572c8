"""History: what was, by worker and for the whole run, in rings that never grow. No clock.

    tier     bins    of a worker (Rows)                        of the run (Curves)
    1 s      600     } lag, age: largest of the bin            every second of 24 h, and of each
    5 s      720     } phases, steps: their sum                minute of 30 days the smallest and
    60 s     1,440   } loss: the last                          the largest value

A cell of Rows has 16 bits: a logarithm, so 0.04 % exact from a microsecond to a billion. Its
largest code stands for "down", so that the largest of several bins never hides a crash. Rings lie
column by column in time: a second is one line of memory, and what was never reached is no memory.
A worker costs 18 bytes a bin, 50 kB in all.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Codes = NDArray[np.uint16]

LO, HI = -20.0, 30.0
"""Powers of two between which a code is exact."""
ZERO, FIRST, LAST, DOWN = 1, 2, 65534, 65535
"""Codes: the value 0, the smallest and the largest value, and a worker that was down. 0: none."""
STEPS = (LAST - FIRST) / (HI - LO)
"""Codes in an octave."""

LARGEST = ("lag", "age")
SUMS = ("compute", "fetch", "push", "data", "other", "steps")
METRICS = (*LARGEST, *SUMS, "loss")

NEAR_S = 86_400
FAR_BINS = 43_200
FAR_S = 60


def encode(values: Floats) -> Codes:
    """NaN and what is negative: no value."""
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.clip(np.log2(values) * STEPS + (FIRST + 0.5 - LO * STEPS), FIRST, LAST)
    codes = np.where(values > 0, codes, np.where(values == 0, ZERO, 0))
    return codes.astype(np.uint16)


def decode(codes: NDArray[Any]) -> Floats:  # Any: of any integers
    """NaN for none and for down."""
    values = np.exp2((codes.astype(np.float64) - FIRST) / STEPS + LO)
    values = np.where(codes >= FIRST, values, np.where(codes == ZERO, 0.0, np.nan))
    return np.where(codes == DOWN, np.nan, values)


@dataclass(frozen=True, slots=True)
class Tier:
    bin_s: int
    num_bins: int

    @property
    def span_s(self) -> int:
        return self.bin_s * self.num_bins


TIERS = (Tier(1, 600), Tier(5, 720), Tier(60, 1440))


class _Ring:
    """One tier of all workers."""

    def __init__(self, tier: Tier, width: int) -> None:
        self.tier = tier
        self.stamp = np.full(tier.num_bins, -1, np.int64)
        """Which bin of all time lies in a place: unix time / bin_s."""
        # zeros, not full: what is never written takes no memory.
        self.codes: Codes = np.zeros((tier.num_bins, len(METRICS) - 1, width), np.uint16)
        self.loss = np.zeros((tier.num_bins, width), np.float16)
        self.now = -1
        self.open = np.full((len(METRICS), width), np.nan)
        """The bin that is not closed yet, as values; down is inf."""

    @property
    def cells(self) -> dict[str, NDArray[Any]]:  # Any: codes, or float16 for loss
        """[bins, workers] of each metric; views."""
        return {m: self.codes[:, i] for i, m in enumerate(METRICS[:-1])} | {"loss": self.loss}

    def grow(self, width: int) -> None:
        old, was, opened = self.codes, self.loss, self.open
        num = old.shape[2]
        used = np.flatnonzero(self.stamp >= 0)
        self.codes = np.zeros((*old.shape[:2], width), np.uint16)
        self.codes[used, :, :num] = old[used]
        self.loss = np.zeros((len(was), width), np.float16)
        self.loss[used, :num] = was[used]
        self.loss[used, num:] = np.nan
        self.open = np.full((len(METRICS), width), np.nan)
        self.open[:, :num] = opened

    def add(self, second: int, new: Floats) -> None:
        """new: [metrics, workers], NaN where there is none; lag is inf where one is down."""
        index = second // self.tier.bin_s
        if index != self.now:
            self.now = index
            self.open.fill(np.nan)
        place = index % self.tier.num_bins
        self.stamp[place] = index
        n, k = new.shape[1], len(LARGEST)
        head = self.open[:, :n]
        np.fmax(head[:k], new[:k], out=head[:k])
        sums, more = head[k:-1], new[k:-1]
        np.copyto(sums, np.where(np.isnan(sums), 0.0, sums) + more, where=~np.isnan(more))
        np.copyto(head[-1], new[-1], where=~np.isnan(new[-1]))
        codes = encode(head[:-1])
        codes[0, np.isposinf(head[0])] = DOWN
        self.codes[place] = 0
        self.codes[place, :, :n] = codes
        self.loss[place] = np.nan
        self.loss[place, :n] = np.clip(head[-1], -65_000, 65_000)


class Rows:
    """Of each worker; see the top of this file. Rows are numbered as the caller does."""

    def __init__(self, width: int = 64, tiers: Sequence[Tier] = TIERS) -> None:
        self.width = width
        self.rings = [_Ring(tier, width) for tier in tiers]

    def grow(self, num: int) -> None:
        """Make room for so many workers."""
        while self.width < num:
            self.width *= 2
        for ring in self.rings:
            if ring.loss.shape[1] < self.width:
                ring.grow(self.width)

    def add(self, second: int, values: Mapping[str, Floats]) -> None:
        """Close a second; the next one must be later. values: of all workers, for each metric."""
        new = np.stack([values[m] for m in METRICS])
        for ring in self.rings:
            ring.add(second, new)

    def ring(self, start: float, now: float) -> _Ring:
        """The finest that reaches back so far."""
        for ring in self.rings:
            if start >= now - ring.tier.span_s:
                return ring
        return self.rings[-1]

    def places(self, ring: _Ring, start: float, end: float) -> tuple[NDArray[np.int64], Any]:
        """Numbers of the bins from start to end, and where each lies; -1 where it does not."""
        bin_s, num = ring.tier.bin_s, ring.tier.num_bins
        last = math.ceil(end / bin_s)
        first = max(math.floor(start / bin_s), last - num)
        bins = np.arange(first, max(first, last), dtype=np.int64)
        place = bins % num
        return bins, np.where(ring.stamp[place] == bins, place, -1)

    def block(self, metric: str, start: float, end: float, now: float) -> "Block":
        """All workers' cells, as codes, a line for each bin."""
        ring = self.ring(start, now)
        bins, place = self.places(ring, start, end)
        cells = ring.cells[metric][place]  # a copy
        cells[place < 0] = 0 if metric != "loss" else np.nan
        return Block(int(bins[0]) * ring.tier.bin_s if len(bins) else 0, ring.tier.bin_s, cells)

    def row(self, row: int, start: float, end: float, now: float) -> dict[str, Floats]:
        """All metrics of one worker with `at`, the begin of each bin; lag is inf where down."""
        ring = self.ring(start, now)
        bins, place = self.places(ring, start, end)
        values: dict[str, Floats] = {"at": bins.astype(np.float64) * ring.tier.bin_s}
        for metric, table in ring.cells.items():
            cells = table[place, row]
            if metric == "loss":
                values[metric] = np.where(place < 0, np.nan, cells.astype(np.float64))
            else:
                codes = np.where(place < 0, 0, cells)
                values[metric] = decode(codes)
                if metric == "lag":
                    values[metric][codes == DOWN] = np.inf
        return values


@dataclass(frozen=True, slots=True)
class Block:
    t0: int
    bin_s: int
    cells: NDArray[Any]  # Any: codes, or float16 for loss

    def columns(self, num: int) -> "Block":
        """At most so many bins, each the largest of some of ours. Bins lie on a grid of time, so a
        picture that moves on does not flicker."""
        size = max(1, math.ceil(len(self.cells) / max(1, num)))
        if size == 1:
            return self
        first = self.t0 // self.bin_s
        # The first group may be short: groups begin where the number of a bin is a whole multiple.
        begins = np.arange(first // size * size, first + len(self.cells), size)
        offsets = np.maximum(begins - first, 0)
        cells = np.maximum.reduceat(self.cells, offsets, axis=0)
        extra = len(cells) - num
        if extra > 0:
            cells, begins = cells[extra:], begins[extra:]
        return Block(int(begins[0]) * self.bin_s, self.bin_s * size, cells)

    def pick(self, order: NDArray[np.int64]) -> NDArray[Any]:
        """[rows, bins] of those workers."""
        return np.ascontiguousarray(self.cells[:, order].T)


TRAIL_BIN_S, TRAIL_BINS = 5, 180
TRAIL_PAIRS_MAX = 40_000
"""Pairs of a shard and a worker above which none is kept: 14 MB."""


class Trail:
    """Staleness of each worker at each shard in the last quarter of an hour, 360 bytes a pair."""

    def __init__(self) -> None:
        self.cells: Codes = np.zeros((TRAIL_BINS, 0, 0), np.uint16)
        self.stamp = np.full(TRAIL_BINS, -1, np.int64)

    def add(self, second: int, stale: Floats) -> None:
        """stale: [shards, workers], NaN where it is not known."""
        if stale.size > TRAIL_PAIRS_MAX:
            return
        shards, workers = stale.shape
        old = self.cells.shape
        if shards > old[1] or workers > old[2]:
            # Room for half as many again: workers come one by one.
            room = max(old[1], shards), max(old[2], workers * 3 // 2)
            cells = np.zeros((TRAIL_BINS, *room), np.uint16)
            cells[:, : old[1], : old[2]] = self.cells
            self.cells = cells
        index = second // TRAIL_BIN_S
        place = index % TRAIL_BINS
        if self.stamp[place] != index:
            self.cells[place] = 0
            self.stamp[place] = index
        line = self.cells[place, :shards, :workers]
        np.maximum(line, encode(stale), out=line)

    def read(self, shard: int, row: int, start: float, end: float) -> tuple[list[float], Floats]:
        """(begin of each bin, values)."""
        if shard >= self.cells.shape[1] or row >= self.cells.shape[2]:
            return [], np.zeros(0)
        last = math.ceil(end / TRAIL_BIN_S)
        first = max(math.floor(start / TRAIL_BIN_S), last - TRAIL_BINS)
        bins = np.arange(first, max(first, last), dtype=np.int64)
        place = bins % TRAIL_BINS
        codes = np.where(self.stamp[place] == bins, self.cells[place, shard, row], 0)
        return [float(b * TRAIL_BIN_S) for b in bins], decode(codes)


class Curves:
    """Of the whole run; see the top of this file."""

    def __init__(self, names: Sequence[str], near_s: int = NEAR_S, far: int = FAR_BINS) -> None:
        self.names = list(names)
        self.at = {name: i for i, name in enumerate(names)}
        self.near = np.zeros((near_s, len(names)), np.float32)
        self.near_stamp = np.full(near_s, -1, np.int64)
        self.far = np.zeros((far, 2, len(names)), np.float32)
        self.far_stamp = np.full(far, -1, np.int64)

    def add(self, second: int, values: Mapping[str, float | None]) -> None:
        place = second % len(self.near)
        line = self.near[place]
        if self.near_stamp[place] != second:
            line.fill(np.nan)
            self.near_stamp[place] = second
        for name, value in values.items():
            line[self.at[name]] = np.nan if value is None else value
        minute = second // FAR_S
        if second % FAR_S == FAR_S - 1:
            self._close(minute)
        elif self.far_stamp[(minute - 1) % len(self.far_stamp)] != minute - 1:
            self._close(minute - 1)

    def _close(self, minute: int) -> None:
        values, seconds = self._near(minute * FAR_S, (minute + 1) * FAR_S)
        if np.isnan(values).all():
            return
        place = minute % len(self.far)
        self.far[place] = extremes(values, len(seconds))[0]
        self.far_stamp[place] = minute

    def _near(self, first: int, last: int) -> tuple[Floats, NDArray[np.int64]]:
        seconds = np.arange(first, max(first, last), dtype=np.int64)
        place = seconds % len(self.near)
        known = self.near_stamp[place] == seconds
        return np.where(known[:, None], self.near[place], np.nan).astype(np.float64), seconds

    def read(
        self, names: Sequence[str], start: float, end: float, now: float, points: int
    ) -> tuple[Floats, float, dict[str, Floats]]:
        """(times, length of a bin, values by name); at most `points` of them."""
        columns = [self.at[name] for name in names]
        if start >= now - len(self.near):
            first, last = math.floor(start), math.ceil(end)
            step = 1.0
            values, seconds = self._near(max(first, last - len(self.near)), last)
            times = seconds.astype(np.float64)
        else:
            step = FAR_S / 2
            last = math.ceil(end / FAR_S)
            first = max(math.floor(start / FAR_S), last - len(self.far))
            minutes = np.arange(first, max(first, last), dtype=np.int64)
            place = minutes % len(self.far)
            known = self.far_stamp[place] == minutes
            pairs = np.where(known[:, None, None], self.far[place], np.nan)
            values = pairs.reshape(-1, len(self.names)).astype(np.float64)
            times = np.repeat(minutes * float(FAR_S), 2)
            times[1::2] += step
        values = values[:, columns]
        if len(values) > points:
            size = math.ceil(len(values) / max(1, points // 2))
            begin = times[0]
            values = extremes(values, size).reshape(-1, len(columns))
            times = begin + np.arange(len(values)) * (size * step / 2)
            step = size * step / 2
        return times, step, {name: values[:, i] for i, name in enumerate(names)}

    def window(self, name: str, start: float, end: float) -> Floats:
        """The values of some seconds, NaN where there is none."""
        values, _ = self._near(math.floor(start), math.ceil(end))
        return values[:, self.at[name]]


def extremes(values: Floats, size: int) -> Floats:
    """[bins, 2, columns]: smallest and largest of each `size` lines, in the order of time.

    Where both are one value the second is NaN, so that a rare value is not told twice.
    """
    num = math.ceil(len(values) / size)
    padded = np.full((num * size, values.shape[1]), np.nan)
    padded[: len(values)] = values
    cubes = padded.reshape(num, size, -1)
    none = np.isnan(cubes)
    low = np.where(none, np.inf, cubes).argmin(axis=1)
    high = np.where(none, -np.inf, cubes).argmax(axis=1)
    first, second = np.minimum(low, high), np.maximum(low, high)
    out = np.empty((num, 2, values.shape[1]))
    out[:, 0] = np.take_along_axis(cubes, first[:, None], axis=1)[:, 0]
    out[:, 1] = np.take_along_axis(cubes, second[:, None], axis=1)[:, 0]
    out[:, 1][first == second] = np.nan
    return out


def runs_of(stamp: NDArray[np.int64], length: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Chunks of a ring, for a recording: number of the chunk, and the places of its bins."""
    used = np.flatnonzero(stamp >= 0)
    order = used[np.argsort(stamp[used])]
    chunk = stamp[order] // length
    for number in np.unique(chunk):
        yield int(number), order[chunk == number]
