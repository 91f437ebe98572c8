"""`distbelief eval`: how good the model of a run is."""

import dataclasses
from pathlib import Path

import click

from distbelief.commands.bar import bar
from distbelief.commands.run_argument import find, json_line, run_argument, run_dir_option
from distbelief.commands.summary import accuracy


@click.command("eval", short_help="Evaluate the model of a run.")
@run_argument
@click.option("--data", metavar="SOURCE", help="Other data than the run's own.")
@click.option("--split", type=click.Choice(["train", "test"]), default="test", show_default=True)
@click.option("--last", is_flag=True, help="The last values, where the run averaged them.")
@click.option(
    "--crops",
    type=click.Choice(["1", "10", "144"]),
    help="Average over so many crops of each image file, as the paper did.",
)
@click.option(
    "--with",
    "others",
    metavar="RUN",
    multiple=True,
    help="Average over the models of other runs too; again for more.",
)
@run_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def eval_command(
    run: str | None,
    data: str | None,
    split: str,
    last: bool,
    crops: str | None,
    others: tuple[str, ...],
    run_dir: Path | None,
    as_json: bool,
) -> None:
    """Evaluate the model of RUN: its folder, its id or a part of it; by default the newest.

    \b
    Examples:
      distbelief eval runs/20261122-231032-b834 --split train
      distbelief eval b834 --crops 144 --with c07f --with d2a1
    """
    path, *more = [_folder(name, run_dir) for name in (run, *others)]
    from distbelief.loaded import evaluate_run, evaluate_runs

    if crops is None and not more:
        result = evaluate_run(path, split, data, last=last)
    else:
        with bar("images", is_on=not as_json) as seen:
            result = evaluate_runs(
                [path, *more], split, data, last=last, crops=int(crops or 0), seen=seen
            )
    found = dataclasses.asdict(result)
    click.echo(json_line("eval", run_dir=str(path), **found) if as_json else accuracy(found))


def _folder(run: str | None, run_dir: Path | None) -> Path:
    # A folder is taken as it is, so that what it lacks to be a run can be said.
    return Path(run) if run is not None and Path(run).is_dir() else find(run, run_dir).path
