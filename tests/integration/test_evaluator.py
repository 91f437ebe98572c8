"""The evaluator beside a real run: what it writes down, and that the run does not need it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from distbelief.evaluator import FILE, Evaluation, read_evaluations, write_evaluation
from distbelief.job import load_job
from distbelief.launcher import launch
from distbelief.monitor.recording import Recording
from distbelief.monitor.store import Store

pytestmark = pytest.mark.integration


def job_of(tmp_path: Path, **more):
    said = {
        "engine": "local",
        "workers": 2,
        "shards": 2,
        "model.width": 0.25,
        "monitor.on": False,
        "run_dir": str(tmp_path / "runs"),
        "evaluate.every_s": 0.5,
        "until": "12s",
    }
    return load_job(None, {**said, **more}, ())


@pytest.mark.parametrize(("kind", "encrypt"), [("none", False), ("ema", True)])
@pytest.mark.long
def test_a_run_is_evaluated_while_it_trains(tmp_path: Path, kind: str, encrypt: bool):
    more = {
        "train.average.kind": kind,
        "net.encrypt": encrypt,
        "train.lr": 0.01,
        "monitor.on": encrypt,
    }
    result = launch(job_of(tmp_path, **more))
    assert result.exit == "done", result.error
    found = read_evaluations(Path(result.run_dir))
    assert len(found) >= 2  # the launcher's own is the last
    assert [one.samples for one in found] == sorted(one.samples for one in found)
    assert [one.at for one in found] == sorted(one.at for one in found)
    assert found[-1].samples == result.samples
    assert result.eval is not None
    assert (found[-1].top1, found[-1].loss) == (result.eval.top1, result.eval.loss)
    assert found[-1].is_average is (kind == "ema")
    assert any(one.is_average is (kind == "ema") for one in found[:-1])
    assert found[0].top1 is not None
    assert result.eval.top1 is not None
    assert result.eval.top1 > found[0].top1
    if encrypt:  # it is watched
        store = Store(live=False)
        assert Recording(Path(result.run_dir) / "metrics").load(store)
        assert store.begin is not None
        read = store.series(["val_top1"], store.begin.at, store.now + 1)
        told = [value for value in read["val_top1"] if value is not None]
        assert found[0].top1 == pytest.approx(told[0], abs=1e-3)
        out = tmp_path / "curves.png"
        plot = [sys.executable, "-m", "distbelief", "plot", result.run_dir, "-o", str(out)]
        subprocess.run(plot, check=True)  # matplotlib keeps files open
        with Image.open(out) as picture:
            assert picture.width > 400


@pytest.mark.long
def test_a_run_goes_on_without_its_evaluator(tmp_path: Path):
    killed: list[int] = []
    is_over = threading.Event()

    def kill() -> None:
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline and len(killed) < 2 and not is_over.is_set():
            for pid in evaluators(tmp_path):
                if pid not in killed:
                    time.sleep(0.5)
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.1)

    thread = threading.Thread(target=kill)
    thread.start()
    result = launch(job_of(tmp_path, until="15s"))
    is_over.set()
    thread.join()
    assert result.exit == "done", result.error
    assert len(killed) >= 1
    assert result.workers_lost == result.refused == 0
    assert result.accounting["adds_up"]
    assert not evaluators(tmp_path)  # nobody is left behind


def evaluators(tmp_path: Path) -> list[int]:
    """Processes of ours whose standard output is an evaluator's of a run there."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                target = os.readlink(entry / "fd" / "1")
            except OSError:
                continue
            if target.startswith(str(tmp_path)) and target.endswith("/logs/evaluator.out"):
                found.append(int(entry.name))
    return found


def test_lines_that_are_damaged_are_left_out(tmp_path: Path):
    assert read_evaluations(tmp_path) == []
    one = Evaluation(
        at=1.0,
        samples=5,
        updates=2,
        top1=0.5,
        top5=None,
        loss=None,
        is_average=True,
        seconds=0.1,
    )
    write_evaluation(tmp_path, one)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"at": 2}\n{"at\n')
    write_evaluation(tmp_path, one)
    assert read_evaluations(tmp_path) == [one, one]


def test_the_process_needs_no_monitor_and_is_told_nothing_by_arguments():
    told = subprocess.run(
        [sys.executable, "-c", "import distbelief.evaluator, sys; print('ray' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "False"
