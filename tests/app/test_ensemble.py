from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

from distbelief.cli import cli
from distbelief.ensemble import CHUNK, Ensemble
from distbelief.factory import make_model, open_data
from distbelief.job import load_job
from distbelief.loaded import evaluate_run, evaluate_runs
from distbelief.model_file import save_model
from distbelief.problem import Problem
from distbelief.workers.crops import take
from distbelief.workers.pixels import normalise

SIZE = 32
SHAPES = [(48, 40), (40, 60), (33, 33), (90, 32)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of pictures of three classes, the same ones to train on and to test."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("ant", "bee", "cat"):
            (root / split / name).mkdir(parents=True)
            for i, (width, height) in enumerate(SHAPES):
                pixels = random.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
                picture = Image.fromarray(pixels).resize((width, height))
                picture.save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def run_of(images, tmp_path):
    """Makes the folder of a run whose model has its first parameters."""

    def make(seed, **more):
        data = {"data.source": f"folder:{images}", "data.image_size": SIZE, "model.width": 0.1}
        job = load_job(None, {**data, "seed": seed, **more}, ())
        split = open_data(job, "test")
        assert split is not None
        model = make_model(job, split)
        path = tmp_path / f"run{seed}"
        path.mkdir()
        (path / "config.toml").write_text(job.to_toml())
        save_model(model, path / "model.safetensors")
        return path, model.eval(), split

    return make


class Fixed(nn.Module):
    """Scores that are a linear function of an image's mean."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, x):
        return x.mean((1, 2, 3)).unsqueeze(1) * self.weights


def test_probabilities_are_averaged_over_crops_and_models():
    models = [Fixed([1.0, 2.0, 3.0]), Fixed([0.5, -2.0, 0.0])]
    crops = torch.rand(5, CHUNK // 2 + 3, 3, 4, 4)  # more than one chunk
    expected = torch.stack(
        [torch.stack([model(one).softmax(1).mean(0) for model in models]).mean(0) for one in crops]
    )
    with torch.no_grad():
        found = Ensemble(models)(crops)
    assert found.softmax(1).numpy() == pytest.approx(expected.detach().numpy(), abs=1e-6)
    assert found.exp().sum(1).detach().numpy() == pytest.approx(np.ones(5), abs=1e-6)


def test_one_model_of_one_view_says_what_it_says_alone():
    model, images = Fixed([1.0, 2.0, 3.0]), torch.rand(7, 3, 4, 4)
    with torch.no_grad():
        found = Ensemble([model])(images).numpy()
        assert found == pytest.approx(model(images).log_softmax(1).numpy(), abs=1e-6)


@pytest.mark.parametrize("crops", [1, 10, 144])
def test_runs_are_evaluated_over_crops_as_by_hand(run_of, images, crops):
    paths, models = [], []
    for seed in (1, 2):
        path, model, _ = run_of(seed)
        paths.append(path)
        models.append(model)
    seen = []
    result = evaluate_runs(
        paths, "test", crops=crops, loaders=0, seen=lambda *told: seen.append(told)
    )
    hits = num = 0
    loss = 0.0
    for target, name in enumerate(("ant", "bee", "cat")):
        for i in range(len(SHAPES)):
            with Image.open(images / "test" / name / f"{i}.png") as picture:
                views = normalise(take(picture.convert("RGB"), crops, SIZE))
            with torch.no_grad():
                both = torch.stack([model(views).softmax(1).mean(0) for model in models])
            mean = both.double().mean(0)
            hits += int(mean.argmax()) == target
            loss -= float(mean[target].log())
            num += 1
    assert result.top1 == pytest.approx(hits / num)
    assert result.loss == pytest.approx(loss / num, abs=1e-4)
    assert seen[-1] == (num, num)


def test_two_processes_that_decode_give_the_same_numbers(run_of):
    path, _, _ = run_of(1)
    one, two = (evaluate_runs([path], "test", crops=144, loaders=n) for n in (0, 2))
    assert one == two


def test_without_crops_a_run_alone_is_what_it_always_was(run_of):
    path, _, _ = run_of(1)
    mine, theirs = evaluate_runs([path], "test"), evaluate_run(path, "test")
    assert (mine.top1, mine.split) == (theirs.top1, theirs.split)
    assert mine.loss == pytest.approx(theirs.loss, abs=1e-5)


def test_a_model_without_scores_is_a_problem():
    with pytest.raises(Problem, match="gives no scores"):
        Ensemble([nn.Flatten(0)])(torch.rand(2, 3, 4, 4))


def test_runs_of_other_images_are_a_problem(run_of):
    paths = [run_of(1)[0], run_of(2, **{"data.image_size": 40})[0]]
    with pytest.raises(Problem, match="no mean can be taken of them") as caught:
        evaluate_runs(paths, "test")
    assert caught.value.code == "DB-USE-013"


def test_the_command_takes_crops_and_other_runs(run_of):
    paths = [str(run_of(seed)[0]) for seed in (1, 2)]
    done = CliRunner().invoke(cli, ["eval", paths[0], "--with", paths[1], "--crops", "10"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("test top-1 0.")


def test_crops_of_data_without_image_files_are_a_problem(run_of):
    path: Path = run_of(1, **{"data.source": "digits", "data.image_size": 16})[0]
    done = CliRunner().invoke(cli, ["eval", str(path), "--crops", "10"])
    assert done.exit_code == 2
    assert "DB-DATA-007" in done.output
