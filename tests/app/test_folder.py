"""Run folders: found by their names, read without half a file, asked to stop."""

from pathlib import Path

import pytest

from distbelief.folder import RunFolder, all_runs, find_run
from distbelief.problem import Problem
from tests.helpers.folders import kill, make_run, move_away, write_status


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parent = Path("runs")
    for name in ("20260101-120000-aaaa", "20260102-120000-aabb", "20260103-120000-aacc"):
        make_run(parent, name)
    (parent / "notes").mkdir()
    return parent


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (None, "20260103-120000-aacc"),
        ("20260102-120000-aabb", "20260102-120000-aabb"),
        ("20260101", "20260101-120000-aaaa"),
        ("bb", "20260102-120000-aabb"),
        ("runs/20260101-120000-aaaa", "20260101-120000-aaaa"),
        ("runs/20260101-120000-aaaa/", "20260101-120000-aaaa"),
    ],
)
def test_a_run_is_found_by_folder_id_or_either_end_of_it(runs, name, found):
    assert find_run(name, runs).run == found


def test_the_current_folder_may_be_a_run(runs, monkeypatch):
    monkeypatch.chdir(runs / "20260101-120000-aaaa")
    assert find_run(".", runs).run == "20260101-120000-aaaa"


@pytest.mark.parametrize(
    ("name", "text"),
    [("2026", "may be any of"), ("zz", "neither a run folder nor a run"), ("notes", "neither")],
)
def test_a_name_of_none_or_many_is_refused(runs, name, text):
    with pytest.raises(Problem, match=text) as caught:
        find_run(name, runs)
    assert caught.value.code == "DB-RUN-002"


def test_no_runs_at_all(tmp_path):
    assert all_runs(tmp_path / "gone") == []
    with pytest.raises(Problem, match="there is no run in"):
        find_run(None, tmp_path)


def test_a_request_to_stop_is_seen_and_forgotten(runs):
    folder = find_run(None, runs)
    assert folder.asked_stop() == 0
    folder.ask_stop("safe")
    assert folder.asked_stop() == 1
    folder.ask_stop("now")
    assert folder.asked_stop() == 2
    folder.forget_stop()
    folder.forget_stop()
    assert folder.asked_stop() == 0


def test_a_launcher_is_alive_until_it_is_gone_or_cannot_be_seen(runs):
    folder = find_run(None, runs)
    launcher = folder.launcher
    assert launcher is not None
    assert launcher.is_alive is True
    kill(folder)
    assert folder.launcher is not None
    assert folder.launcher.is_alive is False
    move_away(folder)
    assert folder.launcher.is_alive is None


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_a_damaged_file_reads_as_none(runs, content):
    folder = find_run(None, runs)
    write_status(folder)
    assert folder.status is not None
    (folder.path / "status.json").write_text(content)
    assert folder.status is None


def test_the_command_that_goes_on_names_the_place_where_it_is_not_the_usual(tmp_path):
    assert RunFolder(Path("runs/aa")).resume_command == "distbelief resume aa"
    folder = RunFolder(tmp_path / "aa")
    assert folder.resume_command == f"distbelief resume aa --run-dir {tmp_path}"
