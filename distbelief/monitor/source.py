"""Source: what the API, the pages, metrics and the terminal ask of whoever knows the run.

`Store` is one, of a run that goes on or was recorded. Every answer is plain JSON: dicts, lists,
str, int, finite float, bool, None. Missing is None, never 0 and never NaN. Times called t, at,
since, from and to are unix seconds.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

Json = dict[str, Any]  # Any: JSON

STATUSES = ("starting", "ok", "watch", "slow", "stalled", "down", "recovering", "draining", "left")
"""Of a worker. In a tick each is the digit of its place here."""

PHASES = ("compute", "fetch", "push", "data")
"""Of a step, in the order in which they are drawn; "other" is what they leave."""

Group = Literal["node", "worker", "worst"]
Metric = Literal["ratio", "updates", "seconds"]


@dataclass(frozen=True, slots=True)
class Heatmap:
    """Worst value of each worker, or node, in each bin of time.

    data: uint8, row by row. 0: no data; 1: down; 2 to 255: value = 2 ** (lo + (code - 2) / 253 *
    (hi - lo)), clipped at both ends; in multiples of fair share for `ratio`, in updates or seconds
    for the others.
    """

    rows: int
    cols: int
    t0: float
    """Begin of the first column."""
    bin_s: float
    ids: list[str]
    """Of the rows: a worker's name, or a node's where one row is a node."""
    nodes: list[str]
    """By row."""
    lo: float
    hi: float
    data: bytes

    @property
    def head(self) -> Json:
        """What must be known to read the cells."""
        shape = {"rows": self.rows, "cols": self.cols, "t0": self.t0, "bin_s": self.bin_s}
        return {**shape, "code": "log2", "lo": self.lo, "hi": self.hi}


class Source(Protocol):
    """See the top of this file. Used by one thread."""

    @property
    def seq(self) -> int:
        """Rises by one with each tick and each event; a cursor for `after`."""
        ...

    def meta(self) -> Json:
        """What rarely changes:

        {seq, t, run, name, attempt, state, live, started, ended, exit, version, api: 1, engine,
        algo: "downpour", n_fetch, n_push, fetch_policy, optimizer, lr, batch_size, model, data,
        parameters, target: {unit, value}, nodes: [name], worker_order: [name], shards: [name],
        actions: bool, grad_norm: bool, meter: bool, finished: bool, run_path, result: {...}|None}

        state: waiting (no launcher was heard), starting, training, stopping, saving, evaluating,
        ended. live: False for a recorded run. exit: result.json's word or None.
        """
        ...

    def snapshot(self) -> Json:
        """{seq, t, age_s, kpi, findings: [finding], shards: [shard], checks: [check],
        waiting: {workers: [ready, target], shards: [ready, target], elapsed_s}}

        age_s: since anything was heard; None before. kpi: {loss, loss_slope_per_min, val_loss,
        val_top1, samples_per_s, updates_per_s, staleness: {p50, p95, p99, max, fair, n, worst},
        workers: {alive, target, by_status: {status: n}}, progress: {samples, updates, epoch,
        done, total, unit, share, eta_s, elapsed_s}, refused, restarts}.
        The staleness quantiles are of updates (parts applied) of the last 60 s; worst names the
        worker with the max.
        check: {id, ok: bool|None, text}: mean staleness against its law, updates at the shards
        against pushes acknowledged, clocks of the nodes, reports lost.
        """
        ...

    def workers(
        self,
        sort: str = "-ratio",
        limit: int = 50,
        cursor: str = "",
        q: str = "",
        status: str = "",
    ) -> Json:
        """{seq, t, total, next, items: [worker], median: {lag, ratio, step_s, phases_s}}

        worker: {id, node, host, pid, inc, status, since, lag, ratio, age_s, seconds, step_s,
        phases_s: {compute, fetch, push, data, other}, share_of_updates, pushes, samples,
        samples_per_s, restarts, skew, loss, spark: [ratio|None x 60 of the last 15 min],
        blame: phase|None, excess: x|None}
        lag: updates behind now; ratio: lag / fair share; seconds: since it last took parameters.
        sort: a field's name, with - before it for falling. q: part of a name or node. status:
        words with commas. Raises: ValueError for another sort or cursor.
        """
        ...

    def worker(self, name: str, window_s: float = 900.0) -> Json:
        """A worker's fields as in `workers`, and {seq, t, device, rss_bytes, sent_bytes,
        received_bytes, retries, versions: {distbelief}, log: path,
        series: {t, lag, ratio, step_s, compute, fetch, push, data, other, loss, down},
        shards: {name: {staleness_now, t, staleness: [...]}}, events: [event]}.

        Raises: KeyError for no such worker.
        """
        ...

    def series(self, names: list[str], start: float, end: float, points: int = 600) -> Json:
        """{seq, t, from, to, bin_s, at: [...], NAME: [...], ...}: columns, at most `points` long,
        a reduction that keeps the extremes. Names: loss, loss_smooth, val_loss, val_top1,
        samples_per_s, updates_per_s, staleness.p50, staleness.p95, staleness.p99, staleness.max,
        ratio.p95, fair, alive, trip.fetch_p95, trip.push_p95, grad_norm, progress, meter.cosine.
        Raises: ValueError for another name.
        """
        ...

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
        """Reduced by max to at most rows x cols. group: `node` has one row a worker, ordered by
        node, up to 256 workers, and one row a node above; `worker` always has one a worker,
        `worst` too, the worst first. node: the rows of that node alone."""
        ...

    def distribution(self, window_s: float = 60.0) -> Json:
        """{seq, t, edges: [n + 1], count: [n], p50, p95, p99, fair, n}; bins in log2 steps of
        1/4 with zeros of their own."""
        ...

    def updates(self, window_s: float = 60.0, limit: int = 2000) -> Json:
        """{seq, t, worker: [...], lag: [...], grad_norm: [...], at: [...], spearman, median: {lag,
        grad_norm}, off: bool}: single pushes, a reservoir and all above 2 x fair share; median:
        of the norm, by bin of lag; off: norms are not measured."""
        ...

    def meter(self) -> Json:
        """Is asynchrony hurting? {seq, t, off: bool, share, n, staleness: [...], cosine: [...],
        gap: [...], rate: [...], bins: {staleness, cosine, gap, rate, n}, verdict, text}"""
        ...

    def shards(self) -> Json:
        """{seq, t, items: [shard]}

        shard: {id, node, host, pid, inc, status, updates_per_s, share, queue, busy_share,
        apply_ms: {p50, p95}, trip_ms: {fetch, push}, version, samples, bytes_per_s, parameters,
        restarts, saved, saved_age_s, save_s, storage_error, age_s, hot: bool}
        """
        ...

    def events(
        self, after: int = -1, limit: int = 200, kind: str = "", worker: str = "", q: str = ""
    ) -> Json:
        """{seq, t, total, items: [event]}, the newest last; `total` is of all that match.

        event: {seq, at, kind, who, node, text, detail}; kinds are those of chronicle.py.
        """
        ...

    def findings(self) -> Json:
        """{seq, t, items: [finding]}, the worst first.

        finding: {id, severity: "error"|"warn"|"info", who, scope: "worker"|"node"|"shard"|"run",
        phase, ratio, factor, since, text, action, short}
        text: one sentence of at most 120 characters with its action. short: some words for a label.
        With none there is one of severity "info", id "quiet".
        """
        ...

    def tick(self) -> Json:
        """What viewers get each second: {seq, t, age_s, state, kpi, findings, order: int,
        w: {lag: [int|None], age: [deciseconds|None], st: "0112..."},
        sh: [[updates_per_s, queue, apply_ms_p95, share]], ev: seq of the newest event}

        Workers are in the order of meta's worker_order; order: how often that has changed. Above
        2000 workers w is of the nodes and `worst` has the 50 worst."""
        ...
