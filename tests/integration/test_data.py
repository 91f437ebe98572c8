"""Whole runs on data of the user's own: every sample once an epoch, bad ones named, no orphans."""

import hashlib
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from distbelief.launcher import launch
from distbelief.result import Result
from distbelief.workers.data import open_split
from distbelief.workers.feed import read_all
from tests.helpers.runs import Watch, tiny_job

NET = """
import hashlib
import os
import time

import torch
from torch import nn

class Net(nn.Module):
    '''A linear classifier that writes down what it trains on: a line a sample, a file a process.'''
    def __init__(self, num_classes, in_channels=1, image_size=4):
        super().__init__()
        self.linear = nn.Linear(in_channels * image_size**2, num_classes)
    def forward(self, x):
        if self.training:
            with open(f"seen/{os.getpid()}", "a") as file:
                for sample in x:
                    file.write(hashlib.sha256(sample.numpy().tobytes()).hexdigest() + "\\n")
        return self.linear(x.flatten(1))

class Slow(Net):
    def forward(self, x):
        time.sleep(0.1)
        return super().forward(x)

class Raising(Net):
    steps = 0
    def forward(self, x):
        self.steps += 1
        if self.steps == 3:
            raise ValueError("my own mistake")
        return super().forward(x)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's folder, whose files are called like packages of ours; the current one."""
    (tmp_path / "model.py").write_text(NET)
    (tmp_path / "seen").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _forget_modules(monkeypatch):
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("model", "workers"):
        sys.modules.pop(name, None)


def train(
    folder: Path,
    source: str,
    changes: Mapping[str, object] | None = None,
    watch: Watch | None = None,
) -> Result:
    job = tiny_job(
        folder / "runs",
        **{
            "workers": 3,
            "model.factory": "model:Net",
            "data.source": source,
            "train.lr": 0.001,
            "train.batch_size": 8,
            "data.image_size": 16,
            **(changes or {}),
        },
    )
    return launch(job, live=watch or Watch())


def trained_on(folder: Path) -> Counter[str]:
    """Checksums of the samples that workers have trained on."""
    files = [path for path in (folder / "seen").iterdir() if path.name != str(os.getpid())]
    return Counter(line for path in files for line in path.read_text().split())


def all_samples(source: str, image_size: int = 16) -> Counter[str]:
    """Checksums of the samples of a source, read in this process."""
    split = open_split(source, "train", image_size)
    assert split is not None
    return Counter(
        hashlib.sha256(sample.numpy().tobytes()).hexdigest()
        for batch in read_all(split, 64)
        for sample in batch.inputs
    )


def times(number: int, samples: Counter[str]) -> Counter[str]:
    return Counter({sample: number * count for sample, count in samples.items()})


@pytest.mark.parametrize(
    "changes",
    [
        {"train.batch_size": 7, "data.loaders": 1},  # the last lease has a batch of 2
        {"train.batch_size": 11, "data.loaders": 2, "train.fetch_policy": "latest"},
        {"train.batch_size": 64, "data.loaders": 0, "train.n_push": 3},  # more workers than leases
    ],
    ids=["uneven", "latest", "few"],
)
def test_every_photograph_is_trained_on_once_an_epoch(folder, test_data, changes):
    source = f"folder:{test_data}/imagenet-photos"
    result = train(folder, source, changes)
    assert (result.exit, result.error) == ("done", None)
    assert result.eval is None  # this folder has no test split
    assert result.samples == sum(result.worker_samples.values()) == 200
    wanted = times(2, all_samples(source))
    assert len(wanted) == 100
    assert trained_on(folder) == wanted


@pytest.mark.long
def test_every_sample_of_the_shards_is_trained_on_once_an_epoch(folder, test_data):
    source = f"wds:{test_data}/cifar10/{{split}}-*.tar"  # CIFAR-10, all of it
    changes = {"until": "1-epochs", "train.batch_size": 133, "data.image_size": 0}
    result = train(folder, source, changes)
    assert (result.exit, result.error) == ("done", None)
    assert result.samples == 50_000
    assert result.eval is not None
    assert result.eval.top1 is not None
    assert result.eval.top1 > 0.15
    assert trained_on(folder) == all_samples(source, 0)


OWN = """
import torch
from torch.utils.data import Dataset, IterableDataset

def sample(i):
    return torch.full((1, 4, 4), i / 100), i % 3

class Rows(Dataset):
    num_classes = 3
    def __init__(self, n):
        self.n = n
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        return sample(i)

class Stream(IterableDataset):
    num_classes = 3
    def __init__(self, n):
        self.n = n
    def __iter__(self):
        return (sample(i) for i in range(self.n))

def rows(split):
    return Rows(101 if split == "train" else 10)

def stream(split):
    return Stream(101) if split == "train" else None

def tiny(split):
    return Rows(3)

def missing_in_workers(split):
    import sys
    if sys.argv[0].endswith(("process.py", "zygote.py")):
        raise FileNotFoundError("/mnt/data is not mounted here")
    return Rows(101)
"""


