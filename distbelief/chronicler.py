"""Chronicler: puts the run as the launcher sees it into what the monitor is told of it.

It looks about once a second and compares with what it saw before; what happens in between, such as
why a process was lost, it is told. No socket, no process; times are passed in.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from distbelief.chronicle import AnyEntry, Event, RunReport, ShardState, WorkerState
from distbelief.controller.machine import CONTROLLER, Controller
from distbelief.param_server.wire import sayable

EVERY_S = 1.0
CHECKPOINT_S = 60.0
"""Between two that are told: small jobs save every second, and nobody looks for that."""
TEXT_MAX = 400
_STATES = {"leaving": "draining", "drained": "left"}
"""Of a worker: the controller's words where they are others."""


class Staffed(Protocol):
    """What is asked of the staff."""

    @property
    def workers(self) -> list[str]: ...

    @property
    def shards(self) -> list[str]: ...

    def num_lost(self, name: str) -> int: ...

    def is_given_up(self, name: str) -> bool: ...


class Chronicler:
    """See the top of this file. Used by the launcher's thread."""

    def __init__(self, controller: Controller, staff: Staffed) -> None:
        self._controller = controller
        self._staff = staff
        self._noticed: list[tuple[str, str, str]] = []
        self._looked_at = float("-inf")
        self._state = ""
        self._incs: dict[str, int] = {}
        """By process that serves or trains, its number."""
        self._lost_at: dict[str, float] = {}
        self._saved: object = None
        self._saved_at = float("-inf")
        """When it was told last."""
        self._storage: dict[str, str] = {}
        self._quarantined: dict[str, str] = {}

    def notice(self, kind: str, who: str, text: str) -> None:
        """Something has happened."""
        self._noticed.append((kind, who, text))

    def look(
        self,
        now: float,
        wall: float,
        state: str,
        checkpoint: Mapping[str, Any] | None,  # Any: JSON
        controller_restarts: int,
        dropped: int,
    ) -> list[AnyEntry]:
        """What there is to tell since the last look; the run's own report once a second.

        now: on the controller's clock. wall: unix time. state: the journal's.
        """
        entries: list[AnyEntry] = []
        if self._noticed:
            entries += self._arrivals(wall)  # who is lost had come before: that is no return
        for kind, who, text in self._noticed:
            if kind == "crash":
                self._lost_at[who] = wall
            entries.append(self._event(wall, kind, who, text))
        self._noticed.clear()
        if now - self._looked_at < EVERY_S and state == self._state:
            return entries
        self._looked_at = now
        if state != self._state:
            self._state = state
            entries.append(self._event(wall, "state", "", f"the run is {state}"))
        entries += self._arrivals(wall)
        entries += self._saves(wall, checkpoint)
        entries += self._troubles(wall)
        entries.append(self._report(now, wall, state, controller_restarts, dropped))
        return entries

    # Inside

    def _event(self, wall: float, kind: str, who: str, text: str) -> Event:
        member = self._controller.members.get(who)
        node = "" if member is None else member.host
        return Event(at=wall, kind=kind, who=who, text=sayable(text, TEXT_MAX), node=node)

    def _arrivals(self, wall: float) -> list[AnyEntry]:
        controller = self._controller
        there = {f"shard{index}" for index in controller.endpoints} | set(controller.workers())
        entries: list[AnyEntry] = []
        for name, member in controller.members.items():
            if member.inc <= self._incs.get(name, 0) or not (name in there or name == CONTROLLER):
                continue
            is_first = name not in self._incs
            self._incs[name] = member.inc
            lost_at = self._lost_at.pop(name, None)
            if lost_at is not None:
                text = f"{name} is back after {wall - lost_at:.1f} s"
                entries.append(self._event(wall, "recover", name, text))
            elif is_first and name != CONTROLLER and not name.startswith("shard"):
                entries.append(self._event(wall, "join", name, f"{name} has joined"))
        return entries

    def _saves(self, wall: float, checkpoint: Mapping[str, Any] | None) -> list[AnyEntry]:
        if checkpoint is None or checkpoint["shards"] == self._saved:
            return []
        if wall - self._saved_at < CHECKPOINT_S:
            return []
        self._saved, self._saved_at = checkpoint["shards"], wall
        text = (
            f"checkpoint of {checkpoint['samples']:,} samples, {len(checkpoint['shards'])} shards"
        )
        return [self._event(wall, "checkpoint", "", text)]

    def _troubles(self, wall: float) -> list[AnyEntry]:
        controller, entries = self._controller, list[AnyEntry]()
        for name, text in controller.storage_errors.items():
            if name not in self._storage:
                entries.append(self._event(wall, "storage", name, f"{name} cannot save: {text}"))
        for name in self._storage.keys() - controller.storage_errors.keys():
            entries.append(self._event(wall, "storage", name, f"{name} saves again"))
        self._storage = dict(controller.storage_errors)
        for name, text in controller.quarantined.items():
            if self._quarantined.get(name) != text:
                entries.append(self._event(wall, "quarantine", name, f"{name}: {text}"))
        self._quarantined = dict(controller.quarantined)
        return entries

    def _report(
        self, now: float, wall: float, state: str, controller_restarts: int, dropped: int
    ) -> RunReport:
        controller = self._controller
        progress, queue = controller.progress(now), controller.queue
        length = queue.num_samples
        return RunReport(
            at=wall,
            state=state,
            samples=progress.samples,
            total_samples=progress.total_samples,
            updates=progress.updates,
            loss=progress.loss,
            samples_per_s=progress.samples_per_s,
            eta_s=progress.eta_s,
            epoch=progress.samples / length if length else None,
            refused=progress.refused,
            workers=[self._worker(name) for name in sorted(self._staff.workers, key=_number)],
            shards=[self._shard(name) for name in sorted(self._staff.shards, key=_number)],
            controller_restarts=controller_restarts,
            dropped=dropped,
            accounting={
                "handed_out": queue.handed_out,
                "returned": queue.returned_samples,
                "in_flight": queue.in_flight,
                **{k: int(v) for k, v in controller.account.as_dict().items()},
            },
        )

    def _worker(self, name: str) -> WorkerState:
        controller, staff = self._controller, self._staff
        member = controller.members.get(name)
        known = controller.workers().get(name, {})
        state = str(known.get("state", "starting"))
        state = _STATES.get(state, state)
        if state == "lost" and staff.is_given_up(name):
            state = "given-up"
        return WorkerState(
            name=name,
            inc=0 if member is None else member.inc,
            pid=0 if member is None else member.pid,
            host="" if member is None else member.host,
            state=state,
            samples=controller.worker_samples[name],
            restarts=staff.num_lost(name),
        )

    def _shard(self, name: str) -> ShardState:
        controller = self._controller
        member = controller.members.get(name)
        state = "starting" if member is None else "lost"
        if int(name.removeprefix("shard")) in controller.endpoints:
            state = "serving"
        if name in controller.ended:
            state = "ended"
        return ShardState(
            name=name,
            inc=0 if member is None else member.inc,
            pid=0 if member is None else member.pid,
            host="" if member is None else member.host,
            state=state,
            restarts=self._staff.num_lost(name),
            storage_error=sayable(controller.storage_errors.get(name, ""), TEXT_MAX),
        )


def _number(name: str) -> int:
    return int(name.lstrip("abcdefghijklmnopqrstuvwxyz") or 0)
