"""Loggers: what is logged when, and that no logger can hold up anything, whatever it does.

The three trackers are held against stand-ins that have the names and arguments of their packages'
documentation.
"""

import inspect
import logging
import sys
import threading
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from distbelief.chronicle import Begin, End, Event
from distbelief.job import LOGGERS
from distbelief.monitor.logger import Missing, flat, package
from distbelief.monitor.loggers import EVERY_S, MAKERS, QUEUE, TRIES, Loggers, Scribe
from distbelief.monitor.simulate import Simulation
from distbelief.monitor.store import Store
from distbelief.monitor.tracker import Mlflow, Trackio, Wandb

CONFIG = {"train": {"lr": 0.1, "n_push": 1}, "seed": 3}
BEGIN = Begin(
    at=1e9,
    run="7f3ac1",
    name="digits",
    attempt=2,
    version="0",
    engine="local",
    num_workers=2,
    num_shards=1,
    config=CONFIG,
    parameters=10,
    unit="none",
    target=0.0,
    run_path="/runs/7f3ac1",
)
CRASH = Event(at=1e9 + 5, kind="crash", who="w1", text="w1 was killed by signal 9")


class Notebook:
    """A logger that keeps what it is told, and fails as often as it is asked to."""

    name = "notebook"

    def __init__(self, fail=0, fail_start=0, gate=None):
        self.lines, self.fail, self.fail_start, self.gate = [], fail, fail_start, gate
        self.entered = threading.Event()
        self.started = self.tried = 0

    def start(self, begin):
        self.started += 1
        if self.started <= self.fail_start:
            raise ConnectionError("no server")
        self.lines.append(("start", begin.run))

    def log(self, values, step):
        self.entered.set()
        if self.gate is not None:
            self.gate.wait()
        self.tried += 1
        if self.tried <= self.fail:
            raise OSError("disk full")
        self.lines.append(("log", dict(values), step))

    def histogram(self, name, edges, counts, step):
        self.lines.append(("histogram", name, step, sum(counts)))

    def event(self, event, step):
        self.lines.append(("event", event.kind, step))

    def finish(self, status):
        self.lines.append(("finish", status))


def log(number, step=0):
    return lambda one: one.log({"x": number}, step)


def ended(scribe, status="done"):
    scribe.end(status)
    assert scribe.join(10.0)


def steps_of(book):
    return [line[2] for line in book.lines if line[0] == "log"]


# What is logged.


def run(loggers, seconds, store=None):
    """A small simulated run, as the monitor's process goes through it."""
    store = store or Store()
    simulation = Simulation(4, 2, start=1e9)
    for second in range(1, seconds + 1):
        for message in simulation.until(float(second)):
            store.take(message, message.at)
            loggers.take(message)
        store.advance(1e9 + second)
        loggers.tick(store, 1e9 + second)
    end = simulation.end()
    end.result["eval"] = {"loss": 0.5, "top1": 0.75}
    store.take(end, end.at)
    loggers.take(end)
    return store


def test_every_few_seconds_and_once_more_at_the_end():
    book = Notebook()
    loggers = Loggers(["notebook"], {"notebook": lambda: book})
    store = run(loggers, 21)
    loggers.finish(store)
    kpi = store.snapshot()["kpi"]
    assert book.lines[0] == ("start", "simulated")
    assert book.lines[-1] == ("finish", "done")
    logged = [line for line in book.lines if line[0] == "log" and "train/loss" in line[1]]
    assert len(logged) == 21 // EVERY_S  # not at 1 s, when there was no loss; then no step was new
    assert logged[-1][1]["train/loss"] == kpi["loss"]
    assert logged[-1][1]["staleness/p50"] == kpi["staleness"]["p50"]
    assert logged[-1][2] == kpi["progress"]["updates"]
    assert steps_of(book) == sorted(steps_of(book))
    val = [line[1] for line in book.lines if line[0] == "log" and "val/loss" in line[1]]
    assert val == [{"val/loss": 0.5, "val/top1": 0.75}]
    histograms = [line for line in book.lines if line[0] == "histogram"]
    assert histograms[-1][3] == store.distribution()["n"]
    assert [line[1] for line in book.lines if line[0] == "event"][:4] == ["join"] * 4


def test_what_is_not_known_is_not_logged():
    book = Notebook()
    loggers = Loggers(["notebook"], {"notebook": lambda: book})
    store = Store()
    store.take(BEGIN, BEGIN.at)
    loggers.take(BEGIN)
    loggers.tick(store, BEGIN.at)
    loggers.finish(store)
    assert book.lines == [("start", "7f3ac1"), ("finish", "lost")]  # and nobody said how it ended


def test_without_loggers_there_is_no_thread():
    before = threading.active_count()
    loggers = Loggers([])
    loggers.take(BEGIN)
    assert threading.active_count() == before
    loggers.finish()
    assert loggers.counts() == {}


def test_a_logger_that_there_is_not_is_said_and_left_out(caplog):
    loggers = Loggers(["tensorbored", "trackio"])
    assert (
        "there is no logger 'tensorbored'; monitor.log may name tensorboard, wandb" in caplog.text
    )
    assert loggers.counts() == {"trackio": (0, 0)}


