"""Crops: the views of a test image over which the network's answers are averaged.

    1     the middle S x S, after the shorter side was made 256 (for S = 224)
    10    its corners and its middle, of the middle square, and their mirror images
          (Krizhevsky et al. 2012)
    144   4 scales (256, 288, 320, 352) x left, middle and right square (upper, middle and lower of
          an upright image) x (4 corners, the middle, the whole square) x mirrored or not
          (Szegedy et al. 2014 section 7)

Of another S than 224 the scales are in proportion.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

NUMBERS = (1, 10, 144)
SCALES = (256, 288, 320, 352)
OF = 224


@dataclass(frozen=True, slots=True)
class Square:
    """A square of the scaled image, and what is taken of it."""

    left: int
    top: int
    side: int
    crops: tuple[tuple[int, int], ...]
    """Left and top of each S x S, from the square's corner."""
    has_whole: bool
    """The square itself too, made S x S."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """An image made so large, and its squares."""

    width: int
    height: int
    squares: tuple[Square, ...]


def plan(number: int, width: int, height: int, size: int) -> tuple[Scaled, ...]:
    """Where the crops of a width x height image lie, without their mirror images.

    Raises: ValueError for another number than 1, 10 and 144.
    """
    if number not in NUMBERS:
        raise ValueError(f"{number} crops: there are {', '.join(map(str, NUMBERS))}")
    scales = SCALES if number == 144 else SCALES[:1]
    return tuple(_scaled(number, width, height, size, round(size * one / OF)) for one in scales)


def _scaled(number: int, width: int, height: int, size: int, side: int) -> Scaled:
    shorter = min(width, height)
    across, down = (max(side, round(length * side / shorter)) for length in (width, height))
    free = side - size
    corners = ((0, 0), (free, 0), (0, free), (free, free))
    centre = (round(free / 2), round(free / 2))
    crops = (centre,) if number == 1 else (*corners, centre)
    spare = max(across, down) - side
    starts = (0, round(spare / 2), spare) if number == 144 else (round(spare / 2),)
    squares = tuple(
        Square(start, 0, side, crops, number == 144)
        if across >= down
        else Square(0, start, side, crops, number == 144)
        for start in starts
    )
    return Scaled(across, down, squares)


def largest(number: int, size: int) -> int:
    """The shorter side of the largest scaled image."""
    return round(size * max(SCALES if number == 144 else SCALES[:1]) / OF)


def take(image: Image.Image, number: int, size: int) -> Tensor:
    """The crops of an RGB image: uint8 [number, 3, size, size]; each second one is the mirror image
    of the one before it, where there are mirror images."""
    out: list[Tensor] = []
    for scaled in plan(number, *image.size, size):
        large = image.resize((scaled.width, scaled.height), Image.Resampling.BILINEAR)
        for square in scaled.squares:
            for left, top in square.crops:
                x, y = square.left + left, square.top + top
                out.append(_tensor(large.crop((x, y, x + size, y + size))))
            if square.has_whole:
                box = (square.left, square.top, square.left + square.side, square.top + square.side)
                out.append(_tensor(large.crop(box).resize((size, size), Image.Resampling.BILINEAR)))
    if number == 1:
        return out[0].unsqueeze(0)
    return torch.stack([view for crop in out for view in (crop, crop.flip(-1))])


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
