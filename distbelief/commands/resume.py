"""`distbelief resume`: go on with a run from its last checkpoint."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distbelief.commands.run_argument import RUN, find, run_dir_option, runs_folder
from distbelief.commands.training import (
    WORKERS,
    JsonCommand,
    json_option,
    plain_option,
    set_option,
    train,
)
from distbelief.commands.watching import watch_options
from distbelief.folder import RunFolder
from distbelief.problem import Problem
from distbelief.result import Result
from distbelief.settings import FLAGS, gather
from distbelief.state import state_of

if TYPE_CHECKING:
    from distbelief.job import Job
    from distbelief.live import LiveLine
    from distbelief.stop import Stop


@click.command("resume", short_help="Go on with a run from its last checkpoint.", cls=JsonCommand)
@click.argument("run", type=RUN)
@watch_options
@click.option("--workers", type=WORKERS, metavar="N", help="Another number, or MIN:MAX.")
@click.option("--until", metavar="END", help="Another end: 20-epochs, 5000-updates or 20m.")
@click.option("--engine", type=click.Choice(["ray", "local"]), help="What starts the processes.")
@set_option
@run_dir_option
@json_option
@plain_option
def resume_command(
    run: str,
    run_dir: Path | None,
    sets: tuple[str, ...],
    as_json: bool,
    plain: bool,
    **flags: Any,  # Any: one of each option's type
) -> None:
    """Go on with RUN from its last checkpoint, with the settings it had and what is given here.

    RUN may also be the URL or path of a run in a store (save.store): it is copied here first.
    The environment and files of settings are not read again. Modules and data are looked for from
    the folder in which the run was launched.

    \b
    Examples:
      distbelief resume 20261122-231032-b834
      distbelief resume b834 --until 20-epochs --workers 4
      distbelief resume s3://bucket/runs/20261122-231032-b834
    """
    given = {FLAGS[name]: value for name, value in flags.items() if value is not None}

    def start(live: "LiveLine", stop: "Stop") -> Result:
        from distbelief.job import compose
        from distbelief.launcher import resume

        folder = _find_or_fetch(run, run_dir, live)
        _refuse_live(folder)
        before = compose(gather(base=folder.config))
        job = compose(gather(flags=given, sets=sets, base=folder.config))
        _refuse_done(folder, before, job)
        folder = _go_where_it_began(folder, live)
        return resume(folder, job, live=live, stop=stop)

    train(start, as_json=as_json, plain=plain)


def _find_or_fetch(run: str, run_dir: Path | None, live: "LiveLine") -> RunFolder:
    from distbelief.stored import fetch, is_stored

    if not is_stored(run):
        return find(run, run_dir)
    folder = fetch(run, runs_folder(run_dir))
    live.say(f"{run} was copied to {folder.path}")
    return folder


def _refuse_live(folder: RunFolder) -> None:
    if state_of(folder).is_live:
        raise Problem(
            "DB-RUN-008",
            f"run {folder.run} is still going on",
            fix=f"look at it with distbelief status {folder.run}, or stop it first with "
            f"distbelief stop {folder.run}",
        )


def _refuse_done(folder: RunFolder, before: "Job", job: "Job") -> None:
    from distbelief.job import Until

    if state_of(folder).word != "done":
        return
    if job.script.path:
        raise Problem(
            "DB-RUN-009", f"run {folder.run} is done: its script came to its end", fix="launch anew"
        )
    old, new = Until.parse(before.until), Until.parse(job.until)
    pairs = [(old.epochs, new.epochs), (old.updates, new.updates), (old.seconds, new.seconds)]
    if any(o is not None and n is not None and n <= o for o, n in pairs):
        raise Problem(
            "DB-RUN-009",
            f"run {folder.run} is done: it has trained until {before.until}",
            fix=f"give it a later end: distbelief resume {folder.run} --until {_later(before)}",
        )


def _later(job: "Job") -> str:
    number = "".join(c for c in job.until if c.isdigit())
    return job.until.replace(number, str(2 * int(number)))


def _go_where_it_began(folder: RunFolder, live: "LiveLine") -> RunFolder:
    """Make the folder where the run was launched the current one, and name the run from there."""
    began = folder.launcher
    if began is None or Path(began.cwd) == Path.cwd():
        return folder
    path = folder.path.resolve()
    try:
        os.chdir(began.cwd)
    except OSError as error:
        live.say(f"{began.cwd}, where the run was launched, is not there: {error.strerror}")
        return folder
    live.say(f"in {began.cwd}, where the run was launched")
    return RunFolder(path.relative_to(began.cwd) if path.is_relative_to(began.cwd) else path)
