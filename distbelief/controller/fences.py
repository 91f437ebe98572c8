"""Fences: workers that are gone, of which no shard may take anything more. Pure.

A worker that vanished may have had a push under way. Each shard is told, in the answer to its
beat, to take nothing of that process any more, and tells what it has of it. When all have told,
what became of the worker's samples is settled (account.py).
"""

from dataclasses import dataclass, field

from distbelief.controller.account import Tally, Told
from distbelief.workers.notes import Fence, Fenced


@dataclass(slots=True)
class _Open:
    """A worker that is gone, and what shards have said that they have of it."""

    inc: int
    told: Told
    tallies: dict[str, Tally] = field(default_factory=dict)


@dataclass(slots=True)
class Fences:
    """See the top of this file."""

    _last: dict[str, int] = field(default_factory=dict)
    """By worker: the incarnation of it up to which no shard may take anything."""
    _known: dict[str, dict[str, int]] = field(default_factory=dict)
    """By shard: the same, as the process that it is now has heard it."""
    _open: dict[str, _Open] = field(default_factory=dict)
    """By worker: what is not settled yet."""

    def put(self, worker: str, inc: int) -> None:
        """Up to this incarnation of a worker nothing is to be taken."""
        self._last[worker] = max(inc, self._last.get(worker, 0))

    def ask(self, worker: str, inc: int, told: Told) -> None:
        """Have all shards say what they have of it. told: what it has told itself."""
        self._open[worker] = _Open(inc, told)

    def is_open(self, worker: str) -> bool:
        return worker in self._open

    @property
    def are_open(self) -> bool:
        return bool(self._open)

    def renew(self, shard: str) -> None:
        """Another process is that shard: it may have gone on from before a fence."""
        self._known[shard] = {}

    def next(self, shard: str) -> Fence | None:
        """What a shard has to be told; None if it knows all."""
        known = self._known.setdefault(shard, {})
        for name, inc in self._last.items():
            if known.get(name, 0) < inc:
                return Fence(w=name, inc=inc)
        return None

    def take(self, note: Fenced, num_shards: int) -> tuple[Told, Tally] | None:
        """A shard has answered. Returns what is known of the worker, once all shards have."""
        known = self._known.setdefault(note.name, {})
        known[note.w] = max(note.of_inc, known.get(note.w, 0))
        one = self._open.get(note.w)
        if one is None or one.inc != note.of_inc:
            return None
        one.tallies[note.name] = Tally(
            num_parts=note.num_parts,
            least=note.least,
            most=note.most,
            total=note.total,
            least_refused=note.least_refused,
            most_refused=note.most_refused,
        )
        if len(one.tallies) < num_shards:
            return None
        del self._open[note.w]
        return one.told, Tally.merged(list(one.tallies.values()))
