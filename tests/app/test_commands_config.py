"""config, and how launch and resume come to a job."""

import json
import tomllib

import pytest
from click.testing import CliRunner

from distbelief.cli import cli
from distbelief.commands.config import template, toml_value
from distbelief.job import Job
from distbelief.launcher import launch
from distbelief.result import Result
from tests.helpers.folders import end, kill, make_run, write_checkpoint, write_status


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("DISTBELIEF_MONITOR__ON")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*args, **how):
    return CliRunner().invoke(cli, list(args), **how)


# config


def test_config_init_writes_a_file_that_says_nothing_yet(here):
    done = invoke("config", "init")
    assert done.exit_code == 0
    assert Job.from_toml((here / "distbelief.toml").read_text()) == Job()
    assert invoke("config", "validate").exit_code == 0
    done = invoke("config", "init")
    assert done.exit_code == 2
    assert "error[DB-USE-007]" in done.stderr
    (here / "distbelief.toml").write_text("workers = 9")
    assert invoke("config", "init", "--force").exit_code == 0
    assert "workers = 9" not in (here / "distbelief.toml").read_text()


def test_the_defaults_of_the_template_are_the_defaults():
    lines = template().splitlines()
    values = [
        line.removeprefix("#") if line.startswith("#") and not line.startswith("# ") else line
        for line in lines
        if not line.endswith("= ...")
    ]
    data = tomllib.loads("\n".join(values))
    assert data["train"]["lr"] == 0.005
    assert Job.from_dict(data) == Job()
    assert max(map(len, lines)) <= 100


def test_config_init_in_a_folder_that_takes_no_file(here, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    assert invoke("config", "init").exit_code == 5


def test_config_show_prints_what_launch_would_take(here):
    (here / "distbelief.toml").write_text("workers = 3")
    done = invoke("config", "show", "--set", "train.lr=0.5")
    assert done.output.startswith("# distbelief.toml\nworkers = 3\n")
    job = Job.from_toml(done.output)
    assert (job.workers, job.train.lr) == (3, 0.5)


def test_config_show_of_a_file_and_of_a_run(here):
    (here / "job.toml").write_text("shards = 5")
    assert Job.from_toml(invoke("config", "show", "job.toml").output).shards == 5
    make_run(here / "runs", "aa")
    assert Job.from_toml(invoke("config", "show", "aa").output).train.lr == 0.1
    assert invoke("config", "show", "bb").exit_code == 1
    assert invoke("config", "show", "gone.toml").exit_code == 2


def explain(*args):
    return invoke("config", "explain", *args).output.splitlines()[0]


def test_config_explain_says_where_a_value_comes_from(here, monkeypatch):
    assert explain("train.n_push") == "1   the default"
    (here / "distbelief.toml").write_text("# mine\n[train]\nn_push = 4\noptimizer = 'adam'\n")
    assert explain("train.n_push") == "4   from distbelief.toml:3 (default 1)"
    assert explain("train.n_push", "--set", "train.n_push=2") == (
        "2   from --set (default 1; distbelief.toml:3 said 4)"
    )
    monkeypatch.setenv("DISTBELIEF_TRAIN__N_PUSH", "3")
    assert explain("train.n_push") == (
        "3   from DISTBELIEF_TRAIN__N_PUSH (default 1; distbelief.toml:3 said 4)"
    )
    assert explain("train.optimizer") == ('"adam"   from distbelief.toml:4 (default "momentum")')
    assert explain("train.eps") == "unset   the default"
    assert explain("model.args", "--set", "model.args.a=1", "--set", "model.args.b=2") == (
        "{ a = 1, b = 2 }   from --set (default {}; --set said model.args.a = 1)"
    )


def test_config_explain_has_the_meaning_and_takes_sections():
    text = invoke("config", "explain", "save.keep").output
    assert "Snapshots kept, at least 2" in text
    lines = invoke("config", "explain", "save").output.splitlines()
    assert lines[:2] == ["save.every_s  30.0   the default", "save.keep  2   the default"]
    done = invoke("config", "explain", "save.kep")
    assert done.exit_code == 2
    assert "did you mean save.keep?" in done.stderr


def test_config_validate_says_everything_that_is_wrong(here, monkeypatch):
    (here / "job.toml").write_text("workers = 0\n[train]\nbach_size = 3\n")
    done = invoke("config", "validate", "job.toml")
    assert done.exit_code == 2
    assert done.stderr.count("error[DB-USE-001]") == 2
    assert "job.toml:1 says workers = 0" in done.stderr
    assert "did you mean train.batch_size?" in done.stderr
    (here / "job.toml").write_text("workers = 3\n")
    monkeypatch.setenv("DISTBELIEF_WORKERS", "0")  # of a file alone, other places say nothing
    done = invoke("config", "validate", "job.toml")
    assert (done.exit_code, done.output) == (0, "job.toml: no mistakes\n")
    assert invoke("config", "validate").exit_code == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "unset"),
        ('a"b\n', '"a\\"b\\n"'),
        (["a", 1], '["a", 1]'),
        ({"a": {"b": True}}, "{ a = { b = true } }"),
        (0.1, "0.1"),
    ],
)
def test_a_value_is_shown_as_toml_on_one_line(value, text):
    assert toml_value(value) == text


