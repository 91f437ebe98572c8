"""`distbelief table`: errors of runs by number of models and of crops."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distbelief.commands.bar import bar
from distbelief.commands.run_argument import find, json_line, run_dir_option

if TYPE_CHECKING:
    from distbelief.error_table import ErrorTable, Row

NUMBERS = ("0", "1", "10", "144")

if TYPE_CHECKING:  # before click 8.2 it takes no parameter
    _ParamType = click.ParamType[tuple[int, ...]]
else:
    _ParamType = click.ParamType


class Crops(_ParamType):
    """Numbers of crops with commas between."""

    name = "crops"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:  # Any: as click has it
        if isinstance(value, tuple):
            return value
        said = str(value).split(",")
        if not all(one in NUMBERS for one in said):
            self.fail(f"{value!r}: name some of {', '.join(NUMBERS)}, by commas", param, ctx)
        return tuple(map(int, dict.fromkeys(said)))


@click.command("table", short_help="Errors by number of models and of crops.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--data", metavar="SOURCE", help="Other data than the first run's own.")
@click.option("--split", type=click.Choice(["train", "test"]), default="test", show_default=True)
@click.option(
    "--crops",
    type=Crops(),
    default="1,10,144",
    show_default=True,
    metavar="N,N",
    help="Some of 1, 10 and 144; 0 is the image as in training.",
)
@run_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def table_command(
    runs: tuple[str, ...],
    data: str | None,
    split: str,
    crops: tuple[int, ...],
    run_dir: Path | None,
    as_json: bool,
) -> None:
    """Errors of the best of some runs and of all together, as in the paper's Table 3.

    The cost is models x crops: how often a network is run on an image. A RUN may also be a folder
    of `distbelief train-ensemble`.

    \b
    Examples:
      distbelief table runs/ensemble-imagenet
      distbelief table b834 c07f d2a1 --crops 1,10
    """
    paths = [path for run in runs for path in _paths(run, run_dir)]
    from distbelief.error_table import error_table

    with bar("images", is_on=not as_json) as seen:
        found = error_table(paths, split, data, crops=crops, seen=seen)
    if as_json:
        rows = [dataclasses.asdict(row) for row in found.rows]
        click.echo(json_line("table", images=found.images, rows=rows))
    else:
        click.echo(_text(found))


def _paths(run: str, run_dir: Path | None) -> list[Path]:
    from distbelief.roster import read_roster

    path = Path(run)
    roster = read_roster(path) if path.is_dir() else None
    if roster is not None:
        return roster.done
    return [path if path.is_dir() else find(run, run_dir).path]


def _text(table: "ErrorTable") -> str:
    head = ("models", "crops", "cost", "top-1 error", "top-5 error", "compared to base")
    lines = [head, *(_cells(row, table.base) for row in table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*text, f"{table.images:,} images"])


def _cells(row: "Row", base: "Row") -> tuple[str, ...]:
    mine, theirs = row.top5_error, base.top5_error
    gain = row.top1_error - base.top1_error if mine is None or theirs is None else mine - theirs
    return (
        str(row.models),
        str(row.crops or "-"),
        str(row.cost),
        f"{100 * row.top1_error:.2f} %",
        "-" if mine is None else f"{100 * mine:.2f} %",
        "base" if row is base else f"{100 * gain:+.2f} %",
    )
