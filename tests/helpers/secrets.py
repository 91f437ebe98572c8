"""The secrets of a run, and where they must not be found."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import distbelief.run
from distbelief.keyring import LAUNCHER, keyring_of
from distbelief.param_server.secret import Secret


class Secrets:
    """What the runs launched from now on keep secret, and a look for it in every place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known: list[bytes] = []
        self.seen: set[str] = set()
        """Names of processes that were looked at while they ran."""
        self.found: list[str] = []
        self._last_starts: list[set[bytes]] = []
        make = keyring_of

        def keyring(job):
            ring = make(job)
            if ring is not None:
                names = [name for name in ring.listed if name != "server"]
                kept = [ring.of(name).mine.secret.encode() for name in names]
                serving = ring.of(LAUNCHER).serving
                assert serving is not None
                self._last_starts.append({*kept, serving.encode()})
                self.known += [*kept, serving.encode()]
            return ring

        def secret(text):
            self.known.append(text.encode())
            return Secret(text)

        monkeypatch.setattr(distbelief.run, "keyring_of", keyring)
        monkeypatch.setattr(distbelief.run, "Secret", secret)

    @property
    def starts(self) -> list[set[bytes]]:
        """Secret keys by start of a run, or resume."""
        return self._last_starts

    def look_at_processes(self, runs: Path) -> None:
        """Command line and environment of all that run on this machine for us."""
        for file in runs.glob("*/processes.json"):
            self.seen |= {process["name"] for process in json.loads(file.read_text())}
        for pid in descendants(os.getpid()):
            for what in ("cmdline", "environ"):
                try:
                    self._look(f"/proc/{pid}/{what}", Path(f"/proc/{pid}/{what}").read_bytes())
                except OSError:  # it has ended
                    continue

    def look_at_files(self, folder: Path) -> int:
        """All files below a folder; returns how many there were."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        for path in files:
            self._look(str(path), path.read_bytes())
        return len(files)

    def look_at(self, where: str, text: str) -> None:
        self._look(where, text.encode())

    def _look(self, where: str, data: bytes) -> None:
        self.found += [f"{where} has {secret!r}" for secret in self.known if secret in data]


def descendants(pid: int) -> Iterator[int]:
    """A process, its children, theirs ...; those whose parent has died are not found."""
    yield pid
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for task in tasks:
        try:
            children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
        except OSError:
            continue
        for child in children:
            yield from descendants(int(child))
