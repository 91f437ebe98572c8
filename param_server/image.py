"""Image: all of a shard at one moment, held still for whoever writes it down. No I/O."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from distbelief.param_server.buffers import Contribution
from distbelief.param_server.contract import Contract
from distbelief.param_server.part import Applied, Owed, Pin
from distbelief.param_server.staleness import Staleness


@dataclass(frozen=True)
class PartImage:
    """A part as it stood when the image was taken."""

    index: int
    version: int
    samples: int
    table: Mapping[str, Applied]
    tensors: Mapping[str, Tensor]
    owed: Mapping[str, Owed] = field(default_factory=dict)
    lost: int = 0
    averaged: int = 0


@dataclass(frozen=True)
class ShardImage:
    """All of a shard at one moment, for a snapshot. Tensors are pinned until `release`."""

    run: str
    index: int
    num_shards: int
    epoch: int
    contract: Contract
    parts: tuple[PartImage, ...]
    staleness: Staleness
    buffers: Mapping[str, Contribution]
    incarnations: Mapping[str, int]
    pins: tuple[Pin, ...] = ()

    @property
    def version(self) -> int:
        """Version of the part that is furthest behind."""
        return min(part.version for part in self.parts)

    def bare(self) -> "ShardImage":
        """What it says of the parts, without their values."""
        parts = tuple([replace(part, tensors={}) for part in self.parts])
        return replace(self, parts=parts, buffers={}, pins=())

    def release(self) -> None:
        for pin in self.pins:
            pin.release()
