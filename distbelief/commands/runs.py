"""`distbelief runs`: the runs that were, and what they came to."""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from distbelief.commands.run_argument import (
    RUN,
    find,
    json_line,
    run_argument,
    run_dir_option,
    runs_folder,
)
from distbelief.commands.status import read_config, saved, what_of
from distbelief.commands.summary import STATE_COLORS, duration, error_text, summary
from distbelief.folder import RunFolder, all_runs
from distbelief.problem import Problem
from distbelief.state import state_of

OF_EVERY_RUN = ("type", "v", "run", "run_dir", "saved", "resume")
"""Fields of a result that differ between any two runs and say nothing."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print lines of JSON.")


@click.group("runs")
def runs_group() -> None:
    """List, show, compare and remove runs."""


@runs_group.command("ls", short_help="List the runs.")
@run_dir_option
@json_option
def ls_command(run_dir: Path | None, as_json: bool) -> None:
    """List the runs, the newest first.

    \b
    Example:
      distbelief runs ls --json | jq -r 'select(.top1 > 0.9).run'
    """
    parent = runs_folder(run_dir)
    rows = [_row(folder) for folder in reversed(all_runs(parent))]
    if as_json:
        for row in rows:
            click.echo(json_line("run", **row))
    elif not rows:
        click.echo(f"there is no run in {parent}", err=True)
    else:
        for line in _table(rows):
            click.echo(line)


@runs_group.command("show", short_help="Show all about a run.")
@run_argument
@run_dir_option
@json_option
def show_command(run: str | None, run_dir: Path | None, as_json: bool) -> None:
    """Show all about RUN: what it came to, what it was told, and its files.

    \b
    Example:
      distbelief runs show b834
    """
    folder = find(run, run_dir)
    config, result = read_config(folder), folder.result
    files = {
        str(path.relative_to(folder.path)): path.stat().st_size
        for path in sorted(folder.path.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
    if as_json:
        row = _row(folder)
        fields = {"config": config, "result": result, "checkpoint": saved(folder), "files": files}
        click.echo(json_line("run", **row, **fields))
        return
    state = state_of(folder)
    if result is None:
        click.echo(f"{state.word}: run {folder.run}\n  {folder.path}")
    else:
        click.echo(summary(result))
        if result["error"]:
            click.echo(error_text(result["error"]))
    began = folder.launcher
    if began is not None:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began.started_at))
        click.echo(f"\nlaunched {when} in {began.cwd} on {began.host}, distbelief {began.version}")
    click.echo(f"\n{folder.config}")
    for key, value in _flat(config):
        click.echo(f"  {key} = {value!r}")
    click.echo(f"\n{len(files)} files, {_size(sum(files.values()))}")
    for name, size in files.items():
        click.echo(f"  {_size(size):>9}  {name}")


@runs_group.command("rm", short_help="Remove runs.")
@click.argument("runs", nargs=-1, required=True, type=RUN)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@run_dir_option
def rm_command(runs: tuple[str, ...], yes: bool, run_dir: Path | None) -> None:
    """Remove RUNS with all that they have saved. Runs that go on are refused.

    \b
    Example:
      distbelief runs rm 20261122-231032-b834 -y
    """
    folders = {folder.path.resolve(): folder for folder in (find(run, run_dir) for run in runs)}
    for folder in folders.values():
        if state_of(folder).is_live:
            raise Problem(
                "DB-RUN-008",
                f"run {folder.run} is still going on; nothing was removed",
                fix=f"stop it first: distbelief stop {folder.run}",
            )
    if not yes:
        names = ", ".join(folder.run for folder in folders.values())
        if not sys.stdin.isatty():
            raise Problem(
                "DB-USE-008",
                f"nobody can be asked whether to remove {names}: there is no terminal",
                fix="if you are sure: --yes",
            )
        click.confirm(f"Remove {names} with all that was saved?", abort=True)
    for folder in folders.values():
        try:
            shutil.rmtree(folder.path)
        except OSError as error:
            raise Problem("DB-STORE-004", f"run {folder.run} cannot be removed: {error}") from error
        click.echo(f"removed {folder.path}")


@runs_group.command("diff", short_help="In what two runs differ.")
@click.argument("a", type=RUN)
@click.argument("b", type=RUN)
@run_dir_option
@json_option
def diff_command(a: str, b: str, run_dir: Path | None, as_json: bool) -> None:
    """Say in what the settings and the results of runs A and B differ.

    \b
    Example:
      distbelief runs diff b834 77c0
    """
    first, second = find(a, run_dir), find(b, run_dir)
    config = _differences(read_config(first), read_config(second))
    results = [
        {k: v for k, v in (folder.result or {}).items() if k not in OF_EVERY_RUN}
        for folder in (first, second)
    ]
    result = _differences(*results)
    if as_json:
        click.echo(json_line("diff", runs=[first.run, second.run], config=config, result=result))
        return
    rows = [("", first.run, second.run)]
    rows += [(key, _short(x), _short(y)) for key, (x, y) in (config | result).items()]
    if len(rows) == 1:
        click.echo(f"{first.run} and {second.run} differ in nothing")
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def _row(folder: RunFolder) -> dict[str, Any]:  # Any: JSON
    config, result, status = read_config(folder), folder.result, folder.status
    model, data = what_of(config)
    newest = result or status or {}
    began = folder.launcher
    started_at = folder.config.stat().st_mtime if began is None else began.started_at
    return {
        "run": folder.run,
        "state": state_of(folder).word,
        "model": model,
        "data": data,
        "workers": config.get("workers"),
        "samples": newest.get("samples", 0),
        "top1": ((result or {}).get("eval") or {}).get("top1"),
        "started_at": started_at,
    }


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:  # Any: JSON
    now = time.time()
    cells = [("run", "state", "model", "data", "workers", "samples", "top-1", "age")]
    cells += [
        (
            row["run"],
            row["state"],
            row["model"],
            row["data"],
            str(row["workers"]),
            f"{row['samples']:,}",
            "-" if row["top1"] is None else f"{row['top1']:.4f}",
            duration(max(0.0, now - row["started_at"])),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for number, row in enumerate(cells):
        left = [f"{text:<{width}}" for text, width in zip(row[:4], widths[:4], strict=True)]
        right = [f"{text:>{width}}" for text, width in zip(row[4:], widths[4:], strict=True)]
        color = STATE_COLORS.get(row[1]) if number else None
        left[1] = click.style(left[1], fg=color) if color else left[1]
        yield "  ".join([*left, *right])


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:  # Any: TOML
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _differences(
    a: Mapping[str, Any],
    b: Mapping[str, Any],  # Any: JSON and TOML
) -> dict[str, tuple[Any, Any]]:
    left, right = dict(_flat(a)), dict(_flat(b))
    keys: Iterable[str] = dict.fromkeys([*left, *right])
    return {k: (left.get(k), right.get(k)) for k in keys if left.get(k) != right.get(k)}


def _short(value: object) -> str:
    text = "-" if value is None else str(value)
    first = text.splitlines()[0] if text else "''"
    return first if len(first) <= 40 else first[:37] + "..."


def _size(size: int) -> str:
    if size < 1000:
        return f"{size} B"
    return f"{size / 1e3:.1f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"
