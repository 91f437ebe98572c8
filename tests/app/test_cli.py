"""The command line: fast help, clear refusals, lines for a person and for a program."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from torch import nn

from distbelief.cli import FLAGS, cli
from distbelief.evaluate import save_model
from distbelief.factory import load_images, make_model
from distbelief.job import Job, load_job


def invoke(*args: str):
    return CliRunner().invoke(cli, list(args))


@pytest.mark.parametrize("args", [["--help"], ["launch", "--help"], ["eval", "-h"], ["--version"]])
def test_help_loads_nothing_heavy(args):
    code = (
        "import sys; from distbelief.cli import cli\n"
        f"try: cli({args!r})\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'ray', 'zmq', 'numpy', 'rich', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_every_flag_is_a_key_of_the_job():
    data = json.loads(Job().to_json())
    for key in FLAGS.values():
        section = data
        for name in key.split("."):
            assert name in section, key
            section = section[name]


ISSUE = """--model --data --engine --address --workers --shards --batch-size --lr --optimizer
    --width --n-fetch --n-push --fetch-policy --until --seed --run-dir --dashboard --no-dashboard
    --json --plain --set"""


def test_launch_offers_every_flag_of_the_issue():
    text = invoke("launch", "--help").output
    for flag in ISSUE.split():
        assert flag in text


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["nowhere.toml"], "nowhere.toml is not a job"),
        (["--set", "train.bach_size=3"], "unknown key train.bach_size"),
        (["--set", "workers"], "--set 'workers' has no value"),
        (["--lr", "0.1", "--set", "train.lr=0.2"], "train.lr is given twice"),
        (["--workers", "0"], "workers must be at least 1, got 0"),
        (["--until", "soon"], "until is 'soon'"),
        (["--optimizer", "lion"], "update rule 'lion' is none of"),
        (["--model", "resnet"], "model 'resnet' is neither"),
        (["--data", "cifar"], "data source 'cifar' is none of"),
    ],
)
def test_a_bad_job_is_refused_before_anything_starts(args, text, tmp_path):
    done = invoke("launch", *args, "--run-dir", str(tmp_path / "runs"))
    assert done.exit_code == 2
    assert text in done.stderr
    assert done.stderr.startswith("error[DB-")
    assert "Traceback" not in done.output
    assert done.stdout == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("args", [["--engine", "slurm"], ["--lr", "fast"], ["--nonsense"]])
def test_click_refuses_what_it_knows_to_be_wrong(args):
    done = invoke("launch", *args)
    assert done.exit_code == 2
    assert "Error" in done.stderr


def test_a_broken_toml_file_is_refused(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text("[train\nlr = 1")
    done = invoke("launch", str(path))
    assert done.exit_code == 2
    assert "error[DB-USE-002]" in done.stderr
    assert "docs/configuration.md" in done.stderr


def test_eval_of_a_missing_folder_says_what_to_name(tmp_path):
    done = invoke("eval", str(tmp_path / "gone"))
    assert done.exit_code == 1
    assert "error[DB-RUN-002]" in done.stderr
    assert "  try   name the folder that `distbelief launch` printed" in done.stderr
    assert "Traceback" not in done.output


@pytest.fixture
def run(tmp_path):
    job = load_job(None, {"model.factory": "googlenet-small", "model.width": 0.1}, ())
    (tmp_path / "job.json").write_text(job.to_json())
    model = make_model(job, load_images(job, "test"))
    assert isinstance(model, nn.Module)
    save_model(model, tmp_path)
    return tmp_path


def test_eval_prints_the_accuracy_of_a_saved_run(run):
    done = invoke("eval", str(run))
    assert done.exit_code == 0
    assert done.output.startswith("test top-1 0.")
    assert ", top-5 0." in done.output


def test_eval_prints_one_line_of_json(run):
    done = invoke("eval", str(run), "--split", "train", "--json")
    assert done.exit_code == 0
    record = json.loads(done.output)
    assert list(record) == ["type", "v", "run_dir", "split", "top1", "top5"]
    assert (record["type"], record["v"], record["split"]) == ("eval", 1, "train")
    assert record["run_dir"] == str(run)


def test_eval_of_unknown_data_is_refused(run):
    done = invoke("eval", str(run), "--data", "cifar")
    assert done.exit_code == 2
    assert "error[DB-DATA-001]" in done.stderr
