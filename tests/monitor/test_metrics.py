"""What Prometheus gets: right, in its format, and never more than a bounded number of series."""

from dataclasses import replace

import numpy as np
import pytest
from msgspec import structs
from prometheus_client import openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from distbelief.chronicle import Begin, Event, RunReport, WorkerState
from distbelief.monitor import metrics as module
from distbelief.monitor.metrics import (
    FAMILIES,
    REASONS,
    STAY_S,
    TRIP_S,
    UPDATES,
    WORST,
    Metrics,
    reason,
    stable,
)
from distbelief.monitor.simulate import Simulation
from distbelief.monitor.store import Store
from distbelief.monitor.tally import MANY, Tally
from distbelief.param_server.report import UNKNOWN, ShardReport, WorkerReport
from tests.helpers.metrics import START, full_run, samples

OPENMETRICS = "application/openmetrics-text; version=1.0.0,text/plain;version=0.0.4;q=0.5"


@pytest.fixture(scope="module")
def full():
    return full_run()


def first(kind, seconds=5.0):
    """A message of a simulated run."""
    return next(
        one for one in Simulation(2, 1, start=START).until(seconds) if isinstance(one, kind)
    )


def worker_report(name="w0", inc=1, n=1, **fields):
    return replace(first(WorkerReport, 3.0), name=name, inc=inc, n=n, **fields)


def shard_report(name="shard0", inc=1, n=1, **fields):
    return replace(first(ShardReport), name=name, inc=inc, n=n, **fields)


def run_report(**fields):
    return structs.replace(first(RunReport), **fields)


def step(seconds):
    """The columns of one step that lasted so long in each phase."""
    one = (seconds,)
    phases = {f"{phase}_s": one for phase in ("data", "fetch", "compute", "push", "step")}
    rest = {"samples": (1,), "loss": (1.0,), "has_loss": (True,), "staleness": (0,)}
    rest |= {"has_push": (True,), "version": (1,), "grad_norm": (UNKNOWN,), "end": (START + 5,)}
    none = {"trip_shard": (), "trip_is_push": (), "trip_s": ()}
    return phases | rest | none


# The format.


def test_prometheus_own_parsers_read_it(full):
    metrics, store, _ = full
    body, content_type = metrics.render(store)
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    families = list(read_text(body.decode()))
    body, content_type = metrics.render(store, OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    strict = list(read_openmetrics(body.decode()))
    assert [family.name for family in strict] == [
        family.name.removesuffix("_info") for family in families
    ]
    assert body.endswith(b"# EOF\n")


def test_each_metric_is_exported_as_it_is_documented(full):
    metrics, store, _ = full
    body, _ = metrics.render(store, OPENMETRICS)
    found = {}
    for family in read_openmetrics(body.decode()):
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, labels, family.documentation)
    assert found == {
        family.name: (family.kind, set(family.labels), family.text) for family in FAMILIES.values()
    }
    assert list(found) == list(FAMILIES)


def test_when_a_series_was_created_is_left_out_and_the_switch_of_the_process_is_as_it_was(full):
    metrics, store, _ = full
    from prometheus_client import metrics as theirs

    assert theirs._use_created
    assert b"_created" not in metrics.render(store)[0]
    assert b"_created" not in metrics.render(store, OPENMETRICS)[0]
    assert openmetrics.exposition.CONTENT_TYPE_LATEST.startswith("application/openmetrics-text")


# The numbers.


def test_numbers_are_those_of_the_run(full):
    metrics, store, _ = full
    got = samples(metrics, store)
    kpi = store.snapshot()["kpi"]
    assert got["distbelief_train_loss",] == kpi["loss"]
    assert got["distbelief_validation_loss",] == 0.5
    assert got["distbelief_fair_share_updates",] == 3.0
    assert got["distbelief_samples_total",] == kpi["progress"]["samples"]
    assert got["distbelief_workers", "ok"] == kpi["workers"]["by_status"]["ok"]
    assert sum(v for k, v in got.items() if k[0] == "distbelief_workers") == 4
    assert got["distbelief_checkpoint_last_success_timestamp_seconds",] == START + 60
    assert got["distbelief_checkpoint_interval_seconds",] == 60.0
    assert got["distbelief_worker_restarts_total", "killed"] == 1.0
    assert got["distbelief_events_total", "recover"] == 1.0
    assert got["distbelief_logger_errors_total", "tensorboard"] == 2.0
    assert got["distbelief_logger_dropped_total", "tensorboard"] == 7.0
    assert got["distbelief_monitor_dropped_records_total",] == 0.0
    assert got["distbelief_run_info", "downpour", "adagrad", "simulated", "simulated"] == 1.0
    for item in store.workers()["items"]:
        labels = (item["node"], item["id"])
        assert got["distbelief_worker_staleness_updates", *labels] == item["lag"]


