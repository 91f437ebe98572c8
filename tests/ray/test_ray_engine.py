"""Whole runs by Ray, in a cluster of the run's own on this machine."""

import json
import signal
import subprocess
import sys
import time

from distbelief.launcher import launch
from tests.helpers.runs import KillOnce, Watch, tiny_job


def test_a_run_by_ray_trains_every_sample_and_evaluates(user_folder):
    result = launch(tiny_job(user_folder / "runs", engine="ray"), live=Watch())
    assert (result.exit, result.error, result.engine) == ("done", None, "ray")
    assert result.samples == 2 * 1437
    assert result.eval is not None
    assert result.eval.top1 is not None
    assert result.eval.top1 > 0.8


def test_kill_9_of_a_ray_worker_ends_normally_and_says_so(user_folder):
    kill = KillOnce(user_folder / "runs", "w1", after_samples=400)
    watch = Watch(kill)
    changes = {"engine": "ray", "model.factory": "tiny:Slow", "train.batch_size": 16}
    result = launch(tiny_job(user_folder / "runs", **changes), live=watch)
    assert kill.killed is not None
    assert (result.exit, result.error, result.workers_lost) == ("done", None, 1)
    assert result.samples >= 2 * 1437
    assert any(text.startswith("worker w1 is lost") for text in watch.said)


def test_an_address_without_a_cluster_is_a_problem_not_a_traceback(user_folder):
    result = launch(
        tiny_job(user_folder / "runs", engine="ray", address="127.0.0.1:1"), live=Watch()
    )
    assert result.exit == "failed"
    assert result.error is not None
    assert result.error["code"] == "DB-ENV-001"
    assert "could not be reached at 127.0.0.1:1" in result.error["text"]


def test_sigterm_stops_a_run_by_ray_safely(user_folder):
    """Ray takes SIGTERM for itself unless it is taken back."""
    command = [sys.executable, "-m", "distbelief", "launch", "--model", "tiny:Slow", "--json"]
    process = subprocess.Popen(
        [*command, "--until", "1h"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and not training(user_folder):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + signal.SIGTERM, err
    assert json.loads(out.splitlines()[-1])["exit"] == "stopped"


def training(user_folder):
    """True once a worker's log says that it has begun."""
    logs = user_folder.glob("runs/*/logs/w*.log")
    return any("begins" in log.read_text() for log in logs)
