"""Evaluation: counts that a hand can check; a saved model comes back whole or not at all."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from distbelief.evaluate import evaluate
from distbelief.factory import make_model, open_data
from distbelief.folder import Launcher, RunFolder
from distbelief.job import Job, load_job
from distbelief.loaded import evaluate_run
from distbelief.model_file import save_model
from distbelief.problem import Problem
from distbelief.result import Accuracy
from distbelief.workers.embedded import split_of
from distbelief.workers.split import Read, Split
from tests.workers.test_pixels import GOOD


class Scores(nn.Module):
    """Gives fixed scores: the input is the index of the row."""

    def __init__(self, scores) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, x):
        return self.scores[x.long().flatten()]


def targets_of(num: int, num_classes: int) -> torch.Tensor:
    return torch.arange(num) * 7 % num_classes


def rows(num: int, num_classes: int) -> Split:
    inputs = torch.arange(num).float().view(-1, 1, 1, 1)
    return split_of(inputs, targets_of(num, num_classes), num_classes, "test")


def test_accuracies_equal_a_direct_count():
    scores, images = torch.randn(250, 9), rows(250, 9)
    targets = targets_of(250, 9)
    rank = (scores > scores.gather(1, targets.view(-1, 1))).sum(1)
    accuracy = evaluate(Scores(scores), images, batch_size=64)
    loss = float(F.cross_entropy(scores, targets))
    assert accuracy.loss == pytest.approx(loss, abs=1e-5)
    assert replace(accuracy, loss=None) == Accuracy(
        "test", int((rank < 1).sum()) / 250, int((rank < 5).sum()) / 250
    )
    assert 0 < int((rank < 1).sum()) < int((rank < 5).sum()) < 250


@pytest.mark.parametrize(("num_classes", "has_top5"), [(2, False), (5, False), (6, True)])
def test_below_six_classes_there_is_no_top5(num_classes, has_top5):
    accuracy = evaluate(Scores(torch.randn(20, num_classes)), rows(20, num_classes))
    assert (accuracy.top5 is not None) == has_top5


def test_a_model_is_evaluated_in_eval_mode_and_left_as_it_was():
    class Watching(Scores):
        def forward(self, x):
            assert not self.training
            return super().forward(x)

    model = Watching(torch.randn(20, 3)).train()
    evaluate(model, rows(20, 3))
    assert model.training
    evaluate(model.eval(), rows(20, 3))
    assert not model.training


@pytest.mark.parametrize(
    ("outputs", "text"),
    [((torch.ones(2, 3),), "gives a tuple"), (torch.ones(2), r"gives a tensor of shape \[2\]")],
)
def test_a_model_that_gives_no_scores_is_a_problem(outputs, text):
    class Odd(nn.Module):
        def forward(self, _):
            return outputs

    with pytest.raises(Problem, match=f"Odd {text} in evaluation") as caught:
        evaluate(Odd(), rows(2, 3))
    assert caught.value.code == "DB-MODEL-005"


TIED = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, image_size):
        super().__init__()
        pixels = image_size ** 2
        self.first = nn.Linear(pixels, pixels)
        self.second = nn.Linear(pixels, pixels)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(pixels)
        self.out = nn.Linear(pixels, num_classes)

    def forward(self, x):
        return self.out(self.norm(self.second(self.first(x.flatten(1)))))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder of a model with tied weights, as `launch` leaves it."""
    (tmp_path / "tied_net.py").write_text(TIED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    job = load_job(None, {"model.factory": "tied_net:Net"}, ("data.image_size=8",))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text(job.to_toml())
    model = make_model(job, data_of(job))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
        dict(model.named_buffers())["norm.running_mean"].add_(0.1)
    save_model(model, folder / "model.safetensors")
    yield folder
    sys.modules.pop("tied_net", None)


def job_in(run) -> Job:
    return Job.from_toml((run / "config.toml").read_text())


def data_of(job: Job) -> Split:
    split = open_data(job, "test")
    assert split is not None
    return split


def test_tied_weights_are_saved_once(run):
    names = load_file(run / "model.safetensors").keys()
    assert "first.weight" in names
    assert "second.weight" not in names
    assert "norm.running_mean" in names


def test_a_saved_run_evaluates_as_the_model_did(run):
    job = job_in(run)
    images = data_of(job)
    model = make_model(job, images)
    model.load_state_dict(load_file(run / "model.safetensors"), strict=False)
    assert model.get_parameter("second.weight") is model.get_parameter("first.weight")
    assert evaluate_run(run, "test") == evaluate(model, images)
    assert evaluate_run(run, "train").split == "train"


def test_other_data_is_taken_in_the_runs_own_size(run, fashion_mnist_dir):
    assert job_in(run).data.image_size == 8
    accuracy = evaluate_run(run, "test", f"fashion-mnist:{fashion_mnist_dir}")
    assert accuracy.top1 is not None  # and 28 pixels would not fit the model


def test_a_folder_that_is_no_run_is_a_problem(tmp_path):
    with pytest.raises(Problem, match=r"is not a run folder: .*No such file") as caught:
        evaluate_run(tmp_path / "nothing", "test")
    assert caught.value.code == "DB-RUN-002"


def test_a_damaged_job_file_is_a_problem(run):
    (run / "config.toml").write_text("{")
    with pytest.raises(Problem, match="is not a run folder"):
        evaluate_run(run, "test")


def test_a_run_without_a_model_is_a_problem(run):
    (run / "model.safetensors").unlink()
    with pytest.raises(Problem, match="the run has not ended") as caught:
        evaluate_run(run, "test")
    assert caught.value.code == "DB-RUN-006"


def test_a_damaged_model_file_is_a_problem(run):
    (run / "model.safetensors").write_bytes(b"\1\2\3" * 50)
    with pytest.raises(Problem, match="does not fit the run's model"):
        evaluate_run(run, "test")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors: tensors.pop("out.bias"), r"out\.bias is on one side only"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "extra is on one side only"),
        (lambda tensors: tensors.update({"out.bias": torch.ones(3)}), "size mismatch for out.bias"),
    ],
    ids=["missing", "unexpected", "other shape"],
)
def test_a_model_that_does_not_fit_its_file_is_a_problem(run, change, text):
    tensors = load_file(run / "model.safetensors")
    change(tensors)
    save_file(tensors, run / "model.safetensors")
    with pytest.raises(Problem, match=text):
        evaluate_run(run, "test")


