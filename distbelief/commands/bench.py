"""`distbelief bench`: measure this system on this machine, next to what the machine can do."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distbelief.commands.run_argument import json_line

if TYPE_CHECKING:
    from distbelief.bench.plot import Bar
    from distbelief.bench.table import Column

    _ParamType = click.ParamType[tuple[str, ...]]
else:  # before click 8.2 it takes no parameter
    _ParamType = click.ParamType

TRANSPORTS = ("shm", "tcp")
WIRE_TRANSPORTS = (*TRANSPORTS, "curve")
FORMS = ("float32", "bfloat16", "int8", "topk")
DURABILITY = ("none", "snapshots")
RULES = ("sgd", "momentum", "nesterov", "adagrad", "adam", "adamw")
SUFFIXES = (".png", ".svg")


class OneOrMore(_ParamType):
    """Values with commas between them; the option may also be given several times."""

    def __init__(self, name: str, choices: Sequence[str] = ()) -> None:
        """choices: the words that are allowed; without them, whole numbers above 0."""
        self.name = name
        self._choices = choices

    def convert(
        self,
        value: Any,  # Any: as click has it
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        words = tuple(word.strip() for word in str(value).split(","))
        for word in words:
            if self._choices and word not in self._choices:
                self.fail(f"{word!r} is none of {', '.join(self._choices)}", param, ctx)
            if not self._choices and not (word.isascii() and word.isdigit() and int(word)):
                self.fail(f"{word!r} is not a whole number above 0", param, ctx)
        return words


def several(
    flag: str, default: str, help_: str, choices: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An option of one or more values; the command gets a tuple of strings."""
    return click.option(
        flag,
        type=OneOrMore("|".join(choices) or "N", choices),
        multiple=True,
        default=(default,),
        show_default=True,
        callback=lambda ctx, param, value: tuple(
            dict.fromkeys(x for words in value for x in words)
        ),
        help=help_,
    )


def _plot_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is not None:
        if value.suffix.lower() not in SUFFIXES:
            raise click.BadParameter(f"{value} ends in neither of {' and '.join(SUFFIXES)}")
        if not value.absolute().parent.is_dir():
            raise click.BadParameter(f"there is no folder {value.parent}")
    return value


size_option = click.option(
    "--size",
    metavar="PARAMS",
    type=click.IntRange(min=1),
    help="Parameters of one flat tensor, instead of GoogLeNet's 116 tensors of 6,998,552.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one line of JSON a row.")
plot_option = click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_plot_file,
    help="Draw the rows into a .png or .svg file.",
)
seconds = click.FloatRange(min=0.01)
count = click.IntRange(min=1)


@click.group("bench")
def bench_group() -> None:
    """Measure speed on this machine, next to its limits.

    Systems that are compared take turns, window by window, and ratios are those of neighbours:
    the machine's own speed cancels out. Every result is checked; a wrong one ends with exit code
    1. Everything runs on this host, and nothing is left behind.
    """


