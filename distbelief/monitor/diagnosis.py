"""Diagnosis: what is wrong, in sentences of at most 120 characters with one action. No clock.

A slow worker is blamed on the phase with the largest excess over the fleet's median, not on the
longest one, which is compute for nearly everybody. Then the scope: a shard, if more than 60 % of
the excess of its round trips is at that one; a node, if three quarters of its workers lose time in
the same phase and there are other nodes; else the worker. A finding keeps its id and `since` for as
long as its rule holds.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from distbelief.monitor.fleet import DOWN, SLOW, STALLED, WATCH, Fleet
from distbelief.monitor.shards import Shards
from distbelief.monitor.source import PHASES, Json

TEXT_MAX = 120
MOST = 3
ID_MAX = 24
"""Of a name in a sentence."""
EXCESS = 0.15
"""An excess below this share of the median step is noise."""
NODE_SHARE = 0.75
SHARD_SHARE = 0.6
LAW = 1.02
LAW_PARTS = 500
LOST_SHARE = 0.05
SILENT_S = 5.0
IDLE_S = 20.0
RISE = 1.3
RANK = {"error": 0, "warn": 1, "info": 2}

ACTIONS = {
    ("compute", "worker"): "run py-spy dump on it, look for throttling",
    ("compute", "node"): "look for other jobs or throttling there",
    ("fetch", "worker"): "look at its network",
    ("fetch", "node"): "look at that node's network",
    ("push", "worker"): "look at its network",
    ("push", "node"): "look at that node's network",
    ("data", "worker"): "look at its disk, or add loader threads",
    ("data", "node"): "look at that node's disk or data source",
    ("other", "worker"): "run py-spy dump on it",
    ("other", "node"): "look at what else runs there",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules need beside fleet and shards; None is not known."""

    is_training: bool
    heard_at: float | None
    """When the last report of any worker or shard came."""
    told_at: float | None
    """When the launcher's last report came."""
    num_target: int
    loss: float | None
    loss_first: float | None
    loss_best: float | None
    bad_loss: str
    """Name of a worker whose loss was not finite; empty if there is none."""
    lost: int
    taken: int
    """Reports of the last minute."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    id: str
    severity: str
    who: str
    scope: str
    text: str
    action: str
    short: str
    phase: str | None = None
    ratio: float | None = None
    factor: float | None = None
    weight: float = 0.0
    """The heavier of two with one severity comes first."""

    def as_json(self, since: float) -> Json:
        return {
            "id": self.id,
            "severity": self.severity,
            "who": self.who,
            "scope": self.scope,
            "phase": self.phase,
            "ratio": _short(self.ratio),
            "factor": _short(self.factor),
            "since": since,
            "text": self.text,
            "action": self.action,
            "short": self.short,
        }


@dataclass(frozen=True, slots=True)
class Blame:
    """Why a worker is slow."""

    phase: str
    excess_s: float
    factor: float
    """Its phase beside the median."""


class Diagnosis:
    """See the top of this file."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self.findings: list[Finding] = []
        """At most MOST, the worst first."""
        self.num_found = 0
        """All of them."""

    def judge(
        self, now: float, fleet: Fleet, shards: Shards, facts: Facts
    ) -> tuple[list[Finding], list[str]]:
        """Apply all rules. Returns: findings that came up, ids of those that are gone."""
        found = {f.id: f for f in self._rules(now, fleet, shards, facts)}
        new = [f for f in found.values() if f.id not in self._since]
        gone = [one for one in self._since if one not in found]
        self._since = {
            one: self._since.get(one, self._begin(f, fleet, now)) for one, f in found.items()
        }
        order = sorted(found.values(), key=lambda f: (RANK[f.severity], -f.weight, f.id))
        self.findings, self.num_found = order[:MOST], len(order)
        return new, gone

    def as_json(self, now: float, fleet: Fleet) -> list[Json]:
        if self.findings:
            return [f.as_json(self._since.get(f.id, now)) for f in self.findings]
        return [quiet(fleet).as_json(now)]

    def restore(self, items: list[Json]) -> None:
        """As they were told before."""
        self.findings = []
        for item in items:
            if item["id"] != "quiet":
                self._since[item["id"]] = item["since"]
                fields = {k: v for k, v in item.items() if k != "since"}
                self.findings.append(Finding(**fields))
        self.num_found = len(self.findings)

    def _begin(self, finding: Finding, fleet: Fleet, now: float) -> float:
        i = fleet.rows.get(finding.who)
        if i is None or finding.id.partition(":")[0] not in ("slow", "stalled", "down"):
            return now
        return float(fleet.since[i])

    def _rules(self, now: float, fleet: Fleet, shards: Shards, facts: Facts) -> Iterable[Finding]:
        yield from _of_loss(facts)
        yield from _of_storage(shards)
        yield from _of_law(fleet, shards)
        silent = _of_silence(now, facts)
        yield from silent
        if silent or not facts.is_training:
            return
        yield from _of_lost(facts)
        yield from _of_shards_gone(now, shards)
        hot = {s for s, item in enumerate(shards.items) if item.is_hot(now)}
        yield from _of_hot_shards(now, shards, hot)
        idle = _of_idle(now, fleet)
        yield from idle
        if not idle:
            yield from _of_stopped(now, fleet)
        yield from _of_slow(now, fleet, hot)


