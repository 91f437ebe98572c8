"""Journal: what a run writes down about itself while it goes on, in its run folder.

status.json for whoever looks, checkpoint.json for `resume`, processes.json for debuggers. A disk
that takes no more is told once and does not end the run.
"""

import logging
import socket
import time
from collections.abc import Mapping
from typing import Any

from distbelief.controller.machine import Controller
from distbelief.folder import RunFolder, began_at

logger = logging.getLogger(__name__)

STATUS_EVERY_S = 1.0


class Journal:
    """Writes a run's small files when there is something new. Used by one thread."""

    def __init__(
        self, folder: RunFolder, controller: Controller, num_shards: int, attempt: int
    ) -> None:
        """attempt: 1, and one more each time the run is resumed."""
        self.state = "starting"
        """starting, training, stopping, saving, evaluating or ended."""
        self.checkpoint: Mapping[str, Any] | None = folder.checkpoint  # Any: JSON
        """The newest one, of this attempt or the one before."""
        self._folder = folder
        self._controller = controller
        self._num_shards = num_shards
        self._attempt = attempt
        self._processes: dict[str, int] = {}
        self._saved: dict[str, tuple[int, str]] = {}
        self._looked_at = float("-inf")
        self._is_failing = False

    def enter(self, state: str, now: float) -> None:
        """The run has come to another state: write that down at once."""
        self.state = state
        self._looked_at = float("-inf")
        self.look(now)

    def look(self, now: float) -> None:
        """Write what has changed since the last look."""
        controller = self._controller
        processes = {member.name: member.inc for member in controller.members.values()}
        if processes != self._processes:
            self._processes = processes
            here = socket.gethostname()
            rows = [
                {**row, "began": began_at(int(str(row["pid"]))) if row["host"] == here else ""}
                for row in controller.processes()
            ]
            self._write("processes.json", rows)
        if now - self._looked_at >= STATUS_EVERY_S:
            self._looked_at = now
            self._write("status.json", self._status(now))
        saved = {name: (one.epoch, one.name) for name, one in controller.saves.newest.items()}
        if saved != self._saved:
            self._saved = saved
            self.write_checkpoint()

    def write_checkpoint(self) -> None:
        """Write what `resume` goes on from, if all shards have saved something."""
        found = self._controller.checkpoint()
        if found is not None:
            self.checkpoint = {"v": 1, "at": time.time(), "attempt": self._attempt, **found}
            self._write("checkpoint.json", self.checkpoint)

    def _status(self, now: float) -> dict[str, Any]:  # Any: JSON
        controller = self._controller
        progress = controller.progress(now)
        shards = {f"shard{index}" for index in range(self._num_shards)}
        serving = {f"shard{index}" for index in controller.endpoints}
        return {
            "v": 1,
            "at": time.time(),
            "state": self.state,
            "samples": progress.samples,
            "total_samples": progress.total_samples,
            "updates": progress.updates,
            "loss": progress.loss,
            "samples_per_s": round(progress.samples_per_s, 1),
            "eta_s": progress.eta_s,
            "staleness": progress.staleness.summary(),
            "workers": controller.workers(),
            "shards": {
                name: {
                    "state": "serving" if name in serving else "starting",
                    "storage_error": controller.storage_errors.get(name, ""),
                }
                for name in sorted(shards)
            },
            "workers_lost": len(controller.lost),
            "refused": progress.refused,
            "bad_samples": len(controller.bad_samples),
        }

    def _write(self, name: str, data: Any) -> None:  # Any: JSON
        try:
            self._folder.write(name, data)
        except OSError as error:
            if not self._is_failing:
                logger.error("%s/%s cannot be written: %s", self._folder.path, name, error)
            self._is_failing = True
        else:
            self._is_failing = False