@bench_group.command("wire", short_help="Gradients out, parameters back, no computing.")
@several("--workers", "1", "Workers; each number with each of --shards.")
@several("--shards", "1", "Shards.")
@several(
    "--transport",
    "shm,tcp",
    "Shared memory, TCP on the loopback, or that encrypted.",
    WIRE_TRANSPORTS,
)
@size_option
@click.option("--compress", type=click.Choice(FORMS), default=FORMS[0], show_default=True)
@click.option("--durability", type=click.Choice(DURABILITY), default="none", show_default=True)
@click.option(
    "--snapshot-every",
    "snapshot_s",
    metavar="SECONDS",
    type=seconds,
    default=1.0,
    show_default=True,
    help="With --durability snapshots.",
)
@click.option(
    "--seconds", "seconds_", type=seconds, default=2.0, show_default=True, help="A window."
)
@click.option("--windows", type=count, default=5, show_default=True, help="Of each system.")
@click.option("--floors", is_flag=True, help="Also hand-written servers, in turns with ours.")
@json_option
@plot_option
def wire_command(
    workers: tuple[str, ...],
    shards: tuple[str, ...],
    transport: tuple[str, ...],
    size: int | None,
    compress: str,
    durability: str,
    snapshot_s: float,
    seconds_: float,
    windows: int,
    floors: bool,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Measure rounds: push a gradient, apply momentum SGD, fetch all parameters.

    \b
    Examples:
      distbelief bench wire --workers 1,2,4 --floors
      distbelief bench wire --transport tcp --shards 2 --json
      distbelief bench wire --transport tcp,curve       what encryption costs
    """
    _see_plot(plot)
    from distbelief.bench import wire

    config = wire.WireConfig(
        workers=[int(number) for number in workers],
        shards=[int(number) for number in shards],
        transports=transport,
        size=size,
        compress=compress,
        durability=durability,
        snapshot_s=snapshot_s,
        seconds=seconds_,
        windows=windows,
        with_floors=floors,
    )
    with _progress() as tell:
        rows = wire.wire(config, tell)
    title = f"{rows[0].size:,} parameters, {rows[0].size * 8 / 1e6:.1f} MB a round"
    _show("wire", title, wire.columns(rows), rows, as_json=as_json)
    _plot(plot, title, "rounds/s", wire.bars(rows))
    _see_right(rows)


@bench_group.command("apply", short_help="What a push costs in the shard alone.")
@several("--rule", ",".join(RULES), "Update rules.", RULES)
@several("--threads", "1,2", "Threads of torch.")
@size_option
@click.option("--seconds", "seconds_", type=seconds, default=1.0, show_default=True, help="A row.")
@json_option
@plot_option
def apply_command(
    rule: tuple[str, ...],
    threads: tuple[str, ...],
    size: int | None,
    seconds_: float,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Measure update rules through the parts of a shard, against torch's kernel and a copy.

    \b
    Example:
      distbelief bench apply --rule momentum,adam --threads 1
    """
    _see_plot(plot)
    from distbelief.bench import apply

    config = apply.ApplyConfig(
        rules=rule, threads=[int(number) for number in threads], size=size, seconds=seconds_
    )
    with _progress() as tell:
        rows = apply.apply(config, tell)
    title = f"{rows[0].size:,} parameters in {rows[0].parts} parts"
    _show("apply", title, apply.columns(), rows, as_json=as_json)
    _plot(plot, title, "ms/push", apply.bars(rows))
    _see_right(rows)


@bench_group.command("overlap", short_help="What a training step costs more with shards.")
@several("--transport", "shm", "Shared memory, or TCP on the loopback.", TRANSPORTS)
@click.option("--overlap/--no-overlap", default=True, help="Push parts during backward, or after.")
@click.option("--batch", type=count, default=32, show_default=True, help="Images of a step.")
@click.option(
    "--image", type=click.IntRange(min=32), default=64, show_default=True, help="Their side."
)
@click.option("--pairs", type=click.IntRange(min=2), default=200, show_default=True)
@click.option("--width", type=click.FloatRange(min=0.01), default=1.0, help="Of GoogLeNet.")
@json_option
@plot_option
def overlap_command(
    transport: tuple[str, ...],
    overlap: bool,
    batch: int,
    image: int,
    pairs: int,
    width: float,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Measure steps of GoogLeNet by torch.optim.SGD and by Downpour, in turns.

    \b
    Example:
      distbelief bench overlap --pairs 50 --no-overlap
    """
    _see_plot(plot)
    from distbelief.bench import overlap as bench

    rows = []
    with _progress() as tell:
        for one in transport:
            config = bench.OverlapConfig(
                transport=one, overlap=overlap, batch=batch, image=image, pairs=pairs, width=width
            )
            rows.append(bench.overlap(config, tell))
    title = f"GoogLeNet, {rows[0].size:,} parameters, one worker and one shard"
    _show("overlap", title, bench.columns(), rows, as_json=as_json)
    _plot(plot, title, "step with shards to plain step", bench.bars(rows))
    _see_right(rows)


@bench_group.command("straggler", short_help="What one slow worker costs the others.")
@several("--transport", "shm", "Shared memory, or TCP on the loopback.", TRANSPORTS)
@click.option("--workers", type=click.IntRange(min=2), default=4, show_default=True)
@click.option(
    "--sleep",
    "sleep_s",
    metavar="SECONDS",
    type=seconds,
    default=0.25,
    show_default=True,
    help="That a worker computes.",
)
@click.option(
    "--slow",
    "slow_s",
    metavar="SECONDS",
    type=seconds,
    default=1.0,
    show_default=True,
    help="That the slow one computes.",
)
@click.option("--batch", type=count, default=32, show_default=True, help="Samples of a step.")
@size_option
@click.option(
    "--seconds", "seconds_", type=seconds, default=8.0, show_default=True, help="A window."
)
@click.option("--windows", type=count, default=3, show_default=True, help="Of each kind.")
@json_option
@plot_option
def straggler_command(
    transport: tuple[str, ...],
    workers: int,
    sleep_s: float,
    slow_s: float,
    batch: int,
    size: int | None,
    seconds_: float,
    windows: int,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Measure workers of which one is slow, against each alone and against all-reduce.

    Computing is simulated by sleeping; pushes and fetches are real.

    \b
    Example:
      distbelief bench straggler --workers 4 --slow 1
    """
    _see_plot(plot)
    from distbelief.bench import straggler

    rows = []
    with _progress() as tell:
        for one in transport:
            config = straggler.StragglerConfig(
                workers=workers,
                sleep_s=sleep_s,
                slow_s=slow_s,
                batch=batch,
                transport=one,
                size=size,
                seconds=seconds_,
                windows=windows,
            )
            rows.append(straggler.straggler(config, tell))
    title = f"{rows[0].size:,} parameters, fetch policy {rows[0].policy}"
    _show("straggler", title, straggler.columns(), rows, as_json=as_json)
    _plot(plot, title, "samples/s", straggler.bars(rows))
    _see_right(rows)


@bench_group.command("limits", short_help="What this machine can do at all.")
@click.option("--seconds", "seconds_", type=seconds, default=0.2, show_default=True, help="A turn.")
@click.option("--repeats", type=count, default=5, show_default=True, help="Turns of each item.")
@size_option
@json_option
@plot_option
def limits_command(
    seconds_: float, repeats: int, size: int | None, as_json: bool, plot: Path | None
) -> None:
    """Measure copies, ZeroMQ and sockets with nothing around them, and empty round trips.

    \b
    Example:
      distbelief bench limits --json
    """
    _see_plot(plot)
    from distbelief.bench import limits
    from distbelief.bench.work import GOOGLENET_SIZE

    config = limits.LimitsConfig(size=size or GOOGLENET_SIZE, repeats=repeats, seconds=seconds_)
    with _progress() as tell:
        rows = limits.limits(config, tell)
    title = f"{config.size * 4 / 1e6:.1f} MB, median (range) of {repeats}"
    _show("limits", title, limits.columns(), rows, as_json=as_json)
    _plot(plot, title, "GB/s", limits.bars(rows))
    _see_right(rows)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is going on, on one line of a terminal; nothing where there is none."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("") as status:
        yield status.update


def _see_plot(plot: Path | None) -> None:
    """Before minutes of measuring: can it be drawn?"""
    if plot is not None:
        from distbelief.bench.plot import load

        load()


def _show(
    kind: str, title: str, columns: "Sequence[Column[Any]]", rows: Sequence[Any], *, as_json: bool
) -> None:  # Any: a row of each bench is its own dataclass
    if as_json:
        for row in rows:
            click.echo(json_line(kind, **asdict(row)))
        return
    from distbelief.bench.table import show

    show(title, columns, rows)


def _plot(plot: Path | None, title: str, unit: str, bars: "Sequence[Bar]") -> None:
    if plot is not None:
        from distbelief.bench.plot import plot as draw

        draw(plot, title, unit, bars)
        click.echo(f"drawn: {plot}", err=True)


def _see_right(rows: Sequence[Any]) -> None:  # Any: as in _show
    """Exit code 1 where a result was wrong."""
    wrong = [row for row in rows if row.check != "right"]
    for row in wrong:
        click.echo(f"wrong: {getattr(row, 'why', '') or row}", err=True)
    if wrong:
        sys.exit(1)
