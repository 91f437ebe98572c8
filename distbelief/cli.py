"""The command line: which commands there are, how errors are told, and with which exit code.

Nothing heavy is imported before a command needs it: `distbelief --help` takes a tenth of a second.
"""

import difflib
import importlib
import os
import sys
import tempfile
import traceback
from typing import Any

import click

from distbelief import __version__
from distbelief.problem import Problem

COMMANDS = {
    "launch": "launch:launch_command",
    "top": "top:top_command",
    "status": "status:status_command",
    "dashboard": "dashboard:dashboard_command",
    "report": "report:report_command",
    "logs": "logs:logs_command",
    "stop": "stop:stop_command",
    "drain": "drain:drain_command",
    "scale": "scale:scale_command",
    "resume": "resume:resume_command",
    "runs": "runs:runs_group",
    "eval": "eval:eval_command",
    "plot": "plot:plot_command",
    "table": "table:table_command",
    "train-ensemble": "train_ensemble:train_ensemble_command",
    "export": "export:export_command",
    "import": "import_model:import_command",
    "bench": "bench:bench_group",
    "chaos": "chaos:chaos_command",
    "simulate": "simulate:simulate_command",
    "config": "config:config_group",
    "keys": "keys:keys_group",
    "cluster": "cluster:cluster_group",
    "doctor": "doctor:doctor_command",
    "completion": "completion:completion_command",
}
"""Command -> file in commands/ and what it is called there; loaded when it is needed."""

INTERRUPTED = 130
PIPE_CLOSED = 141
"""What a shell reports of a program that `head` has cut off: 128 + SIGPIPE."""


class Commands(click.Group):
    """The root: loads a command when it is called, and tells its errors without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click has it; of a command that there is not, the nearest is named."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            text = error.format_message()
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if not near or "Did you mean" in text:  # later versions of click say it themselves
                raise
            raise click.UsageError(f"{text} Did you mean {near[0]!r}?", ctx) from error

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command = getattr(importlib.import_module(f"distbelief.commands.{module}"), name)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:  # Any: as click has it
        try:
            answer = super().invoke(ctx)
            sys.stdout.flush()  # here, where a closed pipe can still be told from an error
        except Problem as problem:
            click.echo(_colored(problem.text), err=True)
            sys.exit(problem.exit_code)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            # Python would flush what is left once more at its end, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(PIPE_CLOSED)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:  # noqa: BLE001 - nobody should be shown a raw traceback
            bug = _bug(error)
            click.echo(_colored(bug.text), err=True)
            sys.exit(bug.exit_code)
        return answer


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="distbelief")
@click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="Colours; auto: in a terminal, unless NO_COLOR is set.",
)
@click.pass_context
def cli(ctx: click.Context, color: str) -> None:
    """Asynchronous data-parallel training for PyTorch, after DistBelief.

    \b
    Examples:
      distbelief launch                          the demo: GoogLeNet on real digits
      distbelief launch --model my_net:Net --workers 4
      distbelief status                          of the newest run
    """
    no_color = bool(os.environ.get("NO_COLOR"))  # an empty one counts as none: no-color.org
    if color != "auto" or no_color:
        ctx.color = color == "always"


def main() -> None:
    """Entry of the `distbelief` command."""
    cli()


def _colored(text: str) -> str:
    """The head of an error in red; click takes that away where there is no terminal."""
    head, bracket, rest = text.partition("]")
    return click.style(head + bracket, fg="red", bold=True) + rest


def _bug(error: Exception) -> Problem:
    """A problem of what nobody foresaw; the traceback goes to a file for whoever mends it."""
    what = f"distbelief itself failed: {type(error).__name__}: {error}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="distbelief-", suffix=".log", delete=False
        ) as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Problem("DB-BUG-001", what, f"{where.filename}:{where.lineno}", "please report it")
    return Problem("DB-BUG-001", what, fix=f"please report it with {file.name}")
