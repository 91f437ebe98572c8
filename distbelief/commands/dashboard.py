"""`distbelief dashboard`: the page of a run that goes on, that has ended, or that never was."""

import secrets
import webbrowser
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distbelief.commands.run_argument import find, run_argument, run_dir_option
from distbelief.folder import RunFolder
from distbelief.state import state_of

if TYPE_CHECKING:
    from distbelief.monitor.process import Config


@click.command("dashboard", short_help="Look at a run in a browser.")
@run_argument
@run_dir_option
@click.option("--open", "opens", is_flag=True, help="Open it in a browser.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    metavar="N",
    help="Of a run that has ended: where to serve it; by default 8787, if that is free.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Of a run that has ended: the address on which to serve it.",
)
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="NAME[:PORT]",
    help="Another name by which browsers ask for it, such as a proxy's.",
)
@click.option(
    "--simulate",
    type=click.IntRange(1, 10_000),
    metavar="N",
    help="Show a run of N workers that never was, with a straggler.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of --simulate.")
@click.option("--print-grafana", is_flag=True, help="Print a dashboard for Grafana, and no more.")
def dashboard_command(
    run: str | None,
    run_dir: Path | None,
    opens: bool,
    port: int,
    host: str,
    hosts: tuple[str, ...],
    simulate: int | None,
    seed: int,
    print_grafana: bool,
) -> None:
    """Print the link to the dashboard of RUN: its folder, its id or a part of it; by default the
    newest.

    A run that goes on has one already. One that has ended is served from its recording until
    Ctrl-C.

    \b
    Examples:
      distbelief dashboard --open
      distbelief dashboard --simulate 64
    """
    if print_grafana:
        grafana = files("distbelief.monitor") / "observability" / "grafana.json"
        click.echo(grafana.read_text(encoding="utf-8"), nl=False)
        return
    # Here and not at the top: aiohttp takes a third of a second to import.
    from distbelief.monitor.process import Config, Simulated

    access = secrets.token_hex(16)
    served: dict[str, Any] = {
        "host": host,
        "port": port,
        "hosts": list(hosts),
        "access": access,
    }  # Any: of Config
    if simulate is not None:
        _serve(
            Config(run="simulated", simulate=Simulated(workers=simulate, seed=seed), **served),
            opens,
        )
        return
    folder = find(run, run_dir)
    url = _live_url(folder)
    if url is not None:
        click.echo(url)
        if opens:
            webbrowser.open(url)
        return
    if state_of(folder).is_live:
        text = "its monitor is not running: this is what was recorded, and it does not go on"
        click.echo(f"run {folder.run} is going on, but {text}", err=True)
    _serve(Config(run=folder.run, run_path=str(folder.path), replay=True, **served), opens)


def _live_url(folder: RunFolder) -> str | None:
    """Of a monitor that serves now."""
    from distbelief.monitor.link import read_link

    link = read_link(folder.path)
    return link.url if link is not None and link.is_alive else None


def _serve(config: "Config", opens: bool) -> None:
    """Until Ctrl-C. Raises: Problem."""
    import asyncio

    from distbelief.monitor.process import Monitor
    from distbelief.monitor.source import Json

    def ready(told: Json) -> None:
        click.echo(told["url"])
        click.echo("Ctrl-C ends it", err=True)
        if opens:
            webbrowser.open(told["url"])

    asyncio.run(Monitor(config).run(ready))
