"""Lease: a range of one epoch that one worker may train on, and the queue that hands leases out.

Each epoch is a permutation of the data that every process can work out from (seed, epoch), so a
lease is three numbers. Fast workers take more leases, a lost worker's come back, and together
the workers visit every sample once an epoch. Pure: no clock, no network, no data.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Lease:
    """Positions [start, stop) of the order of one epoch."""

    epoch: int
    start: int
    stop: int

    @property
    def num_samples(self) -> int:
        return self.stop - self.start


def batches(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut positions [start, stop) into ranges of `size`; the last one may be shorter.

    But for a single sample: that joins the range before it, because batch normalisation over a
    1x1 map cannot train on one sample.
    """
    while start < stop:
        end = min(start + size, stop)
        if stop - end == 1 and size > 1:
            end = stop
        yield start, end
        start = end


@dataclass(init=False, eq=False)
class LeaseQueue:
    """Hands out one epoch after the other; what comes back goes out first."""

    num_samples: int
    """In an epoch; 0 while nobody has said."""
    done_samples: int
    """Samples of finished leases and of finished beginnings of leases."""
    handed_out: int
    """Samples, since this was made; those that are handed out again count again."""
    returned_samples: int
    """Samples that came back, of those."""
    is_stopped: bool
    _lease_samples: int
    _num_epochs: int | None
    _epoch: int
    _start: int
    _returned: deque[Lease]
    _held: dict[str, deque[Lease]]
    _warm_start_samples: int
    _first: str | None

    def __init__(
        self,
        num_samples: int,
        lease_samples: int,
        num_epochs: int | None = None,
        warm_start_samples: int = 0,
        position: "Position | None" = None,
    ) -> None:
        """num_samples, lease_samples: both 0 where only a worker will know them; see `size`.

        num_epochs: None goes on for ever, until `stop`. position: where to go on.
        warm_start_samples: until so many samples are done, one worker trains alone, as Dean et
        al. 2012 section 4.1 start their runs.
        """
        if min(num_samples, lease_samples) < 0 or bool(num_samples) != bool(lease_samples):
            raise ValueError(f"{num_samples} samples in leases of {lease_samples}")
        position = position or Position()
        if num_samples and position.num_samples not in (0, num_samples):
            raise ValueError(
                f"the data has {num_samples} samples and had {position.num_samples} when the run "
                "was stopped"
            )
        self.num_samples = num_samples or position.num_samples
        self.done_samples = position.done_samples
        self.handed_out = 0
        self.returned_samples = 0
        self.is_stopped = False
        self._lease_samples = lease_samples
        self._num_epochs = num_epochs
        self._epoch, self._start = position.epoch, position.start
        self._returned = deque(position.returned)
        self._held = {}
        self._warm_start_samples = warm_start_samples
        self._first = None

    def size(self, num_samples: int, lease_samples: int) -> None:
        """A worker says how long the data is: the first one decides.

        Raises: ValueError if it is empty, or of another length than was said before.
        """
        if num_samples < 1:
            raise ValueError("the data is empty")
        if self.num_samples not in (0, num_samples):
            raise ValueError(f"the data has {num_samples} samples here, {self.num_samples} there")
        self.num_samples = num_samples
        self._lease_samples = self._lease_samples or max(1, lease_samples)

    def take(self, worker: str, upto: int | None = None) -> Lease | None:
        """One more lease for a worker; None if it has to wait or there is no more.

        upto: no lease of a later epoch.
        """
        if self.is_stopped or not self._lease_samples:
            return None
        if self.done_samples < self._warm_start_samples:
            self._first = self._first or worker
            if worker != self._first:
                return None
        lease = self._returned.popleft() if self._returned else self._fresh(upto)
        if lease is not None:
            self._held.setdefault(worker, deque()).append(lease)
            self.handed_out += lease.num_samples
        return lease

    def is_over(self, epoch: int) -> bool:
        """Everything of the epochs up to this one has been handed out."""
        if self._returned:
            return False
        return self._epoch > epoch or self.is_exhausted

    def advance(self, worker: str, num_samples: int) -> int:
        """So many more samples of a worker were answered; it trains on its leases in order.

        Returns: how many of them its leases had.
        """
        before = self.done_samples
        held = self._held.get(worker, deque())
        while num_samples > 0 and held:
            lease = held.popleft()
            done = min(num_samples, lease.num_samples)
            self.done_samples += done
            num_samples -= done
            if done < lease.num_samples:
                held.appendleft(replace(lease, start=lease.start + done))
        if not held:
            self._held.pop(worker, None)
        return self.done_samples - before

    def give_back(self, worker: str, kept: int = 0) -> int:
        """A worker is gone: what is left of its leases goes out again. Returns its samples.

        kept: a worker that is there keeps so many, its first ones.
        """
        if self._first == worker and not kept:
            self._first = None
        held, back = self._held.pop(worker, deque()), list[Lease]()
        keeps = deque[Lease]()
        for lease in held:
            cut = lease.start + min(kept, lease.num_samples)
            kept -= cut - lease.start
            if lease.start < cut:
                keeps.append(replace(lease, stop=cut))
            if cut < lease.stop:
                back.append(replace(lease, start=cut))
        if keeps:
            self._held[worker] = keeps
        self._returned.extend(back)
        samples = sum(lease.num_samples for lease in back)
        self.returned_samples += samples
        return samples

    def held_by(self, worker: str) -> int:
        """Samples that a worker has been handed and is not done with."""
        return sum(lease.num_samples for lease in self._held.get(worker, ()))

    @property
    def in_flight(self) -> int:
        """The same of all workers together."""
        return sum(map(self.held_by, self._held))

    def stop(self) -> None:
        """Hand out nothing more."""
        self.is_stopped = True

    @property
    def unfinished_samples(self) -> int:
        """Handed out, but not answered."""
        return self.in_flight + sum(lease.num_samples for lease in self._returned)

    @property
    def is_finished(self) -> bool:
        """Nothing to hand out and nothing on the way."""
        if self._held:
            return False
        return self.is_stopped or (self.is_exhausted and not self._returned)

    @property
    def position(self) -> "Position":
        """Where a run that goes on from here begins: what is held now is handed out again."""
        held = (lease for leases in self._held.values() for lease in leases)
        return Position(
            num_samples=self.num_samples,
            epoch=self._epoch,
            start=self._start,
            returned=(*self._returned, *held),
            done_samples=self.done_samples,
        )

    @property
    def is_exhausted(self) -> bool:
        """Every epoch has been handed out."""
        return self._num_epochs is not None and self._epoch >= self._num_epochs

    def _fresh(self, upto: int | None) -> Lease | None:
        if self.is_exhausted or (upto is not None and self._epoch > upto):
            return None
        start, stop = next(batches(self._start, self.num_samples, self._lease_samples))
        lease = Lease(self._epoch, start, stop)
        self._start = stop
        if stop == self.num_samples:
            self._epoch, self._start = self._epoch + 1, 0
        return lease


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """How far a run has come in its data; what a stopped run goes on from."""

    num_samples: int = 0
    epoch: int = 0
    start: int = 0
    """The next lease begins here in the order of `epoch`."""
    returned: tuple[Lease, ...] = ()
    """Handed out before and not finished."""
    done_samples: int = 0

    def as_dict(self) -> dict[str, Any]:  # Any: JSON
        """JSON form; `from_dict` reads it back."""
        return {
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "returned": [[lease.epoch, lease.start, lease.stop] for lease in self.returned],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Position":  # Any: JSON
        """Raises: ValueError or TypeError where the data is no position."""
        numbers = {key: value for key, value in data.items() if key != "returned"}
        returned = tuple(Lease(*lease) for lease in data.get("returned", ()))
        flat = [*numbers.values(), *(n for le in returned for n in (le.epoch, le.start, le.stop))]
        if not all(type(number) is int and number >= 0 for number in flat):
            raise ValueError(f"a position of whole numbers from 0 was expected, got {data}")
        return cls(**numbers, returned=returned)
