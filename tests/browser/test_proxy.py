"""The page behind a proxy: below a prefix, cut off for a while, and 9 tabs of it."""

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Iterator

import aiohttp
import pytest
from aiohttp import web
from playwright.sync_api import Browser

from tests.browser.conftest import Seen, Served
from tests.browser.test_page import wait_until_live

PREFIX = "/a/b/"
CUT_S = 7.0


class Proxy:
    """Passes on what comes below a prefix, which it cuts off, as nginx does with a trailing slash.

    In a thread of its own, as the tests drive the browser in theirs.
    """

    def __init__(self, base: str) -> None:
        self._base = base
        self._is_cut = False
        self._requests: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._has_begun = threading.Event()
        self.port = 0
        self.num_refused = 0
        self._thread = threading.Thread(target=self._run)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{PREFIX}"

    def cut(self) -> None:
        """What is under way ends in the middle, and nothing new is let through."""
        self._loop.call_soon_threadsafe(self._cut)

    def mend(self) -> None:
        self._is_cut = False

    def __enter__(self) -> "Proxy":
        self._thread.start()
        assert self._has_begun.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(20)
        self._loop.close()

    def _cut(self) -> None:
        self._is_cut = True
        for task in self._requests:
            task.cancel()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            self._session = session
            app = web.Application()
            app.router.add_route("*", PREFIX + "{path:.*}", self._pass_on)
            runner = web.AppRunner(app, shutdown_timeout=0.5)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.port = runner.addresses[0][1]
            self._has_begun.set()
            await self._end.wait()
            self._cut()
            await runner.cleanup()

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        if self._is_cut:
            self.num_refused += 1
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        try:
            return await self._relay(request)
        except asyncio.CancelledError:
            if request.transport is not None:
                request.transport.abort()
            return web.Response()
        finally:
            self._requests.discard(task)

    async def _relay(self, request: web.Request) -> web.StreamResponse:
        # The monitor is asked under its own name, as by a proxy that knows where it is.
        headers = {k: v for k, v in request.headers.items() if k.lower() != "host"}
        url = self._base + request.match_info["path"]
        async with self._session.request(
            request.method,
            url,
            params=request.query,
            headers=headers,
            data=await request.read(),
            allow_redirects=False,
        ) as answer:
            away = {"transfer-encoding", "connection"}
            kept = [(k, v) for k, v in answer.headers.items() if k.lower() not in away]
            reply = web.StreamResponse(status=answer.status)
            for name, value in kept:
                reply.headers.add(name, value)
            await reply.prepare(request)
            with contextlib.suppress(ConnectionError):
                async for data in answer.content.iter_any():
                    await reply.write(data)
            return reply


@pytest.fixture
def proxy(served: Served) -> Iterator[Proxy]:
    with Proxy(served.base) as one:
        yield one


def test_below_a_prefix_and_cut_off_for_a_while_it_misses_nothing(
    browser: Browser, served: Served, proxy: Proxy
):
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    seen = Seen(page)
    page.goto(f"{proxy.url}?k={served.key}")
    wait_until_live(page)
    page.wait_for_function("() => window.distbelief.run.series", polling=100)
    assert all(url.startswith(proxy.url) for url in seen.urls)
    assert seen.errors == []
    cookies = context.cookies()
    assert [cookie["httpOnly"] for cookie in cookies] == [True]

    proxy.cut()
    page.wait_for_function(
        "() => document.body.dataset.link === 'reconnecting'", polling=100, timeout=20_000
    )
    assert "Reconnecting" in page.inner_text("#live-text")
    gone_at = page.evaluate("() => window.distbelief.run.tick.t")
    dim = page.evaluate("() => Number(getComputedStyle(document.querySelector('.big')).opacity)")
    assert dim < 1.0  # what is shown is old, and looks so
    page.wait_for_timeout(CUT_S * 1000)
    assert proxy.num_refused > 0  # it tries again
    proxy.mend()
    wait_until_live(page)
    page.wait_for_function(f"() => window.distbelief.run.tick.t > {gone_at} + 3", polling=100)
    page.wait_for_function(
        f"() => window.distbelief.run.series?.at.some(t => t > {gone_at} + {CUT_S})",
        polling=100,
        timeout=20_000,
    )

    # Of each second there is a point, also of those in which nothing came.
    at = page.evaluate("() => window.distbelief.run.series.at")
    around = [t for t in at if gone_at - 5 <= t <= gone_at + CUT_S]
    assert len(around) >= CUT_S + 4
    assert max(b - a for a, b in itertools.pairwise(around)) == 1.0
    told = page.evaluate("() => fetch('api/v1/events?limit=400').then(r => r.json())")["items"]
    shown = page.evaluate("() => window.distbelief.run.events.map(e => e.seq)")
    missing = {event["seq"] for event in told[-len(shown) :]} - set(shown)
    assert missing == set()
    context.close()


def test_nine_tabs_are_all_live(browser: Browser, served: Served, proxy: Proxy):
    """A browser gives a host six connections: one stream serves all tabs."""
    context = browser.new_context()
    pages = [context.new_page() for _ in range(9)]
    for page in pages:
        page.goto(f"{proxy.url}?k={served.key}")
    for page in pages:
        wait_until_live(page)
    before = pages[0].evaluate("() => window.distbelief.seq")
    for page in pages:
        page.wait_for_function(
            f"() => window.distbelief.seq > {before}", polling=200, timeout=20_000
        )
        assert page.evaluate("() => window.distbelief.transport") == "stream"
    context.close()
