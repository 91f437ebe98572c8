"""`distbelief plot`: learning curves and first-layer filters of a run."""

from pathlib import Path

import click

from distbelief.commands.run_argument import find, run_argument, run_dir_option
from distbelief.folder import RunFolder
from distbelief.problem import Problem

POINTS = 2000


@click.command("plot", short_help="Draw a run's learning curves, or its first filters.")
@run_argument
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="A .png or .svg; by default curves-RUN.png here.",
)
@click.option(
    "--filters",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw the filters of the first convolution into this .png instead.",
)
@click.option("--last", is_flag=True, help="Filters of the last values, where they were averaged.")
@run_dir_option
def plot_command(
    run: str | None, out: Path | None, filters: Path | None, last: bool, run_dir: Path | None
) -> None:
    """Draw the losses of RUN over time, and its top-1 where it was evaluated while it trained.

    What the monitor has recorded is drawn; evaluations are those of evaluate.every_s.

    \b
    Examples:
      distbelief plot -o curves.png
      distbelief plot b834 --filters filters.png
    """
    folder = find(run, run_dir)
    if filters is not None:
        click.echo(_draw_filters(folder, filters, last=last))
    else:
        click.echo(_draw_curves(folder, out or Path(f"curves-{folder.run}.png")))


def _draw_curves(folder: RunFolder, path: Path) -> Path:
    from distbelief.evaluator import read_evaluations
    from distbelief.monitor.process import nothing_recorded
    from distbelief.monitor.recording import Recording
    from distbelief.monitor.store import Store
    from distbelief.pictures import draw_curves

    store = Store(live=False)
    if not Recording(folder.path / "metrics").load(store):
        raise nothing_recorded(folder)
    began = 0.0 if store.begin is None else store.begin.at
    read = store.series(["loss", "val_loss", "val_top1"], began, store.now + 1, POINTS)
    losses = [(at, loss) for at, loss in zip(read["at"], read["loss"], strict=True) if loss]
    tests = [(one.at, one.loss, one.top1) for one in read_evaluations(folder.path)] or [
        (at, loss, top1)
        for at, loss, top1 in zip(read["at"], read["val_loss"], read["val_top1"], strict=True)
        if loss is not None or top1 is not None
    ]
    start = min((at for at, _ in losses), default=min((at for at, *_ in tests), default=0.0))
    train = [at - start for at, _ in losses], [loss for _, loss in losses]
    later = [(at - start, loss, top1) for at, loss, top1 in tests]
    draw_curves(path, folder.run, train, later)
    return path


def _draw_filters(folder: RunFolder, path: Path, *, last: bool) -> Path:
    from PIL import Image

    from distbelief.loaded import load_run
    from distbelief.pictures import first_filters, tile

    found = first_filters(load_run(folder.path, "train", last=last).model)
    if found is None:
        raise Problem(
            "DB-MODEL-008",
            f"the model of {folder.run} has no convolution",
            fix="leave --filters out",
        )
    try:
        Image.fromarray(tile(found)).save(path)
    except (OSError, ValueError) as error:
        raise Problem(
            "DB-STORE-004", f"{path} cannot be written: {error}", fix="name a .png"
        ) from error
    return path
