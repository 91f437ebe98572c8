"""Part: the atom of the parameter server: a range of the flat vector with all that belongs to it.

Values, update-rule state, version, samples applied, and the table of who pushed what. Copy on
pin: what a reader has pinned never changes under it. A push updates in place unless somebody
holds the tensor; then the new values go into another one from the pool, and the held one comes
back to the pool when it is let go. So there are no torn reads and no stop for a snapshot.
Knows no messages, sockets, threads or clocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from distbelief.param_server.average import SLOT
from distbelief.param_server.contract import Contract
from distbelief.param_server.layout import PartRange, Run

VALUES = "values"

REFUSED_KEPT = 64
"""Refused seqs remembered per worker: no more pushes than this are ever on the way at once."""


class Home(Protocol):
    """Where tensors of parts live, and where their readers see what happens to them: slab.py."""

    def take(self, part: PartRange) -> Tensor:
        """1-D float32 [part.numel] of any content; the part's until it is given back."""
        ...

    def give_back(self, part: PartRange, buffer: Tensor) -> None: ...

    def row(self, part: PartRange) -> memoryview:
        """Three int64 of the part: word, place of its values, samples; see slab.py."""
        ...

    def place(self, buffer: Tensor) -> int:
        """Where readers find a buffer, for the row."""
        ...


