"""Account: what became of every sample that was handed out. No clock, no network, no data.

Samples are counted when they are handed out (workers/lease.py) and once more when they are done
with, each under one word:

    applied    its gradient is in every part of the parameters
    partial    in some parts: the others refused it, or its worker or their shard was killed in
               between; it is not trained on again
    refused    every part refused it
    skipped    a script threw its gradient away, as a GradScaler does with one that overflows
    left out   it could not be read
    lost       its push was acknowledged and then undone: its worker and a shard were lost before a
               snapshot had it
    returned   its worker is gone, and nothing of it is in any part: it was handed out again

and the rest is in flight. A worker tells of its pushes when they are answered. One that is lost
may have had a push under way, of which it could not tell any more; so all shards are asked to
take nothing of it from then on, and what they have of it (`Tally`) decides. A worker pushes the
samples of its leases in their order, so it is enough to know how many.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a worker has told of its samples, since it was started."""

    answered: int = 0
    """Their pushes were answered; partial and refused ones are among them."""
    partial: int = 0
    missed: int = 0
    """Of the partial ones, samples times the parts that they are not in."""
    refused: int = 0
    skipped: int = 0
    left_out: int = 0

    def newest(self, other: "Told") -> "Told":
        """The later of two: an older note may come last, and tells nothing new."""
        return Told(**{f.name: max(getattr(self, f.name), getattr(other, f.name)) for f in _TOLD})

    def since(self, before: "Told") -> "Told":
        return Told(**{f.name: getattr(self, f.name) - getattr(before, f.name) for f in _TOLD})

    @property
    def total(self) -> int:
        """Samples of leases that are done with."""
        return self.answered + self.skipped + self.left_out


_TOLD = fields(Told)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What some parts have of the pushes of one process, in samples."""

    num_parts: int
    least: int = 0
    """Of the part that has least, applied or refused."""
    most: int = 0
    total: int = 0
    """Over the parts."""
    least_refused: int = 0
    most_refused: int = 0

    @classmethod
    def of(cls, rows: Sequence[tuple[int, int]]) -> "Tally":
        """rows: for each part, its samples and how many of them it has refused."""
        if not rows:
            return cls(num_parts=0)
        samples, refused = [row[0] for row in rows], [row[1] for row in rows]
        return cls(
            num_parts=len(rows),
            least=min(samples),
            most=max(samples),
            total=sum(samples),
            least_refused=min(refused),
            most_refused=max(refused),
        )

    @classmethod
    def merged(cls, tallies: Sequence["Tally"]) -> "Tally":
        """Of all their parts together."""
        some = [tally for tally in tallies if tally.num_parts]
        if not some:
            return cls(num_parts=0)
        return cls(
            num_parts=sum(tally.num_parts for tally in some),
            least=min(tally.least for tally in some),
            most=max(tally.most for tally in some),
            total=sum(tally.total for tally in some),
            least_refused=min(tally.least_refused for tally in some),
            most_refused=max(tally.most_refused for tally in some),
        )


@dataclass(slots=True)
class Account:
    """See the top of this file. All in samples."""

    applied: int = 0
    partial: int = 0
    missed: int = 0
    """As of `Told`."""
    refused: int = 0
    skipped: int = 0
    left_out: int = 0
    lost: int = 0
    beyond: int = 0
    """Done with and never handed out: a script counts for itself."""

    def tell(self, news: Told, from_leases: int) -> None:
        """A worker has told more. from_leases: so many of it had been handed out."""
        self.applied += news.answered - news.partial - news.refused
        self.partial += news.partial
        self.missed += news.missed
        self.refused += news.refused
        self.skipped += news.skipped
        self.left_out += news.left_out
        self.beyond += news.total - from_leases

    def settle(self, told: Told, tally: Tally) -> int:
        """A worker is gone, and no part will take anything of it any more.

        told: all that it has told, which is in the account. tally: of all parts.
        Returns: samples of its leases that are done with beyond those it has told.
        """
        if not tally.num_parts:
            return 0
        least, most = tally.least, max(tally.most, 0)
        done = max(most, told.answered)
        # What was told as answered and is not everywhere any more was undone with a shard.
        more = least - told.answered
        self.applied += more
        self.partial += most - least
        self.missed += tally.num_parts * most - tally.total
        self.lost += done - most
        if more > 0:  # among them may be some that were refused
            refused = min(max(0, tally.least_refused - told.refused), more)
            uneven = tally.most_refused - tally.least_refused - told.partial
            uneven = min(max(0, uneven), more - refused)
            self.applied -= refused + uneven
            self.refused += refused
            self.partial += uneven
            self.missed += uneven  # in one part at least
        return done - told.answered

    def undo(self, samples: int) -> None:
        """At the end so many that were applied are not in every part any more."""
        self.applied -= samples
        self.lost += samples

    def prove(self, counted: Sequence[int]) -> bool:
        """Hold it, at the end, against what shards have counted: samples of each of all parts.

        What was undone after its worker was gone, so that nobody could send it again, is moved to
        `lost`. Returns: shards have nothing that is not accounted for.
        """
        told = len(counted) * (self.applied + self.partial) - self.missed
        self.undo(max(0, self.applied - min(counted)))
        return sum(counted) <= told

    @property
    def num_done(self) -> int:
        """Handed out and done with, but not returned."""
        done = self.applied + self.partial + self.refused + self.skipped + self.left_out + self.lost
        return done - self.beyond

    def as_dict(self) -> dict[str, int]:
        return asdict(self)
