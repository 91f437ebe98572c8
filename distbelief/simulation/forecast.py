"""Forecast: what a model that was played comes to, and what holds it up."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from distbelief.simulation.cluster import Cluster
from distbelief.simulation.constants import Constants
from distbelief.simulation.model import Model
from distbelief.simulation.rule import most_pushes_per_s
from distbelief.simulation.stations import Stations

WARM_CYCLES = 2
"""Nothing is counted before each worker, even a straggler, may have pushed so often."""
CYCLES = 200
CYCLES_MIN = 1
"""Pushes of each worker that are counted, at most and at least."""
EVENTS = 300_000
"""Of a forecast, where there is a choice."""
EVENTS_MAX = 30_000_000
EVENTS_OF_PIECE = 6
FULL = 0.85
"""From here on a station is what holds the workers up."""
SHORT = 0.9
"""An efficiency from which on nothing holds them up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Rates a second, times in seconds, shares in [0, 1]."""

    workers: int
    shards: int
    hosts: int
    seconds: float
    """That were played and counted."""
    updates_per_s: float
    samples_per_s: float
    alone: float
    """Samples a second of the workers if none of them ever waited."""
    efficiency: float
    """samples_per_s to alone."""
    mean: float
    law: float | None
    """What the mean should be: with `fresh`, and no memory shared."""
    p50: int
    p95: int
    p99: int
    max: int
    waiting: float
    """Of a worker's time, for answers."""
    load: Mapping[str, float]
    """Resource -> share of the time for which it is busy, of the busiest one of its kind."""
    bottleneck: str
    """A resource that is full; `compute` where workers hardly wait; else `failures` where there
    were some, or `round trip`: each push takes long, though nothing is full."""
    straggler_share: float | None
    """Of all updates, one straggler's; None without stragglers."""
    fair_share: float
    lost_workers: int
    lost_shards: int
    """Failures that fell into these seconds."""


def forecast(
    cluster: Cluster, constants: Constants, seed: int = 0, seconds: float | None = None
) -> Forecast:
    """Play a cluster. seconds: counted after the warm-up; by default as many as it takes.

    Raises: ValueError if that is too much to play, or nothing is pushed in it.
    """
    cycle = cycle_s(cluster, constants)
    model = Model(cluster, constants, seed)
    events = cluster.workers * len(cluster.pieces()) * EVENTS_OF_PIECE
    if seconds is None:
        seconds = cycle * min(CYCLES, max(CYCLES_MIN, EVENTS / events))
    longest = max(cluster.factor, 1.0) if cluster.stragglers else 1.0
    warm = cycle + WARM_CYCLES * cluster.steps.mean_s * cluster.n_push * longest
    seconds = max(seconds, 2 * warm) if cluster.stragglers else seconds
    if events * (warm + seconds) / cycle > EVENTS_MAX:
        raise ValueError(
            f"{seconds / 60:.1f} minutes of {cluster.workers} workers are more than "
            f"{EVENTS_MAX // 1_000_000} million events: fewer minutes, or fewer workers"
        )
    model.until(warm)
    model.forget()
    model.until(warm + seconds)
    if not model.updates or not model.staleness:
        raise ValueError(f"nothing was pushed in {seconds:g} s: play more minutes")
    return _told(cluster, model, seconds)


def cycle_s(cluster: Cluster, constants: Constants) -> float:
    """Seconds from one push of a usual worker to its next, at least: computing, or its turn."""
    turn = cluster.workers / min(most_pushes_per_s(cluster, constants).values())
    return max(cluster.steps.mean_s * cluster.n_push, turn)


def _told(cluster: Cluster, model: Model, seconds: float) -> Forecast:
    counts = model.staleness
    alone = cluster.pushes_per_s * cluster.n_push * cluster.batch
    rate = model.samples / seconds
    load = {
        "shard thread": _busiest(model.shard_threads, seconds),
        "network thread": _busiest(model.shard_nets, seconds),
        **_links(cluster, model, seconds),
    }
    slow = sum(model.by_worker[: cluster.stragglers]) / max(1, cluster.stragglers)
    shares = cluster.shares_memory and (cluster.hosts == 1 or not cluster.is_apart)
    has_law = cluster.policy == "fresh" and not shares
    return Forecast(
        workers=cluster.workers,
        shards=cluster.shards,
        hosts=cluster.hosts,
        seconds=round(seconds, 3),
        updates_per_s=round(model.updates / seconds, 4),
        samples_per_s=round(rate, 3),
        alone=round(alone, 3),
        efficiency=round(rate / alone, 4),
        mean=round(sum(value * num for value, num in counts.items()) / counts.total(), 4),
        law=(cluster.workers - 1) * (cluster.per_fetch + 1) / 2 if has_law else None,
        p50=quantile(counts, 0.5),
        p95=quantile(counts, 0.95),
        p99=quantile(counts, 0.99),
        max=max(counts),
        waiting=round(model.waited_s / seconds / cluster.workers, 4),
        load=load,
        bottleneck=_bottleneck(rate / alone, load, model.lost_workers + model.lost_shards),
        straggler_share=round(slow / model.updates, 6) if cluster.stragglers else None,
        fair_share=1 / cluster.workers,
        lost_workers=model.lost_workers,
        lost_shards=model.lost_shards,
    )


def _links(cluster: Cluster, model: Model, seconds: float) -> dict[str, float]:
    """Of the hosts of shards, and of workers alone."""
    busy = [
        [min(1.0, one / seconds) for one in stations.busy_s]
        for stations in (model.links_in, model.links_out)
    ]
    shards = {cluster.host_of_shard(shard) for shard in range(cluster.shards)}
    others = [host for host in range(cluster.hosts) if host not in shards]
    found = {
        name: round(max(way[host] for host in shards), 4)
        for name, way in zip(("link in", "link out"), busy, strict=True)
    }
    found["worker link"] = round(max((way[h] for way in busy for h in others), default=0.0), 4)
    return found


def _busiest(stations: Stations, seconds: float) -> float:
    return round(min(1.0, max(stations.busy_s) / seconds), 4)


def _bottleneck(efficiency: float, load: Mapping[str, float], failures: int) -> str:
    if efficiency >= SHORT:
        return "compute"
    name = max(load, key=lambda one: load[one])
    if load[name] >= FULL:
        return name
    return "failures" if failures else "round trip"


def quantile(counts: Counter[int], share: float) -> int:
    """Smallest value that at least so large a share did not exceed."""
    total, seen = counts.total(), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= share * total:
            return value
    return max(counts)
