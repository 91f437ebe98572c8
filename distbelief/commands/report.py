"""`distbelief report`: a run as one file, to keep, to send, or to add to an issue."""

import time
import urllib.error
import urllib.request
from pathlib import Path

import click

from distbelief.commands.run_argument import find, run_argument, run_dir_option
from distbelief.folder import RunFolder
from distbelief.problem import Problem
from distbelief.state import state_of

TIMEOUT_S = 30.0


@click.command("report", short_help="A run's dashboard as one file.")
@run_argument
@run_dir_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Where to write it; by default report-RUN.html here. - is standard output.",
)
def report_command(run: str | None, run_dir: Path | None, output: Path | None) -> None:
    """Write the dashboard of RUN as one HTML file: its folder, its id or a part of it; by default
    the newest.

    The file opens without a server and without a network, and has the same numbers. It holds names
    of workers and machines, and the last lines of logs.

    \b
    Example:
      distbelief report -o report.html
    """
    folder = find(run, run_dir)
    body = _ask(folder)
    if body is None:
        if state_of(folder).is_live:
            said = "its monitor does not answer: this is what was recorded"
            click.echo(f"run {folder.run} is going on, but {said}", err=True)
        body = _render(folder)
    if output == Path("-"):
        click.echo(body, nl=False)
        return
    path = output or Path(f"report-{folder.run}.html")
    try:
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(body)
        part.replace(path)
    except OSError as error:
        raise Problem(
            "DB-STORE-004",
            f"{path} cannot be written: {error.strerror or error}",
            fix="name another file with -o",
        ) from error
    click.echo(f"{path} ({len(body) / 1e6:.1f} MB)")


def _ask(folder: RunFolder) -> bytes | None:
    """The monitor of a run that goes on; None where it does not answer."""
    from distbelief.monitor.access import TOKEN_HEADER
    from distbelief.monitor.link import read_link

    link = read_link(folder.path)
    if link is None or not link.is_alive:
        return None
    base, _, secret = link.url.partition("?k=")
    request = urllib.request.Request(f"{base}report.html", headers={TOKEN_HEADER: secret})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            body: bytes = reply.read()
    except (OSError, ValueError):
        return None
    return body


def _render(folder: RunFolder) -> bytes:
    """From the recording. Raises: Problem where there is none."""
    from distbelief.monitor.api import log_end
    from distbelief.monitor.pages import Pages
    from distbelief.monitor.process import nothing_recorded
    from distbelief.monitor.recording import Recording
    from distbelief.monitor.report import Report
    from distbelief.monitor.store import Store

    store = Store(live=False)
    if not Recording(folder.path / "metrics").load(store):
        raise nothing_recorded(folder)
    report = Report(Pages(), lambda name, lines: log_end(folder, name, lines), time.time)
    return report.render(store)[0]
