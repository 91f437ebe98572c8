"""Feed: the batches of one worker's leases, in their order, read ahead by loader processes.

Leases are asked for while batches before them are still being read. A round ends where there is
no lease for now; everything that was asked for has come out by then, so that a worker that has
to wait holds no half-read batch back from others who wait for it.
"""

import os
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distbelief.workers.lease import Lease, batches
from distbelief.workers.order import epoch_order
from distbelief.workers.pixels import normalise
from distbelief.workers.split import Split

MAX_LOADERS = 8
"""More is for the user to ask for."""
AHEAD = 2
"""Batches that each loader process is ahead."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One batch to be read."""

    epoch: int
    start: int
    stop: int
    """Positions in the order of the epoch."""
    indices: list[int]  # no tensor: each would cross to the loader as a file descriptor
    """The samples at these positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch that was read."""

    epoch: int
    start: int
    stop: int
    """Positions in the order of the epoch."""
    inputs: Any  # a structure of tensors
    targets: Any
    """As inputs; None if no sample could be read."""
    num_good: int
    """Samples in inputs and targets."""
    bad: tuple[tuple[str, str], ...]
    """Samples left out: (name, why)."""

    @property
    def num_positions(self) -> int:
        return self.stop - self.start


class Feed:
    """Reads a split for one consumer, by leases. A context manager."""

    def __init__(
        self,
        split: Split,
        next_lease: Callable[[], Lease | None],
        batch_size: int,
        *,
        seed: int | None = None,
        num_loaders: int = 0,
    ) -> None:
        """next_lease: called in the consumer's thread, some batches ahead; None ends the round.

        seed: of the order of epochs; None reads the split in its own order.
        num_loaders: processes that read, forked here and now: before there are threads and
            sockets that they would inherit. 0 reads in this one. They end with this process,
            however it ends, within some seconds.
        """
        self._split = split
        self._next_lease = next_lease
        self._batch_size = batch_size
        self._seed = None if split.is_ordered else seed
        self._order: tuple[int, Tensor] | None = None
        self._is_open = False
        self._reader = _Reader(split)
        self._loader: DataLoader[Batch] | None = None
        self._ahead: Any = None  # torch's iterator over the loader, which has no public type
        if num_loaders:
            # A second process would only run through the same stream once more.
            count = 1 if split.is_ordered else num_loaders
            self._loader = DataLoader(
                self._reader,
                batch_sampler=_Round(self._asks),  # type: ignore[arg-type]  # its asks are ours
                collate_fn=_same,
                num_workers=count,
                prefetch_factor=AHEAD,
                persistent_workers=True,
                multiprocessing_context="fork",
                # Of its own, or each round would draw from the numbers that dropout draws from.
                generator=torch.Generator().manual_seed(torch.initial_seed()),
            )
            self._ahead = iter(self._loader)  # forks; the round is empty yet
            for _ in self._ahead:
                raise AssertionError("a round before the first")
        self._is_open = True

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def round(self) -> Iterator[Batch]:
        """Batches until there is no lease for now.

        Raises: what `next_lease` raises, or a user's own data.
        """
        if self._loader is None:
            for ask in self._asks():
                yield self._finished(self._reader.__getitems__(ask))
        else:
            for batch in self._loader:
                yield self._finished(batch)

    def close(self) -> None:
        """End the loader processes. May be called twice."""
        if self._ahead is not None:
            # torch does so when the iterator is collected, but a traceback may hold on to it.
            self._ahead._shutdown_workers()
        self._ahead = self._loader = None
        self._split.samples.close()

    def _asks(self) -> Iterator[Ask]:
        while self._is_open:
            lease = self._next_lease()
            if lease is None:
                return
            for start, stop in batches(lease.start, lease.stop, self._batch_size):
                yield Ask(lease.epoch, start, stop, self._indices(lease.epoch, start, stop))

    def _indices(self, epoch: int, start: int, stop: int) -> list[int]:
        if self._seed is None:
            return list(range(start, stop))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(self._seed, epoch, len(self._split)))
        indices: list[int] = self._order[1][start:stop].tolist()
        return indices

    def _finished(self, batch: Batch) -> Batch:
        """Pixels become floats here: so a quarter of the bytes goes between the processes."""
        if not (self._split.is_decoding and batch.num_good):
            return batch
        return replace(batch, inputs=normalise(batch.inputs))


def read_all(split: Split, batch_size: int, num_loaders: int = 0) -> Generator[Batch, None, None]:
    """The whole split once, in its own order."""
    leases = iter([Lease(0, 0, len(split))])
    with Feed(split, lambda: next(leases, None), batch_size, num_loaders=num_loaders) as feed:
        yield from feed.round()


def default_loaders(split: Split, num_workers: int) -> int:
    """Loader processes of one worker where nobody said how many; num_workers: of the job.

    Data in memory needs none. Nor has the user's own any by default, as with torch's DataLoader:
    what their code has opened may not survive a fork.
    """
    if not split.is_decoding:
        return 0
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores // num_workers - 1, MAX_LOADERS))


def move(values: Any, device: str | torch.device) -> Any:  # Any: a structure of tensors
    """A structure with its tensors on a device; what is no tensor stays as it is."""
    if isinstance(values, Tensor):
        if torch.device(device).type == "cuda" and values.device.type == "cpu":
            # From pinned memory, of which torch keeps a stock, a copy does not hold up this thread.
            return values.pin_memory().to(device, non_blocking=True)
        return values.to(device)
    if isinstance(values, Mapping):
        return {key: move(value, device) for key, value in values.items()}
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*(move(value, device) for value in values))
    if isinstance(values, list | tuple):
        return type(values)(move(value, device) for value in values)
    return values


class _Round:
    """A batch sampler: begins the asks of a new round each time that it is gone through."""

    def __init__(self, asks: Callable[[], Iterator[Ask]]) -> None:
        self._asks = asks

    def __iter__(self) -> Iterator[Ask]:
        return self._asks()


class _Reader(Dataset[Batch]):
    """What runs in a loader process: asks become batches."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def __getitem__(self, _: int) -> Batch:
        raise AssertionError("batches are asked for as a whole")

    def __getitems__(self, ask: Ask) -> Batch:
        read = self._split.samples.read(ask.indices, ask.epoch)
        return Batch(
            epoch=ask.epoch,
            start=ask.start,
            stop=ask.stop,
            inputs=read.inputs,
            targets=read.targets,
            num_good=read.num_good,
            bad=read.bad,
        )


def _same(batch: Any) -> Any:  # Any: torch thinks of a list of samples here
    return batch
