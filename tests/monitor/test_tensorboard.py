"""TensorBoard files are read back by TensorBoard's own reader. In memory but for the files."""

import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import structs

from distbelief.chronicle import Begin, Event
from distbelief.monitor.loggers import TAGS, Loggers
from distbelief.monitor.simulate import Simulation
from distbelief.monitor.store import Store
from distbelief.monitor.tensorboard import TensorBoard

pytest.importorskip("tensorboard", reason="of the extra `tensorboard`")


def begin(path: Path) -> Begin:
    return Begin(
        at=1e9,
        run="7f3ac1",
        name="digits",
        attempt=1,
        version="0",
        engine="local",
        num_workers=2,
        num_shards=1,
        config={},
        parameters=10,
        unit="none",
        target=0.0,
        run_path=str(path),
    )


def read(path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(path / "tensorboard")).Reload()


def test_numbers_are_read_back_at_their_steps(tmp_path):
    board = TensorBoard()
    board.start(begin(tmp_path))
    board.log({"train/loss": 2.5, "staleness/p95": 7.0}, 10)
    board.log({"train/loss": 1.25}, 30)
    board.finish("done")
    seen = read(tmp_path)
    assert seen.Tags()["scalars"] == ["train/loss", "staleness/p95"]
    assert [(one.step, one.value) for one in seen.Scalars("train/loss")] == [(10, 2.5), (30, 1.25)]
    assert [(one.step, one.value) for one in seen.Scalars("staleness/p95")] == [(10, 7.0)]


def test_a_histogram_keeps_its_bins_and_the_sums_of_whole_values(tmp_path):
    board = TensorBoard()
    board.start(begin(tmp_path))
    board.histogram("staleness/updates", [0.0, 1.0, 2.0, 3.0], [4, 2, 1], 5)
    board.finish("done")
    (one,) = read(tmp_path).Histograms("staleness/updates")
    value = one.histogram_value
    assert one.step == 5
    assert (value.min, value.max, value.num) == (0.0, 3.0, 7.0)
    assert (value.sum, value.sum_squares) == (0 * 4 + 1 * 2 + 2 * 1, 1 * 2 + 4 * 1)
    assert list(value.bucket_limit) == [1.0, 2.0, 3.0]
    assert list(value.bucket) == [4.0, 2.0, 1.0]


def test_an_event_is_a_text_and_what_it_says_is_no_markdown(tmp_path):
    board = TensorBoard()
    board.start(begin(tmp_path))
    board.event(Event(at=1e9 + 5, kind="crash", who="w1", text="<img src=x> *gone*"), 12)
    board.finish("done")
    (one,) = read(tmp_path).Tensors("events/crash")
    assert one.step == 12
    assert one.wall_time == 1e9 + 5
    assert one.tensor_proto.string_val == [rb"`w1` \<img src=x\> \*gone\*"]


def test_what_is_written_is_on_disk_before_the_end(tmp_path):
    board = TensorBoard()
    board.start(begin(tmp_path))
    board.log({"train/loss": 2.5}, 10)
    assert len(read(tmp_path).Scalars("train/loss")) == 1
    board.finish("done")


def test_a_second_attempt_adds_a_file_and_the_run_goes_on(tmp_path):
    for step in (10, 20):
        board = TensorBoard()
        board.start(begin(tmp_path))
        board.log({"train/loss": 1.0}, step)
        board.finish("lost")
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    # EventAccumulator reads the files of a folder one after the other.
    assert [one.step for one in read(tmp_path).Scalars("train/loss")] == [10, 20]


def test_a_run_is_logged_as_the_source_says_it(tmp_path):
    store, loggers = Store(), Loggers(["tensorboard"])
    simulation = Simulation(8, 2, start=1e9)
    for second in range(1, 31):
        for message in simulation.until(float(second)):
            if isinstance(message, Begin):
                message = structs.replace(message, run_path=str(tmp_path))
            store.take(message, message.at)
            loggers.take(message)
        store.advance(1e9 + second)
        loggers.tick(store, 1e9 + second)
    kpi = store.snapshot()["kpi"]
    loggers.finish(store)
    seen = read(tmp_path)
    assert set(seen.Tags()["scalars"]) == {tag for tag in TAGS if not tag.startswith("val/")}
    last = seen.Scalars("train/loss")[-1]
    assert last.step == kpi["progress"]["updates"]
    assert last.value == pytest.approx(kpi["loss"])
    assert seen.Scalars("staleness/p95")[-1].value == kpi["staleness"]["p95"]
    rates = seen.Scalars("perf/samples_per_second")
    assert rates[-1].value == pytest.approx(kpi["samples_per_s"])
    assert len(rates) == 7  # every 5 s, and at the end
    histogram = seen.Histograms("staleness/updates")[-1].histogram_value
    assert histogram.num == kpi["staleness"]["n"]
    assert "events/join" in seen.Tags()["tensors"]
    assert loggers.counts() == {"tensorboard": (0, 0)}


def test_it_needs_no_torch(tmp_path):
    """Nor tensorflow; in a process of its own, where nothing has loaded them yet."""
    code = (
        "import sys, logging; from pathlib import Path\n"
        "from distbelief.chronicle import Begin\n"
        "from distbelief.monitor.tensorboard import TensorBoard\n"
        "before = 'tensorboard' in sys.modules\n"
        "b = Begin(at=0.0, run='r', name='n', attempt=1, version='0', engine='e', num_workers=1,\n"
        "    num_shards=1, config={}, parameters=0, unit='none', target=0.0,\n"
        "    run_path=sys.argv[1])\n"
        "t = TensorBoard(); t.start(b); t.log({'a': 1.0}, 1); t.finish('done')\n"
        "print(before, 'torch' in sys.modules, 'tensorflow' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "False False False\n", done.stderr
