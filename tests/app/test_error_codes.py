"""Every code of docs/errors.md has a test that provokes it. Here: those that need no processes."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from distbelief.cli import cli
from distbelief.engine import LocalEngine
from distbelief.job import load_job
from distbelief.keyring import keyring_of
from distbelief.launcher import launch, resume
from distbelief.problem import Problem
from tests.app.test_spec import SPEC
from tests.helpers.folders import end, kill, make_run, write_checkpoint, write_status
from tests.helpers.runs import tiny_job

CODE = re.compile(r"\bDB-[A-Z]+-\d{3}\b")


@pytest.fixture(autouse=True)
def _home_without_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.chdir(tmp_path)


def invoke(*args: str):
    return CliRunner().invoke(cli, list(args))


def codes_in(paths) -> set[str]:
    return {code for path in paths for code in CODE.findall(path.read_text(encoding="utf-8"))}


def sources(root: Path):
    for folder in ("distbelief", "workers", "param_server", "model"):
        yield from (path for path in (root / folder).rglob("*.py") if path.is_file())


def test_sources_docs_and_tests_know_the_same_codes(repo_root):
    listed = [
        line.split("|")[1].strip()
        for line in (repo_root / "docs/errors.md").read_text().splitlines()
        if line.startswith("| DB-")
    ]
    assert len(listed) == len(set(listed))
    assert set(listed) == codes_in(sources(repo_root))
    tested = codes_in((repo_root / "tests").rglob("test_*.py"))
    assert set(listed) - tested == set(), "codes that no test provokes"


def test_a_script_that_is_not_there_any_more():  # as when a run is resumed elsewhere
    job = load_job(None, {"engine": "local", "script.path": "gone.py"}, ())
    with pytest.raises(Problem, match="there is no script") as caught:
        launch(job)
    assert caught.value.code == "DB-USE-004"


def test_an_argument_that_is_neither_a_script_nor_settings():
    done = invoke("launch", "job.yaml")
    assert done.exit_code == 2
    assert done.stderr.startswith("error[DB-USE-006]")


def test_drain_of_a_worker_that_does_not_train(tmp_path):
    write_status(make_run(tmp_path / "runs", "aa"))
    done = invoke("drain", "w9")
    assert done.exit_code == 2
    assert "error[DB-USE-010]: run aa has no worker w9 that trains" in done.stderr
    assert "w0 training, w1 training" in done.stderr


@pytest.mark.parametrize(
    ("least", "number", "text"),
    [(0, "3", "has a fixed number of workers, 2"), (1, "9", "cannot have 9 workers")],
)
def test_scale_to_a_number_that_the_run_cannot_have(tmp_path, least, number, text):
    folder = make_run(tmp_path / "runs", "aa", f"workers = 2\nmin_workers = {least}\n")
    write_status(folder)
    done = invoke("scale", number)
    assert done.exit_code == 2
    assert "error[DB-USE-011]" in done.stderr
    assert text in done.stderr
    assert folder.take_asked() == {}


@pytest.mark.parametrize("args", [["drain", "w0"], ["scale", "2"]])
def test_asking_a_run_that_does_not_go_on(tmp_path, args):
    end(make_run(tmp_path / "runs", "aa"))
    done = invoke(*args)
    assert done.exit_code == 1
    assert "error[DB-RUN-014]: run aa is not going on: done" in done.stderr


def test_a_model_file_that_is_none(tmp_path):
    folder = make_run(tmp_path / "runs", "aa", load_job(None, {"model.width": 0.1}, ()).to_toml())
    end(folder)
    folder.model.write_bytes(b"\x10\0\0\0\0\0\0\0{junk")
    done = invoke("eval", "aa")
    assert done.exit_code == 1
    assert "error[DB-MODEL-004]" in done.stderr


def test_a_process_that_cannot_be_started(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(Problem, match="could not be started") as caught:
        LocalEngine().start(replace(SPEC, run_path=str(tmp_path)))
    assert (caught.value.code, caught.value.exit_code) == ("DB-ENV-003", 3)


def test_keys_that_are_not_there(tmp_path):
    (tmp_path / "keys").mkdir()
    job = load_job(None, {"net.encrypt": True, "net.keys": str(tmp_path / "keys")}, ())
    with pytest.raises(Problem, match="is not there") as caught:
        keyring_of(job)
    assert (caught.value.code, caught.value.exit_code) == ("DB-KEY-002", 3)


def test_snapshots_of_which_none_can_be_read(user_folder):
    folder = make_run(user_folder / "runs", "aa")
    kill(folder)
    write_checkpoint(folder)
    for shard in ("shard0", "shard1"):
        snapshot = folder.snapshots / shard / "e000001-v000000000540"
        snapshot.mkdir(parents=True)
        (snapshot / "manifest.json").write_text("{}")
    with pytest.raises(Problem, match="no snapshot in") as caught:
        resume(folder, tiny_job(user_folder / "runs"))
    assert (caught.value.code, caught.value.exit_code) == ("DB-STORE-003", 5)
