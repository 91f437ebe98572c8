"""The paper's Table 3 for runs of ours, held against `eval` and a count by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from distbelief.cli import cli
from distbelief.error_table import error_table
from distbelief.factory import make_model, open_data
from distbelief.job import load_job
from distbelief.loaded import evaluate_runs
from distbelief.model_file import save_model
from distbelief.problem import Problem
from distbelief.roster import Roster

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs with first parameters, on pictures of seven classes."""
    root = tmp_path_factory.mktemp("table")
    random = np.random.default_rng(1)
    for split in ("train", "test"):
        for name in CLASSES:
            (root / "data" / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = random.integers(0, 256, (9 + i, 12, 3), np.uint8)
                picture = Image.fromarray(pixels).resize((44, 33 + i))
                picture.save(root / "data" / split / name / f"{i}.png")
    paths = []
    for seed in (1, 2, 3):
        said = {"data.source": f"folder:{root / 'data'}", "data.image_size": 32, "seed": seed}
        job = load_job(None, {**said, "model.width": 0.1}, ())
        path = root / f"run{seed}"
        path.mkdir()
        (path / "config.toml").write_text(job.to_toml())
        model = make_model(job, open_data(job, "test"))
        torch.manual_seed(seed)  # batch norm of first parameters says nearly the same of all images
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.15)
        save_model(model, path / "model.safetensors")
        paths.append(path)
    return paths


def errors(runs, crops):
    found = evaluate_runs(runs, "test", crops=crops)
    assert found.top1 is not None
    assert found.top5 is not None
    return pytest.approx(1 - found.top1), pytest.approx(1 - found.top5)


def test_rows_are_what_eval_says_of_the_best_and_of_all(runs):
    seen = []
    found = error_table(runs, "test", crops=(0, 1, 10), seen=lambda *told: seen.append(told))
    assert found.images == 2 * len(CLASSES)
    assert [(row.models, row.crops, row.cost) for row in found.rows] == [
        (1, 0, 1),
        (1, 1, 1),
        (1, 10, 10),
        (3, 0, 3),
        (3, 1, 3),
        (3, 10, 30),
    ]
    for row in found.rows:
        found_errors = (row.top1_error, row.top5_error)
        if row.models == 1:
            assert found_errors == errors([Path(row.best)], row.crops)
            best = max(evaluate_runs([run], "test", crops=row.crops).top1 or 0 for run in runs)
            assert row.top1_error == pytest.approx(1 - best)
        else:
            assert found_errors == errors(runs, row.crops)
            assert row.best == ""
    assert seen[-1] == (3 * found.images, 3 * found.images)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_one_run_has_no_row_of_several(runs):
    assert [row.models for row in error_table(runs[:1], "test", crops=(1,)).rows] == [1]


def test_the_command_prints_the_table_and_takes_an_ensemble(runs, tmp_path):
    roster = Roster.of(tmp_path / "ensemble", 2, 0.1, 1.0, ())
    roster.write()
    for member, run in zip(roster.members, runs, strict=False):
        place = roster.place(member) / "a-run"
        place.mkdir(parents=True)
        for name in ("config.toml", "model.safetensors"):
            (place / name).write_bytes((run / name).read_bytes())
        (place / "result.json").write_text('{"exit": "done"}')
    call = ["table", str(roster.path), "--crops", "1,10"]
    answer = CliRunner().invoke(cli, call)
    assert answer.exit_code == 0, answer.output
    lines = answer.output.splitlines()
    assert lines[0].split("  ")[0] == "models"
    assert [line.split()[:3] for line in lines[1:5]] == [
        ["1", "1", "1"],
        ["1", "10", "10"],
        ["2", "1", "2"],
        ["2", "10", "20"],
    ]
    assert lines[1].endswith("base")
    told = json.loads(CliRunner().invoke(cli, [*call, "--json"]).stdout)
    assert [row["cost"] for row in told["rows"]] == [1, 10, 2, 20]


def test_crops_that_there_are_not_are_refused(runs):
    answer = CliRunner().invoke(cli, ["table", str(runs[0]), "--crops", "1,7"])
    assert answer.exit_code == 2
    assert "name some of 0, 1, 10, 144" in answer.output


def test_an_ensemble_without_a_trained_member_says_so(tmp_path):
    Roster.of(tmp_path, 3, 1.0, 1.25, ()).write()
    answer = CliRunner().invoke(cli, ["table", str(tmp_path)])
    assert answer.exit_code == 1
    assert "DB-RUN-006" in answer.output


def test_runs_whose_data_cannot_be_cropped_say_so(runs, tmp_path):
    job = load_job(None, {"model.width": 0.1}, ())  # digits
    (tmp_path / "config.toml").write_text(job.to_toml())
    save_model(make_model(job, open_data(job, "test")), tmp_path / "model.safetensors")
    with pytest.raises(Problem, match="DB-DATA-007"):
        error_table([tmp_path], "test", crops=(10,))
