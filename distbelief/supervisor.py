"""Supervisor: which lost process is started again, and when. No clock, no process.

Every restart of a process passes through here, under both engines: so it gets a new number
(grants.py), and a shard goes through its snapshot. The first restart is at once; a process that is
lost again before it has done anything waits longer each time, and at last is given up.
"""

from dataclasses import dataclass

BACK_OFF_S = 0.5
BACK_OFF_MAX_S = 30.0


@dataclass(slots=True)
class _Seat:
    """The place that a process fills."""

    in_a_row: int = 0
    """Losses without anything done in between."""
    total: int = 0
    cause: str = ""
    """Of the first loss in the row."""
    due_at: float | None = None
    is_given_up: bool = False


class Supervisor:
    """See the top of this file."""

    def __init__(self, limit: int) -> None:
        """limit: losses in a row after which a process is given up; 0 starts none again."""
        self._limit = limit
        self._seats: dict[str, _Seat] = {}

    def lose(self, name: str, why: str, now: float) -> float | None:
        """A process has ended that should not have.

        Returns: seconds to its next start; None if it is given up.
        """
        seat = self._seats.setdefault(name, _Seat())
        seat.total += 1
        seat.in_a_row += 1
        seat.cause = seat.cause or why
        if seat.in_a_row > self._limit:
            seat.is_given_up = True
            return None
        delay = 0.0
        if seat.in_a_row > 1:
            delay = min(BACK_OFF_S * 2 ** (seat.in_a_row - 2), BACK_OFF_MAX_S)
        seat.due_at = now + delay
        return delay

    def again(self, name: str, now: float) -> None:
        """A process has ended because it was asked to, and another one is to take its place."""
        self._seats.setdefault(name, _Seat()).due_at = now

    def renew(self, name: str) -> None:
        """A seat is filled anew: what happened to it before does not count."""
        self._seats.pop(name, None)

    def prove(self, name: str) -> None:
        """A process has done what it is there for: what comes after is another story."""
        seat = self._seats.get(name)
        if seat is not None and seat.due_at is None and not seat.is_given_up:
            seat.in_a_row, seat.cause = 0, ""

    def due(self, now: float) -> list[str]:
        """Processes that are to be started now."""
        names = [n for n, s in self._seats.items() if s.due_at is not None and s.due_at <= now]
        for name in names:
            self._seats[name].due_at = None
        return names

    def is_waiting(self, name: str) -> bool:
        """It will be started again."""
        seat = self._seats.get(name)
        return seat is not None and seat.due_at is not None

    def cause(self, name: str) -> str:
        """Why a process was lost, the first time in the row."""
        return self._seats[name].cause

    def num_lost(self, name: str) -> int:
        """How often a process was lost in all."""
        seat = self._seats.get(name)
        return 0 if seat is None else seat.total

    def forget(self) -> None:
        """Nothing is started any more."""
        for seat in self._seats.values():
            seat.due_at = None
