"""`distbelief train-ensemble`: several runs that differ in the order of the data."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import click

from distbelief.commands.run_argument import json_line
from distbelief.problem import Problem
from distbelief.roster import Member, Roster, read_roster

MEMBERS, WIDER = 7, 1.25
POLL_S = 0.2


@click.command(
    "train-ensemble",
    short_help="Train several models that differ in the data's order.",
    context_settings={"ignore_unknown_options": True},
)
@click.option(
    "--members", type=click.IntRange(1, 100), default=MEMBERS, show_default=True, metavar="N"
)
@click.option(
    "--wider",
    type=click.FloatRange(0, min_open=True),
    default=WIDER,
    show_default=True,
    metavar="X",
    help="Of the last member's width to that of the others; 1 makes all alike.",
)
@click.option(
    "--at-once",
    type=click.IntRange(1, 100),
    default=1,
    show_default=True,
    metavar="N",
    help="Runs side by side.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="runs/ensemble",
    show_default=True,
    metavar="DIR",
    help="The ensemble's folder; one that is there goes on.",
)
@click.option("--json", "as_json", is_flag=True, help="Lines of JSON, one a member.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[LAUNCH OPTIONS]")
def train_ensemble_command(
    members: int, wider: float, at_once: int, out: Path, as_json: bool, arguments: tuple[str, ...]
) -> None:
    """Train the members of an ensemble, each by a `distbelief launch` with LAUNCH OPTIONS.

    As the paper's seven they have the same first weights and see the data in other orders
    (data.seed); the last is wider. A member that is trained already is left alone and one that was
    cut off is resumed, so the same command goes on after a stop.

    \b
    Examples:
      distbelief train-ensemble --recipe paper --data folder:/data/imagenet
      distbelief train-ensemble --members 3 --wider 1 --at-once 3 --address auto job.toml
      distbelief table runs/ensemble
    """
    roster = read_roster(out)
    if roster is None:
        roster = Roster.of(out, members, _width(arguments), wider, arguments)
        roster.write()
    elif (arguments and roster.arguments != arguments) or len(roster.members) != members != MEMBERS:
        raise Problem(
            "DB-USE-014",
            f"{out} is an ensemble of {len(roster.members)} members, launched with: "
            + (" ".join(roster.arguments) or "nothing"),
            why=f"asked for: {members} members, with: {' '.join(arguments) or 'nothing'}",
            fix="leave the options out to go on with it, or name another place with --out",
        )
    code = _train(roster, at_once, as_json=as_json)
    if code:
        sys.exit(code)
    if not as_json:
        click.echo(f"{len(roster.members)} members are trained: distbelief table {out}")


def _width(arguments: Sequence[str]) -> float:
    """Of the job that would be launched. Raises: SystemExit where it could not be, as launch."""
    plan = subprocess.run(
        _launch([*arguments, "--dry-run", "--json"]), stdout=subprocess.PIPE, text=True, check=False
    )
    if plan.returncode:
        sys.exit(plan.returncode)
    told = json.loads(plan.stdout.splitlines()[-1])
    if "width" not in told:
        raise Problem(
            "DB-USE-014",
            "an ensemble is trained of a model, not of a script",
            fix="name the model with --model and the data with --data",
        )
    return float(told["width"])


def _train(roster: Roster, at_once: int, *, as_json: bool) -> int:
    """Train whoever is not yet. Returns: the exit code of the first member that failed, or 0."""
    waiting = [member for member in roster.members if not roster.is_done(member)]
    running: dict[int, tuple[Member, subprocess.Popen[str]]] = {}
    failed = 0
    stopped: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        stopped.append(number)
        for _member, process in running.values():
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while (waiting and not failed and not stopped) or running:
            while waiting and len(running) < at_once and not failed and not stopped:
                member = waiting.pop(0)
                command = _command(roster, member)
                if not as_json:
                    click.echo(f"member {member.number} of {len(roster.members)}: {_said(command)}")
                # A session of its own: the terminal's Ctrl-C comes from here, once.
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, text=True, start_new_session=True
                )
                running[member.number] = (member, process)
            for number, (member, process) in list(running.items()):
                try:
                    out, _err = process.communicate(timeout=POLL_S)
                except subprocess.TimeoutExpired:
                    continue
                del running[number]
                failed = failed or process.returncode
                _tell(roster, member, out, as_json=as_json)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + stopped[0] if stopped else failed


def _command(roster: Roster, member: Member) -> list[str]:
    """What trains a member: a launch, or a resume where it was cut off."""
    run = roster.newest(member)
    if run is not None and run.checkpoint is not None and (run.result or {}).get("exit") != "done":
        return [sys.executable, "-m", "distbelief", "resume", str(run.path), "--json"]
    sets = [part for setting in member.settings for part in ("--set", setting)]
    own = ["--run-dir", str(roster.place(member)), "--json"]
    arguments = list(roster.arguments)
    if any(one.startswith("model.width=") for one in member.settings):
        arguments = _without_width(arguments)
    return _launch([*arguments, *sets, *own])


def _without_width(arguments: list[str]) -> list[str]:
    """A width that was said for all does not count for the wider one."""
    out: list[str] = []
    skip = False
    for i, one in enumerate(arguments):
        following = arguments[i + 1] if i + 1 < len(arguments) else ""
        if skip:
            skip = False
        elif one == "--width" or (one == "--set" and following.startswith("model.width=")):
            skip = True
        elif not one.startswith(("--width=", "--set=model.width=")):
            out.append(one)
    return out


def _launch(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "distbelief", "launch", *arguments]


def _said(command: Sequence[str]) -> str:
    return " ".join(["distbelief", *command[3:]])


def _tell(roster: Roster, member: Member, out: str, *, as_json: bool) -> None:
    try:
        result = json.loads(out.strip().splitlines()[-1])
    except (IndexError, ValueError):
        result = {"exit": "failed"}
    top1 = (result.get("eval") or {}).get("top1")
    if as_json:
        told = {"member": member.number, "result": result}
        click.echo(json_line("member", **told))
        return
    found = "" if top1 is None else f", top-1 {top1:.4f}"
    click.echo(f"member {member.number}: {result['exit']}{found}, {result.get('run_dir', '')}")
