"""Grants: the numbers that tell one process of a name from those before it.

A worker's incarnation and a shard's epoch are granted once and never again, not even by another
launcher of the same run: whoever has a smaller one is a ghost. So they are on disk before the
process that gets one is started.
"""

import json
import os
from pathlib import Path

FILE = "grants.json"


class Grants:
    """Those of one run's folder. Used by one thread."""

    def __init__(self, folder: Path, least: int = 1) -> None:
        """least: the first number of a name that has none; a run of an earlier version had one
        number for all, its attempt."""
        self._path = folder / FILE
        self._least = least
        try:
            self._last: dict[str, int] = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._last = {}

    def last(self, name: str) -> int:
        """The number that was granted last; 0 if none was."""
        return self._last.get(name, 0)

    def next(self, name: str) -> int:
        """A number greater than all before it, for good.

        Raises: OSError if it cannot be written down.
        """
        number = max(self.last(name) + 1, self._least)
        last = {**self._last, name: number}
        part = self._path.with_name(f".{FILE}.{os.getpid()}")
        with part.open("w", encoding="utf-8") as file:
            json.dump(last, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)
        self._last = last
        return number
