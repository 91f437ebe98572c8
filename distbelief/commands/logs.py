"""`distbelief logs`: the logs of all processes of a run, merged by time."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import click

from distbelief.commands.run_argument import PROCESS, WORKER, find, run_argument, run_dir_option
from distbelief.folder import RunFolder
from distbelief.problem import Problem
from distbelief.state import state_of

LOOK_EVERY_S = 0.2
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")
_SINCE = re.compile(r"(\d+)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True, order=True)
class Line:
    """One line of a process."""

    at: float
    """Unix seconds. A line without a time of its own has that of the one before it."""
    number: int
    """Within the time, lines stay in the order in which they were read."""
    process: str
    text: str


class LogFile:
    """A file of one process that may still grow: NAME.log, or what it printed, NAME.out."""

    def __init__(self, path: Path) -> None:
        self.process = path.stem
        self._path = path
        self._position = 0
        self._rest = b""
        self._at = 0.0
        self._number = 0

    def lines(self, *, last: bool = False) -> list[Line]:
        """The whole lines that came since the last call; with `last` also one without an end."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
                if not self._at and self._path.suffix == ".out":
                    self._at = self._path.stat().st_mtime  # nothing better is known
        except OSError:  # it was removed
            return []
        self._position += len(data)
        *found, self._rest = (self._rest + data).split(b"\n")
        if last and self._rest:
            found.append(self._rest)
            self._rest = b""
        return [self._line(text.decode(errors="replace")) for text in found]

    def _line(self, text: str) -> Line:
        if _TIME.match(text):
            self._at = datetime.fromisoformat(text[:23].replace(",", ".")).timestamp()
        self._number += 1
        return Line(self._at, self._number, self.process, text)


class Logs:
    """All the files of a run's processes, and those that come later."""

    def __init__(self, folder: RunFolder, wanted: Callable[[str], bool]) -> None:
        self._folder = folder
        self._wanted = wanted
        self._files: dict[Path, LogFile] = {}

    @property
    def processes(self) -> list[str]:
        """Every process that has a file, wanted or not."""
        return sorted({path.stem for path in self._paths()})

    def lines(self, *, last: bool = False) -> list[Line]:
        """What came since the last call, by time."""
        for path in self._paths():
            if self._wanted(path.stem) and path not in self._files:
                self._files[path] = LogFile(path)
        return sorted(line for file in self._files.values() for line in file.lines(last=last))

    def _paths(self) -> list[Path]:
        logs = self._folder.logs
        return sorted(p for p in logs.glob("*") if p.suffix in (".log", ".out"))


@click.command("logs", short_help="The logs of a run, merged by time.")
@run_argument
@click.option(
    "--worker",
    "workers",
    multiple=True,
    metavar="W1",
    type=WORKER,
    help="Only of this worker.",
)
@click.option(
    "--process",
    "processes",
    multiple=True,
    metavar="NAME",
    type=PROCESS,
    help="Only of w1, shard0 or launcher.",
)
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends, or Ctrl-C.")
@click.option("--since", metavar="AGE", help="Only what is not older than 30s, 5m, 2h or 1d.")
@click.option(
    "-n",
    "--lines",
    "num_lines",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    metavar="N",
    help="So many of the newest lines; 0 for all.",
)
@run_dir_option
def logs_command(
    run: str | None,
    workers: tuple[str, ...],
    processes: tuple[str, ...],
    follow: bool,
    since: str | None,
    num_lines: int,
    run_dir: Path | None,
) -> None:
    """Print what the processes of RUN have logged and printed, by time; by default the newest run.

    What a process printed carries no times: it stands where the file was last written to.

    \b
    Examples:
      distbelief logs -f
      distbelief logs b834 --worker w1 --since 5m
    """
    oldest = 0.0 if since is None else time.time() - _age_s(since)
    folder = find(run, run_dir)
    names = {*workers, *processes}
    logs = Logs(folder, lambda name: not names or name in names)
    unknown = names - set(logs.processes)
    if unknown and not (follow and state_of(folder).is_live):  # it may come yet
        raise Problem(
            "DB-USE-009",
            f"run {folder.run} has no process {', '.join(sorted(unknown))}",
            fix=f"it has {', '.join(logs.processes) or 'none yet'}",
        )
    is_live = follow and state_of(folder).is_live
    first = [line for line in logs.lines(last=not is_live) if line.at >= oldest]
    _print(first[-num_lines:])
    while is_live:
        time.sleep(LOOK_EVERY_S)
        is_live = state_of(folder).is_live  # before the last look, which then misses nothing
        _print(logs.lines(last=not is_live))
    if follow:
        click.echo(f"run {folder.run} has ended: {state_of(folder).word}", err=True)


def _print(lines: list[Line]) -> None:
    for line in lines:
        click.echo(f"{line.process:<8} {line.text}")


def _age_s(text: str) -> int:
    match = _SINCE.fullmatch(text)
    if match is None:
        raise click.BadParameter(f"{text!r}: write it as 30s, 5m, 2h or 1d", param_hint="--since")
    return int(match[1]) * _SECONDS[match[2]]
