"""The dashboard of a real run of 4 workers and 2 shards, in a real browser, while faults are
injected: what was done is what it says, of whom, and soon enough."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page
from playwright.sync_api import expect as hope

from tests.browser.conftest import Seen
from tests.browser.test_page import wait_until_live
from tests.helpers.children import is_stopped

pytestmark = pytest.mark.timeout(400)

MODULE = '''
import os, time
from pathlib import Path
import torch
from torch import nn

class Net(nn.Module):
    """Steps of 25 ms; of a process for which there is a file, as long as that says."""
    def __init__(self, num_classes, in_channels, image_size):
        super().__init__()
        self.linear = nn.Linear(in_channels * image_size**2, num_classes)
    def forward(self, x):
        order = Path(__file__).with_name(f"order-{os.getpid()}")
        text = order.read_text() if order.exists() else "0.025"
        if not text.startswith("0"):
            raise RuntimeError(text)
        time.sleep(float(text))
        return self.linear(x.flatten(1))
'''

NODES = """
# Two machines on one: a worker's log has its name before it asks where it is.
import logging, socket
host = socket.gethostname()
def gethostname():
    files = [getattr(h, "baseFilename", "") for h in logging.getLogger().handlers]
    names = [f.rpartition("/")[2].removesuffix(".log") for f in files]
    return {"w0": "near", "w1": "near", "w2": "far", "w3": "far"}.get((names or [""])[0], host)
socket.gethostname = gethostname
"""

EVIL = '<img src=x onerror="window.hit=1">\x1b[31m<script>window.hit=2</script>'
"""What a worker's own code may say."""
SLOW_S = 0.15
"""Of a step, by one that is slow: six times the others'."""


