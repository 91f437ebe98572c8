"""The panel: what is in it, what goes where there is no room, and no colour stands alone."""

import io
import re

import msgspec
import pytest
from rich.console import Console

from distbelief.panel import MARKS, PHASES, clean, duration, legend, panel, phases, short, sparkline
from distbelief.sight import Kpi, Page, Sight
from tests.helpers.scenes import URL, watched

ESCAPE = re.compile(r"\x1b\[[0-9;]*m|\x1b\]8;[^\x1b]*\x1b\\")


def changed(**more) -> Sight:
    made: Sight = msgspec.structs.replace(watched(), **more)
    return made


def drawn(sight=None, width=100, height=40, **how) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, **how)
    console.print(panel(sight or watched(), width, height, keys="q quit"))
    return out.getvalue()


def test_the_panel_has_what_the_monitor_sees():
    sight = watched()
    text = drawn()
    stale = sight.kpi.staleness
    assert f"staleness p50 {stale.p50} " in text
    assert f"fair share {stale.fair:.4g}" in text
    assert f"{sight.kpi.samples_per_s:,.0f} samples/s" in text
    assert "workers 4/4" in text
    assert "shards 2/2" in text
    assert f"● training  {sight.run}  simulated   dashboard {URL}" in text
    assert "239 / 2,940 seconds  8.1%" in text
    assert "▲ w3 is " in text
    assert sight.page is not None
    for worker in sight.page.items:
        mark, _ = MARKS[worker.status]
        assert re.search(rf"{mark} {worker.id} +node-0 +{worker.lag:.0f} ", text), worker
    assert "≈ median" in text
    assert "q quit" in text


@pytest.mark.parametrize(
    ("width", "there", "gone"),
    [
        (100, ["15 min", "▒fetch", "node-0"], []),
        (80, ["▒fetch", "node-0"], ["15 min"]),
        (66, ["node-0", "median"], ["15 min", "▒fetch"]),
        (44, ["median", "behind"], ["15 min", "▒fetch", "node-0"]),
    ],
)
def test_where_it_is_narrow_history_goes_then_phases_then_the_node(width, there, gone):
    lines = drawn(width=width).splitlines()
    assert {len(line) for line in lines} == {width}
    table = "\n".join(line for line in lines if "finding" not in line)
    for word in there:
        assert word in table, word
    for word in gone:
        assert word not in table.replace("see node-0", ""), word


@pytest.mark.parametrize("height", [8, 12, 16, 20, 24, 40])
def test_it_fits_where_the_terminal_is_low(height):
    assert len(drawn(height=height).splitlines()) <= height


def test_no_width_and_no_missing_value_breaks_it():
    empty = Sight(run="r", state="starting", kpi=Kpi(), t=0.0)
    for width in range(8, 130, 7):
        drawn(width=width)
        assert "staleness" in drawn(empty, width=width + 30)


def test_what_nobody_knows_is_a_dash_and_is_said():
    text = drawn(
        Sight(run="r", state="training", kpi=Kpi(), t=0.0, unknown="no monitor watches this run")
    )
    assert "p50 -" in text
    assert "loss -" in text
    assert "not known: single workers, phases, findings: no monitor watches this run" in text
    assert "heard nothing" not in text
    assert "the monitor has heard nothing for 1m 05s" in drawn(changed(age_s=65.0))


def test_marks_and_shades_differ_without_colours():
    assert len({mark for mark, _ in MARKS.values()}) == len(MARKS)
    assert len({shade for _, shade, _ in PHASES}) == len(PHASES)
    colored = drawn(force_terminal=True, color_system="truecolor")
    assert "\x1b[" in colored
    assert ESCAPE.sub("", colored) == drawn()


def test_without_colours_there_are_none():
    text = drawn(force_terminal=True, no_color=True)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", text)


def test_a_bar_shows_shares_of_the_step():
    text = phases({"compute": 0.5, "fetch": 0.25, "push": 0.125, "data": 0.0}, 1.0).plain
    assert text == "█" * 12 + "▒" * 6 + "░" * 3
    assert phases({}, None).plain == ""
    assert len(legend().plain) == 24


def test_a_sparkline_is_the_worst_of_each_minute_in_log2():
    line = sparkline([None] * 4 + [0.5] * 4 + [1.0, 1.0, 1.0, 2.0] + [8.0] * 4 + [100.0] * 44)
    assert line.plain == " ▁▅█" + "█" * 11


def test_text_of_others_can_order_nothing():
    assert clean("a\x1b[2Jb\r\n\x07") == "a�[2Jb���"
    page = watched().page
    assert page is not None
    odd = msgspec.structs.replace(page.items[0], id="[red]\x1b]0;x")
    text = drawn(changed(page=Page(total=1, items=[odd], median=page.median), name="\x1b[31m"))
    assert "\x1b" not in text
    assert "[red]" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.5, "1.5"), (9999, "9,999"), (65800, "65.8 k"), (2.5e6, "2.5 M"), (None, "-")],
)
def test_numbers_are_short(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5s"), (75.9, "1m 15s"), (5220, "1h 27m"), (None, "-")]
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text
