"""What a shell completes: commands, runs, their processes, and keys; and what was meant instead."""

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from distbelief.cli import cli
from tests.helpers.folders import make_run, write_status


@pytest.fixture(autouse=True)
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_status(make_run(tmp_path / "runs", "20261122-231032-b834"))


@pytest.mark.parametrize(
    ("words", "incomplete", "found"),
    [
        ([], "to", ["top"]),
        (["top"], "2026", ["20261122-231032-b834"]),
        (["drain"], "w", ["w0", "w1"]),
        (["logs", "--worker"], "", ["w0", "w1"]),
        (["logs", "--process"], "s", ["shard0", "shard1"]),
        (["config", "explain"], "train.n_", ["train.n_fetch", "train.n_push"]),
        (["launch", "--set"], "save.ev", ["save.every_s="]),
        (["resume", "x", "--set"], "save.ke", ["save.keep="]),
        (["config", "show", "--set"], "train.lr", ["train.lr="]),
        (["completion"], "f", ["fish"]),
    ],
)
def test_words_are_completed(words, incomplete, found):
    complete = ShellComplete(cli, {}, "distbelief", "_DISTBELIEF_COMPLETE")
    assert [item.value for item in complete.get_completions(words, incomplete)] == found


def test_where_there_is_no_run_nothing_is_completed(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    complete = ShellComplete(cli, {}, "distbelief", "_DISTBELIEF_COMPLETE")
    assert complete.get_completions(["drain"], "") == []


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["lauch"], "'launch'"),
        (["statsu"], "'status'"),
        (["launch", "--wrkers", "3"], "'--workers'"),
    ],
)
def test_what_is_spelt_wrong_is_named(args, meant):
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 2
    assert f"Did you mean {meant}?" in done.stderr


def test_what_is_like_nothing_is_not_guessed():
    done = CliRunner().invoke(cli, ["xyzzy"])
    assert done.exit_code == 2
    assert "mean" not in done.stderr
