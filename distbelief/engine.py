"""Engine: the seam that starts the processes of a job. `local` is plain subprocesses."""

import contextlib
import os
import subprocess
import sys
from typing import Protocol

from distbelief.problem import Problem
from distbelief.spec import Spec


class Process(Protocol):
    """A process that was started."""

    @property
    def name(self) -> str: ...

    def poll(self) -> str | None:
        """None while it runs; then why it ended, empty if it ended by itself."""
        ...

    def kill(self) -> None:
        """End it at once and wait for that."""
        ...


class Engine(Protocol):
    """Starts processes; used by one thread."""

    @property
    def name(self) -> str: ...

    def start(self, spec: Spec) -> Process:
        """Raises: Problem if it cannot be started."""
        ...

    def close(self) -> None:
        """Give back what the engine itself holds; processes are ended before."""
        ...


class LocalProcess:
    """A subprocess in a session of its own, so that the terminal's Ctrl-C does not reach it."""

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
        if code is None or code == 0:
            return None if code is None else ""
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


class LocalEngine:
    """Subprocesses of this machine: quick tests, GPU boxes without Ray."""

    name = "local"

    def start(self, spec: Spec) -> LocalProcess:
        try:
            return LocalProcess(spec)
        except OSError as error:
            raise Problem("DB-ENV-003", f"{spec.name} could not be started: {error}") from error

    def close(self) -> None:
        pass
