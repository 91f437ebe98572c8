"""Slab: where a shard's values lie so that workers of its host may read them without asking.

    slab  = row[parts] buffer[parts][COPIES]        what of it is never touched takes no memory
    row   = int64 word, place, samples, 0 ...       64 bytes, one cache line
    word  = 2 * version, and 1 more while the values are changed
    place = byte offset of the part's current buffer, or -1: they lie elsewhere, ask for them

A reader copies the values between two looks at the word, and once more if it moved: so there are
no torn reads, nobody waits for a reader, and one that dies holds nothing. A shard that dies in
the middle of a change leaves an odd word for ever, so readers give up after a while.

The words need stores and loads to be seen in their order, as x86-64 has them (memory.py).
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from distbelief.param_server.layout import PartRange

ROW = 8
"""int64 words of a row."""
COPIES = 4
"""Buffers of a part in the slab: the current one, and those that readers elsewhere have pinned."""
ELSEWHERE = -1
_ALIGN = 64

Floats = np.ndarray[tuple[int], np.dtype[np.float32]]
Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


def slab_bytes(parts: Sequence[PartRange]) -> int:
    """Size of the slab of these parts, in bytes."""
    return _start_of(parts, len(parts))


def _start_of(parts: Sequence[PartRange], column: int) -> int:
    start = 8 * ROW * len(parts)
    for part in parts[:column]:
        start += COPIES * _length(part)
    return start


def _length(part: PartRange) -> int:
    return -(-4 * part.numel // _ALIGN) * _ALIGN


def _words(memory: Bytes, parts: Sequence[PartRange]) -> memoryview:
    """The rows as plain words: reading one takes 40 ns, an element of an array 100."""
    return memory[: 8 * ROW * len(parts)].data.cast("q")


class Slab:
    """The shard's side. It implements part.Home; used by one thread."""

    def __init__(self, memory: Bytes, parts: Sequence[PartRange]) -> None:
        """memory: uint8 [slab_bytes(parts)], all zero."""
        words = _words(memory, parts)
        self._row = {
            part.index: words[ROW * column : ROW * column + 3] for column, part in enumerate(parts)
        }
        for row in self._row.values():
            row[1] = ELSEWHERE
        self._free: dict[int, list[Tensor]] = {}
        self._place: dict[int, int] = {}
        """By address: where a buffer lies."""
        base = memory.ctypes.data
        start = 8 * ROW * len(parts)
        for part in parts:
            free = []
            for _ in range(COPIES):
                buffer = torch.from_numpy(memory[start : start + 4 * part.numel].view(np.float32))
                self._place[buffer.data_ptr()] = buffer.data_ptr() - base
                free.append(buffer)
                start += _length(part)
            self._free[part.index] = free[::-1]

    def take(self, part: PartRange) -> Tensor:
        """A buffer for the values of a part, of any content; on the heap if the slab is full."""
        free = self._free[part.index]
        return free.pop() if free else torch.empty(part.numel)

    def give_back(self, part: PartRange, buffer: Tensor) -> None:
        """The buffer is not used any more."""
        if buffer.data_ptr() in self._place:
            self._free[part.index].append(buffer)

    def row(self, part: PartRange) -> memoryview:
        """Word, place and samples of the part, to be written by it."""
        return self._row[part.index]

    def place(self, buffer: Tensor) -> int:
        """Byte offset of a buffer, or ELSEWHERE."""
        return self._place.get(buffer.data_ptr(), ELSEWHERE)


class SlabReader:
    """A reader's side, in another process. Used by one thread at a time."""

    def __init__(
        self,
        memory: Bytes,
        parts: Sequence[PartRange],
        patience_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """memory: uint8 [slab_bytes(parts)], read only; parts: of this shard.

        patience_s: how long a part may be found in the middle of a change.
        Raises: ValueError if the memory has another size.
        """
        if len(memory) != slab_bytes(parts):
            raise ValueError(f"a slab of {len(memory)} bytes, expected {slab_bytes(parts)}")
        self._memory = memory
        self._words = _words(memory, parts)
        self._row = {part.index: ROW * column for column, part in enumerate(parts)}
        self._start = {part.index: _start_of(parts, i) for i, part in enumerate(parts)}
        self._views: dict[tuple[int, int], Floats] = {}
        self._patience_s = patience_s
        self._clock = clock
        self._sleep = sleep
        self.num_again = 0
        """Copies that were made again because the part had moved on."""

    def read(
        self, parts: Sequence[PartRange], into: Tensor, took: Callable[[PartRange, int, int], None]
    ) -> bool:
        """Copy the values of parts into a worker's vector, each whole and of one version.

        into: 1-D float32 [layout.total]. took: called with (part, version, samples) of each.
        Returns: False if some could not be had: they lie elsewhere, or the shard has stopped in
        the middle of a change. `took` has been called for those that could.
        """
        waiting = list(parts)
        target, words = into.numpy(), self._words
        deadline = 0.0
        while waiting:
            still = []
            for part in waiting:
                row = self._row[part.index]
                word = words[row]
                if word & 1:
                    still.append(part)
                    continue
                place, samples = words[row + 1], words[row + 2]
                if place == ELSEWHERE:
                    return False
                # Not torch's copy_: it takes 3.5 ms for 28 MB that another core has written.
                np.copyto(target[part.start : part.stop], self._view(part, place))
                if words[row] == word:
                    took(part, word >> 1, samples)
                else:
                    self.num_again += 1
                    still.append(part)
            if still:
                now = self._clock()
                if len(still) < len(waiting) or not deadline:
                    deadline = now + self._patience_s
                elif now > deadline:
                    return False
                if len(still) == len(waiting):
                    self._sleep(50e-6)
            waiting = still
        return True

    def _view(self, part: PartRange, place: int) -> Floats:
        key = (part.index, place)
        if key not in self._views:
            first, step = self._start[part.index], _length(part)
            if (place - first) % step or not 0 <= place - first < COPIES * step:
                raise ValueError(f"part {part.index} cannot lie at {place}")
            self._views[key] = self._memory[place : place + 4 * part.numel].view(np.float32)
        return self._views[key]
