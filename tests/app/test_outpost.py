"""Outpost: the run's foot on one host."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distbelief import __version__
from distbelief.outpost import Outpost, data_paths, versions


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home" / ".distbelief" / "runs" / "run-1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "run-1"
    (path / "logs").mkdir(parents=True)
    (path / "launcher.json").write_text(json.dumps({"pid": 7}))
    return path


def test_a_host_that_sees_the_launchers_folder_uses_it(folder, home):
    post = Outpost("run-1", str(folder), json.dumps({"pid": 7}))
    assert (post.outlook().run_path, post.outlook().is_shared) == (str(folder), True)
    (folder / "logs" / "w0.log").write_text("said")
    assert post.news({}) == {}  # it is there already
    assert not home.exists()


@pytest.mark.parametrize("mark", ['{"pid": 8}', "nothing"])
def test_a_host_that_sees_none_or_another_has_a_folder_of_its_own(folder, home, mark):
    post = Outpost("run-1", str(folder), mark)
    assert (post.outlook().run_path, post.outlook().is_shared) == (str(home), False)
    assert (home / "logs").is_dir()


def test_logs_are_told_once_from_where_they_ended(folder, home, monkeypatch):
    post = Outpost("run-1", str(folder / "elsewhere"), "mark")
    (home / "logs" / "w0.log").write_text("one\n")
    (home / "logs" / "w1.log").write_text("")
    assert post.news({}) == {"w0.log": b"one\n"}
    assert post.news({"w0.log": 4}) == {}
    with (home / "logs" / "w0.log").open("a") as file:
        file.write("two\n")
    monkeypatch.setattr("distbelief.outpost.NEWS_MAX", 3)
    assert post.news({"w0.log": 4}) == {"w0.log": b"two"}
    assert post.news({"w0.log": 7}) == {"w0.log": b"\n"}


def test_a_run_that_is_called_like_a_path_makes_no_folder(folder, home):
    with pytest.raises(ValueError, match="no name of a file"):
        Outpost("../../etc", str(folder / "elsewhere"), "mark")


def test_paths_that_are_not_there_are_told_by_what_they_are_for(folder, home, monkeypatch):
    monkeypatch.chdir(folder)
    post = Outpost("run-1", str(folder), "")
    paths = {"the data": "logs", "the script": "train.py"}
    assert post.lacks(paths) == {"the script": "train.py"}


@pytest.mark.parametrize(
    ("source", "script", "paths"),
    [
        ("digits", "", {}),
        ("my_data:load", "", {}),
        ("folder:/data/photos", "", {"the data": "/data/photos"}),
        ("fashion-mnist:there", "", {"the data": "there"}),
        ("wds:/data/{train,test}-*.tar", "", {"the data": "/data"}),
        ("wds:{split}.tar", "", {"the data": "."}),
        ("wds:s3://bucket/{000..9}.tar", "", {}),
        ("digits", "train.py", {"the script": "train.py"}),
    ],
)
def test_what_every_host_must_have(source, script, paths):
    assert data_paths(source, script) == paths


def test_versions_are_those_that_have_to_be_the_same():
    found = versions()
    assert found["distbelief"] == __version__
    assert found["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert {"torch", "ray"} <= found.keys()


def test_a_process_is_asked_to_end(folder, home):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        post = Outpost("run-1", str(folder), "")
        post.ask_to_end(process.pid)
        assert process.wait(20) == -signal.SIGTERM
        post.ask_to_end(process.pid)  # it is gone already
    finally:
        process.kill()
        process.wait()
    assert os.getpid() != process.pid
