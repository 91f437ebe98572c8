"""Plot: rows as bars, by matplotlib, which is loaded for this alone."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from distbelief.problem import Problem

SUFFIXES = (".png", ".svg")


class Bar(NamedTuple):
    """One figure with its range."""

    group: str
    """Bars of a group stand together; its name stands under them."""
    label: str
    value: float
    low: float
    high: float


def load() -> ModuleType:
    """matplotlib, drawing into files only. Raises: Problem if it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise Problem(
            "DB-ENV-004",
            "matplotlib is not installed, and --plot draws with it",
            fix="pip install 'distbelief[bench]', or leave --plot out",
        ) from error
    matplotlib.use("Agg")
    return matplotlib


def plot(path: Path, title: str, unit: str, bars: Sequence[Bar]) -> None:
    """Draw bars side by side into a PNG or SVG file. Raises: Problem if it cannot be written."""
    load()
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(bar.group for bar in bars))
    labels = list(dict.fromkeys(bar.label for bar in bars))
    figure = Figure(figsize=(2.5 + 0.45 * len(bars), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(labels)
    for number, label in enumerate(labels):
        mine = [bar for bar in bars if bar.label == label]
        at = [groups.index(bar.group) + (number - (len(labels) - 1) / 2) * width for bar in mine]
        values = [bar.value for bar in mine]
        ranges = [[b.value - b.low for b in mine], [b.high - b.value for b in mine]]
        axes.bar(at, values, width, yerr=ranges, capsize=2, label=label)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    if len(labels) > 1:
        axes.legend(fontsize="small")
    try:
        figure.savefig(path)
    except OSError as error:
        raise Problem("DB-STORE-004", f"the plot cannot be written: {error}") from error
