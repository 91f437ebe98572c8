"""Split: one split of the data, whatever source it comes from, and what every source offers.

Knows no source: `data.py` opens them, each in a file of its own.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

SPLITS = ("train", "test")


@dataclass(frozen=True, slots=True)
class Read:
    """What reading some samples gave."""

    inputs: Any  # a tensor [num_good, ...], or a dict, tuple ... of such
    targets: Any
    """As inputs. Both are None where no sample could be read."""
    num_good: int
    bad: tuple[tuple[str, str], ...] = ()
    """Samples that could not be read and were left out: (name, why)."""


class Samples(Protocol):
    """Samples of a split by their index, 0 to len - 1. May go through a fork before a read."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], epoch: int = 0) -> Read:
        """The samples at `indices`, in that order. epoch: for what is drawn anew in each.

        Raises: what a user's own code raises; samples that are damaged are in `Read.bad`.
        """
        ...

    def close(self) -> None:
        """Close what reading has opened in this process. May be called twice, and read after."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A split of the job's data."""

    samples: Samples
    name: str
    """train or test."""
    num_classes: int | None
    """None where it is not known."""
    input_shape: tuple[int, int, int] | None
    """(channels, height, width); None where inputs are no images."""
    class_names: Sequence[str] | None = None
    """In the order of the classes; None where nothing says them."""
    digest: str
    """The same on every machine that sees the same data, as far as that is cheap to tell."""
    is_ordered: bool = False
    """A stream: it is read in its own order, and no permutation of it."""
    is_decoding: bool = False
    """Samples are files to be decoded, which is worth processes of their own. `read` gives
    pixels, uint8 [B, 3, H, W]; the feed makes floats of them after the way between processes."""

    def __len__(self) -> int:
        return len(self.samples)


class Names(Sequence[str]):
    """Texts in one block of memory.

    A list of a million str would be copied into each forked loader process page by page, as the
    counts of references in it change.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._text = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:  # Any: a slice gives a list; nobody asks for one
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return os.fsdecode(self._text[self._ends[index] : self._ends[index + 1]])

    def __bytes__(self) -> bytes:
        """Which names they are, and where each ends."""
        return self._ends.tobytes() + self._text


def digest_of(*pieces: bytes) -> str:
    """A short digest of some bytes, each piece with its length."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()[:16]
