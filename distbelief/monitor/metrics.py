"""Metrics: the run as Prometheus reads it. docs/observability.md says what each of them means.

Metrics takes the same messages as the Store and keeps what a Source cannot say afterwards: totals
and histograms since the monitor began. What is of this moment it asks the Source when it is read.

1. What has a total in its report (updates, samples, restarts) is right again with the next report,
   however many were lost. What has none (histograms, bytes, phases) lacks what lost reports held;
   `distbelief_monitor_dropped_records_total` says how many those were.
2. Counters never fall: a worker's begin anew with its next incarnation, and are added up; a shard
   that goes on from a snapshot counts again only what is beyond what it had reached.
3. Labels are bounded: names of shards, of up to `per_worker` workers and their nodes, and words of
   closed lists. No address, no number of a process, no text of an error.
4. What is not known has no sample.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import compress, repeat
from typing import Any, Literal

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder

from distbelief.chronicle import KINDS, AnyEntry, Begin, Event, RunReport
from distbelief.monitor.fleet import natural
from distbelief.monitor.source import PHASES, STATUSES, Json, Source
from distbelief.monitor.tally import Tally
from distbelief.param_server.report import AnyReport, Report, ShardReport, WorkerReport

PER_WORKER = 256
"""Workers up to which each has series of its own."""
WORST = 20
"""Above that so many have."""
STAY_S = 300.0
"""At least so long: series that come and go cost Prometheus more than those that stay."""
WORKERS_MAX = 8192
SHARDS_MAX = 1024
TEXT_MAX = 64
OPEN_MAX = 8192
"""Values that wait to be counted."""

UPDATES = (0.0, *(float(2**i) for i in range(14)))
RATIOS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0)
STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TRIP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
APPLY_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
SAVE_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
NORMS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)

REASONS = ("killed", "ended", "frozen", "quarantined", "other")
"""Why a worker was lost."""
_SIGNS = (
    ("quarantine", "quarantined"),
    ("refused", "quarantined"),
    ("nothing for", "frozen"),
    ("frozen", "frozen"),
    ("signal", "killed"),
    ("killed", "killed"),
    ("exit", "ended"),
    ("ended", "ended"),
)
"""Words in a crash's text -> reason; the first that is there."""
HEARD_KINDS = tuple(kind for kind in KINDS if kind not in ("slow", "well"))
"""Events that the launcher tells; those two are the monitor's own."""

Kind = Literal["counter", "gauge", "histogram", "info"]
LoggerCounts = Callable[[], Mapping[str, tuple[int, int]]]
"""Logger -> (errors, records dropped)."""


