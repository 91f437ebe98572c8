"""The launcher's side of the monitor, with a stand-in for its process."""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distbelief.chronicle import Begin, End, Event, RunReport
from distbelief.job import Job, MonitorConfig
from distbelief.keyring import MONITOR, Keyring
from distbelief.param_server.secret import Secret
from distbelief.spectator import BUFFER_MAX, RESTARTS, Spectator
from tests.helpers import standin
from tests.helpers.children import until

pytestmark = pytest.mark.integration

TOKEN = "token-of-the-run"
BEGIN = Begin(
    at=1.0, run="job", name="net", attempt=1, version="1", engine="local", num_workers=2,
    num_shards=1, config={}, parameters=10, unit="epochs", target=2.0, run_path="/run",
)  # fmt: skip


def look_at(samples: int) -> RunReport:
    return RunReport(
        at=2.0, state="training", samples=samples, total_samples=None, updates=0, loss=None,
        samples_per_s=0.0, eta_s=None, epoch=None, refused=0, workers=[], shards=[],
        controller_restarts=0, dropped=0,
    )  # fmt: skip


def event(text: str) -> Event:
    return Event(at=2.0, kind="state", who="", text=text)


class Clock:
    """The real one, which can be set on."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


class Stage:
    """A spectator, its process, and what that has written down."""

    def __init__(self, folder: Path, mode: str, keys: Any = None, **monitor: Any) -> None:
        (folder / "logs").mkdir()
        self.folder = folder
        self.file = folder / "told.jsonl"
        self.clock = Clock()
        self.said: list[str] = []
        self.command = [sys.executable, "-S", standin.__file__, str(self.file), mode]
        self.spectator = Spectator(
            Job(monitor=MonitorConfig(**monitor)),
            "job",
            folder,
            Secret(TOKEN),
            keys,
            BEGIN,
            self.said.append,
            self.command,
            self.clock,
        )

    def start(self) -> None:
        self.spectator.start()
        self.spectator.wait()

    def notes(self, kind: str) -> list[Any]:
        if not self.file.exists():
            return []
        whole = self.file.read_text().split("\n")[:-1]  # the last may still be written
        return [line["what"] for line in map(json.loads, whole) if line["kind"] == kind]

    @property
    def pid(self) -> int:
        process = self.spectator._process
        assert process is not None
        return process.pid

    def look_until(self, condition: Callable[[], object]) -> None:
        def look() -> object:
            self.spectator.look()
            return condition()

        until(look)


@pytest.fixture
def stage(tmp_path):
    stages: list[Stage] = []

    def make(mode: str, keys: Any = None, **monitor: Any) -> Stage:
        stages.append(Stage(tmp_path, mode, keys, **monitor))
        return stages[-1]

    yield make
    for one in stages:
        process = one.spectator._process
        if process is not None:
            process.kill()
        one.spectator.close(None, 9.0)


def test_it_is_told_all_of_the_run_and_then_ends(stage):
    play = stage("good")
    play.start()
    pid = play.pid
    play.spectator.tell(event("one"))
    play.spectator.tell(look_at(10))
    play.spectator.close({"exit": "failed", "error": {"text": "it broke"}}, 9.0)
    told = play.notes("told")
    assert [line["type"] for line in told] == ["Begin", "Event", "RunReport", "Event", "End"]
    assert (told[3]["kind"], told[3]["text"]) == ("error", "it broke")
    assert told[4]["result"]["exit"] == "failed"
    assert not Path(f"/proc/{pid}").exists()
    assert play.said == [f"dashboard {play.spectator.url}"]
    assert play.spectator.num_dropped == 0


def test_its_secrets_come_by_standard_input_alone(stage):
    play = stage("good", keys=Keyring(["w0"], ["shard0"]).of(MONITOR))
    play.start()
    (config,) = play.notes("config")
    assert config["token"] == TOKEN
    assert config["keys"]["serving"]
    assert config["access"] in play.spectator.url
    for file in ("cmdline", "environ"):
        data = Path(f"/proc/{play.pid}/{file}").read_bytes()
        assert TOKEN.encode() not in data
        assert config["access"].encode() not in data
    assert str(config["num_workers"]) == str(Job().workers)
    play.spectator.tell(End(at=1.0, result={}))


def test_without_access_there_is_no_secret(stage):
    play = stage("good", access=False)
    play.start()
    assert play.notes("config")[0]["access"] == ""


def test_one_that_is_killed_is_back_on_its_ports_and_knows_where_the_run_is(stage):
    play = stage("good")
    play.start()
    before = play.spectator.url
    play.spectator.tell(look_at(77))
    until(lambda: len(play.notes("told")) == 2)
    os.kill(play.pid, signal.SIGKILL)
    play.look_until(lambda: len(play.notes("config")) == 2 and play.spectator._is_ready)
    again = play.notes("config")[1]
    assert (again["wish"], again["feed_wish"]) == (4321, 9)
    play.look_until(lambda: len(play.notes("told")) == 4)
    assert [line["type"] for line in play.notes("told")[2:]] == ["Begin", "RunReport"]
    assert play.notes("told")[3]["samples"] == 77
    assert play.spectator.num_restarts == 1
    assert play.spectator.url == before  # the same secret, so that open pages go on
    assert play.said == [f"dashboard {before}"]  # told once


def test_one_that_does_not_read_costs_lines_and_nobody_waits(stage):
    play = stage("deaf")
    play.start()
    big = event("x" * 65_536)
    num = 2 * BUFFER_MAX // 65_536
    for _ in range(num):
        play.spectator.tell(big)
    assert 0 < play.spectator.num_dropped < num
    assert len(play.spectator._out) <= BUFFER_MAX


def test_one_that_is_stopped_reads_on_when_it_goes_on(stage):
    play = stage("good")
    play.start()
    os.kill(play.pid, signal.SIGSTOP)
    for i in range(100):
        play.spectator.tell(event(f"{i} " + "x" * 40_000))
        play.spectator.look()
    os.kill(play.pid, signal.SIGCONT)
    play.look_until(lambda: not play.spectator._out)
    play.spectator.close({}, 9.0)
    texts = [line["text"].split()[0] for line in play.notes("told") if line["type"] == "Event"]
    assert texts == [str(i) for i in range(100)]
    assert (play.spectator.num_dropped, play.spectator.num_restarts) == (0, 0)


def test_one_that_stays_stopped_is_not_waited_for_for_ever(stage, monkeypatch):
    monkeypatch.setattr("distbelief.spectator.END_TIMEOUT_S", 0.2)
    play = stage("good")
    play.start()
    pid = play.pid
    os.kill(pid, signal.SIGSTOP)
    play.spectator.close({}, 9.0)
    assert not Path(f"/proc/{pid}").exists()


def test_one_that_dies_again_and_again_is_given_up_and_said_once(stage):
    play = stage("dies")
    play.start()
    play.spectator.tell(look_at(1))

    def is_given_up() -> bool:
        if play.spectator._process is None:
            play.clock.ahead_s += 60.0  # past every back-off
        return any("not started again" in text for text in play.said)

    play.look_until(is_given_up)
    for _ in range(5):
        is_given_up()
        play.spectator.look()
    assert play.spectator.num_restarts == RESTARTS
    assert sum("lost" in text for text in play.said) == 1
    assert "exit code 3" in play.said[-1]
    assert "the run goes on" in play.said[-1]
    play.spectator.tell(look_at(2))  # into nothing


def test_one_that_ends_before_it_serves_is_started_again_before_others_are_told_of_it(stage):
    play = stage("stillborn")
    play.start()
    assert play.spectator.endpoint == "tcp://127.0.0.1:9"
    assert (play.spectator.num_restarts, len(play.said)) == (1, 1)


@pytest.mark.parametrize(
    ("mode", "why"),
    [("error", "it cannot serve: a test"), ("junk", "does not say where it listens")],
)
def test_one_that_cannot_serve_is_said_once_and_left(stage, mode, why):
    play = stage(mode)
    play.start()
    (text,) = play.said
    assert text.startswith("no dashboard: ")
    assert why in text
    play.spectator.look()
    play.spectator.tell(look_at(1))
    assert (play.spectator.endpoint, len(play.notes("config"))) == ("", 1)


def test_one_that_says_nothing_is_not_waited_for_for_ever(stage, monkeypatch):
    monkeypatch.setattr("distbelief.spectator.START_TIMEOUT_S", 0.2)
    play = stage("mute")
    play.spectator.start()
    pid = play.pid
    play.spectator.wait()
    assert play.spectator.endpoint == ""
    assert "does not listen" in play.said[0]
    assert not Path(f"/proc/{pid}").exists()


def test_it_is_started_again_in_a_process_of_many_descriptors(stage):
    play = stage("good")
    play.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    null = os.open(os.devnull, os.O_RDONLY)
    many = [os.dup(null) for _ in range(1024)]
    try:
        os.kill(play.pid, signal.SIGKILL)
        play.look_until(lambda: len(play.notes("config")) == 2 and play.spectator._is_ready)
        process = play.spectator._process
        assert process is not None
        assert process.stdout is not None
        assert process.stdout.fileno() > 1023
    finally:
        for descriptor in (null, *many):
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_command_that_is_not_there_is_said(stage):
    play = stage("good")
    play.spectator._command = ["/nowhere/python"]
    play.start()
    assert play.said[0].startswith("no dashboard: ")


def test_switched_off_there_is_none(stage):
    play = stage("good", on=False)
    play.start()
    play.spectator.tell(look_at(1))
    play.spectator.look()
    play.spectator.close({}, 9.0)
    assert (play.said, play.file.exists()) == ([], False)