def test_histograms_count_every_part_that_was_reported():
    simulation = Simulation(6, 2, start=START)
    metrics, store = Metrics(), Store()
    told: dict[int, int] = {}
    for message in simulation.until(40.0):
        store.take(message, message.at)
        metrics.take(message)
        if isinstance(message, ShardReport):
            for value, times in zip(message.stale_value, message.stale_count, strict=True):
                told[value] = told.get(value, 0) + times
    got = samples(metrics, store)
    assert got["distbelief_staleness_updates_count",] == sum(told.values())
    assert got["distbelief_staleness_updates_sum",] == sum(v * n for v, n in told.items())
    for bound in UPDATES:
        below = sum(n for value, n in told.items() if value <= bound)
        assert got["distbelief_staleness_updates_bucket", str(bound)] == below
    # Of six equal workers the fair share is five updates, so a ratio of 1 is 5 at most.
    assert got["distbelief_staleness_ratio_bucket", "1.0"] == sum(
        n for value, n in told.items() if value <= 5
    )


def test_phases_and_round_trips_are_of_the_worker_that_told_them():
    metrics, store = Metrics(), Store()
    metrics.take(first(Begin))
    store.take(first(Begin), START)
    told = step(0.25) | {"trip_shard": (0, 0, 0), "trip_is_push": (True, True, False)}
    report = worker_report(**(told | {"trip_s": (0.003, 0.2, 0.0004), "compute_s": (3.0,)}))
    store.take(report, START)
    store.advance(START)
    metrics.take(report)
    got = samples(metrics, store)
    assert got["distbelief_step_phase_seconds_sum", "compute"] == 3.0
    assert got["distbelief_step_phase_seconds_bucket", "0.25", "push"] == 1.0
    assert got["distbelief_worker_phase_seconds_total", report.host, "compute", "w0"] == 3.0
    assert got["distbelief_worker_phase_seconds_total", report.host, "data", "w0"] == 0.25
    assert got["distbelief_worker_last_push_timestamp_seconds", report.host, "w0"] == START + 5
    assert got["distbelief_push_duration_seconds_count", "shard0"] == 2.0
    assert got["distbelief_fetch_duration_seconds_sum", "shard0"] == 0.0004
    assert ("distbelief_gradient_norm_count",) not in got  # it was not measured


def test_what_waits_to_be_counted_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "OPEN_MAX", 10)
    metrics = Metrics()
    for n in range(100):
        metrics.take(worker_report(n=n + 1, **step(0.5)))
    assert len(metrics._steps[0]) <= 11
    assert samples(metrics, Store())["distbelief_step_phase_seconds_count", "push"] == 100


# Restarts and losses.


def test_a_worker_that_starts_again_adds_to_what_it_had_spent():
    metrics, store = Metrics(), Store()
    for report in (
        worker_report(inc=1, n=1, **step(2.0)),
        worker_report(inc=1, n=2, **step(3.0)),
        worker_report(inc=2, n=1, **step(0.5)),
    ):
        store.take(report, START)
        metrics.take(report)
    got = samples(metrics, store)
    assert got["distbelief_worker_phase_seconds_total", report.host, "push", "w0"] == 5.5
    assert got["distbelief_monitor_dropped_records_total",] == 0.0


def test_a_shard_that_goes_on_from_a_snapshot_never_counts_back():
    metrics, seen = Metrics(), []
    for inc, n, updates in ((1, 1, 100), (1, 2, 200), (2, 1, 150), (2, 2, 190), (2, 3, 260)):
        metrics.take(shard_report(inc=inc, n=n, updates=updates, version=updates))
        got = samples(metrics, Store())
        seen.append(got["distbelief_updates_total", "shard0"])
        assert got["distbelief_shard_version", "shard0"] == updates
    assert seen == [100, 200, 200, 200, 260]


