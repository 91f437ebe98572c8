"""status, stop, runs: what they say of run folders, and with which exit code."""

import json
import threading
import time

import pytest
from click.testing import CliRunner

from distbelief.cli import cli
from tests.helpers.folders import (
    CONFIG,
    end,
    kill,
    make_run,
    move_away,
    write_checkpoint,
    write_status,
)


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.fixture
def run(runs):
    return make_run(runs, "20260101-120000-aaaa")


def invoke(*args, **how):
    return CliRunner().invoke(cli, list(args), **how)


# status


def test_status_of_a_run_in_training(run):
    write_status(run)
    write_checkpoint(run)
    done = invoke("status")
    assert done.exit_code == 0
    assert done.output.splitlines() == [
        "run 20260101-120000-aaaa: training",
        "  tiny:Net on digits",
        "  2 workers and 2 shards by local",
        "  1,000 samples of 2,874 (35%), 15 s left, 123 samples/s",
        "  loss 0.5, 31 updates, staleness p50/p95/max 1/2/3",
        "  w0 training, w1 training",
        "  shard0 serving, shard1 serving",
        "  checkpoint of 800 samples, 40 s ago",
    ]


def test_status_before_anything_is_known(run):
    write_status(
        run,
        samples=0,
        total_samples=None,
        eta_s=None,
        loss=None,
        staleness={"p50": None, "p95": None, "max": None},
    )
    lines = invoke("status").output.splitlines()
    assert "  0 samples, 123 samples/s" in lines
    assert "  loss -, 31 updates, staleness p50/p95/max -/-/-" in lines


def test_status_of_a_degraded_run_says_why(run):
    write_status(run, workers={"w0": {"state": "lost"}})
    done = invoke("status", "aaaa")
    assert done.exit_code == 4
    assert "  ! lost workers: w0" in done.output


def test_status_of_a_run_whose_launcher_was_killed_says_how_to_go_on(run):
    kill(run)
    done = invoke("status")
    assert done.exit_code == 1
    assert "start anew with\n  distbelief launch runs/20260101-120000-aaaa/config.toml" in (
        done.output
    )
    write_checkpoint(run)
    done = invoke("status")
    assert "go on with\n  distbelief resume 20260101-120000-aaaa\n" in done.output


@pytest.mark.parametrize(
    ("word", "exit_code"), [("done", 0), ("stopped", 0), ("failed", 1), ("storage", 1)]
)
def test_status_of_a_run_that_has_ended(run, word, exit_code):
    error = {"code": "DB-RUN-005", "text": "error[DB-RUN-005]: all are lost\n  why   w0"}
    end(run, word, error=error if exit_code else None)
    done = invoke("status")
    assert done.exit_code == exit_code
    assert done.output.startswith(f"run {run.run}: {word}\n")
    assert "  2,874 samples in 90 updates" in done.output
    assert ("  ! error[DB-RUN-005]: all are lost" in done.output) == bool(exit_code)


def test_status_as_json(run):
    write_status(run, refused=1)
    write_checkpoint(run)
    done = invoke("status", "--json")
    record = json.loads(done.output)
    assert done.exit_code == record["exit_code"] == 4
    assert (record["type"], record["v"], record["run"]) == ("status", 1, run.run)
    assert (record["state"], record["live"], record["resume"]) == ("training", True, "")
    assert record["troubles"] == ["parts of pushes that shards refused: 1"]
    assert record["status"]["samples"] == 1000
    assert record["checkpoint"].keys() == {"samples", "updates", "at"}
    assert record["result"] is None


def test_status_without_runs_says_so(runs):
    done = invoke("status")
    assert done.exit_code == 1
    assert "error[DB-RUN-002]: there is no run in runs" in done.stderr


# stop


def answer(run, act):
    """Play the launcher: when it is asked to stop, do something."""

    def work():
        while not run.asked_stop():
            time.sleep(0.01)
        act(run.asked_stop())

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize(("args", "level"), [([], 1), (["--now"], 2)])
def test_stop_asks_waits_and_tells_the_result(run, args, level):
    write_status(run)
    levels = []

    def act(asked):
        levels.append(asked)
        write_status(run, state="saving")
        time.sleep(0.5)
        end(run, "stopped", resume="distbelief resume aaaa", saved={"samples": 2874})

    launcher = answer(run, act)
    done = invoke("stop", *args)
    launcher.join()
    assert (done.exit_code, levels) == (0, [level])
    assert "  saving, 1,000 samples" in done.stderr
    assert done.stdout.startswith("stopped: run 20260101-120000-aaaa")
    assert done.stdout.endswith("go on from 2,874 samples with\n  distbelief resume aaaa\n")


