"""Codes of docs/errors.md that only a run of its own processes can bring about."""

from pathlib import Path

import pytest

from distbelief import run as run_module
from distbelief.launcher import launch
from tests.helpers.runs import Watch, tiny_job

SPOILS = '''
import torch
from torch import nn

class Net(nn.Module):
    """Its values grow with every push, and neither loss nor gradient sees anything of that."""
    def __init__(self, num_classes, in_channels, image_size):
        super().__init__()
        self.linear = nn.Linear(in_channels * image_size**2, num_classes)
        for parameter in self.linear.parameters():
            parameter.requires_grad_(False)
        self.bias = nn.Parameter(torch.zeros(num_classes))
    def forward(self, x):
        return self.linear(x.flatten(1)) + (self.bias - self.bias.detach())
'''
ONE = {"workers": 1, "shards": 1, "monitor.on": False}


def told(result) -> tuple[str, str]:
    assert result.error is not None
    assert result.exit == "failed"
    return result.error["code"], result.error["text"]


def test_processes_that_do_not_begin_in_time(user_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_module, "START_TIMEOUT_S", 0.2)
    changes = {"silence_s": 1.0, "warm_workers": False}  # it has to import torch
    code, text = told(launch(tiny_job(user_folder / "runs", **ONE, **changes), live=Watch()))
    assert code == "DB-RUN-004"
    assert "0 of 1 shards serve" in text or "no worker has opened its data" in text


def test_a_launcher_that_fails_itself_says_so_in_the_result(user_folder: Path):
    def fail(progress):
        raise RuntimeError("nobody foresaw this")

    result = launch(tiny_job(user_folder / "runs", **ONE), live=Watch(fail))
    assert told(result) == ("DB-RUN-010", "RuntimeError: nobody foresaw this")
    assert (Path(result.run_dir) / "result.json").is_file()


def test_a_worker_whose_pushes_are_refused_is_put_in_quarantine(user_folder: Path):
    watch = Watch()
    changes = {"guard.max_norm": 1e-9, "guard.quarantine": 3, "restarts": 0}
    result = launch(tiny_job(user_folder / "runs", **ONE, **changes), live=watch)
    code, text = told(result)
    assert code == "DB-RUN-005"
    assert "all 1 workers are lost" in text
    assert any("w0 was refused 3 pushes in a row" in said for said in watch.said)
    log = (Path(result.run_dir) / "logs" / "w0.log").read_text()
    assert "DB-RUN-015" in log


def test_values_that_finite_gradients_have_spoiled_end_the_run(user_folder: Path):
    (user_folder / "spoils.py").write_text(SPOILS)
    changes = {
        "model.factory": "spoils:Net",
        "train.optimizer": "sgd",
        "train.lr": 1e25,
        "train.schedule.kind": "constant",
        "train.local_lr": 0.0,
        "until": "1h",
        "save.every_s": 0.1,
    }
    code, text = told(launch(tiny_job(user_folder / "runs", **ONE, **changes), live=Watch()))
    assert code == "DB-TRAIN-003"
    assert "shard0" in text
    assert "bias" in text
