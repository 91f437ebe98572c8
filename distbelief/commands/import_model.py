"""`distbelief import`: make a run of weights that Caffe has trained."""

import dataclasses
from pathlib import Path

import click

from distbelief.commands.bar import bar
from distbelief.commands.run_argument import json_line


@click.command("import", short_help="Make a run of Caffe's GoogLeNet.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The folder to make; by default the file's name, in ./runs.",
)
@click.option(
    "--data",
    metavar="SOURCE",
    default="folder:imagenet",
    show_default=True,
    help="What eval takes where none is named.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def import_command(file: Path, out: Path | None, data: str, as_json: bool) -> None:
    """Make a run folder of FILE, a .caffemodel of GoogLeNet, such as BVLC's.

    `eval`, `export` and `eval --with` then take it as any run of ours. Its 1,000 classes are those
    of ImageNet in the order of their synsets, as folder:PATH sorts them.

    \b
    Examples:
      distbelief import bvlc_googlenet.caffemodel
      distbelief eval runs/bvlc_googlenet --data folder:/data/imagenet --crops 1
    """
    from distbelief.folder import RUNS
    from distbelief.imported import import_model

    with bar("layers", is_on=not as_json) as seen:
        found = import_model(file, out or Path(RUNS) / file.stem, data, seen)
    told = dataclasses.asdict(found) | {"folder": str(found.folder.path)}
    if as_json:
        click.echo(json_line("import", **told))
    else:
        click.echo(
            f"{found.num_layers} layers, {found.num_parameters:,} parameters, "
            f"{found.num_classes:,} classes: {found.folder.path}\n"
            f"distbelief eval {found.folder.path} --data folder:PATH --crops 1"
        )
