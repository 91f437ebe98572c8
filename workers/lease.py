"""Lease: a range of one epoch that one worker may train on, and the queue that hands leases out.

Each epoch is a permutation of the data that every process can work out from (seed, epoch), so a
lease is three numbers. Fast workers take more leases, a lost worker's come back, and together
the workers visit every sample once an epoch. Pure: no clock, no network, no data.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Lease:
    """Positions [start, stop) of the order of one epoch."""

    epoch: int
    start: int
    stop: int

    @property
    def num_samples(self) -> int:
        return self.stop - self.start


def epoch_order(seed: int, epoch: int, num_samples: int) -> Tensor:
    """The order in which an epoch visits the data: int64 [num_samples], a permutation.

    The same on every machine: it depends on nothing but the arguments.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_samples, generator=generator)


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


class LeaseQueue:
    """Hands out one epoch after the other; what comes back goes out first."""

    def __init__(
        self,
        num_samples: int,
        lease_samples: int,
        num_epochs: int | None = None,
        warm_start_samples: int = 0,
    ) -> None:
        """num_epochs: None goes on for ever, until `stop`.

        warm_start_samples: until so many samples are done, one worker trains alone, as Dean et
        al. 2012 section 4.1 start their runs.
        """
        if num_samples < 1 or lease_samples < 1:
            raise ValueError(f"{num_samples} samples in leases of {lease_samples}")
        self.num_samples = num_samples
        self.done_samples = 0
        """Samples of finished leases and of finished beginnings of leases."""
        self.is_stopped = False
        self._fresh = _leases(num_samples, lease_samples, num_epochs)
        self._returned: deque[Lease] = deque()
        self._held: dict[str, deque[Lease]] = {}
        self._warm_start_samples = warm_start_samples
        self._first: str | None = None
        self._is_exhausted = False

    def take(self, worker: str) -> Lease | None:
        """One more lease for a worker; None if it has to wait or there is no more."""
        if self.is_stopped:
            return None
        if self.done_samples < self._warm_start_samples:
            self._first = self._first or worker
            if worker != self._first:
                return None
        lease = self._returned.popleft() if self._returned else next(self._fresh, None)
        if lease is None:
            self._is_exhausted = True
            return None
        self._held.setdefault(worker, deque()).append(lease)
        return lease

    def advance(self, worker: str, num_samples: int) -> None:
        """So many more samples of a worker were answered; it trains on its leases in order."""
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

    def give_back(self, worker: str) -> int:
        """A worker is gone: what is left of its leases goes out again. Returns its samples."""
        if self._first == worker:
            self._first = None
        held = self._held.pop(worker, deque())
        self._returned.extend(held)
        return sum(lease.num_samples for lease in held)

    def stop(self) -> None:
        """Hand out nothing more."""
        self.is_stopped = True

    @property
    def is_finished(self) -> bool:
        """Nothing to hand out and nothing on the way."""
        return not self._held and (self.is_stopped or (self._is_exhausted and not self._returned))


def _leases(num_samples: int, lease_samples: int, num_epochs: int | None) -> Iterator[Lease]:
    epoch = 0
    while num_epochs is None or epoch < num_epochs:
        for start, stop in batches(0, num_samples, lease_samples):
            yield Lease(epoch, start, stop)
        epoch += 1
