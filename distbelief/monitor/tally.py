"""Tally: what is counted of single values, as Prometheus wants it.

Bounded by its bounds, whatever is told. No clock.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, repeat

import numpy as np
from numpy.typing import NDArray

MANY = 48
"""From so many values on numpy is quicker than one after the other (1 us against 0.1 us each)."""


class Tally:
    """A histogram: each value is in the first bucket whose bound it does not pass."""

    __slots__ = ("_bounds", "_counts", "_names", "_values", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._values = np.array(bounds, np.float64)
        self._names = [*(repr(float(bound)) for bound in bounds), "+Inf"]
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def __len__(self) -> int:
        return sum(self._counts)

    def add(self, value: float, times: int = 1) -> None:
        """value: below 0 is not known, and not counted."""
        if value >= 0 and times > 0:
            self._counts[bisect_left(self._bounds, value)] += times
            self.sum += value * times

    def add_all(
        self,
        values: Sequence[float] | NDArray[np.float64],
        times: Sequence[int] | NDArray[np.float64] | None = None,
    ) -> None:
        """times: of each value; once if it is not said."""
        if len(values) < MANY:
            for value, many in zip(values, repeat(1) if times is None else times, strict=False):
                self.add(float(value), int(many))
            return
        column = np.asarray(values, np.float64)
        weight = np.ones(len(column)) if times is None else np.asarray(times, np.float64)
        weight = np.where((column >= 0) & (weight > 0), weight, 0.0)
        column = np.where(weight > 0, column, 0.0)
        places = np.searchsorted(self._values, column, side="left")
        counts = np.bincount(places, weights=weight, minlength=len(self._counts))
        for place, many in enumerate(counts.tolist()):
            self._counts[place] += int(many)
        self.sum += float((column * weight).sum())

    def buckets(self) -> list[tuple[str, float]]:
        """(bound, how many do not pass it), the last without a bound."""
        return list(zip(self._names, map(float, accumulate(self._counts)), strict=True))