def test_totals_are_right_again_after_reports_were_lost_and_those_are_counted():
    metrics = Metrics()
    metrics.take(shard_report(n=5, updates=100))  # what was before the monitor is no loss
    metrics.take(shard_report(n=9, updates=180))
    metrics.take(shard_report(inc=2, n=3, updates=181))
    metrics.take(run_report(samples=640, dropped=4))
    got = samples(metrics, Store())
    assert got["distbelief_updates_total", "shard0"] == 181
    assert got["distbelief_samples_total",] == 640
    assert got["distbelief_monitor_dropped_records_total",] == 3 + 2 + 4


def test_an_old_report_and_one_that_comes_twice_count_nothing():
    metrics = Metrics()
    metrics.take(worker_report(inc=2, n=4, **step(1.0)))
    for inc, n in ((2, 4), (2, 3), (1, 9)):
        metrics.take(worker_report(inc=inc, n=n, **step(1.0)))
    got = samples(metrics, Store())
    assert got["distbelief_step_phase_seconds_count", "push"] == 1.0
    assert got["distbelief_monitor_dropped_records_total",] == 0.0


def test_losses_of_a_worker_are_counted_by_its_total_whichever_events_came():
    metrics = Metrics()

    def told(restarts):
        metrics.take(run_report(workers=[WorkerState(name="w1", restarts=restarts)]))
        got = samples(metrics, Store())
        return {word: got["distbelief_worker_restarts_total", word] for word in REASONS}

    crash = Event(at=START, kind="crash", who="w1", text="w1 is lost: killed by signal 9")
    assert told(0) == dict.fromkeys(REASONS, 0.0)
    metrics.take(crash)
    assert told(1) == dict.fromkeys(REASONS, 0.0) | {"killed": 1.0}
    assert told(1) == dict.fromkeys(REASONS, 0.0) | {"killed": 1.0}
    metrics.take(structs.replace(crash, text="w1 is lost: its pushes were refused"))
    # Two more, and only one of them was told of.
    assert told(3) == dict.fromkeys(REASONS, 0.0) | {
        "killed": 1.0,
        "quarantined": 1.0,
        "other": 1.0,
    }


@pytest.mark.parametrize(
    ("text", "detail", "word"),
    [
        ("w1 is lost: killed by signal 9", {}, "killed"),
        ("w1 is lost: it ended without a word", {}, "ended"),
        ("w1 is lost: it ended with exit code 1", {}, "ended"),
        ("w1 is lost: it has said nothing for 30 s", {}, "frozen"),
        ("w1 at 10.0.0.7:5702 <img>", {}, "other"),
        ("w1 is lost: killed by signal 9", {"reason": "frozen"}, "frozen"),
        ("w1 is lost", {"reason": "10.0.0.7:5702"}, "other"),
    ],
)
def test_reasons_are_words_of_a_closed_list(text, detail, word):
    event = Event(at=START, kind="crash", who="w1", text=text, detail=detail)
    assert reason(event) == word


# What is not known.


def test_before_anything_was_heard_there_is_next_to_nothing():
    got = samples(Metrics(), Store())
    assert got == {
        ("distbelief_run_state", "waiting"): 1.0,
        ("distbelief_monitor_dropped_records_total",): 0.0,
    }


def test_nothing_is_saved_before_each_shard_is():
    metrics = Metrics()
    metrics.take(structs.replace(first(Begin), num_shards=2))
    key = ("distbelief_checkpoint_last_success_timestamp_seconds",)
    metrics.take(shard_report(saved_at=START + 50, save_s=0.5))
    assert key not in samples(metrics, Store())
    metrics.take(shard_report(name="shard1", saved_at=0.0))
    assert key not in samples(metrics, Store())
    metrics.take(shard_report(name="shard1", n=2, saved_at=START + 40, save_s=0.25))
    assert samples(metrics, Store())[key] == START + 40
    metrics.take(shard_report(name="shard1", n=3, saved_at=START + 40, save_s=0.25))
    assert samples(metrics, Store())["distbelief_checkpoint_duration_seconds_count",] == 2


# Cardinality.


def workers_of(got):
    return {key[-1] for key in got if key[0] == "distbelief_worker_staleness_updates"}


def test_each_worker_has_series_up_to_a_number_and_above_it_the_worst():
    metrics, store, _ = full_run(30, 7, per_worker=30)
    assert len(workers_of(samples(metrics, store))) == 30
    metrics, store, _ = full_run(31, 7, per_worker=30)
    worst = {item["id"] for item in store.workers(sort="-ratio", limit=WORST)["items"]}
    got = samples(metrics, store)
    assert workers_of(got) == worst
    for name in ("last_push_timestamp_seconds", "phase_seconds_total"):
        keys = {key[-1] for key in got if key[0] == f"distbelief_worker_{name}"}
        assert keys == worst
    # A second look at another moment has the same ones.
    for message in Simulation(31, 2, start=START).until(1.0):
        store.take(message, START + 8)
    store.advance(START + 8)
    assert workers_of(samples(metrics, store)) == worst