def quiet(fleet: Fleet) -> Finding:
    """What is said where nothing is wrong."""
    active = fleet.is_active()
    num = int(active.sum())
    levels = fleet.view("level")[active]
    levels = levels[~np.isnan(levels)]
    if not num:
        told = len(fleet)
        text = (
            f"{told} workers are known, none has pushed yet." if told else "No worker is known yet."
        )
        return Finding("quiet", "info", "", "run", text, "", "waiting")
    if num == 1 or not len(levels):
        text = "One worker trains, on parameters that nobody else changes."
        if num > 1:
            text = f"All {num} workers push."
        return Finding("quiet", "info", "", "run", text, "", "well")
    worst = max(1.0, math.ceil(float(levels.max()) * 10) / 10)
    watched = np.flatnonzero(fleet.view("status") == WATCH)
    if len(watched):
        i = max(watched.tolist(), key=lambda i: _level(fleet, i))
        level = _level(fleet, i)
        text = f"{_id(fleet.names[i])} is {level:.1f}x staler; it counts as slow if that lasts."
        return Finding(
            "quiet", "info", fleet.names[i], "worker", _cut(text), "", "watched", ratio=level
        )
    who = f"All {num}" if num == len(fleet) else f"All {num} active"
    text = f"{who} workers within {worst:.1f}x of fair share."
    return Finding("quiet", "info", "", "run", text, "", "well", ratio=worst)


def blame(fleet: Fleet, i: int, medians: dict[str, float | None]) -> Blame | None:
    """The phase of a worker with the largest excess; None where that is noise."""
    step = medians["step_s"]
    best: Blame | None = None
    for phase in (*PHASES, "other"):
        usual, mine = medians[phase], float(getattr(fleet, phase)[i])
        if usual is None or mine != mine or step is None:
            continue
        if mine - usual > EXCESS * step and (best is None or mine - usual > best.excess_s):
            best = Blame(phase, mine - usual, mine / max(usual, 0.001 * step, 1e-6))
    return best


def shard_of(fleet: Fleet, i: int) -> int | None:
    """The shard that a worker waits for: most of what its trips are longer than the fleet's."""
    if len(fleet.shard_names) < 2:
        return None
    active = fleet.is_active()
    trips = fleet.trip[:, : len(fleet)]
    if not active.any() or np.isnan(trips[:, i]).any():
        return None
    usual = np.array([_nanmedian(line[active]) for line in trips])
    excess = np.maximum(0.0, trips[:, i] - usual)
    # Where all its trips are longer alike it is the worker; beside the shortest of them.
    excess = excess - excess.min()
    total, s = float(excess.sum()), int(excess.argmax())
    step = float(fleet.step_s[i])
    if total > EXCESS * (step if step == step else 0.0) and excess[s] > SHARD_SHARE * total:
        return s
    return None


