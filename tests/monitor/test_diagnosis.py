"""Faults are injected by the simulation; what is asked is what the monitor says, and when."""

from dataclasses import replace

import pytest

from distbelief.monitor.simulate import START_AT, Fault, Simulation, straggler
from distbelief.monitor.source import STATUSES
from distbelief.monitor.store import Store
from distbelief.param_server.report import ShardReport, WorkerReport


class Watched:
    """A simulation, and a store that hears it."""

    def __init__(self, num_workers=16, num_shards=2, faults=(), lose=None, change=None, **more):
        self.simulation = Simulation(num_workers, num_shards, faults=faults, **more)
        self.store = Store()
        self.change = change or (lambda message, t: message)
        self.lose = lose or (lambda message, t: False)
        self.second = 0
        self.first = {}  # (name, status) -> when it was first seen
        self.found = {}  # id of a finding -> when it came up
        self.texts = {}

    def play(self, until):
        for message in self.simulation.until(until):
            while message.at >= START_AT + self.second + 1:
                self.close()
            if not self.lose(message, message.at - START_AT):
                self.store.take(self.change(message, message.at - START_AT), message.at)
        return self

    def close(self):
        self.second += 1
        self.store.advance(START_AT + self.second)
        fleet = self.store.fleet
        for name, status in zip(fleet.names, fleet.view("status"), strict=True):
            if status > 1:
                self.first.setdefault((name, STATUSES[status]), self.second)
        for finding in self.store.findings()["items"]:
            assert len(finding["text"]) <= 120
            if finding["id"] != "quiet":
                self.found.setdefault(finding["id"], self.second)
                self.texts[finding["id"]] = finding

    def status(self, name):
        return STATUSES[self.store.fleet.status[self.store.fleet.rows[name]]]


@pytest.mark.parametrize(
    ("num", "factor", "phase"),
    [
        (16, 6.0, "compute"),
        (16, 4.0, "compute"),
        (4, 6.0, "compute"),
        (2, 6.0, "compute"),
        (16, 100.0, "data"),
        (16, 60.0, "push"),
        (16, 60.0, "fetch"),
    ],
)
def test_a_straggler_is_watched_after_15_s_and_slow_after_30_to_40(num, factor, phase):
    begin = 40
    w = Watched(num, faults=[straggler("w1", factor, begin, phase=phase)]).play(90)
    assert begin + 15 <= w.first["w1", "watch"] <= begin + 25
    assert begin + 30 <= w.first["w1", "slow"] <= begin + 40
    assert begin + 30 <= w.found["slow:w1"] <= begin + 40
    finding = w.texts["slow:w1"]
    assert (finding["who"], finding["scope"], finding["phase"]) == ("w1", "worker", phase)
    assert finding["severity"] == "warn"
    assert finding["ratio"] > 2
    assert finding["factor"] > 3
    assert phase in finding["text"]
    assert finding["action"] in finding["text"]
    assert set(w.found) == {"slow:w1"}  # and nobody else is blamed
    assert {name for name, _ in w.first} == {"w1"}


def test_a_finding_keeps_its_id_and_since_and_ends_with_an_event():
    w = Watched(faults=[straggler("w1", 6.0, 30, 100)]).play(80)
    since = w.store.findings()["items"][0]["since"]
    w.play(100)
    assert w.store.findings()["items"][0]["since"] == since
    assert START_AT + 60 <= since <= START_AT + 70
    w.play(170)
    assert w.store.findings()["items"][0]["id"] == "quiet"
    assert w.status("w1") == "ok"
    kinds = [(e["kind"], e["who"]) for e in w.store.events(kind="slow,well")["items"]]
    assert kinds == [("slow", "w1"), ("well", "w1")]


def test_a_node_whose_fetch_is_slow_is_one_finding():
    w = Watched(32, faults=[straggler("node-2", 40.0, 30, phase="fetch")]).play(85)
    assert set(w.found) == {"slow:node-2"}
    finding = w.texts["slow:node-2"]
    assert (finding["scope"], finding["who"], finding["phase"]) == ("node", "node-2", "fetch")
    assert 60 <= w.found["slow:node-2"] <= 70


def test_one_slow_worker_is_no_slow_node():
    w = Watched(8, per_node=2, faults=[straggler("w3", 5.0, 20)]).play(70)
    assert w.texts["slow:w3"]["scope"] == "worker"


def test_a_hot_shard_is_named_and_its_workers_are_not():
    faults = [Fault(kind="hot", who="shard1", start=30, factor=40.0)]
    w = Watched(32, 4, faults=faults).play(80)
    assert set(w.found) == {"hot:shard1"}
    assert w.texts["hot:shard1"]["scope"] == "shard"
    assert w.found["hot:shard1"] <= 50
    hot = [s["id"] for s in w.store.shards()["items"] if s["hot"]]
    assert hot == ["shard1"]


def test_when_all_shards_are_full_more_of_them_are_asked_for():
    faults = [Fault(kind="hot", who=f"shard{i}", start=20, factor=40.0) for i in range(2)]
    w = Watched(32, 2, faults=faults).play(60)
    assert set(w.found) == {"shards"}


def test_a_crash_is_down_then_recovering_then_ok():
    w = Watched(faults=[Fault(kind="crash", who="w1", start=30.0, end=50.0)]).play(49)
    assert w.first["w1", "down"] <= 35
    assert w.found["down:w1"] <= 35
    assert w.store.workers(q="w1", sort="id")["items"][0]["lag"] is None
    w.play(60)
    assert w.status("w1") == "recovering"
    w.play(100)
    assert w.status("w1") == "ok"
    assert w.store.findings()["items"][0]["id"] == "quiet"
    item = w.store.workers(q="w1", sort="id")["items"][0]
    assert (item["inc"], item["restarts"]) == (2, 1)


