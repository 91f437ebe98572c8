"""Outpost: the run's foot on one host of a cluster: its folder there, its logs, and a sign of life.

It is an object that an engine has called from afar. Nothing of training passes through it, and it
starts no process.
"""

import contextlib
import os
import platform
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from distbelief import __version__
from distbelief.param_server.place import inside

NEWS_MAX = 2**20
"""Bytes of logs that are told at once."""
HOME = "~/.distbelief/runs"
"""Where a run's folder is on hosts that do not see the launcher's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a host is like, as its outpost sees it."""

    hostname: str
    cwd: str
    """Where the user's code is there."""
    run_path: str
    """The run's folder there."""
    is_shared: bool
    """That is the launcher's own folder."""
    versions: Mapping[str, str]


class Outpost:
    """See the top of this file. Used by one thread."""

    def __init__(self, run: str, run_path: str, mark: str) -> None:
        """run_path: the launcher's; mark: what is in its `launcher.json`, by which it is known.

        Raises: OSError where no folder can be made.
        """
        self._path = Path(run_path)
        self._is_shared = _read(self._path / "launcher.json") == mark
        if not self._is_shared:
            self._path = inside(Path(HOME).expanduser(), run)
            (self._path / "logs").mkdir(parents=True, exist_ok=True)

    def outlook(self) -> Outlook:
        return Outlook(
            hostname=socket.gethostname(),
            cwd=str(Path.cwd()),
            run_path=str(self._path),
            is_shared=self._is_shared,
            versions=versions(),
        )

    def lacks(self, paths: Mapping[str, str]) -> dict[str, str]:
        """Of some paths, by what they are for, those that are not there. Relative ones are in the
        folder of the user's code."""
        return {what: path for what, path in paths.items() if not Path(path).expanduser().exists()}

    def ask_to_end(self, pid: int) -> None:
        """SIGTERM to a process of this run."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)

    def news(self, told_before: Mapping[str, int]) -> dict[str, bytes]:
        """What is new in the logs, by the file's name.

        told_before: bytes of each that were told.
        """
        told: dict[str, bytes] = {}
        if self._is_shared:
            return told
        left = NEWS_MAX
        for path in sorted((self._path / "logs").iterdir()):
            begun = told_before.get(path.name, 0)
            with path.open("rb") as file:
                file.seek(begun)
                data = file.read(left)
            if data:
                told[path.name] = data
                left -= len(data)
        return told


def versions() -> dict[str, str]:
    """Of what has to be the same everywhere."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "distbelief": __version__}
    for name in ("torch", "ray"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def data_paths(source: str, script: str = "") -> dict[str, str]:
    """The paths that every host of a run must have, by what they are for."""
    paths = {"the script": script} if script else {}
    kind, _, path = source.partition(":")
    if script or not path or "://" in path:
        return paths
    if kind in ("folder", "fashion-mnist"):
        return {**paths, "the data": path}
    if kind == "wds":  # its folder: a pattern is of files
        folder = os.path.dirname(path.split("{")[0].split("*")[0])
        return {**paths, "the data": folder or "."}
    return paths
