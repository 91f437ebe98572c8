"""Schedule: the factor on the learning rate as a function of the samples applied to a part.

Samples, not steps or seconds: replicas of unequal speed then agree on where training stands.
Source of `step` and `poly`: Szegedy et al. 2014 section 6 and Caffe's solvers.
"""

import math
from dataclasses import dataclass, replace

KINDS = ("constant", "step", "poly", "cosine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A factor in [0, 1]; all lengths are counts of samples applied to the part."""

    kind: str = "constant"
    """`constant`, `step` (times `gamma` every `every` samples), `poly`, `cosine` (both end at
    `total`)."""
    every: int = 0
    """Of `step`: samples from one fall to the next."""
    epochs: float = 0.0
    """Of `step`: the same in epochs, instead of `every`."""
    gamma: float = 1.0
    """Of `step`: the factor at each fall."""
    total: int = 0
    """End of `poly` and `cosine`; 0 is the length of the run (constant rate if that is a time)."""
    power: float = 1.0
    """Of `poly`; 1 is a line to 0."""
    warmup: int = 0
    """Samples over which the factor first rises from 0 to 1, on top of any kind."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"schedule kind {self.kind!r} is none of {', '.join(KINDS)}")
        has_length = self.every >= 1 or self.epochs > 0
        if self.kind == "step" and not (has_length and 0 < self.gamma <= 1):
            raise ValueError(
                f"a step schedule needs every >= 1 or epochs > 0, and 0 < gamma <= 1, "
                f"got every={self.every}, epochs={self.epochs}, gamma={self.gamma}"
            )
        if self.every and self.epochs:
            raise ValueError("a schedule has `every` or `epochs`, not both")
        for name in ("power", "warmup", "total", "epochs"):
            if not 0 <= float(getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def of(self, num_samples: int) -> "Schedule":
        """With its lengths in samples; num_samples are in an epoch."""
        if not self.epochs:
            return self
        return replace(self, every=max(1, round(self.epochs * num_samples)), epochs=0.0)

    def factor(self, samples: int) -> float:
        """The factor for a push that meets a part with `samples` applied. Lengths are samples."""
        rise = 1.0 if samples >= self.warmup else (samples + 1) / (self.warmup + 1)
        if self.kind == "step":
            return rise * math.pow(self.gamma, samples // self.every)
        if self.kind == "poly":
            left = 1 - min(samples / self.total, 1.0)
            return rise * math.pow(left, self.power)
        if self.kind == "cosine":
            return rise * 0.5 * (1 + math.cos(math.pi * min(samples / self.total, 1.0)))
        return rise
