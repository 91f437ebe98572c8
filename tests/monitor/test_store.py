import json
from dataclasses import replace

import numpy as np
import pytest

from distbelief.chronicle import Begin, Event, RunReport, WorkerState
from distbelief.monitor.simulate import START_AT, Fault, Simulation, straggler
from distbelief.monitor.source import STATUSES, Source
from distbelief.monitor.store import SERIES, Store
from distbelief.param_server.report import ShardReport, WorkerReport


def play(store, until, **more):
    simulation = Simulation(**more)
    second = 0
    for message in simulation.until(until):
        while message.at >= START_AT + second + 1:
            second += 1
            store.advance(START_AT + second)
        store.take(message, message.at)
    store.advance(START_AT + until)
    return simulation


@pytest.fixture(scope="module")
def store():
    store = Store()
    faults = [straggler("w1", 6.0, 20), Fault(kind="crash", who="w2", start=40)]
    play(store, 90, num_workers=6, num_shards=2, faults=faults, per_node=3, meter=0.2)
    return store


def everything(source: Source):
    now = source.meta()["t"]
    return {
        "meta": source.meta(),
        "snapshot": source.snapshot(),
        "workers": source.workers(),
        "series": source.series(list(SERIES), now - 100, now),
        "distribution": source.distribution(),
        "updates": source.updates(),
        "meter": source.meter(),
        "shards": source.shards(),
        "events": source.events(),
        "findings": source.findings(),
        "tick": source.tick(),
    }


KEYS = {
    "meta": "run name attempt state live started ended exit version api engine algo n_fetch n_push "
    "fetch_policy optimizer lr batch_size model data parameters target nodes worker_order shards "
    "actions grad_norm meter finished run_path result",
    "snapshot": "age_s kpi findings shards checks waiting",
    "workers": "total next items median",
    "series": "from to bin_s at " + " ".join(SERIES),
    "distribution": "edges count p50 p95 p99 fair n",
    "updates": "worker lag grad_norm at spearman median off",
    "meter": "off share n staleness cosine gap rate bins verdict text",
    "shards": "items",
    "events": "total items",
    "findings": "items",
    "tick": "age_s state kpi findings order w sh ev",
}
WORKER = (
    "id node host pid inc status since lag ratio age_s seconds step_s phases_s share_of_updates "
    "pushes samples samples_per_s restarts skew loss spark blame excess"
)
SHARD = (
    "id node host pid inc status updates_per_s share queue busy_share apply_ms trip_ms version "
    "samples bytes_per_s parameters restarts saved saved_age_s save_s storage_error age_s hot"
)
FINDING = "id severity who scope phase ratio factor since text action short"
KPI = (
    "loss loss_slope_per_min val_loss val_top1 samples_per_s updates_per_s staleness workers "
    "progress refused restarts"
)


@pytest.mark.parametrize("empty", [True, False])
def test_every_answer_has_the_shape_of_the_contract(store, empty):
    answers = everything(Store() if empty else store)
    for name, keys in KEYS.items():
        assert set(answers[name]) == {"seq", "t", *keys.split()}, name
        json.dumps(answers[name], allow_nan=False)
    snapshot = answers["snapshot"]
    assert set(snapshot["kpi"]) == set(KPI.split())
    assert set(snapshot["kpi"]["staleness"]) == {"p50", "p95", "p99", "max", "fair", "n", "worst"}
    assert set(snapshot["kpi"]["workers"]["by_status"]) == set(STATUSES)
    assert {c["id"] for c in snapshot["checks"]} == {"law", "updates", "clocks", "reports"}
    for finding in snapshot["findings"]:
        assert set(finding) == set(FINDING.split())
    for worker in answers["workers"]["items"]:
        assert set(worker) == set(WORKER.split())
        assert len(worker["spark"]) == 60
    for shard in answers["shards"]["items"]:
        assert set(shard) == set(SHARD.split())
    for event in answers["events"]["items"]:
        assert set(event) == {"seq", "at", "kind", "who", "node", "text", "detail"}
    assert set(answers["tick"]["w"]) == {"lag", "age", "st"}


