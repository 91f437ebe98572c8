"""Whole runs by Ray, in a cluster of the run's own on this machine."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from click.testing import CliRunner
from PIL import Image

from distbelief import ray_hosts
from distbelief.cli import cli
from distbelief.launcher import launch
from distbelief.outpost import versions
from tests.helpers.runs import KillOnce, Watch, num_trained, tiny_job
from tests.helpers.secrets import Secrets


def test_an_encrypted_run_by_ray_trains_every_sample_and_shows_no_secret(user_folder, monkeypatch):
    """Ray writes down much of what it does. Its state API was looked at by hand: SECURITY.md."""
    secrets = Secrets(monkeypatch)
    sessions: set[str] = set()

    def look(progress):
        if sessions or not progress.samples:
            return
        secrets.look_at_processes(user_folder / "runs")
        node: Any = ray._private.worker._global_node
        sessions.add(node.get_session_dir_path())

    job = tiny_job(user_folder / "runs", **{"engine": "ray", "net.encrypt": True})
    result = launch(job, live=Watch(look))
    (session,) = sessions
    assert secrets.look_at_files(Path(session)) > 10
    assert secrets.look_at_files(user_folder / "runs") > 10
    assert len(secrets.known) == 8
    assert {"w0", "w1", "shard0", "shard1"} <= secrets.seen
    assert secrets.found == []
    assert (result.exit, result.error, result.engine) == ("done", None, "ray")
    assert result.samples == 2 * 1437
    assert result.eval is not None
    assert result.eval.top1 is not None
    assert result.eval.top1 > 0.8


@pytest.mark.long
def test_kill_9_of_a_ray_worker_ends_normally_and_says_so(user_folder):
    kill = KillOnce(user_folder / "runs", "w1", after_samples=400)
    watch = Watch(kill)
    changes = {"engine": "ray", "model.factory": "tiny:Slow", "train.batch_size": 16}
    result = launch(tiny_job(user_folder / "runs", **changes), live=watch)
    assert kill.killed is not None
    assert (result.exit, result.error, result.workers_lost) == ("done", None, 1)
    assert num_trained(result) == 2 * 1437
    assert any(text.startswith("worker w1 is lost") for text in watch.said)


@pytest.mark.long
def test_a_shard_that_ray_lost_is_back_with_all_that_was_acknowledged(user_folder):
    kill = KillOnce(user_folder / "runs", "shard1", after_samples=400)
    changes = {"engine": "ray", "model.factory": "tiny:Slow", "train.batch_size": 16}
    result = launch(tiny_job(user_folder / "runs", **changes), live=Watch(kill))
    assert kill.killed is not None
    assert (result.exit, result.error) == ("done", None)
    assert (result.shard_restarts, result.lost_double_fault) == (1, 0)
    assert result.samples == 2 * 1437


@pytest.mark.long
def test_the_controller_of_a_run_by_ray_is_back_where_it_was(user_folder):
    kill = KillOnce(user_folder / "runs", "controller", after_samples=400)
    changes = {"engine": "ray", "model.factory": "tiny:Slow", "train.batch_size": 16}
    result = launch(tiny_job(user_folder / "runs", **changes), live=Watch(kill))
    assert kill.killed is not None
    assert (result.exit, result.error, result.controller_restarts) == ("done", None, 1)
    assert (result.workers_lost, result.shard_restarts, result.samples) == (0, 0, 2 * 1437)
    assert result.accounting["adds_up"] is True


def test_an_address_without_a_cluster_is_a_problem_not_a_traceback(user_folder):
    result = launch(
        tiny_job(user_folder / "runs", engine="ray", address="127.0.0.1:1"), live=Watch()
    )
    assert result.exit == "failed"
    assert result.error is not None
    assert result.error["code"] == "DB-ENV-001"
    assert "could not be reached at 127.0.0.1:1" in result.error["text"]


@pytest.mark.long
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


@pytest.fixture(scope="module")
def two_hosts():
    """Ray's own way to have two on one machine: a second raylet."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20}
    )
    try:
        cluster.add_node(num_cpus=3, object_store_memory=80 * 2**20, resources={"worker": 1})
        yield cluster.address
    finally:
        cluster.shutdown()