def _of_loss(facts: Facts) -> Iterable[Finding]:
    if facts.bad_loss:
        text = f"Loss became NaN, first at {_id(facts.bad_loss)}: resume with a lower lr."
        yield Finding(
            "loss:nan",
            "error",
            facts.bad_loss,
            "run",
            _cut(text),
            "resume, with a lower lr",
            "loss is NaN",
            weight=1e9,
        )
    now, first, best = facts.loss, facts.loss_first, facts.loss_best
    if now is None or first is None or best is None or not facts.is_training:
        return
    if now > best + 0.3 * max(first - best, 0.05 * abs(best)) and now > RISE * best:
        text = (
            f"Loss has risen to {now:.4g} from {best:.4g}: lower lr, or resume from a checkpoint."
        )
        yield Finding(
            "loss:rising",
            "warn",
            "",
            "run",
            _cut(text),
            "lower lr",
            "loss rises",
            weight=50.0,
        )


def _of_storage(shards: Shards) -> Iterable[Finding]:
    for item in shards.items:
        if item.storage_error:
            text = (
                f"{_id(item.name)} cannot save ({item.storage_error[:40]}): make room on its disk."
            )
            yield Finding(
                f"storage:{item.name}",
                "error",
                item.name,
                "shard",
                _cut(text),
                "make room on its disk",
                "cannot save",
                weight=1e6,
            )


def _of_law(fleet: Fleet, shards: Shards) -> Iterable[Finding]:
    law = shards.law()
    if law is None or law[0] < LAW_PARTS:
        return
    parts, mean, should = law
    if mean > LAW * should + slack(fleet, parts, len(shards.items)):
        text = f"Counters disagree (mean staleness {mean:.3g}, law {should:.3g}): please report it."
        yield Finding(
            "law",
            "error",
            "",
            "run",
            _cut(text),
            "please report it",
            "counters disagree",
            factor=mean / should if should else None,
            weight=1e3,
        )


def slack(fleet: Fleet, parts: int, num_shards: int) -> float:
    """What the mean may exceed its law by, as a window cuts one interval of each worker."""
    stale = fleet.view("stale")
    return float(np.nansum(stale)) * max(1, num_shards) / max(1, parts) if len(stale) else 0.0


def _of_silence(now: float, facts: Facts) -> list[Finding]:
    heard, told = facts.heard_at, facts.told_at
    if heard is not None and now - heard > SILENT_S and facts.is_training:
        if told is not None and now - told < SILENT_S:
            text = f"No report of a worker or shard for {_for(now - heard)}: see the monitor's log."
        else:
            text = f"Nothing was heard for {_for(now - heard)}: see distbelief status."
        return [
            Finding(
                "silence",
                "error",
                "",
                "run",
                _cut(text),
                "distbelief status",
                "nothing heard",
                weight=1e5,
            )
        ]
    return []


def _of_lost(facts: Facts) -> Iterable[Finding]:
    total = facts.lost + facts.taken
    if total >= 100 and facts.lost > LOST_SHARE * total:
        share = 100 * facts.lost / total
        text = (
            f"{share:.0f} % of the reports of the last minute were lost: numbers are of the rest."
        )
        yield Finding(
            "lost",
            "info",
            "",
            "run",
            _cut(text),
            "give the monitor more of a core",
            "reports lost",
            factor=facts.lost / total,
        )


def _of_shards_gone(now: float, shards: Shards) -> Iterable[Finding]:
    for item in shards.items:
        status = shards.status(item, now)
        if status == "lost":
            text = f"{_id(item.name)} is down: pushes wait until it is back; see distbelief logs."
        elif status == "silent":
            text = f"{_id(item.name)} is silent for {_for(now - item.heard_at)}: look at its node."
        else:
            continue
        yield Finding(
            f"shard:{item.name}",
            "error",
            item.name,
            "shard",
            _cut(text),
            "distbelief logs",
            f"{item.name[:ID_MAX]} {'down' if status == 'lost' else 'silent'}",
            weight=1e4,
        )


