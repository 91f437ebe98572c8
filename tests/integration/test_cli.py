"""The commands beside a real run: looked at, stopped, resumed, and left by its terminal."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distbelief.folder import RunFolder, all_runs
from distbelief.state import state_of

LAUNCH = ["launch", "--engine", "local", "--model", "tiny:Slow", "--set", "data.image_size=8"]
LONG = ["--until", "1h", "--set", "save.every_s=1"]
PATIENCE_S = 120


@pytest.fixture(autouse=True)
def _home_without_settings(user_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(user_folder / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)


@pytest.fixture
def launch(user_folder):
    """Starts a run in the user's folder; none is left behind."""
    started = []

    def start(*args, **how):
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how}
        command = [sys.executable, "-m", "distbelief", *args]
        process = subprocess.Popen(command, cwd=user_folder, **how)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def distbelief(*args):
    """A command in the user's folder, to its end."""
    command = [sys.executable, "-m", "distbelief", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)


def wait_for(true, what):
    deadline = time.monotonic() + PATIENCE_S
    while not (found := true()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


def a_run_that(does, folder: Path) -> RunFolder:
    """The one run of a folder, as soon as it does something."""
    runs = folder / "runs"
    found: RunFolder = wait_for(
        lambda: next((run for run in all_runs(runs) if does(run)), None), does.__doc__
    )
    return found


def trains(run):
    """The run trains."""
    return ((run.status or {}).get("samples") or 0) > 0


def has_saved(run):
    """The run has a checkpoint."""
    return trains(run) and run.checkpoint is not None


def processes_of(run):
    """Processes of a run that still exist."""
    pids = [p["pid"] for p in json.loads((run.path / "processes.json").read_text())]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_run_is_looked_at_stopped_from_elsewhere_and_resumed(user_folder, launch):
    """The way of a day with it, in one run: every command meets what the others leave."""
    process = launch(*LAUNCH, *LONG)
    run = a_run_that(has_saved, user_folder)

    done = distbelief("status", "--json")
    status = json.loads(done.stdout)
    assert (done.returncode, status["state"], status["troubles"]) == (0, "training", [])
    assert status["run"] == run.run
    assert "training" in distbelief("runs", "ls").stdout

    done = distbelief("runs", "rm", run.run, "-y")
    assert (done.returncode, run.is_run) == (3, True)
    done = distbelief("resume", run.run)
    assert done.returncode == 3
    assert "error[DB-RUN-008]" in done.stderr

    follow = launch("logs", "-f", "--process", "launcher", "--process", "w0")
    done = distbelief("stop", run.run[-4:])
    assert done.returncode == 0
    assert done.stdout.startswith(f"stopped: run {run.run}")
    assert done.stdout.endswith(f"  distbelief resume {run.run}\n")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "Stopping safely: workers finish what they have" in out
    assert out.endswith(f"  distbelief resume {run.run}\n")
    assert err == ""
    out, err = follow.communicate(timeout=PATIENCE_S)
    assert follow.returncode == 0
    assert "Stopping safely" in out
    assert "worker w0 ends" in out
    assert err == f"run {run.run} has ended: stopped\n"
    assert not processes_of(run)

    before = run.result
    assert before is not None
    assert before["saved"]["samples"] == before["samples"] > 0
    assert "has ended already" in distbelief("stop").stdout
    until = f"{before['updates'] + 50}-updates"
    done = distbelief(
        *("resume", run.run[-4:], "--until", until, "--workers", "1", "--json"),
    )
    assert done.returncode == 0, done.stderr
    after = json.loads(done.stdout.splitlines()[-1])
    assert (after["run"], after["exit"], after["workers"]) == (run.run, "done", 1)
    assert after["updates"] >= before["updates"] + 50
    assert after["resume"] == ""

    done = distbelief("resume", run.run)
    assert done.returncode == 1
    assert "error[DB-RUN-009]" in done.stderr
    assert "test top-1" in distbelief("eval", run.run).stdout
    assert distbelief("runs", "rm", run.run, "--yes").returncode == 0
    assert not run.path.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_stops_safely_with_its_exit_code(user_folder, launch, number):
    process = launch(*LAUNCH, *LONG, "--json")
    run = a_run_that(trains, user_folder)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + number
    result = json.loads(out.splitlines()[-1])
    assert (result["exit"], result["unfinished"]) == ("stopped", 0)
    assert result["saved"]["samples"] == result["samples"]
    assert result["resume"] == f"distbelief resume {run.run}"
    assert "Stopping safely" in err
    assert not processes_of(run)


def test_ctrl_c_twice_stops_now_and_names_the_last_checkpoint(user_folder, launch):
    process = launch(*LAUNCH, *LONG)
    run = a_run_that(has_saved, user_folder)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: state_of(run).word != "training", "it is heeded")
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert time.monotonic() - began < 30
    assert process.returncode == 130
    assert state_of(run).word == "stopped"
    assert f"distbelief resume {run.run}" in out
    assert not processes_of(run)