@dataclass(frozen=True, slots=True)
class Family:
    """A metric as it is documented."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    text: str


_SHARD, _WORKER = ("shard",), ("worker", "node")
FAMILIES = {
    family.name: family
    for family in (
        Family(
            "distbelief_run_info",
            "info",
            ("run", "version", "algorithm", "optimizer"),
            "The run; always 1.",
        ),
        Family("distbelief_run_state", "gauge", ("state",), "1 for the state that the run is in."),
        Family(
            "distbelief_run_start_timestamp_seconds",
            "gauge",
            (),
            "When this attempt of the run began, unix time.",
        ),
        Family(
            "distbelief_progress_ratio", "gauge", (), "Share of the run's target that is done, 0-1."
        ),
        Family("distbelief_updates_total", "counter", _SHARD, "Whole pushes applied by a shard."),
        Family(
            "distbelief_samples_total",
            "counter",
            (),
            "Samples trained on, as the controller counts them.",
        ),
        Family("distbelief_train_loss", "gauge", (), "Mean loss of the newest samples."),
        Family("distbelief_validation_loss", "gauge", (), "Loss of the newest evaluation."),
        Family(
            "distbelief_staleness_updates",
            "histogram",
            (),
            "Updates of other workers that an applied part of a push had missed.",
        ),
        Family(
            "distbelief_staleness_ratio",
            "histogram",
            (),
            "The same as a multiple of the fair share at that time.",
        ),
        Family(
            "distbelief_fair_share_updates",
            "gauge",
            (),
            "Staleness that each worker would have if all were equally quick.",
        ),
        Family("distbelief_workers", "gauge", ("status",), "Workers by status."),
        Family("distbelief_workers_target", "gauge", (), "Workers that the run was asked for."),
        Family(
            "distbelief_step_phase_seconds",
            "histogram",
            ("phase",),
            "Time that a step spent in a phase.",
        ),
        Family(
            "distbelief_fetch_duration_seconds",
            "histogram",
            _SHARD,
            "Round trip of a fetch to a shard, as its worker has timed it.",
        ),
        Family(
            "distbelief_push_duration_seconds",
            "histogram",
            _SHARD,
            "Round trip of a push to a shard, as its worker has timed it.",
        ),
        Family(
            "distbelief_apply_duration_seconds",
            "histogram",
            _SHARD,
            "Time that a shard took to handle a push.",
        ),
        Family(
            "distbelief_shard_queue_messages",
            "gauge",
            _SHARD,
            "Most messages that waited at once in the shard's last report.",
        ),
        Family(
            "distbelief_shard_version", "gauge", _SHARD, "Smallest version of the shard's parts."
        ),
        Family(
            "distbelief_shard_parameters_bytes",
            "gauge",
            _SHARD,
            "Parameters that the shard hosts, 4 bytes each.",
        ),
        Family(
            "distbelief_network_transmit_bytes_total",
            "counter",
            ("shard", "direction"),
            "Bytes that the shard sent or received; shared memory counts too.",
        ),
        Family(
            "distbelief_gradient_norm",
            "histogram",
            (),
            "L2 norm of gradients, where it is measured.",
        ),
        Family(
            "distbelief_worker_restarts_total",
            "counter",
            ("reason",),
            "Times that a worker was lost, by what it was lost of.",
        ),
        Family("distbelief_events_total", "counter", ("kind",), "Events of the run by kind."),
        Family(
            "distbelief_checkpoint_last_success_timestamp_seconds",
            "gauge",
            (),
            "When the oldest of the shards' newest snapshots was taken, unix time.",
        ),
        Family(
            "distbelief_checkpoint_interval_seconds",
            "gauge",
            (),
            "Seconds from one snapshot to the next, as configured.",
        ),
        Family(
            "distbelief_checkpoint_duration_seconds",
            "histogram",
            (),
            "Time that a shard took to write a snapshot.",
        ),
        Family(
            "distbelief_monitor_dropped_records_total",
            "counter",
            (),
            "Reports and lines that never reached the monitor.",
        ),
        Family(
            "distbelief_monitor_last_report_timestamp_seconds",
            "gauge",
            (),
            "When the monitor last heard of the run, unix time.",
        ),
        Family("distbelief_logger_errors_total", "counter", ("logger",), "Errors of a logger."),
        Family(
            "distbelief_logger_dropped_total",
            "counter",
            ("logger",),
            "Records that a logger never got: it was too slow, or failed too often.",
        ),
        Family(
            "distbelief_worker_staleness_updates", "gauge", _WORKER, "Updates that it is behind."
        ),
        Family(
            "distbelief_worker_last_push_timestamp_seconds",
            "gauge",
            _WORKER,
            "When its last step with a push ended, unix time of its node.",
        ),
        Family(
            "distbelief_worker_phase_seconds_total",
            "counter",
            (*_WORKER, "phase"),
            "Time that it spent in a phase.",
        ),
    )
}
"""Every metric, in the order in which they are exported."""


@dataclass(slots=True)
class _Heard:
    """The newest report of a process."""

    inc: int
    n: int


@dataclass(slots=True)
class _Shard:
    updates: int = 0
    version: int = 0
    queue: int = 0
    parameters: int = 0
    saved_at: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    apply_s: Tally = field(default_factory=lambda: Tally(APPLY_S))


class Metrics:
    """See the top of this file. Used by one thread."""

    def __init__(self, per_worker: int = PER_WORKER, loggers: LoggerCounts | None = None) -> None:
        """loggers: asked for their counts when metrics are read."""
        self._per_worker, self._loggers = per_worker, loggers
        self._heard: dict[str, _Heard] = {}
        self._shards: dict[str, _Shard] = {}
        self._num_shards = 0
        """As configured."""
        self._per_fetch = 1.0
        self._staleness, self._ratio = Tally(UPDATES), Tally(RATIOS)
        self._norms, self._save_s = Tally(NORMS), Tally(SAVE_S)
        self._phases = [Tally(STEP_S) for _ in PHASES]
        self._trip_s: tuple[dict[str, Tally], dict[str, Tally]] = ({}, {})
        """Of fetches and of pushes, by shard."""
        self._rows: dict[str, int] = {}
        """Worker -> its place in the next two."""
        self._pushed_at: list[float | None] = []
        self._spent_s = np.zeros((64, len(PHASES)))
        # Taken, and not counted yet: all together they cost a tenth of what each would alone.
        self._steps: tuple[list[Any], ...] = ([], [], [], [], [], [])  # Any: int, then floats
        """Rows of workers, phases in the order of PHASES, norms."""
        self._trips: tuple[list[int], list[bool], list[float]] = ([], [], [])
        self._samples: int | None = None
        self._restarts: dict[str, int] = {}
        """Times lost, by worker."""
        self._reasons: Counter[str] = Counter()
        self._lost_of: dict[str, str] = {}
        """Worker -> reason of its newest crash that is not counted yet."""
        self._events: Counter[str] = Counter()
        self._lost_reports = 0
        self._lost_lines = 0
        self._is_told = False
        self._began_at: float | None = None
        self._save_every_s: float | None = None
        self._worst: dict[str, float] = {}
        """Workers with series of their own in a large fleet -> since when."""

    # What is told.

    def take(self, message: AnyReport | AnyEntry) -> None:
        """One message of the run: reports and the chronicle."""
        if isinstance(message, WorkerReport):
            if self._is_new(message, WORKERS_MAX):
                self._take_worker(message)
        elif isinstance(message, ShardReport):
            if self._is_new(message, WORKERS_MAX + SHARDS_MAX):
                self._take_shard(message)
        elif isinstance(message, Begin):
            self._take_begin(message)
        elif isinstance(message, RunReport):
            self._take_run(message)
        elif isinstance(message, Event):
            self._take_event(message)

    def _is_new(self, r: Report, room: int) -> bool:
        """Counts the reports that should have come before it."""
        heard = self._heard.get(r.name)
        if heard is None:
            if len(self._heard) >= room:
                return False
            # What it said before the monitor was there is no loss.
            self._heard[r.name] = _Heard(r.inc, r.n)
            return True
        if (r.inc, r.n) <= (heard.inc, heard.n):
            return False
        self._lost_reports += r.n - 1 - (heard.n if r.inc == heard.inc else 0)
        heard.inc, heard.n = r.inc, r.n
        return True

    def _take_worker(self, r: WorkerReport) -> None:
        """Cheap, as there may be thousands a second."""
        row = self._rows.get(r.name)
        if row is None:
            row = self._rows[r.name] = len(self._pushed_at)
            self._pushed_at.append(None)
        if r.has_push:
            if r.has_push[-1]:
                self._pushed_at[row] = r.end[-1]
            elif True in r.has_push:
                self._pushed_at[row] = max(compress(r.end, r.has_push))
        rows, compute, fetch, push, data, norm = self._steps
        rows.extend(repeat(row, len(r.end)))
        compute.extend(r.compute_s)
        fetch.extend(r.fetch_s)
        push.extend(r.push_s)
        data.extend(r.data_s)
        norm.extend(r.grad_norm)
        shards, is_push, trip_s = self._trips
        shards.extend(r.trip_shard)
        is_push.extend(r.trip_is_push)
        trip_s.extend(r.trip_s)
        if len(trip_s) > OPEN_MAX or len(rows) > OPEN_MAX:
            self._count()

    def _count(self) -> None:
        """Count what was taken."""
        rows = np.array(self._steps[0], np.int64)
        while len(self._spent_s) < len(self._rows):
            self._spent_s = np.concatenate((self._spent_s, np.zeros_like(self._spent_s)))
        for i, tally in enumerate(self._phases):
            column = np.array(self._steps[1 + i], np.float64)
            spent = np.bincount(rows, np.maximum(column, 0.0), len(self._spent_s))
            self._spent_s[:, i] += spent
            tally.add_all(column)
        self._norms.add_all(np.array(self._steps[-1], np.float64))
        shards = np.array(self._trips[0], np.int64)
        is_push = np.array(self._trips[1], np.bool_)
        trip_s = np.array(self._trips[2], np.float64)
        for i in np.unique(shards).tolist():
            for which in (False, True):
                trips = self._trip_tally(i, which)
                if trips is not None:
                    trips.add_all(trip_s[(shards == i) & (is_push == which)])
        for values in (*self._steps, *self._trips):
            values.clear()

    def _trip_tally(self, i: int, is_push: bool) -> Tally | None:
        """None for a shard that there is not: workers may say any number."""
        trips, name = self._trip_s[is_push], f"shard{i}"
        tally = trips.get(name)
        if tally is None and (i < self._num_shards or name in self._shards):
            tally = trips[name] = Tally(TRIP_S)
        return tally

    def _take_shard(self, r: ShardReport) -> None:
        shard = self._shards.get(r.name)
        if shard is None:
            if len(self._shards) >= SHARDS_MAX:
                return
            shard = self._shards[r.name] = _Shard()
        shard.updates = max(shard.updates, r.updates)
        shard.version, shard.queue, shard.parameters = r.version, r.queue, r.parameters
        shard.sent_bytes += r.sent_bytes
        shard.received_bytes += r.received_bytes
        shard.apply_s.add_all(r.apply_s)
        if r.saved_at > shard.saved_at:
            shard.saved_at = r.saved_at
            self._save_s.add(r.save_s)
        fair = (r.num_workers - 1) * (self._per_fetch + 1) / 2
        stale, times = np.array(r.stale_value, np.float64), np.array(r.stale_count, np.float64)
        self._staleness.add_all(stale, times)
        if fair > 0:
            self._ratio.add_all(stale / fair, times)

    def _take_begin(self, begin: Begin) -> None:
        self._num_shards = min(begin.num_shards, SHARDS_MAX)
        self._began_at = begin.at
        train, save = begin.config.get("train"), begin.config.get("save")
        n_fetch, n_push = _number(train, "n_fetch"), _number(train, "n_push")
        self._per_fetch = max(1.0, n_fetch / n_push) if n_fetch and n_push else 1.0
        self._save_every_s = _number(save, "every_s") or None

    def _take_run(self, run: RunReport) -> None:
        self._is_told = True
        self._samples = max(self._samples or 0, run.samples)
        self._lost_lines = max(self._lost_lines, run.dropped)
        for worker in run.workers:
            before = self._restarts.get(worker.name, 0)
            if worker.restarts > before and len(self._restarts) < WORKERS_MAX:
                self._restarts[worker.name] = worker.restarts
                self._reasons[self._lost_of.pop(worker.name, "other")] += 1
                self._reasons["other"] += worker.restarts - before - 1

    def _take_event(self, event: Event) -> None:
        if event.kind in HEARD_KINDS:
            self._events[event.kind] += 1
        if event.kind == "crash" and len(self._lost_of) < WORKERS_MAX:
            self._lost_of[event.who] = reason(event)

    # What is read.

    def render(self, source: Source, accept: str = "") -> tuple[bytes, str]:
        """(body, content type) as the reader's Accept asks for: text 0.0.4 or OpenMetrics."""
        encode, content_type = choose_encoder(accept)
        registry = CollectorRegistry()
        registry.register(_Scrape(self._collect(source)))
        return encode(registry), content_type

    def _collect(self, source: Source) -> list[Metric]:
        self._count()
        meta, snapshot = source.meta(), source.snapshot()
        kpi = snapshot["kpi"]
        families = [
            *self._of_run(meta, snapshot, kpi),
            *self._of_staleness(kpi),
            *self._of_steps(),
            *self._of_shards(),
            *self._of_losses(),
            *self._of_workers(source, meta["t"]),
        ]
        order = list(FAMILIES)
        families.sort(key=lambda family: order.index(_full_name(family)))
        return [family for family in families if family.samples]

    def _of_run(self, meta: Json, snapshot: Json, kpi: Json) -> Iterator[Metric]:
        info = InfoMetricFamily("distbelief_run", FAMILIES["distbelief_run_info"].text)
        if meta["run"] is not None:
            told = {"run": meta["run"], "version": meta["version"], "algorithm": meta["algo"]}
            told["optimizer"] = meta["optimizer"] or "none"
            info.add_metric([], {key: str(value)[:TEXT_MAX] for key, value in told.items()})
        yield info
        yield _gauge("distbelief_run_state", [((meta["state"],), 1.0)])
        yield _gauge("distbelief_run_start_timestamp_seconds", [((), self._began_at)])
        yield _gauge("distbelief_progress_ratio", [((), kpi["progress"]["share"])])
        yield _counter("distbelief_samples_total", [((), self._samples)])
        yield _gauge("distbelief_train_loss", [((), kpi["loss"])])
        yield _gauge("distbelief_validation_loss", [((), kpi["val_loss"])])
        by_status, target = kpi["workers"]["by_status"], kpi["workers"]["target"]
        heard = snapshot["age_s"] is not None
        statuses = [((s,), by_status.get(s, 0)) for s in STATUSES] if heard else []
        yield _gauge("distbelief_workers", statuses)
        yield _gauge("distbelief_workers_target", [((), target)])
        age_s = snapshot["age_s"]
        last = None if age_s is None else meta["t"] - age_s
        yield _gauge("distbelief_monitor_last_report_timestamp_seconds", [((), last)])

    def _of_staleness(self, kpi: Json) -> Iterator[Metric]:
        yield _histogram("distbelief_staleness_updates", [((), self._staleness)])
        yield _histogram("distbelief_staleness_ratio", [((), self._ratio)])
        yield _gauge("distbelief_fair_share_updates", [((), kpi["staleness"]["fair"])])

    def _of_steps(self) -> Iterator[Metric]:
        phases = [((phase,), tally) for phase, tally in zip(PHASES, self._phases, strict=True)]
        yield _histogram("distbelief_step_phase_seconds", phases)
        fetches, pushes = self._trip_s
        yield _histogram("distbelief_fetch_duration_seconds", _by_name(fetches))
        yield _histogram("distbelief_push_duration_seconds", _by_name(pushes))
        yield _histogram("distbelief_gradient_norm", [((), self._norms)])

    def _of_shards(self) -> Iterator[Metric]:
        shards = [(name, self._shards[name]) for name in sorted(self._shards, key=natural)]
        yield _counter("distbelief_updates_total", [((name,), s.updates) for name, s in shards])
        applied = [((name,), s.apply_s) for name, s in shards]
        yield _histogram("distbelief_apply_duration_seconds", applied)
        yield _gauge("distbelief_shard_queue_messages", [((name,), s.queue) for name, s in shards])
        yield _gauge("distbelief_shard_version", [((name,), s.version) for name, s in shards])
        sizes = [((name,), 4 * s.parameters) for name, s in shards]
        yield _gauge("distbelief_shard_parameters_bytes", sizes)
        moved: list[tuple[tuple[str, ...], float | None]] = []
        for name, s in shards:
            moved += [((name, "sent"), s.sent_bytes), ((name, "received"), s.received_bytes)]
        yield _counter("distbelief_network_transmit_bytes_total", moved)
        saved = [s.saved_at for _, s in shards]
        # Of the whole run nothing is saved before each of its shards is.
        is_whole = saved and min(saved) > 0 and len(saved) >= self._num_shards
        oldest = min(saved) if is_whole else None
        yield _gauge("distbelief_checkpoint_last_success_timestamp_seconds", [((), oldest)])
        yield _gauge("distbelief_checkpoint_interval_seconds", [((), self._save_every_s)])
        yield _histogram("distbelief_checkpoint_duration_seconds", [((), self._save_s)])

    def _of_losses(self) -> Iterator[Metric]:
        """What was lost on the way: workers, reports and records."""
        reasons = [((r,), self._reasons[r]) for r in REASONS] if self._is_told else []
        yield _counter("distbelief_worker_restarts_total", reasons)
        events = [((kind,), self._events[kind]) for kind in HEARD_KINDS] if self._is_told else []
        yield _counter("distbelief_events_total", events)
        dropped = self._lost_reports + self._lost_lines
        yield _counter("distbelief_monitor_dropped_records_total", [((), dropped)])
        counts = self._loggers() if self._loggers is not None else {}
        errors = [((name,), one) for name, (one, _) in counts.items()]
        yield _counter("distbelief_logger_errors_total", errors)
        records = [((name,), one) for name, (_, one) in counts.items()]
        yield _counter("distbelief_logger_dropped_total", records)

    def _of_workers(self, source: Source, now: float) -> Iterator[Metric]:
        lags: list[tuple[tuple[str, ...], float | None]] = []
        pushed: list[tuple[tuple[str, ...], float | None]] = []
        spent: list[tuple[tuple[str, ...], float | None]] = []
        for item in self._chosen(source, now):
            labels = (item["id"], item["node"] or "")
            lags.append((labels, item["lag"]))
            row = self._rows.get(item["id"])
            if row is not None:
                pushed.append((labels, self._pushed_at[row]))
                for phase, seconds in zip(PHASES, self._spent_s[row].tolist(), strict=True):
                    spent.append(((*labels, phase), seconds))
        yield _gauge("distbelief_worker_staleness_updates", lags)
        yield _gauge("distbelief_worker_last_push_timestamp_seconds", pushed)
        yield _counter("distbelief_worker_phase_seconds_total", spent)

    def _chosen(self, source: Source, now: float) -> list[Json]:
        """Workers that have series of their own."""
        there = ",".join(status for status in STATUSES if status != "left")
        worst = source.workers(sort="-ratio", limit=WORST, status=there)
        if worst["total"] <= self._per_worker:
            self._worst.clear()
            items: list[Json] = []
            cursor: str | None = ""
            while cursor is not None:
                answer = source.workers(
                    sort="id", limit=self._per_worker, cursor=cursor, status=there
                )
                items += answer["items"]
                cursor = answer["next"]
            return items
        items = [item for item in worst["items"] if item["ratio"] is not None]
        self._worst = stable(self._worst, [item["id"] for item in items], now)
        known = {item["id"]: item for item in worst["items"]}
        chosen = [known.get(name) or _one(source, name) for name in self._worst]
        return [item for item in chosen if item is not None]