def _of_hot_shards(now: float, shards: Shards, hot: set[int]) -> Iterable[Finding]:
    if hot and len(hot) == len(shards.items):
        busy = 100 * min(shards.items[s].busy_share for s in hot)
        text = f"All {len(hot)} shards are the bottleneck ({busy:.0f} % busy): add shards."
        if len(hot) == 1:
            text = f"The only shard is the bottleneck ({busy:.0f} % busy): add one with --shards 2."
        yield Finding(
            "shards",
            "info",
            "",
            "run",
            _cut(text),
            "add shards",
            "shards are full",
        )
        return
    for s in sorted(hot):
        item = shards.items[s]
        others = [o for o in shards.items if o is not item]
        usual = _nanmedian(np.array([o.p95 for o in others]))
        factor = item.p95 / usual if usual and usual > 0 else math.nan
        if "trip" in item.since and not factor > 1.5:
            mine, rest = (
                shards.trip_s(s, 1),
                [shards.trip_s(i, 1) for i in range(len(shards.items)) if i != s],
            )
            usual = _nanmedian(np.array([t for t in rest if t is not None]))
            factor = mine / usual if mine and usual and usual > 0 else math.nan
            said = (
                f"trips to it take {factor:.1f}x the others'"
                if factor == factor
                else "trips to it are long"
            )
        elif factor == factor and factor > 1.5:
            said = f"its updates take {factor:.1f}x the others'"
        else:
            said = f"{item.queue} messages wait there"
        text = f"{_id(item.name)} holds all workers up: {said}. Look at its node, or add shards."
        yield Finding(
            f"hot:{item.name}",
            "warn",
            item.name,
            "shard",
            _cut(text),
            "look at its node",
            f"{item.name[:ID_MAX]} hot",
            phase="push",
            factor=factor if factor == factor else None,
            weight=100.0,
        )


def _of_idle(now: float, fleet: Fleet) -> list[Finding]:
    pushed = fleet.view("pushed_at")
    known = pushed[~np.isnan(pushed)]
    if not len(known):
        return []
    limit = max(IDLE_S, float(fleet.stall_limit().max()))
    idle = now - float(known.max())
    if idle < limit:
        return []
    text = f"Nobody has pushed for {_for(idle)}: see distbelief logs, shards first."
    return [
        Finding("idle", "error", "", "run", text, "distbelief logs", "nobody trains", weight=1e5)
    ]


def _of_stopped(now: float, fleet: Fleet) -> Iterable[Finding]:
    status = fleet.view("status")
    for word, code, severity in (("down", DOWN, "error"), ("stalled", STALLED, "warn")):
        rows = [int(i) for i in np.flatnonzero(status == code)]
        if not rows:
            continue
        by_node: dict[str, list[int]] = {}
        for i in rows:
            by_node.setdefault(fleet.hosts[i], []).append(i)
        sizes = _sizes(fleet)
        for node, members in by_node.items():
            if (
                node
                and len(members) > 1
                and len(sizes) > 1
                and len(members) >= NODE_SHARE * sizes[node]
            ):
                text = f"{len(members)} workers of {_id(node)} are {word}: look at that node."
                yield Finding(
                    f"{word}:{node}",
                    severity,
                    node,
                    "node",
                    _cut(text),
                    "look at that node",
                    f"{node[:ID_MAX]} {word}",
                    weight=1e3 + len(members),
                )
                continue
            for i in members[:20]:
                yield _stopped(now, fleet, i, word, severity)


def _stopped(now: float, fleet: Fleet, i: int, word: str, severity: str) -> Finding:
    name = _id(fleet.names[i])
    if word == "down":
        down_s = now - fleet.since[i]
        lasts = f" for {_for(down_s)}" if down_s >= 5 else ""
        text = f"{name} is down{lasts}: see distbelief logs -w {name}."
        action = f"distbelief logs -w {name}"
    else:
        lag = fleet.lag[i]
        behind = f", {lag:.0f} updates behind" if lag == lag else ""
        idle = _for(now - fleet.pushed_at[i])
        text = f"{name} has not pushed for {idle}{behind}: py-spy dump --pid {fleet.pid[i]}."
        action = f"py-spy dump --pid {fleet.pid[i]}"
    level = float(fleet.ratio[i])
    return Finding(
        f"{word}:{fleet.names[i]}",
        severity,
        fleet.names[i],
        "worker",
        _cut(text),
        action,
        f"{name} {word}",
        ratio=level if level == level else None,
        weight=500.0,
    )


