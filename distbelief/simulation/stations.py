"""Stations: servers that take one piece of work after the other, first come, first served."""


class Stations:
    """Servers of one kind, each with a queue: when it is free, and for how long it was busy."""

    __slots__ = ("busy_s", "free_at")

    def __init__(self, number: int) -> None:
        self.free_at = [0.0] * number
        self.busy_s = [0.0] * number

    def take(self, index: int, now: float, cost_s: float) -> float:
        """Queue behind what is there. Returns: when the work begins."""
        start = self.free_at[index]
        if start < now:
            start = now
        self.free_at[index] = start + cost_s
        self.busy_s[index] += cost_s
        return start

    def forget(self) -> None:
        self.busy_s = [0.0] * len(self.busy_s)
