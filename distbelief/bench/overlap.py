"""Overlap: what a training step costs more with the parameter server than without it.

One process trains two GoogLeNets that begin equal, in turns, on the same batches: one by
torch.optim.SGD, one by Downpour with a shard in another process. The ratio is that of neighbouring
steps. The trainer, with all its threads, has one core and the shard another. With one worker
nothing is stale, so both models must be equal in the end, but for rounding.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from distbelief.bench.board import HOLD_S, Order, Seat
from distbelief.bench.crew import Crew
from distbelief.bench.ours import endpoints_of, make_client, ours
from distbelief.bench.plot import Bar
from distbelief.bench.station import Station
from distbelief.bench.system import System
from distbelief.bench.table import Column, spread
from distbelief.bench.window import Spread, ratios
from distbelief.bench.work import LR, MOMENTUM
from distbelief.param_server.contract import Contract
from distbelief.param_server.layout import Group, layout_of, trainable
from distbelief.param_server.update import make_rule
from distbelief.problem import Problem

CLASSES = 1000
BATCHES = 4
"""Different batches, which come in turns."""
WARM_STEPS = 3
STEP_S = 120.0
"""For one pair of steps, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapConfig:
    """What to measure."""

    transport: str = "shm"
    overlap: bool = True
    """Parts leave while backward is still running."""
    batch: int = 32
    image: int = 64
    """Side of the images, in pixels."""
    pairs: int = 200
    """Steps of each kind."""
    width: float = 1.0
    """Factor on the channels of GoogLeNet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Figures are medians over the steps."""

    transport: str
    overlap: bool
    batch: int
    image: int
    size: int
    """Parameters."""
    pairs: int
    plain_ms: float
    """A step by torch.optim.SGD."""
    ours_ms: float
    """A step by Downpour."""
    ratio: float
    """ours to plain, of neighbours."""
    ratio_p10: float
    ratio_p90: float
    plain_cpu_ms: float
    """Processor time of the trainer in a step."""
    ours_cpu_ms: float
    """As plain_cpu_ms; the shard's is not in it."""
    cores: tuple[int, ...]
    """Of the trainer and of the shard; empty where they could not be given one each."""
    max_difference: float
    """Between the two models in the end, of any parameter."""
    max_change: float
    """Between the first and the last values of the plain model, of any parameter."""
    check: str
    """right where the one is next to nothing of the other."""


def overlap(config: OverlapConfig, on_progress: Callable[[str], None] = lambda text: None) -> Row:
    """Measure. Raises: Problem if a process fails, or memory cannot be shared."""
    base = ours(config.transport)
    system = System(
        name=base.name,
        transport=base.transport,
        server=base.server,
        worker="distbelief.bench.overlap:train",
        args=base.args,
    )
    cores = sorted(os.sched_getaffinity(0))[:2]
    pinned = (cores[0], cores[1]) if len(cores) == 2 else ()
    args = {
        "batch": config.batch,
        "image": config.image,
        "pairs": config.pairs,
        "overlap": config.overlap,
        "width": config.width,
    }
    on_progress("starting")
    with Crew(system, 1, 1, args, cores=pinned) as crew:
        if config.transport == "shm" and not crew.heard[0]["is_shared"]:
            raise Problem("DB-ENV-006", "worker and shard do not share memory here")
        crew.tell(Order.RUN)
        seat = crew.taken[0]
        done = 0
        while done < config.pairs:
            crew.wait_for(partial(_is_past, seat, done), STEP_S, "for a step")
            done = seat.progress[0]
            on_progress(f"pair {done} of {config.pairs}")
        (result,) = crew.results()
    plain, theirs = result["plain_s"], result["ours_s"]
    paired = ratios(theirs, plain)
    assert paired is not None
    # Rounding differs where tensors are of odd lengths; a step that was lost, or taken twice, makes
    # a difference of one part in as many as there were steps.
    allowed = result["max_change"] / (100 * len(plain))
    is_right = result["max_change"] > 0 and result["max_difference"] <= allowed
    deciles = statistics.quantiles([a / b for a, b in zip(theirs, plain, strict=True)], n=10)
    return Row(
        transport=config.transport,
        overlap=config.overlap,
        batch=config.batch,
        image=config.image,
        size=result["size"],
        pairs=len(plain),
        plain_ms=1e3 * Spread.of(plain).median,
        ours_ms=1e3 * Spread.of(theirs).median,
        ratio=paired.median,
        ratio_p10=deciles[0],
        ratio_p90=deciles[-1],
        plain_cpu_ms=1e3 * Spread.of(result["plain_cpu_s"]).median,
        ours_cpu_ms=1e3 * Spread.of(result["ours_cpu_s"]).median,
        cores=pinned,
        max_difference=result["max_difference"],
        max_change=result["max_change"],
        check="right" if is_right else "wrong",
    )


