"""A worker's diary: its steps as a report tells them."""

import math

import pytest

from distbelief.param_server.report import STEPS_MAX, UNKNOWN
from distbelief.param_server.reporter import Head
from distbelief.param_server.traffic import Traffic, Trip
from distbelief.param_server.wire import encode
from distbelief.workers.diary import Diary
from distbelief.workers.exchange import Exchange
from distbelief.workers.meter import Measurement
from distbelief.workers.staging import Known

BRIEF = Exchange(0.1)
WALL = 1.8e9
HEAD = Head(
    run="job", token="t", name="w0", inc=1, n=1, at=1.8e9, span_s=1.0, pid=7, host="h", rss_bytes=1
)


def step(diary: Diary, now: float, *, exchange: Exchange = BRIEF, **more) -> None:
    told = {"samples": 32, "staleness": 3, "version": 9, **more}
    diary.end(now, WALL + now, exchange, **told)


def test_the_phases_are_parts_of_the_step():
    diary, traffic = Diary(), Traffic()
    diary.begin(0.0)
    diary.wait_for_data(0.2)
    diary.compute(0.6)
    step(diary, 1.0, exchange=Exchange(0.1, fetch_s=0.03), loss=Known(1.5))
    report = diary.report(HEAD, 1.25, traffic)
    assert (report.data_s, report.compute_s) == ((0.2,), (0.6,))
    assert report.fetch_s == (0.03,)
    assert report.push_s == pytest.approx((0.07,))
    assert (report.step_s, report.end) == ((1.0,), (1.8e9 + 1.0,))
    assert (report.loss, report.has_loss) == ((1.5,), (True,))
    assert (report.staleness, report.has_push, report.version) == ((3,), (True,), (9,))
    assert report.grad_norm == (UNKNOWN,)
    assert (report.num_steps, report.num_samples, report.busy_s) == (1, 32, 0.25)


def test_of_a_script_compute_is_what_the_waits_leave():
    diary, traffic = Diary(), Traffic()
    diary.begin(0.0)
    diary.wait_for_data(0.25)
    step(diary, 1.0, exchange=Exchange(0.25))
    report = diary.report(HEAD, 1.0, traffic)
    assert report.compute_s == (0.5,)
    assert report.has_loss == (False,)


def test_what_a_device_still_computed_is_no_push():
    """Backward returns at once there: the push is what waits for the device."""
    diary = Diary(device="cuda")
    diary.begin(0.0)
    diary.compute(0.1)
    step(diary, 1.0, exchange=Exchange(0.75, fetch_s=0.125, device_s=0.5))
    report = diary.report(HEAD, 1.0, Traffic())
    assert (report.compute_s, report.fetch_s, report.push_s) == ((0.6,), (0.125,), (0.125,))
    assert sum(p[0] for p in (report.compute_s, report.fetch_s, report.push_s)) <= report.step_s[0]


class Later:
    """A number that a device has not computed yet."""

    is_there = False

    @property
    def value(self) -> float:
        assert self.is_there, "somebody waits for it"
        return 2.0


def test_a_step_is_told_once_its_numbers_are_there_and_nobody_waits():
    diary, traffic, loss, norm = Diary(), Traffic(), Later(), Later()
    diary.begin(0.0)
    step(diary, 1.0, loss=Known(3.0))
    step(diary, 2.0, loss=loss, grad_norm=norm)
    step(diary, 3.0, loss=Known(1.0))
    first = diary.report(HEAD, 3.0, traffic)
    assert (first.loss, first.num_steps) == ((3.0,), 3)
    loss.is_there = True
    assert diary.report(HEAD, 3.0, traffic).loss == ()  # its norm is not there
    norm.is_there = True
    then = diary.report(HEAD, 3.0, traffic)
    assert (then.loss, then.grad_norm, then.end) == (
        (2.0, 1.0),
        (2.0, UNKNOWN),
        (WALL + 2, WALL + 3),
    )
    assert diary.report(HEAD, 3.0, traffic).end == ()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_known(value):
    diary = Diary()
    step(diary, 1.0, loss=Known(value), grad_norm=Known(value))
    report = diary.report(HEAD, 3.0, Traffic())
    assert (report.loss, report.has_loss, report.grad_norm) == ((0.0,), (False,), (UNKNOWN,))
    encode(report)  # the wire has finite numbers alone


def test_numbers_that_never_come_fill_no_memory():
    diary, never = Diary(), Later()
    for i in range(3 * STEPS_MAX):
        step(diary, float(i), loss=never)
    assert diary.report(HEAD, 0.0, Traffic()).loss == ()
    never.is_there = True
    assert len(diary.report(HEAD, 0.0, Traffic()).loss) == STEPS_MAX


def test_only_the_newest_steps_and_trips_are_kept():
    diary, traffic = Diary(), Traffic()
    for i in range(STEPS_MAX + 50):
        step(diary, float(i), loss=Known(float(i)))
        for shard in range(4):
            traffic.trips.append(Trip(shard, True, 0.001))
    report = diary.report(HEAD, 0.0, traffic)
    assert len(report.loss) == STEPS_MAX
    assert report.loss[-1] == STEPS_MAX + 49
    assert len(report.trip_s) == traffic.trips.maxlen


def test_counts_are_of_the_span():
    diary, traffic = Diary(), Traffic()
    traffic.sent_bytes, traffic.received_bytes, traffic.retries = 100, 50, 1
    first = diary.report(HEAD, 0.0, traffic)
    traffic.sent_bytes += 7
    second = diary.report(HEAD, 0.0, traffic)
    assert (first.sent_bytes, first.received_bytes, first.retries) == (100, 50, 1)
    assert (second.sent_bytes, second.received_bytes, second.retries) == (7, 0, 0)


def test_where_there_was_no_work_was_no_step():
    diary, traffic = Diary(), Traffic()
    diary.begin(0.0)
    step(diary, 1.0)
    diary.wait_for_data(50.0)
    diary.skip(60.0)
    step(diary, 61.0)
    report = diary.report(HEAD, 61.0, traffic)
    assert report.step_s == (1.0, 1.0)
    assert report.data_s == (0.0, 0.0)


def test_what_the_meter_has_seen_is_told_once():
    diary, traffic = Diary(), Traffic()
    diary.measure(Measurement(4, 0.9, -0.1, 0.95))
    diary.measure(Measurement(4, math.nan, -0.1, 0.95))
    report = diary.report(HEAD, 0.0, traffic)
    assert (report.meter_staleness, report.meter_cosine) == ((4,), (0.9,))
    assert diary.report(HEAD, 0.0, traffic).meter_rate == ()
