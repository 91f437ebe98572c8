"""The command line. Nothing heavy is imported before a command needs it."""

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from distbelief import __version__

if TYPE_CHECKING:
    from distbelief.result import Accuracy, Result

FLAGS: dict[str, str] = {
    "model": "model.factory",
    "data": "data.source",
    "engine": "engine",
    "address": "address",
    "workers": "workers",
    "shards": "shards",
    "batch_size": "train.batch_size",
    "lr": "train.lr",
    "optimizer": "train.optimizer",
    "width": "model.width",
    "n_fetch": "train.n_fetch",
    "n_push": "train.n_push",
    "fetch_policy": "train.fetch_policy",
    "until": "until",
    "seed": "seed",
    "run_dir": "run_dir",
    "dashboard": "dashboard",
}
"""Flag -> key of the job."""

EXIT_CODES = {"done": 0, "failed": 1, "degraded": 4, "storage": 5}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="distbelief")
def cli() -> None:
    """Asynchronous data-parallel training for PyTorch, after DistBelief."""


@cli.command("launch")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--model", metavar="NAME", help="module:factory, googlenet-small or googlenet.")
@click.option("--data", metavar="SOURCE", help="digits, or fashion-mnist[:PATH].")
@click.option("--engine", type=click.Choice(["ray", "local"]), help="What starts the processes.")
@click.option("--address", metavar="ADDR", help="Ray cluster: local (default), auto, host:port.")
@click.option("--workers", type=int, metavar="N", help="Model replicas that compute gradients.")
@click.option("--shards", type=int, metavar="N", help="Processes that hold the parameters.")
@click.option("--batch-size", type=int, metavar="N", help="Samples in a batch of one worker.")
@click.option("--lr", type=float, metavar="X", help="Learning rate, applied by the shards.")
@click.option(
    "--optimizer", metavar="RULE", help="sgd, momentum, nesterov, adagrad, adam or adamw."
)
@click.option("--width", type=float, metavar="X", help="Multiplier on the model's channels.")
@click.option("--n-fetch", type=int, metavar="N", help="Steps from one fetch to the next.")
@click.option("--n-push", type=int, metavar="N", help="Steps from one push to the next.")
@click.option(
    "--fetch-policy", type=click.Choice(["fresh", "latest"]), help="Wait for the own push or not."
)
@click.option("--until", metavar="END", help="10-epochs, 5000-updates or 20m.")
@click.option("--seed", type=int, metavar="N", help="Of the first parameters and the data's order.")
@click.option("--run-dir", metavar="DIR", help="Where run folders are made; ./runs by default.")
@click.option(
    "--dashboard/--no-dashboard", default=None, help="Accepted; has no effect in this version."
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any key of the job.")
@click.option("--json", "as_json", is_flag=True, help="The last line of stdout is the result.")
@click.option("--plain", is_flag=True, help="Plain lines instead of one that moves.")
def launch_command(
    config: Path | None,
    settings: tuple[str, ...],
    as_json: bool,
    plain: bool,
    **flags: Any,  # Any: one of each option's type
) -> None:
    """Train a model: from CONFIG (a TOML file), from flags, or both (flags win).

    Without anything it trains GoogLeNet on real digits with 2 workers and 2 shards.
    """
    from distbelief.job import load_job
    from distbelief.launch import Stop, launch
    from distbelief.live import LiveLine
    from distbelief.problem import Problem
    from distbelief.result import Result

    given = {FLAGS[name]: value for name, value in flags.items() if value is not None}
    stop = Stop()
    signals: list[int] = []

    def heed(number: int, _: FrameType | None) -> None:
        signals.append(number)
        stop.ask()

    # A closed terminal (SIGHUP) stops safely too, or no result would be left behind.
    heeded = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, heed) for number in heeded}
    out = sys.stderr if as_json else sys.stdout
    try:
        job = load_job(config, given, settings)
        result = launch(job, live=LiveLine(out, plain=plain or as_json), stop=stop)
    except Problem as problem:
        click.echo(str(problem), err=True)
        if as_json:
            error = {"code": problem.code, "text": problem.what}
            click.echo(Result(run="", run_dir="", error=error).to_json())
        sys.exit(problem.exit_code)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if result.error is not None:
        click.echo(result.error["text"], err=True)
    click.echo(result.to_json() if as_json else _summary(result))
    if result.exit == "stopped":
        sys.exit(128 + (signals[0] if signals else signal.SIGINT))
    sys.exit(EXIT_CODES[result.exit])


@cli.command("eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", metavar="SOURCE", help="Other data than the run's own.")
@click.option("--split", type=click.Choice(["train", "test"]), default="test", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def eval_command(run: Path, data: str | None, split: str, as_json: bool) -> None:
    """Evaluate the model of RUN, a run folder."""
    from distbelief.evaluate import evaluate_run
    from distbelief.problem import Problem

    try:
        accuracy = evaluate_run(run, split, data)
    except Problem as problem:
        click.echo(str(problem), err=True)
        sys.exit(problem.exit_code)
    if as_json:
        click.echo(json.dumps({"type": "eval", "v": 1, "run_dir": str(run), **asdict(accuracy)}))
    else:
        click.echo(_accuracy(accuracy))


def _summary(result: "Result") -> str:
    """The result for a person."""
    stale = result.staleness
    lines = [
        f"{result.exit}: run {result.run}",
        f"  {result.samples} samples in {result.updates} updates, {result.train_s:.1f} s of "
        f"training ({result.samples_per_s:.0f} samples/s), {result.wall_s:.1f} s in all",
    ]
    if result.samples:
        shares = ", ".join(f"{w} {n}" for w, n in result.worker_samples.items())
        lines.append(f"  samples by worker: {shares}")
    if stale["max"] is not None:
        lines.append(f"  staleness p50/p95/max {stale['p50']}/{stale['p95']}/{stale['max']}")
    if result.train_loss is not None:
        lines.append(f"  train loss {result.train_loss:.4g}")
    if result.workers_lost:
        lines.append(f"  workers lost on the way: {result.workers_lost}")
    if result.eval is not None:
        lines.append("  " + _accuracy(result.eval))
    lines.append(f"  {result.run_dir}/result.json")
    return "\n".join(lines)


def _accuracy(accuracy: "Accuracy") -> str:
    top5 = "" if accuracy.top5 is None else f", top-5 {accuracy.top5:.4f}"
    return f"{accuracy.split} top-1 {accuracy.top1:.4f}{top5}"


def main() -> None:
    """Entry of the `distbelief` command."""
    cli()