def _is_past(seat: Seat, done: int) -> bool:
    return seat.progress[0] > done


def train(station: Station) -> None:
    """Be the trainer: both models, in turns."""
    from distbelief.model.googlenet import GoogLeNet
    from distbelief.workers.comm import Comm
    from distbelief.workers.downpour import Downpour, DownpourConfig

    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = station.spec
    image, batch = spec["image"], spec["batch"]
    # Without dropout, so that both models compute the same.
    plain = GoogLeNet(CLASSES, width=spec["width"], aux=False, image_size=image, dropout=0.0)
    model, first = deepcopy(plain), deepcopy(plain)
    inputs = torch.randn(BATCHES, batch, 3, image, image)
    targets = torch.randint(0, CLASSES, (BATCHES, batch))
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR, momentum=MOMENTUM, fused=True)
    named = trainable(model.named_parameters())
    layout = layout_of(named, (Group(lr=LR),))
    contract = Contract(layout=layout, rule=make_rule("momentum", momentum=MOMENTUM))
    endpoints = endpoints_of(station)
    with Comm(lambda: make_client(station, endpoints, contract)) as comm:
        client = comm.connect()
        config = DownpourConfig(overlap=spec["overlap"])
        downpour = Downpour.of(named, comm, contract, config)
        downpour.start(initialise=True)
        station.say(is_shared=client.is_shared)
        steps = (_Steps(plain, optimizer), _Steps(model, downpour))
        _take_turns(station, steps, inputs, targets)
        station.say(
            plain_s=steps[0].took_s,
            ours_s=steps[1].took_s,
            plain_cpu_s=steps[0].cpu_s,
            ours_cpu_s=steps[1].cpu_s,
            size=layout.total,
            max_difference=_distance(plain, model),
            max_change=_distance(plain, first),
        )
        while not station.seat.is_stopped:
            time.sleep(HOLD_S)
        downpour.close()


def _distance(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of two parameters."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((x.detach() - y.detach()).abs().max()) for x, y in pairs)


def _take_turns(
    station: Station,
    steps: "tuple[_Steps, _Steps]",
    inputs: torch.Tensor,
    targets: torch.Tensor,
) -> None:
    while station.seat.order is Order.HOLD:
        time.sleep(HOLD_S)
    for turn in range(WARM_STEPS + station.spec["pairs"]):
        if station.seat.is_stopped:
            return
        which = turn % BATCHES
        # Each kind comes first in every other pair.
        for one in steps if turn % 2 == 0 else reversed(steps):
            one.step(inputs[which], targets[which], is_warm=turn >= WARM_STEPS)
        if turn >= WARM_STEPS:
            station.seat.tick()


class _Steps:
    """A model with its optimizer, and how long its steps took."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model.train()
        self._optimizer = optimizer
        self.took_s: list[float] = []
        self.cpu_s: list[float] = []

    def step(self, inputs: torch.Tensor, targets: torch.Tensor, *, is_warm: bool) -> None:
        began, cpu = time.perf_counter(), time.process_time()
        self._optimizer.zero_grad()
        loss = F.cross_entropy(self._model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._optimizer.step()
        if is_warm:
            self.took_s.append(time.perf_counter() - began)
            self.cpu_s.append(time.process_time() - cpu)


def columns() -> list[Column[Row]]:
    """Of the table."""
    return [
        Column("transport", lambda row: row.transport, is_text=True),
        Column("overlap", lambda row: "yes" if row.overlap else "no", is_text=True),
        Column("batch", lambda row: f"{row.batch} of {row.image}x{row.image}"),
        Column("pairs", lambda row: str(row.pairs)),
        Column("plain ms", lambda row: f"{row.plain_ms:.1f}"),
        Column("ours ms", lambda row: f"{row.ours_ms:.1f}"),
        Column("ratio (p10-p90)", lambda r: spread(r.ratio, r.ratio_p10, r.ratio_p90, 3)),
        Column("CPU ms plain, ours", lambda r: f"{r.plain_cpu_ms:.1f}, {r.ours_cpu_ms:.1f}"),
        Column("result", lambda row: row.check, is_text=True),
    ]


def bars(rows: Sequence[Row]) -> list[Bar]:
    """For a plot."""
    return [Bar(row.transport, "", row.ratio, row.ratio_p10, row.ratio_p90) for row in rows]
