"""`distbelief chaos`: break a run on purpose, and prove from its history that nothing was lost."""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distbelief.commands.run_argument import json_line, runs_folder

if TYPE_CHECKING:
    from distbelief.chaos.verdict import Verdict

RAY_PACE_S = 6.0
"""Seconds between two kills of a shard by Ray; 1 without."""
WORDS = {"a": "spaced: one fault at a time", "b": "unspaced: faults may meet"}


@click.command("chaos", short_help="Break a run on purpose, and check its history.")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[-- LAUNCH ARGS]")
@click.option(
    "--plan",
    "plan_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="What is to go wrong, and how often.",
)
@click.option("--seconds", type=float, metavar="S", help="How long a run is broken; 60.")
@click.option("--seed", type=int, metavar="N", help="Of the plan; 0.")
@click.option("--engine", type=click.Choice(["ray", "local"]), default="local", show_default=True)
@click.option(
    "--run-dir", metavar="DIR", type=click.Path(path_type=Path), help="Where run folders are made."
)
@click.option("--json", "as_json", is_flag=True, help="The last line of stdout is the verdict.")
def chaos_command(
    args: tuple[str, ...],
    plan_file: Path | None,
    seconds: float | None,
    seed: int | None,
    engine: str,
    run_dir: Path | None,
    as_json: bool,
) -> None:
    """Run a job while its processes are killed, stopped and cut off; then check what they did.

    Without arguments: 4 workers push gradients of whole numbers to 2 shards, a shard is killed
    each second and a worker every 3 s, for a minute in which one fault at a time happens and
    another in which they may meet. What stands after -- is a job as `distbelief launch` takes it.

    The verdict is worked out from what every process wrote down, by a program of its own: see
    docs/reliability.md. Exit code 0 if nothing is violated, else 1.

    \b
    Examples:
      distbelief chaos --json
      distbelief chaos --plan faults.toml -- job.toml --workers 4
      distbelief chaos -- train.py --workers 4 -- --epochs 3
    """
    from dataclasses import replace

    from distbelief.chaos.plan import Plan, default_plan
    from distbelief.chaos.trial import Trial, our_job

    # Ray has no process to fork workers from: they take seconds to come back.
    more: dict[str, Any] = {"pace_s": RAY_PACE_S} if engine == "ray" else {}  # Any: by option
    if seconds is not None:
        more["seconds"] = seconds
    if seed is not None:
        more["seed"] = seed
    if plan_file is not None:
        more.pop("pace_s", None)
        plans = {"a": replace(Plan.from_toml(plan_file), **more)}
    elif args:
        plans = {"b": default_plan(spaced=False, **more)}
    else:
        plans = {name: default_plan(spaced=name == "a", **more) for name in ("a", "b")}
    here = runs_folder(run_dir) / f"chaos-{time.strftime('%Y%m%d-%H%M%S')}"
    verdicts: list[Verdict] = []
    for name, plan in plans.items():
        trial = Trial(
            args or our_job(engine),
            plan,
            here / name,
            has_gradients=not args,
            say=lambda text: click.echo(text, err=True),
        )
        verdict = trial.run()
        verdicts.append(verdict)
        if as_json:
            click.echo(json_line("chaos-run", **_fields([verdict]), run=verdict.run))
        else:
            _show(f"{name}  {WORDS[name] if plan_file is None else plan_file}", verdict)
    is_good = not any(verdict.violations for verdict in verdicts)
    if as_json:
        click.echo(json_line("chaos", **_fields(verdicts)))
    else:
        click.echo("pass" if is_good else "fail")
    sys.exit(0 if is_good else 1)


def _fields(verdicts: "Sequence[Verdict]") -> dict[str, Any]:  # Any: JSON
    recovery_s = [seconds for verdict in verdicts for seconds in verdict.recovery_s]
    violations = [text for verdict in verdicts for text in verdict.violations]
    return {
        "verdict": "fail" if violations else "pass",
        "kills": sum(verdict.kills for verdict in verdicts),
        "acked": sum(verdict.acked for verdict in verdicts),
        "lost": sum(verdict.lost for verdict in verdicts),
        "lost_double_fault": sum(verdict.lost_double_fault for verdict in verdicts),
        "dups": sum(verdict.dups for verdict in verdicts),
        "undone": sum(verdict.undone for verdict in verdicts),
        "left_out": sum(verdict.num_left_out for verdict in verdicts),
        "recovery_s": {
            "p50": round(statistics.median(recovery_s), 3) if recovery_s else None,
            "max": round(max(recovery_s), 3) if recovery_s else None,
        },
        "checked": sorted({rule for verdict in verdicts for rule in verdict.checked}),
        "violations": violations,
    }


def _show(title: str, verdict: "Verdict") -> None:
    fields = _fields([verdict])
    recovery = fields["recovery_s"]
    click.echo(f"{title}\n  {verdict.run}")
    click.echo(
        f"  {verdict.kills} kills, {verdict.num_left_out} left out; {verdict.acked:,} parts of "
        f"pushes acknowledged, {verdict.undone:,} undone and sent again, {verdict.lost} lost, "
        f"{verdict.lost_double_fault} of them known as double faults"
    )
    if recovery["p50"] is not None:
        click.echo(
            f"  from a shard's kill to its next applied push: median {recovery['p50']} s, at most "
            f"{recovery['max']} s"
        )
    click.echo(f"  checked: {', '.join(verdict.checked)}")
    for text in verdict.violations:
        click.echo(f"  violated: {text}")
