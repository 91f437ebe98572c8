"""What a person and a program see of a real run: a panel in a real terminal, lines, JSON."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import termios
import time

import pexpect
import pytest

from distbelief.folder import all_runs
from distbelief.monitor.link import read_link
from distbelief.onlooker import NONE_YET, TIMEOUT_S, Onlooker
from distbelief.state import state_of
from tests.helpers.folders import make_run, write_status
from tests.helpers.records import check_record

LAUNCH = ["launch", "--engine", "local", "--model", "tiny:Slow", "--set", "data.image_size=8"]
LONG = ["--until", "1h", "--set", "save.every_s=1"]
PATIENCE_S = 60
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\]8;[^\x1b]*\x1b\\")


@pytest.fixture(autouse=True)
def _home_without_settings(user_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(user_folder / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("DISTBELIEF_MONITOR__ON", "true")


@pytest.fixture
def terminal(user_folder):
    """Commands in terminals of their own; none is left behind."""
    started = []

    def start(*args, width=100, height=30):
        spawned = pexpect.spawn(
            sys.executable,
            ["-m", "distbelief", *args],
            cwd=str(user_folder),
            # Without the size of another one; told, as GNU readline sets it where Python does not
            # see it.
            env={k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")},
            dimensions=(height, width),
            encoding="utf-8",
            codec_errors="replace",  # Ctrl-C throws away what the terminal has not shown yet
            timeout=PATIENCE_S,
        )
        started.append(spawned)
        return spawned

    yield start
    for spawned in started:
        if spawned.isalive():
            spawned.kill(signal.SIGKILL)
        spawned.close(force=True)


def ended(spawned) -> tuple[int, str]:
    spawned.expect(pexpect.EOF)
    spawned.wait()
    return spawned.exitstatus, ESCAPE.sub("", spawned.before)


def frame(spawned, text: str) -> str:
    """The next whole panel with a text in it."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        spawned.expect("╭")
        spawned.expect("╯")
        shown = "╭" + ESCAPE.sub("", spawned.before)
        if text in shown:
            return shown
        assert time.monotonic() < deadline, shown


def widths(shown: str) -> set[int]:
    return {len(line) for line in shown.split("\r\n")[1:-1]}


def test_launch_in_a_terminal_is_watched_by_top_resized_and_stopped(user_folder, terminal):
    """The way of an evening with it, in one run."""
    run = terminal(*LAUNCH, *LONG)
    shown = frame(run, "fair share 1")
    assert "● training" in shown
    assert "█comp ▒fetch ░push ▓data" in shown
    assert re.search(r"w0 +\S+ +\d", shown), shown
    assert widths(shown) == {100}

    top = terminal("top")
    frame(top, "fair share 1")
    assert not termios.tcgetattr(top.child_fd)[3] & termios.ICANON
    top.send("s")
    frame(top, "slowest step first")
    top.send("/w1\r")
    shown = frame(top, "filter 'w1'")
    while "w0 " in shown.partition("median")[0].partition("worker")[2]:
        shown = frame(top, "w1")
    top.send("d")
    top.expect(r"http://127.0.0.1:\d+/\?k=[0-9a-f]{32}\s")
    top.sendintr()
    code, text = ended(top)
    assert code == 130
    assert "Detached. Run continues: distbelief top 20" in text
    top = terminal("top", "--run-dir", "runs")
    frame(top, "fair share")
    top.send("q")
    assert ended(top)[0] == 0
    (folder,) = all_runs(user_folder / "runs")
    assert state_of(folder).is_live

    run.setwinsize(24, 60)
    while widths(shown := frame(run, "fair sh")) != {60}:
        pass
    assert "▒fetch" not in shown  # there is no room
    assert "15 min" not in shown
    run.sendintr()
    code, text = ended(run)
    assert code == 130
    assert "Stopping safely: workers finish what they have" in text
    assert f"stopped: run {folder.run}" in text
    assert text.rstrip().endswith(f"distbelief resume {folder.run}")


@pytest.mark.long
def test_ctrl_c_twice_in_a_terminal_stops_now(user_folder, terminal):
    run = terminal(*LAUNCH, *LONG)
    frame(run, "fair share 1")
    (folder,) = all_runs(user_folder / "runs")
    os.kill(run.pid, signal.SIGINT)
    while state_of(folder).word == "training":
        run.read_nonblocking(65536, timeout=PATIENCE_S)
    os.kill(run.pid, signal.SIGINT)
    code, text = ended(run)
    assert code == 130
    assert f"distbelief resume {folder.run}" in text
    assert run.isalive() is False


