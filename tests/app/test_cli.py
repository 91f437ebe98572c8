"""The command line: fast help, clear refusals, lines for a person and for a program."""

import json
import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner
from torch import nn

from distbelief.cli import COMMANDS, cli
from distbelief.factory import make_model, open_data
from distbelief.job import Job, load_job
from distbelief.model_file import save_model
from distbelief.problem import EXIT_OF, Problem
from distbelief.settings import FLAGS
from tests.helpers.folders import end, make_run, write_status

HEAVY = {"torch", "ray", "zmq", "numpy", "rich", "sklearn", "aiohttp"}


@pytest.fixture(autouse=True)
def _home_without_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("DISTBELIEF_MONITOR__ON")


def invoke(*args: str):
    return CliRunner().invoke(cli, list(args))


def python(code, cwd=None):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)


def loads(args, cwd=None):
    """What heavy packages a command loads."""
    return python(
        "import sys; from distbelief.cli import cli\n"
        f"try: cli({args!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"heavy = {HEAVY!r} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)",
        cwd,
    )


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["-h"], *([name, "--help"] for name in COMMANDS)]
)
def test_help_loads_nothing_heavy(args):
    done = loads(args)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    "args",
    [
        ["status"],
        ["status", "--json"],
        ["top"],
        ["top", "--json"],
        ["runs", "ls"],
        ["runs", "show"],
        ["runs", "diff", "aa", "bb"],
        ["runs", "rm", "bb", "-y"],
        ["logs"],
        ["stop"],
        ["completion", "bash"],
    ],
)
def test_commands_that_look_at_files_load_nothing_heavy(args, tmp_path):
    for run in ("aa", "bb"):
        end(make_run(tmp_path / "runs", run))
    done = loads(args, tmp_path)
    assert done.returncode == 0, done.stderr


def test_root_help_is_fast():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "from distbelief.cli import cli; cli(['-h'])"],
        capture_output=True,
        text=True,
    )
    times = re.findall(r"import time:\s+(\d+) \|\s+\d+ \| distbelief", done.stderr)
    assert times
    assert sum(map(int, times)) < 100_000  # of our own files, in microseconds; 10,000 is usual


def test_every_command_has_an_example_and_help_that_fits_a_line():
    text = invoke("--help").output
    assert "..." not in text.partition("Commands:")[2]
    for name in COMMANDS:
        done = invoke(name, "--help")
        subcommands = re.findall(r"^  (\w+)  ", done.output.partition("Commands:")[2], re.M)
        for args in [[name, sub] for sub in subcommands] or [[name]]:
            assert "Example" in invoke(*args, "--help").output, args


def test_an_unknown_command_is_a_usage_error():
    done = invoke("lunch")
    assert done.exit_code == 2
    assert "No such command 'lunch'" in done.stderr


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
        (["train.py"], "there is no script train.py"),
        (["--config", "nowhere.toml"], "nowhere.toml is not a job"),
        (["job.yaml"], "job.yaml is neither a script (.py) nor a file of settings (.toml)"),
        (["--", "--epochs", "3"], "there are arguments after --, --epochs 3, and no script"),
    ],
)
def test_a_bad_job_is_refused_before_anything_starts(args, text, tmp_path):
    done = invoke("launch", "--run-dir", str(tmp_path / "runs"), *args)
    assert done.exit_code == 2
    assert text in done.stderr
    assert done.stderr.startswith("error[DB-")
    assert "more  docs/errors.md#db-" in done.stderr
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
    assert "  try   distbelief runs ls shows the runs" in done.stderr
    assert "Traceback" not in done.output


@pytest.fixture
def run(tmp_path):
    job = load_job(None, {"model.factory": "googlenet-small", "model.width": 0.1}, ())
    (tmp_path / "config.toml").write_text(job.to_toml())
    split = open_data(job, "test")
    assert split is not None
    model = make_model(job, split)
    assert isinstance(model, nn.Module)
    save_model(model, tmp_path / "model.safetensors")
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
    assert list(record) == ["type", "v", "run_dir", "split", "top1", "top5", "loss"]
    assert (record["type"], record["v"], record["split"]) == ("eval", 1, "train")
    assert record["run_dir"] == str(run)


