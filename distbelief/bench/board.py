"""Board: a block of counters that the driver of a bench and the processes of one crew all map.

    file = row[SEATS]           row = 16 words of 8 bytes; one seat a process, servers last
    word 0     order            written by the driver:  serial * 8 + Order
    word 1     state            the order that the process is acting on, with its serial
    word 2     rounds           finished since the start
    word 3, 4  ended            monotonic ns of the last even and of the last odd round
    word 5..8  parts            looked at, torn, wrong; and refused by a server
    word 9,10  low, high        of the parameters last fetched, as float64
    word 11    samples          that servers have taken from this seat

Every word has one writer. A round is counted after its time is written, into the other place than
the last one's, so a reader never sees a count with another round's time. The file is anonymous:
when its last process is gone, so is it.
"""

import mmap
import os
import time
from collections.abc import Callable
from enum import IntEnum

SEATS = 256
_WORDS = 16
_ORDER, _STATE, _ROUNDS, _ENDED, _LOOKED, _LOW, _SAMPLES = 0, 1, 2, 3, 5, 9, 11
_BITS = 3


class Order(IntEnum):
    """What a process is to do."""

    HOLD = 0
    """Wait, and poll the order now and then."""
    RUN = 1
    """Do rounds as fast as they go."""
    CHECK = 2
    """As RUN, and look at every part that is fetched."""
    STEP = 3
    """Do one round and publish what was fetched, then wait."""
    STOP = 4
    """End."""


HOLD_S = 0.004
"""A process on hold looks this often whether it still is: 0.3 % of a core."""


class Board:
    """The whole block. The driver makes it; the others open it by its path."""

    def __init__(self, fd: int, path: str) -> None:
        """Use `create` or `open`."""
        self.path = path
        """Where other processes of this user find it, as long as the driver lives."""
        self._fd = fd
        self._map = mmap.mmap(fd, SEATS * _WORDS * 8)
        self._whole = memoryview(self._map)
        self.words = self._whole.cast("q")
        self.floats = self._whole.cast("d")
        self._serial = 0

    @classmethod
    def create(cls) -> "Board":
        """A new one, all zero: everybody is on hold."""
        fd = os.memfd_create("distbelief-bench", os.MFD_CLOEXEC)
        os.ftruncate(fd, SEATS * _WORDS * 8)
        return cls(fd, f"/proc/{os.getpid()}/fd/{fd}")

    @classmethod
    def open(cls, path: str) -> "Board":
        """The one that another process has made."""
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), path)

    def seat(self, index: int) -> "Seat":
        return Seat(self, index)

    def tell(self, order: Order, seats: range) -> None:
        """Give an order. Each has a serial number, so that the same one twice is two orders."""
        self._serial += 1
        for index in seats:
            self.words[index * _WORDS + _ORDER] = self._serial << _BITS | order

    def is_followed(self, seats: range) -> bool:
        """All these are acting on their newest order."""
        words = self.words
        return all(
            words[index * _WORDS + _ORDER] == words[index * _WORDS + _STATE] for index in seats
        )

    def close(self) -> None:
        self.words.release()
        self.floats.release()
        self._whole.release()
        self._map.close()
        os.close(self._fd)


class Seat:
    """One process's row."""

    def __init__(self, board: Board, index: int) -> None:
        assert 0 <= index < SEATS
        self._words = board.words
        self._floats = board.floats
        self._at = index * _WORDS

    # The driver's side

    @property
    def progress(self) -> tuple[int, int]:
        """Rounds finished, and the monotonic ns at which the last of them was."""
        words, at = self._words, self._at
        while True:
            rounds = words[at + _ROUNDS]
            ended = words[at + _ENDED + rounds % 2]
            if words[at + _ROUNDS] - rounds < 2:  # one more has gone to the other place
                return rounds, ended

    @property
    def looked(self) -> tuple[int, int, int, int]:
        """Parts looked at, torn, wrong, refused."""
        at = self._at + _LOOKED
        words = self._words
        return words[at], words[at + 1], words[at + 2], words[at + 3]

    @property
    def fetched(self) -> tuple[float, float]:
        """The smallest and the largest parameter that was fetched last."""
        return self._floats[self._at + _LOW], self._floats[self._at + _LOW + 1]

    @property
    def samples(self) -> int:
        return self._words[self._at + _SAMPLES]

    # The process's side

    @property
    def order(self) -> Order:
        return Order(self._words[self._at + _ORDER] & (1 << _BITS) - 1)

    @property
    def is_stopped(self) -> bool:
        """For loops that know no other order: a server's."""
        return self._words[self._at + _ORDER] & (1 << _BITS) - 1 == Order.STOP

    @property
    def word(self) -> int:
        """The order with its serial."""
        return self._words[self._at + _ORDER]

    def follow(self, word: int) -> Order:
        """Say that this order is being acted on."""
        self._words[self._at + _STATE] = word
        return Order(word & (1 << _BITS) - 1)

    def tick(self) -> None:
        """A round is finished."""
        words, at = self._words, self._at
        rounds = words[at + _ROUNDS] + 1
        words[at + _ENDED + rounds % 2] = time.monotonic_ns()
        words[at + _ROUNDS] = rounds

    def look(self, looked: int, torn: int, wrong: int = 0) -> None:
        """Count parts that were looked at."""
        at = self._at + _LOOKED
        self._words[at] += looked
        self._words[at + 1] += torn
        self._words[at + 2] += wrong

    def refuse(self, parts: int) -> None:
        """Count parts of pushes that a server has refused."""
        self._words[self._at + _LOOKED + 3] += parts

    def publish(self, low: float, high: float) -> None:
        """Show the smallest and the largest parameter fetched."""
        self._floats[self._at + _LOW] = low
        self._floats[self._at + _LOW + 1] = high

    def take_samples(self, samples: int) -> None:
        self._words[self._at + _SAMPLES] = samples

    def do_rounds(
        self,
        do_round: Callable[[], None],
        look: Callable[[], None],
        publish: Callable[[], tuple[float, float]],
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        """The life of a worker: rounds as ordered, until it is told to stop.

        look: counts what the last round fetched. publish: its smallest and largest value.
        pause: called when rounds end for a while.
        """
        done = -1
        while True:
            word = self.word
            order = self.follow(word)
            if order is Order.STOP:
                return
            if order is Order.HOLD or word == done:
                time.sleep(HOLD_S)
                continue
            do_round()
            self.tick()
            if order is Order.CHECK:
                look()
            elif order is Order.STEP:
                pause()
                self.publish(*publish())
                done = word
