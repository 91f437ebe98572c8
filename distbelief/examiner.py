"""Examiner: has the evaluator's process run beside a run, and tells what it finds.

Nothing here can hold up or end a run: an evaluator that is lost is started again some times, and
then the run goes on without one.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from distbelief.chronicle import AnyEntry, Evaluated
from distbelief.engine import LocalProcess
from distbelief.evaluator import FILE, Evaluation
from distbelief.problem import Problem
from distbelief.spec import Spec
from distbelief.tail import Tail

AGAIN_S = 5.0
TRIES = 3


class Examiner:
    """See the top of this file. Used by one thread."""

    def __init__(
        self, spec: Spec, say: Callable[[str], None], tell: Callable[[AnyEntry], None]
    ) -> None:
        """spec: of the evaluator; its later incarnations are the next ones. say: a line for the
        user. tell: of the monitor."""
        self._spec = spec
        self._say = say
        self._tell_monitor = tell
        self._tail = Tail(Path(spec.run_path) / FILE)
        self._process: LocalProcess | None = None
        self._tries = 0
        self._due = float("-inf")

    def look(self, controller: str) -> None:
        """Start it where it is not there, and tell what is new. controller: where that is now."""
        now = time.monotonic()
        process = self._process
        if process is not None and (why := process.poll()) is not None:
            self._process, self._due = None, now + AGAIN_S
            again = "" if self._tries < TRIES else "; it is not started again"
            if why:
                self._say(f"the evaluator ended ({why}){again}: see {self._spec.out}")
            else:
                self._tries = TRIES  # it has nothing to do, and said so in its log
        elif process is None and self._tries < TRIES and now >= self._due:
            self._tries += 1
            self._spec = replace(self._spec, inc=self._spec.inc + 1, controller=controller)
            try:
                self._process = LocalProcess(self._spec)
            except (OSError, Problem) as error:
                self._due = now + AGAIN_S
                self._say(f"the evaluator cannot be started: {error}")
        for line in self._tail.lines():
            self._tell(line)

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()

    def _tell(self, line: str) -> None:
        found = Evaluation(**json.loads(line))
        self._tell_monitor(
            Evaluated(at=found.at, samples=found.samples, loss=found.loss, top1=found.top1)
        )
        what = "average" if found.is_average else "values"
        if found.top1 is not None:
            self._say(f"{found.samples:,} samples: test top-1 {found.top1:.4f} of the {what}")
        elif found.loss is not None:
            self._say(f"{found.samples:,} samples: test loss {found.loss:.4g} of the {what}")
