"""RunFolder: the files that a run leaves, and how other commands find and speak to a run.

Everything in it is for reading by people and programs; what a run needs to go on is in
`config.toml`, `checkpoint.json` and `snapshots/`. Small files are replaced whole, so a reader
never sees half of one.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distbelief.param_server.place import inside
from distbelief.problem import Problem

RUNS = "runs"
"""Where run folders are made, unless another place is named."""
STOP_WORDS = {"safe": 1, "now": 2}
"""What the file `stop` may hold, and the level of `Stop` it asks for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """The process that runs, or ran, a run."""

    pid: int
    host: str
    started_at: float
    """Unix seconds."""
    process_began: str
    """The kernel's start time of that pid: a later process may have the same number."""
    cwd: str
    """Where it was called: the user's modules are found from here."""
    version: str

    @classmethod
    def of_this_process(cls, version: str) -> "Launcher":
        return cls(
            pid=os.getpid(),
            host=socket.gethostname(),
            started_at=time.time(),
            process_began=began_at(os.getpid()),
            cwd=str(Path.cwd()),
            version=version,
        )

    @property
    def is_alive(self) -> bool | None:
        """Whether it still runs; None where that cannot be seen from this machine."""
        if self.host != socket.gethostname() or not self.process_began:
            return None
        return began_at(self.pid) == self.process_began


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run's folder. Nothing is read before it is asked for."""

    path: Path

    @classmethod
    def make(cls, parent: Path, run: str) -> "RunFolder":
        """Raises: Problem if it cannot be made."""
        folder = cls(inside(parent, run))
        try:
            folder.logs.mkdir(parents=True)
        except OSError as error:
            raise Problem(
                "DB-STORE-002",
                f"the run folder {folder.path} cannot be made: {error}",
                fix="name another place with --run-dir",
            ) from error
        return folder

    @property
    def run(self) -> str:
        """Id of the run: the folder's name."""
        return self.path.name

    @property
    def resume_command(self) -> str:
        """What goes on with it, to be copied; the current folder is where it was launched."""
        parent = self.path.parent
        where = "" if parent == Path(RUNS) else f" --run-dir {parent}"
        return f"distbelief resume {self.run}{where}"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"

    @property
    def config(self) -> Path:
        """The resolved job, TOML."""
        return self.path / "config.toml"

    @property
    def model(self) -> Path:
        """State dict of the trained model, safetensors."""
        return self.path / "model.safetensors"

    @property
    def last(self) -> Path:
        """As `model`, of the last values, where the model is their average."""
        return self.path / "last.safetensors"

    # The files that are JSON. A reader gets None for one that is missing or damaged.

    @property
    def launcher(self) -> Launcher | None:
        data = self._read("launcher.json")
        try:
            return None if data is None else Launcher(**data)
        except TypeError:  # of another version
            return None

    def write_launcher(self, launcher: Launcher) -> None:
        self.write("launcher.json", asdict(launcher))

    @property
    def left_over(self) -> list[tuple[str, int]]:
        """(name, pid) of this run's processes that still run on this machine."""
        try:
            rows = json.loads((self.path / "processes.json").read_text(encoding="utf-8"))
            return [
                (row["name"], row["pid"])
                for row in rows
                if row["host"] == socket.gethostname()
                and row["began"]
                and began_at(row["pid"]) == row["began"]
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    @property
    def result(self) -> dict[str, Any] | None:  # Any: JSON
        """As `Result.to_json`; there as soon as a run has ended, whichever way."""
        return self._read("result.json")

    @property
    def status(self) -> dict[str, Any] | None:  # Any: JSON
        """The newest look at a run that is going on; see docs/configuration.md."""
        return self._read("status.json")

    @property
    def checkpoint(self) -> dict[str, Any] | None:  # Any: JSON
        """What `resume` goes on from."""
        return self._read("checkpoint.json")

    @property
    def keys(self) -> dict[str, str] | None:
        """Public keys by name; None of a run whose connections are not encrypted."""
        return self._read("keys.json")

    def write_keys(self, listed: Mapping[str, str] | None) -> None:
        """Raises: OSError."""
        if listed is None:
            (self.path / "keys.json").unlink(missing_ok=True)  # of an earlier start
        else:
            self.write("keys.json", listed)

    def write(self, name: str, data: Mapping[str, Any] | list[Any]) -> None:  # Any: JSON
        """Replace a JSON file whole.

        Raises: OSError.
        """
        part = self.path / f".{name}.{os.getpid()}"
        part.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        part.replace(self.path / name)

    # Stopping from elsewhere

    def ask_stop(self, word: str) -> None:
        """Ask the run's launcher to stop: `safe` or `now`."""
        assert word in STOP_WORDS
        part = self.path / f".stop.{os.getpid()}"
        part.write_text(word, encoding="utf-8")
        part.replace(self.path / "stop")

    def asked_stop(self) -> int:
        """The level that was asked for; 0 if none was."""
        try:
            return STOP_WORDS.get((self.path / "stop").read_text(encoding="utf-8").strip(), 0)
        except OSError:
            return 0

    def forget_stop(self) -> None:
        """And whatever else was asked for."""
        (self.path / "stop").unlink(missing_ok=True)
        self.take_asked()

    # Other requests from elsewhere: a file each in the folder `asked`, gone once it is heeded

    def ask(self, what: str, text: str = "") -> None:
        """Ask the run's launcher for something: `drain-w1`, or `scale` with a number.

        Raises: OSError.
        """
        folder = self.path / "asked"
        folder.mkdir(exist_ok=True)
        part = self.path / f".asked.{os.getpid()}"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / what)

    def take_asked(self) -> dict[str, str]:
        """What was asked for since the last call: request -> its text."""
        found: dict[str, str] = {}
        try:
            for path in sorted((self.path / "asked").iterdir()):
                found[path.name] = path.read_text(encoding="utf-8").strip()
                path.unlink()
        except (OSError, ValueError):  # mostly: nobody has ever asked for anything
            pass
        return found

    # Finding

    @property
    def is_run(self) -> bool:
        return self.config.is_file()

    def _read(self, name: str) -> dict[str, Any] | None:  # Any: JSON
        try:
            data = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return data if isinstance(data, dict) else None