# launch: what it hands on


@pytest.fixture
def jobs(monkeypatch):
    """The jobs that the launcher was given, instead of runs."""
    given = []

    def note(job, *, live, stop):
        given.append(job)
        return Result(run="aa", run_dir="runs/aa", exit="done")

    monkeypatch.setattr("distbelief.launcher.launch", note)
    return given


def test_launch_says_which_settings_it_has_read(here, jobs, monkeypatch):
    (here / "distbelief.toml").write_text("workers = 3")
    (here / "job.toml").write_text("shards = 3")
    monkeypatch.setenv("DISTBELIEF_SEED", "7")
    done = invoke("launch", "job.toml", "--lr", "0.5")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0] == "settings of distbelief.toml, job.toml, DISTBELIEF_SEED"
    job = jobs[0]
    assert (job.workers, job.shards, job.seed, job.train.lr) == (3, 3, 7, 0.5)


def test_launch_of_a_script_takes_its_arguments_after_the_dashes(here, jobs):
    (here / "train.py").write_text("")
    done = invoke("launch", "train.py", "--workers", "3", "--", "--lr", "0.1", "--", "x")
    assert done.exit_code == 0, done.output
    script = jobs[0].script
    assert (script.path, script.args) == (str(here / "train.py"), ("--lr", "0.1", "--", "x"))
    assert jobs[0].workers == 3


@pytest.mark.parametrize(
    "args",
    [["train.py", "--epochs", "3"], ["train.py", "x"], ["--workers", "3", "train.py", "--what"]],
)
def test_arguments_of_a_script_without_dashes_get_a_hint(here, jobs, args):
    (here / "train.py").write_text("")
    done = invoke("launch", *args)
    assert done.exit_code == 2
    assert "Error: " in done.stderr
    assert "put it after --:\n  distbelief launch train.py --workers 4 -- " in done.stderr
    assert jobs == []


def test_unknown_options_without_a_script_get_no_hint():
    assert "after --" not in invoke("launch", "--epochs", "3").stderr


@pytest.mark.parametrize("flag", [["--lr", "1"], ["--model", "a:b"], ["--until", "3-epochs"]])
def test_flags_that_a_script_says_itself_are_refused(here, jobs, flag):
    (here / "train.py").write_text("")
    done = invoke("launch", "train.py", *flag)
    assert done.exit_code == 2
    assert "error[DB-USE-005]" in done.stderr
    assert f"{flag[0]} says it" in done.stderr


def test_launch_of_a_run_points_to_resume(here):
    make_run(here / "runs", "20260101-120000-7f3a")
    done = invoke("launch", "7f3a")
    assert done.exit_code == 2
    assert "try   to go on with run 20260101-120000-7f3a: distbelief resume 7f3a" in done.stderr


@pytest.mark.parametrize("args", [["--workers", "0"], ["--nonsense"], ["gone.toml"], ["x", "y"]])
def test_with_json_the_last_line_is_a_result_whatever_goes_wrong(args):
    done = invoke("launch", "--json", *args)
    assert done.exit_code == 2
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["type"], record["exit"]) == ("result", "failed")
    assert record["error"]["code"].startswith("DB-USE-")


@pytest.mark.parametrize(
    ("error", "exit_code", "word"),
    [(RuntimeError("a bug"), 1, "failed"), (KeyboardInterrupt(), 130, "stopped")],
)
def test_with_json_there_is_a_result_of_a_bug_and_of_ctrl_c_too(
    monkeypatch, error, exit_code, word
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("distbelief.launcher.launch", fail)
    done = invoke("launch", "--json")
    assert done.exit_code == exit_code
    assert json.loads(done.stdout.splitlines()[-1])["exit"] == word
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("word", "exit_code"),
    [("done", 0), ("failed", 1), ("degraded", 4), ("storage", 5), ("stopped", 130)],
)
def test_launch_ends_with_the_code_of_its_result(monkeypatch, word, exit_code):
    error = {"code": "DB-RUN-005", "text": "error[DB-RUN-005]: x"}
    result = Result(run="aa", run_dir="runs/aa", exit=word, error=error)
    monkeypatch.setattr("distbelief.launcher.launch", lambda *_, **__: result)
    done = invoke("launch")
    assert done.exit_code == exit_code
    assert "error[DB-RUN-005]: x\n  more  docs/errors.md#db-run-005" in done.stderr


