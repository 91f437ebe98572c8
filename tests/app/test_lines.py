"""A run in lines: key=value for logs, JSON for programs. Golden: others parse them."""

import io
import json
import time

import msgspec
import pytest

from distbelief.controller.pace import Progress
from distbelief.live import PLAIN_EVERY_S, LiveLine, in_ci
from distbelief.param_server.staleness import Staleness
from distbelief.plain import event_line, tick_line
from distbelief.record import (
    EventRecord,
    FindingRecord,
    Findings,
    Tick,
    event_of,
    finding_of,
    line,
    tick_of,
)
from distbelief.sight import Happened, Sight, kpi_of_progress, kpi_of_status
from tests.helpers.folders import make_run, write_status
from tests.helpers.records import check_record
from tests.helpers.scenes import watched


@pytest.fixture(autouse=True)
def _in_greenwich(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def progress(**more) -> Progress:
    staleness = Staleness()
    for value in (0, 1, 1, 4):
        staleness.add(value)
    given = {
        "samples": 500,
        "total_samples": 2000,
        "updates": 40,
        "loss": 1.23456,
        "samples_per_s": 123.4,
        "staleness": staleness,
        "eta_s": 75.0,
        "num_workers": 2,
        "refused": 0,
        **more,
    }
    return Progress(**given)


def known(**more) -> Sight:
    return Sight(run="r", state="training", kpi=kpi_of_progress(progress(**more)), t=42120.0)


def test_a_plain_line_of_the_controller_tells_everything():
    assert tick_line(known()) == (
        "11:42:00 update=40 samples=500/2000 share=25.0% loss=1.235 samples_s=123 "
        "p50=1 p95=4 max=4 alive=2 eta=1m15s"
    )


def test_a_plain_line_of_the_monitor_names_the_worst_and_the_target():
    sight = watched()
    stale = sight.kpi.staleness
    assert tick_line(sight) == (
        f"08:03:59 update={sight.kpi.progress.updates} samples={sight.kpi.progress.samples} "
        f"share=8.1% loss={sight.kpi.loss:.4g} samples_s={sight.kpi.samples_per_s:.0f} "
        f"p50={stale.p50} p95={stale.p95} max={stale.max}(w3) alive=4/4 eta=45m01s"
    )


def test_what_is_not_known_yet_is_a_dash():
    nothing = known(total_samples=None, loss=None, eta_s=None, staleness=Staleness())
    assert tick_line(nothing) == (
        "11:42:00 update=40 samples=500 loss=- samples_s=123 p50=- p95=- max=- alive=2 eta=-"
    )


def test_refused_parts_hours_and_another_state_show():
    text = tick_line(msgspec.structs.replace(known(refused=3, eta_s=7265.0), state="saving"))
    assert text.startswith("11:42:00 state=saving update=40 ")
    assert text.endswith(" eta=2h01m refused=3")


def test_an_event_is_a_line_that_its_text_cannot_break():
    event = Happened(seq=3, at=42120.0, kind="crash", who="w1", text='lost: "x"\n\x1b[2J')
    assert event_line(event) == ('11:42:00 event=crash who=w1 text="lost: \\"x\\"��[2J"')
    assert event_line(Happened(seq=3, at=0.0, kind="state", who="", text="t")) == (
        '00:00:00 event=state text="t"'
    )


def shown(*steps, times=None) -> list[str]:
    """By a LiveLine that was not entered: everything at once."""
    out = io.StringIO()
    clock = iter(times or [100.0 * i for i in range(len(steps))])
    live = LiveLine(out, plain=True, clock=lambda: next(clock))
    for step in steps:
        live.update(step)
    return [text.partition(" ")[2] for text in out.getvalue().splitlines()]


def test_plain_lines_come_at_their_pace_and_not_before_the_first_samples():
    steps = [progress(samples=n) for n in (0, 1, 2, 3, 4)]
    assert PLAIN_EVERY_S == 30
    lines = shown(*steps, times=[0.0, 29.0, 30.0, 59.5])  # none is looked at before a sample
    assert [text.split()[1] for text in lines] == ["samples=1/2000", "samples=3/2000"]


def test_what_status_json_has_is_what_the_controller_knows(tmp_path):
    folder = make_run(tmp_path, "aa")
    write_status(folder)
    status = folder.status
    assert status is not None
    kpi = kpi_of_status(status)
    assert (kpi.loss, kpi.progress.samples, kpi.progress.total) == (0.5, 1000, 2874)
    assert (kpi.workers.alive, kpi.workers.target, kpi.staleness.max) == (2, None, 3)


@pytest.mark.parametrize(
    ("value", "is_ci"), [("1", True), ("true", True), ("", False), ("0", False), ("false", False)]
)
def test_in_ci_nobody_watches(monkeypatch, value, is_ci):
    monkeypatch.setenv("CI", value)
    assert in_ci() is is_ci


# JSON


def test_lines_of_json_have_the_fields_of_their_schema():
    sight = watched()
    tick = json.loads(line(tick_of(sight)))
    assert isinstance(check_record(tick), Tick)
    assert list(tick)[:3] == ["type", "v", "run"]
    assert tick["kpi"]["staleness"]["max"] == sight.kpi.staleness.max
    assert isinstance(check_record(json.loads(line(tick_of(known())))), Tick)
    event = json.loads(line(event_of("r", sight.events[-1])))
    assert isinstance(check_record(event), EventRecord)
    finding = json.loads(line(finding_of("r", sight.findings[0])))
    assert isinstance(check_record(finding), FindingRecord)
    assert finding["id"] == "slow:w3"


@pytest.mark.parametrize(
    "change", [{"v": 2}, {"type": "tock"}, {"extra": 1}, {"state": 3}, {"kpi": {"loss": "low"}}]
)
def test_the_check_of_the_schema_finds_what_is_wrong(change):
    tick = json.loads(line(tick_of(watched())))
    with pytest.raises((msgspec.ValidationError, AssertionError)):
        check_record({**tick, **change})


def test_a_finding_is_told_once_and_again_when_its_severity_changes():
    found = watched().findings
    findings = Findings()
    assert findings.new(found) == found
    assert findings.new(found) == []
    worse = [msgspec.structs.replace(found[0], severity="error"), *found[1:]]
    assert findings.new(worse) == worse[:1]
    findings.new([])
    assert findings.new(worse) == worse


def test_json_goes_to_one_stream_and_what_is_said_to_the_other():
    out, err = io.StringIO(), io.StringIO()
    live = LiveLine(err, plain=False, records=out, clock=iter([0.0, 0.2, 1.1]).__next__)
    live.update(progress())
    live.say("hello")
    live.update(progress(samples=501))
    ticks = [check_record(json.loads(text)) for text in out.getvalue().splitlines()]
    assert [tick.kpi.progress.samples for tick in ticks] == [500, 501]
    assert all(tick.unknown == "not asked yet" for tick in ticks)
    assert err.getvalue() == "hello\n"


def test_a_reader_that_takes_nothing_does_not_hold_the_run_up(monkeypatch):
    """A terminal that was stopped with Ctrl-S, or a pipe that is full."""
    import os
    import threading

    monkeypatch.setattr("distbelief.live.LEAVE_S", 0.2)
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    began = time.monotonic()
    with LiveLine(stream, plain=True) as live:
        for _ in range(100):
            live.say("x" * 10_000)  # ten times what a pipe holds
    assert time.monotonic() - began < 5
    thread = next(thread for thread in threading.enumerate() if thread.name == "live")
    os.set_blocking(reader, False)
    while thread.is_alive():  # let it go
        try:
            os.read(reader, 2**20)
        except BlockingIOError:
            thread.join(0.01)
    os.close(reader)
    stream.close()
