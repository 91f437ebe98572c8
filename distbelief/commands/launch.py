"""`distbelief launch`: start a run here."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distbelief.commands.run_argument import find, json_line
from distbelief.commands.training import (
    WORKERS,
    JsonCommand,
    json_option,
    plain_option,
    set_option,
    train,
)
from distbelief.commands.watching import watch_options
from distbelief.problem import Problem
from distbelief.result import Result
from distbelief.settings import FLAGS, Settings, gather
from distbelief.settings import recipe as recipe_file

if TYPE_CHECKING:
    from distbelief.job import Job
    from distbelief.live import LiveLine
    from distbelief.stop import Stop

_AFTER = "distbelief.launch.after"
"""Where the arguments after -- are kept; None if there is no --."""
_HINT = (
    "\n\nIf that is the script's own, put it after --:\n"
    "  distbelief launch train.py --workers 4 -- --its-own 3"
)


class LaunchCommand(JsonCommand):
    """Leaves what stands after `--` alone: it is a script's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        cut = args.index("--") if "--" in args else None
        ctx.meta[_AFTER] = None if cut is None else tuple(args[cut + 1 :])
        own = args[:cut]
        try:
            return super().parse_args(ctx, list(own))  # it takes its list apart
        except click.UsageError as error:
            if cut is None and any(arg.endswith(".py") for arg in own):
                raise click.UsageError(error.format_message() + _HINT, ctx) from error
            raise


@click.command("launch", short_help="Start a run here.", cls=LaunchCommand)
@click.argument("target", required=False, metavar="[CONFIG | SCRIPT [-- ARGS]]")
@click.option("--model", metavar="NAME", help="module:factory, googlenet-small or googlenet.")
@click.option(
    "--data",
    metavar="SOURCE",
    help="digits, fashion-mnist[:PATH], folder:PATH, wds:PATTERN or module:function.",
)
@click.option("--engine", type=click.Choice(["ray", "local"]), help="What starts the processes.")
@click.option("--address", metavar="ADDR", help="Ray cluster: local (default), auto, host:port.")
@click.option(
    "--workers", type=WORKERS, metavar="N", help="Replicas that compute gradients; or MIN:MAX."
)
@click.option("--shards", type=int, metavar="N", help="Processes that hold the parameters.")
@click.option("--batch-size", type=int, metavar="N", help="Samples in a batch of one worker.")
@click.option("--lr", type=float, metavar="X", help="Learning rate, applied by the shards.")
@click.option(
    "--optimizer", metavar="RULE", help="sgd, momentum, nesterov, adagrad, adam or adamw."
)
@click.option("--width", type=float, metavar="X", help="Multiplier on the model's channels.")
@click.option("--n-fetch", type=int, metavar="N", help="Steps from one fetch to the next.")
@click.option("--n-push", type=int, metavar="N", help="Steps from one push to the next.")
@click.option(
    "--fetch-policy", type=click.Choice(["fresh", "latest"]), help="Wait for the own push or not."
)
@click.option("--until", metavar="END", help="10-epochs, 5000-updates or 20m.")
@click.option("--seed", type=int, metavar="N", help="Of the first parameters and the data's order.")
@click.option("--run-dir", metavar="DIR", help="Where run folders are made; ./runs by default.")
@watch_options
@click.option("--recipe", metavar="NAME", help="paper, caffe-quick, caffe-step, adagrad or small.")
@click.option(
    "--config",
    "configs",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A file of settings; again for more, the later winning.",
)
@set_option
@click.option("--dry-run", is_flag=True, help="Say what would be started, and end.")
@json_option
@plain_option
@click.pass_context
def launch_command(
    ctx: click.Context,
    /,
    target: str | None,
    recipe: str | None,
    configs: tuple[Path, ...],
    sets: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    plain: bool,
    **flags: Any,  # Any: one of each option's type
) -> None:
    """Train a model: from a TOML file, from flags, or both (flags win), or with a script.

    Without anything it trains GoogLeNet on real digits with 2 workers and 2 shards. A SCRIPT is
    run in each worker; what stands after -- is its own.

    \b
    Examples:
      distbelief launch --model my_net:Net --workers 4
      distbelief launch job.toml --set train.momentum=0.7 --json
      distbelief launch --recipe small --data 'wds:cifar10/{split}-*.tar'
      distbelief launch train.py --workers 4 -- --epochs 3
    """
    given = {FLAGS[name]: value for name, value in flags.items() if value is not None}
    after: tuple[str, ...] | None = ctx.meta[_AFTER]

    def compose_job() -> "tuple[Job, Settings]":
        from distbelief.job import compose

        files, script = _read_target(target, after)
        named = () if recipe is None else (recipe_file(recipe),)
        settings = gather((*named, *configs, *files), {**given, **script}, sets, os.environ)
        return compose(settings), settings

    def start(live: "LiveLine", stop: "Stop") -> Result:
        from distbelief.launcher import launch

        job, settings = compose_job()
        if settings.sources:
            live.say(f"settings of {', '.join(settings.sources)}")
        return launch(job, live=live, stop=stop)

    if dry_run:
        _show_plan(compose_job()[0], as_json=as_json)
    else:
        train(start, as_json=as_json, plain=plain)


