"""`distbelief drain`: have one worker of a run leave, while the run goes on."""

import time
from pathlib import Path

import click

from distbelief.commands.run_argument import WORKER, find, run_argument, run_dir_option
from distbelief.commands.stop import LOOK_EVERY_S
from distbelief.folder import RunFolder
from distbelief.problem import Problem
from distbelief.state import state_of

GONE = ("drained", "ended", "lost")
"""What status.json says of a worker that trains no more."""


@click.command("drain", short_help="Have one worker of a run leave.")
@click.argument("worker", metavar="WORKER", type=WORKER)
@run_argument
@run_dir_option
def drain_command(worker: str, run: str | None, run_dir: Path | None) -> None:
    """Have WORKER leave RUN (its folder, its id or a part of it; by default the newest).

    It ends its step, pushes what it has, gives the rest of its data back and is not started
    again; the run goes on. This command waits for that; Ctrl-C ends only the waiting. SIGTERM to
    the worker's process does the same within 20 seconds.

    \b
    Example:
      distbelief drain w3
    """
    folder = find(run, run_dir)
    _check(folder, worker)
    ask(folder, f"drain-{worker}")
    click.echo(f"asked worker {worker} of run {folder.run} to leave", err=True)
    while True:
        is_live = state_of(folder).is_live
        word = _workers(folder).get(worker, "")
        if word in GONE:
            click.echo(f"worker {worker} is {word}")
            return
        if not is_live:
            click.echo(f"run {folder.run} has ended")
            return
        time.sleep(LOOK_EVERY_S)


def ask(folder: RunFolder, what: str, text: str = "") -> None:
    """Leave a request in the run's folder. Raises: Problem."""
    try:
        folder.ask(what, text)
    except OSError as error:
        raise Problem(
            "DB-STORE-004",
            f"run {folder.run} cannot be asked: {error}",
            why="the request is a file in the run's folder",
        ) from error


def check_live(folder: RunFolder) -> None:
    """Raises: Problem if the run has ended."""
    state = state_of(folder)
    if not state.is_live:
        raise Problem(
            "DB-RUN-014",
            f"run {folder.run} is not going on: {state.word}",
            fix="distbelief runs ls shows the runs",
        )


def _check(folder: RunFolder, worker: str) -> None:
    check_live(folder)
    states = _workers(folder)
    if states.get(worker) in (None, *GONE):
        now = ", ".join(f"{name} {word}" for name, word in states.items()) or "none yet"
        raise Problem(
            "DB-USE-010",
            f"run {folder.run} has no worker {worker} that trains",
            why=f"its workers: {now}",
            fix="name one of those that train",
        )


def _workers(folder: RunFolder) -> dict[str, str]:
    """Worker -> what it is doing."""
    status = folder.status or {}
    return {name: str(w.get("state")) for name, w in status.get("workers", {}).items()}
