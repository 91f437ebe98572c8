"""The zygote: real forks of a real process."""

import os
import signal
import time
from pathlib import Path

import pytest

from distbelief.engine import ForkedProcess, LocalEngine
from distbelief.job import Job
from distbelief.spec import Spec
from distbelief.zygote import Zygote


def spec_for(folder, index=0):
    """A shard whose controller does not exist: it looks for it until it is killed."""
    (folder / "logs").mkdir(exist_ok=True)
    return Spec(
        role="shard",
        index=index,
        inc=1,
        run="run",
        token="secret",
        controller="tcp://127.0.0.1:9",
        job=Job().to_json(),
        run_path=str(folder),
        cwd=str(folder),
        is_warm=True,
    )


def is_running(pid):
    """Not a zombie, whose command line is empty; it may be reaped while this looks."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def zygote():
    made = Zygote()
    yield made
    made.close()


def test_it_has_one_thread_and_no_socket(zygote, tmp_path):
    child = ForkedProcess(spec_for(tmp_path), zygote)  # it is ready when this is there
    parent = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[1])
    try:
        assert len(list(Path(f"/proc/{parent}/task").iterdir())) == 1
        links = [os.readlink(fd) for fd in Path(f"/proc/{parent}/fd").iterdir()]
        assert not [link for link in links if link.startswith("socket:")]
    finally:
        child.kill()


def test_a_child_runs_by_itself_and_its_end_is_told(zygote, tmp_path):
    child = ForkedProcess(spec_for(tmp_path), zygote)
    deadline = time.monotonic() + 10
    while not (tmp_path / "logs/shard0.log").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert child.poll() == "killed by signal 9"


def test_a_child_that_was_killed_by_us_is_gone(zygote, tmp_path):
    child = ForkedProcess(spec_for(tmp_path), zygote)
    child.kill()
    assert not is_running(child.pid)
    child.kill()  # once more does no harm


def test_an_engine_whose_zygote_died_makes_another(tmp_path):
    engine = LocalEngine()
    try:
        first = engine.start(spec_for(tmp_path, 0))
        assert engine._zygote is not None
        os.kill(engine._zygote._process.pid, signal.SIGKILL)
        engine._zygote._process.wait()
        second = engine.start(spec_for(tmp_path, 1))
        assert first.poll() is None  # its children outlive it
        assert second.poll() is None
        first.kill()
        second.kill()
    finally:
        engine.close()
