"""`distbelief doctor`: is this machine ready for a run?"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distbelief.commands.run_argument import json_line, run_dir_option, runs_folder
from distbelief.problem import Problem
from distbelief.settings import gather

if TYPE_CHECKING:
    from distbelief.doctor import Check

COLORS = {"ok": "green", "warn": "yellow", "bad": "red"}


@click.command("doctor", short_help="Is this machine ready for a run?")
@run_dir_option
@click.option(
    "--cluster",
    is_flag=False,
    flag_value="auto",
    metavar="[ADDR]",
    help="All hosts of the Ray cluster at auto, or host:port.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def doctor_command(run_dir: Path | None, cluster: str | None, as_json: bool) -> None:
    """Look at what a run needs here, and say how to mend what is missing.

    Exit code 0; 3 where something is missing without which no run works. With --cluster it looks at
    every host: versions, clocks, GPUs, disks, the network between them, and save.store.

    \b
    Examples:
      distbelief doctor --run-dir /mnt/runs
      distbelief doctor --cluster
    """
    from distbelief.doctor import BAD, OK

    checks = _of_cluster(cluster) if cluster else _of_this_machine(run_dir)
    is_ready = all(check.level != BAD for check in checks)
    if as_json:
        click.echo(json_line("doctor", ok=is_ready, checks=[check.as_dict() for check in checks]))
    else:
        for check in checks:
            mark, _, rest = check.line.partition(" ")
            click.echo(click.style(mark, fg=COLORS[check.level], bold=True) + f" {rest}")
            if check.level != OK and check.fix:
                click.echo(f"             try {check.fix}")
    sys.exit(0 if is_ready else 3)


def _of_cluster(address: str) -> "list[Check]":
    try:
        from distbelief.cluster.ray_survey import survey
    except ImportError as error:
        fix = "pip install ray"
        raise Problem("DB-ENV-001", f"Ray cannot be imported: {error}", fix=fix) from error
    return survey(address, str(_said("save.store") or "")).checks()


def _of_this_machine(run_dir: Path | None) -> "list[Check]":
    from distbelief.doctor import examine

    port = int(_said("net.port") or 0)
    host = str(_said("net.host") or "127.0.0.1")
    shards = int(_said("shards") or 2)
    ports = list(range(port, port + 1 + shards)) if port else []
    return examine(runs_folder(run_dir), host, ports)


def _said(key: str) -> Any:  # Any: TOML
    """What the settings here have for a key; None if they have nothing."""
    said = gather(environ=os.environ).about(key)
    return said[-1].value if said else None
