"""Window: how far a crew came between two looks at it, and what that cost.

A worker's rate is its rounds between the ends of the last rounds at the two looks, not by the
driver's clock: so slow systems are not rounded to whole rounds in a window.
"""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distbelief.bench.crew import Crew
from distbelief.bench.machine import Busy, Use, busy

GB = 1e9


@dataclass(frozen=True, slots=True)
class Look:
    """What is known of a crew at one moment."""

    at_s: float
    progress: tuple[tuple[int, int], ...]
    """Of each worker: rounds, and when the last of them ended in monotonic ns."""
    use: Use
    busy: Busy


@dataclass(frozen=True, slots=True)
class Window:
    """Between two looks."""

    seconds: float
    rates: tuple[float, ...]
    """Rounds a second of each worker."""
    rounds: int
    """Finished by all of them."""
    cpu_s: float
    """Of all the crew's processes."""
    faults: int
    other_cpu: float
    """Share of the machine that others took, and the hypervisor: 0 is a clean window."""

    @property
    def rounds_per_s(self) -> float:
        return sum(self.rates)

    @property
    def faults_per_round(self) -> float:
        return self.faults / self.rounds if self.rounds else 0.0

    def gb_per_s(self, round_bytes: int) -> float:
        return self.rounds_per_s * round_bytes / GB

    def cpu_s_per_gb(self, round_bytes: int) -> float:
        return self.cpu_s / (self.rounds * round_bytes / GB) if self.rounds else 0.0


def look(crew: Crew) -> Look:
    """Look at a crew."""
    return Look(
        at_s=time.monotonic(),
        progress=tuple(seat.progress for seat in crew.taken),
        use=crew.use(),
        busy=busy(),
    )


def between(first: Look, last: Look, num_cpus: int) -> Window:
    """What lies between two looks at one crew."""
    rates, rounds = [], 0
    for (rounds0, ended0), (rounds1, ended1) in zip(first.progress, last.progress, strict=True):
        rounds += rounds1 - rounds0
        took_s = (ended1 - ended0) / 1e9
        rates.append((rounds1 - rounds0) / took_s if took_s > 0 else 0.0)
    seconds = last.at_s - first.at_s
    used = last.use - first.use
    others_s = last.busy.cpu_s - first.busy.cpu_s - used.cpu_s
    others_s = max(0.0, others_s) + last.busy.stolen_s - first.busy.stolen_s
    other_cpu = others_s / (num_cpus * seconds)
    return Window(seconds, tuple(rates), rounds, used.cpu_s, used.faults, other_cpu)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of some figures."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1], len(found))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread | None:
    """Ours to theirs, each to its neighbour in time; None where nothing can be compared."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=True) if b > 0]
    return Spread.of(pairs) if pairs else None
