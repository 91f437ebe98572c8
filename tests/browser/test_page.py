"""The dashboard in a real browser, fed by a simulated run through the real server."""

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page
from playwright.sync_api import expect as hope

from tests.browser.conftest import Seen, Served

LOADED = "() => window.distbelief && window.distbelief.loads > 0"
LIVE = "() => window.distbelief && window.distbelief.seq > 0 && window.distbelief.loads > 0"


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
    page.wait_for_function(LIVE, timeout=20_000)
    return page, seen


def test_numbers_on_the_page_are_those_of_the_api(browser, served):
    page, _ = open_page(browser, served)
    # From one and the same tick: it is kept beside what was shown of it.
    page.evaluate("() => window.distbelief.app.pause()")
    page.wait_for_timeout(200)
    kpi = page.evaluate("() => window.distbelief.app.tick.kpi")
    for name in ("p50", "p95", "max"):
        shown = page.locator(f'[data-key="kpi.staleness.{name}"]').inner_text()
        assert shown.replace(",", "") == str(round(kpi["staleness"][name]))
    assert page.locator('[data-key="kpi.workers.alive"]').inner_text() == str(
        kpi["workers"]["alive"]
    )
    assert page.locator('[data-key="kpi.loss"]').inner_text() == f"{kpi['loss']:.3f}"
    told = page.evaluate("() => fetch('api/v1/workers?sort=-ratio&limit=1').then((r) => r.json())")
    first = told["items"][0]["id"]
    hope(page.locator("#ranking tr").first).to_contain_text(first)
    page.context.close()


def test_it_asks_nobody_else_and_complains_of_nothing(browser, served):
    page, seen = open_page(browser, served)
    page.wait_for_timeout(2500)
    assert [url for url in seen.urls if not url.startswith(served.base)] == []
    assert seen.errors == []
    assert page.evaluate("() => window.distbelief.errors") == []
    assert page.title().endswith("· distbelief")
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
    page.wait_for_function(LIVE, timeout=20_000)
    found = Axe().run(page).response["violations"]
    assert [(one["id"], [node["target"] for node in one["nodes"]]) for one in found] == []
    context.close()


def test_the_straggler_is_named_and_its_row_is_hot(browser, served):
    page, _ = open_page(browser, served)
    findings = page.evaluate("() => window.distbelief.app.tick.findings")
    assert findings[0]["who"] == "w17"
    assert findings[0]["phase"] == "compute"
    hope(page.locator("#finding")).to_contain_text("w17")
    worst, median = page.evaluate(
        """() => {
          const { info, codes } = window.distbelief.app.heatmap.found;
          const last = (row) => {
            for (let col = info.cols - 1; col >= 0; col--) {
              if (codes[row * info.cols + col] > 1) return codes[row * info.cols + col];
            }
            return 0;
          };
          const all = info.ids.map((_, row) => last(row)).sort((a, b) => a - b);
          return [last(info.ids.indexOf("w17")), all[Math.floor(all.length / 2)]];
        }"""
    )
    assert worst > median + 60  # more than two octaves of 8 in 254 steps
    # And so it is painted: light ramps darken towards worse.
    dark, light = page.evaluate(
        """() => {
          const heat = window.distbelief.app.heatmap;
          const g = heat.canvas.getContext("2d");
          const scale = window.devicePixelRatio;
          const bright = (row) => {
            const y = heat.yOf(row) + heat.layout.each / 2;
            const [r, gr, b] = g.getImageData((heat.width - 30) * scale, y * scale, 1, 1).data;
            return r + gr + b;
          };
          return [bright(heat.found.info.ids.indexOf("w17")), bright(0)];
        }"""
    )
    assert dark < light - 150
    page.context.close()


def test_by_keyboard_alone(browser, served):
    page, _ = open_page(browser, served)
    page.keyboard.press("1")
    page.wait_for_function("() => location.hash.includes('w=5m')")
    page.keyboard.press("g")
    page.keyboard.press("w")
    page.wait_for_function("() => location.hash.includes('o=worst')")
    page.locator("#heat").focus()
    page.keyboard.press("ArrowDown")
    hope(page.locator("#hover")).to_be_visible()
    page.keyboard.press("Enter")
    hope(page.locator("#drawer")).to_be_visible()
    hope(page.locator("#drawer dl").first).to_contain_text("Behind")
    page.keyboard.press("Escape")
    hope(page.locator("#drawer")).not_to_be_visible()
    page.keyboard.press("?")
    hope(page.locator("#help")).to_contain_text("Fair share")
    page.keyboard.press("Escape")
    page.keyboard.press("e")
    hope(page.locator("#events")).to_contain_text("w42")
    page.context.close()


def test_a_link_shows_the_same_view(browser, served):
    page, _ = open_page(browser, served, at="#w=5m&u=updates&id=w3")
    hope(page.locator("#drawer-title")).to_have_text("w3")
    chosen = page.locator('#windows [aria-checked="true"]')
    assert chosen.inner_text() == "5m"
    page.context.close()


def test_a_name_is_text_and_nothing_else(browser, served):
    """What workers say reaches the page as text, whatever it is."""
    page, seen = open_page(browser, served)
    page.evaluate(
        """() => {
          const app = window.distbelief.app;
          const evil = '<img src=x onerror="window.hit=1"><b>w</b>';
          app.hear("event", { at: app.t, kind: "crash", who: evil, node: evil, text: evil });
          app.diagnosis.show([{ id: "x", severity: "warn", who: evil, scope: "worker",
            text: evil, short: evil, since: app.t }], app.meta);
        }"""
    )
    page.wait_for_timeout(300)
    assert page.evaluate("() => window.hit") is None
    assert page.locator("#recent img, #diagnosis img").count() == 0
    assert "<img" in page.locator("#recent").inner_text()
    assert seen.errors == []
    page.context.close()


@pytest.mark.long
def test_nine_tabs_are_all_live(browser, served):
    """A browser gives a host six connections: one stream serves all of them."""
    context = browser.new_context()
    pages = [context.new_page() for _ in range(9)]
    for page in pages:
        page.goto(served.url)
    for page in pages:
        page.wait_for_function(
            LIVE, polling=200, timeout=30_000
        )  # a tab behind others draws nothing
    context.close()


def test_where_there_is_no_shared_worker_it_asks(browser, served):
    context = browser.new_context()
    context.add_init_script("delete window.SharedWorker")
    page = context.new_page()
    page.goto(served.url)
    page.wait_for_function(LIVE, polling=200, timeout=30_000)  # a tab behind others draws nothing
    before = page.evaluate("() => window.distbelief.seq")
    page.wait_for_function(f"() => window.distbelief.seq > {before}", timeout=20_000)
    context.close()


def test_it_is_one_column_on_a_telephone(browser, served):
    page, _ = open_page(browser, served, width=390)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    page.context.close()