@pytest.mark.parametrize(
    ("name", "loaders"), [("rows", 0), ("rows", 1), ("stream", 0), ("tiny", 1)]
)
def test_a_users_own_data_is_trained_on_once_an_epoch(folder, name, loaders):
    """From a file workers.py beside a model.py, which are names of packages of ours too."""
    (folder / "workers.py").write_text(OWN)
    result = train(folder, f"workers:{name}", {"data.loaders": loaders, "shards": 1})
    assert (result.exit, result.error) == ("done", None)
    num = 3 if name == "tiny" else 101
    assert result.samples == 2 * num
    assert (result.eval is None) == (name == "stream")
    seen = trained_on(folder)
    wanted = [torch.full((1, 4, 4), i / 100).numpy().tobytes() for i in range(num)]
    assert seen == Counter({hashlib.sha256(sample).hexdigest(): 2 for sample in wanted})


def test_data_that_is_missing_on_a_worker_is_named_before_anything_is_trained(folder):
    (folder / "workers.py").write_text(OWN)
    result = train(folder, "workers:missing_in_workers", {"shards": 1})
    assert result.exit == "failed"
    assert result.error is not None
    assert result.error["code"] == "DB-DATA-004"
    assert "/mnt/data is not mounted here" in result.error["text"]
    assert trained_on(folder) == Counter()


@pytest.fixture
def photos(tmp_path, test_data):
    """Forty photographs, of which one is cut short and one is no image at all."""
    found = sorted((test_data / "imagenet-photos").glob("*/*.JPEG"))[:40]
    for path in found:
        copy = tmp_path / "photos" / path.parent.name / path.name
        copy.parent.mkdir(parents=True)
        shutil.copyfile(path, copy)
    copies = sorted((tmp_path / "photos").glob("*/*.JPEG"))
    os.truncate(copies[7], copies[7].stat().st_size // 2)
    copies[20].write_bytes(b"<html>404 Not Found</html>")
    return tmp_path / "photos"


def test_bad_photographs_are_left_out_named_and_counted(folder, photos):
    result = train(folder, f"folder:{photos}", {"data.max_bad": 0.05})
    assert (result.exit, result.error) == ("done", None)
    assert result.samples == 2 * 38
    assert result.bad_samples == 2
    assert sorted(trained_on(folder).values()) == [2] * 38
    logs = "".join(path.read_text() for path in Path(result.run_dir).glob("logs/w*.log"))
    bad = sorted(photos.glob("*/*.JPEG"))[7], sorted(photos.glob("*/*.JPEG"))[20]
    assert f"left out {bad[0]}: OSError: image file is truncated" in logs
    assert f"left out {bad[1]}: not an image" in logs


def test_more_bad_photographs_than_allowed_end_the_run_and_are_named(folder, photos):
    result = train(folder, f"folder:{photos}", {"data.max_bad": 0.02})
    assert result.exit == "failed"
    assert result.error is not None
    assert result.error["code"] == "DB-DATA-003"
    assert "2 of 40 samples cannot be read" in result.error["text"]
    assert str(photos) in result.error["text"]


class KillWithChildren:
    """Kills a worker once it has loader processes and the run has come some way."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.children: list[int] = []
        self.killed_at = 0.0

    def __call__(self, progress) -> None:
        if self.children or progress.samples < 40:
            return
        (file,) = self.runs.glob("*/processes.json")
        pids = {process["name"]: process["pid"] for process in json.loads(file.read_text())}
        if "w1" in pids:
            self.children = children_of(pids["w1"])
            os.kill(pids["w1"], signal.SIGKILL)
            self.killed_at = time.monotonic()


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_kill_9_of_a_worker_takes_its_loaders_with_it(folder, test_data):
    kill = KillWithChildren(folder / "runs")
    result = train(
        folder,
        f"folder:{test_data}/imagenet-photos",
        {"workers": 2, "model.factory": "model:Slow", "data.loaders": 2},
        Watch(kill),
    )
    assert (result.exit, result.error, result.workers_lost) == ("done", None, 1)
    assert len(kill.children) == 2
    while any(map(is_running, kill.children)):
        assert time.monotonic() - kill.killed_at < 10
        time.sleep(0.1)
    seen = trained_on(folder)  # what it had not told is trained on again by the other
    assert len(seen) == 100
    assert min(seen.values()) >= 2


def test_no_loader_is_left_when_a_run_has_failed_in_the_middle(folder, test_data):
    source = f"folder:{test_data}/imagenet-photos"
    result = train(folder, source, {"model.factory": "model:Raising", "data.loaders": 1})
    assert result.error is not None
    assert "my own mistake" in result.error["text"]
    deadline = time.monotonic() + 10
    while ours := processes_below(folder):
        assert time.monotonic() < deadline, ours
        time.sleep(0.1)


def processes_below(folder: Path) -> list[str]:
    """Processes of ours whose current folder is this one, without this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_here = os.readlink(path / "cwd") == str(folder)
            command = (path / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if is_here and command and path.name != str(os.getpid()):
            found.append(f"{path.name} {command}")
    return found
