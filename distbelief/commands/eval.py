"""`distbelief eval`: how good the model of a run is."""

import dataclasses
from pathlib import Path

import click

from distbelief.commands.run_argument import find, json_line, run_argument, run_dir_option
from distbelief.commands.summary import accuracy


@click.command("eval", short_help="Evaluate the model of a run.")
@run_argument
@click.option("--data", metavar="SOURCE", help="Other data than the run's own.")
@click.option("--split", type=click.Choice(["train", "test"]), default="test", show_default=True)
@click.option("--last", is_flag=True, help="The last values, where the run averaged them.")
@run_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def eval_command(
    run: str | None, data: str | None, split: str, last: bool, run_dir: Path | None, as_json: bool
) -> None:
    """Evaluate the model of RUN: its folder, its id or a part of it; by default the newest.

    \b
    Example:
      distbelief eval runs/20261122-231032-b834 --split train
    """
    # A folder is taken as it is, so that what it lacks to be a run can be said.
    path = Path(run) if run is not None and Path(run).is_dir() else find(run, run_dir).path
    from distbelief.evaluate import evaluate_run

    found = dataclasses.asdict(evaluate_run(path, split, data, last=last))
    click.echo(json_line("eval", run_dir=str(path), **found) if as_json else accuracy(found))
