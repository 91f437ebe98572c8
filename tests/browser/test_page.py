"""The dashboard in a real browser, fed by a simulated run through the real server."""

from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page
from playwright.sync_api import expect as hope

from tests.browser.conftest import Seen, Served

LIVE = (
    "() => window.distbelief && window.distbelief.seq > 0 && window.distbelief.run.link === 'live'"
)
TRIES = 5


def open_page(
    browser: Browser, served: Served, *, theme: str = "light", width: int = 1440, at: str = ""
) -> tuple[Page, Seen]:
    """A new page in a context of its own, with the first ticks there."""
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if theme == "dark" else "light",
    )
    page = context.new_page()
    seen = Seen(page)
    page.goto(served.url + at)
    wait_until_live(page)
    return page, seen


def wait_until_live(page: Page) -> None:
    # By the clock: a tab behind others draws no frames.
    page.wait_for_function(LIVE, polling=200, timeout=30_000)


def shown_and_told(page: Page) -> tuple[dict[str, str], dict[str, Any]]:
    """Numbers of the page, and those of the tick that it shows."""
    keys = ["staleness.p50", "staleness.p95", "staleness.max", "workers.alive", "loss"]
    shown: dict[str, str] = page.evaluate(
        """async (keys) => {
          const frame = () => new Promise((done) => requestAnimationFrame(done));
          await frame(); await frame();
          const text = (key) => document.querySelector(`[data-key="kpi.${key}"]`).textContent;
          return Object.fromEntries(keys.map((key) => [key, text(key)]));
        }""",
        keys,
    )
    kpi: dict[str, Any] = page.evaluate("() => window.distbelief.run.tick.kpi")
    return shown, {
        "staleness.p50": kpi["staleness"]["p50"],
        "staleness.p95": kpi["staleness"]["p95"],
        "staleness.max": kpi["staleness"]["max"],
        "workers.alive": kpi["workers"]["alive"],
        "loss": kpi["loss"],
    }


def test_numbers_on_the_page_are_those_of_the_api(browser, served):
    page, _ = open_page(browser, served)
    for left in reversed(range(TRIES)):  # a tick may come between the two looks
        shown, told = shown_and_told(page)
        wrong = {
            key: (shown[key], told[key])
            for key in told
            if float(shown[key].replace(",", "")) != pytest.approx(told[key], rel=0.006)
        }
        if not wrong:
            break
        assert left, wrong
    page.context.close()


def test_it_asks_nobody_else_and_complains_of_nothing(browser, served):
    page, seen = open_page(browser, served)
    page.wait_for_timeout(2500)
    assert [url for url in seen.urls if not url.startswith(served.base)] == []
    assert seen.errors == []
    assert "distbelief" in page.title()
    page.context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(browser, served, theme):
    context = browser.new_context(
        viewport={"width": 1440, "height": 900},
        color_scheme="dark" if theme == "dark" else "light",
        bypass_csp=True,  # axe is put into the page
    )
    page = context.new_page()
    page.goto(served.url)
    wait_until_live(page)
    found = Axe().run(page).response["violations"]
    assert [(one["id"], [node["target"] for node in one["nodes"]]) for one in found] == []
    context.close()


def test_the_straggler_is_named_and_its_row_is_hot(browser, served):
    page, _ = open_page(browser, served, at="#window=5m")
    findings = page.evaluate("() => window.distbelief.run.tick.findings")
    assert (findings[0]["who"], findings[0]["phase"]) == ("w17", "compute")
    hope(page.locator("#sentence")).to_contain_text("w17")
    hope(page.locator("#rank-body")).to_contain_text("w17")
    # In the newest columns some row is far darker than most: light ramps darken towards worse.
    page.wait_for_selector('#heat-canvas[data-rows="64"]')
    page.wait_for_timeout(1000)
    darkest, usual = page.evaluate(
        """() => {
          const canvas = document.getElementById("heat-canvas");
          const { width, height } = canvas;
          const g = canvas.getContext("2d");
          const tall = Math.floor(height * 0.7);
          const [x, y] = [Math.floor(width * 0.95), Math.floor(height * 0.15)];
          const { data } = g.getImageData(x, y, 1, tall);
          const sums = [];
          for (let i = 0; i < data.length; i += 4) {
            if (data[i + 3]) sums.push(data[i] + data[i + 1] + data[i + 2]);
          }
          sums.sort((a, b) => a - b);
          return [sums[0], sums[Math.floor(sums.length / 2)]];
        }"""
    )
    assert darkest < usual - 150
    page.context.close()


def test_by_keyboard_alone(browser, served):
    page, _ = open_page(browser, served)
    page.keyboard.press("1")
    page.wait_for_function("() => location.hash.includes('window=5m')")
    page.keyboard.press("g")
    page.keyboard.press("w")
    page.wait_for_function("() => location.hash.includes('order=worst')")
    page.keyboard.press("?")
    hope(page.locator("#help-dialog")).to_contain_text("Fair share")
    page.keyboard.press("Escape")
    hope(page.locator("#help-dialog")).not_to_be_visible()
    page.keyboard.press("e")
    hope(page.locator("#events-dialog")).to_contain_text("w42")
    page.keyboard.press("Escape")
    page.context.close()


def test_a_link_shows_the_same_view(browser, served):
    page, _ = open_page(browser, served, at="#window=5m&unit=updates&worker=w3")
    hope(page.locator("#drawer-name")).to_contain_text("w3")
    assert page.evaluate("() => window.distbelief.state.window") == "5m"
    page.context.close()


def test_a_name_is_text_and_nothing_else(browser, served):
    """What workers say reaches the page as text, whatever it is."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    seen = Seen(page)
    evil = '<img src=x onerror="window.hit=1"><b>w</b>'

    def poison(route):
        answer = route.fetch()
        data = answer.json()
        for item in data["items"]:
            item.update(who=evil, node=evil, text=evil)
        route.fulfill(response=answer, json=data)

    page.route("**/api/v1/events*", poison)
    page.goto(served.url)
    wait_until_live(page)
    hope(page.locator("#recent")).to_contain_text("<img")
    assert page.evaluate("() => window.hit") is None
    assert page.locator("#recent img").count() == 0
    assert seen.errors == []
    context.close()


def test_where_there_is_no_shared_worker_it_asks(browser, served):
    context = browser.new_context()
    context.add_init_script("delete window.SharedWorker")
    page = context.new_page()
    page.goto(served.url)
    wait_until_live(page)
    before = page.evaluate("() => window.distbelief.seq")
    page.wait_for_function(f"() => window.distbelief.seq > {before}", polling=200, timeout=20_000)
    context.close()


def test_it_is_one_column_on_a_telephone(browser, served):
    page, _ = open_page(browser, served, width=390)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    page.context.close()
