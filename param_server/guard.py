"""Guard: which gradients a shard refuses although they fit, and whom it has refused too often.

Norms are of a part. Pure: no socket, no clock.
"""

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

NORMS_KEPT = 256
"""Accepted norms of a part that the median is of."""
NORMS_LEAST = 32
"""Before there are so many, the median says nothing."""
MEDIAN_EVERY = 16
"""Accepted norms from one median to the next: sorting takes longer than a small update."""
CHECK_EVERY = 64
"""Pushes to a part from one look at its values to the next: finite gradients may overflow them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardConfig:
    """Pushes that are refused. NaN and Inf always are."""

    max_norm: float = 0.0
    """A part's gradient with a norm above this is refused; 0 refuses none."""
    norm_factor: float = 0.0
    """One above so many times the median of the part's last 256 is refused; 0 refuses none."""
    quarantine: int = 10
    """A worker whose pushes are refused so often in a row is ended, and started again as one that
    was lost; 0 lets it go on."""

    def __post_init__(self) -> None:
        for name in ("max_norm", "quarantine"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"guard.{name} must be at least 0, got {getattr(self, name)}")
        if self.norm_factor and not 1 < self.norm_factor < float("inf"):
            raise ValueError(f"guard.norm_factor must be 0 or above 1, got {self.norm_factor}")


@dataclass(slots=True)
class _Norms:
    """Of one part."""

    last: deque[float] = field(default_factory=lambda: deque(maxlen=NORMS_KEPT))
    num_since: int = 0
    median: float = 0.0


@dataclass(slots=True)
class _Row:
    """How often one incarnation of a worker was refused in a row."""

    inc: int
    seq: int
    in_a_row: int
    why: str


class Guard:
    """See the top of this file."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._norms: dict[int, _Norms] = {}
        self._rows: dict[str, _Row] = {}

    def limit(self, part: int) -> tuple[float, str]:
        """The largest norm that a part takes, and where that comes from; 0 for any."""
        found = (self.config.max_norm, "guard.max_norm") if self.config.max_norm else (0.0, "")
        norms = self._norms.get(part)
        if norms is None or len(norms.last) < NORMS_LEAST or not norms.median:
            return found
        usual = self.config.norm_factor * norms.median
        if found[0] and found[0] <= usual:
            return found
        return usual, f"{self.config.norm_factor:g} times the median {norms.median:.3g}"

    def take(self, part: int, norm: float) -> None:
        """A gradient of this norm was applied."""
        if not self.config.norm_factor:
            return
        norms = self._norms.setdefault(part, _Norms())
        norms.last.append(norm)
        norms.num_since += 1
        if norms.num_since >= MEDIAN_EVERY:
            norms.num_since = 0
            norms.median = statistics.median(norms.last)

    def refuse(self, w: str, inc: int, seq: int, why: str) -> None:
        """Part of a push was refused. A push of many parts counts once."""
        row = self._rows.get(w)
        if row is None or row.inc != inc or seq > row.seq + 1:
            self._rows[w] = _Row(inc, seq, 1, why)
        elif seq == row.seq + 1:
            row.seq, row.in_a_row, row.why = seq, row.in_a_row + 1, why

    def quarantined(self, w: str, inc: int) -> str:
        """Why an incarnation of a worker must end; empty if it may go on."""
        row, limit = self._rows.get(w), self.config.quarantine
        if not limit or row is None or row.inc != inc or row.in_a_row < limit:
            return ""
        return f"{w} was refused {row.in_a_row} pushes in a row, the last because {row.why}"

    @property
    def refusals(self) -> Mapping[str, int]:
        """How often each worker was refused in a row, when it was refused last."""
        return {w: row.in_a_row for w, row in self._rows.items()}