def test_eval_of_unknown_data_is_refused(run):
    done = invoke("eval", str(run), "--data", "cifar")
    assert done.exit_code == 2
    assert "error[DB-DATA-001]" in done.stderr


# Errors, exit codes and colours, whatever the command


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("DB-USE-001", 2),
        ("DB-ENV-001", 3),
        ("DB-RUN-002", 1),
        ("DB-RUN-008", 3),
        ("DB-STORE-001", 5),
        ("DB-BUG-001", 1),
    ],
)
def test_a_problem_has_the_exit_code_of_its_family_or_its_own(code, exit_code):
    assert Problem(code, "x").exit_code == exit_code


def test_every_error_code_of_the_sources_is_in_the_docs_with_its_exit_code(repo_root):
    sources = [
        path.read_text()
        for folder in ("distbelief", "workers")
        for path in (repo_root / folder).rglob("*.py")
        if path.is_file()
    ]
    used = set(re.findall(r"\bDB-[A-Z]+-\d{3}\b", "\n".join(sources)))
    table = dict(
        re.findall(
            r"^\| (DB-[A-Z]+-\d+) \| (\d) \|", (repo_root / "docs/errors.md").read_text(), re.M
        )
    )
    assert used == set(table)
    for code, exit_code in table.items():
        assert Problem(code, "").exit_code == int(exit_code), code
    assert {code.rpartition("-")[0] for code in used} == {f for f in EXIT_OF if f.count("-") == 1}


def provoke(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("distbelief.commands.run_argument.find_run", fail)
    return invoke("status")


def test_a_bug_of_ours_is_told_without_a_traceback_which_is_in_a_file(monkeypatch):
    done = provoke(monkeypatch, RuntimeError("nobody foresaw this"))
    assert done.exit_code == 1
    assert done.stderr.startswith(
        "error[DB-BUG-001]: distbelief itself failed: RuntimeError: nobody foresaw this"
    )
    assert "Traceback" not in done.output
    (file,) = re.findall(r"please report it with (\S+)", done.stderr)
    try:
        with open(file) as text:
            assert "RuntimeError: nobody foresaw this" in text.read()
    finally:
        os.unlink(file)


def test_ctrl_c_ends_a_command_silently(monkeypatch):
    done = provoke(monkeypatch, KeyboardInterrupt())
    assert (done.exit_code, done.output) == (130, "")


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    for number in range(2000):
        make_run(tmp_path / "runs", f"run-{number}")
    shell = f"{sys.executable} -m distbelief runs ls | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[0].startswith("run ")
    assert done.stdout.splitlines()[1] == "141"


@pytest.mark.parametrize(
    ("args", "no_color", "is_colored"),
    [
        ([], "", False),  # not a terminal
        (["--color", "always"], "", True),
        (["--color", "always"], "1", True),
        (["--color", "never"], "", False),
    ],
)
def test_colors_are_for_terminals_or_as_asked_for(tmp_path, args, no_color, is_colored):
    end(make_run(tmp_path, "aa"), "failed", error={"code": "DB-RUN-001", "text": "x"})
    done = CliRunner(env={"NO_COLOR": no_color}).invoke(
        cli, [*args, "runs", "ls", "--run-dir", str(tmp_path)]
    )
    assert ("\x1b[" in done.output) == is_colored


def test_the_run_folder_is_found_where_the_settings_have_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_status(make_run(tmp_path / "elsewhere", "aa"))
    assert invoke("status").exit_code == 1
    (tmp_path / "distbelief.toml").write_text('run_dir = "elsewhere"')
    assert invoke("status").exit_code == 0
    monkeypatch.setenv("DISTBELIEF_RUN_DIR", "runs")
    assert invoke("status").exit_code == 1
    assert invoke("status", "--run-dir", "elsewhere").exit_code == 0
