"""Loggers: what the monitor knows goes every few seconds to TensorBoard, W&B, MLflow or trackio.

    loop's thread    tick, take ──► queue of a logger ──► its own thread ──► the logger

Nothing here waits for a logger: a queue that is full loses its oldest record, an error is counted
and warned of once, and one that hangs keeps its own thread and nothing else. At the end all of them
together have FINISH_S; who needs longer is left behind.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from distbelief.chronicle import AnyEntry, Begin, End, Event
from distbelief.monitor.logger import Logger, Maker, Missing
from distbelief.monitor.source import Source
from distbelief.monitor.tensorboard import TensorBoard
from distbelief.monitor.tracker import Mlflow, Trackio, Wandb
from distbelief.param_server.report import AnyReport

logger = logging.getLogger(__name__)

EVERY_S = 5.0
QUEUE = 1000
"""Records of one logger that wait: more than half an hour of them."""
TRIES = 3
"""Then a record is given up: it may be the record that is wrong."""
PAUSE_S, PAUSE_MAX_S = 1.0, 60.0
"""After an error; twice as long after the next."""
FINISH_S = 5.0

MAKERS: Mapping[str, Maker] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}
"""What `monitor.log` may name."""

TAGS = {
    "train/loss": ("loss",),
    "val/loss": ("val_loss",),
    "val/top1": ("val_top1",),
    "perf/samples_per_second": ("samples_per_s",),
    "perf/updates_per_second": ("updates_per_s",),
    "staleness/p50": ("staleness", "p50"),
    "staleness/p95": ("staleness", "p95"),
    "staleness/max": ("staleness", "max"),
}
"""Tag -> where it is in a snapshot's kpi."""
HISTOGRAM = "staleness/updates"

Record = Callable[[Logger], None]


class Scribe:
    """A logger with its queue and its thread."""

    def __init__(self, writer: Logger, begin: Begin, pause_s: float = PAUSE_S) -> None:
        self.name = writer.name
        self.errors = 0
        self.dropped = 0
        self._logger, self._begin, self._pause_s = writer, begin, pause_s
        self._failed = 0
        """Errors in a row."""
        self._has_warned = False
        self._records: deque[Record] = deque()
        self._changed = threading.Condition()
        self._status: str | None = None
        """How the run has ended; None while it goes on."""
        # A daemon: whoever ends the process does not wait for a logger that hangs.
        self._thread = threading.Thread(target=self._run, name=f"log-{self.name}", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Never waits. Its lock is held for moments only, and never while a logger is at work."""
        with self._changed:
            if len(self._records) >= QUEUE:
                self._records.popleft()
                self.dropped += 1
            self._records.append(record)
            self._changed.notify()

    def end(self, status: str) -> None:
        """There is nothing more to come."""
        with self._changed:
            self._status = status
            self._changed.notify()

    def join(self, timeout_s: float) -> bool:
        """Returns: whether it has finished."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # In its thread

    def _run(self) -> None:
        try:
            if not self._start():
                return
        except Missing as missing:
            self.errors += 1
            logger.warning("%s", missing)
            return
        while (record := self._next()) is not None:
            self._write(record)
        status = self._status or ""
        self._try(lambda one: one.finish(status))

    def _start(self) -> bool:
        """Returns: False if the run has ended before it could be started."""
        while not self._try(lambda one: one.start(self._begin)):
            if not self._pause():
                return False
        return True

    def _next(self) -> Record | None:
        """Wait for it. None: there is none left, and none will come."""
        with self._changed:
            while not self._records:
                if self._status is not None:
                    return None
                self._changed.wait()
            return self._records.popleft()

    def _write(self, record: Record) -> None:
        for _ in range(TRIES):
            if self._try(record):
                return
            if not self._pause():
                break
        with self._changed:
            self.dropped += 1

    def _try(self, record: Record) -> bool:
        try:
            record(self._logger)
        except Missing:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a logger does, the run goes on
            self.errors += 1
            self._failed += 1
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "logger %s failed, and is tried again; later errors are only counted: %s: %s",
                    self.name,
                    type(error).__name__,
                    error,
                )
            return False
        self._failed = 0
        return True

    def _pause(self) -> bool:
        """After an error. Returns: False if the run has ended, when there is no time for one."""
        pause_s = min(PAUSE_MAX_S, self._pause_s * 2 ** min(self._failed - 1, 10))
        with self._changed:
            self._changed.wait_for(lambda: self._status is not None, pause_s)
            return self._status is None


