"""Straggler: what one slow worker costs the others: ours with `latest`, and a synchronous baseline.

Computing is simulated by sleeping, so that the workers do not fight for the cores: what is left is
what waiting for each other costs. Pushes and fetches are real and of the full size, through
Downpour. Each worker is also measured alone, in the same run: the sum of those is what nobody
waiting for anybody would give.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distbelief.bench.board import Order
from distbelief.bench.crew import Crew
from distbelief.bench.gloo import GLOO
from distbelief.bench.ours import endpoints_of, make_client, ours
from distbelief.bench.plot import Bar
from distbelief.bench.station import Station
from distbelief.bench.table import Column, spread
from distbelief.bench.window import Spread, between, look, ratios
from distbelief.bench.work import Work

PATIENCE_S = 60.0
WARM_ROUNDS = 2
"""Rounds of every running worker before the clock starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StragglerConfig:
    """What to measure."""

    workers: int = 4
    sleep_s: float = 0.25
    """That a worker computes."""
    slow_s: float = 1.0
    """That the last worker computes."""
    batch: int = 32
    """Samples of a step."""
    transport: str = "shm"
    policy: str = "latest"
    size: int | None = None
    """Parameters; None takes GoogLeNet's."""
    seconds: float = 8.0
    """Of a window."""
    windows: int = 3
    """Of each kind."""

    @property
    def sleeps(self) -> list[float]:
        """By worker."""
        return [self.sleep_s] * (self.workers - 1) + [self.slow_s]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Samples a second; medians over the windows."""

    workers: int
    sleep_s: float
    slow_s: float
    batch: int
    transport: str
    policy: str
    size: int
    windows: int
    together: Spread
    """All workers of ours at once."""
    alone: tuple[float, ...]
    """Each worker of ours by itself."""
    to_alone: Spread
    """together to the sum of alone."""
    ideal: float
    """What sleeping alone allows."""
    synchronous: Spread
    """All workers with gloo's all-reduce."""
    to_synchronous: Spread
    """together to synchronous."""
    samples: int
    """That workers of ours were told of as taken."""
    check: str
    """right where the shards have taken the same number, and all-reduce has computed right."""
    why: str


def straggler(
    config: StragglerConfig, on_progress: Callable[[str], None] = lambda text: None
) -> Row:
    """Measure. Raises: Problem if a process fails."""
    work = Work.of(config.size)
    mine = replace(ours(config.transport), worker="distbelief.bench.straggler:work")
    args = {
        "work": work.as_dict(),
        "numel": work.size,
        "sleeps": config.sleeps,
        "batch": config.batch,
        "policy": config.policy,
    }
    together: list[float] = []
    alone: list[list[float]] = [[] for _ in range(config.workers)]
    synchronous: list[float] = []
    with ExitStack() as stack:
        on_progress("starting")
        crew = stack.enter_context(Crew(mine, config.workers, 1, args))
        others = stack.enter_context(Crew(GLOO, config.workers, 1, args))
        for turn in range(config.windows):
            on_progress(f"turn {turn + 1} of {config.windows}: together")
            together.append(_samples_per_s(crew, crew.seats, config))
            on_progress(f"turn {turn + 1} of {config.windows}: all-reduce")
            synchronous.append(_samples_per_s(others, others.seats, config))
            for index in crew.seats:
                on_progress(f"turn {turn + 1} of {config.windows}: worker {index} alone")
                alone[index].append(_samples_per_s(crew, range(index, index + 1), config))
        crew.tell(Order.STOP)
        results = crew.results()
        faults = [*_uncounted(results), *_out_of_step(others)]
    sums = [sum(one) for one in zip(*alone, strict=True)]
    to_alone, to_synchronous = ratios(together, sums), ratios(together, synchronous)
    assert to_alone is not None
    assert to_synchronous is not None
    return Row(
        workers=config.workers,
        sleep_s=config.sleep_s,
        slow_s=config.slow_s,
        batch=config.batch,
        transport=config.transport,
        policy=config.policy,
        size=work.size,
        windows=config.windows,
        together=Spread.of(together),
        alone=tuple(Spread.of(one).median for one in alone),
        to_alone=to_alone,
        ideal=sum(config.batch / sleep for sleep in config.sleeps),
        synchronous=Spread.of(synchronous),
        to_synchronous=to_synchronous,
        samples=sum(result["answered"] for result in results),
        check="wrong" if faults else "right",
        why="; ".join(faults),
    )


