"""Standing: which pushes a shard has acknowledged, which of them it has now, and which are on disk.

Read from its ledger and its newest snapshot, while it runs or after it was killed: so that a shard
is killed only where that may lose nothing (`spaced`).
"""

import json
from collections import defaultdict
from pathlib import Path

from distbelief.param_server import ledger
from distbelief.param_server.ledger import Begun
from distbelief.param_server.snapshot import MANIFEST, SnapshotStore

Table = dict[tuple[str, int], tuple[int, int]]
"""(worker, part) -> (incarnation, seq) of the last push in it."""


class Standing:
    """Of one shard, at one moment."""

    def __init__(self, folder: Path) -> None:
        """folder: of its snapshots and ledgers."""
        self._acked: dict[tuple[str, int], dict[int, int]] = defaultdict(dict)
        """(worker, incarnation) -> part -> seq."""
        self._now: Table = {}
        self._saved = _saved(folder)
        for entry in ledger.read(folder):
            if isinstance(entry, Begun):
                self._now.clear()
                continue
            acked = self._acked[entry.w, entry.inc]
            for part, status in zip(entry.part, entry.status, strict=True):
                if status in ("applied", "dup"):
                    acked[part] = max(entry.seq, acked.get(part, 0))
                    self._now[entry.w, part] = entry.inc, entry.seq

    def is_saved(self, w: str, inc: int) -> bool:
        """All that was acknowledged to a process is on disk."""
        return self._is_in(self._saved, w, inc)

    def has_all(self, w: str, inc: int) -> bool:
        """The shard has, in memory or on disk, all that it has acknowledged to a process."""
        both = {k: max(self._saved.get(k, (0, 0)), v) for k, v in self._now.items()}
        return self._is_in({**self._saved, **both}, w, inc)

    def _is_in(self, table: Table, w: str, inc: int) -> bool:
        return all(
            table.get((w, part), (0, 0)) >= (inc, seq) for part, seq in self._acked[w, inc].items()
        )


def _saved(folder: Path) -> Table:
    names = SnapshotStore(folder).names()
    if not names:
        return {}
    try:
        body = json.loads((folder / names[-1] / MANIFEST).read_text(encoding="utf-8"))["body"]
    except (OSError, ValueError, KeyError):  # pruned meanwhile
        return {}
    return {
        (w, part["index"]): (row["inc"], row["seq"])
        for part in body["parts"]
        for w, row in part["table"].items()
    }
