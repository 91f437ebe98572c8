"""The flags that say how a run is watched."""

from typing import Any

import click
import pytest
from click.testing import CliRunner

from distbelief.commands.launch import launch_command
from distbelief.commands.resume import resume_command
from distbelief.commands.watching import watch_options
from distbelief.job import compose
from distbelief.settings import FLAGS, gather


def job_of(*args: str) -> Any:
    """The monitor's settings where these flags are given."""
    found = []

    @click.command()
    @watch_options
    def command(**flags: Any) -> None:
        given = {FLAGS[name]: value for name, value in flags.items() if value is not None}
        found.append(compose(gather(flags=given, environ={})))

    done = CliRunner().invoke(command, args)
    assert done.exit_code == 0, done.output
    return found[0].monitor


def test_flags_say_whether_and_how_a_run_is_watched():
    assert job_of().on
    assert job_of("--dashboard").on
    assert not job_of("--no-dashboard").on
    assert job_of("--allow-actions").actions
    assert not job_of("--no-allow-actions").actions
    assert job_of("--log", "tensorboard, wandb").log == ("tensorboard", "wandb")
    assert job_of().log == ()


@pytest.mark.parametrize("command", [launch_command, resume_command])
def test_both_commands_that_start_a_run_have_them(command):
    assert {"dashboard", "allow_actions", "log"} <= {option.name for option in command.params}
