"""Whole runs of the launcher, watched and disturbed from outside."""

import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

from distbelief.controller.pace import Progress
from distbelief.job import Job, load_job
from distbelief.live import LiveLine
from distbelief.result import Result

TINY = '''
import torch
from torch import nn

class Net(nn.Module):
    """A linear classifier; small enough that the parameter server is all there is."""
    def __init__(self, num_classes, in_channels, image_size):
        super().__init__()
        self.linear = nn.Linear(in_channels * image_size**2, num_classes)
    def forward(self, x):
        return self.linear(x.flatten(1))

class Slow(Net):
    """Steps of about 20 ms, so that a run lasts long enough to be disturbed."""
    def forward(self, x):
        import time
        time.sleep(0.02)
        return super().forward(x)

def broken():
    raise RuntimeError("the user's own mistake")
'''
"""A user's module; write it to a folder as tiny.py and launch from there."""


class Watch(LiveLine):
    """A live line that keeps what was said and calls `on_progress` with every look at the run."""

    def __init__(self, on_progress: Callable[[Progress], None] = lambda _: None) -> None:
        super().__init__(io.StringIO(), plain=True)
        self.said: list[str] = []
        self._on_progress = on_progress

    def say(self, text: str) -> None:
        self.said.append(text)

    def update(self, progress: Progress) -> None:
        self._on_progress(progress)


class KillOnce:
    """Sends a signal to a process of the run, once, when so many samples are done."""

    def __init__(
        self, runs: Path, name: str, after_samples: int, number: int = signal.SIGKILL
    ) -> None:
        self.killed: int | None = None
        self._runs = runs
        self._victim = name
        self._after_samples = after_samples
        self._number = number

    def __call__(self, progress: Progress) -> None:
        if self.killed is None and progress.samples >= self._after_samples:
            (file,) = self._runs.glob("*/processes.json")
            pids = {process["name"]: process["pid"] for process in json.loads(file.read_text())}
            if self._victim in pids:
                self.killed = pids[self._victim]
                os.kill(self.killed, self._number)


def num_trained(result: Result) -> int:
    """Samples that are in the parameters, each counted once: all of their parts, or some where
    a worker was killed in the middle of a push."""
    assert result.accounting["adds_up"]
    return result.accounting["applied"] + result.accounting["partial"]


def tiny_job(runs: Path, **changes: object) -> Job:
    """A job of the module above on digits, by subprocesses; `changes` by dotted key."""
    data = {
        "engine": "local",
        "warm_workers": True,  # torch is imported once a run, not once a process
        "run_dir": str(runs),
        "until": "2-epochs",
        "model.factory": "tiny:Net",
        "data.image_size": 8,
        "train.lr": 0.1,
        **changes,
    }
    return load_job(None, data, ())
