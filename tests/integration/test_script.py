"""A user's script as several processes: shared data, one worker that fails, stop and resume."""

import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from distbelief.folder import RunFolder
from distbelief.job import Job, ScriptConfig
from distbelief.launcher import launch, resume
from distbelief.loaded import evaluate_run
from distbelief.problem import Problem
from tests.helpers.runs import KillOnce, Watch, num_trained

NUM_SAMPLES, NUM_EPOCHS = 1000, 4

SCRIPT = """
import sys, time, torch
from torch import nn
from torch.utils.data import TensorDataset
from distbelief import DataLoader, Downpour, worker

me = worker().index
x = torch.randn({num_samples}, 8, generator=torch.Generator().manual_seed(1))
data = TensorDataset(x, (x.sum(1) > 0).long())
torch.manual_seed(0)
model = nn.Linear(8, {outputs})
{before}
optimizer = Downpour(model.named_parameters(), lr=0.1)
loader = DataLoader(data, batch_size=10, shuffle=True)
steps = 0
for epoch in range({num_epochs}):
    for inputs, targets in loader:
        {inside}
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        steps += 1
        time.sleep({pause})
    print("epoch", epoch, "argv", sys.argv[1:], flush=True)
{after}
"""


def write(
    folder: Path,
    before: str = "",
    inside: str = "",
    after: str = "",
    outputs: str = "2",
    pause: float = 0.001,
) -> Job:
    text = SCRIPT.format(
        num_samples=NUM_SAMPLES,
        num_epochs=NUM_EPOCHS,
        before=before,
        inside=textwrap.indent(inside, " " * 8).strip() or "pass",
        after=after,
        outputs=outputs,
        pause=pause,
    )
    path = folder / "train.py"
    path.write_text(text)
    return Job(
        engine="local",
        workers=3,
        shards=1,
        run_dir=str(folder / "runs"),
        script=ScriptConfig(path=str(path), args=("--colour", "blue")),
    )


def test_workers_share_the_data_and_see_their_own_argv(tmp_path: Path):
    watch = Watch()
    result = launch(write(tmp_path), live=watch)
    assert (result.exit, result.error) == ("done", None)
    assert result.samples == NUM_EPOCHS * NUM_SAMPLES
    assert len(result.worker_samples) == 3
    assert "epoch 3 argv ['--colour', 'blue']" in watch.said  # of the first worker
    for w in ("w0", "w1", "w2"):
        out = (Path(result.run_dir) / "logs" / f"{w}.out").read_text()
        assert out.count("argv ['--colour', 'blue']") == NUM_EPOCHS
    saved = load_file(RunFolder(Path(result.run_dir)).model)
    assert {name: list(value.shape) for name, value in saved.items()} == {
        "weight": [2, 8],
        "bias": [2],
    }


def test_a_script_that_raises_on_one_worker_ends_the_run_with_its_own_frames(tmp_path: Path):
    job = write(tmp_path, inside='if me == 1 and steps == 5:\n    raise KeyError("colour")')
    result = launch(job, live=Watch())
    assert result.exit == "failed"
    assert result.error is not None
    assert result.error["code"] == "DB-SCRIPT-001"
    assert "w1: train.py raised KeyError: 'colour'" in result.error["text"]
    assert 'raise KeyError("colour")' in result.error["text"]
    assert "runpy" not in result.error["text"]
    log = (Path(result.run_dir) / "logs" / "w1.log").read_text()
    assert "Traceback (most recent call last)" in log


@pytest.mark.long
def test_a_script_that_ends_early_on_one_worker_leaves_its_data_to_the_others(tmp_path: Path):
    result = launch(
        write(tmp_path, inside="if me == 1 and steps == 5:\n    sys.exit()"), live=Watch()
    )
    assert (result.exit, result.error) == ("done", None)
    assert result.worker_samples["w1"] == 50
    assert result.samples == NUM_EPOCHS * NUM_SAMPLES
    assert result.unfinished == 0


@pytest.mark.long
def test_kill_9_of_one_worker_of_a_script_leaves_its_data_to_the_others(tmp_path: Path):
    job = write(tmp_path, pause=0.01)
    kill = KillOnce(tmp_path / "runs", "w2", 600)
    result = launch(job, live=Watch(kill))
    assert kill.killed is not None
    assert (result.exit, result.workers_lost) == ("done", 1)
    assert num_trained(result) == NUM_EPOCHS * NUM_SAMPLES


