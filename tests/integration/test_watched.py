"""Real runs that tell a monitor about themselves: what arrives is what was."""

import json
import os
import signal
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from distbelief import spectator
from distbelief.launcher import launch
from tests.helpers import standin
from tests.helpers.runs import Watch, tiny_job

MONITOR = {"monitor.on": True}


class Stage:
    """A stand-in for the monitor's process, and what it has written down."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "told.jsonl"

    def command(self, mode: str) -> list[str]:
        return [sys.executable, standin.__file__, str(self.file), mode]

    def notes(self, kind: str) -> list[Any]:
        lines = map(json.loads, self.file.read_text().splitlines())
        return [line["what"] for line in lines if line["kind"] == kind]


@pytest.fixture
def stage(tmp_path, monkeypatch):
    stage = Stage(tmp_path)

    def use(mode: str) -> Stage:
        monkeypatch.setattr(
            "distbelief.run.Spectator", partial(spectator.Spectator, command=stage.command(mode))
        )
        return stage

    return use


def steps_of(reports: list[Any], *columns: str) -> list[tuple[Any, ...]]:
    return [row for r in reports for row in zip(*(r[c] for c in columns), strict=True)]


@pytest.mark.parametrize(
    ("encrypt", "shares", "batch_size", "least"),
    [(False, False, 8, 0.98), (True, True, 16, 0.5)],
    ids=["tcp", "shared memory, keys"],
)
def test_what_arrives_is_what_was(user_folder, stage, encrypt, shares, batch_size, least):
    """least: of W - 1, the mean of staleness. In shared memory values are read a moment after they
    were promised, and miss less."""
    play = stage("collects")
    job = tiny_job(
        user_folder / "runs",
        workers=3,
        until="2-epochs",
        **MONITOR,
        **{
            "model.factory": "tiny:Slow",
            "net.shared_memory": shares,
            "net.encrypt": encrypt,
            "train.batch_size": batch_size,
            "train.lr": 0.02,
            "train.log_grad_norm": True,
        },
    )
    live = Watch()
    result = launch(job, live=live)
    assert result.exit == "done"
    assert sum(text.startswith("dashboard http://127.0.0.1:4321/?k=") for text in live.said) == 1
    assert play.notes("counts") == [{}]  # no junk, no strangers
    reports = play.notes("report")
    by_name: dict[str, list[Any]] = {}
    for report in reports:
        by_name.setdefault(report["name"], []).append(report)
    assert by_name.keys() == {"w0", "w1", "w2", "shard0", "shard1"}
    for name, those in by_name.items():
        assert [r["n"] for r in those] == list(range(1, len(those) + 1)), f"{name}: some are lost"
    check_workers([r for r in reports if r["op"] == "worker"], result)
    check_shards(
        {name: those for name, those in by_name.items() if those[0]["op"] == "shard"},
        json.loads((user_folder / "runs" / result.run / "shards.json").read_text()),
        least,
    )
    check_chronicle(play.notes("told"), result)


def check_workers(reports: list[Any], result) -> None:
    steps = steps_of(reports, "data_s", "fetch_s", "compute_s", "push_s", "step_s")
    assert len(steps) == result.updates
    wall = sum(step[-1] for step in steps)
    parts = sum(sum(step[:-1]) for step in steps)
    # The phases are parts of the step; what is left of it is the little that the loop itself does.
    assert all(sum(step[:-1]) <= step[-1] * 1.001 for step in steps)
    assert parts > 0.6 * wall  # on a machine where much else runs
    assert all(step[2] >= 0.02 for step in steps)  # it sleeps for so long in its forward pass
    losses = steps_of(reports, "has_loss", "loss", "has_push", "grad_norm")
    assert all(has_loss and has_push for has_loss, _, has_push, _ in losses)
    assert all(0 < loss < 10 and 0 < norm < 100 for _, loss, _, norm in losses)
    assert sum(row[0] for row in steps_of(reports, "samples")) == result.samples
    for name in {r["name"] for r in reports}:
        last = [r for r in reports if r["name"] == name][-1]
        assert last["num_samples"] == result.worker_samples[name]
    trips = steps_of(reports, "trip_shard", "trip_is_push", "trip_s")
    assert {shard for shard, _, _ in trips} == {0, 1}
    assert all(0 < seconds < 60 for _, _, seconds in trips)
    assert all(r["rss_bytes"] > 2**20 and r["busy_s"] >= 0 for r in reports)


def check_shards(by_name: dict[str, list[Any]], final: list[Any], least: float) -> None:
    for name, those in by_name.items():
        told, steady = Counter[int](), [0, 0]
        for report in those:
            told.update(dict(zip(report["stale_value"], report["stale_count"], strict=True)))
            steady = [steady[0] + report["steady_parts"], steady[1] + report["steady_sum"]]
        (end,) = [shard for shard in final if f"shard{shard['shard']}" == name]
        counts = {value: num for value, num in end["staleness"]["counts"]}
        assert told == counts
        assert steady == [end["staleness"]["steady_pushes"], end["staleness"]["steady_sum"]]
        pushes = Counter[str]()
        for report in those:
            pushes.update(dict(zip(report["w"], report["pushes"], strict=True)))
        assert sum(pushes.values()) == end["version"][0]
        assert least * 2 <= steady[1] / steady[0] <= 1.02 * 2
        assert those[-1]["version"] == min(end["version"])
        assert those[-1]["samples"] == min(end["samples"])
        assert all(0 <= r["busy_share"] <= 1 and r["queue"] <= 3 for r in those)
        assert max(s for r in those for s in r["staleness"]) == max(counts)


def check_chronicle(told: list[Any], result) -> None:
    assert [line["type"] for line in told[:1] + told[-1:]] == ["Begin", "End"]
    assert told[-1]["result"]["samples"] == result.samples
    events = [(e["kind"], e["who"]) for e in told if e["type"] == "Event"]
    assert {("join", "w0"), ("join", "w1"), ("join", "w2")} <= set(events)
    states = [e["text"] for e in told if e["type"] == "Event" and e["kind"] == "state"]
    assert states == [f"the run is {s}" for s in ("starting", "training", "saving", "evaluating")]
    last = [line for line in told if line["type"] == "RunReport"][-1]
    assert last["samples"] == result.samples
    assert all(worker["state"] == "ended" for worker in last["workers"])
    assert "token" not in json.dumps(told[0])


class Disturb:
    """Sends a signal to the monitor's process once training goes on, and looks what that did."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pid: int | None = None

    def __call__(self, progress) -> None:
        if self.pid is None and progress.samples > 300:
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            for pid in map(int, children):
                if b"standin.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    self.pid = pid
                    os.kill(pid, self.number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_monitor_that_is_killed_or_stopped_changes_nothing(
    user_folder, stage, monkeypatch, number
):
    monkeypatch.setattr(spectator, "END_TIMEOUT_S", 1.0)
    play, disturb = stage("collects"), Disturb(number)
    job = tiny_job(user_folder / "runs", **MONITOR, **{"model.factory": "tiny:Slow"})
    result = launch(job, live=Watch(disturb))
    assert disturb.pid is not None
    assert (result.exit, result.samples) == ("done", 2 * 1437)
    assert result.accounting["adds_up"]
    assert (result.workers_lost, result.shard_restarts) == (0, 0)
    starts = len(play.notes("config"))
    if number == signal.SIGSTOP:
        assert starts == 1
    else:
        assert starts == 2  # it came back, and goes on to be told, by everybody
        text = play.file.read_text()
        later = text[text.rindex('"kind": "config"') :]
        assert '"type": "End"' in later
        names = {
            json.loads(line)["what"]["name"]
            for line in later.splitlines()[1:]
            if "report" in line[:20]
        }
        assert {"w0", "w1", "shard0", "shard1"} <= names


def test_a_monitor_that_cannot_start_stops_no_run(user_folder, stage):
    stage("error")
    live = Watch()
    result = launch(tiny_job(user_folder / "runs", until="1-epochs", **MONITOR), live=live)
    assert (result.exit, result.samples) == ("done", 1437)
    assert sum("no dashboard" in text for text in live.said) == 1
