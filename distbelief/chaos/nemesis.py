"""Nemesis: does to a run what a plan says, and writes down what it has done.

It knows the processes of a run from RUN/processes.json, and acts on those alone, by pid and only
while the pid is still theirs.

    RUN/faults.jsonl    {"kind", "target", "pid", "at", "until"}, seconds of the monotonic clock
    RUN/memory.jsonl    {"name", "pid", "anon", "at"}, bytes, of the shards, each second
"""

import contextlib
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distbelief.chaos.plan import Fault, Plan
from distbelief.chaos.proxy import Proxy
from distbelief.chaos.standing import Standing
from distbelief.controller.machine import CONTROLLER
from distbelief.folder import RunFolder, began_at

TICK_S = 0.01
LOOK_EVERY_S = 1.0
PATIENCE_S = 5.0
"""A kill that is to be spaced waits for so long, then it is left out."""
FILE_MAX = 2**18
"""Bytes: what a file may have while the disk is full. Ledgers and logs are smaller."""


@dataclass(frozen=True, slots=True)
class Victim:
    """A process of the run."""

    name: str
    inc: int
    pid: int
    began: str

    @property
    def is_alive(self) -> bool:
        return began_at(self.pid) == self.began

    def send(self, number: int) -> bool:
        """False if it has ended."""
        if not self.is_alive:
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


class Nemesis:
    """Of one run. Used by one thread."""

    def __init__(
        self, run: RunFolder, plan: Plan, base: int, proxies: Mapping[str, Proxy] | None = None
    ) -> None:
        """base: bytes that a shard would have without parameters (I6).

        proxies: by shard, what stands before it; needed for cuts.
        """
        self._run = run
        self._plan = plan
        self._base = base
        self._proxies = proxies or {}
        self._dead: list[Victim] = []
        """Workers that were killed and may have pushes that are on no disk yet."""
        self._undo: list[tuple[float, Callable[[], object]]] = []
        self.num_left_out = 0
        """Kills that would have lost something, though they were to be spaced."""

    def torment(self, is_over: Callable[[], bool]) -> None:
        """Go through the plan, from now on; ends early when `is_over` says so."""
        began = time.monotonic()
        looked_at = 0.0
        waiting: list[Fault] = []
        faults = list(self._plan.schedule())
        self._append("memory.jsonl", [{"name": "base", "anon": self._base}])
        try:
            while not is_over():
                now = time.monotonic()
                if now - began >= self._plan.seconds:
                    return
                self._undo_due(now)
                if now - looked_at >= LOOK_EVERY_S:
                    looked_at = now
                    self._look()
                while faults and faults[0].at_s <= now - began:
                    waiting.append(faults.pop(0))
                for fault in waiting[:]:
                    if self._do(fault):
                        waiting.remove(fault)
                    elif now - began - fault.at_s > PATIENCE_S:
                        self.num_left_out += 1
                        waiting.remove(fault)
                time.sleep(TICK_S)
        finally:
            self._undo_due(float("inf"))

    # Inside

    def _do(self, fault: Fault) -> bool:
        """False if it cannot be done yet."""
        kind = fault.kind
        alive = [one for one in self._processes() if one.is_alive]
        prefix = _PREFIX.get(kind.target, "/")
        victims = [one for one in alive if one.name == kind.target or one.name.startswith(prefix)]
        if not victims:
            return False
        victim = victims[int(fault.chance * len(victims))]
        if kind.kind == "kill":
            return self._kill(victim, spaced=kind.spaced)
        now = time.monotonic()
        until = now + fault.for_s
        if kind.kind == "pause":
            if not victim.send(signal.SIGSTOP):
                return False
            self._undo.append((until, lambda: victim.send(signal.SIGCONT)))
        elif kind.kind == "cut":
            proxy = self._proxies[victim.name]
            proxy.cut(kind.direction)
            self._undo.append((until, proxy.mend))
        elif kind.kind == "drop":
            proxy = self._proxies[victim.name]
            proxy.cut("from-shard")
            self._undo.append((until, proxy.drop))
        elif kind.kind == "lose":
            self._proxies[victim.name].lose_next = sum(one.name.startswith("w") for one in alive)
        else:
            before = resource.prlimit(victim.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(victim.pid, resource.RLIMIT_FSIZE, (FILE_MAX, before[1]))
            self._undo.append((until, lambda: _unlimit(victim, before)))
        self._note(kind.kind, victim, now, until)
        return True

    def _kill(self, victim: Victim, *, spaced: bool) -> bool:
        if not spaced:
            return self._end(victim)
        # It stands still while we look, so that what we saw is so when it dies.
        if not victim.send(signal.SIGSTOP):
            return False
        if self._may_die(victim) and self._end(victim):
            return True
        victim.send(signal.SIGCONT)
        return False

    def _may_die(self, victim: Victim) -> bool:
        """Killing it loses nothing: the other side still has what would be needed."""
        if victim.name == CONTROLLER:
            return True
        if not victim.name.startswith("shard"):
            shards = [one for one in self._processes() if one.name.startswith("shard")]
            return all(
                shard.is_alive
                and Standing(self._run.snapshots / shard.name).has_all(victim.name, victim.inc)
                for shard in shards
            )
        for dead in self._dead[:]:
            folders = self._run.snapshots.glob("shard*")
            if all(Standing(folder).is_saved(dead.name, dead.inc) for folder in folders):
                self._dead.remove(dead)
        return not self._dead

    def _end(self, victim: Victim) -> bool:
        at = time.monotonic()
        if not victim.send(signal.SIGKILL):
            return False
        self._note("kill", victim, at, at)
        if victim.name.startswith("w"):
            self._dead.append(victim)
        return True

    def _undo_due(self, now: float) -> None:
        for until, undo in self._undo[:]:
            if until <= now:
                undo()
                self._undo.remove((until, undo))

    def _processes(self) -> list[Victim]:
        """The newest of each name."""
        try:
            rows = json.loads((self._run.path / "processes.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return [Victim(row["name"], row["inc"], row["pid"], row["began"]) for row in rows]

    def _look(self) -> None:
        lines: list[dict[str, Any]] = []  # Any: JSON
        for one in self._processes():
            anon = anon_of(one.pid)
            if one.name.startswith("shard") and anon and one.is_alive:
                what = {"name": one.name, "pid": one.pid, "anon": anon}
                lines.append({**what, "at": time.monotonic()})
        self._append("memory.jsonl", lines)

    def _note(self, kind: str, victim: Victim, at: float, until: float) -> None:
        what = {"kind": kind, "target": victim.name, "pid": victim.pid, "at": at, "until": until}
        self._append("faults.jsonl", [what])

    def _append(self, name: str, lines: Iterable[dict[str, Any]]) -> None:  # Any: JSON
        with (self._run.path / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


_PREFIX = {"shard": "shard", "worker": "w"}


def anon_of(pid: int) -> int:
    """Bytes of memory that a process holds, without what it shares; 0 if there is none."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return 1024 * int(found[0]) if found else 0


def _unlimit(victim: Victim, before: tuple[int, int]) -> None:
    if victim.is_alive:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(victim.pid, resource.RLIMIT_FSIZE, before)