def all_runs(parent: Path) -> list[RunFolder]:
    """The runs in a folder of runs, oldest first: their names begin with the time."""
    if not parent.is_dir():
        return []
    return [f for f in (RunFolder(p) for p in sorted(parent.iterdir())) if f.is_run]


def find_run(name: str | None, parent: Path) -> RunFolder:
    """A run by its folder, its id, or the beginning or end of its id; None is the newest.

    Raises: Problem if there is none, or more than one.
    """
    if name is not None and RunFolder(Path(name)).is_run:
        path = Path(name)
        return RunFolder(path if path.name.strip(".") else path.resolve())  # ., ..: no id
    runs = all_runs(parent)
    if name is None:
        if runs:
            return runs[-1]
        raise Problem(
            "DB-RUN-002",
            f"there is no run in {parent}",
            fix="start one with distbelief launch, or name its folder or its --run-dir",
        )
    exact = [folder for folder in runs if folder.run == name]
    found = exact or [f for f in runs if f.run.startswith(name) or f.run.endswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise Problem(
            "DB-RUN-002",
            f"{name} may be any of {', '.join(folder.run for folder in found)}",
            fix="write more of it",
        )
    raise Problem(
        "DB-RUN-002",
        f"{name} is neither a run folder nor a run in {parent}",
        fix="distbelief runs ls shows the runs"
        + ("; the newest is " + runs[-1].run if runs else ""),
    )


def began_at(pid: int) -> str:
    """The kernel's start time of a process, as text; empty if there is none, or no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]
