"""Watching: the options of the commands that start a run which say how it is watched."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])  # Any: a command takes what it takes


def _names(ctx: click.Context, param: click.Parameter, text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


_OPTIONS = (
    click.option(
        "--dashboard/--no-dashboard",
        default=None,
        help="Watch the run, and serve what is seen of it.",
    ),
    click.option(
        "--allow-actions/--no-allow-actions",
        default=None,
        help="Have the dashboard drain workers and stop the run.",
    ),
    click.option(
        "--log",
        metavar="NAMES",
        callback=_names,
        help="Log values too: tensorboard, wandb, mlflow, trackio; by commas.",
    ),
)


def watch_options(command: F) -> F:
    """Give a command these options."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
