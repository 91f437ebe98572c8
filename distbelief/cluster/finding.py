"""Finding: one thing that is to be said of a file: where, what, and what to do about it."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Path_ = tuple[str | int, ...]
"""Keys and positions from the top of a document down to a value."""

Level = Literal["error", "unsafe", "todo", "warning"]
LEVELS: tuple[Level, ...] = ("error", "unsafe", "todo", "warning")
"""error: it cannot work, or not as written. unsafe: others could get in. todo: a place to be filled
in. warning: it works, and is hardly what was meant."""

REFUSED: tuple[Level, ...] = ("error", "unsafe")
"""Mistakes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Of a document. `line` begins with 1."""

    level: Level
    path: Path_
    what: str
    fix: str = ""
    file: str = ""
    line: int | None = None

    @property
    def where(self) -> str:
        """The path as a person would write it: `available_node_types.ps.resources`."""
        text = ""
        for part in self.path:
            text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
        return text or "(top)"

    @property
    def place(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"

    @property
    def text(self) -> str:
        lines = f"{self.place}: {self.level}: {self.where}: {self.what}"
        return f"{lines}\n    try   {self.fix}" if self.fix else lines


def nearest(word: object, known: Iterable[str]) -> str:
    """`did you mean region?`, or what there is, if nothing is near."""
    words = sorted(known)
    near = difflib.get_close_matches(str(word), words, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(words)}"
