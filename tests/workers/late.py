"""A device that is not there: a staging whose copies end at the last moment allowed.

What a copy is to fill holds NaN from its beginning until it has been waited for, and what it reads
is read only then. So a wait that is missing, and a vector that is written to too early, show in
the numbers.
"""

import math
import threading

import torch
from torch import Tensor

from distbelief.workers.staging import Mark, Ready


class Late:
    """See the top of this file; what the methods promise is in `Staging`."""

    is_in_place = False

    def __init__(self) -> None:
        """Made by the thread that trains, which must never wait for the device."""
        self._trainer = threading.current_thread()
        self._marks = 0
        self._readings: list[LateReading] = []
        self.vectors: list[Tensor] = []
        self.is_closed = False

    def vector(self, numel: int) -> Tensor:
        self.vectors.append(torch.zeros(numel))
        return self.vectors[-1]

    def pin(self, host: Tensor) -> None:
        pass

    def stream(self) -> None:
        return None

    def mark(self, streams=()) -> Mark:
        self._marks += 1
        return (self._marks,)  # type: ignore[return-value]  # only a Staging looks into a mark

    def copy_out(self, source: Tensor, host: Tensor, after: Mark) -> Ready:
        return LateCopy(self, source, host, after)

    def copy_in(self, host: Tensor, target: Tensor, after: Mark) -> Ready:
        return LateCopy(self, host, target, after)

    def hold(self, ready: Ready) -> None:
        assert isinstance(ready, LateCopy)
        ready.end()

    def read(self, scalar: Tensor) -> "LateReading":
        reading = LateReading(self, scalar, self._marks)
        self._readings.append(reading)
        return reading

    def fingerprint(self, vector: Tensor) -> "LateReading":
        return self.read(vector.view(torch.int32).sum())

    def close(self) -> None:
        self.is_closed = True

    def come_to(self, mark: int) -> None:
        """The device has computed what was called for before a mark."""
        for reading in self._readings:
            reading.is_there = reading.is_there or reading.mark < mark
        self._readings = [reading for reading in self._readings if not reading.is_there]

    def refuse_trainer(self) -> None:
        assert threading.current_thread() is not self._trainer, "the training thread waits"


class LateCopy:
    def __init__(self, staging: Late, source: Tensor, into: Tensor, after: Mark) -> None:
        assert after, "a copy that waits for nothing"
        assert source.data_ptr() != into.data_ptr()
        self._staging = staging
        self._source = source
        self._into = into
        self._after: int = after[-1]  # type: ignore[assignment]  # of Late.mark
        self._has_ended = False
        into.fill_(math.nan)

    def wait(self) -> None:
        if not self._has_ended:
            self._staging.refuse_trainer()
            self.end()
            self._staging.come_to(self._after)

    def end(self) -> None:
        if not self._has_ended:
            self._has_ended = True
            with torch.no_grad():
                self._into.copy_(self._source)


class LateReading:
    def __init__(self, staging: Late, scalar: Tensor, mark: int) -> None:
        self._staging = staging
        self.mark = mark
        self._scalar = scalar.detach().clone()
        self.is_there = False

    @property
    def value(self) -> float:
        if not self.is_there:
            self._staging.refuse_trainer()
        return self._scalar.item()