class Heap:
    """Ordinary memory, used again: copying into fresh pages runs at 1 GB/s."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = {}

    def take(self, part: PartRange) -> Tensor:
        free = self._free.get(part.numel)
        return free.pop() if free else torch.zeros(part.numel)

    def give_back(self, part: PartRange, buffer: Tensor) -> None:
        self._free.setdefault(part.numel, []).append(buffer)

    def row(self, part: PartRange) -> memoryview:
        return memoryview(bytearray(24)).cast("q")

    def place(self, buffer: Tensor) -> int:
        return -1


class Scratch:
    """One tensor that is overwritten again and again, as long as the longest part."""

    def __init__(self) -> None:
        self._tensor = torch.empty(0)

    def of(self, numel: int) -> Tensor:
        """1-D float32 [numel] of any content, until the next call."""
        if self._tensor.numel() < numel:
            self._tensor = torch.empty(numel)
        return self._tensor[:numel]


class Applied(NamedTuple):
    """One row of a part's table: how far a worker's pushes have come.

    A refused push consumes its seq without raising the version; `refused` keeps the latest
    of those, so that staleness can leave out exactly the worker's own applied pushes.
    """

    inc: int
    seq: int = 0
    crc: int = 0
    refused: tuple[int, ...] = ()
    samples: int = 0
    """Of its pushes so far, applied or refused."""
    refused_samples: int = 0

    def own_since(self, seq: int) -> int:
        """Pushes of this worker that raised the version after its push `seq`."""
        if not self.refused:
            return max(0, self.seq - seq)
        return max(0, self.seq - seq - sum(r > seq for r in self.refused))

    def after(self, seq: int, crc: int, samples: int = 0, *, is_applied: bool) -> "Applied":
        total = self.samples + samples
        if is_applied:
            return Applied(self.inc, seq, crc, self.refused, total, self.refused_samples)
        refused = (*self.refused, seq)[-REFUSED_KEPT:]
        return Applied(self.inc, seq, crc, refused, total, self.refused_samples + samples)


class Owed(NamedTuple):
    """How far a worker's pushes had come before the shard's last restart, if further than now.

    They were acknowledged and are in no snapshot: their worker sends them again.
    """

    inc: int
    seq: int


@dataclass(slots=True)
class Cell:
    """A tensor and how many readers hold it."""

    tensor: Tensor
    pins: int = 0


def row_of(table: Mapping[str, Applied], w: str, inc: int) -> Applied:
    """How far an incarnation has come; a new one begins at 0, whatever the one before pushed."""
    row = table.get(w)
    return row if row is not None and row.inc == inc else Applied(inc)


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


class Part:
    """See the top of this file. All tensors are 1-D float32 of length range.numel."""

    def __init__(
        self,
        range: PartRange,
        contract: Contract,
        home: Home | None = None,
        heap: Home | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        """home: of the values. heap: of the rule's state. All three may be shared by parts."""
        self.range = range
        self.contract = contract
        self.version = 0
        """Pushes applied."""
        self.samples = 0
        """Samples applied; the schedule's argument."""
        self.averaged = 0
        """Updates whose values are in the average: its own version."""
        self.table: dict[str, Applied] = {}
        self.durable: dict[str, Applied] = {}
        """The table as the newest snapshot on disk holds it."""
        self.owed: dict[str, Owed] = {}
        """What a restart has undone and nobody has sent again yet."""
        self.lost = 0
        """Acknowledged pushes that nobody will send again: their worker was lost too."""
        self.is_ready = False
        self._heap = heap or Heap()
        self._home = home or self._heap
        self._scratch = scratch or Scratch()
        self._runs = _by_group(contract.layout.present_runs(range.index, b""))
        self._pieces: _Pieces | None = None
        """The current tensors, cut into the runs; made again when one of them is another."""
        self._cells = {
            name: Cell(self._home_of(name).take(range).zero_())
            for name in (VALUES, *contract.slots)
        }
        self._may_be_pinned = False
        """Some current tensor has been pinned since the last push."""
        self._row = self._home.row(range)
        self._row[1] = self._home.place(self.values)

    @property
    def values(self) -> Tensor:
        """The current values. Read them at once, or hold them with `pin`."""
        return self._cells[VALUES].tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Values and rule state by name."""
        return {name: cell.tensor for name, cell in self._cells.items()}

    def load_(
        self, tensors: Mapping[str, Tensor], version: int = 0, samples: int = 0, averaged: int = 0
    ) -> None:
        """Copy values, and whatever state is given, in; the part is ready then."""
        self._row[0] |= 1
        for name, tensor in tensors.items():
            self._writable(name).copy_(tensor)
        self.version, self.samples, self.averaged = version, samples, averaged
        self._row[2] = samples
        self._row[0] = 2 * version
        self.is_ready = True

    def owe(self, w: str, inc: int, seq: int) -> None:
        """A push of a worker is known to have been acknowledged before a restart."""
        owed = self.owed.get(w)
        if owed is not None and owed.inc > inc:  # a ghost's: only what it adds is lost
            return
        if owed is not None and owed.inc < inc:
            self.write_off(w, inc)
            owed = None
        row = row_of(self.table, w, inc)
        if seq > max(row.seq, owed.seq if owed is not None else 0):
            self.owed[w] = Owed(inc, seq)

    def write_off(self, w: str, inc: int) -> None:
        """Incarnation `inc` has come: what older ones are owed nobody will send again."""
        owed = self.owed.get(w)
        if owed is not None and owed.inc < inc:
            self.lost += self.num_owed(w)
            del self.owed[w]

    def num_owed(self, w: str) -> int:
        """Pushes of a worker that it has to send again."""
        owed = self.owed.get(w)
        return 0 if owed is None else max(0, owed.seq - row_of(self.table, w, owed.inc).seq)

    def skip(self, w: str, inc: int, first: int) -> None:
        """The worker has nothing before `first` to send any more: let it go on from there."""
        row = row_of(self.table, w, inc)
        if first <= row.seq + 1:
            return
        owed = self.owed.get(w)
        if owed is not None and owed.inc == inc:
            self.lost += min(first - 1, owed.seq) - row.seq
        self.table[w] = row._replace(seq=first - 1, crc=0)

    def pin(self, names: Sequence[str] = (VALUES,)) -> Pin:
        """Hold the current tensors of these names until the pin is released."""
        cells = {name: self._cells[name] for name in names}
        for cell in cells.values():
            cell.pins += 1
        self._may_be_pinned = True
        return Pin(self, cells)

    def apply_(self, grad: Tensor, samples: int, absent: bytes = b"", norm: float = 0.0) -> None:
        """Apply one gradient by the contract's rule and raise the version.

        grad: 1-D float32 [range.numel], read only, finite. norm: its Euclidean norm; used only
        if the contract clips parts. absent: mask of `Layout.absent_masks`; those tensors and
        their state stay as they are.
        Raises: RemoteProtocolError if the mask does not fit; nothing is changed then.
        """
        runs = self._runs
        if absent:
            runs = _by_group(self.contract.layout.present_runs(self.range.index, absent))
        limit = self.contract.clip_part_norm
        if limit and norm > limit:  # as torch.nn.utils.clip_grad_norm_
            scratch = self._scratch.of(self.range.numel)
            grad = torch.mul(grad, limit / (norm + 1e-6), out=scratch)
        row, step, before = self._row, self.version, self.samples
        row[0] = 2 * step + 1  # odd: the values change
        if self._may_be_pinned and runs:
            self._make_writable()
        whole = self._pieces or self._cut_pieces()
        pieces = _Pieces.of(self._cells, runs) if absent else whole
        contract = self.contract
        factor = contract.schedule.factor(before)
        for (group, of_group), values, state in zip(runs, pieces.values, pieces.state, strict=True):
            settings = contract.layout.groups[group]
            contract.rule.apply_(
                values,
                _cut(grad, of_group),
                state,
                lr=settings.lr * factor,
                weight_decay=settings.weight_decay,
                step=step,
            )
        if contract.average.takes(step + 1, before + samples):
            average = self._cells[SLOT].tensor
            contract.average.take_(average, self.values, self.averaged)
            self.averaged += 1
        self.version = step + 1
        self.samples = before + samples
        row[2] = before + samples
        row[0] = 2 * step + 2

    def _cut_pieces(self) -> "_Pieces":
        self._pieces = _Pieces.of(self._cells, self._runs)
        return self._pieces

    def _make_writable(self) -> None:
        for name, cell in self._cells.items():
            if cell.pins:
                self._writable(name)
        self._may_be_pinned = False

    def _writable(self, name: str) -> Tensor:
        """The tensor to change: the current one, or a copy of it if a reader holds that."""
        cell = self._cells[name]
        if cell.pins:
            fresh = self._home_of(name).take(self.range)
            fresh.copy_(cell.tensor)
            self._cells[name] = cell = Cell(fresh)
            self._pieces = None
            if name == VALUES:
                self._row[1] = self._home.place(fresh)
        return cell.tensor

    def _home_of(self, name: str) -> Home:
        return self._home if name == VALUES else self._heap

    def _release(self, name: str, cell: Cell) -> None:
        cell.pins -= 1
        assert cell.pins >= 0, "pin released twice"
        if not cell.pins and self._cells[name] is not cell:
            self._home_of(name).give_back(self.range, cell.tensor)


_Runs = list[tuple[int, list[Run]]]
"""Groups that occur in a part, each with its runs."""


@dataclass(slots=True)
class _Pieces:
    """Tensors of a part cut into runs: by group, and the state also by name."""

    values: list[list[Tensor]]
    state: list[dict[str, list[Tensor]]]

    @classmethod
    def of(cls, cells: Mapping[str, Cell], runs: _Runs) -> "_Pieces":
        values = [_cut(cells[VALUES].tensor, of_group) for _, of_group in runs]
        slots = [name for name in cells if name != VALUES]
        state = [
            {name: _cut(cells[name].tensor, of_group) for name in slots} for _, of_group in runs
        ]
        return cls(values, state)


def _by_group(runs: Sequence[Run]) -> _Runs:
    groups: dict[int, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    return list(groups.items())


def _cut(tensor: Tensor, runs: list[Run]) -> list[Tensor]:
    """Views of the runs; the tensor itself where one run is all of it."""
    if len(runs) == 1 and runs[0].stop - runs[0].start == tensor.numel():
        return [tensor]
    return [tensor[run.start : run.stop] for run in runs]