@pytest.mark.parametrize(
    ("parts", "code", "text"),
    [
        (
            {"inside": "if me == 0 and steps == 3:\n    sys.exit(7)"},
            "DB-SCRIPT-002",
            "w0: train.py ended itself with exit code 7",
        ),
        pytest.param(
            {"inside": "continue"},
            "DB-SCRIPT-003",
            "ended without a single optimizer.step()",
            marks=pytest.mark.long,
        ),
        ({"before": "sys.exit()"}, "DB-SCRIPT-003", "ended without making a Downpour"),
        pytest.param(
            {"outputs": "2 + (me == 1)"},
            "DB-RUN-001",
            "8] float32 at 0 (lr 0.1, weight_decay 0.0) here, weight [",  # 2 and 3, or 3 and 2
            marks=pytest.mark.long,
        ),
        (
            {"inside": "optimizer.param_groups[0]['lr'] = 0.05 if steps > 5 else 0.1"},
            "DB-SCRIPT-001",
            "the learning rate was changed from 0.1 to 0.05 on this worker",
        ),
        pytest.param(
            {"before": "data = TensorDataset(x[me:], (x.sum(1) > 0).long()[me:])"},
            "DB-SCRIPT-001",
            "samples here",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_script_that_cannot_work_is_answered_well(tmp_path: Path, parts, code, text):
    result = launch(replace(write(tmp_path, **parts), workers=2), live=Watch())
    assert result.exit == "failed"
    assert result.error is not None
    assert result.error["code"] == code
    assert text in result.error["text"]
    assert "Traceback" not in result.error["text"]


@pytest.mark.long
def test_a_script_goes_on_at_the_same_counts_after_a_stop(tmp_path: Path):
    class Stopping(Watch):
        def __init__(self) -> None:
            super().__init__(self._look)

        def _look(self, progress) -> None:
            if progress.samples >= 1500:
                (folder,) = (tmp_path / "runs").iterdir()
                RunFolder(folder).ask_stop("safe")

    job = write(tmp_path, pause=0.01)
    stopped = launch(job, live=Stopping())
    assert (stopped.exit, stopped.error) == ("stopped", None)
    assert stopped.saved is not None
    assert stopped.saved["samples"] == stopped.samples
    assert 1500 <= stopped.samples < NUM_EPOCHS * NUM_SAMPLES
    folder = RunFolder(Path(stopped.run_dir))
    resumed = resume(folder, replace(job, workers=2), live=Watch())
    assert (resumed.exit, resumed.error) == ("done", None)
    assert resumed.samples == NUM_EPOCHS * NUM_SAMPLES


NORMED = """
from torch import nn, randn
from torch.utils.data import TensorDataset
from distbelief import DataLoader, Downpour

model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
optimizer = Downpour(model.parameters(), lr=0.01, module=model)
print("mean", float(model[1].running_mean.abs().sum()), int(model[1].num_batches_tracked))
for epoch in range(2):
    for (x,) in DataLoader(TensorDataset(3 + randn(400, 8)), batch_size=10, shuffle=True):
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step()
"""


@pytest.mark.long
def test_buffers_of_a_module_are_saved_and_there_again_after_a_resume(tmp_path: Path):
    job = write(tmp_path)
    (tmp_path / "train.py").write_text(NORMED)
    first = Watch()
    result = launch(replace(job, workers=2), live=first)
    assert (result.exit, result.error) == ("done", None)
    assert "mean 0.0 0" in first.said
    folder = RunFolder(Path(result.run_dir))
    saved = load_file(folder.model)
    assert {"0.weight", "1.weight", "1.running_mean", "1.num_batches_tracked"} <= saved.keys()
    mean = float(saved["1.running_mean"].abs().sum())
    assert mean > 0.5
    again = Watch()
    resumed = resume(folder, replace(job, workers=1), live=again)
    assert (resumed.exit, resumed.error) == ("done", None)
    told = next(text.split() for text in again.said if text.startswith("mean "))
    assert float(told[1]) == pytest.approx(mean, rel=1e-4)

    with pytest.raises(Problem, match="is the run of a script") as refused:
        evaluate_run(folder.path, "test")
    assert refused.value.code == "DB-RUN-012"


def test_more_shards_than_parts_is_said_with_what_to_do(tmp_path: Path):
    result = launch(replace(write(tmp_path), workers=1, shards=2), live=Watch())
    assert result.exit == "failed"
    assert result.error is not None
    assert result.error["code"] == "DB-MODEL-003"
    assert "use at most 1 shards" in result.error["text"]
    assert "try   start it with fewer: --shards 1" in result.error["text"]
