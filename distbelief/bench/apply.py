"""Apply: what a push costs in the shard alone: every update rule through `Part.apply_`.

Next to it, on the same vector and in turns: torch's own optimizer on one flat tensor, which is
the kernel with nothing around it, and a plain copy, which is the memory's speed. In the end the
parts hold what torch's optimizer holds, bit for bit, or the row is wrong.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distbelief.bench.plot import Bar
from distbelief.bench.table import Column, spread
from distbelief.bench.window import Spread, ratios
from distbelief.bench.work import LR, MOMENTUM, Work
from distbelief.param_server.contract import Contract
from distbelief.param_server.part import Part
from distbelief.param_server.update import make_rule

BYTES = {"sgd": 12, "momentum": 20, "nesterov": 20, "adagrad": 20, "adam": 28, "adamw": 28}
"""By rule: what its kernel reads and writes for one parameter, counting float32 4 each time."""
COPY_BYTES = 8
REPEATS_MIN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyConfig:
    """What to measure."""

    rules: Sequence[str] = tuple(BYTES)
    threads: Sequence[int] = (1, 2)
    size: int | None = None
    """Parameters; None takes GoogLeNet's."""
    seconds: float = 1.0
    """For each row, at least; and REPEATS_MIN pushes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One rule with so many threads. Figures are medians over the pushes."""

    rule: str
    threads: int
    size: int
    parts: int
    push_ms: float
    """One push through all parts."""
    push_ms_min: float
    push_ms_max: float
    gb_per_s: float
    """Memory that the rule's kernel reads and writes, by push_ms."""
    flat_ms: float
    """The same step by torch.optim on one flat tensor."""
    copy_ms: float
    """A plain copy of the parameters."""
    copy_gb_per_s: float
    to_flat: Spread
    """push_ms to flat_ms, each to its neighbour."""
    to_copy: Spread
    full_part_us: float
    """One push to a part of full length."""
    last_part_us: float
    """One push to the last part, which is shorter."""
    full_part_size: int
    last_part_size: int
    pushes: int
    check: str
    """right where the parts hold the very bits of torch.optim's."""


