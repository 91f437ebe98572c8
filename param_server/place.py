"""Place: where a name may lead that was read from a file, or told by another machine."""

import re
from pathlib import Path

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""Of runs, processes, keys and files of ours."""


def inside(folder: Path, name: str) -> Path:
    """The path of what is called `name` in a folder, which may not be there.

    Raises: ValueError for a name that is none (a path, `..`, with NUL, ...), or that of a link.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is no name of a file of ours: {NAME.pattern}")
    path = folder / name
    if path.is_symlink():
        raise ValueError(f"{path} is a link to {path.readlink()}, which we did not make")
    return path
