"""Saves: the newest snapshot of each shard, and the place in the data that fits them all. Pure."""

import math
from dataclasses import asdict, dataclass, field

from distbelief.workers.lease import Position
from distbelief.workers.notes import Beat

POSITIONS_MAX = 600
"""Moments of the data's position that are remembered."""
POSITION_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Saved:
    """The newest snapshot of a shard."""

    name: str
    epoch: int
    version: int
    samples: int
    taken_at: float
    """On the controller's clock."""


@dataclass(slots=True)
class Saves:
    """See the top of this file."""

    begin: Position | None = None
    """Of the data, when the run was started."""
    newest: dict[str, Saved] = field(default_factory=dict)
    """By shard."""
    _positions: list[tuple[float, Position]] = field(default_factory=list)

    def is_due(self, now: float) -> bool:
        """The last position was remembered long enough ago."""
        last = self._positions[-1][0] if self._positions else -math.inf
        return now - last >= POSITION_EVERY_S

    def remember(self, position: Position, now: float) -> None:
        """Positions are the further apart the older they are: a shard that has not saved for hours
        still finds one that is not after its snapshot."""
        self._positions.append((now, position))
        if len(self._positions) >= POSITIONS_MAX:
            del self._positions[0:-1:2]

    def take(self, note: Beat, taken_at: float) -> None:
        """A shard tells of its newest snapshot, if it has one."""
        if not note.saved:
            return
        before = self.newest.get(note.name)
        if before is not None and (before.name, before.epoch) == (note.saved, note.inc):
            late_s = taken_at - before.taken_at
            if late_s < POSITION_EVERY_S:  # this note was longer on its way, or shorter
                taken_at = min(taken_at, before.taken_at)
        self.newest[note.name] = Saved(note.saved, note.inc, note.version, note.samples, taken_at)

    def checkpoint(self, num_shards: int) -> dict[str, object] | None:
        """The snapshots of all shards and a position of the data that fits them, as JSON.

        The position is of a moment not after them: between the two a sample may be trained on
        twice, but none is passed over. None as long as some shard has saved nothing.
        """
        if len(self.newest) < num_shards or self.begin is None:
            return None
        saved = self.newest.values()
        oldest = min(one.taken_at for one in saved)
        fitting = [self.begin, *(position for at, position in self._positions if at <= oldest)]
        shards = {name: asdict(one) for name, one in sorted(self.newest.items())}
        for shard in shards.values():
            del shard["taken_at"]  # of no use on another clock
        return {
            "samples": min(one.samples for one in saved),
            "updates": min(one.version for one in saved),
            "shards": shards,
            "position": fitting[-1].as_dict(),
        }
