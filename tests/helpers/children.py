"""Child processes that have torch already: one is started a module, and forks the others.

Starting Python with torch takes two seconds, a fork of such a process some milliseconds. Functions
for `start` must be importable by name: those of the tests are in tests/helpers/peers.py.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any

WAIT_S = 30.0


class Child:
    """A process, and the pipe to it; the process gets the other end as its first argument."""

    def __init__(
        self,
        context: Any,
        function: Callable[..., None],
        args: tuple[object, ...],
        more: dict[str, object],
    ) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=function, args=(theirs, *args), kwargs=more)
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        pid: int = self.process.pid
        return pid

    def hear(self, timeout_s: float = WAIT_S) -> Any:
        """What it says next."""
        assert self.pipe.poll(timeout_s), "the child says nothing"
        return self.pipe.recv()

    def say(self, what: object = None) -> None:
        self.pipe.send(what)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.process.kill()
        self.process.join(WAIT_S)

    def close(self) -> int:
        """Hang up, which every function takes as the end; its exit code."""
        if self.pipe.closed:
            return 0
        self.pipe.close()
        self.process.join(WAIT_S)
        if self.process.exitcode is None:
            self.kill()
        code: int = self.process.exitcode
        self.process.close()
        return code


class Children:
    """Starts children; `Children.start(f, ...)` calls f(pipe, ...) in one."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.running: list[Child] = []

    def start(self, function: Callable[..., None], *args: object, **more: object) -> Child:
        self.running.append(Child(self._context, function, args, more))
        return self.running[-1]

    def close(self) -> None:
        """End those that are left."""
        running, self.running = self.running, []
        for child in running:
            child.close()


@contextmanager
def nursery(*modules: str) -> Iterator[Any]:
    """The process that forks children, with these modules imported."""
    context = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(list(modules))
    forkserver.ensure_running()
    try:
        yield context
    finally:
        forkserver._forkserver._stop()  # type: ignore[attr-defined]


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def is_stopped(pid: int) -> bool:
    """By SIGSTOP."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


def maps_of(pid: int, owner: str) -> int:
    """How many memory files of a `shard` or `worker` a process has mapped."""
    with open(f"/proc/{pid}/maps") as file:
        return sum(f"/memfd:distbelief-{owner}" in line for line in file)
