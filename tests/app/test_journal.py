"""Journal: a run's small files, written when there is something new."""

import json
import logging
import os
from typing import Any

import pytest

from distbelief.folder import RunFolder
from distbelief.journal import STATUS_EVERY_S, Journal
from tests.app.test_controller import Play, Saving


@pytest.fixture
def folder(tmp_path):
    return RunFolder.make(tmp_path, "run")


def read(folder: RunFolder, name: str) -> Any:
    return json.loads((folder.path / name).read_text())


def test_the_status_says_how_far_the_run_is(folder):
    play = Play(num_shards=2)
    journal = Journal(folder, play.controller, 2, attempt=1)
    journal.look(0.0)
    assert folder.status is not None
    assert folder.status["state"] == "starting"
    assert folder.status["shards"]["shard1"] == {"state": "serving", "storage_error": ""}
    play.where("w0")
    play.next("w0")
    play.push(3, "w0", answered=20, samples=20, loss=0.5, staleness=1)
    play.controller.storage_errors["shard0"] = "disk full"
    journal.state = "training"
    journal.look(STATUS_EVERY_S)
    status = folder.status
    assert status is not None
    expected = {
        "v": 1,
        "state": "training",
        "samples": 20,
        "total_samples": 100,
        "updates": 3,
        "loss": 0.5,
        "staleness": {"p50": 1, "p95": 1, "max": 1},
        "workers": {"w0": {"state": "training", "samples": 20}},
        "workers_lost": 0,
        "refused": 0,
        "bad_samples": 0,
    }
    assert {key: status[key] for key in expected} == expected
    assert status["shards"]["shard0"]["storage_error"] == "disk full"


def test_a_shard_that_does_not_serve_yet_is_starting(folder):
    play = Play(num_shards=2, serve=False)
    play.serve(1)
    Journal(folder, play.controller, 2, 1).look(0.0)
    assert [read(folder, "status.json")["shards"][f"shard{i}"]["state"] for i in range(2)] == [
        "starting",
        "serving",
    ]


def test_the_status_is_written_once_a_second(folder):
    journal = Journal(folder, Play().controller, 1, 1)
    journal.look(0.0)
    (folder.path / "status.json").unlink()
    journal.look(STATUS_EVERY_S / 2)
    assert folder.status is None
    journal.look(STATUS_EVERY_S)
    assert folder.status is not None


def test_processes_are_written_when_there_are_more(folder):
    play = Play()
    journal = Journal(folder, play.controller, 1, 1)
    journal.look(0.0)
    assert [one["name"] for one in read(folder, "processes.json")] == ["shard0"]
    play.where("w0")
    journal.look(0.1)
    assert [one["name"] for one in read(folder, "processes.json")] == ["shard0", "w0"]


def test_a_checkpoint_is_written_when_all_shards_have_saved(folder):
    play = Saving(num_shards=2)
    journal = Journal(folder, play.controller, 2, attempt=3)
    play.train(3)
    play.saved(0)
    journal.look(0.0)
    assert folder.checkpoint is None
    play.saved(1)
    journal.look(0.1)
    checkpoint = read(folder, "checkpoint.json")
    assert checkpoint == journal.checkpoint
    assert checkpoint["attempt"] == 3
    assert checkpoint["position"]["done_samples"] == 30


def test_a_checkpoint_is_written_again_only_for_a_new_snapshot(folder):
    """Every beat tells of the newest one, and its moment comes out a little different each time."""
    play = Saving()
    journal = Journal(folder, play.controller, 1, 1)
    play.train(3)
    play.saved()
    journal.look(0.0)
    file = folder.path / "checkpoint.json"
    os.utime(file, (0, 0))
    for beat in range(20):
        play.saved(age_s=0.2 * beat + 0.003 * (beat % 3))
        journal.look(0.2 * beat)
    assert file.stat().st_mtime == 0
    play.saved(name="e1-v9")
    journal.look(5.0)
    assert file.stat().st_mtime > 0


def test_of_a_run_that_is_resumed_the_old_checkpoint_is_known_until_there_is_a_new_one(folder):
    folder.write("checkpoint.json", {"v": 1, "samples": 7, "attempt": 1})
    play = Saving()
    journal = Journal(folder, play.controller, 1, attempt=2)
    journal.look(0.0)
    assert journal.checkpoint == {"v": 1, "samples": 7, "attempt": 1}
    assert folder.checkpoint == journal.checkpoint
    journal.write_checkpoint()  # nothing is saved yet
    assert folder.checkpoint == journal.checkpoint
    play.saved()
    journal.look(0.1)
    assert folder.checkpoint is not None
    assert (folder.checkpoint["samples"], folder.checkpoint["attempt"]) == (50, 2)


def test_a_disk_that_takes_no_more_is_told_once(folder, caplog):
    journal = Journal(folder, Play().controller, 1, 1)
    moved = folder.path.rename(folder.path.with_name("away"))
    with caplog.at_level(logging.ERROR):
        for second in range(3):
            journal.look(float(second))
    assert caplog.text.count("cannot be written") == 1
    moved.rename(folder.path)
    journal.look(3.0)
    assert folder.status is not None
    folder.path.rename(moved)
    journal.look(4.0)
    assert caplog.text.count("cannot be written") == 2
