"""Stop: how urgently a run should end, and what is said about it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Stop:
    """How urgently a run should end; raised by a signal handler, or by whoever called `launch`."""

    level: int = 0
    """0: go on. 1: finish the leases, save, end. 2: end now, without saving."""

    def ask(self) -> None:
        self.level += 1

    def raise_to(self, level: int) -> None:
        self.level = max(self.level, level)


def stop_text(level: int, checkpoint: Mapping[str, Any] | None) -> str:  # Any: JSON
    """What a person is told who has asked to stop, once or twice."""
    if level == 1:
        return (
            "Stopping safely: workers finish what they have, then shards save. Ctrl-C again to "
            "stop now."
        )
    if checkpoint is None:
        return "Stopping now: nothing was saved."
    age_s = max(0, round(time.time() - checkpoint["at"]))
    return (
        f"Stopping now, nothing more is saved. The last checkpoint has {checkpoint['samples']:,} "
        f"samples ({age_s} s ago)."
    )


class StoppedNow(Exception):
    """The second request to stop."""
