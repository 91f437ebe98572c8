"""Run folders as a launcher leaves them, without a launcher."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from distbelief.folder import Launcher, RunFolder
from distbelief.result import Result

CONFIG = """
workers = 2
shards = 2
engine = "local"
until = "2-epochs"

[script]
path = ""
args = []

[model]
factory = "tiny:Net"

[data]
source = "digits"

[train]
lr = 0.1
"""


def make_run(parent: Path, run: str, config: str = CONFIG) -> RunFolder:
    """A run that its launcher, this process, has just started."""
    folder = RunFolder.make(parent, run)
    folder.config.write_text(config)
    folder.write_launcher(Launcher.of_this_process("0.1"))
    return folder


def kill(folder: RunFolder) -> None:
    """As after kill -9 of the launcher."""
    launcher = folder.launcher
    assert launcher is not None
    folder.write_launcher(replace(launcher, process_began="1"))


def move_away(folder: RunFolder, started_s_ago: float = 0.0) -> None:
    """As if the launcher were on another machine."""
    launcher = folder.launcher
    assert launcher is not None
    began = launcher.started_at - started_s_ago
    folder.write_launcher(replace(launcher, host="another", started_at=began))


def write_status(folder: RunFolder, **changes: Any) -> None:
    """A healthy look at a run in training, with changes."""
    status = {
        "v": 1,
        "at": time.time(),
        "state": "training",
        "samples": 1000,
        "total_samples": 2874,
        "updates": 31,
        "loss": 0.5,
        "samples_per_s": 123.4,
        "eta_s": 15.2,
        "staleness": {"p50": 1, "p95": 2, "max": 3},
        "workers": {n: {"state": "training", "samples": 500} for n in ("w0", "w1")},
        "shards": {n: {"state": "serving", "storage_error": ""} for n in ("shard0", "shard1")},
        "workers_lost": 0,
        "refused": 0,
        "bad_samples": 0,
        **changes,
    }
    folder.write("status.json", status)


def write_checkpoint(folder: RunFolder) -> None:
    folder.write(
        "checkpoint.json",
        {"v": 1, "at": time.time() - 40, "attempt": 1, "samples": 800, "updates": 25},
    )


def end(folder: RunFolder, exit: str = "done", **changes: Any) -> dict[str, Any]:
    """The run ends so; returns its result."""
    result = Result(run=folder.run, run_dir=str(folder.path), exit=exit, samples=2874, updates=90)
    for name, value in changes.items():
        setattr(result, name, value)
    result.write(folder.path)
    written: dict[str, Any] = json.loads(result.to_json())
    return written
