"""`distbelief top`: watch a run that goes on elsewhere."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from distbelief.commands.run_argument import find, run_argument, run_dir_option
from distbelief.commands.training import JsonCommand, json_option, plain_option, result_at_once
from distbelief.folder import RunFolder
from distbelief.problem import Problem
from distbelief.result import Result
from distbelief.state import state_of

if TYPE_CHECKING:
    from distbelief.onlooker import Onlooker

LOOK_EVERY_S = 0.25
TICK_EVERY_S = 1.0
PLAIN_EVERY_S = 30.0
SORTS = {"-ratio": "worst first", "-step_s": "slowest step first", "-loss": "highest loss first",
         "id": "by name"}  # fmt: skip
"""What `s` goes through."""


@click.command("top", short_help="Watch a run that goes on elsewhere.", cls=JsonCommand)
@run_argument
@run_dir_option
@json_option
@plain_option
@click.pass_context
def top_command(
    ctx: click.Context, run: str | None, run_dir: Path | None, as_json: bool, plain: bool
) -> None:
    """Show RUN as `launch` does: its folder, its id or a part of it; by default the newest.

    q or Ctrl-C only stops watching. s sorts the workers in another way, / keeps those whose name
    or node has a text in it, d prints the link of the dashboard. When the run ends, so does this,
    with the exit code of `distbelief status`.

    \b
    Examples:
      distbelief top
      distbelief top b834 --json | jq .kpi.loss
    """
    try:
        folder = find(run, run_dir)
    except Problem as problem:
        if as_json:
            told = {"code": problem.code, "text": problem.what}
            click.echo(Result(run="", run_dir="", error=told).to_json())
        raise
    code = 130
    try:
        code = _watch(folder, as_json=as_json, plain=plain, color=ctx.find_root().color)
    except KeyboardInterrupt:
        pass
    finally:
        state = state_of(folder)
        if state.is_live:
            where = _where(folder)
            text = f"Detached. Run continues: distbelief top {where}  /  distbelief stop {where}"
        else:
            text = f"run {folder.run} has ended: {state.word}"
        click.echo(text, err=as_json)
        if as_json:
            sys.stdout.write(_last_line(folder, "detached" if state.is_live else state.word))
            sys.stdout.flush()
    sys.exit(code)


def _where(folder: RunFolder) -> str:
    """How other commands are told which run."""
    return folder.resume_command.removeprefix("distbelief resume ")


def _last_line(folder: RunFolder, word: str) -> str:
    path = folder.path / "result.json"
    if word != "detached" and path.is_file():
        return path.read_text(encoding="utf-8").rstrip("\n") + "\n"
    return result_at_once(folder, word).decode()


def _watch(folder: RunFolder, *, as_json: bool, plain: bool, color: bool | None) -> int:
    """Until the run has ended or nobody watches any more; the exit code."""
    if not state_of(folder).is_live:
        return state_of(folder).exit_code
    from distbelief.keyboard import Keyboard
    from distbelief.live import in_ci
    from distbelief.onlooker import Onlooker

    looker = Onlooker(folder, since_start=False)
    looker.start()
    try:
        if as_json or plain or in_ci() or not sys.stdout.isatty():
            _lines(folder, looker, as_json=as_json)
        else:
            with Keyboard() as keyboard:
                if not _panels(folder, looker, keyboard.keys, color):
                    return 0
    finally:
        looker.close()
    return state_of(folder).exit_code


def _lines(folder: RunFolder, looker: "Onlooker", *, as_json: bool) -> None:
    from distbelief import record
    from distbelief.plain import event_line, tick_line

    findings = record.Findings()
    shown_at = float("-inf")
    every_s = TICK_EVERY_S if as_json else PLAIN_EVERY_S
    is_live = True
    while is_live:
        is_live = state_of(folder).is_live  # before the last look, which then misses nothing
        for event in looker.take_events():
            text = record.line(record.event_of(folder.run, event)) if as_json else event_line(event)
            print_line(text)
        sight = looker.sight
        now = time.monotonic()
        if sight is not None and now - shown_at >= every_s:
            shown_at = now
            for finding in findings.new(sight.findings) if as_json else ():
                print_line(record.line(record.finding_of(folder.run, finding)))
            print_line(record.line(record.tick_of(sight)) if as_json else tick_line(sight))
        if is_live:
            time.sleep(LOOK_EVERY_S)


def print_line(text: str) -> None:
    """At once; a reader that is gone ends the command, as of any other."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _panels(
    folder: RunFolder, looker: "Onlooker", keys: Callable[[float], str], color: bool | None
) -> bool:
    """Returns: the run has ended; False where nobody watches any more."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from distbelief.panel import panel
    from distbelief.terminal import outliving

    console = Console(
        file=outliving(sys.stdout),
        highlight=False,
        no_color=None if color is None else not color,
    )
    desk = Desk(looker)
    drawn: object = None
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while state_of(folder).is_live:
            sight = looker.sight
            size = console.size
            if sight is not None and drawn != (id(sight), size, desk.line):
                drawn = id(sight), size, desk.line
                rows = max(6, size.height - 16)
                box = panel(sight, size.width, size.height, keys=desk.line, rows=rows)
                live.update(box, refresh=True)
            try:
                pressed = keys(LOOK_EVERY_S)
            except (EOFError, OSError):
                return False
            for key in pressed:
                if desk.press(key):
                    return False
            if desk.wants_link:
                desk.wants_link = False
                url = "" if sight is None else sight.url
                # Printed and not opened: other users of this machine see a browser's arguments.
                console.print(Text(url or "this run has no dashboard"), soft_wrap=True)
    return True


class Desk:
    """What keys do."""

    def __init__(self, looker: "Onlooker") -> None:
        self.wants_link = False
        self._looker = looker
        self._typed: str | None = None
        """The filter while it is typed."""

    @property
    def line(self) -> str:
        """The last of the panel."""
        if self._typed is not None:
            return f"/{self._typed}_   Enter takes it, Esc forgets it"
        found = f" {self._looker.find!r}" if self._looker.find else ""
        sort = SORTS[self._looker.sort]
        return f"s sort ({sort})   / filter{found}   d dashboard   q quit, the run goes on"

    def press(self, key: str) -> bool:
        """Returns: stop watching."""
        looker = self._looker
        if self._typed is not None:
            self._type(key)
        elif key == "q":
            return True
        elif key == "s":
            names = list(SORTS)
            looker.sort = names[(names.index(looker.sort) + 1) % len(names)]
            looker.hurry()
        elif key == "/":
            self._typed = looker.find
        elif key == "d":
            self.wants_link = True
        return False

    def _type(self, key: str) -> None:
        assert self._typed is not None
        if key in "\r\n":
            self._looker.find, self._typed = self._typed, None
            self._looker.hurry()
        elif key == "\x1b":
            self._looker.find, self._typed = "", None
            self._looker.hurry()
        elif key in "\x7f\b":
            self._typed = self._typed[:-1]
        elif key.isprintable() and len(self._typed) < 40:
            self._typed += key