def test_stop_ends_with_a_line_of_json(run):
    write_status(run)
    launcher = answer(run, lambda _: end(run, "stopped"))
    done = invoke("stop", "--json")
    launcher.join()
    assert json.loads(done.stdout.splitlines()[-1])["exit"] == "stopped"


def test_stop_has_the_exit_code_of_a_run_that_failed_meanwhile(run):
    write_status(run)
    error = {"code": "DB-STORE-001", "text": "error[DB-STORE-001]: disk full"}
    launcher = answer(run, lambda _: end(run, "storage", error=error))
    done = invoke("stop")
    launcher.join()
    assert done.exit_code == 5
    assert "error[DB-STORE-001]: disk full\n  more  docs/errors.md#db-store-001" in done.stderr


def test_stop_of_a_run_that_has_ended_says_so(run):
    end(run, "failed")
    done = invoke("stop")
    assert (done.exit_code, done.stdout) == (0, f"run {run.run} has ended already: failed\n")
    assert not (run.path / "stop").exists()
    assert json.loads(invoke("stop", "--json").stdout)["exit"] == "failed"


def test_stop_of_a_run_whose_launcher_is_killed_says_how_to_go_on(run):
    write_status(run)
    write_checkpoint(run)
    launcher = answer(run, lambda _: kill(run))
    done = invoke("stop")
    launcher.join()
    assert done.exit_code == 1
    assert "error[DB-RUN-011]" in done.stderr
    assert f"  try   go on with it: distbelief resume {run.run}" in done.stderr
    assert not (run.path / "stop").exists()  # or it would stop the run that goes on
    (run.path / "checkpoint.json").unlink()
    assert "nothing was saved; start anew" in invoke("stop").stderr


def test_stop_of_a_run_on_another_machine_waits_for_its_result(run):
    move_away(run, started_s_ago=60)
    write_status(run, at=time.time() - 30)

    def act(_):
        time.sleep(0.3)
        end(run, "stopped")

    launcher = answer(run, act)
    done = invoke("stop")
    launcher.join()
    assert done.exit_code == 0
    assert "the launcher has said nothing" in done.stderr


def test_stop_of_a_folder_that_takes_no_file_is_told(run, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr("distbelief.folder.RunFolder.ask_stop", refuse)
    done = invoke("stop")
    assert done.exit_code == 5
    assert "error[DB-STORE-004]" in done.stderr


# runs


def test_runs_ls_lists_the_newest_first(run, runs):
    end(run, eval={"split": "test", "top1": 0.9876, "top5": None, "loss": 0.1})
    script = CONFIG.replace('path = ""', 'path = "/home/me/train.py"')
    write_status(make_run(runs, "20260102-120000-bbbb", script))
    lines = [line.split() for line in invoke("runs", "ls").output.splitlines()]
    assert lines[0] == ["run", "state", "model", "data", "workers", "samples", "top-1", "age"]
    assert lines[1][:7] == [
        *("20260102-120000-bbbb", "training", "train.py", "-"),
        *("2", "1,000", "-"),
    ]
    assert lines[2][:7] == [
        *("20260101-120000-aaaa", "done", "tiny:Net", "digits"),
        *("2", "2,874", "0.9876"),
    ]


def test_runs_ls_as_json_is_a_line_a_run(run, runs):
    make_run(runs, "20260102-120000-bbbb")
    records = [json.loads(line) for line in invoke("runs", "ls", "--json").output.splitlines()]
    assert [r["run"] for r in records] == ["20260102-120000-bbbb", run.run]
    assert {r["type"] for r in records} == {"run"}


def test_runs_ls_without_runs_and_with_a_damaged_one(run, runs):
    run.config.write_text("[damaged")
    done = invoke("runs", "ls")
    assert done.exit_code == 0
    assert run.run in done.stdout
    done = invoke("runs", "ls", "--run-dir", "nowhere")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "there is no run in nowhere" in done.stderr


def test_runs_show_has_result_settings_and_files(run):
    assert "starting: run" in invoke("runs", "show").output
    end(run, "failed", error={"code": "DB-RUN-005", "text": "all are lost"})
    text = invoke("runs", "show").output
    assert "failed: run 20260101-120000-aaaa" in text
    assert "all are lost\n  more  docs/errors.md#db-run-005" in text
    assert "  train.lr = 0.1" in text
    assert "result.json" in text
    record = json.loads(invoke("runs", "show", "--json").output)
    assert record["config"]["train"] == {"lr": 0.1}
    assert record["files"]["config.toml"] == len(CONFIG)


def test_runs_rm_removes_those_it_names(run, runs):
    other = make_run(runs, "20260102-120000-bbbb")
    for folder in (run, other):
        end(folder)
    done = invoke("runs", "rm", "bbbb", "aaaa", "20260102-120000-bbbb", "-y")
    assert done.exit_code == 0
    assert len(done.output.splitlines()) == 2
    assert list(runs.iterdir()) == []


def test_runs_rm_refuses_all_where_one_goes_on(run, runs):
    end(make_run(runs, "20260102-120000-bbbb"))
    write_status(run)
    done = invoke("runs", "rm", "bbbb", "aaaa", "-y")
    assert done.exit_code == 3
    assert "error[DB-RUN-008]: run 20260101-120000-aaaa is still going on" in done.stderr
    assert "distbelief stop 20260101-120000-aaaa" in done.stderr
    assert len(list(runs.iterdir())) == 2


def test_runs_rm_asks_only_where_somebody_can_answer(run, monkeypatch):
    end(run)
    done = invoke("runs", "rm", "aaaa")
    assert done.exit_code == 2
    assert "error[DB-USE-008]" in done.stderr
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True)
    done = invoke("runs", "rm", "aaaa", input="n\n")
    assert done.exit_code == 1
    assert run.is_run
    assert invoke("runs", "rm", "aaaa", input="y\n").exit_code == 0
    assert not run.is_run


