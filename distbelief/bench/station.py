"""Station: what a process of a bench has of the driver: its seat, its arguments, and two pipes.

    python -m distbelief.bench.station        reads one line of JSON, then is what that says

The driver's line is {"role": "module:function", "board": path, "seat": n, ...arguments}. The
process answers with lines of JSON: first where it is to be found, or that it is ready. It ends
with the driver, however that ends.
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from distbelief.bench.board import Board, Seat

_PR_SET_PDEATHSIG = 1


class Station:
    """See the top of this file."""

    def __init__(self, spec: Mapping[str, Any], seat: Seat) -> None:  # Any: JSON
        self.spec = spec
        """The arguments."""
        self.seat = seat

    def say(self, **fields: Any) -> None:  # Any: JSON
        """Tell the driver something: where this is, at first; what came of it, at the end."""
        sys.stdout.write(json.dumps(fields) + "\n")
        sys.stdout.flush()

    def hear(self) -> dict[str, Any]:  # Any: JSON
        """Wait for what the driver tells next: the addresses of others."""
        line = sys.stdin.readline()
        if not line:
            raise EOFError("the driver is gone")
        heard: dict[str, Any] = json.loads(line)
        return heard


def _end_with(driver: int) -> None:
    """Be killed when the driver is gone, also where it was killed itself."""
    with contextlib.suppress(OSError, AttributeError):  # not on every system: then by the pipe
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != driver:
        os._exit(1)


def main() -> None:
    """Entry of every process of a bench."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to answer
    spec: dict[str, Any] = json.loads(sys.stdin.readline())  # Any: JSON
    _end_with(spec["driver"])
    if spec.get("cores"):
        os.sched_setaffinity(0, spec["cores"])  # before there are threads: they stay there too
    module, _, name = spec["role"].partition(":")
    role = getattr(importlib.import_module(module), name)
    role(Station(spec, Board.open(spec["board"]).seat(spec["seat"])))
    sys.stdout.flush()
    os._exit(0)  # torch takes half a second to leave


if __name__ == "__main__":
    main()
