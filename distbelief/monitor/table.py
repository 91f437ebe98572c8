"""Table: workers as rows of JSON, sorted and cut into pages; one of them in full. No clock."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbelief.monitor.diagnosis import blame
from distbelief.monitor.events import EventLog
from distbelief.monitor.fleet import Fleet, natural
from distbelief.monitor.heat import fair_at
from distbelief.monitor.history import DOWN, Curves, Rows, Trail, decode
from distbelief.monitor.shards import tidy
from distbelief.monitor.source import PHASES, STATUSES, Json

SPARK, SPARK_S = 60, 900.0
LIMIT_MAX = 5000
NUMBERS = {
    "lag": "lag",
    "ratio": "ratio",
    "step_s": "step_s",
    "pushes": "pushes",
    "samples": "all_samples",
    "samples_per_s": "samples_per_s",
    "restarts": "restarts",
    "loss": "loss",
    "since": "since",
    "pid": "pid",
    "inc": "inc",
    **{phase: phase for phase in PHASES},
    "other": "other",
}
"""What rows can be sorted by -> the fleet's column."""
OTHERS = ("id", "node", "host", "status", "age_s", "seconds", "share_of_updates", "skew", "excess")


class Table:
    """Rows of workers out of what is known of them."""

    def __init__(self, fleet: Fleet, rows: Rows, curves: Curves, trail: Trail) -> None:
        self.fleet, self.rows, self.curves, self.trail = fleet, rows, curves, trail

    def page(
        self, now: float, sort: str, limit: int, cursor: str, q: str, status: str
    ) -> tuple[int, str | None, list[int]]:
        """(how many match, the cursor of what follows, rows). Raises: ValueError."""
        fleet = self.fleet
        falling, key = sort.startswith("-"), sort.removeprefix("-")
        if cursor and not (cursor.isascii() and cursor.isdigit()):
            raise ValueError(f"{cursor[:40]!r} is no cursor")
        offset, limit = int(cursor[:9] or 0), min(max(limit, 0), LIMIT_MAX)
        words = {w for w in status.split(",") if w}
        odd = words - set(STATUSES)
        if odd:
            raise ValueError(f"{sorted(odd)[0][:40]!r} is no status: {', '.join(STATUSES)}")
        q = q.lower()
        chosen = [
            i
            for i in range(len(fleet))
            if (not q or q in fleet.names[i].lower() or q in fleet.hosts[i].lower())
            and (not words or STATUSES[fleet.status[i]] in words)
        ]
        # By name first: equal ones keep that order whichever way the rest is sorted.
        chosen.sort(key=lambda i: natural(fleet.names[i]))
        values = self._keys(key, now)
        if isinstance(values, list):
            chosen.sort(key=lambda i: values[i], reverse=falling)
        else:
            sign = -1.0 if falling else 1.0
            # What is not known comes last either way.
            ranked = np.where(np.isnan(values), np.inf, sign * values)
            chosen.sort(key=lambda i: ranked[i])
        total = len(chosen)
        following = str(offset + limit) if offset + limit < total else None
        return total, following, chosen[offset : offset + limit]

    def _keys(self, key: str, now: float) -> list[Any] | NDArray[np.float64]:
        fleet = self.fleet
        if key in NUMBERS:
            return fleet.view(NUMBERS[key]).astype(np.float64)
        if key == "id":
            return [natural(name) for name in fleet.names]
        if key in ("node", "host"):
            return [natural(host) for host in fleet.hosts]
        if key == "status":
            return fleet.view("status").astype(np.float64)
        if key == "age_s":
            return now - fleet.view("heard_at")
        if key == "seconds":
            return now - fleet.view("fetched_at")
        if key == "share_of_updates":
            return fleet.view("pushes").astype(np.float64)
        if key == "skew":
            return np.array([_number(fleet.skew(i)) for i in range(len(fleet))])
        if key == "excess":
            medians = fleet.medians()
            found = [blame(fleet, i, medians) for i in range(len(fleet))]
            return np.array([np.nan if b is None else b.factor for b in found])
        known = ", ".join(sorted([*NUMBERS, *OTHERS]))
        raise ValueError(f"workers cannot be sorted by {key[:40]!r}; by {known}")

    def items(self, rows: list[int], now: float) -> list[Json]:
        """The rows of a page."""
        fleet = self.fleet
        medians = fleet.medians()
        total = float(fleet.view("pushes").sum())
        sparks = self.sparks(rows, now)
        return [
            self.item(i, now, medians, total) | {"spark": spark}
            for i, spark in zip(rows, sparks, strict=True)
        ]

    def item(self, i: int, now: float, medians: dict[str, float | None], total: float) -> Json:
        fleet = self.fleet
        why = blame(fleet, i, medians)
        has_pushed = fleet.pushes[i] > 0
        heard = np.fmax(fleet.heard_at[i], fleet.seen_at[i])
        return {
            "id": fleet.names[i],
            "node": fleet.hosts[i],
            "host": fleet.hosts[i],
            "pid": int(fleet.pid[i]) or None,
            "inc": int(fleet.inc[i]) if fleet.inc[i] >= 0 else None,
            "status": STATUSES[fleet.status[i]],
            "since": tidy_time(fleet.since[i]),
            "lag": whole(fleet.lag[i]),
            "ratio": tidy(float(fleet.ratio[i])),
            "age_s": tidy(float(now - heard)),
            "seconds": tidy(
                max(0.0, float(now - fleet.fetched_at[i]))
                if fleet.fetched_at[i] == fleet.fetched_at[i]
                else None
            ),
            "step_s": tidy(float(fleet.step_s[i])),
            "phases_s": {p: tidy(float(getattr(fleet, p)[i])) for p in (*PHASES, "other")},
            "share_of_updates": tidy(fleet.pushes[i] / total) if has_pushed and total else None,
            "pushes": int(fleet.pushes[i]),
            "samples": int(fleet.all_samples[i]),
            "samples_per_s": tidy(float(fleet.samples_per_s[i])),
            "restarts": int(fleet.restarts[i]),
            "skew": whole(fleet.skew(i)),
            "loss": tidy(float(fleet.loss[i])),
            "blame": None if why is None else why.phase,
            "excess": None if why is None else tidy(round(why.factor, 2)),
        }

    def sparks(self, rows: list[int], now: float) -> list[list[float | None]]:
        """Ratios of the last quarter of an hour, the worst of each quarter of a minute."""
        if not rows:
            return []
        ring = self.rows.ring(now - SPARK_S, now)
        bins, place = self.rows.places(ring, now - SPARK_S, now)
        cells = ring.cells["lag"][np.ix_(np.maximum(place, 0), np.array(rows, np.int64))]
        cells[place < 0] = 0
        size = max(1, int(SPARK_S / SPARK / ring.tier.bin_s))
        # Groups end now, whatever the grid.
        cut = len(bins) % size
        cells, bins = cells[cut:], bins[cut:]
        grouped = cells.reshape(-1, size, len(rows)).max(axis=1)[-SPARK:]
        at = (bins[size - 1 :: size][-SPARK:] + 1) * ring.tier.bin_s - 1
        values = decode(grouped) / fair_at(self.curves, at, self.fleet.fair)[:, None]
        values[grouped == DOWN] = np.nan
        lists: list[list[float | None]] = [
            [None if v != v else round(v, 2) for v in column] for column in values.T.tolist()
        ]
        for one in lists:
            one[:0] = [None] * (SPARK - len(one))
        return lists

    def one(
        self, i: int, now: float, window_s: float, log: EventLog, run_path: str, version: str
    ) -> Json:
        """What the drawer shows."""
        fleet, name = self.fleet, self.fleet.names[i]
        item = self.items([i], now)[0]
        window_s = min(max(window_s, 10.0), 86_400.0)
        columns = self.rows.row(i, now - window_s, now + 1, now)
        steps = np.where(columns["steps"] > 0, columns["steps"], np.nan)
        lag = columns["lag"]
        down = np.isposinf(lag)
        lag = np.where(down, np.nan, lag)
        at = columns["at"].astype(np.int64)
        series: Json = {
            "t": [float(t) for t in columns["at"]],
            "lag": [whole(v) for v in lag],
            "ratio": short_list(lag / fair_at(self.curves, at, fleet.fair)),
            "down": [bool(v) for v in down],
            "loss": short_list(columns["loss"]),
        }
        total = np.zeros(len(at))
        for phase in (*PHASES, "other"):
            mean = columns[phase] / steps
            total = total + mean
            series[phase] = short_list(mean)
        series["step_s"] = short_list(total)
        shards: Json = {}
        for s, shard in enumerate(fleet.shard_names):
            trail_at, trail = self.trail.read(s, i, now - window_s, now + 1)
            shards[shard] = {
                "staleness_now": whole(fleet.shard_stale[s, i]),
                "t": trail_at,
                "staleness": [whole(v) for v in trail],
            }
        _, events = log.find(worker=name, limit=50)
        more: Json = {
            "device": fleet.devices[i] or None,
            "rss_bytes": int(fleet.rss[i]) or None,
            "sent_bytes": int(fleet.sent[i]),
            "received_bytes": int(fleet.received[i]),
            "retries": int(fleet.retries[i]),
            "versions": {"distbelief": version},
            "log": f"{run_path}/logs/{name}.log" if run_path else None,
            "series": series,
            "shards": shards,
            "events": events,
        }
        return item | more


def tidy_time(value: float) -> float | None:
    """To a millisecond; None for NaN."""
    return None if value != value else round(float(value), 3)


def whole(value: float | None) -> int | None:
    return None if value is None or not np.isfinite(value) else round(float(value))


def short_list(values: NDArray[np.float64]) -> list[float | None]:
    """Four digits are enough to be drawn."""
    return [float(f"{v:.4g}") if np.isfinite(v) else None for v in values.tolist()]


def _number(value: float | None) -> float:
    return np.nan if value is None else value
