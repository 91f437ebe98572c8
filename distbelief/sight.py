"""Sight: a run as one look shows it: what its monitor sees, or without one what is known here.

The shapes are those of monitor/source.py, as far as a terminal shows them. Pure: no socket, no
clock. What is not known is None, never 0.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from distbelief.controller.pace import Progress

Number = int | float | None


class Stale(msgspec.Struct, frozen=True, kw_only=True):
    """Staleness of the updates of the last minute."""

    p50: Number = None
    p95: Number = None
    p99: Number = None
    max: Number = None
    fair: Number = None
    n: int | None = None
    worst: str | None = None
    """The worker with the most."""


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """Workers, by what they do."""

    alive: int | None = None
    target: int | None = None
    by_status: dict[str, int] = {}


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """How far the run is; `done` of `total` are counted in `unit`."""

    samples: int | None = None
    updates: int | None = None
    epoch: Number = None
    done: Number = None
    total: Number = None
    unit: str | None = None
    share: Number = None
    eta_s: Number = None
    elapsed_s: Number = None


class Kpi(msgspec.Struct, frozen=True, kw_only=True):
    """The few numbers that say how a run goes."""

    loss: Number = None
    loss_slope_per_min: Number = None
    val_loss: Number = None
    val_top1: Number = None
    samples_per_s: Number = None
    updates_per_s: Number = None
    staleness: Stale = Stale()
    workers: Counted = Counted()
    progress: Done = Done()
    refused: int | None = None
    restarts: int | None = None


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a person should look at."""

    id: str
    severity: str
    text: str
    who: str | None = None
    scope: str | None = None
    phase: str | None = None
    ratio: Number = None
    factor: Number = None
    since: Number = None
    action: str | None = None
    short: str | None = None


class Happened(msgspec.Struct, frozen=True, kw_only=True):
    """An event."""

    seq: int
    at: float
    kind: str
    who: str
    text: str
    node: str | None = None
    detail: dict[str, Any] = {}  # Any: JSON


class ShardSeen(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    status: str


class WorkerSeen(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's row."""

    id: str
    status: str
    node: str | None = None
    lag: Number = None
    ratio: Number = None
    step_s: Number = None
    phases_s: dict[str, Number] = {}
    spark: list[Number] = []


class Median(msgspec.Struct, frozen=True, kw_only=True):
    """Of the fleet."""

    lag: Number = None
    ratio: Number = None
    step_s: Number = None
    phases_s: dict[str, Number] = {}


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    run: str
    name: str
    state: str
    finished: bool = False


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    seq: int
    t: float
    age_s: Number
    kpi: Kpi
    findings: list[Finding]
    shards: list[ShardSeen]


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Of workers."""

    total: int
    items: list[WorkerSeen]
    median: Median


class Events(msgspec.Struct, frozen=True, kw_only=True):
    seq: int
    items: list[Happened]


class Sight(msgspec.Struct, frozen=True, kw_only=True):
    """See the top of this file."""

    run: str
    state: str
    kpi: Kpi
    name: str = ""
    seq: int | None = None
    """The monitor's; None where it was not asked."""
    t: float
    """Unix time of what is shown."""
    age_s: Number = None
    """Since the monitor has heard anything."""
    findings: list[Finding] = []
    shards: list[ShardSeen] = []
    page: Page | None = None
    """None: nothing is known of single workers."""
    events: list[Happened] = []
    """The newest, the newest last."""
    url: str = ""
    """Of the dashboard, with its secret."""
    unknown: str = ""
    """Why the monitor's part is missing."""


def kpi_of_progress(progress: Progress) -> Kpi:
    """What the controller knows."""
    stale = progress.staleness
    return Kpi(
        loss=progress.loss,
        samples_per_s=round(progress.samples_per_s, 1),
        staleness=Stale(p50=stale.quantile(0.5), p95=stale.quantile(0.95), max=stale.maximum),
        workers=Counted(alive=progress.num_workers),
        progress=_done(progress.samples, progress.total_samples, progress.updates, progress.eta_s),
        refused=progress.refused,
    )


def kpi_of_status(status: Mapping[str, Any]) -> Kpi:  # Any: JSON
    """The same from what the launcher has written down, status.json.

    Raises: KeyError, TypeError or AttributeError for a file of another kind.
    """
    workers = status["workers"]
    stale = status["staleness"]
    return Kpi(
        loss=status["loss"],
        samples_per_s=status["samples_per_s"],
        staleness=Stale(p50=stale["p50"], p95=stale["p95"], max=stale["max"]),
        workers=Counted(alive=sum(w["state"] == "training" for w in workers.values())),
        progress=_done(
            status["samples"], status["total_samples"], status["updates"], status["eta_s"]
        ),
        refused=status["refused"],
    )


def _done(samples: int, total: int | None, updates: int, eta_s: float | None) -> Done:
    return Done(
        samples=samples,
        updates=updates,
        done=samples if total else None,
        total=total,
        unit="samples" if total else None,
        share=round(samples / total, 5) if total else None,
        eta_s=eta_s,
    )