def test_a_stopped_run_ends_with_the_command_that_goes_on(monkeypatch):
    result = Result(
        run="aa",
        run_dir="runs/aa",
        exit="stopped",
        saved={"samples": 1234.0, "updates": 3, "at": 0.0},
        resume="distbelief resume aa",
    )
    monkeypatch.setattr("distbelief.launcher.launch", lambda *_, **__: result)
    assert invoke("launch").stdout.endswith(
        "go on from 1,234 samples with\n  distbelief resume aa\n"
    )


# launch --dry-run


def test_dry_run_says_what_would_be_started_and_starts_nothing(user_folder):
    args = ["launch", "--dry-run", "--model", "tiny:Net", "--set", "data.image_size=8"]
    done = invoke(*args)
    assert done.exit_code == 0, done.output
    assert "tiny:Net, 650 parameters in 11 parts" in done.stdout
    assert "digits: 1,437 samples to train on, 360 to test" in done.stdout
    assert not (user_folder / "runs").exists()
    plan = json.loads(invoke(*args, "--json").stdout)
    assert (plan["type"], plan["parameters"], plan["bytes_per_push"]) == ("plan", 650, 2600)
    assert sum(plan["bytes_per_shard"]) == 2600


def test_dry_run_finds_what_does_not_fit(user_folder):
    done = invoke("launch", "--dry-run", "--model", "tiny:broken")
    assert done.exit_code == 1
    assert "error[DB-MODEL-001]" in done.stderr


def test_dry_run_of_a_script_does_not_run_it(here):
    (here / "train.py").write_text("raise SystemExit(7)")
    done = invoke("launch", "--dry-run", "train.py")
    assert done.exit_code == 0
    assert "train.py, in 2 workers and 2 shards by ray" in done.stdout


# resume: what it refuses


def test_resume_needs_a_run():
    assert invoke("resume").exit_code == 2
    assert "error[DB-RUN-002]" in invoke("resume", "aa").stderr


def test_resume_of_a_live_run_is_not_ready(here):
    write_status(make_run(here / "runs", "aa"))
    done = invoke("resume", "aa")
    assert done.exit_code == 3
    assert "error[DB-RUN-008]" in done.stderr


def test_resume_of_a_run_that_saved_nothing(here):
    kill(make_run(here / "runs", "aa"))
    done = invoke("resume", "aa")
    assert done.exit_code == 1
    assert "error[DB-RUN-007]" in done.stderr


@pytest.mark.parametrize("args", [[], ["--until", "2-epochs"], ["--until", "1-epochs"]])
def test_resume_of_a_run_that_is_done_wants_a_later_end(here, args):
    run = make_run(here / "runs", "aa")
    write_checkpoint(run)
    end(run)
    done = invoke("resume", "aa", *args)
    assert done.exit_code == 1
    assert "error[DB-RUN-009]: run aa is done: it has trained until 2-epochs" in done.stderr
    assert "--until 4-epochs" in done.stderr
    assert run.result is not None


def test_resume_composes_the_runs_own_settings_and_what_it_is_given(here, monkeypatch):
    run = make_run(here / "runs", "aa")
    write_checkpoint(run)
    end(run, "stopped")
    (here / "distbelief.toml").write_text("shards = 7")
    given = []

    def note(folder, job, *, live, stop):
        given.append((folder, job))
        return Result(run="aa", run_dir="runs/aa", exit="done")

    monkeypatch.setattr("distbelief.launcher.resume", note)
    done = invoke("resume", "aa", "--workers", "4", "--set", "save.keep=3", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout.splitlines()[-1])["exit"] == "done"
    folder, job = given[0]
    assert (str(folder.path), job.workers, job.shards, job.save.keep) == ("runs/aa", 4, 2, 3)
    assert (job.train.lr, job.until) == (0.1, "2-epochs")


def test_resume_goes_to_the_folder_where_the_run_was_launched(here, monkeypatch):
    run = make_run(here / "runs", "aa")
    write_checkpoint(run)
    end(run, "stopped")
    (here / "other").mkdir()
    monkeypatch.chdir(here / "other")
    seen = []

    def note(folder, job, *, live, stop):
        import os

        seen.append((str(folder.path), os.getcwd()))
        return Result(run="aa", run_dir="runs/aa", exit="done")

    monkeypatch.setattr("distbelief.launcher.resume", note)
    done = invoke("resume", "../runs/aa")
    assert done.exit_code == 0, done.output
    assert seen == [("runs/aa", str(here))]
    assert f"in {here}, where the run was launched" in done.stdout


def test_the_launcher_is_the_function_that_these_tests_replace():
    assert launch.__module__ == "distbelief.launcher"
