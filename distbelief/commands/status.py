"""`distbelief status`: what a run is at, in one look."""

import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from distbelief.commands.run_argument import find, json_line, run_argument, run_dir_option
from distbelief.commands.summary import STATE_COLORS, accuracy, duration
from distbelief.folder import RunFolder
from distbelief.state import RunState, state_of


@click.command("status", short_help="What a run is at, in one look.")
@run_argument
@run_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def status_command(run: str | None, run_dir: Path | None, as_json: bool) -> None:
    """Say what RUN is at: its folder, its id or a part of it; by default the newest.

    Exit code 0: it goes well, is done or was stopped; 4: it goes on, but something is wrong;
    1: it has failed, or its launcher was killed.

    \b
    Example:
      distbelief status && echo all is well
    """
    folder = find(run, run_dir)
    state = state_of(folder)
    if as_json:
        click.echo(
            json_line(
                "status",
                run=folder.run,
                run_dir=str(folder.path),
                state=state.word,
                live=state.is_live,
                troubles=state.troubles,
                exit_code=state.exit_code,
                resume=_resume(folder, state),
                status=folder.status,
                checkpoint=saved(folder),
                result=folder.result,
            )
        )
    else:
        for line in _lines(folder, state):
            click.echo(line)
    sys.exit(state.exit_code)


def saved(folder: RunFolder) -> dict[str, Any] | None:  # Any: JSON
    """What of the newest checkpoint is for people."""
    checkpoint = folder.checkpoint
    return checkpoint and {key: checkpoint.get(key) for key in ("samples", "updates", "at")}


def read_config(folder: RunFolder) -> dict[str, Any]:  # Any: TOML
    """The run's configuration as it was written; empty if it cannot be read."""
    try:
        return tomllib.loads(folder.config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def what_of(config: Mapping[str, Any]) -> tuple[str, str]:  # Any: TOML
    """Model or script, and data, in short."""
    script = config.get("script", {}).get("path")
    if script:
        return Path(script).name, "-"
    model, data = config.get("model", {}), config.get("data", {})
    return model.get("factory", "-"), data.get("source", "-")


def _resume(folder: RunFolder, state: RunState) -> str:
    can = not state.is_live and state.word != "done" and folder.checkpoint is not None
    return folder.resume_command if can else ""


def _lines(folder: RunFolder, state: RunState) -> Iterator[str]:
    config = read_config(folder)
    model, data = what_of(config)
    word = click.style(state.word, fg=STATE_COLORS.get(state.word), bold=True)
    yield f"run {folder.run}: {word}"
    yield f"  {model} on {data}" if data != "-" else f"  {model}"
    yield (
        f"  {config.get('workers')} workers and {config.get('shards')} shards "
        f"by {config.get('engine')}"
    )
    net = config.get("net", {})
    listed = folder.keys
    if listed is not None:
        yield f"  encrypted at {net.get('host')}, {len(listed) - 1} processes listed"
    elif net.get("insecure"):
        yield click.style(f"  NOT ENCRYPTED at {net.get('host')} (net.insecure)", fg="yellow")
    result, status = folder.result, folder.status
    if result is not None:
        yield (
            f"  {result['samples']:,} samples in {result['updates']:,} updates, "
            f"{duration(result['wall_s'])} in all"
        )
        if result["eval"]:
            yield "  " + accuracy(result["eval"])
    elif status is not None:
        yield from _progress(status)
    checkpoint = folder.checkpoint
    if checkpoint is not None:
        ago = duration(max(0.0, time.time() - checkpoint["at"]))
        yield f"  checkpoint of {checkpoint['samples']:,} samples, {ago} ago"
    for trouble in state.troubles:
        first, *more = trouble.splitlines()
        yield click.style(f"  ! {first}", fg="red" if state.exit_code == 1 else "yellow")
        yield from ("    " + line for line in more)
    command = _resume(folder, state)
    if command:
        yield f"go on with\n  {command}"
    elif state.exit_code == 1 and not state.is_live:
        yield "nothing was saved to go on from; start anew with"
        yield f"  distbelief launch {folder.config}"


def _progress(status: Mapping[str, Any]) -> Iterator[str]:  # Any: JSON
    total, eta = status.get("total_samples"), status.get("eta_s")
    share = f" of {total:,} ({status['samples'] / total:.0%})" if total else ""
    left = "" if eta is None else f", {duration(eta)} left"
    yield f"  {status['samples']:,} samples{share}{left}, {status['samples_per_s']:.0f} samples/s"
    loss = "-" if status.get("loss") is None else f"{status['loss']:.4g}"
    stale = [status["staleness"].get(q) for q in ("p50", "p95", "max")]
    quantiles = "/".join("-" if value is None else str(value) for value in stale)
    yield f"  loss {loss}, {status['updates']:,} updates, staleness p50/p95/max {quantiles}"
    for kind in ("workers", "shards"):
        names = ", ".join(f"{name} {w.get('state')}" for name, w in status.get(kind, {}).items())
        if names:
            yield f"  {names}"
