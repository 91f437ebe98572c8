"""Embedded: real data that comes with a package, held in memory, standardised.

digits                 1,797 real 8x8 digits inside scikit-learn; 1,437 train, 360 test
fashion-mnist[:PATH]   60,000 + 10,000 28x28 images in IDX files (gzip or not)
"""

import gzip
import importlib.util
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distbelief.workers.split import Read, Split, digest_of

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""

_DIGITS_TEST = int(
    "00a8251c80484240414030058109010615108420243402654411004100c14080701601032203209414cc0084"
    "050821008070080000981003c0101c008100411080007160200403013200100108106386a1d021000a501825"
    "0542020001220068408156ec216202200100838202404012180520100210d0000000501965043c8015c10021"
    "2440009023704000080c001202a00008051002080023a0120004018100001b2002000000500502429224a822"
    "041150100005088140051f0420489809005029000800483460140024008010005800a042c900826000020824"
    "ac11200000",
    16,
)
"""A bit for each digit, the first one's lowest: the 360 of the test split, as many of each kind as
scikit-learn's stratified split with random state 0 has them. Fixed for ever: results on `digits`
can be compared between versions."""
_IDX_IMAGES, _IDX_LABELS = 2051, 2049
_MAX_BYTES = 2**30
"""Of an unpacked file; those of Fashion-MNIST have 47 MB."""


@dataclass(frozen=True, slots=True)
class Tensors:
    """Samples in memory. A batch is one indexing, without a loop over samples."""

    inputs: Tensor
    """float32 [N, C, H, W], standardised with the training split's mean and deviation."""
    targets: Tensor
    """int64 [N]."""

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, indices: Sequence[int], epoch: int = 0) -> Read:
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
    rows = _digits()
    is_test = np.array([_DIGITS_TEST >> row & 1 for row in range(len(rows))], dtype=bool)
    train = rows[~is_test, :-1]
    mean, deviation = float(train.mean()), float(train.std())
    mine = rows[is_test if split == "test" else ~is_test]
    x, y = mine[:, :-1], mine[:, -1]
    inputs = torch.from_numpy(((x - mean) / deviation).astype(np.float32)).view(-1, 1, 8, 8)
    return split_of(_resized(inputs, image_size), torch.from_numpy(y.astype(np.int64)), 10, split)


def _digits() -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """[1797, 65]: 64 pixels from 0 to 16, and which digit it is."""
    found = importlib.util.find_spec("sklearn")
    if found is not None and found.origin is not None:
        path = Path(found.origin).with_name("datasets") / "data" / "digits.csv.gz"
        if path.is_file():
            return np.loadtxt(path, delimiter=",")
    # As it is meant to be read: that takes a second and more, in every process of a run.
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    return np.column_stack([images, targets])


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
    dimensions = magic & 0xFF
    header = 4 * (1 + dimensions)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = _at_most(file, header)
            if len(head) < header or int.from_bytes(head[:4], "big") != magic:
                raise ValueError(f"{path} is not an IDX file of {dimensions} dimensions")
            shape = tuple(np.frombuffer(head, ">u4", dimensions, 4).tolist())
            raw = _at_most(file, min(math.prod(shape), _MAX_BYTES) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from error
    if len(raw) != math.prod(shape):
        raise ValueError(f"{path} holds {len(raw)} bytes of data, its header says {shape}")
    return np.frombuffer(raw, np.uint8).reshape(shape)


def _at_most(file: IO[bytes] | gzip.GzipFile, limit: int) -> bytearray:
    """So many bytes of a file, which may unpack to far more, or fewer if it has no more."""
    data = bytearray()
    while len(data) < limit and (piece := file.read(min(2**20, limit - len(data)))):
        data += piece
    return data
