"""Partition: which shard hosts which part. A pure function of (layout, number of shards)."""

from dataclasses import dataclass

from distbelief.param_server.layout import Layout, PartRange

PARTS_MAX = 1024
"""Parts of one shard: a welcome tells the versions of all of them in one header."""


@dataclass(frozen=True, slots=True)
class Partition:
    """Total and disjoint: every part has exactly one shard; shards hold neighbouring parts."""

    layout: Layout
    num_shards: int

    def __post_init__(self) -> None:
        if self.num_shards < 1:
            raise ValueError(f"a job needs at least 1 shard, got {self.num_shards}")
        # Not by way of `layout.parts`: what a peer says of its layout is not allocated first.
        parts = -(-self.layout.total // self.layout.part_numel)
        if parts > PARTS_MAX * self.num_shards:
            raise ValueError(
                f"{parts} parts of {self.layout.part_numel} on {self.num_shards} shards: a shard "
                f"hosts at most {PARTS_MAX}. Use more shards or longer parts (part_max)"
            )
        if self.num_shards > parts:
            raise ValueError(
                f"{self.num_shards} shards for a model of {self.layout.total} parameters, which "
                f"has {parts} parts of {self.layout.part_numel}: use at most {parts} shards"
            )

    def shard_of(self, part: int) -> int:
        """The shard that hosts a part."""
        return part * self.num_shards // len(self.layout.parts)

    def parts_of(self, shard: int) -> tuple[PartRange, ...]:
        """The parts of a shard, in order."""
        return tuple(p for p in self.layout.parts if self.shard_of(p.index) == shard)
