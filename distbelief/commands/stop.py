"""`distbelief stop`: let a run that goes on elsewhere come to an end."""

import sys
import time
from pathlib import Path

import click

from distbelief.commands.run_argument import find, run_argument, run_dir_option
from distbelief.commands.summary import error_text, summary
from distbelief.commands.training import EXIT_CODES
from distbelief.folder import RunFolder
from distbelief.problem import Problem
from distbelief.state import state_of

LOOK_EVERY_S = 0.1


@click.command("stop", short_help="Stop a run that goes on elsewhere.")
@run_argument
@click.option("--now", is_flag=True, help="Do not wait for workers, and save nothing more.")
@run_dir_option
@click.option("--json", "as_json", is_flag=True, help="The last line of stdout is the result.")
def stop_command(run: str | None, now: bool, run_dir: Path | None, as_json: bool) -> None:
    """Stop RUN: its folder, its id or a part of it; by default the newest.

    Workers finish what they have and shards save, as at Ctrl-C, and this command waits for that;
    Ctrl-C ends only the waiting.

    \b
    Example:
      distbelief stop b834
    """
    folder = find(run, run_dir)
    state = state_of(folder)
    if not state.is_live and state.word != "killed":
        click.echo(f"run {folder.run} has ended already: {state.word}", err=as_json)
        if as_json and folder.result is not None:
            click.echo(_result_line(folder))
        return
    if state.is_live:
        try:
            folder.ask_stop("now" if now else "safe")
        except OSError as error:
            raise Problem(
                "DB-STORE-004",
                f"run {folder.run} cannot be asked to stop: {error}",
                why="the request is a file in the run's folder",
            ) from error
        click.echo(f"asked run {folder.run} to stop{' now' if now else ''}", err=True)
        _wait(folder)
    result = folder.result
    if result is None:
        folder.forget_stop()
        checkpoint = folder.checkpoint
        raise Problem(
            "DB-RUN-011",
            f"the launcher of run {folder.run} was killed, so there is nothing to stop",
            fix=f"go on with it: {folder.resume_command}"
            if checkpoint is not None
            else f"nothing was saved; start anew: distbelief launch {folder.config}",
        )
    if result["error"]:
        click.echo(error_text(result["error"]), err=True)
    click.echo(_result_line(folder) if as_json else summary(result))
    sys.exit(EXIT_CODES.get(result["exit"], 0))


def _wait(folder: RunFolder) -> None:
    """Until the run has ended, saying what it is at."""
    said = ""
    while True:
        state = state_of(folder)
        if not state.is_live:
            return
        samples = (folder.status or {}).get("samples", 0)
        text = f"  {state.word}, {samples:,} samples"
        if state.troubles and not (folder.launcher and folder.launcher.is_alive):
            text += f"; {state.troubles[0].split(' for ')[0]}"  # on another machine
        if text != said:
            said = text
            click.echo(text, err=True)
        time.sleep(LOOK_EVERY_S)


def _result_line(folder: RunFolder) -> str:
    return (folder.path / "result.json").read_text(encoding="utf-8").rstrip("\n")