def test_a_run_is_evaluated_from_wherever_one_is(run, tmp_path, monkeypatch):
    """The user's module is found where the run was launched, and the current folder stays."""
    here = evaluate_run(run, "test")
    RunFolder(run).write_launcher(Launcher.of_this_process("0"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    sys.modules.pop("tied_net")
    assert evaluate_run(Path("..") / "run", "test") == here
    assert Path.cwd() == elsewhere


def test_a_launching_folder_that_is_gone_is_no_matter(run):
    launcher = Launcher.of_this_process("0")
    RunFolder(run).write_launcher(replace(launcher, cwd="/nowhere/at/all"))
    assert evaluate_run(run, "test").top1 is not None


def test_data_without_a_test_split_is_a_problem(run, tmp_path):
    for name in "ab":
        (tmp_path / "pictures" / name).mkdir(parents=True)
        (tmp_path / "pictures" / name / "x.png").write_bytes(GOOD)
    with pytest.raises(Problem, match="pictures has no test split") as caught:
        evaluate_run(run, "test", f"folder:{tmp_path}/pictures")
    assert caught.value.code == "DB-DATA-005"


class Plain(nn.Module):
    """Gives its input back."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x


class Squared(Plain):
    def loss(self, outputs, targets):
        return (outputs - targets).square().mean()


def regression() -> Split:
    return split_of(torch.arange(6.0).view(6, 1), torch.zeros(6, 1), None, "test")


def test_a_model_that_is_no_classifier_has_a_loss_and_no_accuracy():
    accuracy = evaluate(Squared(), regression(), batch_size=4)
    assert accuracy == Accuracy("test", None, None, round(sum(i * i for i in range(6)) / 6, 6))


def test_a_map_of_scores_has_a_loss_and_no_accuracy():
    maps = split_of(torch.randn(4, 3, 2, 2), torch.zeros(4, 2, 2).long(), 3, "test")
    accuracy = evaluate(Plain(), maps)
    assert (accuracy.top1, accuracy.top5) == (None, None)
    assert accuracy.loss is not None


def test_a_loss_for_training_only_leaves_the_accuracy():
    class Heads(Scores):
        def loss(self, outputs, targets):
            main, first = outputs
            return main.sum() + first.sum()

    accuracy = evaluate(Heads(torch.randn(20, 3)), rows(20, 3))
    assert accuracy.top1 is not None
    assert accuracy.loss is None


def test_a_loss_that_is_not_finite_is_none():
    accuracy = evaluate(Scores(torch.full((20, 3), float("nan"))), rows(20, 3))
    assert accuracy.loss is None


class Holed:
    """Rows of which every third cannot be read."""

    def __len__(self) -> int:
        return 9

    def read(self, indices, epoch=0) -> Read:
        good = [index for index in indices if index % 3]
        bad = tuple((f"row{index}", "torn") for index in indices if index % 3 == 0)
        if not good:
            return Read(None, None, 0, bad)
        return Read(
            torch.tensor(good).float().view(-1, 1), torch.zeros(len(good), 1), len(good), bad
        )

    def close(self) -> None:
        pass


@pytest.mark.parametrize("num_loaders", [0, 1])
def test_samples_that_cannot_be_read_are_left_out(num_loaders, caplog):
    split = replace(regression(), samples=Holed())
    accuracy = evaluate(Squared(), split, batch_size=2, num_loaders=num_loaders)
    assert accuracy.loss == pytest.approx((1 + 4 + 16 + 25 + 49 + 64) / 6)
    assert "left out row6: torn" in caplog.text


def test_nothing_to_read_is_a_problem():
    class Torn(Holed):
        def read(self, indices, epoch=0) -> Read:
            return Read(None, None, 0, tuple((str(index), "torn") for index in indices))

    with pytest.raises(Problem, match="no sample of the test split can be read") as caught:
        evaluate(Squared(), replace(regression(), samples=Torn()))
    assert caught.value.code == "DB-DATA-006"
