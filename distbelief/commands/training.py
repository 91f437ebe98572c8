"""Training: what `launch` and `resume` have in common: signals, the live line, the result."""

import json
import re
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from distbelief.commands.run_argument import KEY_VALUE
from distbelief.commands.summary import error_text, summary
from distbelief.environment import check_environment
from distbelief.problem import Problem
from distbelief.result import Result
from distbelief.signals import Signals
from distbelief.terminal import outliving_output

if TYPE_CHECKING:
    from distbelief.folder import RunFolder
    from distbelief.live import LiveLine
    from distbelief.stop import Stop

EXIT_CODES = {"done": 0, "failed": 1, "degraded": 4, "storage": 5}

if TYPE_CHECKING:  # before click 8.2 it takes no parameter
    _ParamType = click.ParamType[int | str]
else:
    _ParamType = click.ParamType


class Workers(_ParamType):
    """A number, or MIN:MAX, which is left as it is."""

    name = "workers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:  # Any: as click has it
        text = str(value)
        if re.fullmatch(r"\d+:\d+", text):
            return text
        try:
            return int(text)
        except ValueError:
            self.fail(f"{text!r} is neither a number nor MIN:MAX", param, ctx)


WORKERS = Workers()
set_option = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    type=KEY_VALUE,
    help="Any key of the job.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Lines of JSON; the last is the result."
)
plain_option = click.option("--plain", is_flag=True, help="Plain lines instead of a panel.")


def train(start: "Callable[[LiveLine, Stop], Result]", *, as_json: bool, plain: bool) -> None:
    """Let `start` train, show how it goes, and end with the exit code of its result."""
    with outliving_output(), Signals() as signals:
        try:
            check_environment(engine="local")  # before torch is imported
            # Here, where Ctrl-C is heeded already: this takes a second.
            from distbelief.live import LiveLine
            from distbelief.stop import Stop

            live = LiveLine(
                sys.stderr if as_json else sys.stdout,
                plain=plain,
                records=sys.stdout if as_json else None,
                color=click.get_current_context().find_root().color,
            )
            if as_json:
                signals.last_words = lambda: result_at_once(live.folder, "stopped")
            result = start(live, Stop())
            signals.last_words = None
        except KeyboardInterrupt:
            if as_json:
                click.echo(Result(run="", run_dir="", exit="stopped").to_json())
            sys.exit(_stopped(signals))
        except Exception as error:
            if as_json:
                code = error.code if isinstance(error, Problem) else "DB-BUG-001"
                text = error.what if isinstance(error, Problem) else repr(error)
                failed = Result(run="", run_dir="", error={"code": code, "text": text})
                click.echo(failed.to_json())
            raise
        if result.error is not None:
            click.echo(error_text(result.error), err=True)
        click.echo(result.to_json() if as_json else summary(json.loads(result.to_json())))
        sys.exit(_stopped(signals) if result.exit == "stopped" else EXIT_CODES[result.exit])


class JsonCommand(click.Command):
    """With --json the last line is a result also where the arguments are wrong."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            if "--json" in own:
                told = {"code": "DB-USE-006", "text": error.format_message()}
                click.echo(Result(run="", run_dir="", error=told).to_json())
            raise


def result_at_once(folder: "RunFolder | None", word: str) -> bytes:
    """The last line where nobody waits for the run's own: what its folder says now."""
    result = Result(run="", run_dir="", exit=word)
    if folder is not None:
        result.run, result.run_dir = folder.run, str(folder.path)
        saved = folder.checkpoint
        if saved is not None:
            result.saved = {key: saved[key] for key in ("samples", "updates", "at")}
            result.resume = folder.resume_command
    return result.to_json().encode() + b"\n"


def _stopped(signals: Signals) -> int:
    """By which signal; Ctrl-C's also for a run that `distbelief stop` has stopped."""
    return 128 + (signals.first or signal.SIGINT)
