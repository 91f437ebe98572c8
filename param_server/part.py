"""Part: the atom of the parameter server: a range of the flat vector with all that belongs to it.

Values, update-rule state, version, samples applied, and the table of who pushed what. Copy on
pin: what a reader has pinned never changes under it. A push updates in place unless somebody
holds the tensor; then the new values go into another one from the pool, and the held one comes
back to the pool when it is let go. So there are no torn reads and no stop for a snapshot.
Knows no messages, sockets, threads or clocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distbelief.param_server.contract import Contract
from distbelief.param_server.layout import PartRange, Run

VALUES = "values"

REFUSED_KEPT = 64
"""Refused seqs remembered per worker: no more pushes than this are ever on the way at once."""


@dataclass(frozen=True, slots=True)
class Applied:
    """One row of a part's table: how far a worker's pushes have come.

    A refused push consumes its seq without raising the version; `refused` keeps the latest
    of those, so that staleness can leave out exactly the worker's own applied pushes.
    """

    inc: int
    seq: int = 0
    crc: int = 0
    refused: tuple[int, ...] = ()

    def own_since(self, seq: int) -> int:
        """Pushes of this worker that raised the version after its push `seq`."""
        return max(0, self.seq - seq - sum(r > seq for r in self.refused))

    def after(self, seq: int, crc: int, *, is_applied: bool) -> "Applied":
        refused = self.refused if is_applied else (*self.refused, seq)[-REFUSED_KEPT:]
        return Applied(self.inc, seq, crc, refused)


@dataclass(slots=True)
class Cell:
    """A tensor and how many readers hold it."""

    tensor: Tensor
    pins: int = 0


@dataclass(slots=True)
class Pin:
    """Cells held by one reader. Release it once, in the thread that owns the part."""

    part: "Part"
    cells: dict[str, Cell]
    is_held: bool = True

    def __getitem__(self, name: str) -> Tensor:
        return self.cells[name].tensor

    def release(self) -> None:
        if self.is_held:
            self.is_held = False
            for name, cell in self.cells.items():
                self.part._release(name, cell)


@dataclass(slots=True)
class Part:
    """See the top of this file. All tensors are 1-D float32 of length range.numel."""

    range: PartRange
    contract: Contract
    version: int = 0
    """Pushes applied."""
    samples: int = 0
    """Samples applied; the schedule's argument."""
    table: dict[str, Applied] = field(default_factory=dict)
    durable: dict[str, Applied] = field(default_factory=dict)
    """The table as the newest snapshot on disk holds it."""
    is_ready: bool = False
    _cells: dict[str, Cell] = field(default_factory=dict)
    _pool: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in (VALUES, *self.contract.rule.slots):
            self._cells[name] = Cell(torch.zeros(self.range.numel))

    @property
    def values(self) -> Tensor:
        """The current values. Read them at once, or hold them with `pin`."""
        return self._cells[VALUES].tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Values and rule state by name."""
        return {name: cell.tensor for name, cell in self._cells.items()}

    def load_(self, tensors: dict[str, Tensor]) -> None:
        """Copy values, and whatever state is given, in; the part is ready then."""
        for name, tensor in tensors.items():
            self._writable(name).copy_(tensor)
        self.is_ready = True

    def pin(self, names: Sequence[str] = (VALUES,)) -> Pin:
        """Hold the current tensors of these names until the pin is released."""
        cells = {name: self._cells[name] for name in names}
        for cell in cells.values():
            cell.pins += 1
        return Pin(self, cells)

    def apply_(self, grad: Tensor, samples: int, absent: bytes = b"", norm: float = 0.0) -> None:
        """Apply one gradient by the contract's rule and raise the version.

        grad: 1-D float32 [range.numel], read only, finite. norm: its Euclidean norm; used only
        if the contract clips parts. absent: mask of `Layout.absent_masks`; those tensors and
        their state stay as they are.
        Raises: RemoteProtocolError if the mask does not fit; nothing is changed then.
        """
        runs = self.contract.layout.present_runs(self.range.index, absent)
        limit = self.contract.clip_part_norm
        if limit and norm > limit:
            grad = grad * (limit / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        if runs:
            state = {name: self._writable(name) for name in self._cells}
            values = state.pop(VALUES)
            factor = self.contract.schedule.factor(self.samples)
            for run in runs:
                self._apply_run(run, values, grad, state, factor)
        self.version += 1
        self.samples += samples

    def _apply_run(
        self, run: Run, values: Tensor, grad: Tensor, state: dict[str, Tensor], factor: float
    ) -> None:
        group = self.contract.layout.groups[run.group]
        self.contract.rule.apply_(
            values[run.start : run.stop],
            grad[run.start : run.stop],
            {name: tensor[run.start : run.stop] for name, tensor in state.items()},
            lr=group.lr * factor,
            weight_decay=group.weight_decay,
            step=self.version,
        )

    def _writable(self, name: str) -> Tensor:
        """The tensor to change: the current one, or a copy of it if a reader holds that."""
        cell = self._cells[name]
        if cell.pins:
            # Reused memory: copying into fresh pages runs at 1 GB/s, slower than the network.
            fresh = self._pool.pop() if self._pool else torch.empty(self.range.numel)
            fresh.copy_(cell.tensor)
            self._cells[name] = cell = Cell(fresh)
        return cell.tensor

    def _release(self, name: str, cell: Cell) -> None:
        cell.pins -= 1
        assert cell.pins >= 0, "pin released twice"
        if not cell.pins and self._cells[name] is not cell:
            self._pool.append(cell.tensor)