def test_a_run_on_two_hosts_is_placed_encrypted_and_trains_every_sample(two_hosts, user_folder):
    watch = Watch()
    job = tiny_job(user_folder / "runs", engine="ray", address=two_hosts, shards=1)
    result = launch(job, live=watch)
    assert (result.exit, result.error) == ("done", None)
    assert result.samples == 2 * 1437
    assert result.accounting["adds_up"] is True
    assert any("are encrypted, by keys of this run" in text for text in watch.said)
    said = json.loads((user_folder / "runs" / result.run / "processes.json").read_text())
    assert {row["name"] for row in said} >= {"w0", "w1", "shard0"}
    assert not ray.is_initialized()


def test_a_run_that_does_not_fit_says_how_much_is_lacking(two_hosts, user_folder):
    more = {"engine": "ray", "address": two_hosts}
    result = launch(tiny_job(user_folder / "runs", workers=8, **more), live=Watch())
    assert result.error is not None
    assert result.error["code"] == "DB-ENV-002"
    assert "8 workers with 1 CPU each need 8 CPU beside 2 shards" in result.error["text"]
    assert "the cluster has 4" in result.error["text"]
    assert not ray.is_initialized()
    wanting = tiny_job(user_folder / "runs", gpus=1.0, **more)
    refused = launch(wanting, live=Watch())
    assert refused.error is not None
    assert refused.error["code"] == "DB-ENV-009"
    assert "2 workers with 1 CPU and 1 GPU each need 2 GPU" in refused.error["text"]


def test_data_that_is_missing_on_a_host_is_named_before_the_start(two_hosts, user_folder):
    """The launcher has it; the hosts get the folder of the command without what git ignores."""
    for label in ("cat", "dog"):
        folder = user_folder / "photos" / label
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(folder / f"{number}.png")
    (user_folder / ".gitignore").write_text("photos\nruns\n")
    more = {"engine": "ray", "address": two_hosts, "data.source": "folder:photos"}
    result = launch(tiny_job(user_folder / "runs", **more), live=Watch())
    assert result.error is not None
    assert result.error["code"] == "DB-DATA-008"
    assert "the data, photos, is not on host" in result.error["text"]


def test_hosts_of_other_versions_and_hosts_that_do_not_answer_are_refused(
    two_hosts, user_folder, monkeypatch
):
    job = tiny_job(user_folder / "runs", engine="ray", address=two_hosts)
    with monkeypatch.context() as patch:
        patch.setattr(ray_hosts, "versions", lambda: {**versions(), "torch": "1.0"})
        other = launch(job, live=Watch())
    assert other.error is not None
    assert other.error["code"] == "DB-ENV-011"
    assert "here it is torch 1.0" in other.error["text"]
    monkeypatch.setattr(ray_hosts, "START_TIMEOUT_S", 0.0)
    silent = launch(job, live=Watch())
    assert silent.error is not None
    assert silent.error["code"] == "DB-ENV-010"
    assert "cannot be used: no answer within 0 s" in silent.error["text"]


def test_doctor_looks_at_all_hosts_of_a_cluster(two_hosts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTBELIEF_SAVE__STORE", str(tmp_path / "store"))
    done = CliRunner().invoke(cli, ["doctor", "--cluster", two_hosts, "--json"])
    told = json.loads(done.stdout)
    found = {check["name"]: (check["level"], check["text"]) for check in told["checks"]}
    assert found["hosts"] == ("ok", "2, with 4 CPU and 0 GPU")
    assert found["roles"][0] == "warn"  # there are hosts for workers alone
    assert found["versions"][0] == "ok"
    assert found["network"][1].startswith("2 ways: ")
    assert found["store"][0] == "ok"
    assert list((tmp_path / "store").iterdir()) == []
    assert done.exit_code == 0
    assert not ray.is_initialized()


GPU_NETS = """
import os
from pathlib import Path
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        if seen is not None:
            Path(f"gpus-{os.getpid()}").write_text(seen)
"""


@pytest.mark.long
def test_two_workers_share_one_gpu_and_three_have_no_room(user_folder, monkeypatch):
    """Ray is told that there is a GPU; what is computed is computed on the CPU."""
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 1}')
    (user_folder / "gpu_nets.py").write_text(GPU_NETS)
    more = {"engine": "ray", "gpus": 0.5, "model.factory": "gpu_nets:Net"}
    result = launch(tiny_job(user_folder / "runs", **more), live=Watch())
    assert (result.exit, result.error) == ("done", None)
    assert [path.read_text() for path in user_folder.glob("gpus-*")].count("0") >= 2

    refused = launch(tiny_job(user_folder / "runs", workers=3, **more), live=Watch())
    assert refused.error is not None
    assert refused.error["code"] == "DB-ENV-009"
    assert "the cluster has 1: room for 2" in refused.error["text"]
