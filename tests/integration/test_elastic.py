"""Workers that come and go in whole runs by subprocesses, and shards that are asked to end."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading

from distbelief.launcher import launch
from tests.helpers.runs import KillOnce, Watch, num_trained, tiny_job

logger = logging.getLogger(__name__)

SLOW = {"model.factory": "tiny:Slow", "train.batch_size": 16}


def test_workers_come_and_go_and_a_shard_ends_as_they_are_asked_to_and_nothing_is_lost(
    user_folder,
):
    """SIGTERM to workers and to a shard, and both commands, in one run: that takes ten seconds."""
    runs = user_folder / "runs"
    told: list[subprocess.CompletedProcess[str]] = []

    def command(*words):
        whole = [sys.executable, "-m", "distbelief", *words]
        told.append(
            subprocess.run(whole, cwd=user_folder, capture_output=True, text=True, timeout=60)
        )

    def commands():
        command("drain", "w2")
        command("scale", "2")  # of 1 by now
        came.wait(60)
        command("scale", "1")

    thread, came = threading.Thread(target=commands), threading.Event()
    worker = KillOnce(runs, "w1", after_samples=300, number=signal.SIGTERM)
    shard = KillOnce(runs, "shard1", after_samples=500, number=signal.SIGTERM)
    last = KillOnce(runs, "w0", after_samples=0, number=signal.SIGTERM)

    def look(progress):
        worker(progress)
        if worker.killed is not None and progress.num_workers < 3:  # one after the other
            shard(progress)
        if progress.samples >= 700 and thread.ident is None:
            thread.start()
        if told and told[-1].args[-2:] == ["scale", "2"] and progress.num_workers == 2:
            came.set()
        if len(told) == 3 and progress.num_workers == 1:
            last(progress)

    watch = Watch(look)
    changes = {**SLOW, "workers": "1:3", "until": "1h", "train.n_push": 3}
    result = launch(tiny_job(runs, **changes), live=watch)
    thread.join(60)
    assert [done.returncode for done in told] == [0, 0, 0], told
    assert told[0].stdout == "worker w2 is drained\n"
    assert (result.exit, result.error) == ("stopped", None)  # nobody is left
    assert (result.drained, result.workers_lost) == (["w1", "w2", "w1", "w0"], 0)
    assert (result.shard_restarts, result.lost_double_fault) == (1, 0)
    # What was applied is what workers were told of, and it is saved.
    assert result.samples == sum(result.worker_samples.values()) >= 700
    assert result.accounting["adds_up"] is True
    assert result.saved is not None
    assert result.saved["samples"] == result.samples
    assert result.resume
    assert any("w1 was drained" in text for text in watch.said)
    assert any("shard1 was asked to end" in text for text in watch.said)


class KillMany:
    """Kills two workers in turn with signal 9, each some samples after the last one."""

    def __init__(self, runs, count, every):
        self.num_killed = 0
        self._runs, self._count, self._every = runs, count, every
        self._next: KillOnce | None = None

    def __call__(self, progress):
        if self._next is None or self._next.killed is not None:
            if self.num_killed == self._count:
                return
            at = progress.samples + self._every
            self._next = KillOnce(self._runs, f"w{self.num_killed % 2}", at)
        self._next(progress)
        self.num_killed += self._next.killed is not None


def test_kill_9_of_workers_leaves_every_sample_with_one_fate(user_folder):
    """No sample is applied twice and none is missing: the shards count what was handed out.

    The long run: DISTBELIEF_TEST_KILLS=30 make test PYTEST_ARGS=tests/integration/test_elastic.py
    """
    kills = int(os.environ.get("DISTBELIEF_TEST_KILLS", "2"))
    kill = KillMany(user_folder / "runs", kills, every=250)
    epochs = 1 + kills // 2
    changes = {**SLOW, "workers": 2, "until": f"{epochs}-epochs"}
    result = launch(tiny_job(user_folder / "runs", **changes), live=Watch(kill))
    assert (result.exit, result.error) == ("done", None)
    assert result.workers_lost == kill.num_killed == kills
    logger.info("%d kills: %s", kills, result.accounting)
    found = result.accounting
    assert found["adds_up"] is True
    assert found["handed_out"] - found["returned"] == epochs * 1437
    assert found["applied"] + found["partial"] == epochs * 1437
    assert (found["lost"], found["beyond"], found["in_flight"]) == (0, 0, 0)
    (folder,) = (user_folder / "runs").iterdir()
    shards = json.loads((folder / "shards.json").read_text())
    counts = [samples for shard in shards for samples in shard["samples"]]
    assert sum(counts) == len(counts) * epochs * 1437 - found["missed"]
    assert max(counts) <= epochs * 1437
    assert min(counts) >= found["applied"]


class KillController:
    """Kills the controller with signal 9 each time that so many more samples are done."""

    def __init__(self, runs, every):
        self._runs = runs
        self._every = every
        self.pids: list[int] = []

    def __call__(self, progress):
        if progress.samples >= self._every * (1 + len(self.pids)):
            (file,) = self._runs.glob("*/processes.json")
            (pid,) = (r["pid"] for r in json.loads(file.read_text()) if r["name"] == "controller")
            if pid not in self.pids:
                self.pids.append(pid)
                os.kill(pid, signal.SIGKILL)


def test_kill_9_of_the_controller_again_and_again_costs_no_sample_and_no_worker(user_folder):
    runs = user_folder / "runs"
    kill = KillController(runs, every=500)
    watch = Watch(kill)
    result = launch(tiny_job(runs, **{**SLOW, "until": "2-epochs"}), live=watch)
    assert (result.exit, result.error) == ("done", None), watch.said
    assert len(kill.pids) >= 4
    assert result.controller_restarts == len(kill.pids)
    assert (result.workers_lost, result.shard_restarts) == (0, 0)
    assert result.samples == sum(result.worker_samples.values()) == 2 * 1437
    account = result.accounting
    assert account["adds_up"] is True
    assert (account["handed_out"], account["applied"]) == (2 * 1437, 2 * 1437)


def test_a_worker_and_the_controller_are_killed_together(user_folder):
    """What was lost with the worker is settled by the next controller."""
    runs = user_folder / "runs"

    class KillBoth(KillController):
        def __call__(self, progress):
            before = len(self.pids)
            super().__call__(progress)
            if len(self.pids) > before:
                (file,) = self._runs.glob("*/processes.json")
                pids = {row["name"]: row["pid"] for row in json.loads(file.read_text())}
                os.kill(pids["w1"], signal.SIGKILL)

    kill = KillBoth(runs, every=1000)
    result = launch(tiny_job(runs, **{**SLOW, "until": "2-epochs"}), live=Watch(kill))
    assert (result.exit, result.error) == ("done", None)
    assert (result.controller_restarts, result.workers_lost) == (len(kill.pids),) * 2
    assert num_trained(result) == 2 * 1437
