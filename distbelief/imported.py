"""Imported: a run folder made of weights that were trained elsewhere: BVLC's GoogLeNet by Caffe.

What Caffe's network expects, BGR from 0 to 255 less a mean, is folded into its first convolution,
so that it takes the pixels that ours do and everything that a run's model can do is there for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distbelief.folder import RunFolder
from distbelief.job import DataConfig, Job, ModelConfig
from distbelief.model.caffemodel import Blobs, read_caffemodel
from distbelief.model.googlenet import AUXILIARY, GoogLeNet, load_caffe
from distbelief.model_file import save_model
from distbelief.problem import Problem
from distbelief.workers.pixels import DEVIATION, MEAN

CAFFE_MEAN = (123.0, 117.0, 104.0)
"""Of R, G and B, from 0 to 255, as BVLC's GoogLeNet was trained."""
FIRST, LAST = "conv1/7x7_s2", "loss3/classifier"
CHANNELS = 64
"""Of the first convolution, at width 1."""
MAX_BYTES = 2**30
IMAGE_SIZE = 224

_TORCHVISION = (b"inception3a.branch1", b"inception4e.branch4")
_PICKLED = (b"\x80\x02", b"\x80\x04", b"PK\x03\x04")


@dataclass(frozen=True, slots=True)
class Imported:
    """A model that has become one of ours."""

    folder: RunFolder
    num_layers: int
    num_parameters: int
    num_classes: int
    width: float


def import_model(
    file: Path,
    out: Path,
    source: str,
    seen: Callable[[int, int], None] | None = None,
) -> Imported:
    """Make a run folder of a .caffemodel: GoogLeNet of any width and classes, with its auxiliary
    heads where the file has them.

    out: the folder, which must not be there. source: the data that it is evaluated on where none
    is named. seen: told of the layers so far, and of how many there are.
    Raises: Problem; nothing is left behind then.
    """
    blobs = _read(file)
    try:
        classes, width = len(np.squeeze(blobs[LAST][1])), len(blobs[FIRST][0]) / CHANNELS
        has_aux = any(name.startswith(f"{head}/") for name in blobs for head in AUXILIARY.values())
        if width <= 0 or not classes:
            raise ValueError(f"{FIRST} has no channels, or {LAST} no classes")
        model = GoogLeNet(classes, width=width, aux=has_aux, image_size=IMAGE_SIZE)
        weight, bias = for_our_pixels(*blobs[FIRST])
        load_caffe(model, {**blobs, FIRST: [weight, bias]})
    except (KeyError, ValueError, TypeError, IndexError) as error:
        what = f"it has no layer {error}" if isinstance(error, KeyError) else str(error)
        raise Problem(
            "DB-MODEL-007",
            f"{file} is a caffemodel, but no GoogLeNet: {what}",
            fix="take bvlc_googlenet.caffemodel, or one of the same layers",
        ) from error
    job = Job(
        model=ModelConfig(
            factory="googlenet",
            width=width,
            args={
                "num_classes": classes,
                "in_channels": 3,
                "image_size": IMAGE_SIZE,
                "aux": has_aux,
            },
        ),
        data=DataConfig(source=source, image_size=IMAGE_SIZE),
    )
    folder = RunFolder.make(out.parent, out.name)
    folder.config.write_text(job.to_toml(), encoding="utf-8")
    if seen is not None:
        seen(len(blobs), len(blobs))
    save_model(model, folder.model)
    number = sum(parameter.numel() for parameter in model.parameters())
    return Imported(folder, len(blobs), number, classes, width)


def for_our_pixels(weight: Any, bias: Any) -> "tuple[torch.Tensor, torch.Tensor]":  # Any: arrays
    """A first convolution of Caffe's, [out, 3, k, k] on BGR less its mean, as one on ours.

    The same to rounding inside the image; at its border, where Caffe pads with its mean and we with
    ours, the mean may differ by 0.7 of 255.
    """
    theirs = torch.tensor(weight, dtype=torch.float64).flip(1)  # now of R, G, B
    scale = torch.tensor(DEVIATION, dtype=torch.float64) * 255
    shift = torch.tensor(MEAN, dtype=torch.float64) * 255 - torch.tensor(CAFFE_MEAN)
    moved = (theirs * shift.view(3, 1, 1)).sum((1, 2, 3))
    ours = theirs * scale.view(3, 1, 1)
    return ours.float(), (torch.tensor(bias, dtype=torch.float64).flatten() + moved).float()


def _read(file: Path) -> Blobs:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise Problem(
                "DB-MODEL-007",
                f"{file} has {file.stat().st_size:,} bytes, more than {MAX_BYTES:,}",
                fix="GoogLeNet's own has 53 million: is it another file?",
            )
        data = file.read_bytes()
    except OSError as error:
        raise Problem(
            "DB-MODEL-007", f"{file} cannot be read: {error.strerror}", fix="is it spelt right?"
        ) from error
    if any(name in data for name in _TORCHVISION):
        raise Problem(
            "DB-MODEL-007",
            f"{file} holds torchvision's googlenet, which is another network",
            why="it has 3x3 where the paper has 5x5, batch normalisation and no biases, and other "
            "paddings: its weights fit no layer of ours",
            fix="use it with torchvision itself, as --model module:function that returns it; or "
            "import BVLC's bvlc_googlenet.caffemodel",
        )
    if data.startswith(_PICKLED):
        raise Problem(
            "DB-MODEL-007",
            f"{file} is a pickle of torch, which could run any program when it is read",
            fix="save it as safetensors where you trust it, and load it in a factory of your own",
        )
    try:
        return read_caffemodel(data)
    except ValueError as error:
        raise Problem(
            "DB-MODEL-007",
            f"{file} cannot be imported: {error}",
            fix="give it a .caffemodel; runs of ours need no import",
        ) from error
