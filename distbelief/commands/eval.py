"""`distbelief eval`: how good the model of a run is."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from distbelief.commands.bar import bar
from distbelief.commands.run_argument import find, json_line, run_argument, run_dir_option
from distbelief.commands.summary import accuracy
from distbelief.problem import Problem

if TYPE_CHECKING:
    from distbelief.confusion import ClassRow, Confusion
    from distbelief.workers.split import Split


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
@click.option("--per-class", is_flag=True, help="Recall and precision of each class too.")
@click.option(
    "--confusion",
    "picture",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw which classes were taken for which: a .png or .svg.",
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
    per_class: bool,
    picture: Path | None,
    run_dir: Path | None,
    as_json: bool,
) -> None:
    """Evaluate the model of RUN: its folder, its id or a part of it; by default the newest.

    \b
    Examples:
      distbelief eval runs/20261122-231032-b834 --split train
      distbelief eval b834 --crops 144 --with c07f --with d2a1
      distbelief eval --per-class --confusion confusion.png
    """
    path, *more = [_folder(name, run_dir) for name in (run, *others)]
    from distbelief.loaded import evaluate_members, evaluate_run, read_runs

    confusion = None
    if not (crops or more or per_class or picture):
        result = evaluate_run(path, split, data, last=last)
    else:
        members = read_runs([path, *more], split, data, last=last)
        if per_class or picture:
            confusion = _confusion(members.split)
        with bar("images", is_on=not as_json) as seen:
            result = evaluate_members(
                members, data, crops=int(crops or 0), seen=seen, confusion=confusion
            )
    if confusion is not None and picture is not None:
        confusion.draw(picture)
    found = dataclasses.asdict(result)
    rows = confusion.rows if confusion is not None and per_class else []
    if as_json:
        more_told = {"classes": [dataclasses.asdict(row) for row in rows]} if rows else {}
        click.echo(json_line("eval", run_dir=str(path), **found, **more_told))
        return
    click.echo(accuracy(found))
    for line in _lines(rows):
        click.echo(line)
    if picture is not None:
        click.echo(picture)


def _confusion(split: "Split") -> "Confusion":
    from distbelief.confusion import Confusion

    if split.num_classes is None:
        raise Problem(
            "DB-USE-015",
            "how many classes there are is not known",
            fix="leave --per-class and --confusion out",
        )
    return Confusion(split.num_classes, split.class_names)


def _lines(rows: "Sequence[ClassRow]") -> list[str]:
    """A table of classes."""
    if not rows:
        return []
    width = max(5, *(len(row.name) for row in rows))
    head = f"{'class'.ljust(width)}  images  recall  precision  taken for"
    return [head, *(_line(row, width) for row in rows)]


def _line(row: "ClassRow", width: int) -> str:
    recall, precision = (
        "-" if share is None else f"{100 * share:.1f} %" for share in (row.recall, row.precision)
    )
    others = f"{row.taken_for} ({row.taken_often:,})" if row.taken_for else ""
    text = f"{row.name.ljust(width)}  {row.images:6,}  {recall:>6}  {precision:>9}  {others}"
    return text.rstrip()


def _folder(run: str | None, run_dir: Path | None) -> Path:
    # A folder is taken as it is, so that what it lacks to be a run can be said.
    return Path(run) if run is not None and Path(run).is_dir() else find(run, run_dir).path
