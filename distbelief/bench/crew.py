"""Crew: the processes of one system, alive; on hold until they are told to run.

A context manager: whatever happens inside, nothing of the crew outlives it, and no wait in here is
without an end.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from distbelief.bench.board import Board, Order
from distbelief.bench.machine import Resident, Use, descendants, resident, use_of
from distbelief.bench.system import System
from distbelief.problem import Problem

START_S = 120.0
"""For all processes to be up: torch alone takes some seconds of a busy core."""
HOLD_S = 60.0
"""For a round to end; also of a slow system with many workers."""
STOP_S = 10.0
"""For a process to end by itself; then it is ended."""
_TAIL = 12
"""Lines of what a failed process said that are shown."""


class Member:
    """One process."""

    def __init__(self, name: str, spec: Mapping[str, Any], env: Mapping[str, str]) -> None:
        """spec: see station.py. Raises: Problem if it cannot be started."""
        self.name = name
        self._said = b""
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "distbelief.bench.station"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **env},
                start_new_session=True,  # the terminal's Ctrl-C is the driver's
            )
        except OSError as error:
            self._errors.close()
            raise _failed(f"{name} could not be started: {error}") from error
        self.pid = self._process.pid
        self.tell(driver=os.getpid(), **spec)

    def tell(self, **fields: Any) -> None:  # Any: JSON
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: `hear` says how
            self._process.stdin.write(json.dumps(fields).encode() + b"\n")
            self._process.stdin.flush()

    def hear(self, deadline: float) -> dict[str, Any]:  # Any: JSON
        """The next line it says. Raises: Problem if it ends first, or the deadline comes."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while b"\n" not in self._said:
            self.check()
            if time.monotonic() > deadline:
                raise _failed(f"{self.name} said nothing in time", self.last_words())
            if select.select([fd], [], [], 0.1)[0]:
                piece = os.read(fd, 65536)
                if not piece:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(STOP_S)
                    self.check(must_live=True)
                self._said += piece
        line, _, self._said = self._said.partition(b"\n")
        heard: dict[str, Any] = json.loads(line)
        return heard

    def check(self, *, must_live: bool = False) -> None:
        """Raises: Problem if it has ended badly, or at all."""
        code = self._process.poll()
        if code is not None and (code or must_live):
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise _failed(f"{self.name} {how}", self.last_words())

    def last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_TAIL:])

    def end(self, grace_s: float) -> None:
        """Wait for it to end, and end it if it does not."""
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Kill it if it is still there, with whatever it has started, and close the pipes."""
        if self._process.poll() is None:
            others = descendants(self.pid)
            self._process.kill()
            for pid in others:  # Ray's; they would notice by themselves, after a minute
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was written and never read
                pipe.close()
        self._errors.close()


class Crew:
    """See the top of this file."""

    def __init__(
        self,
        system: System,
        workers: int,
        shards: int,
        args: Mapping[str, Any],  # Any: JSON
        env: Mapping[str, str] | None = None,
        cores: Sequence[int] = (),
        start_s: float = START_S,
    ) -> None:
        """args: what every process is told besides the system's own.

        cores: of the workers, and of the servers; empty lets them run where they like.
        """
        self.system = system
        self.workers = workers
        self.shards = shards
        self.idle = Resident(0.0, 0.0)
        """Memory of the servers before they had parameters."""
        self.heard: list[dict[str, Any]] = []  # Any: JSON
        """What each worker said when it was ready."""
        self._args = {**args, **system.args, "workers": workers, "shards": shards}
        self._env = env or {}
        self._cores = cores
        self._start_s = start_s
        self._stack = contextlib.ExitStack()
        self._servers: list[Member] = []
        self._workers: list[Member] = []
        self._server_pids: list[int] = []

    @property
    def seats(self) -> range:
        """Of the workers; those of the servers come next."""
        return range(self.workers)

    def __enter__(self) -> "Crew":
        try:
            self._start()
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, failed: type[BaseException] | None = None, *_: object) -> None:
        try:
            if failed is None:  # else nobody waits for the end of a round: Ctrl-C is answered now
                self._stop()
        finally:
            for member in (*self._workers, *self._servers):
                member.close()
            self._workers, self._servers = [], []
            self._stack.close()

    def _start(self) -> None:
        folder = ""
        if self.system.has_folder:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="distbelief-"))
        self.board = Board.create()
        self._stack.callback(self.board.close)
        self.taken = [self.board.seat(index) for index in self.seats]
        common = {**self._args, "board": self.board.path, "folder": folder}
        num_servers = self.shards if self.system.server else 0
        for index in range(num_servers):
            spec = {
                **common,
                "role": self.system.server,
                "seat": self.workers + index,
                "index": index,
                "cores": self._cores[1:],
            }
            self._servers.append(Member(f"{self.system.label} server {index}", spec, self._env))
        for index in range(1 if self.system.is_one_process else self.workers):
            spec = {
                **common,
                "role": self.system.worker,
                "seat": index,
                "index": index,
                "cores": self._cores[:1],
            }
            self._workers.append(Member(f"{self.system.label} worker {index}", spec, self._env))
        deadline = time.monotonic() + self._start_s
        served = [server.hear(deadline) for server in self._servers]
        self._server_pids = [server.pid for server in self._servers]
        self.idle = self.resident()
        for worker in self._workers:
            worker.tell(servers=served)
        self.heard = [worker.hear(deadline) for worker in self._workers]
        for heard in self.heard:
            self._server_pids += heard.get("server_pids", [])
        self._rest()

    def _stop(self) -> None:
        self._signal(signal.SIGCONT)
        every = range(self.workers, self.workers + len(self._servers))
        for members, seats in ((self._workers, self.seats), (self._servers, every)):
            self.board.tell(Order.STOP, seats)
            deadline = time.monotonic() + STOP_S
            for member in members:
                member.end(max(0.05, deadline - time.monotonic()))

    # Orders

    def tell(self, order: Order, seats: range | None = None) -> None:
        """Give an order to the workers."""
        self._signal(signal.SIGCONT)
        self.board.tell(order, self.seats if seats is None else seats)

    def hold(self) -> None:
        """Have all workers wait, and wait until they do. Raises: Problem."""
        self.tell(Order.HOLD)
        self.wait_for(lambda: self.board.is_followed(self.seats), HOLD_S, "to finish a round")
        self._rest()

    def _rest(self) -> None:
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        """To those that would not rest by themselves."""
        if self.system.never_rests:
            for member in (*self._servers, *self._workers):
                with contextlib.suppress(ProcessLookupError):  # it has ended: `check` says so
                    os.kill(member.pid, number)

    def wait_for(self, is_so: Callable[[], bool], at_most_s: float, what: str) -> None:
        """Raises: Problem if it does not become so, or a process dies meanwhile."""
        deadline = time.monotonic() + at_most_s
        while not is_so():
            self.check()
            if time.monotonic() > deadline:
                words = next((w for m in self._workers if (w := m.last_words())), "")
                raise _failed(
                    f"{self.system.label} with {self.workers} workers took more than "
                    f"{at_most_s:.0f} s {what}",
                    words,
                )
            time.sleep(0.002)

    def check(self) -> None:
        """Raises: Problem if a process has ended."""
        for member in (*self._workers, *self._servers):
            member.check(must_live=True)

    def results(self) -> list[dict[str, Any]]:  # Any: JSON
        """What each worker says next, in its own time. Raises: Problem."""
        deadline = time.monotonic() + HOLD_S
        return [worker.hear(deadline) for worker in self._workers]

    # Looks

    def use(self) -> Use:
        """What all processes have used."""
        return use_of(member.pid for member in (*self._servers, *self._workers))

    def resident(self) -> Resident:
        """Memory of all servers together."""
        return sum((resident(pid) for pid in self._server_pids), Resident(0.0, 0.0))


def _failed(what: str, why: str = "") -> Problem:
    return Problem(
        "DB-ENV-006", what, why, "run it again; with fewer --workers it needs less memory"
    )