def test_the_configuration_takes_the_loggers_that_there_are():
    assert tuple(LOGGERS) == tuple(MAKERS)


# Nothing waits for a logger.


def test_one_that_hangs_for_ever_holds_up_nobody(caplog):
    gate = threading.Event()
    stuck, well = Notebook(gate=gate), Notebook()
    loggers = Loggers(["stuck", "well"], {"stuck": lambda: stuck, "well": lambda: well})
    stuck.name = "stuck"
    try:
        run(loggers, 11)
        assert stuck.entered.wait(10.0)
        began = time.monotonic()
        loggers.finish(timeout_s=0.2)
        assert time.monotonic() - began < 5.0  # it hangs for ever: any end at all is the point
        assert well.lines[-1] == ("finish", "done")
        assert not any(line[0] == "log" for line in stuck.lines)
        assert "logger stuck has not finished in 0 s and is left behind" in caplog.text
    finally:
        gate.set()


def test_a_full_queue_loses_the_oldest_and_counts_them():
    gate = threading.Event()
    book = Notebook(gate=gate)
    scribe = Scribe(book, BEGIN)
    scribe.put(log(0, step=-1))
    assert book.entered.wait(10.0)  # it is at the first, which is in the queue no more
    for step in range(QUEUE + 30):
        scribe.put(log(0, step))
    assert scribe.dropped == 30
    gate.set()
    ended(scribe)
    assert steps_of(book) == [-1, *range(30, QUEUE + 30)]


# Errors.


def test_an_error_is_tried_again_and_warned_of_once(caplog):
    book = Notebook(fail=2)
    scribe = Scribe(book, BEGIN, pause_s=0.001)
    for step in range(3):
        scribe.put(log(0, step))
    while len(steps_of(book)) < 3:
        time.sleep(0.001)
    ended(scribe)
    assert steps_of(book) == [0, 1, 2]
    assert (scribe.errors, scribe.dropped) == (2, 0)
    assert caplog.text.count("logger notebook failed") == 1
    assert "OSError: disk full" in caplog.text


def test_a_record_that_fails_again_and_again_is_given_up():
    book = Notebook(fail=TRIES)
    scribe = Scribe(book, BEGIN, pause_s=0.001)
    scribe.put(log(0, 1))
    scribe.put(log(0, 2))
    while not steps_of(book):
        time.sleep(0.001)
    ended(scribe)
    assert steps_of(book) == [2]
    assert (scribe.errors, scribe.dropped) == (TRIES, 1)


def test_a_start_that_fails_is_tried_until_it_works_and_nothing_is_lost():
    book = Notebook(fail_start=4)
    scribe = Scribe(book, BEGIN, pause_s=0.001)
    scribe.put(log(0, 1))
    while not steps_of(book):
        time.sleep(0.001)
    ended(scribe)
    assert book.lines == [("start", "7f3ac1"), ("log", {"x": 0}, 1), ("finish", "done")]
    assert scribe.errors == 4


def test_at_the_end_there_is_no_time_for_pauses():
    book = Notebook(fail_start=1)
    scribe = Scribe(book, BEGIN, pause_s=3600.0)
    while not scribe.errors:
        time.sleep(0.001)
    ended(scribe)  # it waits an hour, unless it is told
    assert book.lines == []


# A package that is not there.


