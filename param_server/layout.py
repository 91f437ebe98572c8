"""Layout: how the tensors of a model lie in one flat vector, and how that vector is cut into parts.

Knows names, shapes and offsets only; no values, no network. A part is a half-open range of the
vector and takes no notice of tensors: it may begin and end in the middle of one.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch.nn.parameter import UninitializedParameter

from distbelief.param_server.errors import RemoteProtocolError

# Part length: about a sixteenth of the model, so that up to 16 shards can share it, but never
# so long (1 MiB of float32) that its gradient leaves a core's own cache between the look for NaN
# and the update, nor so short that its header outweighs it.
PARTS_AIM = 16
PART_STEP = 64
PART_MAX = 2**18

FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Factors shared by some tensors, as one entry of `torch.optim`'s `param_groups`."""

    lr: float
    """Learning rate of the group before the schedule's factor; absolute, not a multiplier."""
    weight_decay: float = 0.0
    """Decay of the group: added to the gradient (L2), or decoupled, as the update rule says."""

    def __post_init__(self) -> None:
        # 1 and 1.0 are equal and must have equal digests; numpy's numbers have no JSON.
        object.__setattr__(self, "lr", float(self.lr))
        object.__setattr__(self, "weight_decay", float(self.weight_decay))
        if not 0 <= self.lr < float("inf"):
            raise ValueError(f"lr must be a finite number of at least 0, got {self.lr}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(
                f"weight_decay must be a finite number of at least 0, got {self.weight_decay}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of the model: `values[offset : offset + numel]` of the flat vector."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """What the replica computes in; the flat vector itself is always float32."""
    offset: int
    group: int = 0

    @property
    def numel(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size

    @property
    def stop(self) -> int:
        return self.offset + self.numel


@dataclass(frozen=True, slots=True)
class PartRange:
    """A part's half-open range [start, stop) of the flat vector."""

    index: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Run:
    """Half-open range of a part, counted from the part's start, that lies in one tensor."""

    start: int
    stop: int
    group: int


@dataclass(frozen=True)
class Layout:
    """Ordered tensors and their groups. Equal layouts have equal digests."""

    entries: tuple[Entry, ...]
    groups: tuple[Group, ...] = (Group(lr=0.0),)
    part_max: int = field(default=PART_MAX)
    """Longest part in elements. Part of the digest: both sides must cut alike."""

    def __post_init__(self) -> None:
        if not self.entries or self.total == 0:
            raise ValueError("the model has no trainable parameter: nothing to train")
        offset = 0
        for entry in self.entries:
            if entry.offset != offset:
                raise ValueError(f"{entry.name} begins at {entry.offset}, expected {offset}")
            if not 0 <= entry.group < len(self.groups):
                raise ValueError(f"{entry.name} names group {entry.group} of {len(self.groups)}")
            offset = entry.stop
        if self.part_max < PART_STEP or self.part_max % PART_STEP:
            raise ValueError(f"part_max must be a multiple of {PART_STEP}, got {self.part_max}")

    @property
    def total(self) -> int:
        """Number of elements of the flat vector."""
        return self.entries[-1].stop if self.entries else 0

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, shapes, dtypes, groups and part length, in hex."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    @cached_property
    def part_numel(self) -> int:
        """Length of every part but the last, in elements."""
        aim = -(-self.total // PARTS_AIM)
        return min(max(-(-aim // PART_STEP) * PART_STEP, PART_STEP), self.part_max)

    @cached_property
    def parts(self) -> tuple[PartRange, ...]:
        """The parts in order; they cover the vector without gap or overlap."""
        starts = range(0, self.total, self.part_numel)
        return tuple(
            PartRange(index, start, min(start + self.part_numel, self.total))
            for index, start in enumerate(starts)
        )

    @cached_property
    def _runs(self) -> tuple[tuple[Run, ...], ...]:
        runs: list[list[Run]] = [[] for _ in self.parts]
        for entry in self.entries:
            if entry.numel == 0:
                continue
            first, last = entry.offset // self.part_numel, (entry.stop - 1) // self.part_numel
            for part in self.parts[first : last + 1]:
                start = max(entry.offset, part.start) - part.start
                stop = min(entry.stop, part.stop) - part.start
                runs[part.index].append(Run(start, stop, entry.group))
        return tuple(tuple(of_part) for of_part in runs)

    def runs(self, part: int) -> tuple[Run, ...]:
        """One run for each tensor that has elements in the part, in order.

        Bit i of a push's absent mask speaks of run i (see `absent_mask`).
        """
        return self._runs[part]

    def absent_masks(self, absent: Iterable[str]) -> tuple[bytes, ...]:
        """For each part the bit mask of its runs whose tensor has no gradient in this step.

        Bit i (least significant first) stands for `runs(part)[i]`; an empty mask says that all
        are present. Source: torch leaves a parameter whose `.grad` is None as it is.
        """
        names = set(absent)
        if not names:
            return (b"",) * len(self.parts)
        bits = [0] * len(self.parts)
        seen = [0] * len(self.parts)
        for entry in self.entries:
            if entry.numel == 0:
                continue
            first, last = entry.offset // self.part_numel, (entry.stop - 1) // self.part_numel
            for part in range(first, last + 1):
                if entry.name in names:
                    bits[part] |= 1 << seen[part]
                seen[part] += 1
        return tuple(
            [
                mask.to_bytes(-(-count // 8), "little") if mask else b""
                for mask, count in zip(bits, seen, strict=True)
            ]
        )

    def present_runs(self, part: int, absent: bytes) -> tuple[Run, ...]:
        """The runs to update: neighbours of one group joined, those of the mask left out.

        Raises: RemoteProtocolError if the mask does not fit the part.
        """
        runs = self.runs(part)
        if absent and len(absent) != -(-len(runs) // 8):
            raise RemoteProtocolError(
                f"absent mask of part {part} has {len(absent)} bytes for {len(runs)} tensors"
            )
        mask = int.from_bytes(absent, "little")
        if mask >> len(runs):
            raise RemoteProtocolError(f"absent mask of part {part} names tensors it has not")
        joined: list[Run] = []
        for i, run in enumerate(runs):
            if mask >> i & 1:
                continue
            if joined and joined[-1].stop == run.start and joined[-1].group == run.group:
                joined[-1] = Run(joined[-1].start, run.stop, run.group)
            else:
                joined.append(run)
        return tuple(joined)

    def name_at(self, index: int) -> str:
        """The tensor that holds element `index` of the flat vector, with the index inside it."""
        for entry in self.entries:
            if entry.offset <= index < entry.stop:
                return f"{entry.name}[{index - entry.offset}]"
        raise ValueError(f"element {index} of a vector of {self.total}")

    def first_tensor_difference(self, other: "Layout") -> str | None:
        """As `first_difference`, of names, shapes, types and places alone."""
        for mine, theirs in zip(self.entries, other.entries, strict=False):
            if mine != replace(theirs, group=mine.group):
                return f"{_describe(mine, self)} here, {_describe(theirs, other)} there"
        if len(self.entries) != len(other.entries):
            longer, where = (
                (self, "here") if len(self.entries) > len(other.entries) else (other, "there")
            )
            extra = longer.entries[min(len(self.entries), len(other.entries))]
            return f"{_describe(extra, longer)} only {where}"
        if self.part_max != other.part_max:
            return f"part_max {self.part_max} here, {other.part_max} there"
        return None

    def first_difference(self, other: "Layout") -> str | None:
        """Say in words where `other` first differs from this layout; None if it does not."""
        tensors = self.first_tensor_difference(other)
        if tensors is not None:
            return tensors
        for mine, theirs in zip(self.entries, other.entries, strict=True):
            if mine.group != theirs.group:
                return f"{_describe(mine, self)} here, {_describe(theirs, other)} there"
        if self.groups != other.groups:
            return f"groups {self.groups} here, {other.groups} there"
        return None

    def as_dict(self) -> dict[str, Any]:  # Any: JSON
        """JSON form; `from_dict` reads it back."""
        return {
            "entries": [[e.name, list(e.shape), e.dtype, e.group] for e in self.entries],
            "groups": [asdict(group) for group in self.groups],
            "part_max": self.part_max,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Layout":  # Any: JSON
        """Raises: ValueError, TypeError or KeyError where the data is not a layout."""
        entries: list[Entry] = []
        offset = 0
        for name, shape, dtype, group in data["entries"]:
            if type(name) is not str or dtype not in FLOATS or type(group) is not int:
                raise ValueError(f"not a layout entry: {name!r}, {dtype!r}, group {group!r}")
            if not all(type(length) is int and length >= 0 for length in shape):
                raise ValueError(f"{name} has shape {shape!r}")
            entry = Entry(name=name, shape=tuple(shape), dtype=dtype, offset=offset, group=group)
            entries.append(entry)
            offset = entry.stop
        groups = tuple(Group(**group) for group in data["groups"])
        if type(data["part_max"]) is not int:
            raise ValueError(f"part_max must be a whole number, got {data['part_max']!r}")
        return cls(tuple(entries), groups, data["part_max"])


def trainable(
    named: Iterable[tuple[str, torch.nn.Parameter]],
) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that a layout holds: tied ones once, under their first name; no frozen ones.

    Raises: ValueError naming the parameter if it is lazy, sparse, complex or of integers, or if
    it shares its memory with another Parameter.
    """
    kept: list[tuple[str, torch.nn.Parameter]] = []
    seen: set[int] = set()
    owner: dict[int, str] = {}
    for name, parameter in named:
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"parameter {name} is lazy: its shape is not known yet. "
                "Run one forward pass in the model factory before returning the model"
            )
        if parameter.layout is not torch.strided:
            raise ValueError(_unfit(name, parameter, "sparse"))
        if parameter.is_complex():
            raise ValueError(_unfit(name, parameter, "complex"))
        if _dtype_name(parameter.dtype) not in FLOATS:
            raise ValueError(_unfit(name, parameter, f"of {_dtype_name(parameter.dtype)}"))
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        if parameter.numel() and not parameter.is_meta:
            twin = owner.setdefault(parameter.data_ptr(), name)
            if twin != name:
                raise ValueError(
                    f"parameters {twin} and {name} share their memory but are two Parameters: "
                    "tie them by assigning one Parameter to both modules"
                )
        kept.append((name, parameter))
    return kept


def layout_of(
    named: Sequence[tuple[str, torch.nn.Parameter]],
    groups: Sequence[Group],
    group_of: Mapping[str, int] | None = None,
    part_max: int = PART_MAX,
) -> Layout:
    """Lay out parameters in the order given.

    named: as `trainable` returns. group_of: name -> index in `groups`, 0 where it is silent.
    """
    entries: list[Entry] = []
    offset = 0
    for name, parameter in named:
        entry = Entry(
            name=name,
            shape=tuple(parameter.shape),
            dtype=_dtype_name(parameter.dtype),
            offset=offset,
            group=(group_of or {}).get(name, 0),
        )
        entries.append(entry)
        offset = entry.stop
    return Layout(tuple(entries), tuple(groups), part_max)


def _unfit(name: str, parameter: torch.Tensor, kind: str) -> str:
    return (
        f"parameter {name} {list(parameter.shape)} is {kind}: a part is a range of one float32 "
        "vector, so only dense float parameters can be trained. Register it as a buffer, or "
        "hold it as a real tensor"
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(entry: Entry, layout: Layout) -> str:
    group = layout.groups[entry.group]
    return (
        f"{entry.name} {list(entry.shape)} {entry.dtype} at {entry.offset} "
        f"(lr {group.lr}, weight_decay {group.weight_decay})"
    )
