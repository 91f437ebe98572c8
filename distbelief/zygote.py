"""Zygote: a process that has imported all that a shard needs, and forks one when it is asked.

Importing torch takes seconds; a shard that was killed must be back in less than half of one, and
a worker can be (`warm_workers`). The zygote starts no thread and opens no socket, so that a fork of
it is as good as a new process.

    asks     = one JSON line each on its standard input: a spec (spec.py)
    answers  = one JSON line each on its standard output: {"pid": n}, and as each of them ends
               {"ended": pid, "status": as of os.waitpid}

It ends with its input. Its children do not.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from queue import Empty, Queue
from typing import Any

from distbelief.spec import Spec

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 2.0
STATUS_TIMEOUT_S = 0.05
"""A child's end is seen sooner than the zygote can tell how it was."""
LINE_MAX = 2**20


class Zygote:
    """The launcher's side. Used by one thread."""

    def __init__(self) -> None:
        """Raises: OSError if it cannot be started."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "distbelief.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            # Threads of OpenBLAS, which numpy starts when it is imported, would not be forked.
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self._pids: Queue[int] = Queue()
        self._status: dict[int, int] = {}
        self._reader = threading.Thread(target=self._read, name="zygote", daemon=True)
        self._reader.start()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, spec: Spec) -> int:
        """A new process for a spec; returns its pid.

        Raises: OSError if the zygote has died.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(spec.to_json().encode() + b"\n")
        self._process.stdin.flush()
        for _ in range(int(START_TIMEOUT_S)):
            with contextlib.suppress(Empty):
                return self._pids.get(timeout=1.0)
            if not self.is_alive:
                break
        raise ChildProcessError("the zygote has ended")

    def status(self, pid: int) -> int | None:
        """How a child that is gone has ended, as of os.waitpid; None if that is not known."""
        deadline = time.monotonic() + STATUS_TIMEOUT_S
        while pid not in self._status and self.is_alive and time.monotonic() < deadline:
            time.sleep(STATUS_TIMEOUT_S / 50)
        return self._status.get(pid)

    def close(self) -> None:
        """End it; its children go on."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)
        self._process.kill()
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # closed meanwhile
            for line in self._process.stdout:
                told: dict[str, Any] = json.loads(line)  # Any: JSON
                if "pid" in told:
                    self._pids.put(told["pid"])
                else:
                    self._status[told["ended"]] = told["status"]


def main() -> None:
    """Entry of the zygote: fork until the input ends."""
    # What takes the time. Not at the top: the launcher imports this file too.
    from distbelief.process import be_process

    wakeup, bell = os.pipe()
    os.set_blocking(wakeup, False)
    os.set_blocking(bell, False)
    signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    asked = b""
    while True:
        ready, _, _ = select.select([0, wakeup], [], [])
        if wakeup in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(wakeup, 4096)
            _reap()
        if 0 not in ready:
            continue
        data = os.read(0, LINE_MAX)
        if not data:
            _reap()  # what has ended is not left to whoever inherits it
            os._exit(0)  # torch takes half a second to leave
        asked += data
        *lines, asked = asked.split(b"\n")
        for line in lines:
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(wakeup)
                os.close(bell)
                null = os.open(os.devnull, os.O_RDONLY)
                os.dup2(null, 0)
                os.close(null)
                os.setsid()
                be_process(Spec.from_json(line.decode()))
                return  # what a script has left to do at exit is done there
            _say({"pid": pid})


def _reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _say({"ended": pid, "status": status})


def _say(data: dict[str, int]) -> None:
    os.write(1, json.dumps(data).encode() + b"\n")


if __name__ == "__main__":
    main()
