"""After each test, everything that was opened is closed again.

Counted: Python threads, open file descriptors, child processes (zombies too), ZeroMQ contexts
and sockets. What was there before the test is not its leak; what a test leaves behind fails it.
A thread or a process may need a moment to go: the check looks again for GRACE_S.
"""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from itertools import count
from multiprocessing import resource_tracker
from typing import Any

import pytest
import zmq

GRACE_S = 1.0
_POLL_S = 0.01

_serial = count()
# Open ZeroMQ objects by the order in which they were made: an id() can come back, a number not.
# Held strongly, because dropping one is a leak too: pyzmq would close it when it is collected,
# at a time nobody chose, and with warnings as errors would fail to, so that term() never returns.
_zmq_objects: dict[int, Any] = {}

CALL_FAILED = pytest.StashKey[bool]()


def track_zmq() -> None:
    """Have each zmq.Context and zmq.Socket made from now on register itself; once is enough."""
    for cls in (zmq.Context, zmq.Socket):
        if not hasattr(cls.__init__, "__wrapped__"):
            # pyzmq offers no list of what is open; __init__ is the one place all of them pass.
            cls.__init__ = _registering(cls.__init__)  # type: ignore[method-assign]


def _registering(init: Callable[..., None]) -> Callable[..., None]:
    @wraps(init)
    def register(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if not self._shadow:  # a shadow borrows somebody else's context or socket
            _zmq_objects[next(_serial)] = self

    return register


@dataclass(frozen=True, slots=True)
class Held:
    """What this process holds at one moment: key -> a description for the message."""

    threads: dict[int, str]
    fds: dict[tuple[int, str], str]
    children: dict[int, str]
    zmq: dict[int, str]


def held() -> Held:
    """Take stock. About 0.1 ms with 30 descriptors."""
    return Held(_threads(), _fds(), _children(), _zmq())


def leaks(before: Held) -> list[str]:
    """Say what is held now and was not before, one line each."""
    now = held()
    return [
        *(f"thread {now.threads[key]}" for key in now.threads.keys() - before.threads.keys()),
        *(f"file descriptor {now.fds[key]}" for key in now.fds.keys() - before.fds.keys()),
        *(
            f"child process {_describe_process(pid)}"
            for pid in now.children.keys() - before.children.keys()
        ),
        *(f"ZeroMQ {now.zmq[key]}" for key in now.zmq.keys() - before.zmq.keys()),
    ]


def _threads() -> dict[int, str]:
    # A dummy stands for a thread that C++ made and that came into Python once, as torch's do;
    # Python never learns that it ended.
    return {
        id(thread): f"{thread.name!r}{' (daemon)' if thread.daemon else ''}"
        for thread in threading.enumerate()
        if not isinstance(thread, threading._DummyThread)
    }


def _fds() -> dict[tuple[int, str], str]:
    tracker_fd = resource_tracker._resource_tracker._fd  # type: ignore[attr-defined]
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
        if int(name) != tracker_fd:
            found[int(name), target] = f"{name} -> {target}"
    return found


def _children() -> dict[int, str]:
    # multiprocessing starts its tracker of shared memory once and keeps it until exit.
    tracker_pid = resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]
    found = {}
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/children") as file:
                pids = file.read().split()
        except FileNotFoundError:  # the thread ended meanwhile
            continue
        found.update({int(pid): pid for pid in pids if int(pid) != tracker_pid})
    return found


def _describe_process(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
        with open(f"/proc/{pid}/cmdline") as file:
            command = file.read().replace("\0", " ").strip()
    except OSError:
        return f"{pid} (gone meanwhile)"
    if state == "Z":
        return f"{pid}, dead but never waited for"
    return f"{pid}: {command[:120]}"


def _zmq() -> dict[int, str]:
    for serial in [serial for serial, made in _zmq_objects.items() if made.closed]:
        del _zmq_objects[serial]
    return {serial: f"{type(made).__name__} {made!r}" for serial, made in _zmq_objects.items()}


def _close_zmq(before: Held) -> None:
    """Close what a test left open, so that a later term() or the exit does not wait for it."""
    left = [made for serial, made in _zmq_objects.items() if serial not in before.zmq]
    for socket in (made for made in left if isinstance(made, zmq.Socket)):
        socket.close(linger=0)
    for context in (made for made in left if isinstance(made, zmq.Context)):
        context.term()


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a thread, descriptor, child process or ZeroMQ object behind."""
    if request.node.get_closest_marker("ray") is not None:
        # ray.init starts a raylet, a control store and driver threads, and ray.shutdown leaves
        # some of their threads, sockets and log files open until this process ends. Tests of
        # the ray engine look for processes of ours by themselves.
        yield
        return
    before = held()
    yield
    if request.node.stash.get(CALL_FAILED, False):
        return  # its traceback keeps the frames alive, and with them whatever they hold
    found = leaks(before)
    if not found:
        return
    gc.collect()  # what only a cycle holds is not leaked
    deadline = time.monotonic() + GRACE_S
    while (found := leaks(before)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if request.node.get_closest_marker("gpu") is not None:
        # The CUDA driver opens devices, pipes and sockets at its first use and keeps them.
        found = [leak for leak in found if not leak.startswith("file descriptor")]
    if found:
        if not any(leak.startswith("thread") for leak in found):  # it may be using the socket
            _close_zmq(before)
        pytest.fail("left behind by this test:\n  " + "\n  ".join(found), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Remember whether the test failed, for `no_leaks`."""
    report = yield
    if report.failed:
        item.stash[CALL_FAILED] = True
    return report
