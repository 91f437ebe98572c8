"""RunArgument: how commands are told which run they are about, and complete its name."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from distbelief.folder import RUNS, RunFolder, all_runs, find_run
from distbelief.problem import Problem
from distbelief.settings import gather

run_dir_option = click.option(
    "--run-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where runs are; by default run_dir of the settings, else ./runs.",
)


if TYPE_CHECKING:  # before click 8.2 it takes no parameter
    _ParamType = click.ParamType[str]
else:
    _ParamType = click.ParamType


class RunName(_ParamType):
    """A run: its folder, its id, or the beginning or end of its id."""

    name = "run"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        try:
            names = [folder.run for folder in all_runs(runs_folder(ctx.params.get("run_dir")))]
        except Problem:  # a broken file must not break the shell
            return []
        return [CompletionItem(name) for name in reversed(names) if name.startswith(incomplete)]


class ProcessName(_ParamType):
    """A process of a run, by the names in its status."""

    name = "process"

    def __init__(self, *kinds: str) -> None:
        """kinds: `workers`, `shards`."""
        self._kinds = kinds

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        try:
            status = find(ctx.params.get("run"), ctx.params.get("run_dir")).status or {}
        except Problem:
            return []
        names = [name for kind in self._kinds for name in status.get(kind, {})]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class KeyName(_ParamType):
    """A key of the job, such as train.lr; of KEY=VALUE what stands before the =."""

    name = "key"

    def __init__(self, end: str = "") -> None:
        self._end = end

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from distbelief.key import all_keys

        names = [key.name + self._end for key in all_keys()]
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


RUN = RunName()
WORKER = ProcessName("workers")
PROCESS = ProcessName("workers", "shards")
KEY = KeyName()
KEY_VALUE = KeyName("=")
run_argument = click.argument("run", required=False, type=RUN)


def runs_folder(named: Path | None) -> Path:
    """Where runs are: as named, else as the settings have it."""
    if named is not None:
        return named
    said = gather(environ=os.environ).about("run_dir")
    return Path(str(said[-1].value) if said else RUNS)


def find(run: str | None, run_dir: Path | None) -> RunFolder:
    """The run that an argument names; the newest by default. Raises: Problem."""
    return find_run(run, runs_folder(run_dir))


def json_line(kind: str, **fields: Any) -> str:  # Any: JSON
    """One line for programs, of the kind and version that every such line names first."""
    return json.dumps({"type": kind, "v": 1, **fields})