def _samples_per_s(crew: Crew, seats: range, config: StragglerConfig) -> float:
    """Of these workers running, the others on hold."""

    def let_run(seconds: float, rounds: int) -> None:
        goals = {index: crew.taken[index].progress[0] + rounds for index in seats}
        time.sleep(seconds)
        crew.wait_for(
            lambda: all(crew.taken[i].progress[0] >= goal for i, goal in goals.items()),
            PATIENCE_S,
            "for a step",
        )

    crew.tell(Order.RUN, seats)
    let_run(0.0, WARM_ROUNDS)
    first = look(crew)
    let_run(config.seconds, 1)
    last = look(crew)
    crew.hold()
    return config.batch * between(first, last, os.cpu_count() or 1).rounds_per_s


def _uncounted(results: Sequence[dict[str, Any]]) -> list[str]:  # Any: JSON
    """Samples that workers were told of and the shards do not have, or the other way about."""
    told = sum(result["answered"] for result in results)
    taken = max(result["taken"] for result in results)
    stepped = sum(result["stepped"] for result in results)
    if told == taken == stepped:
        return []
    return [f"{stepped} samples were trained on, {told} answered, {taken} taken by the shards"]


def _out_of_step(crew: Crew) -> list[str]:
    rounds = {seat.progress[0] for seat in crew.taken}
    return [] if len(rounds) == 1 else [f"all-reduce did {sorted(rounds)} rounds"]


def work(station: Station) -> None:
    """Be a worker of ours that sleeps instead of computing."""
    from distbelief.workers.comm import Comm
    from distbelief.workers.downpour import Downpour, DownpourConfig

    torch.set_num_threads(1)
    spec, seat = station.spec, station.seat
    made = Work.from_dict(spec["work"])
    sleep_s, batch = spec["sleeps"][spec["index"]], spec["batch"]
    named = [
        (entry.name, torch.nn.Parameter(torch.zeros(entry.shape))) for entry in made.layout.entries
    ]
    parameters = [parameter for _, parameter in named]
    grads = [torch.ones_like(parameter) for parameter in parameters]
    endpoints, contract = endpoints_of(station), made.contract
    with Comm(lambda: make_client(station, endpoints, contract)) as comm:
        client = comm.connect()
        config = DownpourConfig(fetch_policy=spec["policy"])
        downpour = Downpour.of(named, comm, contract, config)
        downpour.start(initialise=spec["index"] == 0)
        station.say(is_shared=client.is_shared)
        stepped = 0

        def do_round() -> None:
            nonlocal stepped
            downpour.zero_grad()
            loss: Tensor = _Computing.apply(sleep_s, grads, *parameters)  # type: ignore[no-untyped-call]
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            downpour.step(samples=batch)
            stepped += batch
            seat.take_samples(downpour.answered_samples)

        seat.do_rounds(do_round, lambda: None, lambda: (0.0, 0.0))
        downpour.flush()
        pushed = downpour.last_pushed
        station.say(
            answered=downpour.answered_samples,
            stepped=stepped,
            taken=0 if pushed is None else pushed.samples,
        )
        downpour.close()


class _Computing(torch.autograd.Function):
    """A loss whose backward pass takes a given time and gives prepared gradients."""

    @staticmethod
    def forward(ctx: Any, sleep_s: float, grads: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.sleep_s, ctx.grads = sleep_s, grads
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:  # Any: as torch has it
        time.sleep(ctx.sleep_s)
        return None, None, *ctx.grads


def columns() -> list[Column[Row]]:
    """Of the table."""

    def of(found: Spread, digits: int = 0) -> str:
        return spread(found.median, found.low, found.high, digits)

    return [
        Column("workers", lambda r: f"{r.workers - 1} of {r.sleep_s:g} s, 1 of {r.slow_s:g} s"),
        Column("transport", lambda row: row.transport, is_text=True),
        Column("samples/s", lambda row: of(row.together)),
        Column("alone, sum", lambda row: f"{sum(row.alone):.0f}"),
        Column("x alone", lambda row: of(row.to_alone, 2)),
        Column("sleeping alone", lambda row: f"{row.ideal:.0f}"),
        Column("all-reduce", lambda row: of(row.synchronous)),
        Column("x all-reduce", lambda row: of(row.to_synchronous, 2)),
        Column("result", lambda row: row.check, is_text=True),
    ]


def bars(rows: Sequence[Row]) -> list[Bar]:
    """For a plot."""
    return [
        bar
        for row in rows
        for bar in (
            Bar(
                row.transport, "together", row.together.median, row.together.low, row.together.high
            ),
            Bar(row.transport, "alone, sum", sum(row.alone), sum(row.alone), sum(row.alone)),
            Bar(
                row.transport,
                "all-reduce",
                row.synchronous.median,
                row.synchronous.low,
                row.synchronous.high,
            ),
        )
    ]
