"""Contract: all that workers and shards of one job must agree on before a gradient moves.

The first worker brings it, the shards keep it (and save it with their parts), and everybody who
connects later is held against it by its digest.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from distbelief.param_server.average import Average
from distbelief.param_server.buffers import BufferLayout
from distbelief.param_server.errors import RemoteProtocolError
from distbelief.param_server.layout import Layout
from distbelief.param_server.schedule import Schedule
from distbelief.param_server.update import SGD, Rule, rule_as_dict, rule_from_dict


@dataclass(frozen=True)
class Contract:
    """Layout with its groups, buffers, update rule, schedule, average, clipping done by shards."""

    layout: Layout
    rule: Rule = field(default_factory=SGD)
    schedule: Schedule = field(default_factory=Schedule)
    clip_part_norm: float = 0.0
    """A part's gradient is scaled down to this norm by its shard; 0 switches it off."""
    buffers: BufferLayout = field(default_factory=BufferLayout)
    average: Average = field(default_factory=Average)

    def __post_init__(self) -> None:
        if self.schedule.kind in ("poly", "cosine") and self.schedule.total < 1:
            raise ValueError(f"a {self.schedule.kind} schedule needs its total, in samples")
        if not 0 <= self.clip_part_norm < float("inf"):
            raise ValueError(f"clip_part_norm must be at least 0, got {self.clip_part_norm}")

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the tensors that a part has beside its values."""
        return (*self.rule.slots, *self.average.slots)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the JSON form, in hex."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        """Canonical: equal contracts give equal bytes."""
        return json.dumps(
            {
                "layout": self.layout.as_dict(),
                "rule": rule_as_dict(self.rule),
                "schedule": asdict(self.schedule),
                "clip_part_norm": self.clip_part_norm,
                "buffers": self.buffers.as_dict(),
                "average": asdict(self.average),
            },
            sort_keys=True,
            separators=(",", ":"),
        ).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "Contract":
        """Raises: RemoteProtocolError if the text is not a contract."""
        try:
            data: Mapping[str, Any] = json.loads(text)  # Any: JSON
            return cls(
                layout=Layout.from_dict(data["layout"]),
                rule=rule_from_dict(data["rule"]),
                schedule=Schedule(**data["schedule"]),
                clip_part_norm=float(data["clip_part_norm"]),
                buffers=BufferLayout.from_dict(data["buffers"]),
                average=Average(**data.get("average", {})),  # older snapshots have none
            )
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise RemoteProtocolError(f"not a contract: {error!r}") from error

    def first_difference(self, other: "Contract") -> str | None:
        """Say in words where `other` first differs; tensors come before everything else."""
        tensors = self.layout.first_difference(other.layout)
        if tensors is not None:
            return tensors
        for mine, theirs in (
            (self.buffers, other.buffers),
            (self.rule, other.rule),
            (self.schedule, other.schedule),
            (self.average, other.average),
        ):
            if mine != theirs:
                return f"{mine} here, {theirs} there"
        if self.clip_part_norm != other.clip_part_norm:
            return f"clip_part_norm {self.clip_part_norm} here, {other.clip_part_norm} there"
        return None
