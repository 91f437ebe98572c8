"""Runs with a store: one that fails, and going on from it where nothing else is left."""

import json
import shutil
from pathlib import Path

import pytest

from distbelief.controller.pace import Progress
from distbelief.folder import RunFolder
from distbelief.grants import FILE as GRANTS
from distbelief.launcher import launch, resume
from distbelief.param_server.storage import storage_of
from distbelief.problem import Problem
from distbelief.stored import Copies, fetch, is_stored
from tests.helpers.children import until
from tests.helpers.runs import KillOnce, Watch, tiny_job
from tests.helpers.stores import ObjectStore
from tests.integration.test_resume import DIGITS, StopAt, start
from tests.integration.test_storage import on_disk


def test_a_run_whose_folder_is_lost_is_resumed_from_the_store(user_folder: Path):
    store = user_folder / "store"
    job = tiny_job(
        user_folder / "runs",
        **{"until": "4-epochs", "model.factory": "tiny:Slow", "save.store": str(store)},
    )
    kill = KillOnce(user_folder / "runs", "shard1", 500)  # so that its epoch is beyond the attempt
    watch = StopAt(samples=2000)
    look = watch._on_progress

    def both(progress: Progress) -> None:
        kill(progress)
        look(progress)

    watch._on_progress = both
    stopped = start(job, watch)
    assert (stopped.exit, stopped.shard_restarts) == ("stopped", 1)
    shutil.rmtree(user_folder / "runs")

    place = str(store / stopped.run)
    assert is_stored(place)
    folder = fetch(place, user_folder / "elsewhere")
    granted = json.loads((folder.path / GRANTS).read_text())
    assert granted["shard1"] >= 2
    resumed = resume(folder, job, live=Watch())
    assert resumed.exit == "done"
    assert (resumed.run, resumed.attempt, resumed.samples) == (stopped.run, 2, 4 * DIGITS)
    assert json.loads((store / stopped.run / "result.json").read_text())["attempt"] == 2
    with pytest.raises(Problem, match="cannot be made") as caught:
        fetch(place, user_folder / "elsewhere")  # it is here by now
    assert caught.value.code == "DB-STORE-002"


def test_the_number_of_a_lost_launcher_is_not_granted_again(user_folder: Path):
    """Its last grants may not have come to the store any more."""
    store = user_folder / "store"
    job = tiny_job(user_folder / "runs", **{"save.store": str(store), "until": "1-epochs"})
    first = launch(job, live=Watch())
    (store / first.run / "shard0" / "e000007").write_text("7")
    (store / first.run / GRANTS).write_text('{"shard0": 3, "w0": 1}')
    folder = fetch(str(store / first.run), user_folder / "elsewhere")
    granted = json.loads((folder.path / GRANTS).read_text())
    assert granted["shard0"] == 7
    assert granted["shard1"] == 1
    assert granted["w0"] >= 1


@pytest.mark.parametrize(
    ("run", "text"), [("memory://nowhere/run", "is no run in a store"), ("s3://b/run", "s3fs")]
)
def test_what_is_no_run_in_a_store_is_told(run, text, tmp_path):
    with pytest.raises(Problem, match=text) as caught:
        fetch(run, tmp_path)
    assert caught.value.code == "DB-RUN-002"
    assert is_stored(run)


def test_a_run_folder_is_none_in_a_store(user_folder: Path):
    folder = RunFolder.make(user_folder, "aa")
    folder.config.write_text("")
    assert not is_stored(str(folder.path))
    assert not is_stored("aa")


def test_a_store_that_takes_nothing_is_said_before_anything_is_started(user_folder: Path):
    (user_folder / "store").mkdir()
    ended = on_disk(
        user_folder,
        "size=64k,ro",
        "--set",
        f"save.store={user_folder / 'disk'}",
        "--run-dir",
        str(user_folder / "runs"),
    )
    assert ended.returncode == 5
    assert "error[DB-STORE-005]" in ended.stderr
    assert "Read-only file system" in ended.stderr
    assert "starting 2 shards" not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_store_that_fills_up_is_said_and_training_goes_on(user_folder: Path):
    ended = on_disk(
        user_folder,
        "size=32k",
        "--json",
        "--set",
        f"save.store={user_folder / 'disk'}",
        "--run-dir",
        str(user_folder / "runs"),
    )
    assert ended.returncode == 5
    result = json.loads(ended.stdout.splitlines()[-1])
    assert (result["exit"], result["samples"]) == ("storage", 1437)
    assert result["error"]["code"] == "DB-STORE-001"
    assert "No space left" in result["error"]["text"]
    assert "could not be copied to" in result["error"]["text"]
    assert "Traceback" not in ended.stderr
    (run,) = (user_folder / "runs").glob("*")
    assert list(run.glob("snapshots/shard0/e*"))  # the disk has them all the same


@pytest.fixture
def objects():
    ObjectStore.empty()
    yield storage_of("objects://bucket/runs", "aa")
    ObjectStore.empty()


def test_small_files_are_copied_when_they_change_and_go_when_they_go(objects, tmp_path, caplog):
    folder = RunFolder.make(tmp_path, "aa")
    folder.config.write_text("a = 1")
    folder.write("result.json", {"attempt": 1})
    copies = Copies(objects, folder.path, every_s=0.01)
    try:
        assert objects.names("") == ["config.toml", "result.json"]
        (folder.path / "result.json").unlink()
        until(lambda: objects.names("") == ["config.toml"])
        ObjectStore.failing = OSError("503")
        folder.write("checkpoint.json", {"samples": 1})
        until(lambda: "objects://bucket/runs/aa cannot be written: 503" in caplog.text)
        ObjectStore.failing = None
        until(lambda: "checkpoint.json" in objects.names(""))
        folder.write("checkpoint.json", {"samples": 2})
    finally:
        copies.close()
    assert json.loads(objects.read("checkpoint.json")) == {"samples": 2}
    assert caplog.text.count("cannot be written") == 1
