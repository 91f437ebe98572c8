"""State: what a run is at, judged by the files in its folder. No process is asked."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distbelief.folder import RunFolder

SILENT_S = 10.0
"""A launcher writes status.json every second; after so long without, something is wrong."""
QUIET_STATES = ("starting", "saving", "evaluating")
"""Here the launcher may be busy for long and write nothing; it counts while its process lives."""
EXIT_CODES = {"done": 0, "stopped": 0, "failed": 1, "degraded": 4, "storage": 1, "killed": 1}
DEGRADED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What a run is at."""

    word: str
    """starting, training, stopping, saving, evaluating; done, stopped, failed, degraded, storage;
    killed: its launcher is gone and left no result."""
    is_live: bool
    troubles: tuple[str, ...] = ()
    """What a person should look at."""

    @property
    def exit_code(self) -> int:
        """Of `distbelief status`."""
        if self.is_live:
            return DEGRADED if self.troubles else 0
        return EXIT_CODES.get(self.word, 1)


def state_of(folder: RunFolder, now: float | None = None) -> RunState:
    """Judge a run. now: in Unix seconds."""
    now = time.time() if now is None else now
    # In this order: a run that ends between two looks has written its result before its
    # launcher is gone.
    launcher = folder.launcher
    is_alive = None if launcher is None else launcher.is_alive
    result = folder.result
    if result is not None:
        return RunState(word=str(result["exit"]), is_live=False, troubles=tuple(_of_result(result)))
    if launcher is None or is_alive is False:
        return RunState(
            word="killed",
            is_live=False,
            troubles=("the launcher is gone and left no result: it was killed",),
        )
    status = folder.status
    if status is None or status["at"] < launcher.started_at:  # of the attempt before
        status = {"at": launcher.started_at, "state": "starting"}
    return RunState(
        word=str(status["state"]),
        is_live=True,
        troubles=tuple(_of_status(status, now, is_alive is True)),
    )


def _of_result(result: Mapping[str, Any]) -> Iterator[str]:  # Any: JSON
    if result.get("error"):
        yield str(result["error"]["text"])


def _of_status(
    status: Mapping[str, Any],
    now: float,
    is_seen: bool,  # Any: JSON
) -> Iterator[str]:
    silent_s = now - status["at"]
    if silent_s > SILENT_S and not (is_seen and status["state"] in QUIET_STATES):
        yield f"the launcher has said nothing for {silent_s:.0f} s"
    lost = [name for name, w in status.get("workers", {}).items() if w.get("state") == "lost"]
    if lost:
        yield f"lost workers: {', '.join(lost)}"
    elif status.get("workers_lost"):
        yield f"lost workers: {status['workers_lost']}"
    for name, shard in status.get("shards", {}).items():
        if shard.get("state") == "lost":
            yield f"{name} is lost"
        if shard.get("storage_error"):
            yield f"{name} cannot save: {shard['storage_error']}"
    if status.get("refused"):
        yield f"parts of pushes that shards refused: {status['refused']}"