class Loggers:
    """See the top of this file. Used by one thread, which never waits but in `finish`."""

    def __init__(
        self,
        names: Iterable[str],
        makers: Mapping[str, Maker] = MAKERS,
        pause_s: float = PAUSE_S,
    ) -> None:
        self._makers: dict[str, Maker] = {}
        for name in names:
            if name in makers:
                self._makers[name] = makers[name]
            else:
                known = ", ".join(makers)
                logger.warning("there is no logger %r; monitor.log may name %s", name, known)
        self._pause_s = pause_s
        self._scribes: list[Scribe] = []
        self._read_at: float | None = None
        self._step = 0
        self._written_step = -1
        self._val: dict[str, float] = {}
        """What was last logged of an evaluation: it is logged once, not every few seconds."""
        self._status = ""

    def counts(self) -> dict[str, tuple[int, int]]:
        """Logger -> (errors, records dropped)."""
        counts = dict.fromkeys(self._makers, (0, 0))
        return counts | {scribe.name: (scribe.errors, scribe.dropped) for scribe in self._scribes}

    def take(self, message: AnyReport | AnyEntry) -> None:
        """One message of the run, as the Store takes them. Loggers start with its beginning."""
        if isinstance(message, Begin):
            if not self._scribes:
                self._scribes = [
                    Scribe(make(), message, self._pause_s) for make in self._makers.values()
                ]
        elif isinstance(message, Event):
            event, step = message, self._step
            self._put(lambda one: one.event(event, step))
        elif isinstance(message, End):
            self._status = str(message.result.get("exit", ""))

    def tick(self, source: Source, now: float) -> None:
        """To be called about once a second; reads the source every EVERY_S."""
        if not self._scribes or (self._read_at is not None and 0 <= now - self._read_at < EVERY_S):
            return
        self._read_at = now
        self._read(source)

    def finish(self, source: Source | None = None, timeout_s: float = FINISH_S) -> None:
        """Log what is new and have all of them finish, in timeout_s together."""
        if source is not None and self._scribes:
            self._read(source)
        deadline = time.monotonic() + timeout_s
        for scribe in self._scribes:
            scribe.end(self._status or "lost")
        for scribe in self._scribes:
            if not scribe.join(max(0.0, deadline - time.monotonic())):
                logger.warning(
                    "logger %s has not finished in %.0f s and is left behind",
                    scribe.name,
                    timeout_s,
                )

    def _read(self, source: Source) -> None:
        kpi = source.snapshot()["kpi"]
        if kpi["progress"]["updates"] is None:
            return
        # A shard that was lost may go back a little; steps of loggers never do.
        self._step = step = max(self._step, kpi["progress"]["updates"])
        values: dict[str, float] = {}
        for tag, path in TAGS.items():
            value = kpi
            for key in path:
                value = value[key]
            if value is not None:
                values[tag] = float(value)
        val = {tag: values.pop(tag) for tag in list(values) if tag.startswith("val/")}
        if val and val != self._val:
            self._val = val
            self._put(lambda one: one.log(val, step))
        if step == self._written_step:  # nothing was trained meanwhile
            return
        self._written_step = step
        if values:
            self._put(lambda one: one.log(values, step))
        spread = source.distribution()
        if spread["n"]:
            edges, counts = spread["edges"], spread["count"]
            self._put(lambda one: one.histogram(HISTOGRAM, edges, counts, step))

    def _put(self, record: Record) -> None:
        for scribe in self._scribes:
            scribe.put(record)