class _Scrape:
    """What one reader gets, as prometheus_client's registry wants it."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def stable(kept: Mapping[str, float], worst: list[str], now: float) -> dict[str, float]:
    """Names with series of their own -> since when: WORST at most.

    Who is no more among the worst stays until its STAY_S are over; only then is there room.
    """
    among = set(worst)
    stay = {name: at for name, at in kept.items() if name in among or 0 <= now - at < STAY_S}
    for name in worst:
        if len(stay) >= WORST:
            break
        stay.setdefault(name, now)
    return stay


def reason(event: Event) -> str:
    """Of a crash: a word of REASONS, from its detail, or from words that are in its text."""
    told = event.detail.get("reason")
    if told in REASONS:
        return str(told)
    return next((word for sign, word in _SIGNS if sign in event.text), "other")


def _one(source: Source, name: str) -> Json | None:
    """A worker that stays although it is among the worst no more."""
    found = source.workers(sort="id", limit=WORKERS_MAX, q=name)["items"]
    return next((item for item in found if item["id"] == name and item["status"] != "left"), None)


def _number(section: Any, name: str) -> float:  # Any: JSON
    value = section.get(name) if isinstance(section, dict) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and value > 0 else 0.0  # type: ignore[arg-type, operator]


Samples = Iterable[tuple[tuple[str, ...], float | None]]


def _gauge(name: str, samples: Samples) -> Metric:
    about = FAMILIES[name]
    family = GaugeMetricFamily(name, about.text, labels=about.labels)
    for labels, value in samples:
        if value is not None:
            family.add_metric(labels, value)
    return family


def _counter(name: str, samples: Samples) -> Metric:
    about = FAMILIES[name]
    family = CounterMetricFamily(name, about.text, labels=about.labels)
    for labels, value in samples:
        if value is not None:
            family.add_metric(labels, value)
    return family


def _histogram(name: str, tallies: Iterable[tuple[tuple[str, ...], Tally]]) -> Metric:
    about = FAMILIES[name]
    family = HistogramMetricFamily(name, about.text, labels=about.labels)
    for labels, tally in tallies:
        if len(tally):
            family.add_metric(labels, tally.buckets(), tally.sum)
    return family


def _by_name(tallies: dict[str, Tally]) -> list[tuple[tuple[str, ...], Tally]]:
    return [((name,), tallies[name]) for name in sorted(tallies, key=natural)]


def _full_name(family: Metric) -> str:
    """As it is exported: prometheus_client keeps names without their endings."""
    return family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