def test_every_line_of_json_of_a_real_run_fits_the_schema(user_folder):
    command = [sys.executable, "-m", "distbelief", *LAUNCH, "--until", "4s", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for line in lines:
        check_record(line)
    kinds = [line["type"] for line in lines]
    assert (kinds.count("result"), kinds[-1]) == (1, "result")
    assert {"tick", "event", "finding"} <= set(kinds)
    assert len({line["run"] for line in lines}) == 1
    ticks = [line for line in lines if line["type"] == "tick"]
    samples = [tick["kpi"]["progress"]["samples"] or 0 for tick in ticks]
    assert samples == sorted(samples)
    assert max(samples) > 0
    assert any(tick["seq"] is not None for tick in ticks)
    joined = {line["who"] for line in lines if line["type"] == "event" and line["kind"] == "join"}
    assert joined == {"w0", "w1"}
    numbers = [line["seq"] for line in lines if line["type"] == "event"]
    assert numbers == sorted(set(numbers))
    assert "starting 2 shards and 2 workers" in done.stderr
    assert '"type"' not in done.stderr


@pytest.mark.long
def test_without_a_monitor_lines_have_what_the_controller_knows(user_folder):
    command = [sys.executable, "-m", "distbelief", *LAUNCH, "--until", "2s", "--no-dashboard"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    (line,) = [line for line in done.stdout.splitlines() if " update=" in line]
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d( state=\w+)? update=\d+ samples=\d+ loss=\S+ samples_s=\d+ "
        r"p50=\S+ p95=\S+ max=\S+ alive=\d eta=\S+",
        line,
    ), line


@pytest.mark.long
def test_three_signals_leave_a_last_line_too(user_folder):
    out = user_folder / "out"
    with out.open("w") as stdout, open(os.devnull, "w") as nothing:
        command = [sys.executable, "-m", "distbelief", *LAUNCH, *LONG, "--json"]
        process = subprocess.Popen(command, stdout=stdout, stderr=nothing)
    try:
        while '"kind":"join"' not in out.read_text():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGSTOP)  # so that all three come at one moment
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGINT)
        code = process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.wait()
        (folder,) = all_runs(user_folder / "runs")
        rows = json.loads((folder.path / "processes.json").read_text())
        for pid in (row["pid"] for row in rows):  # they would end by themselves, in half a minute
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert code in (130, 143)
    last = json.loads(out.read_text().splitlines()[-1])
    assert check_record(last).exit == "stopped"
    assert last["run"] == folder.run


# The one who asks


@pytest.fixture
def monitor(user_folder):
    """A real monitor of a simulated run."""
    folder = make_run(user_folder / "runs", "aa")
    write_status(folder)
    config = {
        "run": "aa",
        "run_path": str(folder.path),
        "access": "s3cret",
        "simulate": {"workers": 4, "past_s": 60.0},
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "distbelief.monitor.process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(config).encode() + b"\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["url"].endswith("?k=s3cret")
    yield process, folder
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def look_until(looker, true):
    deadline = time.monotonic() + 30
    while not true(sight := looker.look()):
        assert time.monotonic() < deadline, sight
        time.sleep(0.1)
    return sight


def test_a_monitor_that_is_stopped_or_killed_costs_what_it_knows_and_little_time(monitor):
    process, folder = monitor
    looker = Onlooker(folder, since_start=True)
    sight = look_until(looker, lambda sight: sight.page is not None and sight.page.total == 4)
    assert (sight.unknown, sight.state, sight.seq is None) == ("", "training", False)
    assert [worker.id for worker in sight.page.items].count("w3") == 1
    assert looker.take_events()
    looker.find = "w3"
    page = looker.look().page
    assert page is not None
    assert [worker.id for worker in page.items] == ["w3"]

    process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    sight = looker.look()
    assert time.monotonic() - began < 3 * TIMEOUT_S
    assert (sight.unknown, sight.page) == ("the monitor does not answer (2 s)", None)
    assert sight.kpi.progress.samples == 1000  # as status.json has it
    process.send_signal(signal.SIGCONT)
    look_until(looker, lambda sight: not sight.unknown)

    link = json.loads((folder.path / "monitor.json").read_text())
    (folder.path / "monitor.json").write_text(
        json.dumps({**link, "url": link["url"].replace("s3cret", "wrong")})
    )
    assert looker.look().unknown == "the monitor's answer is odd (status 401)"
    (folder.path / "monitor.json").write_text(json.dumps({**link, "url": "ftp://x"}))
    assert "odd" in looker.look().unknown
    (folder.path / "monitor.json").write_text(json.dumps({**link, "host": "another"}))
    assert "on another machine" in looker.look().unknown
    (folder.path / "monitor.json").write_text(json.dumps(link))
    process.kill()
    process.wait()
    assert looker.look().unknown == NONE_YET
    assert read_link(folder.path) is not None  # it could not remove it
    looker.close()


def test_an_onlooker_that_waits_for_an_answer_ends_at_once(monitor):
    process, folder = monitor
    process.send_signal(signal.SIGSTOP)
    looker = Onlooker(folder, since_start=False)
    looker.start()
    time.sleep(0.3)
    began = time.monotonic()
    looker.close()
    assert time.monotonic() - began < TIMEOUT_S
    process.send_signal(signal.SIGCONT)


def test_top_of_a_run_by_lines_of_json(monitor):
    _, folder = monitor
    command = [sys.executable, "-m", "distbelief", "top", "--json", "--run-dir", "runs"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen = set()
    for line in process.stdout:
        data = json.loads(line)
        check_record(data)
        seen.add(data["type"])
        if data["type"] == "tick" and data["seq"] is not None:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    last = json.loads((out.splitlines() or [line])[-1])
    check_record(last)
    assert (last["type"], last["exit"], last["run"]) == ("result", "detached", folder.run)
    assert err.startswith("Detached. Run continues: distbelief top aa")
    assert "tick" in seen
