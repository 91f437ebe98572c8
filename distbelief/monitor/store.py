"""Store: all that the monitor knows of a run, and the answers to what may be asked of it.

It takes messages and closes a second whenever `advance` is called; `now` is always an argument.
What was not heard of is None. Everything is bounded, whatever is told. Used by one thread.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from distbelief.chronicle import AnyEntry, Begin, Evaluated, Event, RunReport, decode, encode
from distbelief.monitor.diagnosis import LAW, LAW_PARTS, Diagnosis, Facts, slack
from distbelief.monitor.events import EventLog
from distbelief.monitor.fleet import DOWN, LEFT, OK, SLOW, STALLED, WATCH, Fleet
from distbelief.monitor.heat import heatmap
from distbelief.monitor.history import Curves, Rows, Trail
from distbelief.monitor.sample import (
    MeterBook,
    PushSample,
    StaleWindow,
    histogram,
    medians,
    quantiles,
    spearman,
)
from distbelief.monitor.shards import Shards, ShardView, tidy
from distbelief.monitor.source import STATUSES, Group, Heatmap, Json, Metric
from distbelief.monitor.table import Table, short_list, whole
from distbelief.param_server.report import AnyReport, ShardReport, WorkerReport

SERIES = (
    "loss",
    "loss_smooth",
    "val_loss",
    "val_top1",
    "samples_per_s",
    "updates_per_s",
    "staleness.p50",
    "staleness.p95",
    "staleness.p99",
    "staleness.max",
    "ratio.p95",
    "fair",
    "alive",
    "trip.fetch_p95",
    "trip.push_p95",
    "grad_norm",
    "progress",
    "meter.cosine",
)
JUDGE_S = 5.0
"""Between two looks of the diagnosis, unless a status changes."""
DEAF_S = 3.0
"""No report of anybody for so long: it is the feed, not the workers."""
WINDOW_S = 60.0
LOSS_S = 20.0
"""Time constant of the smooth loss."""
RISE_AFTER_S = 60.0
"""Before that a loss is not said to rise."""
SLOPE_S = 120.0
CLOCK_OK_S = 0.1
POINTS_MAX = 5000
BIG_FLEET = 2000
"""Workers above which a tick is of nodes."""
WORST = 50
_OF_FLEET = (
    "order",
    "fair",
    "per_fetch",
    "n_push",
    "num_lost",
    "num_taken",
    "num_old",
    "num_odd",
    "steps_told",
    "advanced_at",
)
_OF_STORE = (
    "ended_at",
    "heard_at",
    "reported_at",
    "told_at",
    "now",
    "num_odd",
    "bad_loss",
    "_seq",
    "_second",
    "_loss_smooth",
    "_loss_first",
    "_loss_best",
    "_loss_since",
    "_val",
    "_has_norm",
)
"""What is kept as it is."""
_BAD = (DOWN, STALLED, SLOW, WATCH)


class Store:
    """A Source (source.py). See the top of this file."""

    def __init__(self, *, actions: bool = False, live: bool = True) -> None:
        self.actions, self.live = actions, live
        self.begin: Begin | None = None
        self.run: RunReport | None = None
        self.ended: Json | None = None
        self.ended_at: float | None = None
        self.heard_at: float | None = None
        """When anything was heard."""
        self.reported_at: float | None = None
        """When the last report of a worker or shard came."""
        self.told_at: float | None = None
        self.now = 0.0
        self.num_odd = 0
        """Messages of another run, or that did not fit."""
        self.fleet, self.shard_board = Fleet(), Shards()
        self.rows, self.curves, self.trail = Rows(), Curves(SERIES), Trail()
        self.log, self.diagnosis = EventLog(), Diagnosis()
        self.stale, self.sample, self.book = StaleWindow(), PushSample(), MeterBook()
        self.bad_loss = ""
        self.on_event: Callable[[Json], None] | None = None
        """Called with each event that is kept, as a recording wants them."""
        self._table = Table(self.fleet, self.rows, self.curves, self.trail)
        self._seq = 0
        self._second: int | None = None
        self._judged_at = -math.inf
        self._loss_smooth: float | None = None
        self._loss_first: float | None = None
        self._loss_best: float | None = None
        self._loss_since: float | None = None
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._cosines: list[float] = []
        self._val: tuple[float | None, float | None] = (None, None)
        self._has_norm = False
        self._totals: deque[tuple[float, int, int, int, int]] = deque(maxlen=61)
        """(when, updates at shards, steps of workers, reports lost, reports taken)."""
        self._clocks: dict[str, deque[tuple[int, float]]] = {}
        """Host -> (second, least age of a report in it)."""
        self._tick: Json | None = None

    # What is told.

    @property
    def seq(self) -> int:
        return self._seq

    def take(self, message: AnyReport | AnyEntry, now: float) -> None:
        """One message. What is of another run, or of an older incarnation, is counted alone."""
        if isinstance(message, WorkerReport | ShardReport):
            if self.begin is not None and message.run != self.begin.run:
                self.num_odd += 1
                return
            self._take_report(message, now)
        else:
            self._take_entry(message, now)
        self.heard_at = now
        self.now = max(self.now, now)

    def _take_report(self, r: AnyReport, now: float) -> None:
        self.reported_at = now
        if r.host in self._clocks or len(self._clocks) < 5000:
            clock = self._clocks.setdefault(r.host[:64], deque(maxlen=60))
            age, second = now - r.at, int(now)
            if clock and clock[-1][0] == second:
                clock[-1] = (second, min(clock[-1][1], age))
            else:
                clock.append((second, age))
        if isinstance(r, ShardReport):
            if self.shard_board.take(r, now, self.fleet):
                self.fleet.take_shard(r, now)
                self.stale.add(int(now), r.stale_value, r.stale_count)
            return
        i = self.fleet.take_worker(r, now)
        if i < 0:
            return
        self.shard_board.take_trips(i, r)
        for one in zip(r.meter_staleness, r.meter_cosine, r.meter_gap, r.meter_rate, strict=True):
            self.book.add(now, *one)
            self._cosines.append(one[1])

    def _read_steps(self, second: int) -> None:
        """Single steps, as the fleet has read them."""
        hot_above = 2 * max(self.fleet.fair or 0.0, 1.0)
        for steps in self.fleet.steps_read:
            losses = steps.loss[steps.has_loss]
            finite = np.isfinite(losses)
            if not finite.all():
                if not self.bad_loss:
                    rows = steps.row[steps.has_loss]
                    self.bad_loss = self.fleet.names[int(rows[~finite][0])]
                losses = losses[finite]
            self._losses.extend(losses.tolist())
            norms = steps.norm[steps.norm >= 0].tolist()
            self._norms.extend(norms)
            self._has_norm |= bool(norms)
            chosen = steps.has_push
            self.sample.add(
                second,
                steps.row[chosen],
                steps.stale[chosen],
                steps.norm[chosen],
                steps.end[chosen],
                steps.stale[chosen] > hot_above,
            )
        self.fleet.steps_read.clear()

    def _take_entry(self, entry: AnyEntry, now: float) -> None:
        self.told_at = now
        if isinstance(entry, Begin):
            self.begin, self.ended, self.ended_at = entry, None, None
            train = _section(entry.config, "train")
            n_fetch, n_push = _count(train.get("n_fetch")), _count(train.get("n_push"))
            self.fleet.n_push = n_push
            self.fleet.per_fetch = max(1.0, n_fetch / n_push)
        elif isinstance(entry, RunReport):
            self.run = entry
            self.fleet.take_run(entry, now)
            self.shard_board.take_run(entry, now, self.fleet)
        elif isinstance(entry, Event):
            self.fleet.tell(entry.who, entry.kind, now)
            self._note(entry)
        elif isinstance(entry, Evaluated):
            self._take_evaluation(entry.loss, entry.top1, now)
        else:
            self.ended, self.ended_at = entry.result, entry.at
            measured = entry.result.get("eval")
            if isinstance(measured, dict):
                self._take_evaluation(measured.get("loss"), measured.get("top1"), now)

    def _take_evaluation(self, loss: object, top1: object, now: float) -> None:
        self._val = (_finite(loss), _finite(top1))
        self.curves.add(int(now), {"val_loss": self._val[0], "val_top1": self._val[1]})

    def _note(self, event: Event) -> None:
        self._seq += 1
        i = self.fleet.rows.get(event.who)
        item = self.log.add(self._seq, event, "" if i is None else self.fleet.hosts[i])
        if self.on_event is not None:
            self.on_event(item)

    # What follows, once a second.

    def advance(self, now: float) -> None:
        """Close the second that `now` is in. To be called once a second; twice changes nothing."""
        second = int(now)
        if self._second is not None and second <= self._second:
            return
        self._second, self.now = second, max(self.now, now)
        self.rows.grow(len(self.fleet))
        self.fleet.flush()
        self._read_steps(second)
        is_deaf = self.reported_at is None or now - self.reported_at > DEAF_S
        # While nobody is heard, nobody is late.
        changed = self.fleet.advance(now, self.is_training and not is_deaf, is_deaf=is_deaf)
        active = self.fleet.is_active()
        steps = self.fleet.view("step_s")[active]
        steps = steps[~np.isnan(steps)]
        self.shard_board.advance(now, self.fleet, float(np.median(steps)) if len(steps) else None)
        # The store may have slept for a while: what came then is of this second.
        self.rows.add(second, self.fleet.close_second())
        self.trail.add(second, self.fleet.shard_stale[:, : len(self.fleet)])
        self._close_curves(second)
        board, fleet = self.shard_board, self.fleet
        lost = fleet.num_lost + board.num_lost
        taken = fleet.num_taken + board.num_taken
        self._totals.append((now, board.updates_told, fleet.steps_told, lost, taken))
        if now - self._judged_at >= JUDGE_S or len(changed):
            self._judge(now)
        self._seq += 1
        self._tick = None

    def _close_curves(self, second: int) -> None:
        losses = self._losses
        loss = sum(losses) / len(losses) if losses else None
        if loss is not None and math.isfinite(loss):
            old = self._loss_smooth
            self._loss_smooth = loss if old is None else old + (loss - old) / LOSS_S
            if self._loss_since is None:
                self._loss_since = self.now
            if self.now - self._loss_since > RISE_AFTER_S / 2:
                smooth = self._loss_smooth
                self._loss_first = smooth if self._loss_first is None else self._loss_first
                best = self._loss_best
                self._loss_best = smooth if best is None else min(best, smooth)
        elif self.run is not None and not self._has_reports:
            loss = self.run.loss
        norms, cosines = self._norms, self._cosines
        p50, p95, p99, top = self._quantiles()
        ratio = self.fleet.view("ratio")[self.fleet.is_active()]
        ratio = ratio[~np.isnan(ratio)]
        progress = self._progress()
        values: dict[str, float | None] = {
            "loss": loss,
            "loss_smooth": self._loss_smooth if losses else None,
            "samples_per_s": self._samples_per_s(),
            "updates_per_s": self._updates_per_s(),
            "staleness.p50": p50,
            "staleness.p95": p95,
            "staleness.p99": p99,
            "staleness.max": top,
            "ratio.p95": float(np.quantile(ratio, 0.95)) if len(ratio) else None,
            "fair": self.fleet.fair,
            "alive": float(self.fleet.num_alive) if len(self.fleet) else None,
            "trip.fetch_p95": self.shard_board.trip_s(None, 0, 0.95),
            "trip.push_p95": self.shard_board.trip_s(None, 1, 0.95),
            "grad_norm": sum(norms) / len(norms) if norms else None,
            "progress": progress["share"],
            "meter.cosine": sum(cosines) / len(cosines) if cosines else None,
        }
        self.curves.add(second, values)
        for column in (losses, norms, cosines):
            column.clear()

    def _judge(self, now: float) -> None:
        self._judged_at = now
        lost, taken = self._lost()
        facts = Facts(
            is_training=self.is_training,
            heard_at=self.reported_at,
            told_at=self.told_at,
            num_target=self.begin.num_workers if self.begin else len(self.fleet),
            loss=self._loss_smooth,
            loss_first=self._loss_first,
            loss_best=self._loss_best,
            bad_loss=self.bad_loss,
            lost=lost,
            taken=taken,
        )
        before = {f.id: f for f in self.diagnosis.findings}
        new, gone = self.diagnosis.judge(now, self.fleet, self.shard_board, facts)
        for finding in new:
            detail = {"id": finding.id, "severity": finding.severity}
            self._note(
                Event(at=now, kind="slow", who=finding.who, text=finding.text, detail=detail)
            )
        for one in gone:
            was = before.get(one)
            who = one.partition(":")[2] if was is None else was.who
            text = f"over: {one if was is None else was.short}"
            self._note(Event(at=now, kind="well", who=who, text=text, detail={"id": one}))

    # What is known.

    @property
    def state(self) -> str:
        if self.ended is not None:
            return "ended"
        if self.run is not None:
            return self.run.state
        if self.begin is not None:
            return "starting"
        return "waiting" if not self._has_reports else "training"

    @property
    def is_training(self) -> bool:
        return self.live and self.state == "training"

    @property
    def _has_reports(self) -> bool:
        return self.reported_at is not None

    def _quantiles(self) -> list[float | None]:
        return quantiles(self.stale.counts(self.now, WINDOW_S), (0.5, 0.95, 0.99, 1.0))

    def _updates_per_s(self) -> float | None:
        rates = [item.rate() for item in self.shard_board.items]
        known = [rate for rate in rates if rate is not None]
        # Every push goes to all shards, so any of them tells the rate of updates.
        return max(known) if known else None

    def _samples_per_s(self) -> float | None:
        if self.run is not None and self.now - (self.told_at or 0.0) < 10.0:
            return self.run.samples_per_s
        rates = self.fleet.view("samples_per_s")[self.fleet.is_active()]
        rates = rates[~np.isnan(rates)]
        return float(rates.sum()) if len(rates) else None

    def _lost(self) -> tuple[int, int]:
        """Reports (lost, taken) of the last minute."""
        if len(self._totals) < 2:
            return 0, 0
        first, last = self._totals[0], self._totals[-1]
        return max(0, last[3] - first[3]), max(0, last[4] - first[4])

    def _progress(self) -> Json:
        run, begin = self.run, self.begin
        updates = (
            run.updates if run else max((s.updates for s in self.shard_board.items), default=None)
        )
        samples = run.samples if run else None
        began = begin.at if begin else None
        end = self.ended_at if self.ended_at is not None else self.now
        elapsed = max(0.0, end - began) if began is not None else None
        unit = begin.unit if begin else "none"
        target = begin.target if begin and begin.target > 0 else None
        done: float | None = None
        if unit == "epochs" and run is not None:
            done = run.epoch
            if done is None and target and run.total_samples:
                done = target * run.samples / run.total_samples
        elif unit == "updates":
            done = updates
        elif unit == "seconds":
            done = elapsed
        share = min(1.0, done / target) if done is not None and target else None
        return {
            "samples": samples,
            "updates": updates,
            "epoch": tidy(run.epoch) if run else None,
            "done": tidy(done),
            "total": tidy(target),
            "unit": unit,
            "share": tidy(share),
            "eta_s": tidy(run.eta_s) if run and self.ended is None else None,
            "elapsed_s": tidy(elapsed),
        }

    def _slope(self) -> float | None:
        values = self.curves.window("loss_smooth", self.now - SLOPE_S, self.now + 1)
        known = np.flatnonzero(~np.isnan(values))
        if len(known) < 20:
            return None
        return tidy(float(np.polyfit(known, values[known], 1)[0]) * 60)

    def _kpi(self) -> Json:
        fleet, run = self.fleet, self.run
        counts = self.stale.counts(self.now, WINDOW_S)
        p50, p95, p99, top = quantiles(counts, (0.5, 0.95, 0.99, 1.0))
        lag = fleet.view("lag")
        worst = None
        if len(lag) and not np.isnan(lag).all():
            worst = (
                fleet.names[int(np.nanargmax(np.where(fleet.is_active(), lag, np.nan)))]
                if (fleet.is_active() & ~np.isnan(lag)).any()
                else None
            )
        loss = run.loss if run is not None and run.loss is not None else self._loss_smooth
        target = self.begin.num_workers if self.begin else None
        shards = self.shard_board.items
        restarts = int(fleet.view("restarts").sum()) + sum(s.restarts for s in shards)
        return {
            "loss": tidy(loss),
            "loss_slope_per_min": self._slope(),
            "val_loss": tidy(self._val[0]),
            "val_top1": tidy(self._val[1]),
            "samples_per_s": tidy(self._samples_per_s()),
            "updates_per_s": tidy(self._updates_per_s()),
            "staleness": {
                "p50": whole(p50),
                "p95": whole(p95),
                "p99": whole(p99),
                "max": whole(top),
                "fair": tidy(fleet.fair),
                "n": int(counts.sum()),
                "worst": worst,
            },
            "workers": {
                "alive": fleet.num_alive,
                "target": target,
                "by_status": fleet.by_status(),
            },
            "progress": self._progress(),
            "refused": run.refused if run else None,
            "restarts": restarts + (run.controller_restarts if run else 0),
        }

    def _checks(self) -> list[Json]:
        return [
            {"id": "law", **self._check_law()},
            {"id": "updates", **self._check_updates()},
            {"id": "clocks", **self._check_clocks()},
            {"id": "reports", **self._check_reports()},
        ]

    def _check_law(self) -> Json:
        law = self.shard_board.law()
        if law is None:
            return _check(None, "The law of the mean staleness says nothing of this run (yet).")
        parts, average, should = law
        text = f"Mean staleness {average:.4g}, the law says {should:.4g} ({parts} parts)."
        if parts < LAW_PARTS:
            return _check(None, f"{text} Too few to judge.")
        room = slack(self.fleet, parts, len(self.shard_board.items))
        if average > LAW * should + room:
            return _check(False, f"{text} The counters disagree: numbers may be wrong.")
        if average < 0.98 * should - room:
            return _check(True, f"{text} Below it is usual in shared memory.")
        return _check(True, text)

    def _check_updates(self) -> Json:
        train = _section(self.begin.config, "train") if self.begin else {}
        if len(self._totals) < 30 or train.get("fetch_policy", "fresh") != "fresh":
            return _check(None, "Updates at the shards are not compared with pushes (yet).")
        first, last = self._totals[0], self._totals[-1]
        updates = last[1] - first[1]
        pushes = (last[2] - first[2]) / max(1, self.fleet.n_push)
        span = last[0] - first[0]
        text = f"{updates} updates at the shards, {pushes:.0f} pushes of workers in {span:.0f} s."
        if not updates and not pushes:
            return _check(None, text)
        # Reports are up to a second old, so some pushes are in one count and not in the other.
        room = 0.05 * max(updates, pushes) + 2 * len(self.fleet) + 5
        return _check(abs(updates - pushes) <= room, text)

    def _check_clocks(self) -> Json:
        offsets = {h: min(age for _, age in seen) for h, seen in self._clocks.items() if seen}
        if not offsets:
            return _check(None, "No clock was heard of.")
        # A report is never from the future, so what is below zero is the clock alone.
        host = max(offsets, key=lambda h: abs(offsets[h]))
        text = (
            f"Clocks of {len(offsets)} nodes differ by at most {abs(offsets[host]) * 1e3:.0f} ms."
        )
        return _check(abs(offsets[host]) < CLOCK_OK_S, text)

    def _check_reports(self) -> Json:
        lost, taken = self._lost()
        dropped = self.run.dropped if self.run else 0
        if not taken:
            return _check(None, "No report came in the last minute.")
        text = f"{lost} of {lost + taken} reports of the last minute were lost"
        text += f", {dropped} lines of the launcher." if dropped else "."
        return _check(lost <= 0.01 * (lost + taken), text)

    # What may be asked: see source.py.

    def meta(self) -> Json:
        begin, result = self.begin, self.ended
        config: Json = begin.config if begin else {}
        train, model = _section(config, "train"), _section(config, "model")
        data = _section(config, "data")
        unit = begin.unit if begin else "none"
        return {
            "seq": self._seq,
            "t": self.now,
            "run": begin.run if begin else None,
            "name": begin.name if begin else None,
            "attempt": begin.attempt if begin else None,
            "state": self.state,
            "live": self.live,
            "started": begin.at if begin else None,
            "ended": self.ended_at,
            "exit": result.get("exit") if result else None,
            "version": begin.version if begin else None,
            "api": 1,
            "engine": begin.engine if begin else None,
            "algo": "downpour",
            "n_fetch": train.get("n_fetch"),
            "n_push": train.get("n_push"),
            "fetch_policy": train.get("fetch_policy"),
            "optimizer": train.get("optimizer"),
            "lr": train.get("lr"),
            "batch_size": train.get("batch_size"),
            "model": model.get("factory"),
            "data": data.get("source"),
            "parameters": (begin.parameters or None) if begin else None,
            "target": {"unit": unit, "value": (begin.target or None) if begin else None},
            "nodes": self.fleet.nodes(),
            "worker_order": list(self.fleet.names),
            "shards": list(self.fleet.shard_names),
            "actions": self.actions,
            "grad_norm": bool(train.get("log_grad_norm")) or self._has_norm,
            "meter": self._meter_share() > 0 or self.book.num > 0,
            "finished": self.ended is not None,
            "run_path": begin.run_path if begin else None,
            "result": result,
        }

    def snapshot(self) -> Json:
        fleet, board, begin = self.fleet, self.shard_board, self.begin
        ready = int((~np.isnan(fleet.view("pushed_at"))).sum())
        serving = sum(board.status(s, self.now) == "serving" for s in board.items)
        return {
            **self._head(),
            "age_s": self._age(),
            "kpi": self._kpi(),
            "findings": self.diagnosis.as_json(self.now, fleet),
            "shards": board.as_json(self.now),
            "checks": self._checks(),
            "waiting": {
                "workers": [ready, begin.num_workers if begin else None],
                "shards": [serving, begin.num_shards if begin else None],
                "elapsed_s": tidy(self.now - begin.at) if begin else None,
            },
        }

    def workers(
        self,
        sort: str = "-ratio",
        limit: int = 50,
        cursor: str = "",
        q: str = "",
        status: str = "",
    ) -> Json:
        total, following, rows = self._table.page(self.now, sort, limit, cursor, q, status)
        medians = self.fleet.medians()
        phases = ("compute", "fetch", "push", "data", "other")
        return {
            **self._head(),
            "total": total,
            "next": following,
            "items": self._table.items(rows, self.now),
            "median": {
                "lag": tidy(medians["lag"]),
                "ratio": tidy(medians["ratio"]),
                "step_s": tidy(medians["step_s"]),
                "phases_s": {p: tidy(medians[p]) for p in phases},
            },
        }

    def worker(self, name: str, window_s: float = 900.0) -> Json:
        i = self.fleet.rows[name]
        path = self.begin.run_path if self.begin else ""
        version = self.begin.version if self.begin else ""
        one = self._table.one(i, self.now, window_s, self.log, path, version)
        return {**self._head(), **one}

    def series(self, names: list[str], start: float, end: float, points: int = 600) -> Json:
        odd = [name for name in names if name not in SERIES]
        if odd:
            raise ValueError(f"no series {odd[0][:40]!r}; there are {', '.join(SERIES)}")
        if not math.isfinite(start) or not math.isfinite(end):
            raise ValueError("from and to must be finite")
        end = min(end, self.now + 1)
        start = max(0.0, min(start, end))
        points = min(max(points, 2), POINTS_MAX)
        at, bin_s, columns = self.curves.read(names, start, end, self.now, points)
        return {
            **self._head(),
            "from": start,
            "to": end,
            "bin_s": bin_s,
            "at": [float(t) for t in at],
            **{name: [tidy(v) for v in column.tolist()] for name, column in columns.items()},
        }

    def heatmap(
        self,
        start: float,
        end: float,
        cols: int = 450,
        rows: int = 340,
        group: Group = "node",
        metric: Metric = "ratio",
        node: str = "",
    ) -> Heatmap:
        if not math.isfinite(start) or not math.isfinite(end):
            raise ValueError("from and to must be finite")
        parts = (self.fleet, self.rows, self.curves, self.now)
        return heatmap(*parts, max(0.0, start), max(0.0, end), cols, rows, group, metric, node)

    def distribution(self, window_s: float = 60.0) -> Json:
        counts = self.stale.counts(self.now, min(max(window_s, 1.0), 600.0))
        edges, binned = histogram(counts)
        p50, p95, p99 = quantiles(counts, (0.5, 0.95, 0.99))
        return {
            **self._head(),
            "edges": edges,
            "count": binned,
            "p50": whole(p50),
            "p95": whole(p95),
            "p99": whole(p99),
            "fair": tidy(self.fleet.fair),
            "n": int(counts.sum()),
        }

    def updates(self, window_s: float = 60.0, limit: int = 2000) -> Json:
        items = self.sample.window(self.now, window_s, min(max(limit, 0), 5000))
        rows, lag, norm, at = items.T
        measured = norm >= 0
        middle, of_norm = medians(lag[measured], norm[measured])
        return {
            **self._head(),
            "worker": [self.fleet.names[int(i)] for i in rows.tolist()],
            "lag": [whole(v) for v in lag.tolist()],
            "grad_norm": [tidy(v) if v >= 0 else None for v in norm.tolist()],
            "at": [round(v, 3) for v in at.tolist()],
            "spearman": tidy(spearman(lag[measured], norm[measured])),
            "median": {"lag": middle, "grad_norm": [tidy(v) for v in of_norm]},
            "off": not self._has_norm,
        }

    def meter(self) -> Json:
        columns = self.book.columns()
        share = self._meter_share()
        off = share <= 0 and not self.book.num
        verdict, text = self.book.verdict()
        if off:
            verdict, text = "off", "The meter is off. Turn it on with --set train.meter=0.01."
        names = ("staleness", "cosine", "gap", "rate")
        return {
            **self._head(),
            "off": off,
            "share": tidy(share),
            "n": self.book.num,
            **{n: short_list(c[-1000:]) for n, c in zip(names, columns, strict=True)},
            "bins": {name: [tidy(v) for v in column] for name, column in self.book.bins().items()},
            "verdict": verdict,
            "text": text,
        }

    def shards(self) -> Json:
        return {**self._head(), "items": self.shard_board.as_json(self.now)}

    def events(
        self, after: int = -1, limit: int = 200, kind: str = "", worker: str = "", q: str = ""
    ) -> Json:
        total, items = self.log.find(after, min(limit, 20_000), kind, worker, q)
        return {**self._head(), "total": total, "items": items}

    def findings(self) -> Json:
        return {**self._head(), "items": self.diagnosis.as_json(self.now, self.fleet)}

    def tick(self) -> Json:
        if self._tick is not None and self._tick["ev"] == self.log.newest:
            return self._tick
        fleet, board = self.fleet, self.shard_board
        tick: Json = {
            **self._head(),
            "age_s": self._age(),
            "state": self.state,
            "kpi": self._kpi(),
            "findings": self.diagnosis.as_json(self.now, fleet),
            "order": fleet.order,
        }
        lag, age = fleet.view("lag"), self.now - fleet.view("fetched_at")
        status = fleet.view("status")
        if len(fleet) > BIG_FLEET:
            tick["worst"] = self._worst()
            lag, age, status = self._by_node(lag, age, status)
        tick["w"] = {
            "lag": _wholes(lag),
            "age": _wholes(np.maximum(0.0, age) * 10),
            "st": "".join(map(str, status.tolist())),
        }
        tick["sh"] = [
            [
                _short(item.rate()),
                item.queue if item.heard_at == item.heard_at else None,
                _short(item.p95 * 1e3),
                _short(share),
            ]
            for item, share in zip(board.items, self._shares(), strict=True)
        ]
        tick["ev"] = self.log.newest
        self._tick = tick
        return tick

    # What is kept on disk: see recording.py.

    def keep(self) -> tuple[Json, dict[str, NDArray[Any]]]:  # Any: of many types
        """All but rows, curves and events: JSON, and arrays."""
        fleet, board, stale = self.fleet, self.shard_board, self.stale
        entries = {"begin": self.begin, "run": self.run}
        state: Json = {
            "entries": {k: encode(v).decode() for k, v in entries.items() if v is not None},
            "ended": self.ended,
            "names": fleet.names,
            "hosts": fleet.hosts,
            "devices": fleet.devices,
            "shards": fleet.shard_names,
            "fleet": {name: getattr(fleet, name) for name in _OF_FLEET},
            "board": [_kept_shard(item) for item in board.items],
            "steady": list(board.steady),
            "lost": [board.num_lost, board.num_taken, board.num_old, board.updates_told],
            "findings": [f for f in self.diagnosis.as_json(self.now, fleet) if f["id"] != "quiet"],
            "totals": list(self._totals),
            "measured": self.book.num,
            "clocks": {host: list(seen) for host, seen in self._clocks.items()},
            "own": {name: getattr(self, name) for name in _OF_STORE},
        }
        # JSON knows no NaN.
        state = msgspec.json.decode(msgspec.json.encode(state))
        arrays = {f"f_{name}": column for name, column in fleet.dump().items()}
        known = stale.stamp >= 0
        arrays |= {"stale_stamp": stale.stamp[known], "stale": stale.ring[known]}
        arrays |= {"trail": self.trail.cells, "trail_stamp": self.trail.stamp}
        arrays |= {"trips": board.trips, "meter": np.array(list(self.book.items), np.float64)}
        arrays["sample"] = self.sample.dump()
        return state, arrays

    def restore(self, state: Json, arrays: dict[str, NDArray[Any]]) -> None:  # Any: of many types
        """As it was kept. Raises: ValueError, KeyError, IndexError, TypeError if it is damaged."""
        for name, line in state["entries"].items():
            entry = decode(line.encode())
            if name == "begin" and isinstance(entry, Begin):
                self._take_entry(entry, entry.at)
            elif name == "run" and isinstance(entry, RunReport):
                self.run = entry
        self.ended = state["ended"]
        for name in _OF_STORE:
            setattr(self, name, state["own"][name])
        self._seq = int(state["own"]["_seq"])
        fleet, board = self.fleet, self.shard_board
        columns = {name[2:]: a for name, a in arrays.items() if name.startswith("f_")}
        fleet.load(state["names"], state["hosts"], state["devices"], state["shards"], columns)
        for name in _OF_FLEET:
            setattr(fleet, name, state["fleet"][name])
        board.items = [_shard_view(item) for item in state["board"]]
        board.steady.extend(map(tuple, state["steady"]))
        board.num_lost, board.num_taken, board.num_old, board.updates_told = state["lost"]
        board.trips = arrays["trips"]
        board.grow(fleet)
        self.diagnosis.restore(state["findings"])
        self._totals.extend(map(tuple, state["totals"]))
        for host, seen in state["clocks"].items():
            self._clocks[host] = deque(((int(s), float(a)) for s, a in seen), maxlen=60)
        stamp = arrays["stale_stamp"]
        self.stale.stamp[stamp % len(self.stale.stamp)] = stamp
        self.stale.ring[stamp % len(self.stale.stamp)] = arrays["stale"]
        self.trail.cells, self.trail.stamp = arrays["trail"], arrays["trail_stamp"]
        self.book.num = int(state["measured"])
        self.book.items.extend(tuple(line) for line in arrays["meter"].reshape(-1, 5).tolist())
        self.sample.load(arrays["sample"])

    def restore_event(self, item: Json) -> None:
        """An event as it was kept. Raises: ValueError, KeyError, TypeError."""
        clean = {key: item[key] for key in ("seq", "at", "kind", "who", "node", "text", "detail")}
        if not isinstance(clean["seq"], int) or not isinstance(clean["text"], str):
            raise ValueError("no event")
        self.log.restore(clean)
        self._seq = max(self._seq, clean["seq"])

    def _head(self) -> Json:
        return {"seq": self._seq, "t": self.now}

    def _age(self) -> float | None:
        return None if self.heard_at is None else tidy(max(0.0, self.now - self.heard_at))

    def _meter_share(self) -> float:
        train = _section(self.begin.config, "train") if self.begin else {}
        return _finite(train.get("meter")) or 0.0

    def _shares(self) -> list[float | None]:
        rates = [item.rate() for item in self.shard_board.items]
        total = sum(rate or 0.0 for rate in rates)
        return [rate / total if rate is not None and total > 0 else None for rate in rates]

    def _worst(self) -> list[Json]:
        fleet = self.fleet
        ratio = fleet.view("ratio")
        order = np.argsort(-np.where(np.isnan(ratio), -1.0, ratio), kind="stable")[:WORST]
        return [
            {
                "id": fleet.names[i],
                "node": fleet.hosts[i],
                "lag": whole(fleet.lag[i]),
                "ratio": tidy(float(fleet.ratio[i])),
                "status": STATUSES[fleet.status[i]],
            }
            for i in order.tolist()
        ]

    def _by_node(self, lag: Any, age: Any, status: Any) -> tuple[Any, Any, Any]:  # Any: arrays
        """The largest of each node, in the order of meta's nodes; its worst status."""
        nodes = self.fleet.nodes()[:BIG_FLEET]
        number = {name: i for i, name in enumerate(nodes)}
        rows = np.array([number.get(host, -1) for host in self.fleet.hosts], np.int64)
        known = rows >= 0
        out = [np.full(len(nodes), np.nan), np.full(len(nodes), np.nan)]
        for column, values in zip(out, (lag, age), strict=True):
            np.fmax.at(column, rows[known], values[known])
        rank = np.full(len(STATUSES), len(_BAD))
        rank[list(_BAD)] = range(len(_BAD))
        rank[OK], rank[LEFT] = len(_BAD) + 1, len(_BAD) + 2
        order = np.lexsort((-rank[status[known]],))
        worst = np.full(len(nodes), OK)
        worst[rows[known][order]] = status[known][order]
        return out[0], out[1], worst


def _kept_shard(view: ShardView) -> Json:
    values = {f.name: getattr(view, f.name) for f in fields(view)}
    values["rates"] = list(view.rates)
    values["applied"] = [one.tolist() for one in view.applied]
    return values


def _shard_view(item: Json) -> ShardView:
    """JSON has null for NaN, and lists for what is a deque."""
    view = ShardView(item["name"])
    for name, value in item.items():
        if name == "rates":
            view.rates.extend((float(t), int(n)) for t, n in value)
        elif name == "applied":
            view.applied.extend(np.array(one, np.float64) for one in value)
        else:
            setattr(view, name, math.nan if value is None else value)
    return view


def _check(ok: bool | None, text: str) -> Json:
    return {"ok": ok, "text": text}


def _section(config: Json, name: str) -> Json:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _count(value: object) -> int:
    return min(max(value, 1), 1 << 20) if isinstance(value, int) else 1


def _finite(value: object) -> float | None:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else None  # type: ignore[arg-type]  # it is a number


def _short(value: float | None) -> float | None:
    """Three digits: a tick is to be small."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.3g}")


def _wholes(values: Any) -> list[int | None]:  # Any: an array
    return [None if v != v else int(v + 0.5) for v in values.tolist()]
