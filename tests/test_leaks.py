"""The leak check of conftest is itself checked: each kind of leak, planted, fails its test."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = """
from tests.helpers import leaks
from tests.helpers.leaks import no_leaks, pytest_runtest_makereport
leaks.track_zmq()
leaks.GRACE_S = 0.2
"""

PLANTED = """
import os, subprocess, sys, threading, time
import pytest, zmq

kept = []
stop = threading.Event()

def test_thread():
    kept.append(threading.Thread(target=stop.wait, name="stray", daemon=True))
    kept[-1].start()

def test_file_descriptor():
    kept.append(open(os.devnull))

def test_pipe():
    kept.append(os.pipe())

def test_child():
    kept.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(5)"]))

def test_zombie():
    kept.append(subprocess.Popen(["true"]))

def test_context():
    kept.append(zmq.Context())

def test_socket():
    kept.append(zmq.Context.instance().socket(zmq.PUSH))

@pytest.mark.ray
def test_ray_may_leave_things():
    kept.append(open(os.devnull))

def test_failure_is_reported_once():
    kept.append(open(os.devnull))
    assert False

@pytest.mark.filterwarnings("error")
def test_dropped_socket():
    zmq.Context().socket(zmq.PUSH)

def test_clean():
    with open(os.devnull), zmq.Context() as context, context.socket(zmq.PUSH):
        thread = threading.Thread(target=time.sleep, args=(0.05,))
        thread.start()  # ends within the grace
    subprocess.run(["true"])

def test_cycle():
    cycle = [open(os.devnull, closefd=True)]
    cycle[0].close()
    cycle.append(cycle)

def test_end():
    stop.set()
    for child in kept:
        if isinstance(child, subprocess.Popen):
            child.kill()
            child.wait()
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> str:
    folder = tmp_path_factory.mktemp("planted")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_planted.py").write_text(PLANTED)
    (folder / "pytest.toml").write_text(
        f'[pytest]\npythonpath = ["{repo_root}"]\nmarkers = ["ray"]\n'
    )
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-vv", "-rA", "--color=no"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 1, finished.stdout + finished.stderr
    return finished.stdout


def reports(outcome: str, name: str) -> dict[str, str]:
    """What the short summary says about one planted test: PASSED, FAILED, ERROR -> message."""
    summary = outcome.partition("short test summary info")[2]
    found = re.findall(
        rf"^([A-Z]+) test_planted\.py::{name}\b(.*(?:\n  .*)*)", summary, re.MULTILINE
    )
    return dict(found)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("test_thread", "thread 'stray' (daemon)"),
        ("test_file_descriptor", "-> /dev/null"),
        ("test_pipe", "-> pipe:["),
        ("test_child", "time.sleep(5)"),
        ("test_zombie", "dead but never waited for"),
        ("test_context", "ZeroMQ Context"),
        ("test_socket", "ZeroMQ Socket"),
        ("test_dropped_socket", "ZeroMQ Socket"),
    ],
)
def test_a_planted_leak_fails_its_test(outcome: str, name: str, said: str):
    found = reports(outcome, name)
    assert found.keys() == {"PASSED", "ERROR"}
    assert "left behind by this test" in found["ERROR"]
    assert said in found["ERROR"]


@pytest.mark.parametrize("name", ["test_ray_may_leave_things", "test_clean", "test_cycle"])
def test_nothing_is_said_where_nothing_is_leaked(outcome: str, name: str):
    assert reports(outcome, name).keys() == {"PASSED"}


def test_a_failed_test_is_not_blamed_for_a_leak_as_well(outcome: str):
    assert reports(outcome, "test_failure_is_reported_once").keys() == {"FAILED"}
