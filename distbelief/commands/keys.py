"""`distbelief keys`: keys that outlive a run, and who is listed in one."""

from pathlib import Path

import click

from distbelief.commands.run_argument import find, json_line, run_argument, run_dir_option
from distbelief.problem import Problem


@click.group("keys")
def keys_group() -> None:
    """Make keys, and show whom a run lets in.

    A run whose connections are encrypted makes its own keys and needs none of these. With
    --set net.keys=DIR it takes those that lie there.
    """


@keys_group.command("new", short_help="Make keys.")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print lines of JSON.")
def new_command(folder: Path, names: tuple[str, ...], as_json: bool) -> None:
    """Make a key in DIR for each NAME: the files NAME.secret (for its owner alone) and NAME.public.

    NAME is `server` (the default: shards and controller), a worker such as w0, or a shard such as
    shard0. Nothing is ever written over.

    \b
    Example:
      distbelief keys new keys && distbelief launch --set net.encrypt=true --set net.keys=keys
    """
    from distbelief.keyring import SERVER, write_pair

    for name in names or (SERVER,):
        pair = write_pair(folder, name)
        if as_json:
            click.echo(json_line("key", name=name, public=pair.public, folder=str(folder)))
        else:
            click.echo(f"{name}  {pair.public}")


@keys_group.command("list", short_help="Show whom a run lets in.")
@run_argument
@run_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print lines of JSON.")
def list_command(run: str | None, run_dir: Path | None, as_json: bool) -> None:
    """Show the public keys of RUN by name; `server` is that of its shards and controller.

    \b
    Example:
      distbelief keys list 20261123-0012
    """
    folder = find(run, run_dir)
    listed = folder.keys
    if listed is None:
        raise Problem(
            "DB-KEY-003",
            f"run {folder.run} lists no keys: its connections are not encrypted",
            fix="they are with another net.host than the loopback, or net.encrypt=true",
        )
    width = max(map(len, listed))
    for name, public in listed.items():
        if as_json:
            click.echo(json_line("key", run=folder.run, name=name, public=public))
        else:
            click.echo(f"{name:<{width}}  {public}")
