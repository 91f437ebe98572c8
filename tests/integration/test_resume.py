"""Stop and resume: the same versions, counts and place in the data, at whatever moment."""

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from distbelief.folder import RunFolder
from distbelief.launcher import launch, resume
from distbelief.problem import Problem
from distbelief.result import Result
from distbelief.stop import Stop
from tests.helpers.runs import TINY, Watch, tiny_job

DIGITS = 1437


class StopAt(Watch):
    """Asks to stop at a moment of the run: at so many samples, or so long after its start."""

    def __init__(self, samples: int | None = None, after_s: float | None = None, level: int = 1):
        super().__init__(self._look)
        self.stop = Stop()
        self._samples, self._level = samples, level
        self._at = None if after_s is None else time.monotonic() + after_s

    def _look(self, progress) -> None:
        is_time = self._at is not None and time.monotonic() >= self._at
        if is_time or (self._samples is not None and progress.samples >= self._samples):
            self.stop.raise_to(self._level)


def start(job, watch: StopAt) -> Result:
    return launch(job, live=watch, stop=watch.stop)


def go_on(result: Result, job, watch: StopAt) -> Result:
    return resume(RunFolder(Path(result.run_dir)), job, live=watch, stop=watch.stop)


@pytest.mark.long
def test_a_run_that_was_stopped_ends_as_one_that_was_not(user_folder: Path):
    job = tiny_job(user_folder / "runs", **{"until": "5-epochs", "model.factory": "tiny:Slow"})
    whole = launch(job, live=Watch())
    assert whole.exit == "done"

    stopped = start(job, StopAt(samples=2000))
    assert stopped.exit == "stopped"
    assert 2000 <= stopped.samples < 5 * DIGITS
    assert stopped.saved is not None
    assert (stopped.saved["samples"], stopped.saved["updates"]) == (
        stopped.samples,
        stopped.updates,
    )
    assert stopped.resume.startswith(f"distbelief resume {stopped.run}")

    resumed = go_on(stopped, job, StopAt())
    assert resumed.exit == "done"
    assert (resumed.run, resumed.attempt, resumed.resume) == (stopped.run, 2, "")
    assert resumed.samples == whole.samples == 5 * DIGITS
    # As many updates, but for batches that a stop has cut otherwise at the ends of leases.
    assert abs(resumed.updates - whole.updates) <= 4
    assert whole.eval is not None
    assert resumed.eval is not None
    assert resumed.eval.top1 == pytest.approx(whole.eval.top1, abs=0.03)
    assert sum(resumed.worker_samples.values()) == resumed.samples - stopped.samples


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_stops", [2, pytest.param(20, marks=pytest.mark.long)])
@pytest.mark.long
def test_stops_at_random_moments_lose_nothing(user_folder: Path, num_stops: int):
    chance = random.Random(7)
    job = tiny_job(
        user_folder / "runs",
        **{"until": "1000-epochs", "shards": 1, "model.factory": "tiny:Slow", "save.every_s": 1.0},
    )
    result = start(job, StopAt(samples=1))
    for _ in range(num_stops):
        # From the first moment of starting up to the middle of training.
        before = result
        result = go_on(before, job, StopAt(after_s=chance.uniform(0.0, 4.5)))
        assert (result.exit, result.error) == ("stopped", None)
        assert before.saved is not None
        assert result.saved is not None
        trained = sum(result.worker_samples.values())
        # Nothing is lost: what was applied before the stop is there after it, and everything
        # that was trained since is in what was saved.
        assert result.samples == before.samples + trained
        assert result.saved["samples"] == result.samples
        assert result.unfinished == 0 or trained == 0
    num_epochs = result.samples // DIGITS + 1
    result = go_on(result, replace(job, until=f"{num_epochs}-epochs"), StopAt())
    assert (result.exit, result.attempt) == ("done", num_stops + 2)
    assert result.samples == num_epochs * DIGITS
    assert result.unfinished == 0


