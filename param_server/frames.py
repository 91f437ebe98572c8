"""Frames: compressed values of a reply, in memory that is used again. No I/O."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distbelief.param_server.compress import Scratch, encode_, frame_bytes


@dataclass(slots=True)
class Loan:
    """A frame that a reply points to. Release it when that has been sent."""

    frame: Tensor
    home: list[Tensor]

    def release(self) -> None:
        self.home.append(self.frame)


class Frames:
    """Writes values as frames of compress.py. Used by one thread."""

    def __init__(self, numel_max: int) -> None:
        """numel_max: of the longest part."""
        self._numel_max = numel_max
        self._scratch: Scratch | None = None
        self._free: dict[int, list[Tensor]] = {}

    def write(self, form: str, values: Tensor) -> Loan:
        """values: 1-D float32, read only."""
        self._scratch = self._scratch or Scratch(self._numel_max)
        size = frame_bytes(form, values.numel())
        free = self._free.setdefault(size, [])
        frame = free.pop() if free else torch.empty(size, dtype=torch.uint8)
        encode_(form, values, frame, self._scratch)
        return Loan(frame, free)
