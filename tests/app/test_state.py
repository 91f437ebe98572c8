"""What a run is at, judged by its files: each rule once."""

import time

import pytest

from distbelief.state import state_of
from tests.helpers.folders import end, kill, make_run, move_away, write_status


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, "aa")


def test_a_run_that_has_just_been_started_is_starting(run):
    state = state_of(run)
    assert (state.word, state.is_live, state.troubles, state.exit_code) == ("starting", True, (), 0)


def test_a_run_in_training_is_healthy(run):
    write_status(run)
    state = state_of(run)
    assert (state.word, state.is_live, state.exit_code) == ("training", True, 0)


@pytest.mark.parametrize(
    ("changes", "trouble"),
    [
        ({"workers": {"w0": {"state": "lost"}, "w1": {"state": "training"}}}, "lost workers: w0"),
        ({"workers_lost": 2}, "lost workers: 2"),
        ({"shards": {"shard1": {"state": "lost"}}}, "shard1 is lost"),
        (
            {"shards": {"shard0": {"state": "serving", "storage_error": "disk full"}}},
            "shard0 cannot save: disk full",
        ),
        ({"refused": 3}, "parts of pushes that shards refused: 3"),
    ],
)
def test_a_run_with_losses_is_degraded(run, changes, trouble):
    write_status(run, **changes)
    state = state_of(run)
    assert (state.is_live, state.troubles, state.exit_code) == (True, (trouble,), 4)


@pytest.mark.parametrize("word", ["starting", "saving", "evaluating"])
def test_a_launcher_that_is_busy_may_be_silent_while_its_process_lives(run, word):
    write_status(run, state=word)
    later = time.time() + 60
    assert state_of(run, later).exit_code == 0
    move_away(run)
    assert state_of(run, later).exit_code == 4


def test_a_launcher_that_is_silent_in_training_is_degraded(run):
    now = time.time()
    write_status(run, at=now)
    assert state_of(run, now + 9).troubles == ()
    assert state_of(run, now + 12).troubles == ("the launcher has said nothing for 12 s",)


def test_a_launcher_that_was_killed_has_left_no_result(run):
    write_status(run)
    kill(run)
    state = state_of(run)
    assert (state.word, state.is_live, state.exit_code) == ("killed", False, 1)
    assert "it was killed" in state.troubles[0]


def test_a_folder_without_a_launcher_counts_as_killed(run):
    (run.path / "launcher.json").unlink()
    assert state_of(run).word == "killed"


@pytest.mark.parametrize(
    ("word", "exit_code"),
    [("done", 0), ("stopped", 0), ("failed", 1), ("storage", 1), ("degraded", 4)],
)
def test_a_run_that_has_ended_is_what_its_result_says(run, word, exit_code):
    write_status(run)
    end(run, word, error={"code": "DB-RUN-005", "text": "all are lost"})
    state = state_of(run)
    assert (state.word, state.is_live, state.exit_code) == (word, False, exit_code)
    assert state.troubles == ("all are lost",)


def test_the_status_of_the_attempt_before_says_nothing_of_this_one(run):
    write_status(run, at=time.time() - 3600, workers_lost=2)
    state = state_of(run)
    assert (state.word, state.troubles) == ("starting", ())
