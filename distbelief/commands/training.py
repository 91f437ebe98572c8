"""Training: what `launch` and `resume` have in common: signals, the live line, the result."""

import json
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from distbelief.commands.summary import error_text, summary
from distbelief.environment import check_environment
from distbelief.problem import Problem
from distbelief.result import Result
from distbelief.signals import Signals
from distbelief.terminal import outliving_output

if TYPE_CHECKING:
    from distbelief.live import LiveLine
    from distbelief.run import Stop

EXIT_CODES = {"done": 0, "failed": 1, "degraded": 4, "storage": 5}

json_option = click.option(
    "--json", "as_json", is_flag=True, help="The last line of stdout is the result."
)
plain_option = click.option("--plain", is_flag=True, help="Plain lines instead of one that moves.")


def train(start: "Callable[[LiveLine, Stop], Result]", *, as_json: bool, plain: bool) -> None:
    """Let `start` train, show how it goes, and end with the exit code of its result."""
    with outliving_output(), Signals() as signals:
        try:
            check_environment(engine="local")  # before torch is imported
            # Here, where Ctrl-C is heeded already: this takes a second.
            from distbelief.live import LiveLine
            from distbelief.run import Stop

            out = sys.stderr if as_json else sys.stdout
            result = start(LiveLine(out, plain=plain or as_json), Stop())
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


def _stopped(signals: Signals) -> int:
    """By which signal; Ctrl-C's also for a run that `distbelief stop` has stopped."""
    return 128 + (signals.first or signal.SIGINT)
