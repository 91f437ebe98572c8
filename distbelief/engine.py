"""Engine: the seam that starts the processes of a job. `local` is plain subprocesses."""

import contextlib
import os
import select
import signal
import subprocess
import sys
from typing import Protocol

from distbelief.folder import RunFolder
from distbelief.job import Job
from distbelief.problem import Problem
from distbelief.spec import Spec
from distbelief.zygote import Zygote

KILL_TIMEOUT_S = 10.0


class Process(Protocol):
    """A process that was started."""

    @property
    def name(self) -> str: ...

    @property
    def is_reachable(self) -> bool:
        """Its host answers, as far as can be told."""
        ...

    def poll(self) -> str | None:
        """None while it runs, or waits for a place; then why it ended, empty if by itself."""
        ...

    def kill(self) -> None:
        """End it at once and wait for that."""
        ...


class Engine(Protocol):
    """Starts processes; used by one thread."""

    @property
    def name(self) -> str: ...

    def settle(self, job: Job, folder: RunFolder) -> Job:
        """Get ready for a run: see that it fits. Called once, before anything is started.

        Returns: the job, with the address at which its processes reach the launcher. Raises:
        Problem.
        """
        ...

    def start(self, spec: Spec) -> Process:
        """Raises: Problem if it cannot be started."""
        ...

    def look(self, now: float) -> None:
        """Do what is due; to be called often."""
        ...

    def leaving(self) -> list[str]:
        """Processes whose host is about to be taken away, told once each."""
        ...

    def ask_to_end(self, name: str, pid: int) -> None:
        """SIGTERM to a process that was started here."""
        ...

    def close(self) -> None:
        """Give back what the engine itself holds; processes are ended before."""
        ...


class LocalProcess:
    """A subprocess in a session of its own, so that the terminal's Ctrl-C does not reach it."""

    is_reachable = True

    def __init__(self, spec: Spec) -> None:
        self.name = spec.name
        with spec.out.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "distbelief.process"],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                cwd=spec.cwd,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        assert self._process.stdin is not None
        # A process that died at once is found by poll, not here.
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(spec.to_json().encode())

    def poll(self) -> str | None:
        code = self._process.poll()
        return None if code is None else _why(code)

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


class ForkedProcess:
    """A child of the zygote. A descriptor of it is watched: its pid may be used again."""

    is_reachable = True

    def __init__(self, spec: Spec, zygote: Zygote) -> None:
        self.name = spec.name
        self.pid = zygote.fork(spec)
        self._zygote = zygote
        self._why: str | None = None
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:  # it has died, and was reaped
            self._pidfd = -1

    def poll(self) -> str | None:
        if self._why is None and self._has_ended(0):
            status = self._zygote.status(self.pid)
            code = None if status is None else os.waitstatus_to_exitcode(status)
            self._why = "it is gone" if code is None else _why(code)
            self._close()
        return self._why

    def kill(self) -> None:
        if self._why is None and not self._has_ended(0):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._has_ended(KILL_TIMEOUT_S)
        if self._why is None:
            self._why = "killed by the launcher"
        self._close()

    def _has_ended(self, timeout_s: float) -> bool:
        if self._pidfd < 0:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def _close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def _why(code: int) -> str:
    """Of an exit code as of subprocess."""
    if code == 0:
        return ""
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


class LocalEngine:
    """Subprocesses of this machine: quick tests, GPU boxes without Ray.

    Shards are forked from a process that has imported torch, so that one that was killed is back
    in a fraction of a second. Workers are only where the job asks for it: they run what the user
    has written, and that may want to be a process from its beginning on.
    """

    name = "local"

    def __init__(self) -> None:
        self._zygote: Zygote | None = None

    def settle(self, job: Job, folder: RunFolder) -> Job:
        return job

    def look(self, now: float) -> None:
        """Nothing is ever due."""

    def leaving(self) -> list[str]:
        return []

    def ask_to_end(self, name: str, pid: int) -> None:
        os.kill(pid, signal.SIGTERM)

    def start(self, spec: Spec) -> LocalProcess | ForkedProcess:
        try:
            if spec.is_warm and hasattr(os, "pidfd_open"):
                return ForkedProcess(spec, self._living_zygote())
            return LocalProcess(spec)
        except OSError as error:
            raise Problem("DB-ENV-003", f"{spec.name} could not be started: {error}") from error

    def close(self) -> None:
        if self._zygote is not None:
            self._zygote.close()

    def _living_zygote(self) -> Zygote:
        if self._zygote is not None and not self._zygote.is_alive:
            self._zygote.close()
            self._zygote = None
        if self._zygote is None:
            self._zygote = Zygote()
        return self._zygote
