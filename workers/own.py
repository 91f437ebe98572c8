"""Own: data that the user's own function brings, `module:function`, called with a split's name.

It returns a torch Dataset of (input, target) pairs, or an IterableDataset of them; or, for "test",
None where there is no test split. A stream (IterableDataset) must bring the same samples in the
same order each time: every worker runs through all of it and keeps what its leases name.
"""

import importlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from distbelief.workers.split import Read, Split, digest_of

COUNT_S = 60.0
"""A stream without a length is counted by running through it, for so long at most."""

_PACKAGE = str(Path(__file__).parent.parent)


class UserError(ValueError):
    """Something is wrong in, or with, the user's own code."""

    def __init__(self, what: str, frames: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.frames = frames
        """Where it happened, without our own part of the traceback."""
        self.fix = fix


class Rows:
    """A map-style dataset. Its samples are collated as torch's DataLoader does."""

    def __init__(self, dataset: Any) -> None:  # Any: whatever has __getitem__ and __len__
        self._dataset = dataset
        self._length = len(dataset)

    def __len__(self) -> int:
        return self._length

    def read(self, indices: Sequence[int], epoch: int = 0) -> Read:
        many = getattr(self._dataset, "__getitems__", None)
        rows = many(list(indices)) if many else [self._dataset[index] for index in indices]
        return _collate(rows)

    def close(self) -> None:
        """What the dataset has opened is its own to close."""


class Stream:
    """An IterableDataset by positions. A position behind the last one begins the stream again."""

    def __init__(self, dataset: "IterableDataset[Any]", path: str) -> None:
        """Raises: ValueError if it has no length and does not end within COUNT_S."""
        self._dataset = dataset
        self._path = path
        self._rows: Iterator[Any] | None = None
        self._next = 0
        self._length = _length_of(dataset, path)

    def __len__(self) -> int:
        return self._length

    def read(self, indices: Sequence[int], epoch: int = 0) -> Read:
        return _collate([self._row(index) for index in indices])

    def close(self) -> None:
        self._rows = None

    def _row(self, position: int) -> Any:
        if self._rows is None or position < self._next:
            self._rows, self._next = iter(self._dataset), 0
        for row in self._rows:
            self._next += 1
            if self._next > position:
                return row
        ended, self._rows = self._next, None
        raise UserError(
            f"the stream of {self._path} ended after {ended} samples, its length was "
            f"{self._length}: it must bring the same samples each time"
        )


def open_own(path: str, split: str) -> Split | None:
    """A split of the user's own data; None if their function says there is no test split.

    path: module:function. Raises: UserError.
    """
    function = find(path)
    called = f"{path}({split!r})"
    try:
        dataset = function(split)
    except Exception as error:
        raise UserError(
            f"{called} raised {type(error).__name__}: {error}", user_frames(error)
        ) from error
    if dataset is None:
        if split == "train":
            raise UserError(f"{called} returned None: there must be a training split")
        return None
    try:
        samples = _samples_of(dataset, called)
        if not len(samples):
            raise UserError(f"{called} has no samples")
        first = _first_of(samples, dataset, called)
        num_classes = _num_classes_of(dataset)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the first sample of {called} raised {type(error).__name__}: {error}",
            user_frames(error),
        ) from error
    shape = tuple(first.shape[1:]) if isinstance(first, Tensor) else ()
    return Split(
        samples=samples,
        name=split,
        num_classes=num_classes,
        input_shape=(shape[0], shape[1], shape[2]) if len(shape) == 3 else None,
        digest=digest_of(str(len(samples)).encode()),
        is_ordered=isinstance(samples, Stream),
    )


def find(path: str) -> Callable[..., object]:
    """The callable that `module:name` names. The current folder comes first, as for `python`.

    Raises: UserError.
    """
    module_name, _, name = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script, not a module, may even end the process
        raise UserError(
            f"importing {module_name} raised {type(error).__name__}: {error}",
            user_frames(error),
            f"call it from the folder where `python -c 'import {module_name}'` works",
        ) from error
    function: Callable[..., object] | None = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{module_name} has no callable {name!r}")
    return function


def user_frames(error: BaseException) -> str:
    """The traceback without our own frames and the import machinery."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen")
        and frame.filename != importlib.__file__
        and not _is_ours(frame.filename)
    ]
    return "".join(traceback.format_list(frames)).rstrip()


def _is_machinery(filename: str) -> bool:
    return "importlib" in filename or filename.startswith("<frozen")


def _is_ours(filename: str) -> bool:
    """Models are the user's choice: what happens in one is not our own part."""
    return filename.startswith(_PACKAGE) and not filename.startswith(f"{_PACKAGE}/model")


def _samples_of(dataset: Any, called: str) -> Rows | Stream:  # Any: what the user returned
    if isinstance(dataset, IterableDataset):
        return Stream(dataset, called)
    if isinstance(dataset, DataLoader):
        raise UserError(f"{called} returned a DataLoader: return the dataset that it was made of")
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, str | bytes | dict):
        raise UserError(
            f"{called} returned a {type(dataset).__name__}, not a torch Dataset or IterableDataset"
        )
    if not hasattr(dataset, "__len__"):
        raise UserError(f"{called} returned a {type(dataset).__name__} that has no __len__")
    return Rows(dataset)


def _first_of(samples: Rows | Stream, dataset: Any, called: str) -> Any:  # Any: what came in
    """The first input as a batch of one, after a look at whether it is a pair at all."""
    row: Any
    if isinstance(samples, Stream):
        row = next(iter(dataset), None)
    else:
        many = getattr(dataset, "__getitems__", None)
        row = many([0])[0] if many else dataset[0]
    if not isinstance(row, tuple | list) or len(row) != 2:
        what = f"{type(row).__name__} of {len(row)}" if hasattr(row, "__len__") else repr(row)[:80]
        raise UserError(f"sample 0 of {called} is a {what}, not an (input, target) pair")
    try:
        return _collate([row]).inputs
    except TypeError as error:
        kinds = " and ".join(type(value).__name__ for value in row)
        raise UserError(
            f"sample 0 of {called} ({kinds}) cannot become a batch: {error}",
            fix="return tensors, such as by transform=torchvision.transforms.ToTensor()",
        ) from error


def _collate(rows: Sequence[Any]) -> Read:  # Any: the user's samples
    inputs, targets = default_collate([tuple(row) for row in rows])
    return Read(inputs, targets, len(rows))


def _num_classes_of(dataset: Any) -> int | None:  # Any: what the user returned
    """From `num_classes`, `classes` or `targets`, whichever it has first."""
    number = getattr(dataset, "num_classes", None)
    if isinstance(number, int):
        return number
    classes = getattr(dataset, "classes", None)
    if isinstance(classes, list | tuple) and classes:
        return len(classes)
    targets = getattr(dataset, "targets", None)
    if isinstance(targets, list | tuple) and targets and isinstance(targets[0], int):
        return int(max(targets)) + 1
    if isinstance(targets, Tensor) and targets.dtype == torch.int64 and targets.numel():
        return int(targets.max()) + 1
    return None


def _length_of(dataset: "IterableDataset[Any]", called: str) -> int:
    """Its `__len__`, or how many samples come: that costs one run through the stream."""
    if hasattr(dataset, "__len__"):
        return len(dataset)
    deadline = time.monotonic() + COUNT_S
    length = 0
    for _ in dataset:
        length += 1
        if time.monotonic() > deadline:
            raise UserError(
                f"{called} has no __len__, and after {COUNT_S:.0f} s and {length} samples it had "
                "not ended",
                fix="give it a __len__: samples in an epoch; each epoch begins the stream again",
            )
    return length
