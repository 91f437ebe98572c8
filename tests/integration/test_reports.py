"""Real runs beside a real monitor: what it shows is what was, and whatever becomes of it changes
nothing in the run."""

import http.cookiejar
import json
import os
import signal
import stat
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from distbelief.launcher import launch
from distbelief.monitor.access import TOKEN_HEADER
from distbelief.monitor.link import Link, read_link
from distbelief.monitor.recording import Recording
from distbelief.monitor.sample import VALUES, quantiles
from distbelief.monitor.store import Store
from distbelief.param_server.staleness import Staleness
from tests.helpers.children import is_stopped
from tests.helpers.runs import Watch, num_trained, tiny_job

SLEEP_S = 0.02
"""Of tiny:Slow, in each forward pass."""


class Visitor:
    """Asks the monitor of the one run below a folder."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._direct = urllib.request.ProxyHandler({})

    @property
    def link(self) -> Link | None:
        files = list(self._runs.glob("*/monitor.json"))
        return read_link(files[0].parent) if files else None

    def get(self, name: str, *, has_token: bool = True) -> Any:
        link = self.link
        assert link is not None
        url = urlsplit(link.url)
        (key,) = parse_qs(url.query)["k"]
        headers = {TOKEN_HEADER: key} if has_token else {}
        request = urllib.request.Request(
            f"{url.scheme}://{url.netloc}/api/v1/{name}", headers=headers
        )
        opener = urllib.request.build_opener(self._direct)
        with opener.open(request, timeout=10) as reply:
            return json.load(reply)

    def get_by_cookie(self, name: str) -> Any:
        """As a browser that follows the printed link."""
        link = self.link
        assert link is not None
        jar = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        opener = urllib.request.build_opener(self._direct, jar)
        with opener.open(link.url.replace("/?", f"/api/v1/{name}?"), timeout=10) as reply:
            assert "k=" not in reply.geturl()
            return json.load(reply)


class Look:
    """Looks at the run twice a second once it trains, and keeps what it saw last."""

    def __init__(self, runs: Path) -> None:
        self.visitor = Visitor(runs)
        self.link: Link | None = None
        self.mode = 0
        self.refused: int | None = None
        self.snapshot: Any = None
        self.workers: Any = None
        self.meta: Any = None
        self._looked_at = 0.0

    def __call__(self, progress) -> None:
        if progress.samples < 200 or time.monotonic() - self._looked_at < 0.5:
            return
        visitor, self._looked_at = self.visitor, time.monotonic()
        self.link = self.link or visitor.link
        assert self.link is not None, "the run trains, and no monitor serves"
        if self.refused is None:
            (file,) = visitor._runs.glob("*/monitor.json")
            self.mode = stat.S_IMODE(file.stat().st_mode)
            self.meta = visitor.get_by_cookie("meta")
            with pytest.raises(urllib.error.HTTPError) as caught:
                visitor.get("snapshot", has_token=False)
            self.refused = caught.value.code
            caught.value.close()
        self.snapshot, self.workers = visitor.get("snapshot"), visitor.get("workers")


def test_what_a_monitor_shows_and_keeps_is_what_was(user_folder):
    runs = user_folder / "runs"
    look = Look(runs)
    watch = Watch(look)
    changes = {"model.factory": "tiny:Slow", "train.batch_size": 16, "monitor.on": True}
    result = launch(tiny_job(runs, workers=3, until="6-epochs", **changes), live=watch)
    assert (result.exit, result.error) == ("done", None)
    assert num_trained(result) == 6 * 1437
    run = runs / result.run

    # While it went on.
    assert look.link is not None
    assert watch.said.count(f"dashboard {look.link.url}") == 1
    assert (look.mode, look.refused) == (0o600, 401)
    assert (look.meta["run"], look.meta["live"], look.meta["state"]) == (
        result.run, True, "training",
    )  # fmt: skip
    kpi = look.snapshot["kpi"]
    assert (kpi["workers"]["alive"], kpi["workers"]["target"]) == (3, 3)
    assert 0 < kpi["progress"]["samples"] <= result.samples
    assert {shard["id"] for shard in look.snapshot["shards"]} == {"shard0", "shard1"}
    items = look.workers["items"]
    assert {worker["id"] for worker in items} == {"w0", "w1", "w2"}
    for worker in items:
        phases = worker["phases_s"]
        assert sum(phases.values()) == pytest.approx(worker["step_s"], rel=0.02)
        assert phases["compute"] > SLEEP_S
        assert 0 <= phases["other"] < 0.5 * worker["step_s"]
        assert worker["age_s"] < 10
        assert 0 < worker["pushes"] <= result.updates
        assert Path(f"/proc/{worker['pid']}").exists() is False  # by now

    # When it was over.
    assert not Path(f"/proc/{look.link.pid}").exists()
    assert not (run / "monitor.json").exists()
    store = recorded(run)
    assert (store.state, store.ended) == ("ended", json.loads((run / "result.json").read_text()))
    assert (store.fleet.num_lost, store.shard_board.num_lost, store.num_odd) == (0, 0, 0)
    assert store.run is not None
    assert (store.run.dropped, store.run.samples) == (0, result.samples)
    assert store.fleet.steps_told == result.updates
    told = store.stale.ring.sum(axis=0)
    by_value = {int(VALUES[i]): int(told[i]) for i in np.flatnonzero(told)}
    shards = json.loads((run / "shards.json").read_text())
    counted = Staleness.merged(Staleness.from_dict(shard["staleness"]) for shard in shards)
    assert by_value == counted.counts
    p50, p95, top = quantiles(told, (0.5, 0.95, 1.0))
    assert {"p50": p50, "p95": p95, "max": top} == result.staleness
    kinds = Counter(event["kind"] for event in map(json.loads, open_events(run)))
    assert (kinds["join"], kinds["crash"], kinds["error"]) == (3, 0, 0)
    assert kinds["state"] >= 4


def recorded(run: Path) -> Store:
    store = Store(live=False)
    recording = Recording(run / "metrics")
    assert recording.load(store)
    assert recording.num_damaged == 0
    return store


def open_events(run: Path) -> list[str]:
    return (run / "metrics" / "events.jsonl").read_text().splitlines()


class Torment:
    """Stops the monitor for two seconds, then kills it, and looks for the next one."""

    def __init__(self, runs: Path) -> None:
        self.visitor = Visitor(runs)
        self.first: Link | None = None
        self.second: Link | None = None
        self.samples: list[int] = []
        """As the run had them when the monitor was stopped, went on, and was killed."""
        self.was_stopped = False
        self.heard: list[str] = []
        """Workers that the second one has heard."""
        self._at = 0.0

    def __call__(self, progress) -> None:
        now = time.monotonic()
        if not self.samples:
            if progress.samples >= 200:
                self.first = self.visitor.link
                assert self.first is not None
                os.kill(self.first.pid, signal.SIGSTOP)
                self._step(progress, now)
        elif len(self.samples) == 1:
            if now - self._at > 2.0:
                assert self.first is not None
                self.was_stopped = is_stopped(self.first.pid)
                os.kill(self.first.pid, signal.SIGCONT)
                self._step(progress, now)
        elif len(self.samples) == 2:
            if now - self._at > 0.5:
                assert self.first is not None
                os.kill(self.first.pid, signal.SIGKILL)
                self._step(progress, now)
        elif now - self._at > 0.2 and len(self.heard) < 2:
            self._at, link = now, self.visitor.link
            if link is not None and self.first is not None and link.pid != self.first.pid:
                self.second = link
                items = self.visitor.get("workers")["items"]
                self.heard = [w["id"] for w in items if w["pushes"] and w["age_s"] < 3]

    def _step(self, progress, now: float) -> None:
        self.samples.append(progress.samples)
        self._at = now


def test_a_monitor_that_is_stopped_and_killed_changes_nothing_and_is_back(user_folder):
    runs = user_folder / "runs"
    torment = Torment(runs)
    watch = Watch(torment)
    changes = {"model.factory": "tiny:Slow", "train.batch_size": 16, "monitor.on": True}
    result = launch(tiny_job(runs, until="12s", **changes), live=watch)
    assert (result.exit, result.error) == ("done", None)
    assert num_trained(result) == result.samples
    assert (result.workers_lost, result.shard_restarts, result.controller_restarts) == (0, 0, 0)
    assert torment.was_stopped
    stopped, went_on, killed = torment.samples
    assert stopped < went_on < killed < result.samples  # training went on all the time
    first, second = torment.first, torment.second
    assert first is not None
    assert second is not None
    assert (second.url, second.feed) == (first.url, first.feed)
    assert sorted(torment.heard) == ["w0", "w1"]
    assert sum(text.startswith("dashboard ") for text in watch.said) == 1
    assert not any("the monitor" in text for text in watch.said)
    run = runs / result.run
    store = recorded(run)
    assert store.ended == json.loads((run / "result.json").read_text())
    assert not Path(f"/proc/{second.pid}").exists()