def test_who_is_among_the_worst_stays_for_minutes():
    names = [f"w{i}" for i in range(100)]
    chosen = stable({}, names[:WORST], 0.0)
    assert list(chosen) == names[:WORST]
    others = names[50 : 50 + WORST]
    assert stable(chosen, others, STAY_S - 1) == chosen
    later = stable(chosen, others, STAY_S)
    assert set(later) == set(others)
    # One that still is among them keeps its place, and there are never more.
    mixed = stable(chosen, [names[3], *others], STAY_S)
    assert mixed[names[3]] == 0.0
    assert len(mixed) == WORST


def test_workers_that_have_left_have_no_series():
    metrics, store = Metrics(), Store()
    for message in (
        worker_report("w0", **step(1.0)),
        worker_report("w1", **step(1.0)),
        run_report(workers=[WorkerState(name="w0", inc=1, state="left")]),
    ):
        store.take(message, START + 1)
        metrics.take(message)
    store.advance(START + 2)
    got = samples(metrics, store)
    assert got["distbelief_workers", "left"] == 1.0
    assert {key[-1] for key in got if key[0].startswith("distbelief_worker_last")} == {"w1"}


def test_whatever_names_and_numbers_are_told_series_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "WORKERS_MAX", 20)
    monkeypatch.setattr(module, "SHARDS_MAX", 3)
    metrics, store = Metrics(), Store()
    for i in range(50):
        trips = {"trip_shard": (i, 2**52), "trip_is_push": (True, False), "trip_s": (0.1, 0.1)}
        metrics.take(worker_report(f"w{i}", **(step(1.0) | trips)))
        metrics.take(shard_report(f"shard{i}"))
        metrics.take(run_report(workers=[WorkerState(name=f"w{i}", restarts=1)]))
        metrics.take(Event(at=START, kind="crash", who=f"x{i}", text="x"))
    got = samples(metrics, store)
    assert len(metrics._rows) <= 20
    assert len(metrics._lost_of) <= 20
    assert len(metrics._restarts) <= 20
    assert len([key for key in got if key[0] == "distbelief_updates_total"]) == 3
    assert len([key for key in got if key[0] == "distbelief_push_duration_seconds_count"]) <= 3


def test_no_text_of_an_event_and_no_address_is_exported():
    metrics, store = Metrics(), Store()
    begin = first(Begin)
    for message in (
        begin,
        worker_report(**step(1.0), pid=424242),
        Event(at=START, kind="crash", who="w0", text='10.0.0.7:5702 "said"\nthis'),
        Event(at=START, kind="nonsense", who="w0", text="x"),
        run_report(workers=[WorkerState(name="w0", restarts=1, pid=424242, host="h:5702")]),
    ):
        store.take(message, START)
        metrics.take(message)
    store.advance(START + 1)
    text = metrics.render(store)[0].decode()
    assert "5702" not in text
    assert "424242" not in text
    assert "nonsense" not in text


# Tally.


def test_a_value_is_in_the_first_bucket_that_it_does_not_pass():
    tally = Tally((0.0, 1.0, 2.0))
    for value in (0.0, 0.5, 1.0, 1.5, 7.0, -1.0):
        tally.add(value)
    tally.add(2.0, 10)
    tally.add(1.0, 0)
    assert tally.buckets() == [("0.0", 1.0), ("1.0", 3.0), ("2.0", 14.0), ("+Inf", 15.0)]
    assert tally.sum == 0.5 + 1.0 + 1.5 + 7.0 + 20.0
    assert len(tally) == 15


@pytest.mark.parametrize("num", [0, 1, MANY - 1, MANY, 1000])
def test_many_values_count_as_each_of_them(num):
    values = np.random.default_rng(num).lognormal(-3.0, 3.0, num)
    values[::7] = -1.0
    values[1::9] = TRIP_S[3]
    one, all_ = Tally(TRIP_S), Tally(TRIP_S)
    for value in values.tolist():
        one.add(value)
    all_.add_all(values)
    assert all_.buckets() == one.buckets()
    assert all_.sum == pytest.approx(one.sum)
