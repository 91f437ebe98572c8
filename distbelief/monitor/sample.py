"""Samples of single updates: staleness, length of the gradient, and the meter. No clock.

StaleWindow counts every part that was applied; PushSample keeps some pushes and all the stale ones;
MeterBook keeps gradients that were computed again. All are bounded.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

EXACT = 1024
"""Values below have a bin of their own."""
FINE = 64
"""Bins in an octave above."""
OCTAVES = 22
NUM_BINS = EXACT + FINE * OCTAVES
WINDOW_S = 600
VALUES = np.concatenate(
    [
        np.arange(EXACT, dtype=np.float64),
        np.round(EXACT * np.exp2((np.arange(FINE * OCTAVES) + 0.5) / FINE)),
    ]
)
"""The value that stands for a bin."""


def bin_of(values: NDArray[np.int64]) -> NDArray[np.int64]:
    high = np.log2(np.maximum(values, EXACT) / EXACT) * FINE
    bins = np.where(values < EXACT, values, EXACT + high.astype(np.int64))
    return np.clip(bins, 0, NUM_BINS - 1)


class StaleWindow:
    """Staleness of the parts applied in the last ten minutes, second by second."""

    def __init__(self) -> None:
        self.ring = np.zeros((WINDOW_S, NUM_BINS), np.int32)
        self.stamp = np.full(WINDOW_S, -1, np.int64)

    def add(self, second: int, values: Sequence[int], counts: Sequence[int]) -> None:
        if not values:
            return
        place = second % WINDOW_S
        if self.stamp[place] != second:
            self.ring[place] = 0
            self.stamp[place] = second
        bins = bin_of(np.asarray(values, np.int64))
        np.add.at(self.ring[place], bins, np.clip(np.asarray(counts, np.int64), 0, 1 << 24))

    def counts(self, now: float, window_s: float = 60.0) -> Counts:
        """By bin, over the last so many seconds."""
        known = (self.stamp > now - max(1.0, window_s) - 1) & (self.stamp <= now)
        total: Counts = self.ring[known].sum(axis=0, dtype=np.int64)
        return total


def quantiles(counts: Counts, shares: Iterable[float]) -> list[float | None]:
    """The smallest value that so large a share did not exceed; None if there is nothing."""
    total = np.cumsum(counts)
    if not total[-1]:
        return [None for _ in shares]
    return [float(VALUES[int(np.searchsorted(total, max(1e-9, q) * total[-1]))]) for q in shares]


def mean(counts: Counts) -> float | None:
    total = int(counts.sum())
    return float((counts * VALUES).sum() / total) if total else None


def histogram(counts: Counts) -> tuple[list[float], list[int]]:
    """(edges, counts): zeros of their own, then steps of a quarter octave from 1; as far as needed.

    An edge that no whole number lies above is left out: between 1 and 2 there is one bin."""
    edges = [0.0, 1.0]
    top = int(np.flatnonzero(counts)[-1]) if counts.any() else 0
    end = max(2.0, float(VALUES[top]) + 1)
    step = 1
    while edges[-1] < end:
        edge = float(math.ceil(2 ** (step / 4)))
        step += 1
        if edge > edges[-1]:
            edges.append(edge)
    which = np.clip(np.searchsorted(edges, VALUES, side="right") - 1, 0, len(edges) - 2)
    binned = np.bincount(which, weights=counts, minlength=len(edges) - 1)
    return edges, [int(n) for n in binned[: len(edges) - 1]]


PER_SECOND = 100
KEPT_S = 300


@dataclass(slots=True)
class _Second:
    at: int
    seen: int = 0
    kept: Floats = field(default_factory=lambda: np.zeros((0, 4)))
    hot: Floats = field(default_factory=lambda: np.zeros((0, 4)))


class PushSample:
    """Single pushes: worker's row, lag, norm of the gradient, time."""

    def __init__(self) -> None:
        self._seconds: deque[_Second] = deque(maxlen=KEPT_S)
        self._random = np.random.default_rng(0)

    def add(
        self,
        second: int,
        row: NDArray[np.int64],
        lag: Floats,
        norm: Floats,
        at: Floats,
        is_hot: NDArray[np.bool_],
    ) -> None:
        """Some pushes of a second; of those that are not hot a fair sample is kept."""
        if not self._seconds or self._seconds[-1].at != second:
            self._seconds.append(_Second(second))
        now = self._seconds[-1]
        items = np.stack([row.astype(np.float64), lag, norm, at], axis=1)
        now.hot = np.concatenate([now.hot, items[is_hot]])[:PER_SECOND]
        calm = items[~is_hot]
        # Each of all that were seen stays with the same chance.
        old, now.seen = now.seen, now.seen + len(calm)
        if now.seen <= PER_SECOND:
            now.kept = np.concatenate([now.kept, calm])
            return
        num_new = (
            int(self._random.hypergeometric(len(calm), old, PER_SECOND)) if old else PER_SECOND
        )
        num_new = min(num_new, len(calm), PER_SECOND)
        num_old = min(PER_SECOND - num_new, len(now.kept))
        picks = self._random.choice(len(calm), num_new, replace=False)
        stay = self._random.permutation(len(now.kept))[:num_old]
        now.kept = np.concatenate([now.kept[np.sort(stay)], calm[np.sort(picks)]])

    def window(self, now: float, window_s: float, limit: int) -> Floats:
        """[n, 4]: at most `limit`, by time; the hot ones come before the others."""
        recent = [s for s in self._seconds if now - window_s - 1 < s.at <= now]
        hot = np.concatenate([np.zeros((0, 4)), *(s.hot for s in recent)])
        hot = hot[max(0, len(hot) - limit) :]
        kept = np.concatenate([np.zeros((0, 4)), *(s.kept for s in recent)])
        room = max(0, limit - len(hot))
        if len(kept) > room:
            # Every k-th, so that asking twice gives the same answer.
            kept = kept[np.arange(room) * len(kept) // max(1, room)]
        both = np.concatenate([hot, kept])
        return both[np.argsort(both[:, 3], kind="stable")]

    def dump(self) -> Floats:
        """[n, 6]: the second, whether it is hot, and the item."""
        lines = [np.zeros((0, 6))]
        for s in self._seconds:
            for hot, items in ((0.0, s.kept), (1.0, s.hot)):
                head = np.tile([s.at, hot], (len(items), 1))
                lines.append(np.concatenate([head, items], axis=1))
        return np.concatenate(lines)

    def load(self, lines: Floats) -> None:
        """As it was dumped."""
        for at in np.unique(lines[:, 0]):
            of = lines[lines[:, 0] == at]
            hot = of[:, 1] > 0
            kept = of[~hot, 2:]
            self._seconds.append(_Second(int(at), len(kept), kept, of[hot, 2:]))


def ranks(values: Floats) -> Floats:
    """From 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: Floats = ends - (counts + 1) / 2
    return means[inverse]


def spearman(a: Floats, b: Floats) -> float | None:
    """Correlation of the ranks; None for too few values or where one does not vary."""
    if len(a) < 3:
        return None
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / scale) if scale > 0 else None


def medians(lag: Floats, values: Floats) -> tuple[list[float], list[float]]:
    """Median of values in bins of lag, half an octave each: (middles, medians)."""
    if not len(lag):
        return [], []
    which = np.floor(np.log2(lag + 1) * 2).astype(np.int64)
    out: tuple[list[float], list[float]] = [], []
    for one in np.unique(which):
        chosen = which == one
        out[0].append(float(np.median(lag[chosen])))
        out[1].append(float(np.median(values[chosen])))
    return out


METER_KEPT = 5000
FEW = 30
"""Measurements below which nothing is concluded."""


class MeterBook:
    """Is asynchrony hurting? What was measured again on newer parameters."""

    def __init__(self) -> None:
        self.items: deque[tuple[float, float, float, float, float]] = deque(maxlen=METER_KEPT)
        """Time, staleness, cosine, gap, rate."""
        self.num = 0

    def add(self, at: float, staleness: float, cosine: float, gap: float, rate: float) -> None:
        self.num += 1
        self.items.append((at, staleness, cosine, gap, rate))

    def columns(self) -> Floats:
        """[4, n]: staleness, cosine, gap, rate."""
        return np.array([item[1:] for item in self.items], np.float64).reshape(-1, 4).T

    def bins(self, num: int = 8) -> dict[str, list[float]]:
        """As many measurements in each: medians of all four, and how many."""
        columns = self.columns()
        out: dict[str, list[float]] = {k: [] for k in ("staleness", "cosine", "gap", "rate", "n")}
        n = columns.shape[1]
        if not n:
            return out
        order = np.argsort(columns[0], kind="stable")
        for part in np.array_split(order, min(num, max(1, n // 5))):
            for name, column in zip(("staleness", "cosine", "gap", "rate"), columns, strict=True):
                out[name].append(float(np.median(column[part])))
            out["n"].append(float(len(part)))
        return out

    def verdict(self) -> tuple[str, str]:
        """A word, and a sentence."""
        columns = self.columns()
        n = columns.shape[1]
        if n < FEW:
            return "few", f"{n} measurements so far; {FEW} are needed to say something."
        cosine, rate = float(np.median(columns[1])), float(np.median(columns[3]))
        low = float(np.quantile(columns[1], 0.05))
        said = f"Half of the gradients point within cosine {cosine:.2f} of the fresh ones"
        if cosine < 0.3 or rate < 0.3:
            return (
                "hurts",
                f"{said}: staleness costs most of the step. Use fewer workers or less lr.",
            )
        if cosine < 0.7 or low < 0:
            return "some", f"{said}, 5 % below {low:.2f}: staleness costs some of the step."
        return "fine", f"{said}: staleness costs little."
