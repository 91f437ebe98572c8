"""DataLoader: torch's, whose shuffled samples are shared out over the workers of a run.

One that shuffles is a training loader: each of its iterations is one epoch, and together the
workers visit every sample once in it, a fast one more of them than a slow one. Loaders that do
not shuffle, and those of a script that was started by itself, are torch's own.
"""

import time
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import IterableDataset, Sampler

from distbelief.workers import session
from distbelief.workers.order import epoch_order
from distbelief.workers.session import Session

_END = object()


class DataLoader(torch.utils.data.DataLoader[Any]):  # Any: whatever the dataset holds
    """Takes what torch.utils.data.DataLoader takes; `len` is that of a whole epoch."""

    def __init__(
        self,
        dataset: Any,  # Any: torch's Dataset of anything
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        *,
        sized: bool = True,
        **options: Any,  # Any: those of torch's
    ) -> None:
        """sized: whether a loader that is shared has a `len`, that of the whole epoch, although
        its iterations are shorter. Lightning goes by it to find the end of an epoch, so inside
        `fit` it validates only with sized=False; Hugging Face's Trainer needs a length.

        Raises: ValueError where the samples of shuffle=True cannot be shared: a dataset
        without a length, or with a sampler of its own.
        """
        here = session.current()
        self._counts = bool(shuffle)
        """Whether its batches are what a step of Downpour is made of."""
        self._leases: _Leases | None = None
        self._sized = sized
        if shuffle and here.is_shared:
            if options.get("sampler") is not None or options.get("batch_sampler") is not None:
                raise ValueError("shuffle=True excludes a sampler, as in torch's DataLoader")
            if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
                raise ValueError(
                    f"{type(dataset).__name__} has no length, so its samples cannot be shared: "
                    "leave out shuffle=True and let the dataset itself skip what belongs to "
                    "others, by distbelief.worker().index and .count"
                )
            if not len(dataset):
                raise ValueError("the data of a loader with shuffle=True is empty")
            self._leases = _Leases(here, len(dataset), batch_size or 1)
            shuffle, options["sampler"] = None, self._leases
        super().__init__(dataset, batch_size, shuffle, **options)

    def __len__(self) -> int:
        if self._leases is not None and not self._sized:
            raise TypeError("how much of an epoch this worker will get is not known before")
        return super().__len__()

    def __iter__(self) -> Any:  # Any: torch has its own class here; this is any iterator
        batches = super().__iter__()
        return self._counted(batches) if self._counts else batches

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:  # Any: batches of anything
        here, size, done, iteration = session.current(), self.batch_size or 1, 0, 0
        here.forget_count()
        while True:
            began = time.monotonic()
            batch = next(batches, _END)
            here.wait_for_data(time.monotonic() - began)
            if batch is _END:
                break
            given = self._leases.num_given if self._leases is not None else len(self.dataset)  # type: ignore[arg-type]  # torch shuffles only what has a length
            if self._leases is not None:
                iteration = iteration or self._leases.iteration
            count = min(size, given - done)
            done += count
            here.count(count, iteration)
            yield batch
        if self._leases is not None:
            here.uncount(self._leases.num_given - done)  # what drop_last has dropped


class _Leases(Sampler[int]):
    """Indices of the leases that this worker is given, one epoch an iteration."""

    def __init__(self, here: Session, num_samples: int, batch_size: int) -> None:
        self.iteration = 0
        self.num_given = 0
        """In this iteration."""
        self._session = here
        self._num_samples = num_samples
        self._batch_size = batch_size

    def __len__(self) -> int:
        return self._num_samples

    def __iter__(self) -> Iterator[int]:
        iteration = self.iteration = self._session.iterate()
        self.num_given = 0
        orders: dict[int, list[int]] = {}
        while True:
            lease = self._session.take(self._num_samples, self._batch_size, iteration)
            if lease is None:
                return
            if lease.epoch not in orders:
                order = epoch_order(self._session.seed, lease.epoch, self._num_samples)
                orders[lease.epoch] = order.tolist()
            for index in orders[lease.epoch][lease.start : lease.stop]:
                self.num_given += 1
                yield index