def test_what_is_not_known_is_none_and_never_0():
    answers = everything(Store())
    kpi = answers["snapshot"]["kpi"]
    assert kpi["loss"] is None
    assert kpi["updates_per_s"] is None
    assert kpi["staleness"]["p50"] is None
    assert kpi["staleness"]["fair"] is None
    assert answers["snapshot"]["age_s"] is None
    assert answers["meta"]["state"] == "waiting"
    assert answers["findings"]["items"][0]["id"] == "quiet"


def test_the_numbers_are_those_of_the_simulation():
    store = Store()
    simulation = play(store, 60, num_workers=8, num_shards=2)
    kpi = store.snapshot()["kpi"]
    assert kpi["staleness"]["fair"] == 7
    assert kpi["staleness"]["n"] == pytest.approx(simulation.stale_parts, rel=0.02)
    assert kpi["workers"]["alive"] == 8
    assert sum(w["pushes"] for w in store.workers()["items"]) == pytest.approx(
        simulation.updates, rel=0.02
    )
    assert kpi["updates_per_s"] == pytest.approx(simulation.updates / 59, rel=0.1)
    spread = store.distribution()
    assert sum(spread["count"]) == spread["n"] == kpi["staleness"]["n"]
    assert len(spread["edges"]) == len(spread["count"]) + 1


def test_a_tick_of_1000_workers_is_small():
    store = Store()
    play(store, 8, num_workers=1000, num_shards=4, step_s=2.0)
    tick = store.tick()
    assert len(tick["w"]["lag"]) == len(tick["w"]["st"]) == 1000
    assert len(json.dumps(tick, separators=(",", ":"))) <= 12_000
    heat = store.heatmap(store.now - 20, store.now)
    assert heat.ids == [f"node-{i}" for i in range(125)]
    assert len(heat.data) == heat.rows * heat.cols
    heat = store.heatmap(store.now - 20, store.now, group="worker", rows=340)
    assert heat.rows <= 340


def test_a_tick_of_more_than_2000_workers_is_of_nodes():
    store = Store()
    play(store, 6, num_workers=2100, num_shards=1, step_s=3.0)
    tick = store.tick()
    assert len(tick["w"]["lag"]) == len(store.meta()["nodes"]) == 263
    assert len(tick["worst"]) == 50


def test_workers_are_sorted_filtered_and_cut_into_pages(store):
    first = store.workers(sort="id", limit=4)
    assert [w["id"] for w in first["items"]] == ["w0", "w1", "w2", "w3"]
    rest = store.workers(sort="id", limit=4, cursor=first["next"])
    assert [w["id"] for w in rest["items"]] == ["w4", "w5"]
    assert rest["next"] is None
    assert store.workers(status="down")["items"][0]["id"] == "w2"
    assert store.workers(q="node-1")["total"] == 3
    worst = store.workers(sort="-ratio")["items"]
    assert worst[0]["id"] == "w1"
    assert worst[-1]["ratio"] is None  # what is not known comes last
    assert store.workers(sort="ratio")["items"][-1]["ratio"] is None
    for bad in ({"sort": "nonsense"}, {"cursor": "-1"}, {"status": "odd"}):
        with pytest.raises(ValueError, match=r"sorted|cursor|status"):
            store.workers(**bad)
    with pytest.raises(ValueError, match="no series"):
        store.series(["nonsense"], 0, 1)
    with pytest.raises(KeyError):
        store.worker("w99")


def test_one_worker_in_full(store):
    one = store.worker("w1")
    more = "device rss_bytes sent_bytes received_bytes retries versions log series shards events"
    assert set(one) == {"seq", "t", *WORKER.split(), *more.split()}
    series = one["series"]
    columns = "t lag ratio step_s compute fetch push data other loss down"
    assert set(series) == set(columns.split())
    assert len({len(column) for column in series.values()}) == 1
    assert max(v for v in series["ratio"] if v is not None) > 3
    assert one["blame"] == "compute"
    assert set(one["shards"]) == {"shard0", "shard1"}
    assert any(v is not None for v in one["shards"]["shard0"]["staleness"])
    assert any(store.worker("w2")["series"]["down"])
    json.dumps(one, allow_nan=False)