@pytest.mark.long
def test_a_stop_now_says_what_it_loses_and_resume_goes_on_before_it(user_folder: Path):
    job = tiny_job(
        user_folder / "runs",
        **{"until": "6-epochs", "model.factory": "tiny:Slow", "save.every_s": 0.5},
    )
    watch = StopAt(samples=3000, level=2)
    stopped = start(job, watch)
    assert stopped.exit == "stopped"
    assert stopped.saved is not None
    kept = stopped.saved["samples"]
    assert 0 < kept <= stopped.samples
    assert any(f"The last checkpoint has {kept:,} samples" in text for text in watch.said)
    resumed = go_on(stopped, job, StopAt())
    assert resumed.exit == "done"
    # What was trained on between the data's position and the snapshots (a shard may have finished
    # a newer one than it could still tell of) is trained on again; nothing is passed over.
    assert resumed.samples >= 6 * DIGITS
    in_flight = 2 * 4 * 32  # a lease of each worker
    assert resumed.samples - 6 * DIGITS <= stopped.samples + in_flight


@pytest.mark.long
def test_resume_with_another_rate_and_a_later_end(user_folder: Path):
    job = tiny_job(user_folder / "runs", until="2-epochs")
    first = start(job, StopAt())
    assert first.exit == "done"
    with pytest.raises(Problem, match="has done all of its 2-epochs") as refused:
        go_on(first, job, StopAt())
    assert refused.value.code == "DB-RUN-009"
    longer = replace(job, until="3-epochs", train=replace(job.train, lr=0.01))
    resumed = go_on(first, longer, StopAt())
    assert (resumed.exit, resumed.samples) == ("done", 3 * DIGITS)
    assert "lr = 0.01" in RunFolder(Path(first.run_dir)).config.read_text()


def test_a_changed_model_is_refused_by_its_first_differing_tensor(user_folder: Path):
    (user_folder / "changing.py").write_text(TINY)
    job = tiny_job(user_folder / "runs", **{"model.factory": "changing:Net"})
    stopped = start(job, StopAt(samples=500))
    changed = TINY.replace("num_classes)\n", "num_classes, bias=False)\n", 1)
    (user_folder / "changed.py").write_text(changed)
    other = replace(job, model=replace(job.model, factory="changed:Net"))
    with pytest.raises(
        Problem, match=r"linear\.bias \[10\] float32 at 640 .* only here"
    ) as refused:
        go_on(stopped, other, StopAt())
    assert refused.value.code == "DB-MODEL-006"
    # Nothing is lost by that: the run still goes on with its own model.
    assert go_on(stopped, job, StopAt()).exit == "done"


def test_what_cannot_be_resumed_is_said(user_folder: Path):
    job = tiny_job(user_folder / "runs")
    stopped = start(job, StopAt(after_s=0.0))  # before anything is there to be saved
    assert (stopped.exit, stopped.saved, stopped.resume) == ("stopped", None, "")
    with pytest.raises(Problem, match="has saved nothing to go on from") as refused:
        go_on(stopped, job, StopAt())
    assert refused.value.code == "DB-RUN-007"

    done = start(job, StopAt())
    with pytest.raises(Problem, match="has snapshots of 2 shards, the job has 3"):
        go_on(done, replace(job, shards=3), StopAt())
    (user_folder / "short.py").write_text(SHORT)
    with pytest.raises(Problem, match="the data has 60 samples and had 1437"):
        go_on(done, replace(job, data=replace(job.data, source="short:data")), StopAt())
    rule = replace(job.train, optimizer="adagrad", momentum=None)
    with pytest.raises(Problem, match="was trained with SGD"):
        go_on(done, replace(job, train=rule), StopAt())


SHORT = """
import torch
from torch.utils.data import TensorDataset

def data(split):
    if split == "test":
        return None
    found = TensorDataset(torch.zeros(60, 1, 8, 8), torch.arange(60) % 10)
    found.num_classes = 10
    found.in_channels = 1
    return found
"""
