"""Average: of a part's values over its updates, for the model that is used in the end.

mean    of the values after each update from `start` on (Polyak and Juditsky 1992)
ema     the exponential form: each update's values enter with 1 - decay; the first ones with more,
        so that it begins as their mean and not as the first values

Szegedy et al. 2014 section 6 names Polyak averaging and no more; which form, from when and how
often is ours. Like the rule's state it needs nothing of other parts.
"""

import math
from dataclasses import dataclass

from torch import Tensor

KINDS = ("none", "mean", "ema")
SLOT = "average"
"""Name of the tensor beside the rule's state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """How a part's values are averaged."""

    kind: str = "none"
    """`none`, `mean` (of all updates from `start` on) or `ema` (exponential)."""
    start: int = 0
    """Samples applied before the first value that counts."""
    tail: float = 0.0
    """Of `mean`: instead of `start`, the share of the run at its end that counts."""
    decay: float = 0.999
    """Of `ema`: what stays of the average at each update."""
    every: int = 1
    """Only each so-manieth update enters; it costs a pass over the values."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"average kind {self.kind!r} is none of {', '.join(KINDS)}")
        if not 0 <= self.start < 2**53 or self.every < 1:
            raise ValueError(
                f"an average needs start >= 0 and every >= 1, got start={self.start}, "
                f"every={self.every}"
            )
        if not 0 <= float(self.tail) <= 1:
            raise ValueError(f"the tail of an average is a share, from 0 to 1, got {self.tail}")
        if not 0 <= float(self.decay) < 1:
            raise ValueError(f"the decay of an average must be in [0, 1), got {self.decay}")

    @property
    def slots(self) -> tuple[str, ...]:
        return () if self.kind == "none" else (SLOT,)

    def takes(self, version: int, samples: int) -> bool:
        """Whether the values after an update enter. version, samples: of the part after it."""
        return self.kind != "none" and samples > self.start and version % self.every == 0

    def weight(self, count: int) -> float:
        """Of the values that enter, where `count` have entered before."""
        if self.kind == "ema":
            return max(1 - math.pow(self.decay, self.every), 1 / (count + 1))
        return 1 / (count + 1)

    def take_(self, average: Tensor, values: Tensor, count: int) -> None:
        """Let values enter, in place. Both 1-D float32 of one length."""
        if count:
            average.lerp_(values, self.weight(count))
        else:
            average.copy_(values)
