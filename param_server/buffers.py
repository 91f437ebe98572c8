"""Buffers: what a model keeps beside its parameters (BatchNorm's statistics), and their merge.

Replicas each gather their own statistics. A shard keeps the newest contribution of each worker
and merges: floats by the mean weighted with samples, integers by the maximum. Neither paper has
batch normalisation; the rule is ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# A contribution counts until this many times the samples of all newest contributions have been
# merged since: a worker that died early must not hold old statistics in the mean for ever.
FORGET_AFTER = 4


@dataclass(frozen=True)
class BufferLayout:
    """Ordered (name, shape) of the float and of the integer buffers of a model.

    Bool and complex buffers are constants of the model's code and are left alone.
    """

    floats: tuple[tuple[str, tuple[int, ...]], ...] = ()
    integers: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @classmethod
    def of(cls, module: torch.nn.Module) -> "BufferLayout":
        """The persistent buffers of a module, each once, in the order of its state dict."""
        persistent = module.state_dict(keep_vars=True)
        floats: list[tuple[str, tuple[int, ...]]] = []
        integers: list[tuple[str, tuple[int, ...]]] = []
        for name, buffer in module.named_buffers():
            if name not in persistent or not buffer.numel():
                continue
            if buffer.is_floating_point():
                floats.append((name, tuple(buffer.shape)))
            elif not buffer.is_complex() and buffer.dtype != torch.bool:
                integers.append((name, tuple(buffer.shape)))
        return cls(tuple(floats), tuple(integers))

    @cached_property
    def num_floats(self) -> int:
        return sum(_numel(shape) for _, shape in self.floats)

    @cached_property
    def num_integers(self) -> int:
        return sum(_numel(shape) for _, shape in self.integers)

    def read(self, module: torch.nn.Module) -> tuple[Tensor, Tensor]:
        """Copy the module's buffers out: 1-D float32 [num_floats], 1-D int64 [num_integers]."""
        named = dict(module.named_buffers())
        floats = [named[name].detach().reshape(-1).float().cpu() for name, _ in self.floats]
        integers = [named[name].detach().reshape(-1).long().cpu() for name, _ in self.integers]
        return (
            torch.cat(floats) if floats else torch.empty(0),
            torch.cat(integers) if integers else torch.empty(0, dtype=torch.int64),
        )

    def no_buffers(self) -> tuple[Tensor, Tensor]:
        """What somebody sends who has no statistics to contribute, but wants the merged ones."""
        return torch.empty(0), torch.empty(0, dtype=torch.int64)

    def write_(self, module: torch.nn.Module, floats: Tensor, integers: Tensor) -> None:
        """Copy flat buffers, as `read` returns them, into the module."""
        buffers = dict(module.named_buffers())
        with torch.no_grad():
            for name, values in self.named(floats, integers).items():
                buffers[name].copy_(values)

    def named(self, floats: Tensor, integers: Tensor) -> dict[str, Tensor]:
        """Flat buffers, as `read` returns them, by name and in their shapes; views."""
        found: dict[str, Tensor] = {}
        for listed, flat in ((self.floats, floats), (self.integers, integers)):
            offset = 0
            for name, shape in listed:
                found[name] = flat[offset : offset + _numel(shape)].view(shape)
                offset += _numel(shape)
        return found

    def as_dict(self) -> dict[str, Any]:  # Any: JSON
        return {
            "floats": [[name, list(shape)] for name, shape in self.floats],
            "integers": [[name, list(shape)] for name, shape in self.integers],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "BufferLayout":  # Any: JSON
        """Raises: ValueError, TypeError or KeyError where the data is not a buffer layout."""
        for name, shape in (*data["floats"], *data["integers"]):
            if not all(type(length) is int and length >= 0 for length in shape):
                raise ValueError(f"buffer {name} has shape {shape!r}")
        return cls(
            tuple((str(name), tuple(shape)) for name, shape in data["floats"]),
            tuple((str(name), tuple(shape)) for name, shape in data["integers"]),
        )


@dataclass(frozen=True, slots=True)
class Contribution:
    """One worker's buffers and the samples it saw since its contribution before."""

    samples: int
    floats: Tensor
    integers: Tensor
    at: int
    """Samples merged by the shard up to and with this contribution: its age, without a clock."""


class BufferMerge:
    """The newest contribution of each worker, and their merge. No I/O."""

    def __init__(self, contributions: Mapping[str, Contribution] | None = None) -> None:
        self.contributions = dict(contributions or {})
        self.samples = max((c.at for c in self.contributions.values()), default=0)

    def add(self, worker: str, samples: int, floats: Tensor, integers: Tensor) -> None:
        """Take a worker's buffers (copied) in place of its former ones, and forget the outdated."""
        self.samples += samples
        self.contributions[worker] = Contribution(
            samples, floats.clone(), integers.clone(), self.samples
        )
        horizon = FORGET_AFTER * sum(c.samples for c in self.contributions.values())
        self.contributions = {
            name: c for name, c in self.contributions.items() if self.samples - c.at <= horizon
        }

    def merged(self) -> tuple[Tensor, Tensor] | None:
        """Floats by the mean weighted with samples, integers by the maximum; None without any.

        With one worker these are its own values to the bit.
        """
        newest = list(self.contributions.values())
        if not newest:
            return None
        if len(newest) == 1:
            return newest[0].floats, newest[0].integers
        total = sum(c.samples for c in newest)
        floats = torch.zeros_like(newest[0].floats)
        for c in newest:
            floats.add_(c.floats, alpha=c.samples / total if total else 1 / len(newest))
        integers = torch.stack([c.integers for c in newest]).amax(dim=0)
        return floats, integers


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for length in shape:
        numel *= length
    return numel
