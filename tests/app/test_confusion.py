"""Which classes are taken for which: counts by hand, the command, and the picture."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from distbelief.cli import cli
from distbelief.confusion import Confusion
from distbelief.factory import make_model, open_data
from distbelief.job import load_job
from distbelief.model_file import save_model
from distbelief.pictures import first_filters, tile
from distbelief.problem import Problem


def one_hot(told: list[int], classes: int = 3) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(told), classes).float()


def test_counts_recall_and_precision_are_those_by_hand():
    found = Confusion(3, ["ant", "bee", "cat"])
    found.add(one_hot([0, 0, 1, 2]), torch.tensor([0, 0, 0, 1]))
    found.add(one_hot([2, 0]), torch.tensor([1, 1]))
    assert found.counts.tolist() == [[2, 1, 0], [1, 0, 2], [0, 0, 0]]
    ant, bee, cat = found.rows
    assert (ant.images, ant.recall, ant.precision) == (3, 2 / 3, 2 / 3)
    assert (ant.taken_for, ant.taken_often) == ("bee", 1)
    assert (bee.images, bee.recall, bee.precision) == (3, 0.0, 0.0)
    assert (bee.taken_for, bee.taken_often) == ("cat", 2)
    assert (cat.images, cat.recall, cat.precision, cat.taken_for) == (0, None, 0.0, "")


def test_scores_of_more_classes_than_there_are_are_left_out():
    found = Confusion(2)
    found.add(one_hot([2, 1], 3), torch.tensor([0, 1]))
    assert found.counts.tolist() == [[0, 0], [0, 1]]
    assert found.names == ["0", "1"]


@pytest.fixture(scope="module", autouse=True)
def drawing(tmp_path_factory):
    """matplotlib keeps the files of its fonts open from its first picture on."""
    Confusion(2).draw(tmp_path_factory.mktemp("pictures") / "first.png")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("run")
    job = load_job(None, {"model.width": 0.1}, ())
    (path / "config.toml").write_text(job.to_toml())
    save_model(make_model(job, open_data(job, "train")), path / "model.safetensors")
    return path


def test_the_command_prints_classes_and_draws_them(run, tmp_path):
    picture = tmp_path / "confusion.png"
    call = ["eval", str(run), "--per-class", "--confusion", str(picture)]
    answer = CliRunner().invoke(cli, call)
    assert answer.exit_code == 0, answer.output
    lines = answer.output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("class"))
    assert [line.split()[0] for line in lines[start + 1 : start + 11]] == list(map(str, range(10)))
    with Image.open(picture) as image:
        assert image.format == "PNG"
    told = json.loads(CliRunner().invoke(cli, [*call, "--json"]).stdout)
    right = sum(row["images"] * (row["recall"] or 0) for row in told["classes"])
    assert right / sum(row["images"] for row in told["classes"]) == pytest.approx(told["top1"])
    plain = json.loads(CliRunner().invoke(cli, ["eval", str(run), "--json"]).stdout)
    assert plain["top1"] == told["top1"]
    assert "classes" not in plain


def test_a_picture_of_another_kind_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(Problem, match=r"neither a \.png nor an \.svg"):
        Confusion(3).draw(tmp_path / "a.gif")
    with pytest.raises(Problem) as error:
        Confusion(3).draw(tmp_path / "nowhere" / "a.png")
    assert error.value.code == "DB-STORE-004"
    assert list(tmp_path.iterdir()) == []


def test_data_that_does_not_say_its_classes_is_told(tmp_path, monkeypatch):
    (tmp_path / "unnamed.py").write_text(
        "import torch\n"
        "def data(split):\n"
        "    return torch.utils.data.TensorDataset(torch.zeros(8, 4), torch.zeros(8, 2))\n"
        "def net():\n"
        "    return Net()\n"
        "class Net(torch.nn.Linear):\n"
        "    def __init__(self): super().__init__(4, 2)\n"
        "    def loss(self, outputs, targets): return (outputs - targets).square().mean()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    job = load_job(None, {"model.factory": "unnamed:Net", "data.source": "unnamed:data"}, ())
    (tmp_path / "config.toml").write_text(job.to_toml())
    save_model(make_model(job, open_data(job, "train")), tmp_path / "model.safetensors")
    answer = CliRunner().invoke(cli, ["eval", str(tmp_path), "--per-class"])
    assert answer.exit_code == 2
    assert "DB-USE-015" in answer.output


def test_filters_are_drawn_each_in_its_own_range(run, tmp_path):
    weights = torch.zeros(5, 3, 2, 2)
    weights[1, 0] = 1.0  # red where the others are 0
    sheet = tile(weights)
    assert sheet.dtype == "uint8"
    step = 2 * 6 + 2
    assert sheet.shape == (2 * step + 2, 3 * step + 2, 3)
    assert sheet[3, 3].tolist() == [0, 0, 0]  # no range at all
    assert sheet[3, 3 + step].tolist() == [255, 0, 0]
    assert sheet[3 + step, 3 + 2 * step].tolist() == [255, 255, 255]  # there is no sixth
    grey = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    assert (tile(grey).max(2) == tile(grey).min(2)).all()
    assert first_filters(torch.nn.Linear(2, 2)) is None


def test_plot_draws_the_filters_of_a_run(run, tmp_path):
    out = tmp_path / "filters.png"
    answer = CliRunner().invoke(cli, ["plot", str(run), "--filters", str(out)])
    assert answer.exit_code == 0, answer.output
    with Image.open(out) as image:
        assert image.width > 20
