"""Table: rows of figures for a person, by rich."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.console import Console
from rich.table import Table

R = TypeVar("R")

WIDTH = 160
"""Columns where no terminal says its own: a table in a file should not be cut."""


@dataclass(frozen=True, slots=True)
class Column(Generic[R]):
    """A head, and what of a row stands under it."""

    head: str
    cell: Callable[[R], str]
    is_text: bool = False
    """On the left; figures stand on the right."""


def show(title: str, columns: Sequence[Column[R]], rows: Sequence[R]) -> None:
    """Print a table to standard output."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        justify = "left" if column.is_text else "right"
        table.add_column(column.head, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    console.print(table)


def spread(median: float, low: float, high: float, digits: int = 1) -> str:
    """A median with its range."""
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def share(part: float) -> str:
    """A part of the whole, in percent."""
    return f"{part:.0%}"
