"""Backup: a worker's pushes that no snapshot holds yet, kept to be sent again (upstream backup).

A shard acknowledges a push when it has applied it. Should the shard be killed, it goes on from its
last snapshot, and the worker sends what that lacks: no journal, no second copy, no byte more on the
network. What is kept is a reference: a vector that was pushed is not written to until its push is
durable, and the next gradient is computed in another one. Pure: no socket, no clock.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress

from torch import Tensor

from distbelief.param_server.layout import PartRange

VECTORS_MAX = 64
"""Pushes that a worker keeps at most, however small they are."""


def window_of(vector_bytes: int, budget: int) -> int:
    """Pushes that a worker keeps: as many as fit into a budget of bytes, but 2 at least."""
    return min(max(2, budget // max(1, vector_bytes)), VECTORS_MAX)


@dataclass(slots=True)
class Parcel:
    """The parts of one push that travel in one message, to be made again where that is lost."""

    seq: int
    samples: int
    parts: tuple[PartRange, ...]
    grad: Tensor
    """1-D float32, the whole vector."""
    masks: tuple[bytes, ...]
    base: tuple[int, ...]
    """Versions of the copy that the gradient was computed on, in the epoch `ep`."""
    bseq: tuple[int, ...]
    ep: int
    frames: list[Tensor] = field(default_factory=list)
    """What was sent where that is not the gradient itself; empty until it was encoded."""

    def rebase(self, ep: int, floor: Mapping[int, tuple[int, int]]) -> None:
        """The shard is in another epoch: the versions that a copy had may not exist there.

        floor: by part, its version and the last own push in it when the epoch began.
        """
        if ep == self.ep:
            return
        floors = [floor.get(part.index, (0, 0)) for part in self.parts]
        self.base = tuple(map(min, self.base, [version for version, _ in floors]))
        self.bseq = tuple(map(min, self.bseq, [seq for _, seq in floors]))
        self.ep = ep

    def of(self, wanted: Sequence[bool]) -> "Parcel":
        """Only some of its parts."""
        if all(wanted):
            return self
        return replace(
            self,
            parts=tuple(compress(self.parts, wanted)),
            masks=tuple(compress(self.masks, wanted)),
            base=tuple(compress(self.base, wanted)),
            bseq=tuple(compress(self.bseq, wanted)),
            frames=list(compress(self.frames, wanted)),
        )


@dataclass(slots=True)
class Kept:
    """One push."""

    seq: int
    vector: Tensor
    parcels: list[Parcel] = field(default_factory=list)
    """Those that were answered."""
    is_answered: bool = False
    """All of them were."""


class Backup:
    """See the top of this file. Used by one thread."""

    def __init__(
        self, num_parts: int, window: int, make_vector: Callable[[], Tensor], *, waits: bool = False
    ) -> None:
        """window: pushes kept, at least 1. make_vector: called for up to `window` + 1 of them.

        waits: a push is done only when it is durable.
        """
        self.window = window
        self.waits = waits
        self.kept: deque[Kept] = deque()
        self.durable = [0] * num_parts
        """By part, the own seq that a snapshot holds."""
        self.num_dropped = 0
        """Pushes that were given up before they were durable: nobody can send them again."""
        self._make_vector = make_vector
        self._free: list[Tensor] = []
        self._num_made = 0

    def begin(self, seq: int, vector: Tensor) -> Kept:
        """A push begins; from here on its vector must not be written to."""
        kept = Kept(seq, vector)
        self.kept.append(kept)
        return kept

    def note(self, parts: Sequence[int], durable: Sequence[int]) -> None:
        """A shard has told what of this worker's pushes is on disk."""
        own = self.durable
        for part, seq in zip(parts, durable, strict=True):
            if seq > own[part]:
                own[part] = seq

    def release(self) -> None:
        """Let go of what is durable, or was refused and cannot become so."""
        durable = min(self.durable)
        while self.kept and self.kept[0].is_answered and self.kept[0].seq <= durable:
            self._free.append(self.kept.popleft().vector)

    def is_settled(self, seq: int) -> bool:
        """A push may count as done: there is room for the next one, and all that `waits` asks."""
        if self.waits and min(self.durable) < seq:
            return False
        return len(self.kept) <= self.window

    def drop_oldest(self) -> None:
        """Give up the oldest push: the shards cannot save, and training is to go on."""
        if self.kept and self.kept[0].is_answered:
            self.num_dropped += 1
            self._free.append(self.kept.popleft().vector)

    def take_vector(self) -> Tensor:
        """A vector for the next gradient, of any content."""
        if self._free:
            return self._free.pop()
        self._num_made += 1
        return self._make_vector()

    def give_back(self, vector: Tensor) -> None:
        """A vector that was never pushed."""
        self._free.append(vector)

    @property
    def first(self) -> int | None:
        """The oldest push that can be sent again."""
        return self.kept[0].seq if self.kept else None

    def lacking(self, parts: Sequence[int], applied: Sequence[int]) -> list[Parcel]:
        """What a restarted shard has forgotten of what it had answered, in the order of seq.

        parts, applied: of this shard, and the own seq that each of them has now.
        """
        has = dict(zip(parts, applied, strict=True))
        found: list[Parcel] = []
        for kept in self.kept:
            for parcel in kept.parcels:
                wanted = [part.index in has and has[part.index] < kept.seq for part in parcel.parts]
                if any(wanted):
                    found.append(parcel.of(wanted))
        return found
