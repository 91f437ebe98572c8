"""Real runs that are paused, poisoned and cut, and what their histories prove afterwards.

Pauses are short by default. The long run pauses for up to so many seconds, which is longer than
the launcher waits for a silent shard:

    DISTBELIEF_TEST_PAUSE_S=15 .venv/bin/python -m pytest --timeout 900 tests/chaos/test_runs.py
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distbelief.chaos.checker import Checker
from tests.helpers.children import until

PAUSE_S = float(os.environ.get("DISTBELIEF_TEST_PAUSE_S", "0.8"))


class Disturbed:
    """A run of a script in a process of its own, and its processes by name."""

    def __init__(self, folder: Path, script: str, args: list[str], *settings: str) -> None:
        command = [sys.executable, "-m", "distbelief", "launch", script, "--engine", "local"]
        command += ["--workers", "2", "--shards", "2", "--run-dir", str(folder / "runs")]
        for setting in ("save.history=true", "save.every_s=0.5", *settings):
            command += ["--set", setting]
        self._out = (folder / "launcher.out").open("w+b")
        self.launcher = subprocess.Popen(
            [*command, "--", *args],
            cwd=folder,
            stdout=self._out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.folder = folder

    def begin(self) -> None:
        """Wait until all processes are there, and pushes are answered."""
        until(lambda: len(self.pids) == 6 and self.num_acks > 20, 60)

    @property
    def run(self) -> Path:
        (found,) = (self.folder / "runs").glob("*")
        return found

    @property
    def pids(self) -> dict[str, int]:
        found = {"launcher": self.launcher.pid}
        for file in (self.folder / "runs").glob("*/processes.json"):
            found.update({row["name"]: row["pid"] for row in json.loads(file.read_text())})
        return found

    @property
    def num_acks(self) -> int:
        files = (self.folder / "runs").glob("*/history/*.jsonl")
        return sum(file.read_text().count('"ack"') for file in files)

    @property
    def said(self) -> str:
        return (self.folder / "launcher.out").read_text()

    def pause(self, name: str, seconds: float) -> None:
        """SIGSTOP, and SIGCONT."""
        at, pid = time.monotonic(), self.pids[name]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):  # it was ended for its silence
            os.kill(pid, signal.SIGCONT)
        fault = {"kind": "pause", "target": name, "at": at, "until": time.monotonic()}
        with (self.run / "faults.jsonl").open("a") as file:
            file.write(json.dumps(fault) + "\n")

    def go_on(self, seconds: float = 30.0) -> None:
        """Wait until pushes are answered again."""
        before = self.num_acks
        until(lambda: self.num_acks > before + 10, seconds)

    def stop(self) -> dict[str, object]:
        """Safely, as Ctrl-C does; its result."""
        if self.launcher.poll() is None:
            self.launcher.send_signal(signal.SIGINT)
        self.launcher.wait(60)
        result: dict[str, object] = json.loads((self.run / "result.json").read_text())
        return result

    def close(self) -> None:
        if self.launcher.poll() is None:
            self.launcher.kill()
        self.launcher.wait()
        self._out.close()


@pytest.fixture
def disturbed(tmp_path):
    """Starts runs; ends what is left of them."""
    with contextlib.ExitStack() as stack:

        def start(script, args, *settings):
            run = Disturbed(tmp_path, script, list(args), *settings)
            stack.callback(run.close)
            run.begin()
            return run

        yield start


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
    if me.index == 1 and me.incarnation == 1:
        flat.grad[7] = float("nan")
    optimizer.step(samples=1)
    time.sleep(0.01)
"""


@pytest.mark.long
def test_pauses_and_a_poisoned_worker_lose_and_repeat_nothing(disturbed, tmp_path):
    """SIGSTOP of shard, worker, controller and launcher; I1 to I5 and I7 to I9 by the histories, to
    the bit.

    One worker pushes nothing but poison at first: it is ended, named and started again.
    """
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = disturbed(str(script), ("70000",), "guard.quarantine=4")
    for pause_s in [0.2, PAUSE_S] if PAUSE_S < 2 else [0.2, 2.0, 6.0, PAUSE_S]:
        for name in ("shard0", "w0", "controller", "launcher"):
            run.pause(name, pause_s)
            run.go_on()
    until(lambda: "w1-000002.jsonl" in [p.name for p in (run.run / "history").iterdir()], 30)
    run.go_on()
    result = run.stop()
    assert result["exit"] == "stopped", run.said
    assert result["workers_lost"] == 1
    assert "worker w1 is lost (shard 0 takes no more: w1 was refused 4 pushes in a row" in run.said
    assert "flat[7] is nan" in run.said
    assert "Traceback" not in run.said
    verdict = Checker(run.run).check(gradients=True)
    assert verdict.violations == []
    assert verdict.acked > 100
    assert verdict.lost == verdict.lost_double_fault == 0
    # Only what was silent for too long: that nobody listened is no silence of the others.
    assert result["shard_restarts"] == (1 if PAUSE_S > 11 else 0)
    assert result["controller_restarts"] == (1 if PAUSE_S > 11 else 0)
