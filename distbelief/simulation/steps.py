"""Steps: how long a worker computes for one step: always the same, drawn, or as was measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Steps:
    """A distribution of seconds."""

    mean_s: float
    noise: float = 0.0
    """Standard deviation as a share of the mean, of a lognormal distribution."""
    measured: tuple[float, ...] = ()
    """Drawn from, where there are some, instead."""

    def __post_init__(self) -> None:
        if not 0 < self.mean_s < math.inf:
            raise ValueError(f"a step must take some time, got {self.mean_s} s")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be at least 0, got {self.noise}")

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Steps":
        """As they were measured. Raises: ValueError if there are none, or some are no lengths."""
        if not seconds:
            raise ValueError("there are no lengths of steps")
        for one in seconds:
            if not 0 < one < math.inf:
                raise ValueError(f"{one} is no length of a step")
        return cls(sum(seconds) / len(seconds), measured=tuple(seconds))

    def draw(self, random: Random) -> float:
        """Seconds of one step."""
        if self.measured:
            return self.measured[int(random.random() * len(self.measured))]
        if not self.noise:
            return self.mean_s
        variance = math.log1p(self.noise**2)
        return self.mean_s * math.exp(random.gauss(-variance / 2, math.sqrt(variance)))
