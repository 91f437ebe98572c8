"""Exported: the model of a run as a file that other programs read.

    safetensors   the state dict, as the run folder has it
    onnx          for onnxruntime and others; any number of images at once
    torchscript   a traced module, for torch.jit.load
    torch-export  an exported program, for torch.export.load
    caffe         prototxt and caffemodel, for OpenCV and Caffe; GoogLeNet only

All take float32 [batch, channels, size, size] as the workers do (`PIXELS`) and give scores, [batch,
classes]; the softmax is the caller's, but for caffe, whose last layer it is.
"""

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distbelief.loaded import load_run
from distbelief.model.caffemodel import write_caffemodel
from distbelief.model.googlenet import GoogLeNet
from distbelief.model.prototxt import layers_of, prototxt
from distbelief.model_file import save_model
from distbelief.problem import Problem
from distbelief.workers.pixels import DEVIATION, MEAN

PIXELS = (
    f"RGB from 0 to 1, less {', '.join(map(str, MEAN))}, by {', '.join(map(str, DEVIATION))}; "
    "digits and fashion-mnist as they are"
)
"""What an exported model is given, in words."""
INPUT, OUTPUT = "images", "scores"


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    form: str
    files: list[Path]
    input_shape: tuple[int, ...]
    """Of one image: channels, height, width."""
    num_classes: int
    num_parameters: int


def export_run(
    run: Path, form: str, out: Path | None = None, source: str | None = None, *, last: bool = False
) -> Exported:
    """Write the model of a run folder in one of `FORMS`.

    out: the file; by default beside the run's own model. source: data to learn the number of
    classes and the size of the images from, where the run's own is not here. last: the last values,
    where the run averaged them. Raises: Problem; a file that was there stays as it was then.
    """
    loaded = load_run(run, "train", source, last=last)
    model, shape = loaded.model.eval(), loaded.input_shape
    if shape is None:
        raise Problem(
            "DB-MODEL-008",
            f"{run} is not trained on images of one size: there is no example to export it by",
            fix="export it in Python: its state dict is in model.safetensors",
        )
    path = out or run / f"model{SUFFIXES[form]}"
    example = torch.zeros(2, *shape)
    try:
        with torch.no_grad():
            scores = model(example)
        if not isinstance(scores, Tensor) or scores.ndim != 2:
            raise TypeError(f"it gives a {type(scores).__name__}, no scores [batch, classes]")
        files = _WRITE[form](model, example, path)
    except Problem:
        raise
    except OSError as error:
        raise Problem(
            "DB-STORE-004", f"{path} cannot be written: {error}", fix="name another with --out"
        ) from error
    except Exception as error:  # torch's exporters raise whatever they meet in the user's model
        raise Problem(
            "DB-MODEL-008",
            f"{type(model).__name__} cannot be written as {form}: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix="try another --to; safetensors always works",
        ) from error
    number = sum(parameter.numel() for parameter in model.parameters())
    return Exported(form, files, shape, int(scores.shape[1]), number)


def _safetensors(model: nn.Module, example: Tensor, path: Path) -> list[Path]:
    save_model(model, path)
    return [path]


def _onnx(model: nn.Module, example: Tensor, path: Path) -> list[Path]:
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as error:
        raise Problem(
            "DB-ENV-004",
            f"{error.name} is not installed, and torch exports ONNX with it",
            fix="pip install 'distbelief[export]', or take another --to",
        ) from error
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {"pixels": PIXELS})
    return _replace(path, proto.SerializeToString())


def _torchscript(model: nn.Module, example: Tensor, path: Path) -> list[Path]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, example)  # type: ignore[no-untyped-call]
        part = path.with_name(f".{path.name}.{os.getpid()}")
        traced.save(str(part))
    part.replace(path)
    return [path]


def _torch_export(model: nn.Module, example: Tensor, path: Path) -> list[Path]:
    program = torch.export.export(
        model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    part = path.with_name(f".{path.name}.{os.getpid()}.pt2")
    torch.export.save(program, part)
    part.replace(path)
    return [path]


def _caffe(model: nn.Module, example: Tensor, path: Path) -> list[Path]:
    if not isinstance(model, GoogLeNet):
        raise TypeError("only GoogLeNet can be written for Caffe")
    layers = layers_of(model)
    weights = [(layer.name, layer.kind, layer.arrays) for layer in layers if layer.arrays]
    text = prototxt("GoogLeNet", layers, *example.shape[1:3])
    return [
        *_replace(path.with_suffix(".prototxt"), text.encode()),
        *_replace(path, write_caffemodel("GoogLeNet", weights)),
    ]


def _replace(path: Path, data: bytes) -> list[Path]:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return [path]


_WRITE: Mapping[str, Callable[[nn.Module, Tensor, Path], list[Path]]] = {
    "safetensors": _safetensors,
    "onnx": _onnx,
    "torchscript": _torchscript,
    "torch-export": _torch_export,
    "caffe": _caffe,
}
SUFFIXES = {
    "safetensors": ".safetensors",
    "onnx": ".onnx",
    "torchscript": ".ts",
    "torch-export": ".pt2",
    "caffe": ".caffemodel",
}
"""Of the files by default."""
