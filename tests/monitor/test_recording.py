import json

import numpy as np
import pytest
from safetensors.numpy import save

from distbelief.monitor.recording import Recording
from distbelief.monitor.simulate import START_AT, Fault, Simulation, straggler
from distbelief.monitor.store import SERIES, Store


def play(simulation, store, recording, begin, end):
    second = begin
    for message in simulation.until(end):
        while message.at >= START_AT + second + 1:
            second += 1
            store.advance(START_AT + second)
            recording.save_if_due(store, START_AT + second)
        store.take(message, message.at)
    store.advance(START_AT + end)


def answers(store):
    now = store.now
    return {
        "snapshot": store.snapshot(),
        "workers": store.workers(),
        "w1": store.worker("w1"),
        "shards": store.shards(),
        "events": store.events(),
        "findings": store.findings(),
        "distribution": store.distribution(),
        "updates": store.updates(),
        "meter": store.meter(),
        "tick": store.tick(),
        "series": store.series(list(SERIES), now - 600, now),
        "heat": store.heatmap(now - 600, now),
        "far": store.heatmap(now - 3600, now),
    }


@pytest.fixture
def recorded(tmp_path):
    faults = [straggler("w1", 6.0, 20), Fault(kind="crash", who="w2", start=50, end=70)]
    simulation = Simulation(4, 2, faults=faults, meter=0.2)
    store, recording = Store(), Recording(tmp_path / "metrics")
    recording.watch(store)
    play(simulation, store, recording, 0, 100)
    store.take(simulation.end(), START_AT + 100)
    recording.save(store, START_AT + 100)
    return simulation, store, recording


def test_a_recorded_run_has_the_same_numbers(recorded):
    _, store, recording = recorded
    again = Store(live=False)
    fresh = Recording(recording.folder)
    assert fresh.load(again)
    assert fresh.num_damaged == 0
    for name, answer in answers(store).items():
        assert answers(again)[name] == answer, name
    assert again.meta() == {**store.meta(), "live": False}
    assert again.meta()["finished"]


def test_a_monitor_that_is_started_again_goes_on(tmp_path):
    simulation = Simulation(4, 2)
    store, recording = Store(), Recording(tmp_path)
    recording.watch(store)
    play(simulation, store, recording, 0, 70)
    recording.save(store, store.now)
    store, recording = Store(), Recording(tmp_path)
    assert recording.load(store)
    recording.watch(store)
    for _ in simulation.until(90):
        pass  # nobody was there
    play(simulation, store, recording, 90, 160)
    recording.save(store, store.now)
    assert store.snapshot()["kpi"]["workers"]["by_status"]["ok"] == 4
    loss = store.series(["loss"], START_AT, START_AT + 160)["loss"]
    assert loss[60] is not None
    assert loss[80] is None  # not known, not 0
    assert loss[150] is not None
    numbers = [e["seq"] for e in store.events()["items"]]
    assert numbers == sorted(set(numbers))
    again = Store(live=False)
    assert Recording(tmp_path).load(again)
    assert again.series(["loss"], START_AT, START_AT + 160)["loss"] == loss


def test_nothing_is_no_recording(tmp_path):
    assert not Recording(tmp_path / "none").load(Store())


def test_damage_costs_what_is_damaged_and_no_more(recorded):
    _, _, recording = recorded
    files = sorted(recording.folder.glob("*safetensors*"))
    for file in files:
        whole = file.read_bytes()
        for bad in (whole[: len(whole) // 2], b"", b"junk" * 50):
            file.write_bytes(bad)
            fresh, store = Recording(recording.folder), Store(live=False)
            assert fresh.load(store)
            assert 1 <= fresh.num_damaged <= 2
            assert store.meta()["run"] == "simulated"
            store.snapshot()
        file.write_bytes(whole)
    meta = recording.folder / "meta.json"
    meta.write_text(meta.read_text()[:100])
    assert not Recording(recording.folder).load(Store())


def test_arrays_of_another_shape_are_left_out(recorded):
    _, _, recording = recorded
    for file in recording.folder.glob("rows-1s-*"):
        file.write_bytes(save({"stamp": np.zeros(3, np.int64), "lag": np.zeros((1, 1))}))
    fresh, store = Recording(recording.folder), Store(live=False)
    assert fresh.load(store)
    assert fresh.num_damaged >= 1
    store.heatmap(store.now - 100, store.now)


def test_events_that_were_cut_off_are_left_out(recorded):
    _, store, recording = recorded
    file = recording.folder / "events.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert [json.loads(line) for line in lines] == store.events()["items"]
    file.write_bytes(b"".join(lines)[:-10])
    again = Store(live=False)
    Recording(recording.folder).load(again)
    assert again.events()["items"] == store.events()["items"][:-1]


def test_old_chunks_are_removed(tmp_path):
    store, recording = Store(), Recording(tmp_path)
    for i in range(0, 60 * 60, 60):
        store.advance(START_AT + i)
        recording.save(store, START_AT + i)
    names = [p.name for p in tmp_path.glob("rows-1s-*")]
    assert len(names) <= 11
