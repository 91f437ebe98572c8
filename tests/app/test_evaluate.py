"""Evaluation: counts that a hand can check; a saved model comes back whole or not at all."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distbelief.evaluate import MODEL, evaluate, evaluate_run, save_model
from distbelief.factory import load_images, make_model
from distbelief.job import Job, load_job
from distbelief.problem import Problem
from distbelief.result import Accuracy
from distbelief.workers.data import Images


class Scores(nn.Module):
    """Gives fixed scores: the input is the index of the row."""

    def __init__(self, scores) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, x):
        return self.scores[x.long().flatten()]


def rows(num: int, num_classes: int) -> Images:
    targets = torch.arange(num) * 7 % num_classes
    return Images(torch.arange(num).float().view(-1, 1, 1, 1), targets, num_classes)


def test_accuracies_equal_a_direct_count():
    scores, images = torch.randn(250, 9), rows(250, 9)
    rank = (scores > scores.gather(1, images.targets.view(-1, 1))).sum(1)
    accuracy = evaluate(Scores(scores), images, "test", batch_size=64)
    assert accuracy == Accuracy("test", int((rank < 1).sum()) / 250, int((rank < 5).sum()) / 250)
    assert 0 < int((rank < 1).sum()) < int((rank < 5).sum()) < 250


@pytest.mark.parametrize(("num_classes", "has_top5"), [(2, False), (5, False), (6, True)])
def test_below_six_classes_there_is_no_top5(num_classes, has_top5):
    accuracy = evaluate(Scores(torch.randn(20, num_classes)), rows(20, num_classes), "train")
    assert (accuracy.top5 is not None) == has_top5


def test_a_model_is_evaluated_in_eval_mode_and_left_as_it_was():
    class Watching(Scores):
        def forward(self, x):
            assert not self.training
            return super().forward(x)

    model = Watching(torch.randn(20, 3)).train()
    evaluate(model, rows(20, 3), "test")
    assert model.training
    evaluate(model.eval(), rows(20, 3), "test")
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
        evaluate(Odd(), rows(2, 3), "test")
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
    (folder / "job.json").write_text(job.to_json())
    model = make_model(job, load_images(job, "test"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
        dict(model.named_buffers())["norm.running_mean"].add_(0.1)
    save_model(model, folder)
    yield folder
    sys.modules.pop("tied_net", None)


def job_in(run) -> Job:
    return Job.from_json((run / "job.json").read_text())


def test_tied_weights_are_saved_once(run):
    names = load_file(run / MODEL).keys()
    assert "first.weight" in names
    assert "second.weight" not in names
    assert "norm.running_mean" in names


def test_a_saved_run_evaluates_as_the_model_did(run):
    job = job_in(run)
    images = load_images(job, "test")
    model = make_model(job, images)
    model.load_state_dict(load_file(run / MODEL), strict=False)
    assert model.get_parameter("second.weight") is model.get_parameter("first.weight")
    assert evaluate_run(run, "test") == evaluate(model, images, "test")
    assert evaluate_run(run, "train").split == "train"


def test_other_data_is_taken_in_the_runs_own_size(run, fashion_mnist_dir):
    assert job_in(run).data.image_size == 8
    accuracy = evaluate_run(run, "test", f"fashion-mnist:{fashion_mnist_dir}")
    assert 0 <= accuracy.top1 <= 1  # and 28 pixels would not fit the model


def test_a_folder_that_is_no_run_is_a_problem(tmp_path):
    with pytest.raises(Problem, match=r"is not a run folder: .*No such file") as caught:
        evaluate_run(tmp_path / "nothing", "test")
    assert caught.value.code == "DB-RUN-002"


def test_a_damaged_job_file_is_a_problem(run):
    (run / "job.json").write_text("{")
    with pytest.raises(Problem, match="is not a run folder"):
        evaluate_run(run, "test")


def test_a_run_without_a_model_is_a_problem(run):
    (run / MODEL).unlink()
    with pytest.raises(Problem, match="the run has not ended") as caught:
        evaluate_run(run, "test")
    assert caught.value.code == "DB-RUN-006"


def test_a_damaged_model_file_is_a_problem(run):
    (run / MODEL).write_bytes(b"\1\2\3" * 50)
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
    tensors = load_file(run / MODEL)
    change(tensors)
    save_file(tensors, run / MODEL)
    with pytest.raises(Problem, match=text):
        evaluate_run(run, "test")
