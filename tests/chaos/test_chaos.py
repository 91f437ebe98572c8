"""`distbelief chaos` as a person starts it; `make test-long` runs all of it, for minutes."""

import json
import subprocess
import sys
import time

import pytest

from distbelief.folder import RunFolder


def chaos(*args, cwd):
    """(Exit code, last line of the output, all of both outputs)."""
    done = subprocess.run(
        [sys.executable, "-m", "distbelief", "chaos", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    return done.returncode, lines[-1] if lines else "", done.stdout + done.stderr


@pytest.mark.long
def test_kills_of_shards_and_workers_lose_nothing_that_is_not_counted(tmp_path):
    code, last, text = chaos("--json", "--seconds", "9", cwd=tmp_path)
    told = json.loads(last)
    assert (told["type"], told["v"], told["verdict"], code) == ("chaos", 1, "pass", 0), text
    assert told["violations"] == []
    assert told["kills"] >= 4
    assert told["lost"] == told["lost_double_fault"]
    assert told["acked"] > 1000
    assert told["checked"] == [f"I{i}" for i in range(1, 10)]
    spaced = json.loads(text.splitlines()[0])
    assert spaced["lost"] == 0


@pytest.mark.long
def test_a_job_of_ones_own_under_a_plan_of_ones_own(user_folder):
    # The last 6 of them are quiet.
    plan = """
    seconds = 9
    [[fault]]
    kind = "kill"
    target = "shard0"
    every_s = 1.0
    [[fault]]
    kind = "pause"
    target = "worker"
    every_s = 1.0
    for_s = [0.1, 0.5]
    [[fault]]
    kind = "kill"
    target = "controller"
    every_s = 1.0
    """
    (user_folder / "faults.toml").write_text(plan)
    job = ("--engine", "local", "--model", "tiny:Slow", "--workers", "2", "--until", "1h")
    code, last, text = chaos("--plan", "faults.toml", "--json", "--", *job, cwd=user_folder)
    told = json.loads(last)
    assert (told["verdict"], code) == ("pass", 0), text
    assert told["kills"] >= 2
    assert told["checked"] == ["I1", "I4", "I5", "I6", "I7", "I8", "I9"]
    (result,) = user_folder.glob("runs/chaos-*/*/*/result.json")
    ended = json.loads(result.read_text())
    assert ended["controller_restarts"] >= 1
    assert ended["accounting"]["adds_up"] is True


@pytest.mark.long
def test_a_disk_that_is_full_for_a_while_stalls_what_waits_for_it_and_shows(tmp_path):
    """With `durable` a step waits for the disk; training goes on when that takes files again."""
    plan = """
    seconds = 16
    [[fault]]
    kind = "disk"
    target = "shard0"
    every_s = 6.0
    for_s = 4.0
    """
    (tmp_path / "faults.toml").write_text(plan)
    job = ["--engine", "local", "--workers", "2", "--until", "1h"]
    job += ["--set", "save.ack=durable", "--set", "save.every_s=0.3"]
    command = [sys.executable, "-m", "distbelief", "chaos", "--plan", "faults.toml", "--json"]
    process = subprocess.Popen(
        [*command, "--", *job], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    stalled = set()
    while process.poll() is None:
        for run in tmp_path.glob("runs/chaos-*/*/*"):
            shards = (RunFolder(run).status or {}).get("shards", {})
            stalled |= {name for name, shard in shards.items() if shard["storage_error"]}
        time.sleep(0.2)
    out, _ = process.communicate()
    told = json.loads(out.splitlines()[-1])
    assert (told["verdict"], told["lost"], process.returncode) == ("pass", 0, 0), out
    assert stalled == {"shard0"}


def test_a_job_that_cannot_be_launched_is_told(tmp_path):
    code, _, told = chaos("--", "--model", "none:Such", cwd=tmp_path)
    assert code == 1
    assert "error[DB-RUN-013]: the run has ended with exit code" in told
    assert "DB-MODEL" in told