def test_three_signals_end_the_launcher_and_what_it_leaves_is_told(user_folder, launch):
    process = launch(*LAUNCH, *LONG)
    run = a_run_that(has_saved, user_folder)
    # A stopped process takes both signals of a kind as one, so: three kinds of moments.
    process.send_signal(signal.SIGINT)
    wait_for(lambda: state_of(run).word != "training", "the first is heeded")
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert state_of(run).word in ("killed", "stopped")  # it may have got to the end in time


def test_a_killed_launcher_is_seen_and_the_run_goes_on_from_its_checkpoint(user_folder, launch):
    process = launch(*LAUNCH, *LONG)
    run = a_run_that(has_saved, user_folder)
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    for pid in processes_of(run):  # they would end by themselves, in half a minute
        os.kill(pid, signal.SIGKILL)
    done = distbelief("status")
    assert done.returncode == 1
    assert f"distbelief resume {run.run}" in done.stdout
    done = distbelief("stop")
    assert done.returncode == 1
    assert "error[DB-RUN-011]" in done.stderr
    saved = run.checkpoint
    assert saved is not None
    until = f"{saved['updates'] + 30}-updates"
    done = distbelief("resume", run.run, "--until", until, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["updates"] >= saved["updates"] + 30


def test_a_run_outlives_its_terminal(user_folder, launch):
    """A real terminal is closed: the kernel sends SIGHUP, and every later write fails."""
    master, slave = pty.openpty()
    process = launch(
        *(*LAUNCH, "--until", "6-epochs"),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(slave)
    shown = b""
    while b"starting 2 shards" not in shown:
        shown += os.read(master, 1000)
    run = a_run_that(trains, user_folder)
    os.close(master)
    assert process.wait(timeout=PATIENCE_S) == 0
    result = run.result
    assert result is not None
    assert (result["exit"], result["error"]) == ("done", None)
    assert result["samples"] == 6 * 1437
    log = (run.logs / "launcher.log").read_text()
    assert "The terminal is closed (SIGHUP): the run goes on." in log
    assert "Traceback" not in log


def _take_terminal():
    """Make the terminal on standard input the one that this session belongs to."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.long
def test_a_run_outlives_the_reader_of_its_output(user_folder, launch):
    reader, writer = os.pipe()
    process = launch(*LAUNCH, "--until", "2-epochs", stdout=writer)
    os.close(writer)
    os.close(reader)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (0, "")
    (run,) = all_runs(user_folder / "runs")
    assert state_of(run).word == "done"


def test_ctrl_c_before_the_run_begins_ends_at_once(user_folder, launch):
    (user_folder / "slow.py").write_text(
        "import time\nopen('importing', 'w').close()\ntime.sleep(60)\n"
    )
    process = launch("launch", "--model", "slow:Net", "--engine", "local", "--json")
    wait_for((user_folder / "importing").exists, "the model's module is imported")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert json.loads(out.splitlines()[-1])["exit"] == "stopped"
    assert "Traceback" not in err
    assert not (user_folder / "runs").exists()


def test_ctrl_c_in_a_waiting_command_ends_only_the_waiting(user_folder, launch):
    process = launch(*LAUNCH, *LONG)
    run = a_run_that(trains, user_folder)
    follow = launch("logs", "-f")
    assert follow.stdout.readline()
    follow.send_signal(signal.SIGINT)
    _, err = follow.communicate(timeout=20)
    assert (follow.returncode, err) == (130, "")
    assert process.poll() is None
    assert distbelief("stop", "--now").returncode == 0
    process.communicate(timeout=PATIENCE_S)
    assert state_of(run).word == "stopped"
