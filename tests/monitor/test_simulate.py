import pytest

from distbelief.chronicle import Begin, Event, RunReport
from distbelief.monitor.simulate import START_AT, Fault, Simulation, straggler
from distbelief.param_server import wire
from distbelief.param_server.report import REPORTS, ShardReport, WorkerReport


@pytest.mark.parametrize(("n_fetch", "law"), [(1, 31.0), (2, 46.5), (5, 93.0)])
def test_the_mean_staleness_follows_the_law_whoever_is_slow(n_fetch, law):
    simulation = Simulation(
        32, 1, n_fetch=n_fetch, faults=[straggler("w1", 6.0, 0)], talks=False, noise=0.2
    )
    list(simulation.until(30))
    simulation.forget()
    list(simulation.until(330))
    assert simulation.mean_staleness == pytest.approx(law, rel=0.02)
    assert max(simulation.counts) > 3 * law  # and yet some pushes are very stale
    assert simulation.by_worker["w1"] < 0.3 * simulation.updates / 32


def test_the_same_seed_tells_the_same():
    def told(seed):
        return list(Simulation(4, 2, seed=seed).until(5))

    assert told(1) == told(1)
    assert told(1) != told(2)


def test_messages_come_in_the_order_of_time_and_fit_the_wire():
    messages = list(Simulation(5, 2, meter=0.5).until(10))
    assert isinstance(messages[0], Begin)
    assert {type(m) for m in messages} == {Begin, Event, RunReport, WorkerReport, ShardReport}
    assert [m.at for m in messages] == sorted(m.at for m in messages)
    for message in messages:
        if isinstance(message, WorkerReport | ShardReport):
            assert REPORTS.decode(wire.encode(message)) == message


def test_phases_are_parts_of_the_step():
    reports = [m for m in Simulation(4, 2).until(20) if isinstance(m, WorkerReport)]
    for r in reports:
        for columns in zip(r.data_s, r.fetch_s, r.compute_s, r.push_s, r.step_s, strict=True):
            *phases, step = columns
            assert 0.9 * step < sum(phases) <= step * 1.001


def test_a_worker_crashes_and_is_back_as_the_next_incarnation():
    fault = Fault(kind="crash", who="w2", start=5.0, end=9.0)
    messages = list(Simulation(4, 1, faults=[fault]).until(15))
    kinds = [(m.kind, round(m.at - START_AT, 1)) for m in messages if isinstance(m, Event)]
    assert ("crash", 5.3) in kinds
    assert ("recover", 9.0) in kinds
    reports = [m for m in messages if isinstance(m, WorkerReport) and m.name == "w2"]
    assert not [r for r in reports if START_AT + 5 < r.at < START_AT + 9]
    assert {r.inc for r in reports} == {1, 2}
    again = [r.n for r in reports if r.inc == 2]
    assert again == list(range(1, len(again) + 1))


def test_a_worker_that_hangs_reports_a_long_step_and_a_frozen_one_nothing():
    faults = [
        Fault(kind="hang", who="w0", start=5.0, end=20.0),
        Fault(kind="freeze", who="w1", start=5.0, end=20.0),
    ]
    messages = [m for m in Simulation(4, 1, faults=faults).until(19) if m.at > START_AT + 8]
    busy = [m.busy_s for m in messages if isinstance(m, WorkerReport) and m.name == "w0"]
    assert busy == sorted(busy)
    assert busy[-1] > 10
    assert not [m for m in messages if isinstance(m, WorkerReport) and m.name == "w1"]


def test_a_drained_worker_leaves_and_a_late_one_joins():
    faults = [
        Fault(kind="drain", who="w0", start=5.0),
        Fault(kind="late", who="w1", start=6.0),
    ]
    messages = list(Simulation(4, 1, faults=faults).until(10))
    said = [(m.kind, m.who) for m in messages if isinstance(m, Event)][-3:]
    assert sorted(said) == [("drain", "w0"), ("join", "w1"), ("leave", "w0")]
    last = [m for m in messages if isinstance(m, RunReport)][-1]
    assert last.workers[0].state == "left"
