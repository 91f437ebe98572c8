"""top: of runs that have ended, its keys, and the terminal that it leaves as it was."""

import json
import os
import pty
import signal
import termios
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from distbelief.cli import cli
from distbelief.commands.top import SORTS, Desk
from distbelief.folder import RunFolder
from distbelief.keyboard import Keyboard
from distbelief.onlooker import Onlooker
from tests.helpers.folders import end, kill, make_run, write_checkpoint, write_status
from tests.helpers.records import check_record

SLEEP = time.sleep


@pytest.fixture(autouse=True)
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return make_run(tmp_path / "runs", "aa")


def top(*args):
    return CliRunner().invoke(cli, ["top", *args])


@pytest.mark.parametrize(
    ("word", "code"), [("done", 0), ("stopped", 0), ("failed", 1), ("degraded", 4), ("storage", 1)]
)
def test_of_a_run_that_has_ended_it_says_so_with_the_exit_code_of_status(run, word, code):
    error = {"code": "DB-RUN-005", "text": "x"} if code else None
    end(run, word, error=error)
    done = top()
    assert (done.exit_code, done.output) == (code, f"run aa has ended: {word}\n")
    assert CliRunner().invoke(cli, ["status"]).exit_code == code


def test_the_last_line_of_json_is_the_result_of_a_run_that_has_ended(run):
    written = end(run, "done")
    done = top("--json")
    assert json.loads(done.stdout.splitlines()[-1]) == written
    assert done.stderr == "run aa has ended: done\n"


def test_the_last_line_of_a_killed_run_has_its_checkpoint_and_how_to_go_on(run):
    write_checkpoint(run)
    kill(run)
    done = top("--json")
    assert done.exit_code == 1
    result = json.loads(done.stdout)
    check_record(result)
    assert result["exit"] == "killed"
    assert result["saved"]["samples"] == 800
    assert result["resume"] == "distbelief resume aa"


@pytest.mark.parametrize(("args", "code"), [(["nowhere"], 1), (["--bad"], 2)])
def test_the_last_line_is_a_result_where_nothing_was_found(args, code):
    done = top(*args, "--json")
    assert done.exit_code == code
    assert check_record(json.loads(done.stdout)).exit == "failed"


def test_a_live_run_is_shown_in_lines_until_it_ends(run, monkeypatch):
    """Without a monitor: what the launcher writes down."""
    write_status(run)
    looks = iter([True, True, True, True, False])

    def sleep(_):
        if not next(looks, False):
            end(run)

    monkeypatch.setattr("distbelief.commands.top.time.sleep", lambda s: SLEEP(0.02) or sleep(s))
    done = top("--plain")
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert " update=31 samples=1000/2874 " in lines[0]
    assert lines[-1] == "run aa has ended: done"


# Keys


def desk() -> tuple[Desk, Onlooker]:
    looker = Onlooker(RunFolder(Path("runs/aa")), since_start=False)
    return Desk(looker), looker


def press(desk: Desk, keys: str) -> bool:
    return any([desk.press(key) for key in keys])


def test_s_goes_through_the_sorts():
    at, looker = desk()
    seen = [looker.sort]
    for _ in SORTS:
        assert not press(at, "s")
        seen.append(looker.sort)
    assert seen == [*SORTS, next(iter(SORTS))]


def test_a_filter_is_typed_taken_mended_and_forgotten():
    at, looker = desk()
    press(at, "/w1q")
    assert at.line == "/w1q_   Enter takes it, Esc forgets it"
    press(at, "\x7f7\x01\r")
    assert looker.find == "w17"
    assert "/ filter 'w17'" in at.line
    press(at, "/\x1b")
    assert looker.find == ""
    press(at, "/" + "x" * 100 + "\r")
    assert len(looker.find) == 40


def test_q_leaves_and_d_asks_for_the_link():
    at, _ = desk()
    assert not press(at, "d?")
    assert at.wants_link
    assert press(at, "q")


# The terminal


@pytest.fixture
def terminal():
    master, slave = pty.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


def fail():
    raise RuntimeError


@pytest.mark.parametrize(
    ("leave", "error"),
    [
        (lambda: None, None),
        (fail, RuntimeError),
        (lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt),
        (lambda: signal.raise_signal(signal.SIGTERM), SystemExit),
    ],
)
def test_the_terminal_is_as_it_was_on_every_way_out(terminal, monkeypatch, leave, error):
    master, slave = terminal
    monkeypatch.setattr(os, "tcgetpgrp", lambda _: os.getpgrp())  # as in the foreground
    before = termios.tcgetattr(slave)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP)}

    def use():
        with Keyboard(slave) as keyboard:
            assert not termios.tcgetattr(slave)[3] & (termios.ICANON | termios.ECHO)
            assert termios.tcgetattr(slave)[3] & termios.ISIG
            os.write(master, b"s")
            assert keyboard.keys(5.0) == "s"
            os.write(master, b"\x1b[A")
            assert keyboard.keys(5.0) == ""
            leave()

    if error is None:
        use()
    else:
        with pytest.raises(error) as caught:
            use()
        assert error is not SystemExit or caught.value.code == 143
    assert termios.tcgetattr(slave) == before
    assert {n: signal.getsignal(n) for n in handlers} == handlers


def test_without_a_terminal_there_are_no_keys():
    reader, writer = os.pipe()
    with Keyboard(reader) as keyboard:
        assert keyboard.keys(0.0) == ""
    os.close(reader)
    os.close(writer)
