"""`distbelief export`: the model of a run for other programs."""

import dataclasses
from pathlib import Path

import click

from distbelief.commands.run_argument import (
    find,
    json_line,
    run_argument,
    run_dir_option,
)

FORMS = ("onnx", "safetensors", "torchscript", "torch-export", "caffe")


@click.command("export", short_help="Write a run's model for other programs.")
@run_argument
@click.option("--to", "form", type=click.Choice(FORMS), default="onnx", show_default=True)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="By default model.onnx and so on in the run's folder.",
)
@click.option("--data", metavar="SOURCE", help="Other data than the run's own, of the same form.")
@click.option("--last", is_flag=True, help="The last values, where the run averaged them.")
@run_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def export_command(
    run: str | None,
    form: str,
    out: Path | None,
    data: str | None,
    last: bool,
    run_dir: Path | None,
    as_json: bool,
) -> None:
    """Write the model of RUN: ONNX, safetensors, TorchScript, a torch.export program, or for Caffe.

    It takes images as the workers do, [batch, channels, size, size], and gives scores before the
    softmax. caffe writes a prototxt beside the caffemodel, which OpenCV reads too.

    \b
    Examples:
      distbelief export                    # the newest run, as model.onnx in its folder
      distbelief export b834 --to caffe -o deploy/net.caffemodel
    """
    path = Path(run) if run is not None and Path(run).is_dir() else find(run, run_dir).path
    from distbelief.exported import PIXELS, export_run

    found = export_run(path, form, out, data, last=last)
    if as_json:
        told = dataclasses.asdict(found) | {"files": [str(file) for file in found.files]}
        click.echo(json_line("export", pixels=PIXELS, **told))
        return
    shape = ", ".join(map(str, found.input_shape))
    for file in found.files:
        click.echo(f"{file}  {file.stat().st_size / 1e6:,.1f} MB")
    click.echo(
        f"takes [batch, {shape}], {PIXELS}\n"
        f"gives scores of {found.num_classes:,} classes; {found.num_parameters:,} parameters"
    )
