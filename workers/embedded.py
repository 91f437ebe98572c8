"""Embedded: real data that comes with a package, held in memory, standardised.

digits                 1,797 real 8x8 digits inside scikit-learn; 1,437 train, 360 test
fashion-mnist[:PATH]   60,000 + 10,000 28x28 images in IDX files (gzip or not)
"""

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distbelief.workers.split import Read, Split, digest_of

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""

_IDX_IMAGES, _IDX_LABELS = 2051, 2049


@dataclass(frozen=True, slots=True)
class Tensors:
    """Samples in memory. A batch is one indexing, without a loop over samples."""

    inputs: Tensor
    """float32 [N, C, H, W], standardised with the training split's mean and deviation."""
    targets: Tensor
    """int64 [N]."""

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, indices: Sequence[int]) -> Read:
        at = torch.as_tensor(indices)
        return Read(self.inputs[at], self.targets[at], len(at))

    def close(self) -> None:
        """Nothing is open."""


def split_of(inputs: Tensor, targets: Tensor, num_classes: int | None, name: str) -> Split:
    """Tensors as a split."""
    shape = tuple(inputs.shape[1:])
    return Split(
        samples=Tensors(inputs, targets),
        name=name,
        num_classes=num_classes,
        input_shape=(shape[0], shape[1], shape[2]) if len(shape) == 3 else None,
        digest=digest_of(str(tuple(inputs.shape)).encode(), targets.numpy().tobytes()),
    )


def open_digits(split: str, image_size: int) -> Split:
    """The digits of scikit-learn. image_size: 0 leaves them at 8 x 8."""
    # Here and not at the top: it takes a second, and only this source needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, targets = load_digits(return_X_y=True)
    # Fixed for ever: results on `digits` can be compared between versions.
    parts = train_test_split(images, targets, test_size=360, stratify=targets, random_state=0)
    train_x, test_x, train_y, test_y = parts
    mean, deviation = float(train_x.mean()), float(train_x.std())
    x, y = (train_x, train_y) if split == "train" else (test_x, test_y)
    inputs = torch.from_numpy(((x - mean) / deviation).astype(np.float32)).view(-1, 1, 8, 8)
    return split_of(_resized(inputs, image_size), torch.from_numpy(y.astype(np.int64)), 10, split)


def open_fashion_mnist(folder: Path, split: str, image_size: int) -> Split:
    """Fashion-MNIST, or anything of its form. image_size: 0 leaves it at 28 x 28.

    Raises: ValueError for files that are not what they should be; FileNotFoundError with what
        to install.
    """
    stem = "train" if split == "train" else "t10k"
    pixels = _read_idx(folder, f"{stem}-images-idx3-ubyte", _IDX_IMAGES)
    labels = _read_idx(folder, f"{stem}-labels-idx1-ubyte", _IDX_LABELS)
    if len(pixels) != len(labels):
        raise ValueError(f"{folder}: {len(pixels)} images but {len(labels)} labels in {split}")
    if not len(labels):
        raise ValueError(f"{folder}: no images in {split}")
    if labels.max(initial=0) > 9:
        raise ValueError(f"{folder}: a label is {labels.max()}, Fashion-MNIST has 0 to 9")
    # Mean and deviation of the 60,000 training images, in units of 255.
    inputs = (torch.from_numpy(pixels).float() / 255 - 0.2860) / 0.3530
    targets = torch.from_numpy(labels.astype(np.int64))
    return split_of(_resized(inputs.unsqueeze(1), image_size), targets, 10, split)


def _resized(inputs: Tensor, image_size: int) -> Tensor:
    if image_size in (0, inputs.shape[-1]):
        return inputs
    size = (image_size, image_size)
    return F.interpolate(inputs, size=size, mode="bilinear", align_corners=False)


def _read_idx(
    folder: Path, name: str, magic: int
) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """An IDX file: big-endian magic and sizes, then bytes. A writable uint8 array."""
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            break
    else:
        raise FileNotFoundError(
            f"no {name} nor {name}.gz in {folder}. On Debian: apt-get install "
            "dataset-fashion-mnist; or name the folder: --data fashion-mnist:PATH"
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from error
    dimensions = magic & 0xFF
    header = 4 * (1 + dimensions)
    if len(raw) < header or int.from_bytes(raw[:4], "big") != magic:
        raise ValueError(f"{path} is not an IDX file of {dimensions} dimensions")
    shape = tuple(np.frombuffer(raw, ">u4", dimensions, 4).tolist())
    if len(raw) - header != math.prod(shape):
        raise ValueError(f"{path} holds {len(raw) - header} bytes of data, its header says {shape}")
    return np.frombuffer(bytearray(raw), np.uint8, offset=header).reshape(shape)