def test_the_heatmap_shows_who_and_when(store):
    heat = store.heatmap(START_AT, START_AT + 90, cols=90, group="worker")
    cells = np.frombuffer(heat.data, np.uint8).reshape(heat.rows, heat.cols)
    assert heat.ids == [f"w{i}" for i in range(6)]

    def ratio(row, t):
        code = int(cells[row, int(START_AT + t - heat.t0)])
        return 2 ** (heat.lo + (code - 2) / 253 * (heat.hi - heat.lo)) if code >= 2 else code

    assert ratio(1, 60) > 3
    assert ratio(1, 15) < 2
    assert ratio(0, 60) < 2
    assert ratio(2, 60) == 1  # down
    assert store.heatmap(START_AT, START_AT + 90, group="worst").ids[0] == "w2"
    for metric in ("updates", "seconds"):
        assert max(store.heatmap(START_AT, START_AT + 90, metric=metric).data) > 2
    with pytest.raises(ValueError, match="no heatmap"):
        store.heatmap(START_AT, START_AT + 90, group="odd")
    for start, end in ((0, 10), (START_AT + 90, START_AT), (0, 1e12)):
        heat = store.heatmap(start, end)
        assert len(heat.data) == heat.rows * heat.cols


def test_events_have_numbers_and_filters(store):
    items = store.events()["items"]
    numbers = [e["seq"] for e in items]
    assert numbers == sorted(set(numbers))
    assert [e["who"] for e in store.events(kind="crash")["items"]] == ["w2"]
    assert store.events(kind="join", limit=2)["total"] == 6
    assert store.events(after=numbers[-2])["items"] == items[-1:]
    assert store.events(q="KILLED")["total"] == 1
    assert {e["kind"] for e in store.events(worker="w2")["items"]} == {"join", "crash", "slow"}


def test_seq_rises_with_each_tick_and_each_event():
    store = Store()
    play(store, 3, num_workers=1, num_shards=1)
    before = store.seq
    store.advance(START_AT + 4)
    assert store.seq == before + 1
    store.take(Event(at=START_AT + 4, kind="config", who="", text="x"), START_AT + 4)
    assert store.seq == before + 2
    assert store.tick()["ev"] == store.seq


def test_an_older_incarnation_is_not_heard():
    messages = list(Simulation(2, 1).until(10))
    report = [m for m in messages if isinstance(m, WorkerReport)][-1]
    store = Store()
    store.take(replace(report, inc=3, n=1), report.at)
    store.take(replace(report, inc=2, n=99), report.at)
    store.advance(report.at + 1)
    assert store.fleet.num_old == 1
    assert store.workers(sort="id")["items"][0]["inc"] == 3


def test_a_monitor_that_begins_late_shows_what_it_can():
    store = Store()
    second = 60
    for message in Simulation(4, 2).until(90):
        if message.at < START_AT + 60:
            continue
        while message.at >= START_AT + second + 1:
            second += 1
            store.advance(START_AT + second)
        store.take(message, message.at)
    meta, kpi = store.meta(), store.snapshot()["kpi"]
    assert meta["run"] is None  # Begin was not heard
    assert meta["state"] == "training"
    assert kpi["staleness"]["fair"] == 3
    assert kpi["workers"]["target"] is None
    assert store.findings()["items"][0]["text"].startswith("All 4 workers within")


def test_another_runs_reports_are_not_taken():
    store = Store()
    messages = list(Simulation(2, 1).until(5))
    store.take(next(m for m in messages if isinstance(m, Begin)), START_AT)
    report = next(m for m in messages if isinstance(m, WorkerReport))
    store.take(replace(report, run="other"), report.at)
    assert store.num_odd == 1
    assert len(store.fleet) == 0