def _read_target(
    target: str | None, after: Sequence[str] | None
) -> tuple[list[Path], dict[str, Any]]:  # Any: TOML
    """What the positional argument is: files of settings, and keys that name a script.

    Raises: Problem if it is neither.
    """
    path = Path(target or "")
    if path.suffix == ".py":
        if not path.is_file():
            raise Problem("DB-USE-006", f"there is no script {target}", fix="is it spelt right?")
        return [], {"script.path": str(path.resolve()), "script.args": list(after or ())}
    if after is not None:
        raise Problem(
            "DB-USE-006",
            f"there are arguments after --, {' '.join(after) or 'none'}, and no script",
            fix="what stands after -- is for a script: distbelief launch train.py -- --epochs 3",
        )
    if target is None:
        return [], {}
    if path.suffix == ".toml":
        return [path], {}
    what = f"{target} is neither a script (.py) nor a file of settings (.toml)"
    try:
        run = find(target, None)
    except Problem:
        fix = "a model is named with --model, data with --data"
    else:
        fix = f"to go on with run {run.run}: distbelief resume {target}"
    raise Problem("DB-USE-006", what, fix=fix)


def _show_plan(job: "Job", *, as_json: bool) -> None:
    """Say what a launch would start. Opens the data and builds the model, as it would."""
    common = {
        "workers": job.workers,
        "shards": job.shards,
        "engine": job.engine,
        "run_dir": job.run_dir,
    }
    crew = f"{job.workers} workers and {job.shards} shards by {job.engine}"
    if job.script.path:
        if as_json:
            click.echo(json_line("plan", script=job.script.path, **common))
        else:
            click.echo(f"{job.script.path}, in {crew}\nthe script says the rest")
        return
    from distbelief.factory import make_contract, make_model, open_data, try_model, with_views
    from distbelief.param_server.partition import Partition

    split, test = open_data(job, "train"), open_data(job, "test")
    assert split is not None  # every source has this one
    split = with_views(job, split)
    model = make_model(job, split)
    contract = make_contract(job, model, len(split))
    try_model(job, model, split)
    layout = contract.layout
    partition = Partition(layout, job.shards)
    sizes = [
        4 * sum(part.numel for part in partition.parts_of(shard)) for shard in range(job.shards)
    ]
    num_test = 0 if test is None else len(test)
    if as_json:
        plan = {
            "model": job.model.factory,
            "width": job.model.width,
            "data": job.data.source,
            "train_samples": len(split),
            "test_samples": num_test,
            "until": job.until,
            "parameters": layout.total,
            "parts": len(layout.parts),
            "bytes_per_push": 4 * layout.total,
            "bytes_per_shard": sizes,
        }
        click.echo(json_line("plan", **plan, **common))
        return
    click.echo(
        f"{job.model.factory}, {layout.total:,} parameters in {len(layout.parts)} parts\n"
        f"  {crew}; at most {max(sizes) / 1e6:,.1f} MB of parameters a shard\n"
        f"  {4 * layout.total / 1e6:,.1f} MB a push, every {job.train.n_push} batches of "
        f"{job.train.batch_size}; as much a fetch\n"
        f"  {job.data.source}: {len(split):,} samples to train on, {num_test:,} to test\n"
        f"  until {job.until}; run folder in {job.run_dir}\n"
        "nothing was started (--dry-run)"
    )