def test_a_missing_package_is_one_clear_line_and_no_more_tries(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    caplog.set_level(logging.WARNING)
    scribe = Scribe(Wandb(), BEGIN, pause_s=0.001)
    assert scribe.join(10.0)
    scribe.put(log(0))  # nobody reads it, and nobody minds
    assert scribe.errors == 1
    assert caplog.text.count("logger wandb is off") == 1
    assert "pip install 'distbelief[wandb]'" in caplog.text


@pytest.mark.parametrize(("name", "module"), [(n, n) for n in MAKERS])
def test_each_says_what_to_install(monkeypatch, name, module):
    for loaded in [m for m in sys.modules if m.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Missing, match=rf"the package {module} is not installed; pip install"):
        MAKERS[name]().start(BEGIN)


def test_a_package_that_lacks_something_of_its_own_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "halfthere.py").write_text("import its_own_need_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="its_own_need"):
        package("halfthere", "half")


def test_flat():
    assert flat(CONFIG) == {"train.lr": 0.1, "train.n_push": 1, "seed": 3}


# Trackers, beside stand-ins. Arguments are bound to the signatures of the packages' documentation,
# so that a name that they do not know is an error here too.


def bind(calls, name, signature):
    """A function that writes down how it was called, and refuses what the signature does not know.

    signature: a function of the same arguments."""
    known = inspect.signature(signature)

    def call(*args, **kwargs):
        bound = known.bind(*args, **kwargs)
        calls.append((name, dict(bound.arguments)))

    return call


def _wandb_init(
    entity=None, project=None, dir=None, id=None, name=None, config=None, resume=None, settings=None
):
    """Those of its arguments that matter here."""


def test_wandb(monkeypatch):
    calls: list[Any] = []
    run_of_theirs = SimpleNamespace(
        log=bind(calls, "log", lambda data, step=None, commit=None: None),
        finish=bind(calls, "finish", lambda exit_code=None: None),
    )
    theirs: Any = ModuleType("wandb")
    init = bind(calls, "init", _wandb_init)
    theirs.init = lambda **kwargs: init(**kwargs) or run_of_theirs
    theirs.Histogram = lambda sequence=None, np_histogram=None, num_bins=64: np_histogram
    monkeypatch.setitem(sys.modules, "wandb", theirs)
    wandb = Wandb()
    wandb.start(BEGIN)
    wandb.log({"train/loss": 2.5}, 7)
    wandb.histogram("staleness/updates", [0.0, 1.0, 2.0], [3, 4], 7)
    wandb.event(CRASH, 7)
    wandb.finish("failed")
    (_, began), *rest = calls
    assert began["id"] == "7f3ac1"
    assert (began["project"], began["resume"]) == ("distbelief", "allow")
    assert began["config"] == CONFIG
    assert rest == [
        ("log", {"data": {"train/loss": 2.5}, "step": 7}),
        ("log", {"data": {"staleness/updates": ([3, 4], [0.0, 1.0, 2.0])}, "step": 7}),
        ("log", {"data": {"events/crash": 1}, "step": 7}),
        ("finish", {"exit_code": 1}),
    ]


@pytest.mark.parametrize("is_known", [False, True])
def test_mlflow(monkeypatch, is_known):
    calls: list[Any] = []

    class Client:
        def get_experiment_by_name(self, name):
            return SimpleNamespace(experiment_id="e7") if is_known else None

        def create_experiment(self, name, artifact_location=None, tags=None):
            assert not is_known
            return "e8"

        def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
            calls.append(("create_run", experiment_id, tags["distbelief.run"]))
            return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

        def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
            calls.append(("log_batch", run_id, list(metrics), list(params)))

        def set_terminated(self, run_id, status=None, end_time=None):
            calls.append(("set_terminated", run_id, status))

    theirs: Any = ModuleType("mlflow")
    entities: Any = ModuleType("mlflow.entities")
    theirs.MlflowClient = Client
    theirs.__path__ = []
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)
    entities.Param = lambda key, value: (key, value)
    monkeypatch.setitem(sys.modules, "mlflow", theirs)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    mlflow = Mlflow()
    mlflow.start(BEGIN)
    mlflow.start(BEGIN)  # as after an error on the way: no second run
    mlflow.log({"train/loss": 2.5}, 7)
    mlflow.histogram("staleness/updates", [0.0, 1.0], [3], 7)
    mlflow.event(CRASH, 8)
    mlflow.finish("stopped")
    params = [("train.lr", "0.1"), ("train.n_push", "1"), ("seed", "3")]
    assert calls == [
        ("create_run", "e7" if is_known else "e8", "7f3ac1"),
        ("log_batch", "r1", [], params),
        ("log_batch", "r1", [], params),
        ("log_batch", "r1", [("train/loss", 2.5, 7)], []),
        ("log_batch", "r1", [("events/crash", 1.0, 8)], []),
        ("set_terminated", "r1", "KILLED"),
    ]


def _trackio_init(
    project,
    name=None,
    config=None,
    resume="never",
    embed=True,
    auto_log_gpu=None,
    auto_log_cpu=None,
):
    """Those of its arguments that matter here."""


def test_trackio(monkeypatch):
    calls: list[Any] = []
    run_of_theirs = SimpleNamespace(
        log=bind(calls, "log", lambda metrics, step=None: None),
        finish=bind(calls, "finish", lambda: None),
    )
    theirs: Any = ModuleType("trackio")
    init = bind(calls, "init", _trackio_init)
    theirs.init = lambda *args, **kwargs: init(*args, **kwargs) or run_of_theirs
    theirs.Histogram = lambda sequence=None, np_histogram=None, num_bins=64: np_histogram
    monkeypatch.setitem(sys.modules, "trackio", theirs)
    trackio = Trackio()
    trackio.start(BEGIN)
    trackio.log({"train/loss": 2.5}, 7)
    trackio.histogram("staleness/updates", [0.0, 1.0], [3], 7)
    trackio.event(CRASH, 8)
    trackio.finish("done")
    (_, began), *rest = calls
    assert (began["project"], began["name"]) == ("distbelief", "digits-7f3ac1")
    assert began["config"] == flat(CONFIG)
    assert rest == [
        ("log", {"metrics": {"train/loss": 2.5}, "step": 7}),
        ("log", {"metrics": {"staleness/updates": ([3], [0.0, 1.0])}, "step": 7}),
        ("log", {"metrics": {"events/crash": 1}, "step": 8}),
        ("finish", {}),
    ]


def test_end_without_a_word_is_no_success():
    book = Notebook()
    loggers = Loggers(["notebook"], {"notebook": lambda: book})
    loggers.take(BEGIN)
    loggers.take(End(at=1e9, result={"exit": "failed"}))
    loggers.finish()
    assert book.lines[-1] == ("finish", "failed")
