"""Pictures: what a run looked like, drawn by matplotlib, which is loaded for this alone."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from distbelief.problem import Problem

SUFFIXES = (".png", ".svg")
FILTER_PIXELS = 6
"""Of the picture, for one of a filter."""


def write_picture(
    path: Path,
    onto: Callable[[Any], None],  # Any: matplotlib's Figure
    side: float,
    height: float | None = None,
) -> None:
    """Draw a figure into a file. side: of the square, in inches; height: where it is none.

    Raises: Problem if matplotlib is not there, the suffix is none of `SUFFIXES`, or the file cannot
    be written; one that was there stays as it was.
    """
    if path.suffix not in SUFFIXES:
        raise Problem(
            "DB-USE-006",
            f"{path} is neither a .png nor an .svg",
            fix=f"name it {path.stem}.png",
        )
    try:
        import matplotlib
    except ImportError as error:
        raise Problem(
            "DB-ENV-004",
            "matplotlib is not installed, and pictures are drawn with it",
            fix="pip install 'distbelief[bench]', or leave the picture out",
        ) from error
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(side, height or side), layout="constrained")
    onto(figure)
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(part, dpi=120)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise Problem(
            "DB-STORE-004",
            f"{path} cannot be written: {error.strerror or error}",
            fix="name another file",
        ) from error


def first_filters(model: nn.Module) -> Tensor | None:
    """Weights of the first convolution that sees the image, [out, in, k, k]; None without one."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            return module.weight.detach()
    return None


def tile(filters: Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Filters side by side as an image: uint8 [height, width, 3].

    Each is stretched to its own range, as is usual. Of 3 channels they are in colour, else the mean
    of their channels is grey.
    """
    weights = filters.float().cpu()
    if weights.shape[1] != 3:
        weights = weights.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    low = weights.amin((1, 2, 3), keepdim=True)
    span = (weights.amax((1, 2, 3), keepdim=True) - low).clamp_min(1e-12)
    scaled = ((weights - low) / span * 255).round().byte().permute(0, 2, 3, 1).numpy()
    large = scaled.repeat(FILTER_PIXELS, 1).repeat(FILTER_PIXELS, 2)
    count, side = len(large), large.shape[1]
    columns = int(np.ceil(np.sqrt(count)))
    lines = -(-count // columns)
    step = side + 2
    sheet = np.full((lines * step + 2, columns * step + 2, 3), 255, np.uint8)
    for number, one in enumerate(large):
        top, left = 2 + number // columns * step, 2 + number % columns * step
        sheet[top : top + side, left : left + side] = one
    return sheet


def draw_curves(
    path: Path,
    title: str,
    train: tuple[Sequence[float], Sequence[float]],
    tests: Sequence[tuple[float, float | None, float | None]],
) -> None:
    """Learning curves over seconds since the start.

    train: seconds and losses. tests: (seconds, loss, top-1) of evaluations. Raises: Problem as
    `write_picture`.
    """

    def onto(figure: Any) -> None:  # Any: matplotlib's Figure
        above, below = figure.subplots(2, sharex=True)
        above.plot(*train, label="train loss", linewidth=1)
        losses = [(at, loss) for at, loss, _ in tests if loss is not None]
        if losses:
            above.plot(*zip(*losses, strict=True), "o-", label="test loss", markersize=3)
        above.set_ylabel("loss")
        above.set_title(title)
        above.legend(fontsize="small")
        tops = [(at, 100 * top1) for at, _, top1 in tests if top1 is not None]
        if tops:
            below.plot(*zip(*tops, strict=True), "o-", markersize=3)
        below.set_ylabel("test top-1, %")
        below.set_xlabel("seconds")
        for axes in (above, below):
            axes.grid(alpha=0.3)

    write_picture(path, onto, 7.0, 6.0)
