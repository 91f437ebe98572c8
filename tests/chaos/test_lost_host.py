"""Hosts that are lost with their disks, in real runs whose snapshots are in a store too.

The disk of a shard's host is its folder of snapshots and ledgers: that goes with its process. For
the history checker, which has to know what was acknowledged, the ledgers are put back at the end.
"""

import json
import os
import shutil
import signal
import time
from contextlib import contextmanager
from functools import partial

import pytest

from distbelief.chaos.checker import Checker
from tests.chaos.test_runs import Disturbed
from tests.helpers.children import until

SCRIPT = """
import sys, time, torch, distbelief
from distbelief.chaos.gradients import gradient
me = distbelief.worker()
flat = torch.nn.Parameter(torch.zeros(int(sys.argv[1])))
optimizer = distbelief.Downpour([("flat", flat)], lr=1.0)
seq = 0
while True:
    seq += 1
    optimizer.zero_grad()
    flat.grad = gradient(len(flat), me.count, me.index, me.incarnation, seq)
    optimizer.step(samples=1)
    time.sleep(0.01)
"""


class Lossy(Disturbed):
    """A run whose shards lose their disks."""

    @property
    def store(self):
        return self.folder / "store" / self.run.name

    def names(self, shard):
        """Of its snapshots in the store, oldest first."""
        return sorted(path.stem for path in (self.store / shard).glob("e*-v*.json"))

    @contextmanager
    def kill(self, name):
        """SIGKILL; what is done meanwhile is done before anybody starts it again."""
        pid, at = self.pids[name], time.monotonic()
        self.launcher.send_signal(signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        until(lambda: not is_running(pid))
        yield
        self.launcher.send_signal(signal.SIGCONT)
        fault = {"kind": "kill", "target": name, "pid": pid, "at": at, "until": time.monotonic()}
        with (self.run / "faults.jsonl").open("a") as file:
            file.write(json.dumps(fault) + "\n")
        until(lambda: self.pids[name] != pid, 30)

    def lose(self, name):
        """Its process and its disk are gone."""
        with self.kill(name):
            shutil.move(self.run / "snapshots" / name, self.folder / f"lost-{time.monotonic_ns()}")

    def put_back_ledgers(self, name):
        for file in self.folder.glob("lost-*/ledger-*"):
            target = self.run / "snapshots" / name / file.name
            assert not target.exists()
            shutil.copy(file, target)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def lossy(request, tmp_path):
    settings = [f"save.store={tmp_path / 'store'}", getattr(request, "param", "save.ack=applied")]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = Lossy(tmp_path, str(script), ["70000"], *settings)
    try:
        run.begin()
        yield run
    finally:
        if run.launcher.poll() is None:
            run.launcher.send_signal(signal.SIGCONT)
        run.close()


def test_a_shard_that_is_lost_with_its_disk_loses_nothing_that_was_acknowledged(lossy):
    def is_beyond(before: list[str]) -> bool:
        return bool(lossy.names("shard0") > before)

    for _ in range(3):
        before = lossy.names("shard0")
        until(partial(is_beyond, before), 30)
        lossy.lose("shard0")
        lossy.go_on()
    result = lossy.stop()
    assert result["exit"] == "stopped", lossy.said
    assert result["shard_restarts"] == 3
    assert result["workers_lost"] == 0
    assert "Traceback" not in lossy.said
    assert (lossy.store / "result.json").read_text() == (lossy.run / "result.json").read_text()
    lossy.put_back_ledgers("shard0")
    verdict = Checker(lossy.run).check(gradients=True)
    assert verdict.violations == []
    assert verdict.acked > 100
    assert verdict.lost == verdict.lost_double_fault == result["lost_double_fault"] == 0
    assert len(lossy.names("shard0")) == 2


def storage_error(run):
    status = json.loads((run.run / "status.json").read_text())
    return status["shards"]["shard0"]["storage_error"]


@pytest.mark.parametrize("lossy", ["save.ack=durable"], indirect=True)
def test_while_the_store_is_away_nothing_is_durable_and_a_lost_host_costs_nothing(lossy):
    """The pushes that its disk had and the store did not are sent again by their workers."""
    until(lambda: lossy.names("shard0"), 30)
    lossy.store.parent.rename(lossy.folder / "away")
    until(lambda: "cannot be read" in storage_error(lossy), 30)
    on_disk = lossy.run / "snapshots" / "shard0"
    away = lossy.folder / "away" / lossy.run.name / "shard0"
    until(lambda: newest(on_disk) > newest(away), 30)
    time.sleep(1.0)
    acks = lossy.num_acks
    time.sleep(1.0)
    assert lossy.num_acks == acks  # each worker waits for its last push to be durable
    with lossy.kill("shard0"):
        shutil.move(on_disk, lossy.folder / "lost-1")
        (lossy.folder / "away").rename(lossy.folder / "store")
    lossy.go_on()
    until(lambda: not storage_error(lossy))
    result = lossy.stop()
    assert result["exit"] == "stopped", lossy.said
    lossy.put_back_ledgers("shard0")
    verdict = Checker(lossy.run).check(gradients=True)
    assert [
        text for text in verdict.violations if not text.startswith("I7")
    ] == []  # it had to wait
    assert verdict.lost == verdict.lost_double_fault == 0


def newest(folder):
    """The name of its newest snapshot."""
    return max(path.name.partition(".")[0] for path in folder.glob("e*-v*"))
