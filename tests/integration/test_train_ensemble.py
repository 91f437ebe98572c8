"""`train-ensemble` with real runs: trained side by side, gone on with after a stop."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distbelief.roster import read_roster

pytestmark = pytest.mark.integration

JOB = (
    *("--engine", "local", "--workers", "1", "--shards", "1", "--width", "0.1"),
    *("--no-dashboard", "--seed", "5"),
)


def command(out: Path, *more: str) -> list[str]:
    own = ["--members", "3", "--wider", "1.5", "--at-once", "2", "--out", str(out)]
    return [sys.executable, "-m", "distbelief", "train-ensemble", *own, *more, *JOB]


@pytest.mark.long
def test_members_are_trained_side_by_side_and_make_a_table(tmp_path: Path):
    out = tmp_path / "ensemble"
    call = command(out, "--json", "--until", "1-epochs")
    first = subprocess.run(call, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in first.stdout.splitlines()]
    assert sorted(line["member"] for line in lines) == [1, 2, 3]
    assert {line["result"]["exit"] for line in lines} == {"done"}
    roster = read_roster(out)
    assert roster is not None
    configs = [(run / "config.toml").read_text() for run in roster.done]
    assert [f"seed = {i}" in text for i, text in zip((1, 2, 3), configs, strict=True)] == [True] * 3
    assert ["width = 0.1" + "\n" in text for text in configs] == [True, True, False]
    table = subprocess.run(
        [sys.executable, "-m", "distbelief", "table", str(out), "--crops", "0", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [row["models"] for row in json.loads(table.stdout)["rows"]] == [1, 3]
    again = subprocess.run(call, capture_output=True, text=True, check=True)
    assert again.stdout == ""  # nobody is trained twice


@pytest.mark.long
def test_what_was_stopped_goes_on(tmp_path: Path):
    out = tmp_path / "ensemble"
    call = command(out, "--json", "--until", "40-epochs")
    running = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        states = [json.loads(path.read_text()) for path in out.glob("member-*/*/status.json")]
        if len(states) == 2 and all(state["samples"] > 0 for state in states):
            break
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    told, _ = running.communicate(timeout=90)
    assert running.returncode == 130
    lines = [json.loads(line) for line in told.splitlines()]
    assert sorted(line["member"] for line in lines) == [1, 2]
    assert {line["result"]["exit"] for line in lines} == {"stopped"}
    runs = sorted(out.glob("member-*/*"))
    assert len(runs) == 2
    going = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        attempts = [json.loads((run / "checkpoint.json").read_text())["attempt"] for run in runs]
        if attempts == [2, 2]:
            break
        time.sleep(0.2)
    going.send_signal(signal.SIGINT)
    going.communicate(timeout=90)
    assert attempts == [2, 2]
    assert sorted(out.glob("member-*/*")) == runs  # the same runs
