"""Traffic: what a client sends and receives, counted for the monitor. No clock of its own.

Written by the comm thread, read by the training thread: single numbers and a deque, so it needs no
lock.
"""

from collections import deque
from typing import NamedTuple

from distbelief.param_server.report import TRIPS_MAX


class Trip(NamedTuple):
    """A push or a fetch, from its first byte to its answer."""

    shard: int
    is_push: bool
    seconds: float


class Traffic:
    """See the top of this file."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        """Of payloads, as is the next; through shared memory too."""
        self.received_bytes = 0
        self.fill_s = 0.0
        """Seconds in which parameters that have come were copied to where they are wanted."""
        self.device_s = 0.0
        """Seconds in which what is to be pushed was waited for, as a device still computed it."""
        self.retries = 0
        """Connections that were opened anew, with all that was open asked again."""
        self.trips: deque[Trip] = deque(maxlen=TRIPS_MAX)
        """The newest that nobody has taken."""

    def take_trips(self) -> list[Trip]:
        """Those since the last call."""
        taken = []
        while self.trips:
            taken.append(self.trips.popleft())
        return taken