@pytest.mark.parametrize("kind", ["hang", "freeze"])
def test_a_worker_that_hangs_is_stalled_and_its_lag_grows(kind):
    w = Watched(faults=[Fault(kind=kind, who="w1", start=30.0, end=80.0)]).play(45)
    assert 40 <= w.first["w1", "stalled"] <= 44
    i = w.store.fleet.rows["w1"]
    before = float(w.store.fleet.lag[i])
    w.play(70)
    assert w.status("w1") == "stalled"
    assert float(w.store.fleet.lag[i]) > before + 15 * 15
    assert "stalled:w1" in w.found
    w.play(84)
    assert w.status("w1") != "stalled"


def test_a_silent_worker_is_down_when_the_launcher_says_nothing():
    def lose(message, t):
        return not isinstance(message, WorkerReport) and t > 20 and hasattr(message, "workers")

    faults = [Fault(kind="freeze", who="w1", start=30.0)]
    w = Watched(8, faults=faults, lose=lose).play(75)
    assert w.first["w1", "stalled"] < w.first["w1", "down"] <= 65


def test_a_drained_worker_leaves_quietly():
    w = Watched(faults=[Fault(kind="drain", who="w1", start=30.0)]).play(60)
    assert w.status("w1") == "left"
    assert not w.found
    assert w.store.fleet.fair == 14


def test_a_late_joiner_is_no_trouble():
    w = Watched(faults=[Fault(kind="late", who="w1", start=30.0)]).play(70)
    assert w.status("w1") == "ok"
    assert not w.found


def test_a_storage_error_is_told():
    w = Watched(4, faults=[Fault(kind="storage", who="shard0", start=10.0)]).play(20)
    assert w.texts["storage:shard0"]["severity"] == "error"


def test_reports_that_are_lost_are_told_and_change_no_status():
    count = iter(range(10**9))

    def lose(message, t):
        return t > 20 and isinstance(message, WorkerReport) and next(count) % 3 == 0

    w = Watched(lose=lose).play(90)
    assert set(w.found) == {"lost"}
    assert not w.first
    check = {c["id"]: c for c in w.store.snapshot()["checks"]}["reports"]
    assert check["ok"] is False


def test_nothing_heard_is_told_and_nobody_is_blamed():
    def lose(message, t):
        return t > 30 and hasattr(message, "inc")  # reports of workers and shards

    w = Watched(lose=lose).play(50)
    assert set(w.found) == {"silence"}
    assert "stalled" not in {status for _, status in w.first}


def test_nobody_trains():
    faults = [Fault(kind="hang", who=f"w{i}", start=30.0) for i in range(4)]
    w = Watched(4, faults=faults).play(80)
    assert w.store.findings()["items"][0]["id"] == "idle"


def test_a_monitor_that_slept_blames_nobody():
    w = Watched(8).play(40)
    for _ in w.simulation.until(100):
        pass  # stopped for a minute: nothing is read
    w.second = 100
    w.play(140)
    assert not w.first
    assert set(w.found) <= {"lost"}  # for so they are


def test_counters_above_the_law_are_an_error_and_below_it_are_not():
    for factor, is_told in ((1.2, True), (0.5, False)):

        def change(message, t, factor=factor):
            if isinstance(message, ShardReport):
                return replace(message, steady_sum=int(message.steady_sum * factor))
            return message

        w = Watched(8, 1, change=change).play(120)
        assert ("law" in w.found) is is_told
        check = {c["id"]: c for c in w.store.snapshot()["checks"]}["law"]
        assert check["ok"] is not is_told


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_told(bad):
    def change(message, t):
        if isinstance(message, WorkerReport) and message.name == "w3" and t > 10:
            return replace(message, loss=(bad,) * len(message.loss))
        return message

    w = Watched(4, 1, change=change).play(20)
    assert w.texts["loss:nan"]["who"] == "w3"
    assert "w3" in w.texts["loss:nan"]["text"]


def test_a_loss_that_rises_is_told():
    def change(message, t):
        if isinstance(message, WorkerReport) and t > 100:
            return replace(message, loss=tuple(3 * x for x in message.loss))
        return message

    w = Watched(4, 1, change=change).play(100)
    assert not w.found
    w.play(140)
    assert set(w.found) == {"loss:rising"}


@pytest.mark.parametrize(
    ("num", "noise", "step_s", "seed", "minutes"),
    [
        (1, 0.1, 1.0, 0, 2),
        (2, 0.3, 1.0, 1, 4),
        (2, 0.3, 5.0, 2, 4),
        (4, 0.3, 3.0, 3, 10),
        (4, 0.4, 3.0, 4, 3),
        (64, 0.1, 10.0, 5, 3),
        (1000, 0.06, 20.0, 6, 0.8),
    ],
)
def test_a_fleet_that_is_well_is_left_in_peace(num, noise, step_s, seed, minutes):
    w = Watched(num, 2, noise=noise, step_s=step_s, seed=seed).play(minutes * 60)
    assert not w.found
    assert not [one for one in w.first if one[1] in ("slow", "stalled", "down")]
    quiet = w.store.findings()["items"]
    assert [f["id"] for f in quiet] == ["quiet"]


def test_the_law_holds_within_2_percent_with_a_straggler():
    w = Watched(16, 2, faults=[straggler("w1", 6.0, 0)]).play(180)
    _, mean, should = w.store.shard_board.law()
    assert should == 15
    assert mean == pytest.approx(should, rel=0.02)
    assert all(c["ok"] for c in w.store.snapshot()["checks"])
