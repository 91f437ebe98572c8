"""Whole runs by subprocesses: the end, the loss of a worker, Ctrl-C, and a user's mistakes."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from distbelief.launcher import Stop, launch
from distbelief.loaded import evaluate_run
from distbelief.param_server.average import Average
from distbelief.param_server.schedule import Schedule
from tests.helpers.runs import KillOnce, Watch, num_trained, tiny_job

logger = logging.getLogger(__name__)

RESULT_KEYS = {
    "type",
    "v",
    "run",
    "run_dir",
    "engine",
    "workers",
    "shards",
    "samples",
    "updates",
    "train_loss",
    "eval",
    "staleness",
    "samples_per_s",
    "train_s",
    "wall_s",
    "exit",
    "error",
}


def cli(*args, **how):
    return subprocess.Popen(
        [sys.executable, "-m", "distbelief", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


def test_a_run_ends_with_its_result_and_a_model_that_evaluates_to_the_same(user_folder):
    result = launch(tiny_job(user_folder / "runs"), live=Watch())
    assert (result.exit, result.error) == ("done", None)
    assert result.samples == 2 * 1437  # every sample once an epoch
    assert result.worker_samples.keys() == {"w0", "w1"}
    assert sum(result.worker_samples.values()) == 2 * 1437
    assert result.updates == 2 * 45 + 2 * 0  # 11 leases of 4 batches and one of 1, twice
    assert result.eval is not None
    assert result.eval.top1 is not None
    assert result.eval.top1 > 0.8
    assert evaluate_run(user_folder / "runs" / result.run, "test") == result.eval
    written = json.loads((user_folder / "runs" / result.run / "result.json").read_text())
    assert written == json.loads(result.to_json())
    assert written.keys() >= RESULT_KEYS


@pytest.mark.parametrize("num_workers", [4, pytest.param(8, marks=pytest.mark.long)])
def test_mean_staleness_is_one_less_than_the_workers_within_2_percent(user_folder, num_workers):
    """The law of design section 2, as the shards counted it, over at least 1,000 pushes a part.

    Over TCP, where a push brings the values of its own moment. In shared memory they are read a
    little later, and what others pushed in between is not missed: see docs/architecture.md.
    """
    changes = {"workers": num_workers, "until": "2500-updates", "train.batch_size": 2}
    job = tiny_job(user_folder / "runs", **changes, **{"net.shared_memory": False})
    result = launch(job, live=Watch())
    assert result.exit == "done"
    for shard in json.loads((user_folder / "runs" / result.run / "shards.json").read_text()):
        staleness = shard["staleness"]
        pushes = staleness["steady_pushes"] / len(shard["version"])
        mean = staleness["steady_sum"] / staleness["steady_pushes"]
        logger.info("%d workers: mean %.4f of %.0f pushes a part", num_workers, mean, pushes)
        assert pushes >= 1000
        assert mean == pytest.approx(num_workers - 1, rel=0.02)


def test_kill_9_of_a_worker_in_the_middle_of_a_run_ends_normally_and_says_so(user_folder):
    kill = KillOnce(user_folder / "runs", "w1", after_samples=400)
    watch = Watch(kill)
    job = tiny_job(user_folder / "runs", **{"model.factory": "tiny:Slow", "train.batch_size": 16})
    result = launch(job, live=watch)
    assert kill.killed is not None
    assert (result.exit, result.error, result.workers_lost) == ("done", None, 1)
    assert num_trained(result) == 2 * 1437  # what it had not finished the other has done
    assert any("w1 is lost (killed by signal 9)" in text for text in watch.said)


@pytest.mark.long
def test_a_frozen_worker_is_given_up_and_its_work_goes_to_the_others(user_folder):
    freeze = KillOnce(user_folder / "runs", "w1", after_samples=400, number=signal.SIGSTOP)
    watch = Watch(freeze)
    changes = {"model.factory": "tiny:Slow", "train.batch_size": 16, "silence_s": 12}
    result = launch(tiny_job(user_folder / "runs", **changes), live=watch)
    assert freeze.killed is not None
    assert (result.exit, result.error, result.workers_lost) == ("done", None, 1)
    assert num_trained(result) == 2 * 1437
    assert any("w1 has said nothing for 12 s" in text for text in watch.said)


def test_a_shard_that_is_killed_is_back_with_all_that_was_acknowledged(user_folder):
    kill = KillOnce(user_folder / "runs", "shard1", after_samples=400)
    job = tiny_job(user_folder / "runs", **{"model.factory": "tiny:Slow", "train.batch_size": 16})
    watch = Watch(kill)
    result = launch(job, live=watch)
    assert (result.exit, result.error) == ("done", None)
    assert (result.shard_restarts, result.lost_double_fault) == (1, 0)
    assert result.samples == 2 * 1437
    text = "shard1 is lost (killed by signal 9): it is started again from its last snapshot"
    assert text in watch.said


def test_a_run_fails_with_the_reason_when_a_shard_is_killed_and_may_not_restart(user_folder):
    kill = KillOnce(user_folder / "runs", "shard1", after_samples=400)
    changes = {"model.factory": "tiny:Slow", "train.batch_size": 16, "restarts": 0}
    result = launch(tiny_job(user_folder / "runs", **changes), live=Watch(kill))
    assert result.exit == "failed"
    assert result.error is not None
    assert result.error["code"] == "DB-RUN-003"
    assert "shard1 is lost (killed by signal 9)" in result.error["text"]


def test_all_workers_lost_is_a_failure(user_folder):
    kill = KillOnce(user_folder / "runs", "w0", after_samples=200)
    changes = {"model.factory": "tiny:Slow", "train.batch_size": 16, "workers": 1, "restarts": 0}
    result = launch(tiny_job(user_folder / "runs", **changes), live=Watch(kill))
    assert result.exit == "failed"
    assert result.error is not None
    assert "all 1 workers are lost" in result.error["text"]


def test_a_second_request_to_stop_ends_at_once(user_folder):
    stop = Stop()

    def ask_twice(progress):
        if progress.samples:
            stop.ask()
            stop.ask()

    job = tiny_job(user_folder / "runs", **{"model.factory": "tiny:Slow", "until": "1h"})
    began = time.monotonic()
    result = launch(job, live=Watch(ask_twice), stop=stop)
    assert result.exit == "stopped"
    assert time.monotonic() - began < 60


def alive(run):
    """Processes of a run that still exist."""
    pids = [process["pid"] for process in json.loads((run / "processes.json").read_text())]
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_a_nan_loss_ends_the_run_and_names_worker_and_step(user_folder):
    # Without snapshots, or a shard that looks at its values may see them spoiled first.
    args = ["--engine", "local", "--model", "tiny:Net", "--lr", "1e38", "--json"]
    args += ["--set", "save.ack=none", "--set", "save.every_s=0"]
    process = cli("launch", *args, "--until", "3-epochs", cwd=user_folder)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 1
    result = json.loads(out.splitlines()[-1])
    assert (result["exit"], result["error"]["code"]) == ("failed", "DB-TRAIN-001")
    assert "the loss is nan at step" in err or "the loss is inf at step" in err
    assert "Traceback" not in err


def test_a_model_factory_that_raises_is_shown_without_our_frames(user_folder):
    process = cli("launch", "--engine", "local", "--model", "tiny:broken", cwd=user_folder)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error[DB-MODEL-001]: the model factory tiny:broken raised RuntimeError" in err
    assert "the user's own mistake" in err
    assert "tiny.py" in err
    assert "factory.py" not in err
    assert not list(user_folder.glob("runs/*")), "nothing was started"


def test_more_shards_than_parts_are_refused_before_the_start(user_folder):
    process = cli(
        "launch", "--engine", "local", "--model", "tiny:Net", "--shards", "99", cwd=user_folder
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "use at most" in err


def test_latest_policy_with_periods_trains_every_sample(user_folder):
    changes = {
        "train.fetch_policy": "latest",
        "train.n_push": 2,
        "train.n_fetch": 3,
        "workers": 3,
        "train.lr": 0.02,
    }
    result = launch(tiny_job(user_folder / "runs", **changes), live=Watch())
    assert result.exit == "done"
    assert result.samples == 2 * 1437
    assert result.eval is not None
    assert result.eval.top1 is not None
    assert result.eval.top1 > 0.4  # 17 pushes on a busy machine, some 40 on an idle one


@pytest.mark.long
def test_warm_start_trains_alone_first(user_folder):
    changes = {"train.warm_start": 1437, "train.optimizer": "adagrad", "train.lr": 0.05}
    result = launch(tiny_job(user_folder / "runs", **changes), live=Watch())
    assert (result.exit, result.samples) == ("done", 2 * 1437)
    assert result.staleness["p50"] == 0  # half of all pushes had nobody else to miss


def test_a_run_that_averages_comes_to_the_average_and_keeps_the_last_values(user_folder):
    train = replace(
        tiny_job(user_folder / "runs").train,
        average=Average(kind="mean", tail=0.5),
        schedule=Schedule(),
    )
    job = replace(tiny_job(user_folder / "runs"), train=train)
    result = launch(job, live=Watch())
    assert (result.exit, result.error) == ("done", None)
    # Parts count samples pushed; those in the second half of the run enter.
    assert result.averaged == pytest.approx(result.updates / 2, abs=2)
    assert result.eval is not None
    assert result.eval_last is not None
    assert result.eval != result.eval_last
    run = user_folder / "runs" / result.run
    assert evaluate_run(run, "test") == result.eval
    assert evaluate_run(run, "test", last=True) == result.eval_last
    assert result.eval.top1 is not None
    assert result.eval.top1 > 0.8
