"""logs: several files become one, in the order of their times."""

import os
import threading
import time

import pytest
from click.testing import CliRunner

from distbelief.cli import cli
from tests.helpers.folders import end, make_run, write_status


@pytest.fixture(autouse=True)
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return make_run(tmp_path / "runs", "aa")


def invoke(*args):
    return CliRunner().invoke(cli, ["logs", *args])


def write(run, name, text, at=None):
    path = run.logs / name
    with path.open("a") as file:
        file.write(text)
    if at is not None:
        os.utime(path, (at, at))


def stamp(at):
    return time.strftime("%Y-%m-%d %H:%M:%S,000", time.localtime(at))


@pytest.fixture
def logs(run):
    now = time.time()
    write(run, "w0.log", f"{stamp(now - 30)} INFO begins\n{stamp(now - 10)} INFO ends\n")
    write(run, "shard0.log", f"{stamp(now - 20)} ERROR oh\nTraceback:\n  a\n")
    write(run, "w0.out", "printed\n", at=now - 15)
    return run


def test_lines_are_merged_by_time_and_say_their_process(logs):
    lines = [(line[:8].strip(), line.split()[-1]) for line in invoke().output.splitlines()]
    assert lines == [
        ("w0", "begins"),
        ("shard0", "oh"),
        ("shard0", "Traceback:"),
        ("shard0", "a"),
        ("w0", "printed"),
        ("w0", "ends"),
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--worker", "w0"], ["begins", "printed", "ends"]),
        (["--process", "shard0"], ["oh", "Traceback:", "a"]),
        (["--process", "shard0", "--worker", "w0", "-n", "1"], ["ends"]),
        (["--since", "17s"], ["printed", "ends"]),
        (["--since", "1h", "-n", "2"], ["printed", "ends"]),
        (["-n", "0", "--worker", "w0"], ["begins", "printed", "ends"]),
    ],
)
def test_lines_are_chosen_by_process_age_and_number(logs, args, words):
    assert [line.split()[-1] for line in invoke(*args).output.splitlines()] == words


def test_an_unknown_process_names_those_there_are(logs):
    done = invoke("--worker", "w9")
    assert done.exit_code == 2
    assert "error[DB-USE-009]: run aa has no process w9" in done.stderr
    assert "it has shard0, w0" in done.stderr


@pytest.mark.parametrize("age", ["5", "5 m", "m", "-5m"])
def test_an_age_has_a_unit(logs, age):
    done = invoke(f"--since={age}")
    assert done.exit_code == 2
    assert "write it as 30s, 5m, 2h or 1d" in done.stderr


def test_a_line_without_an_end_is_shown_and_bytes_that_are_no_text_are_survived(run):
    (run.logs / "w0.out").write_bytes(b"one\n\xff\xfetwo")
    end(run)
    assert [line.split()[-1] for line in invoke().output.splitlines()] == ["one", "��two"]


def test_following_a_run_that_has_ended_ends(logs):
    end(logs, "failed")
    done = invoke("-f")
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 6
    assert done.stderr == "run aa has ended: failed\n"


def test_following_shows_what_comes_until_the_run_ends(logs):
    write_status(logs)

    def work():
        time.sleep(0.5)
        write(logs, "w0.log", f"{stamp(time.time())} INFO hal")
        time.sleep(0.5)
        write(logs, "w0.log", "ves\n")
        write(logs, "w1.log", f"{stamp(time.time())} INFO a new worker\nno end")
        end(logs)

    thread = threading.Thread(target=work)
    thread.start()
    done = invoke("-f", "-n", "1")
    thread.join()
    words = [line.split()[-1] for line in done.stdout.splitlines()]
    assert sorted(words) == ["end", "ends", "halves", "worker"]
    assert words[0] == "ends"
    assert done.stderr == "run aa has ended: done\n"