def test_nonsense_is_bounded():
    store = Store()
    messages = list(Simulation(3, 2, meter=1.0).until(6))
    reports = [m for m in messages if isinstance(m, WorkerReport) and m.end and m.meter_staleness]
    shard = [m for m in messages if isinstance(m, ShardReport)][-1]
    huge = 2**63
    report = reports[0]
    num, trips = len(report.end), len(report.trip_s)
    odd = replace(
        report,
        inc=huge,
        n=huge,
        at=1e300,
        span_s=-5.0,
        pid=huge,
        rss_bytes=huge,
        num_steps=huge,
        num_samples=huge,
        busy_s=1e300,
        end=(1e300,) * num,
        compute_s=(-1e300,) * num,
        step_s=(1e300,) * num,
        data_s=(1e300,) * num,
        staleness=(huge,) * num,
        version=(huge,) * num,
        loss=(-1e300,) * num,
        grad_norm=(1e300,) * num,
        sent_bytes=huge,
        trip_shard=(huge,) * trips,
        trip_s=(1e300,) * trips,
        host="h" * 5000,
        device="d" * 5000,
        meter_staleness=(huge,) * len(report.meter_cosine),
    )
    odd_shard = replace(
        shard,
        w=("a",) * 3,
        w_inc=(huge,) * 3,
        base=(huge,) * 3,
        pushes=(huge,) * 3,
        staleness=(huge,) * 3,
        inc=huge,
        n=huge,
        version=huge,
        updates=huge,
        samples=huge,
        queue=huge,
        apply_s=(1e300,),
        busy_share=1e300,
        span_s=0.0,
        saved_at=1e300,
        save_s=1e300,
        stale_value=(huge - 1,),
        stale_count=(huge - 1,),
        steady_parts=huge,
        steady_sum=huge,
        num_workers=huge,
        refused_parts=huge,
        storage_error="e" * 5000,
    )
    states = [WorkerState(name=f"w{i}", state="odd" * 50, inc=huge - 1) for i in range(5100)]
    run = next(m for m in messages if isinstance(m, RunReport))
    for i in range(5100):
        store.take(replace(report, name=f"x{i}"), START_AT + 6)
    for i in range(260):
        store.take(replace(odd_shard, name=f"s{i}"), START_AT + 6)
    store.take(odd, START_AT + 6)
    store.take(odd_shard, START_AT + 6)
    store.take(RunReport(**{**_fields(run), "workers": states}), START_AT + 6)
    for i in range(30):
        event = Event(
            at=1e300, kind="odd", who="y" * 999, text="z" * 99_999, detail={"a": "b" * 9999}
        )
        store.take(event, START_AT + 6)
        store.advance(START_AT + 7 + i // 5)
    assert len(store.fleet) == 5000
    assert len(store.shard_board.items) == 256
    assert len(store.log) <= 20_000
    for name, answer in everything(store).items():
        size = len(json.dumps(answer, allow_nan=False))
        assert size < 400_000, name
    odd_events = store.events(kind="error")["items"]  # a kind that is not known
    assert len(odd_events) == 30
    assert {len(e["text"]) for e in odd_events} == {500}


def _fields(struct):
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def test_shards_speak_for_a_large_fleet_and_no_push_counts_twice():
    """Each of 800 workers reports each 8 s; shards tell of its push each second."""
    store = Store()
    simulation = play(store, 40, num_workers=800, num_shards=2, step_s=1.0, seed=3)
    fleet = store.fleet
    assert store.now - fleet.heard_at[:800].max() < 1 < store.now - fleet.heard_at[:800].min()
    assert store.now - fleet.view("pushed_at").min() < 4
    assert set(store.workers()["items"][i]["status"] for i in range(50)) == {"ok"}
    told = sum(int(fleet.pushes[i]) for i in range(800))
    applied = sum(simulation.by_worker.values())
    assert 0.7 * applied < told <= applied