def _of_slow(now: float, fleet: Fleet, hot: set[int]) -> Iterable[Finding]:
    rows = [int(i) for i in np.flatnonzero(fleet.view("status") == SLOW)]
    if not rows:
        return
    medians = fleet.medians()
    nodes = _sizes(fleet)
    told: set[str] = set()
    for i in sorted(rows, key=lambda i: -_level(fleet, i)):
        name, node, level = _id(fleet.names[i]), fleet.hosts[i], _level(fleet, i)
        why = blame(fleet, i, medians)
        lasts = _for(now - fleet.since[i] + 30)
        s = shard_of(fleet, i) if why and why.phase in ("fetch", "push") else None
        if s is not None:
            shard = fleet.shard_names[s]
            if s in hot:
                continue  # that one is told of the shard
            text = (
                f"{name} is {level:.1f}x staler; it waits for {_id(shard)}: look at the way there."
            )
            yield Finding(
                f"slow:{fleet.names[i]}",
                "warn",
                shard,
                "shard",
                _cut(text),
                "look at the network between them",
                f"{name} {level:.1f}x",
                why.phase if why else None,
                level,
                why.factor if why else None,
                10.0 + level,
            )
            continue
        if why is not None and _is_node(fleet, node, why.phase, medians, nodes):
            if node in told:
                continue
            told.add(node)
            action = ACTIONS[why.phase, "node"]
            text = (
                f"Workers of {_id(node)} are up to {level:.1f}x staler; "
                f"{why.phase} takes {why.factor:.1f}x the median: {action}."
            )
            yield Finding(
                f"slow:{node}",
                "warn",
                node,
                "node",
                _cut(text),
                action,
                f"{node[:ID_MAX]} {why.phase} {why.factor:.1f}x",
                why.phase,
                level,
                why.factor,
                50.0 + level,
            )
            continue
        if why is None:
            action = "look at what else runs there"
            text = f"{name} is {level:.1f}x staler for {lasts}, in no one phase: {action}."
        else:
            action = ACTIONS[why.phase, "worker"]
            text = (
                f"{name} is {level:.1f}x staler for {lasts}; "
                f"its {why.phase} takes {why.factor:.1f}x the median: {action}."
            )
        yield Finding(
            f"slow:{fleet.names[i]}",
            "warn",
            fleet.names[i],
            "worker",
            _cut(text),
            action,
            f"{name} {why.phase if why else ''} {level:.1f}x".replace("  ", " "),
            why.phase if why else None,
            level,
            why.factor if why else None,
            10.0 + level,
        )


def _is_node(
    fleet: Fleet, node: str, phase: str, medians: dict[str, float | None], sizes: dict[str, int]
) -> bool:
    """Three quarters of the node's workers lose time in that phase, and there are other nodes."""
    if not node or len(sizes) < 2 or sizes.get(node, 0) < 2:
        return False
    usual, step = medians[phase], medians["step_s"]
    if usual is None or step is None:
        return False
    active = fleet.is_active()
    members = [i for i in range(len(fleet)) if fleet.hosts[i] == node and active[i]]
    column = getattr(fleet, phase)
    late = sum(bool(column[i] - usual > EXCESS * step) for i in members)
    return len(members) > 1 and late >= NODE_SHARE * len(members)


def _sizes(fleet: Fleet) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for host in fleet.hosts:
        sizes[host] = sizes.get(host, 0) + 1
    return sizes


def _level(fleet: Fleet, i: int) -> float:
    level = float(fleet.level[i])
    return level if level == level else 0.0


def _nanmedian(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    values = values[~np.isnan(values)]
    return float(np.median(values)) if len(values) else math.nan


def _for(seconds: float) -> str:
    """Some words for a time; coarse, so that a sentence does not change all the time."""
    if not seconds < 90:
        return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    return f"{max(5, 5 * round(seconds / 5)):.0f} s"


def _id(name: str) -> str:
    return name if len(name) <= ID_MAX else name[: ID_MAX - 2] + ".."


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_MAX else text[: TEXT_MAX - 2] + ".."


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 2)
