"""Pace: loss and speed of the newest steps, and how far a run is, for a person to look at. Pure."""

from collections import deque
from dataclasses import dataclass, field

from distbelief.param_server.staleness import Staleness

LOSSES_MAX = 10_000
"""Samples whose mean loss is shown while the length of an epoch is not known."""
RATE_WINDOW_S = 5.0
"""The live rate is of the last so many seconds."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the run is."""

    samples: int
    total_samples: int | None
    updates: int
    """Smallest version of a part that a worker has heard of."""
    loss: float | None
    samples_per_s: float
    staleness: Staleness
    eta_s: float | None
    num_workers: int
    refused: int


@dataclass(slots=True)
class Pace:
    """See the top of this file."""

    began_at: float | None = None
    """When the first worker had fetched its parameters."""
    last_step_at: float | None = None
    _losses: deque[tuple[float, int]] = field(default_factory=deque)
    """(mean loss, samples) of steps."""
    _num_losses: int = 0
    _times: deque[tuple[float, int]] = field(default_factory=deque)
    """(when, samples) of steps."""

    def begin(self, now: float) -> None:
        if self.began_at is None:
            self.began_at = now

    def step(self, samples: int, loss: float | None, epoch_samples: int, now: float) -> None:
        """A worker has done a step. loss: None where it is not told."""
        self.last_step_at = now
        if not samples:
            return
        self.begin(now)
        self._times.append((now, samples))
        self._forget(now)
        if loss is not None:
            self._losses.append((loss, samples))
            self._num_losses += samples
            while self._num_losses - self._losses[0][1] >= (epoch_samples or LOSSES_MAX):
                self._num_losses -= self._losses.popleft()[1]

    @property
    def train_s(self) -> float:
        """Seconds from the first fetch to the last step heard of."""
        if self.began_at is None or self.last_step_at is None:
            return 0.0
        return self.last_step_at - self.began_at

    @property
    def mean_loss(self) -> float | None:
        """Mean loss over the newest samples, at most an epoch of them."""
        total = sum(n for _, n in self._losses)
        return sum(loss * n for loss, n in self._losses) / total if total else None

    def rate(self, now: float) -> float:
        """Samples a second."""
        self._forget(now)
        if self.began_at is None:
            return 0.0
        # Early in a run the window is not full yet: count from its beginning.
        seconds = min(RATE_WINDOW_S, now - self.began_at)
        return sum(n for _, n in self._times) / seconds if seconds > 0.5 else 0.0

    def _forget(self, now: float) -> None:
        """Here and not only where the rate is read: nobody reads it in the controller's process."""
        while self._times and now - self._times[0][0] > RATE_WINDOW_S:
            self._times.popleft()