def test_runs_diff_says_what_differs(run, runs):
    other = make_run(runs, "20260102-120000-bbbb", CONFIG.replace("lr = 0.1", "lr = 0.2"))
    end(run, train_loss=0.5)
    end(other, train_loss=0.25)
    rows = [line.split() for line in invoke("runs", "diff", "aaaa", "bbbb").output.splitlines()]
    assert rows == [
        ["20260101-120000-aaaa", "20260102-120000-bbbb"],
        ["train.lr", "0.1", "0.2"],
        ["train_loss", "0.5", "0.25"],
    ]
    record = json.loads(invoke("runs", "diff", "aaaa", "bbbb", "--json").output)
    assert record["config"] == {"train.lr": [0.1, 0.2]}
    assert "differ in nothing" in invoke("runs", "diff", "aaaa", "aaaa").output


# completion


@pytest.mark.parametrize(
    ("shell", "word"), [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete --")]
)
def test_completion_prints_the_script_of_a_shell(shell, word):
    done = invoke("completion", shell)
    assert done.exit_code == 0
    assert word in done.output
    assert "_DISTBELIEF_COMPLETE" in done.output


@pytest.mark.parametrize(
    ("words", "cword", "found"),
    [
        ("distbelief st", 1, ["status", "stop"]),
        ("distbelief status 2026", 2, ["20260102-120000-bbbb", "20260101-120000-aaaa"]),
        ("distbelief resume 20260101", 2, ["20260101-120000-aaaa"]),
        ("distbelief runs rm 20260101-120000-aaaa 20260102", 4, ["20260102-120000-bbbb"]),
        ("distbelief status --run-dir nowhere 2", 4, []),
    ],
)
def test_runs_are_completed(run, runs, words, cword, found):
    make_run(runs, "20260102-120000-bbbb")
    env = {
        "_DISTBELIEF_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(cword),
    }
    done = CliRunner(env=env).invoke(cli, [], prog_name="distbelief")
    assert [line.partition(",")[2] for line in done.output.split()] == found


def test_a_broken_file_of_settings_does_not_break_completion(run, tmp_path):
    (tmp_path / "distbelief.toml").write_text("[broken")
    env = {
        "_DISTBELIEF_COMPLETE": "bash_complete",
        "COMP_WORDS": "distbelief status ",
        "COMP_CWORD": "2",
    }
    done = CliRunner(env=env).invoke(cli, [], prog_name="distbelief")
    assert done.output.split() == []
