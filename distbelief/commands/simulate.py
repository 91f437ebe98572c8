"""`distbelief simulate`: what staleness is to be expected, before anything is started."""

import re
from dataclasses import asdict, dataclass

import click

from distbelief.commands.run_argument import json_line

WARM_S = 30.0
"""Nothing is counted before."""
WORK_MAX = 3_000_000
"""Pushes at shards; more would take more than about half a minute."""
_STRAGGLER = re.compile(r"(\d{1,4})x(\d{1,4}(?:\.\d{1,3})?)")


@dataclass(frozen=True, slots=True)
class Expected:
    """What a simulation came to."""

    workers: int
    shards: int
    n_fetch: int
    n_push: int
    stragglers: int
    factor: float
    seconds: float
    updates_per_s: float
    updates_per_s_without: float
    """Of a fleet without its stragglers being slow."""
    mean: float
    law: float
    p50: int
    p95: int
    p99: int
    max: int
    straggler_share: float | None
    """Of all updates, one straggler's; None without stragglers."""
    fair_share: float


@click.command("simulate", short_help="Say what staleness to expect.")
@click.option("--workers", type=click.IntRange(1, 5000), default=64, show_default=True)
@click.option("--shards", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--n-fetch", type=click.IntRange(1, 1000), default=1, show_default=True)
@click.option("--n-push", type=click.IntRange(1, 1000), default=1, show_default=True)
@click.option(
    "--straggler", metavar="NxFACTOR", default="", help="1x6: one that is 6 times slower."
)
@click.option("--minutes", type=click.FloatRange(0.5, 600), default=5.0, show_default=True)
@click.option(
    "--step",
    "step_s",
    type=click.FloatRange(0.01, 600),
    default=0.84,
    show_default=True,
    help="Seconds of a usual step.",
)
@click.option(
    "--noise",
    type=click.FloatRange(0, 1),
    default=0.06,
    show_default=True,
    help="How much steps differ in length, as a share.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON.")
def simulate_command(
    workers: int,
    shards: int,
    n_fetch: int,
    n_push: int,
    straggler: str,
    minutes: float,
    step_s: float,
    noise: float,
    seed: int,
    as_json: bool,
) -> None:
    """Play asynchronous training by discrete events, and say how stale its updates would be.

    Staleness follows from the order in which pushes are applied; only the length of steps is drawn.

    \b
    Example:
      distbelief simulate --workers 64 --straggler 1x6
    """
    num, factor = _stragglers(straggler, workers)
    if n_fetch % n_push:
        raise click.UsageError(
            f"--n-fetch {n_fetch} is no multiple of --n-push {n_push}"
            + "; "
            + "such as --n-fetch 10 --n-push 5"
        )
    work = workers * shards * (minutes * 60 + WARM_S) / (step_s * n_push)
    if work > WORK_MAX:
        raise click.UsageError(
            f"that are {work / 1e6:.1f} million pushes at shards, more than {WORK_MAX / 1e6:.0f}"
            + "; "
            + f"fewer minutes: --minutes {max(0.5, minutes * WORK_MAX / work):.1f}"
        )
    usual = (workers, shards, n_fetch, n_push, minutes, step_s, noise, seed)
    without = _play(*usual, 0, 1.0).updates_per_s if num else None
    expected = _play(*usual, num, factor, without)
    if as_json:
        click.echo(json_line("simulation", **asdict(expected)))
    else:
        click.echo(_text(expected))


def _stragglers(text: str, workers: int) -> tuple[int, float]:
    if not text:
        return 0, 1.0
    match = _STRAGGLER.fullmatch(text)
    if match is None or int(match[1]) > workers or float(match[2]) <= 0:
        raise click.UsageError(
            f"--straggler {text[:40]!r} is not NxFACTOR with at most {workers} of them"
            + "; "
            + "such as --straggler 1x6: one worker that takes six times as long"
        )
    return int(match[1]), float(match[2])


def _play(
    workers: int,
    shards: int,
    n_fetch: int,
    n_push: int,
    minutes: float,
    step_s: float,
    noise: float,
    seed: int,
    num: int,
    factor: float,
    without: float | None = None,
) -> Expected:
    from distbelief.monitor.simulate import Simulation, straggler

    slow = [f"w{i}" for i in range(num)]
    simulation = Simulation(
        workers,
        shards,
        n_fetch=n_fetch,
        n_push=n_push,
        step_s=step_s,
        noise=noise,
        seed=seed,
        faults=[straggler(name, factor, 0.0) for name in slow],
        talks=False,
    )
    for _ in simulation.until(WARM_S):
        pass
    simulation.forget()
    for _ in simulation.until(WARM_S + minutes * 60):
        pass
    if not simulation.updates:
        raise click.UsageError(
            f"no push was applied in {minutes:g} minutes"
            + "; "
            + "--minutes must be many times as long as a step"
        )
    counts = simulation.counts
    share = sum(simulation.by_worker.get(name, 0) for name in slow) / max(1, num)
    rate = simulation.updates / (minutes * 60)
    mean = simulation.mean_staleness
    assert mean is not None  # something was applied
    return Expected(
        workers=workers,
        shards=shards,
        n_fetch=n_fetch,
        n_push=n_push,
        stragglers=num,
        factor=factor,
        seconds=minutes * 60,
        updates_per_s=round(rate, 3),
        updates_per_s_without=rate if without is None else without,
        mean=round(mean, 4),
        law=(workers - 1) * (n_fetch // n_push + 1) / 2,
        p50=_quantile(counts, 0.5),
        p95=_quantile(counts, 0.95),
        p99=_quantile(counts, 0.99),
        max=max(counts),
        straggler_share=share / simulation.updates if num else None,
        fair_share=1 / workers,
    )


def _quantile(counts: dict[int, int], share: float) -> int:
    total, seen = sum(counts.values()), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= share * total:
            return value
    return max(counts)


def _text(e: Expected) -> str:
    off = 100 * (e.mean / e.law - 1) if e.law else 0.0
    fair = max(e.law, 1.0)
    lines = [
        f"{e.workers} workers, {e.shards} shard{'s' * (e.shards > 1)}, n_fetch {e.n_fetch}, "
        f"n_push {e.n_push}, {e.seconds / 60:g} simulated minutes",
        f"staleness    p50 {e.p50} ({e.p50 / fair:.1f}x)  p95 {e.p95} ({e.p95 / fair:.1f}x)  "
        f"p99 {e.p99} ({e.p99 / fair:.1f}x)  max {e.max} ({e.max / fair:.1f}x)  fair {e.law:g}",
        f"mean         {e.mean:.2f}; the law says {e.law:g} ({off:+.2f} %)",
        f"throughput   {e.updates_per_s:.1f} updates/s",
    ]
    if e.straggler_share is not None:
        lost = 100 * (1 - e.updates_per_s / e.updates_per_s_without)
        who = "straggler" if e.stragglers == 1 else f"each of {e.stragglers} stragglers"
        lines[-1] += f", {lost:.1f} % less than with all as fast"
        lines.append(
            f"{who}: {e.factor:g}x slower, {100 * e.straggler_share:.2f} % of the updates "
            f"(fair share {100 * e.fair_share:.2f} %)"
        )
    return "\n".join(lines)
