"""History: what a worker meant to push and what it was answered, for the history checker.

A line is in the file before the push leaves, and one after its answer is there, so that a worker
that is killed at any moment has told no less than it knew. Only with `save.history`.

    {"op": "push", "seq": 5, "samples": 32, "at": seconds}
    {"op": "ack", "shard": 0, "ep": 2, "seq": 5, "part": [...], "status": [...], "version": [...],
     "durable": [...], "again": false, "at": seconds}
    {"op": "welcome", "shard": 0, "ep": 3, "part": [...], "version": [...], "bseq": [...]}

`at` is of the host's monotonic clock, which all its processes share. `again`: the push had been
answered before, and the shard had forgotten it.
"""

import json
import os
import time
from pathlib import Path

from distbelief.param_server.protocol import Ack, Welcome


class History:
    """The file of one incarnation of one worker. Used by one thread."""

    def __init__(self, folder: Path, w: str, inc: int) -> None:
        """Raises: OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{w}-{inc:06d}.jsonl"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def push(self, seq: int, samples: int) -> None:
        self._write({"op": "push", "seq": seq, "samples": samples})

    def ack(self, shard: int, ack: Ack, *, again: bool) -> None:
        self._write(
            {
                "op": "ack",
                "shard": shard,
                "ep": ack.ep,
                "seq": ack.seq,
                "part": ack.part,
                "status": ack.status,
                "version": ack.version,
                "durable": ack.durable,
                "again": again,
            }
        )

    def welcome(self, shard: int, welcome: Welcome) -> None:
        self._write(
            {
                "op": "welcome",
                "shard": shard,
                "ep": welcome.ep,
                "part": welcome.part,
                "version": welcome.version,
                "bseq": welcome.bseq,
            }
        )

    def close(self) -> None:
        """May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, line: dict[str, object]) -> None:
        os.write(self._fd, json.dumps({**line, "at": time.monotonic()}).encode() + b"\n")
