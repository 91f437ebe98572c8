"""TokenFile: what Ray's processes prove to each other that they belong together.

Whoever has it runs what they like on all hosts of the cluster. Ray's own `ray get-auth-token
--generate` writes it for every user of the machine to read, so it is made here.
"""

import os
import secrets
from pathlib import Path

from distbelief.cluster.cluster_file import TOKEN_FILE
from distbelief.cluster.document import Document
from distbelief.problem import Problem


def token_file_of(document: Document) -> Path | None:
    """Where the token of a cluster file lies on this machine."""
    mounts = document.data.get("file_mounts")
    for remote, local in (mounts if isinstance(mounts, dict) else {}).items():
        if str(remote).endswith(TOKEN_FILE):
            return Path(str(local)).expanduser()
    return None


def ensure(path: Path) -> bool:
    """See that there is a token that only its owner can read; returns whether it was made.

    Raises: Problem if others can read it, or it cannot be made.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        _make(path)
        return True
    if mode & 0o077:
        raise Problem(
            "DB-CLUSTER-008",
            f"{path} can be read by others (mode {mode & 0o777:o})",
            why="whoever has it runs what they like on every host of the cluster",
            fix=f"chmod 600 {path}; on a machine with other users also a new one: remove it",
        )
    return False


def _make(path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
    except OSError as error:
        raise Problem("DB-CLUSTER-008", f"no token can be written to {path}: {error}") from error
