"""Data: from the name of a source to tensors. Real data that needs no download comes first.

digits                 1,797 real 8x8 digits inside scikit-learn; 1,437 train, 360 test
fashion-mnist[:PATH]   60,000 + 10,000 28x28 images in IDX files (gzip or not)
"""

import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SPLITS = ("train", "test")
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""

_IDX_IMAGES, _IDX_LABELS = 2051, 2049


@dataclass(frozen=True, slots=True)
class Images:
    """A split in memory."""

    inputs: Tensor
    """float32 [N, C, H, W], standardised with the training split's mean and deviation."""
    targets: Tensor
    """int64 [N]."""
    num_classes: int

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The samples at int64 indices [B]."""
        return self.inputs[indices], self.targets[indices]

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples in order; the last batch may be shorter."""
        for start in range(0, len(self), batch_size):
            yield self.inputs[start : start + batch_size], self.targets[start : start + batch_size]


def load(source: str, split: str, image_size: int = 0) -> Images:
    """Open a split of a source.

    image_size: images are resized to this square, bilinearly; 0 leaves them as they are.
    Raises: ValueError for an unknown source or split, or files that are not what they should
        be; FileNotFoundError with what to install.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    kind, _, path = source.partition(":")
    if kind == "digits" and not path:
        images = _digits(split)
    elif kind == "fashion-mnist":
        images = _fashion_mnist(split, Path(path).expanduser() if path else FASHION_MNIST)
    else:
        raise ValueError(f"data source {source!r} is none of digits, fashion-mnist[:PATH]")
    if image_size < 0:
        raise ValueError(f"image_size must be at least 0, got {image_size}")
    if image_size and images.inputs.shape[-1] != image_size:
        size = (image_size, image_size)
        inputs = F.interpolate(images.inputs, size=size, mode="bilinear", align_corners=False)
        images = Images(inputs, images.targets, images.num_classes)
    return images


def _digits(split: str) -> Images:
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
    return Images(inputs, torch.from_numpy(y.astype(np.int64)), 10)


def _fashion_mnist(split: str, folder: Path) -> Images:
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
    return Images(inputs.unsqueeze(1), torch.from_numpy(labels.astype(np.int64)), 10)


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
