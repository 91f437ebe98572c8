"""Tail: what a file has got since the last look; how a script's words reach the terminal."""

from pathlib import Path

READ_MAX = 2**20
"""Bytes taken at one look: a script that writes without end must not hold up the run."""


class Tail:
    """Reads the lines that are added to a file. Used by one thread."""

    def __init__(self, path: Path) -> None:
        """path: need not be there yet. What is in it already is not read."""
        self._path = path
        self._position = path.stat().st_size if path.is_file() else 0
        self._rest = b""

    def lines(self, *, last: bool = False) -> list[str]:
        """New whole lines; with `last` also one that has no end yet."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = file.read(-1 if last else READ_MAX)
        except OSError:  # not there yet, or no more
            return []
        self._position += len(data)
        *lines, rest = (self._rest + data).split(b"\n")
        if rest and (last or len(rest) > READ_MAX):
            lines.append(rest)
            rest = b""
        self._rest = _visible(rest)
        return [_visible(line).decode(errors="replace").rstrip("\r") for line in lines]


def _visible(line: bytes) -> bytes:
    """What a terminal still shows of a line that a progress bar has written over and over."""
    return line[line.rfind(b"\r", 0, max(0, len(line) - 1)) + 1 :]
