"""`distbelief scale`: change the number of workers of a run while it goes on."""

from pathlib import Path

import click

from distbelief.commands.drain import ask, check_live
from distbelief.commands.run_argument import find, run_argument, run_dir_option
from distbelief.commands.status import read_config
from distbelief.problem import Problem


@click.command("scale", short_help="Change the number of workers of a run.")
@click.argument("number", type=int, metavar="N")
@run_argument
@run_dir_option
def scale_command(number: int, run: str | None, run_dir: Path | None) -> None:
    """Have RUN (its folder, its id or a part of it; by default the newest) go on with N workers.

    It must have been launched with --workers MIN:MAX, and N lie between them. Where there are too
    many, the newest leave as with `distbelief drain`.

    \b
    Example:
      distbelief scale 6
    """
    folder = find(run, run_dir)
    check_live(folder)
    config = read_config(folder)
    least, most = config.get("min_workers", 0), config.get("workers", 0)
    if not least:
        raise Problem(
            "DB-USE-011",
            f"run {folder.run} has a fixed number of workers, {most}",
            fix="launch with --workers MIN:MAX; distbelief drain has one of them leave",
        )
    if not least <= number <= most:
        raise Problem(
            "DB-USE-011",
            f"run {folder.run} cannot have {number} workers",
            why=f"it was launched with --workers {least}:{most}",
            fix=f"name a number from {least} to {most}",
        )
    ask(folder, "scale", str(number))
    click.echo(f"asked run {folder.run} to go on with {number} workers")
