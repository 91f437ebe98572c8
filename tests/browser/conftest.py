"""A real browser, and a monitor that serves a simulated run to it."""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
START_TIMEOUT_S = 60.0


class Served(NamedTuple):
    """A monitor that serves."""

    url: str
    """With its secret."""
    process: subprocess.Popen[bytes]

    @property
    def base(self) -> str:
        return self.url.partition("?")[0]

    @property
    def key(self) -> str:
        return self.url.partition("?k=")[2]


def serve(workers: int, past_s: float) -> Served:
    """Simulated workers, with so much of their past."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distbelief.monitor.process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    simulated = {"workers": workers, "seed": 1, "past_s": past_s}
    config = {"access": "0123456789abcdef", "simulate": simulated, "wish": 0}
    process.stdin.write(json.dumps(config).encode() + b"\n")
    process.stdin.flush()
    assert select.select([process.stdout], [], [], START_TIMEOUT_S)[0], "it does not serve"
    told = json.loads(process.stdout.readline())
    return Served(told["url"], process)


def end(served: Served) -> None:
    served.process.kill()
    served.process.wait()
    for pipe in (served.process.stdin, served.process.stdout):
        assert pipe is not None
        pipe.close()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """64 workers, one of them slow for some minutes."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    one = serve(64, 480.0)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and not _has_caught_up(one):
        time.sleep(0.3)
    yield one
    end(one)


def _has_caught_up(served: Served) -> bool:
    import urllib.request

    request = urllib.request.Request(served.base + "api/v1/snapshot")
    request.add_header("X-DB-Token", served.key)
    with urllib.request.urlopen(request, timeout=5) as reply:
        now: float = json.load(reply)["t"]
    return time.time() - now < 3


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


class Seen:
    """What a page has asked for, and complained of."""

    def __init__(self, page: Page) -> None:
        self.urls: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.urls.append(request.url))
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
