"""`distbelief simulate`: what a cluster will do, before anything is started or rented."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from distbelief.commands.bench import plot_option, several
from distbelief.commands.run_argument import json_line

if TYPE_CHECKING:
    from distbelief.simulation.cluster import Cluster, Policy
    from distbelief.simulation.constants import Constants
    from distbelief.simulation.forecast import Forecast
    from distbelief.simulation.rule import Advice
    from distbelief.simulation.steps import Steps

MODELS = {"googlenet": 6_998_552, "googlenet-small": 5_982_250}
"""Parameters: of the paper's main network, and of the small one for 10 classes."""
WORKERS_MAX = 5000
FORMS = ("float32", "bfloat16", "int8")
AUTO = "auto"
_STRAGGLER = re.compile(r"(\d{1,4})x(\d{1,4}(?:\.\d{1,3})?)")
_DURATION = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)(s|m|h|d)")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
count = click.IntRange(min=1)
positive = click.FloatRange(min=0, min_open=True)


@click.command("simulate", short_help="Say how fast a cluster would be, and how stale.")
@several("--workers", "64", "Workers; of several numbers a table.")
@click.option(
    "--shards",
    default=AUTO,
    show_default=True,
    metavar="N|auto",
    help="auto: as many as the rule asks for.",
)
@click.option("--model", type=click.Choice(tuple(MODELS)), default="googlenet", show_default=True)
@click.option("--parameters", metavar="N", type=count, help="Instead of a model's.")
@click.option(
    "--step",
    "step_s",
    metavar="SECONDS",
    type=positive,
    default=0.84,
    show_default=True,
    help="That a usual worker computes.",
)
@click.option(
    "--noise",
    type=click.FloatRange(0, 10),
    default=0.06,
    show_default=True,
    help="How much steps differ in length: standard deviation, as a share.",
)
@click.option(
    "--steps",
    "steps_file",
    metavar="FILE",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help="Measured lengths of steps, a number of seconds a line, instead of --step and --noise.",
)
@click.option("--batch", type=count, default=32, show_default=True, help="Samples of a step.")
@click.option(
    "--straggler", metavar="NxFACTOR", default="", help="1x6: one that is 6 times slower."
)
@click.option("--n-fetch", type=click.IntRange(1, 1000), default=1, show_default=True)
@click.option("--n-push", type=click.IntRange(1, 1000), default=1, show_default=True)
@click.option(
    "--policy",
    type=click.Choice(["fresh", "latest"]),
    default="fresh",
    show_default=True,
    help="As train.fetch_policy.",
)
@click.option(
    "--backward",
    type=click.FloatRange(0, 0.95),
    default=0.6,
    show_default=True,
    help="Share of a step in which parts leave already; 0: nothing overlaps.",
)
@click.option("--compress", type=click.Choice(FORMS), default=FORMS[0], show_default=True)
@click.option("--per-host", type=count, default=1, show_default=True, help="Workers of a host.")
@click.option(
    "--shards-per-host", type=count, default=1, show_default=True, help="Shards of a host."
)
@click.option("--among", is_flag=True, help="Shards on the workers' hosts, not on their own.")
@click.option(
    "--link",
    "link_gbit",
    metavar="GBIT",
    type=positive,
    default=10.0,
    show_default=True,
    help="Of each host, each way.",
)
@click.option(
    "--latency",
    "latency_ms",
    metavar="MS",
    type=click.FloatRange(0, 10_000),
    default=0.1,
    show_default=True,
    help="One way between two hosts.",
)
@click.option(
    "--encrypt/--no-encrypt", default=True, show_default=True, help="What passes between hosts."
)
@click.option(
    "--shared-memory/--no-shared-memory", default=True, show_default=True, help="On one host."
)
@click.option("--worker-mtbf", metavar="6h", default="", help="Of each worker, between failures.")
@click.option("--worker-restart", metavar="10s", default="10s", show_default=True)
@click.option("--shard-mtbf", metavar="7d", default="", help="Of each shard.")
@click.option("--shard-recovery", metavar="5s", default="5s", show_default=True)
@click.option(
    "--minutes",
    type=click.FloatRange(0.01, 100_000),
    help="That are played, after a warm-up; by default as many as it takes.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--constants",
    "constants_file",
    metavar="FILE",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help="Of machines, as --measure writes them; else those of docs/simulation.md.",
)
@click.option(
    "--measure",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Measure this machine, write that, and simulate nothing.",
)
@plot_option
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON a row.")
def simulate_command(
    workers: tuple[str, ...],
    shards: str,
    model: str,
    parameters: int | None,
    step_s: float,
    noise: float,
    steps_file: Path | None,
    batch: int,
    straggler: str,
    n_fetch: int,
    n_push: int,
    policy: "Policy",
    backward: float,
    compress: str,
    per_host: int,
    shards_per_host: int,
    among: bool,
    link_gbit: float,
    latency_ms: float,
    encrypt: bool,
    shared_memory: bool,
    worker_mtbf: str,
    worker_restart: str,
    shard_mtbf: str,
    shard_recovery: str,
    minutes: float | None,
    seed: int,
    constants_file: Path | None,
    measure: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Play asynchronous training on a cluster by discrete events, and say what to expect of it.

    How fast, how stale, what holds it up, and how many shards it needs. docs/simulation.md has the
    model and what it leaves out.

    \b
    Examples:
      distbelief simulate --workers 64 --straggler 1x6
      distbelief simulate --workers 1,8,64,512 --link 25 --plot cluster.png
      distbelief simulate --measure here.json
      distbelief simulate --workers 16 --per-host 16 --among --constants here.json
    """
    if measure is not None:
        _measure(measure)
        return
    if plot is not None:  # before anything is played: can it be drawn?
        from distbelief.bench.plot import load

        load()
    from distbelief.simulation.cluster import Cluster

    numbers = [int(number) for number in workers]
    if max(numbers) > WORKERS_MAX:
        raise click.UsageError(f"--workers {max(numbers)} are more than {WORKERS_MAX}")
    constants = _constants(constants_file)
    steps = _steps(steps_file, step_s, noise)
    chosen = _number_of_shards(shards)
    seconds = None if minutes is None else 60 * minutes
    rows = []
    for number in numbers:
        stragglers, factor = _stragglers(straggler, number)
        try:
            cluster = Cluster(
                workers=number,
                shards=1,
                parameters=parameters or MODELS[model],
                steps=steps,
                batch=batch,
                n_fetch=n_fetch,
                n_push=n_push,
                policy=policy,
                stragglers=stragglers,
                factor=factor,
                per_host=per_host,
                shards_per_host=shards_per_host,
                is_apart=not among,
                link_gbit=link_gbit,
                latency_s=latency_ms / 1000,
                form=compress,
                is_encrypted=encrypt,
                shares_memory=shared_memory,
                backward=backward,
                worker_mtbf_s=_duration("--worker-mtbf", worker_mtbf) or math.inf,
                worker_restart_s=_duration("--worker-restart", worker_restart),
                shard_mtbf_s=_duration("--shard-mtbf", shard_mtbf) or math.inf,
                shard_recovery_s=_duration("--shard-recovery", shard_recovery),
            )
            rows.append(_row(cluster, chosen, constants, seed, seconds))
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    _show(rows, as_json=as_json)
    if plot is not None:
        from distbelief.simulation.plot import plot as draw

        last = rows[-1][0]
        title = f"{last.parameters:,} parameters, {last.link_gbit:g} Gbit/s, shards: {shards}"
        draw(plot, title, [told for _, _, told in sorted(rows, key=lambda row: row[0].workers)])
        click.echo(f"drawn: {plot}", err=True)


_Row = tuple["Cluster", "Advice", "Forecast"]


def _row(
    cluster: "Cluster",
    shards: int | None,
    constants: "Constants",
    seed: int,
    seconds: float | None,
) -> _Row:
    from distbelief.simulation.forecast import forecast
    from distbelief.simulation.rule import advise

    advice = advise(cluster, constants)
    cluster = replace(cluster, shards=shards or advice.shards)
    return cluster, advice, forecast(cluster, constants, seed, seconds)


# What was said on the command line.


def _measure(path: Path) -> None:
    from rich.console import Console

    from distbelief.bench.constants import measure
    from distbelief.problem import Problem

    with Console(stderr=True).status("") as status:
        constants = measure(on_progress=status.update)
    try:
        path.write_text(constants.to_json())
    except OSError as error:
        raise Problem(
            "DB-STORE-004",
            f"{path} cannot be written: {error.strerror or error}",
            fix="name another file",
        ) from error
    click.echo(f"measured: {path}", err=True)


def _constants(path: Path | None) -> "Constants":
    from distbelief.simulation.constants import Constants
    from distbelief.simulation.defaults import DEFAULTS

    if path is None:
        return DEFAULTS
    try:
        return Constants.from_json(path.read_text())
    except (OSError, ValueError, TypeError) as error:
        raise click.UsageError(
            f"--constants {path}: {error}; distbelief simulate --measure {path} makes one"
        ) from error


def _steps(path: Path | None, step_s: float, noise: float) -> "Steps":
    from distbelief.simulation.steps import Steps

    if path is None:
        return Steps(step_s, noise)
    try:
        return Steps.of([float(line) for line in path.read_text().split()])
    except (OSError, ValueError) as error:
        raise click.UsageError(f"--steps {path}: {error}; a number of seconds a line") from error


def _number_of_shards(text: str) -> int | None:
    """None: what the rule says."""
    if text == AUTO:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 7 and int(text)):
        raise click.UsageError(f"--shards {text[:40]!r} is neither a whole number above 0 nor auto")
    return int(text)


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


def _duration(flag: str, text: str) -> float:
    """Seconds; 0 where nothing was said."""
    if not text:
        return 0.0
    match = _DURATION.fullmatch(text)
    if match is None:
        raise click.UsageError(f"{flag} {text[:40]!r} is no duration; such as 30s, 10m, 6h or 7d")
    return float(match[1]) * _SECONDS[match[2]]


# What is told.


def _show(rows: Sequence[_Row], *, as_json: bool) -> None:
    if as_json:
        for cluster, advice, told in rows:
            click.echo(json_line("simulation", **_fields(cluster, advice, told)))
    elif len(rows) == 1:
        click.echo(_text(*rows[0]))
    else:
        _table(rows)


def _fields(cluster: "Cluster", advice: "Advice", told: "Forecast") -> dict[str, object]:
    return {
        **asdict(told),
        "parameters": cluster.parameters,
        "advice": {**asdict(advice), "reason": advice.reason, "is_enough": advice.is_enough},
        "cluster": json.loads(json.dumps(_said(cluster))),
    }


def _said(cluster: "Cluster") -> dict[str, object]:
    """What was asked; JSON has no infinity, and thousands of lengths of steps are too many."""
    said = {
        name: None if value == math.inf else value
        for name, value in asdict(cluster).items()
        if name != "steps"
    }
    steps = cluster.steps
    return {**said, "step_s": steps.mean_s, "noise": steps.noise, "measured": len(steps.measured)}


def _text(cluster: "Cluster", advice: "Advice", told: "Forecast") -> str:
    lines = [
        f"{_num(told.workers, 'worker')}, {_num(told.shards, 'shard')}, "
        f"{_num(told.hosts, 'host')}, {cluster.parameters:,} parameters, {cluster.policy}, "
        f"n_fetch {cluster.n_fetch}, n_push {cluster.n_push}, "
        f"{told.seconds / 60:.3g} simulated minutes",
        f"throughput   {told.updates_per_s:.1f} updates/s, {told.samples_per_s:,.1f} samples/s, "
        f"{told.efficiency:.1%} of what they would do if nobody waited",
        _staleness(told),
        "load         "
        + "  ".join(f"{name} {share:.0%}" for name, share in told.load.items())
        + f"  waiting {told.waiting:.1%}",
        f"bottleneck   {told.bottleneck}",
        f"shards       {_advice(advice)}",
    ]
    if told.straggler_share is not None:
        who = "straggler" if cluster.stragglers == 1 else f"each of {cluster.stragglers} stragglers"
        lines.append(
            f"{who}: {cluster.factor:g}x slower, {100 * told.straggler_share:.2f} % of the updates "
            f"(fair share {100 * told.fair_share:.2f} %)"
        )
    if cluster.worker_mtbf_s < math.inf or cluster.shard_mtbf_s < math.inf:
        lines.append(
            f"failures     {_num(told.lost_workers, 'worker')} and "
            f"{_num(told.lost_shards, 'shard')} were lost in this time"
        )
    return "\n".join(lines)


def _num(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _staleness(told: "Forecast") -> str:
    text = (
        f"staleness    p50 {told.p50}  p95 {told.p95}  p99 {told.p99}  max {told.max}  "
        f"mean {told.mean:.2f}"
    )
    if told.law is None:
        return text
    off = 100 * (told.mean / told.law - 1) if told.law else 0.0
    return f"{text}; the law says {told.law:g} ({off:+.2f} %)"


def _advice(advice: "Advice") -> str:
    needs = ", ".join(f"{name} {number:.2f}" for name, number in advice.by.items())
    text = f"{advice.wanted} keep up ({needs})"
    if advice.wanted > advice.most:
        text += f"; the model has {advice.most} parts, so there may be no more shards"
    if not advice.is_enough and advice.worker_link > 0.7:
        text += (
            f"; the workers' own links would be busy {advice.worker_link:.0%} of the time: fewer "
            "workers a host, a larger n_push, or --compress"
        )
    return text


def _table(rows: Sequence[_Row]) -> None:
    from distbelief.bench.table import Column, show

    def cell(form: "Callable[[Forecast], str]") -> Callable[[_Row], str]:
        return lambda row: form(row[2])

    columns: list[Column[_Row]] = [
        Column("workers", cell(lambda one: f"{one.workers:,}")),
        Column("shards", cell(lambda one: str(one.shards))),
        Column("keep up", lambda row: str(row[1].wanted)),
        Column("samples/s", cell(lambda one: f"{one.samples_per_s:,.0f}")),
        Column("updates/s", cell(lambda one: f"{one.updates_per_s:,.1f}")),
        Column("efficiency", cell(lambda one: f"{one.efficiency:.1%}")),
        Column("mean", cell(lambda one: f"{one.mean:,.1f}")),
        Column("p50", cell(lambda one: str(one.p50))),
        Column("p95", cell(lambda one: str(one.p95))),
        Column("max", cell(lambda one: str(one.max))),
        Column("waiting", cell(lambda one: f"{one.waiting:.0%}")),
        Column("shard thread", cell(lambda one: f"{one.load['shard thread']:.0%}")),
        Column("network thread", cell(lambda one: f"{one.load['network thread']:.0%}")),
        Column("link", cell(lambda one: f"{max(one.load['link in'], one.load['link out']):.0%}")),
        Column("bottleneck", cell(lambda one: one.bottleneck), is_text=True),
    ]
    last = rows[-1][0]
    title = f"{last.parameters:,} parameters, {last.num_parts} parts, {last.link_gbit:g} Gbit/s"
    show(title, columns, rows)
