"""Staleness: how many pushes of other workers a gradient missed, and how often each value occurred.

Exact integers, no clock. Source: the inconsistency that Dean et al. 2012 section 4.1 names first.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Staleness:
    """A histogram of staleness, and the sums for the law of its mean.

    The law: with fetch policy `fresh` and n_fetch = n_push = 1, from after all W workers' first
    push until the first one leaves, the mean per part is W - 1.
    """

    counts: Counter[int] = field(default_factory=Counter)
    steady_pushes: int = 0
    """Pushes seen while every worker of the job was pushing."""
    steady_sum: int = 0
    """Sum of their staleness."""

    def add(self, value: int, *, is_steady: bool = False) -> None:
        self.counts[value] += 1
        if is_steady:
            self.steady_pushes += 1
            self.steady_sum += value

    @property
    def steady_mean(self) -> float | None:
        """Mean staleness while all workers were pushing; None before that."""
        return self.steady_sum / self.steady_pushes if self.steady_pushes else None

    def quantile(self, q: float) -> int | None:
        """Smallest value that at least the share q of pushes did not exceed; None if empty."""
        total = sum(self.counts.values())
        if not total:
            return None
        seen = 0
        for value in sorted(self.counts):
            seen += self.counts[value]
            if seen >= q * total:
                return value
        return max(self.counts)

    @property
    def maximum(self) -> int | None:
        return max(self.counts, default=None)

    def summary(self) -> dict[str, int | None]:
        """p50, p95 and max, as JSON."""
        return {"p50": self.quantile(0.5), "p95": self.quantile(0.95), "max": self.maximum}

    def as_dict(self) -> dict[str, object]:
        """JSON form; `from_dict` reads it back."""
        return {
            "counts": [[value, self.counts[value]] for value in sorted(self.counts)],
            "steady_pushes": self.steady_pushes,
            "steady_sum": self.steady_sum,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "Staleness":
        counts = data["counts"]
        pushes, total = data["steady_pushes"], data["steady_sum"]
        assert isinstance(counts, list)
        assert isinstance(pushes, int)
        assert isinstance(total, int)
        return cls(Counter({int(v): int(n) for v, n in counts}), pushes, total)

    @classmethod
    def merged(cls, several: Iterable["Staleness"]) -> "Staleness":
        merged = cls()
        for one in several:
            merged.counts.update(one.counts)
            merged.steady_pushes += one.steady_pushes
            merged.steady_sum += one.steady_sum
        return merged
