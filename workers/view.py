"""View: the part of a training image that is taken, and what is done to it. Drawn purely: of a size
and a generator; shown by Pillow.

middle  the shorter side becomes S, the middle S x S is kept: nothing is drawn
paper   8 to 100 % of the area, sides as 3:4 to 4:3, a random interpolation, mirrored or not, and
        brightness, contrast, colour and lighting changed. Source: Szegedy et al. 2014 section 6
caffe   the image warped to 256 x 256 (for S = 224), a random S x S of it, mirrored or not; as
        BVLC's GoogLeNet was trained
small   for 32 to 64 pixels: S x S moved by up to S/8 to each side over grey, mirrored or not
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

RECIPES = ("middle", "paper", "caffe", "small")

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

AREA = (0.08, 1.0)
"""Share of the image that a crop of `paper` has, uniformly."""
ASPECT = (3 / 4, 4 / 3)
"""Width over height of such a crop. The paper says `randomly`; that the logarithm is uniform, so
that upright and lying ones are equally likely, is ours."""
TRIES = 10
"""Crops are drawn until one fits into the image, so often; then it is the largest in its middle."""
WARPED, TAKEN = 256, 224
"""Of `caffe`: sides of the warped image and of what is taken of it."""
FACTOR = (0.5, 1.5)
"""Of brightness, contrast and colour, uniformly, in a random order. The paper cites Howard 2013 and
gives no numbers."""
LIGHTING = 0.1
"""Standard deviation along each principal component of ImageNet's colours (Krizhevsky et al. 2012).
"""
GREY = (124, 116, 104)
"""The mean colour of ImageNet: what `small` fills in is 0 for the network."""

_RESAMPLING = (
    Image.Resampling.BILINEAR,
    Image.Resampling.BOX,  # "area"
    Image.Resampling.NEAREST,
    Image.Resampling.BICUBIC,
)
_ENHANCE = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
_COMPONENTS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)
"""Eigenvectors of ImageNet's colours as columns, of R, G, B from 0 to 1."""
_DEVIATIONS = np.array([0.2175, 0.0188, 0.0045])
"""Their eigenvalues, as they are used since Krizhevsky."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What is taken of one image."""

    box: Box
    """In pixels of the image as it is; becomes S x S."""
    resampling: Image.Resampling = Image.Resampling.BILINEAR
    is_mirrored: bool = False
    shift: tuple[int, int] = (0, 0)
    """To the right and down, of the S x S."""
    factors: tuple[tuple[int, float], ...] = ()
    """Of brightness (0), contrast (1) and colour (2), in the order in which they are applied."""
    lighting: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Added to R, G and B, in units of 255."""


def draw(recipe: str, width: int, height: int, size: int, random: np.random.Generator) -> View:
    """A view of an image of width x height, which is to become size x size."""
    if recipe == "middle":
        return View(box=middle(width, height))
    if recipe == "paper":
        box = draw_box(width, height, random)
        order = random.permutation(len(_ENHANCE)).tolist()
        shifts = _COMPONENTS @ (random.normal(0.0, LIGHTING, 3) * _DEVIATIONS) * 255
        return View(
            box=box,
            resampling=_RESAMPLING[int(random.integers(len(_RESAMPLING)))],
            is_mirrored=bool(random.random() < 0.5),
            factors=tuple((which, float(random.uniform(*FACTOR))) for which in order),
            lighting=(float(shifts[0]), float(shifts[1]), float(shifts[2])),
        )
    if recipe == "caffe":
        left, top = random.integers(0, WARPED - TAKEN + 1, 2) / WARPED
        side = TAKEN / WARPED
        box = (left * width, top * height, (left + side) * width, (top + side) * height)
        return View(box=box, is_mirrored=bool(random.random() < 0.5))
    if recipe == "small":
        right, down = random.integers(-(size // 8), size // 8 + 1, 2).tolist()
        return View(
            box=middle(width, height),
            is_mirrored=bool(random.random() < 0.5),
            shift=(right, down),
        )
    raise ValueError(f"recipe of views {recipe!r} is none of {', '.join(RECIPES)}")


def middle(width: int, height: int) -> Box:
    """The largest square in the middle."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def draw_box(width: int, height: int, random: np.random.Generator) -> Box:
    """A crop as the paper takes it: whole pixels, inside the image."""
    for _ in range(TRIES):
        area = random.uniform(*AREA) * width * height
        aspect = math.exp(random.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left = int(random.integers(0, width - across + 1))
            top = int(random.integers(0, height - down + 1))
            return left, top, left + across, top + down
    most = min(width, height * ASPECT[1]), min(height, width / ASPECT[0])
    margin = (width - most[0]) / 2, (height - most[1]) / 2
    return *margin, margin[0] + most[0], margin[1] + most[1]


def show(image: Image.Image, view: View, size: int, scale: tuple[float, float]) -> Image.Image:
    """The view of an RGB image: size x size.

    scale: pixels of this image for one of those that the view's box is in, across and down: it may
    have been decoded smaller.
    """
    across, down = scale
    left, top, right, bottom = view.box
    box = (
        left * across,
        top * down,
        min(right * across, image.width),
        min(bottom * down, image.height),
    )
    if image.size != (size, size) or box != (0, 0, size, size):
        image = image.resize((size, size), view.resampling, box)
    if view.is_mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if view.shift != (0, 0):
        canvas = Image.new("RGB", (size, size), GREY)
        canvas.paste(image, view.shift)
        image = canvas
    for which, factor in view.factors:
        image = _ENHANCE[which](image).enhance(factor)
    if any(view.lighting):
        levels = np.arange(256.0)
        table = [np.clip(np.round(levels + add), 0, 255) for add in view.lighting]
        image = image.point(np.concatenate(table).astype(int).tolist())
    return image