class Run:
    """One of the command line, and what is done to it."""

    def __init__(self, folder: Path) -> None:
        (folder / "mine.py").write_text(MODULE)
        (folder / "sitecustomize.py").write_text(NODES)
        self.folder = folder
        command = [sys.executable, "-m", "distbelief", "launch", "--engine", "local"]
        command += ["--workers", "4", "--shards", "2", "--until", "1h", "--run-dir", "runs"]
        for word in (
            "model.factory=mine:Net", "data.image_size=8", "train.lr=0.001", "monitor.on=true",
            "warm_workers=true", "train.batch_size=16",
        ):  # fmt: skip
            command += ["--set", word]
        env = {
            **os.environ,
            "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        with (folder / "launch.log").open("wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        self.url = ""

    def begin(self) -> None:
        """Wait until all are there."""
        self.url = self._wait_for("monitor.json")["url"]
        until(lambda: {"w0", "w1", "w2", "w3", "shard0", "shard1"} <= set(self.pids), 60.0)

    @property
    def path(self) -> Path:
        (path,) = (self.folder / "runs").iterdir()
        return path

    @property
    def pids(self) -> dict[str, int]:
        file = self.path / "processes.json"
        listed = json.loads(file.read_text()) if file.exists() else []
        return {process["name"]: process["pid"] for process in listed}

    def order(self, name: str, text: str) -> None:
        file = self.folder / f"order-{self.pids[name]}"
        file.with_suffix(".part").write_text(text)
        file.with_suffix(".part").replace(file)

    def heal(self) -> None:
        for file in self.folder.glob("order-*"):
            file.unlink()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _wait_for(self, name: str) -> Any:
        found: list[Path] = []

        def look() -> bool:
            found[:] = self.folder.glob(f"runs/*/{name}")
            return bool(found)

        until(look, 60.0)
        return json.loads(found[0].read_text())


def until(holds: Callable[[], object], seconds: float) -> float:
    """Returns: how long it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, "it does not come about"
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    one = Run(tmp_path_factory.mktemp("real"))
    try:
        one.begin()
        yield one
    finally:
        one.end()


class View:
    """A page of it."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.context = browser.new_context(viewport={"width": 1440, "height": 900})
        self.page: Page = self.context.new_page()
        self.seen = Seen(self.page)
        self.page.goto(url)
        wait_until_live(self.page)

    def wait(self, script: str, seconds: float) -> float:
        """Until that holds in the page. Returns: how long it took."""
        began = time.monotonic()
        self.page.wait_for_function(script, polling=200, timeout=seconds * 1000)
        return time.monotonic() - began

    def ask(self, route: str) -> Any:
        return self.page.evaluate("r => fetch('api/v1/' + r).then(a => a.json())", route)

    def finding(self, name: str, seconds: float) -> Any:
        """Once there is one of that id."""
        script = f"() => distbelief.run.findings.some(f => f.id === '{name}')"
        self.wait(script, seconds)
        return next(f for f in self.page.evaluate("distbelief.run.findings") if f["id"] == name)

    def status(self, worker: str) -> str:
        items = self.ask("workers")["items"]
        word: str = next(one["status"] for one in items if one["id"] == worker)
        return word

    def is_quiet(self) -> bool:
        return {one["status"] for one in self.ask("workers")["items"]} == {"ok"}


@pytest.fixture(scope="module")
def view(browser: Browser, run: Run) -> Iterator[View]:
    one = View(browser, run.url)
    one.wait("() => distbelief.run.state === 'training'", 60)
    yield one
    one.context.close()


def test_a_straggler_and_a_crash_are_seen_and_named(run: Run, view: View):
    page = view.page
    until(view.is_quiet, 30.0)
    run.order("w3", str(SLOW_S))
    began = time.monotonic()

    # While it is not slow for long enough yet, another one crashes, and is back.
    first = run.pids["w1"]
    os.kill(first, signal.SIGKILL)
    crash = "distbelief.run.events.find(e => e.kind === 'crash' && e.who === 'w1')"
    assert view.wait(f"() => {crash}", 10.0) < 5.0
    hope(page.locator("#recent")).to_contain_text("w1")
    view.wait("() => distbelief.run.events.some(e => e.kind === 'recover' && e.who === 'w1')", 20.0)
    until(lambda: view.status("w1") == "recovering", 10.0)
    assert run.pids["w1"] != first

    # The slow one is named after half a minute, and the sentence says why.
    found = view.finding("slow:w3", 60.0)
    assert 28.0 < time.monotonic() - began < 45.0
    assert (found["who"], found["scope"], found["phase"]) == ("w3", "worker", "compute")
    hope(page.locator("#sentence")).to_contain_text("w3")
    hope(page.locator("#sentence")).to_contain_text("compute")
    hope(page.locator("#rank-body tr").first).to_contain_text("w3")
    assert view.status("w3") == "slow"
    checks = {check["id"]: check for check in view.ask("snapshot")["checks"]}
    assert checks["law"]["ok"] is True, checks
    until(lambda: view.status("w1") in ("ok", "watch"), 30.0)
    names = [one["id"] for one in view.ask("workers")["items"]]
    assert sorted(names) == ["w0", "w1", "w2", "w3"]
    run.heal()


def test_the_drawer_has_its_log(run: Run, view: View):
    page = view.page
    page.evaluate("location.hash = 'worker=w2'")
    hope(page.locator("#drawer pre.log")).to_contain_text("worker w2 pid=")
    hope(page.locator("#drawer .facts")).to_contain_text("Pushes")
    page.keyboard.press("Escape")


def test_the_report_has_the_same_numbers(run: Run, view: View, browser: Browser, tmp_path: Path):
    """Of the run that goes on, opened without a network."""
    command = [sys.executable, "-m", "distbelief", "report", str(run.path), "-o", "report.html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    context = browser.new_context(viewport={"width": 1440, "height": 900}, offline=True)
    page = context.new_page()
    seen = Seen(page)
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_function("() => window.distbelief?.run.tick", polling=200, timeout=20_000)
    page.wait_for_timeout(500)
    tick = page.evaluate("distbelief.run.tick")
    # The monitor's own word on that second, which it still has.
    items = view.ask(f"delta?after={tick['seq'] - 1}")
    assert tick == next(one["data"] for one in items if one["event"] == "tick")
    shown = page.evaluate(
        "() => Object.fromEntries([...document.querySelectorAll('[data-key^=\"kpi.\"]')]"
        ".map(node => [node.dataset.key, node.textContent]))"
    )
    assert shown["kpi.workers.alive"] == str(tick["kpi"]["workers"]["alive"])
    assert float(shown["kpi.loss"]) == pytest.approx(tick["kpi"]["loss"], rel=0.006)
    hope(page.locator("#live-text")).to_contain_text("Report of")
    page.evaluate("location.hash = 'worker=w2'")
    hope(page.locator("#drawer pre.log")).to_contain_text("worker w2 pid=")
    assert seen.urls == [(tmp_path / "report.html").as_uri()]
    assert seen.errors == []
    context.close()


@pytest.mark.long
def test_one_that_stands_still_is_stalled_and_its_lag_grows(run: Run, view: View):
    until(view.is_quiet, 90.0)
    pid = run.pids["w0"]
    os.kill(pid, signal.SIGSTOP)
    try:
        took = until(lambda: view.status("w0") == "stalled", 40.0)
        assert is_stopped(pid)
        first = next(w for w in view.ask("workers")["items"] if w["id"] == "w0")
        time.sleep(3.0)
        then = next(w for w in view.ask("workers")["items"] if w["id"] == "w0")
        assert then["lag"] > first["lag"] + 20
        assert took < 20.0
        hope(view.page.locator("#sentence")).to_contain_text("w0 has not pushed")
    finally:
        os.kill(pid, signal.SIGCONT)


class Stutter(threading.Thread):
    """Lets a process run for a quarter of the time."""

    def __init__(self, pid: int) -> None:
        super().__init__()
        self._pid = pid
        self._has_ended = threading.Event()

    def run(self) -> None:
        while not self._has_ended.is_set():
            os.kill(self._pid, signal.SIGSTOP)
            self._has_ended.wait(0.06)
            os.kill(self._pid, signal.SIGCONT)
            self._has_ended.wait(0.02)

    def end(self) -> None:
        self._has_ended.set()
        self.join()


@pytest.mark.long
def test_a_hot_shard_is_named_and_no_worker(run: Run, view: View):
    until(view.is_quiet, 90.0)
    stutter = Stutter(run.pids["shard1"])
    stutter.start()
    try:
        found = view.finding("hot:shard1", 40.0)
        assert (found["who"], found["scope"]) == ("shard1", "shard")
        hope(view.page.locator("#sentence")).to_contain_text("shard1")
        assert not [f for f in view.ask("findings")["items"] if f["scope"] in ("worker", "node")]
    finally:
        stutter.end()


@pytest.mark.long
def test_a_slow_node_is_named_and_not_its_workers(run: Run, view: View):
    until(view.is_quiet, 90.0)
    began = time.monotonic()
    run.order("w2", str(SLOW_S))
    run.order("w3", str(SLOW_S))
    try:
        found = view.finding("slow:far", 60.0)
        assert 28.0 < time.monotonic() - began < 45.0
        assert (found["who"], found["scope"], found["phase"]) == ("far", "node", "compute")
        hope(view.page.locator("#sentence")).to_contain_text("far")
    finally:
        run.heal()


def test_what_a_worker_says_is_text(run: Run, view: View, browser: Browser):
    """Its error ends the run; the page says why, and nothing of it runs."""
    run.order("w2", EVIL)
    run.process.wait(60)
    page = view.page
    view.wait("() => distbelief.run.events.some(e => e.text.includes('<img'))", 20.0)
    assert page.evaluate("() => window.hit") is None
    assert page.locator("#recent img").count() == 0
    # Its monitor ends with it: then the page cannot ask any more, and says so.
    assert [text for text in view.seen.errors if "ERR_" not in text] == []

    command = [sys.executable, "-m", "distbelief", "report", str(run.path), "-o", "over.html"]
    subprocess.run(command, cwd=run.folder, check=True, capture_output=True)
    context = browser.new_context(offline=True)
    page = context.new_page()
    seen = Seen(page)
    page.goto((run.folder / "over.html").as_uri())
    page.wait_for_function("() => window.distbelief?.run.tick", polling=200, timeout=20_000)
    hope(page.locator("#state-chip")).to_have_text("Failed")
    page.keyboard.press("e")
    hope(page.locator("#events-dialog")).to_contain_text("<img src=x")
    assert page.evaluate("() => window.hit") is None
    assert page.locator("#events-dialog img, #recent img").count() == 0
    assert seen.errors == []
    context.close()