def apply(config: ApplyConfig, on_progress: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Measure in this process."""
    work = Work.of(config.size)
    before = torch.get_num_threads()
    rows = []
    try:
        for threads in config.threads:
            torch.set_num_threads(threads)
            for rule in config.rules:
                on_progress(f"{rule}, {threads} threads")
                rows.append(_measure(rule, threads, work, config.seconds))
    finally:
        torch.set_num_threads(before)
    return rows


def _measure(rule: str, threads: int, work: Work, seconds: float) -> Row:
    contract = Contract(layout=work.layout, rule=make_rule(rule))
    torch.manual_seed(0)
    grad, first = torch.randn(work.size), torch.randn(work.size)
    parts = []
    for piece in work.layout.parts:
        part = Part(piece, contract)
        part.load_({"values": first[piece.start : piece.stop]})
        parts.append((part, grad[piece.start : piece.stop]))
    flat = torch.nn.Parameter(first.clone())
    flat.grad = grad
    optimizer = _optimizer(rule, flat)
    copied = torch.zeros(work.size)

    def push() -> None:
        for part, piece in parts:
            part.apply_(piece, 1)

    took: dict[str, list[float]] = {"push": [], "flat": [], "copy": []}
    until = time.perf_counter() + seconds
    pushes = 0
    while pushes <= REPEATS_MIN or time.perf_counter() < until:
        push_s = timed(push)
        flat_s = timed(optimizer.step)
        copy_s = timed(lambda: copied.copy_(first))
        if pushes:  # the first one touches its pages for the first time
            for name, value in (("push", push_s), ("flat", flat_s), ("copy", copy_s)):
                took[name].append(value)
        pushes += 1
    values = torch.cat([part.values for part, _ in parts])
    is_right = torch.equal(values, flat.detach()) and all(p.version == pushes for p, _ in parts)
    pushing = Spread.of(took["push"])
    to_flat, to_copy = ratios(took["push"], took["flat"]), ratios(took["push"], took["copy"])
    assert to_flat is not None
    assert to_copy is not None
    copying_s = Spread.of(took["copy"]).median
    return Row(
        rule=rule,
        threads=threads,
        size=work.size,
        parts=len(parts),
        push_ms=1e3 * pushing.median,
        push_ms_min=1e3 * pushing.low,
        push_ms_max=1e3 * pushing.high,
        gb_per_s=BYTES[rule] * work.size / pushing.median / 1e9,
        flat_ms=1e3 * Spread.of(took["flat"]).median,
        copy_ms=1e3 * copying_s,
        copy_gb_per_s=COPY_BYTES * work.size / copying_s / 1e9,
        to_flat=to_flat,
        to_copy=to_copy,
        full_part_us=_part_us(*parts[0]),
        last_part_us=_part_us(*parts[-1]),
        full_part_size=work.layout.parts[0].numel,
        last_part_size=work.layout.parts[-1].numel,
        pushes=pushes,
        check="right" if is_right else "wrong",
    )


def _optimizer(rule: str, parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
    lr = LR
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD([parameter], lr=lr, fused=True),
        "momentum": lambda: torch.optim.SGD([parameter], lr=lr, momentum=MOMENTUM, fused=True),
        "nesterov": lambda: torch.optim.SGD(
            [parameter], lr=lr, momentum=MOMENTUM, nesterov=True, fused=True
        ),
        "adagrad": lambda: torch.optim.Adagrad([parameter], lr=lr, fused=True),
        "adam": lambda: torch.optim.Adam([parameter], lr=lr, fused=True),
        "adamw": lambda: torch.optim.AdamW([parameter], lr=lr, weight_decay=0.0, fused=True),
    }
    return makers[rule]()


def _part_us(part: Part, grad: Tensor) -> float:
    """One push to one part that is in the cache, in microseconds; best of some."""
    return 1e6 * min(timed(lambda: part.apply_(grad, 1)) for _ in range(10))


def timed(call: Callable[[], object]) -> float:
    """How long a call takes, in seconds."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def columns() -> list[Column[Row]]:
    """Of the table."""

    def per_element(row: Row) -> Iterator[str]:
        for us, size in (
            (row.full_part_us, row.full_part_size),
            (row.last_part_us, row.last_part_size),
        ):
            yield f"{1e3 * us / size:.2f}"

    return [
        Column("rule", lambda row: row.rule, is_text=True),
        Column("threads", lambda row: str(row.threads)),
        Column("ms/push", lambda r: spread(r.push_ms, r.push_ms_min, r.push_ms_max)),
        Column("GB/s", lambda row: f"{row.gb_per_s:.1f}"),
        Column("flat ms", lambda row: f"{row.flat_ms:.1f}"),
        Column("x flat", lambda r: spread(r.to_flat.median, r.to_flat.low, r.to_flat.high, 2)),
        Column("copy ms", lambda row: f"{row.copy_ms:.1f}"),
        Column("x copy", lambda r: spread(r.to_copy.median, r.to_copy.low, r.to_copy.high, 2)),
        Column("ns/value full, last part", lambda row: ", ".join(per_element(row))),
        Column("result", lambda row: row.check, is_text=True),
    ]


def bars(rows: Sequence[Row]) -> list[Bar]:
    """For a plot."""
    return [
        bar
        for row in rows
        for group in [f"{row.rule}\n{row.threads} threads"]
        for bar in (
            Bar(group, "parts", row.push_ms, row.push_ms_min, row.push_ms_max),
            Bar(group, "one flat tensor", row.flat_ms, row.flat_ms, row.flat_ms),
            Bar(group, "copy", row.copy_ms, row.copy_ms, row.copy_ms),
        )
    ]
