"""Pixels: from the bytes of an image file to a tensor, and what is done where that fails.

Always RGB: grey, palette, CMYK and transparent images are converted (transparency is dropped, as
torchvision drops it), 16-bit ones scaled to 8. Orientation tags of cameras are not followed, as
torchvision does not. The shorter side is resized to S, bilinearly, and the middle S x S is kept,
unless another view of the image is drawn (view.py).
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from distbelief.workers.crops import largest, take
from distbelief.workers.split import Read
from distbelief.workers.view import draw, show

EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "ppm", "gif", "tif", "tiff"})
"""Names of image files end so; what a file is, its content says."""
MAX_PIXELS = 89_478_485
"""A larger image is refused: it would be a quarter of a gigabyte. Pillow's own line for a
decompression bomb."""
MAX_BYTES = 256 * 2**20
"""A larger file is refused before it is read."""
LARGEST_SIZE = 224
"""The side that is chosen for images of any size is at most this: GoogLeNet's."""

# No other plugin of Pillow is let near the bytes: the one for PostScript starts a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "GIF", "TIFF")
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's R, G and B, from 0 to 1: a network is given pixels less the one, by the other."""
_MEAN = torch.tensor(MEAN).view(3, 1, 1)
_DEVIATION = torch.tensor(DEVIATION).view(3, 1, 1)
SIZE_FROM = 100
"""The first image that can be read is looked for among so many."""


class BadSample(Exception):
    """A sample that cannot be read."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.name = name
        self.why = why


class Files(Protocol):
    """Image files by their index."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def load(self, index: int) -> bytes:
        """Raises: BadSample."""
        ...

    def close(self) -> None: ...


class Pictures:
    """Image files and their classes as samples: uint8 [B, 3, size, size] and int64 [B]."""

    def __init__(
        self,
        files: Files,
        targets: Sequence[int] | np.ndarray,
        size: int,
        views: str = "middle",
        seed: int = 0,
    ) -> None:
        """views: the recipe by which a view of each image is drawn (view.py), anew in each epoch;
        the same for the same seed, whichever process reads it."""
        self._files = files
        self._targets = np.asarray(targets, np.int64)
        self._size = size
        self._views = views
        self._seed = seed

    def crops(self, number: int) -> "CroppedPictures":
        """The same images, each as the crops of a test (crops.py)."""
        return CroppedPictures(self._files, self._targets, self._size, number)

    def drawn(self, views: str, seed: int) -> "Pictures":
        """The same images, of which views are drawn; what is open is open for both."""
        return Pictures(self._files, self._targets, self._size, views, seed)

    def __len__(self) -> int:
        return len(self._targets)

    def read(self, indices: Sequence[int], epoch: int = 0) -> Read:
        pixels: list[Tensor] = []
        targets: list[int] = []
        bad: list[tuple[str, str]] = []
        for index in indices:
            try:
                data, name = self._files.load(index), self._files.name(index)
                pixels.append(self._decode(data, name, index, epoch))
            except BadSample as error:
                bad.append((error.name, error.why))
            else:
                targets.append(int(self._targets[index]))
        if not pixels:
            return Read(None, None, 0, tuple(bad))
        return Read(torch.stack(pixels), torch.tensor(targets), len(pixels), tuple(bad))

    def close(self) -> None:
        self._files.close()

    def _decode(self, data: bytes, name: str, index: int, epoch: int) -> Tensor:
        random = np.random.default_rng((self._seed, epoch, index))
        return decode(data, self._size, name, self._views, random)


class CroppedPictures(Pictures):
    """Image files for a test: uint8 [B, crops, 3, size, size] and int64 [B]."""

    def __init__(
        self, files: Files, targets: Sequence[int] | np.ndarray, size: int, number: int
    ) -> None:
        super().__init__(files, targets, size)
        self._number = number

    def _decode(self, data: bytes, name: str, index: int, epoch: int) -> Tensor:
        return decode_crops(data, self._size, name, self._number)


def decode(
    data: bytes,
    size: int,
    name: str,
    views: str = "middle",
    random: np.random.Generator | None = None,
) -> Tensor:
    """A view of an image as uint8 [3, size, size]. name: of the file, for the error.

    views: the recipe by which the view is drawn, from `random`. Raises: BadSample.
    """
    try:
        with _opened(data) as image:
            width, height = image.size
            view = draw(views, width, height, size, random or np.random.default_rng())
            # JPEG can be decoded at a half, a quarter or an eighth, no smaller than asked for:
            # three times as fast for a photograph of 500 x 400.
            left, top, right, bottom = view.box
            share = size / min(right - left, bottom - top)
            image.draft("RGB", (round(width * share), round(height * share)))
            rgb = _as_rgb(image)
            shown = show(rgb, view, size, (rgb.width / width, rgb.height / height))
        return torch.from_numpy(np.array(shown)).permute(2, 0, 1)
    except Exception as error:  # Pillow raises whatever it meets in the bytes
        raise BadSample(name, _why(error)) from error


def decode_crops(data: bytes, size: int, name: str, number: int) -> Tensor:
    """The crops of an image for a test, uint8 [number, 3, size, size]; see crops.py.

    Raises: BadSample.
    """
    try:
        with _opened(data) as image:
            side = largest(number, size)
            image.draft("RGB", (side, side))
            return take(_as_rgb(image), number, size)
    except Exception as error:
        raise BadSample(name, _why(error)) from error


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        _refuse_bombs()
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _see_size(image)
            yield image


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] as float32 with the mean and deviation of ImageNet."""
    mean, deviation = _MEAN.to(pixels.device), _DEVIATION.to(pixels.device)
    return pixels.float().div_(255).sub_(mean).div_(deviation)


def size_of(files: Files) -> int:
    """The side that suits some files: the shorter one of the first that is an image, at most 224.

    Raises: ValueError if none of the first ones is an image.
    """
    first: BadSample | None = None
    for index in range(min(len(files), SIZE_FROM)):
        try:
            with _opened(files.load(index)) as image:
                return min(*image.size, LARGEST_SIZE)
        except BadSample as error:
            first = first or error
        except Exception as error:  # noqa: BLE001 - as in `decode`
            first = first or BadSample(files.name(index), _why(error))
    raise ValueError(f"none of the first {SIZE_FROM} images can be read; {first}")


def _refuse_bombs() -> None:
    """Between MAX_PIXELS and twice that, Pillow would only warn."""
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def _see_size(image: Image.Image) -> None:
    """By a line of our own: a user's program may have taken Pillow's away."""
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I"):  # 16 bits; convert("RGB") would cut all above 255 off
        values = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of an unknown range")
    return image.convert("RGB")


def _why(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {MAX_PIXELS:,} pixels"
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return f"{type(error).__name__}: {error}"
