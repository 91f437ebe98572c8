"""Compression: what each form costs in accuracy, in bytes and in time.

    python tests/bench/compression.py [--seeds 0 1 2] [--epochs 5] [--workers 4] [--rules]
    python tests/bench/compression.py --speed

Trains GoogLeNet at width 0.25 on scikit-learn's digits in this process, on one thread: `workers`
simulated workers take turns, each computing its gradient on the parameters that it fetched after
its push before, so that the staleness of every push is workers - 1. Parts, update rules and forms
are the parameter server's own; there is no network, and batch normalisation's statistics are
shared by the workers. First parameters, order of the data and rate are the same in all rows of a
seed. Tested are the shards' own parameters, which are float32 whatever is fetched.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distbelief.evaluate import evaluate
from distbelief.factory import make_model, open_data
from distbelief.job import DataConfig, Job, ModelConfig
from distbelief.param_server.compress import (
    Compression,
    Encoder,
    Scratch,
    decode_,
    encode_,
    frame_bytes,
)
from distbelief.param_server.contract import Contract
from distbelief.param_server.layout import Group, PartRange, layout_of, trainable
from distbelief.param_server.part import VALUES, Part
from distbelief.param_server.protocol import as_frame
from distbelief.param_server.schedule import Schedule
from distbelief.param_server.update import make_rule
from distbelief.workers.arena import Arena
from distbelief.workers.lease import batches
from distbelief.workers.order import epoch_order
from distbelief.workers.split import Split
from distbelief.workers.worker import loss_of

BATCH_SIZE = 32

RULES: Mapping[str, tuple[float, Mapping[str, float]]] = {
    "momentum": (0.015, {"momentum": 0.7}),
    "sgd": (0.05, {}),
    "adagrad": (0.015, {}),
    "adam": (0.003, {}),
}
"""Rate and hyper-parameters by rule, best of a few without compression. With 4 workers asynchrony
brings momentum of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to train."""

    name: str
    forms: Compression = field(default_factory=Compression)
    rule: str = "momentum"
    has_feedback: bool = True
    """Of the forms that feed back; off to see what it is good for."""


ROWS = (
    Row(name="none"),
    Row(name="push bfloat16", forms=Compression(push="bfloat16")),
    Row(name="push int8", forms=Compression(push="int8")),
    Row(name="push int8, no feedback", forms=Compression(push="int8"), has_feedback=False),
    Row(name="push topk 0.01", forms=Compression(push="topk", top=0.01)),
    Row(
        name="push topk 0.01, no feedback",
        forms=Compression(push="topk", top=0.01),
        has_feedback=False,
    ),
    Row(name="push topk 0.001", forms=Compression(push="topk", top=0.001)),
    Row(name="fetch bfloat16", forms=Compression(fetch="bfloat16")),
    Row(name="fetch int8", forms=Compression(fetch="int8")),
    Row(name="both bfloat16", forms=Compression(push="bfloat16", fetch="bfloat16")),
    Row(name="both int8", forms=Compression(push="int8", fetch="int8")),
    Row(
        name="push topk 0.01, fetch bfloat16",
        forms=Compression(push="topk", fetch="bfloat16", top=0.01),
    ),
)

RULE_ROWS = tuple(
    Row(name=f"{rule}, {name}", forms=forms, rule=rule, has_feedback=has_feedback)
    for rule in ("sgd", "adagrad", "adam")
    for name, forms, has_feedback in (
        ("none", Compression(), True),
        ("push int8", Compression(push="int8"), True),
        ("push int8, no feedback", Compression(push="int8"), False),
        ("push topk 0.01", Compression(push="topk", top=0.01), True),
    )
)

FORMS_TIMED = (
    ("float32", 0.0),
    ("bfloat16", 0.0),
    ("int8", 0.0),
    ("topk", 0.1),
    ("topk", 0.01),
    ("topk", 0.001),
)


class Replica:
    """What one simulated worker has: its copy of the parameters, and what it has not sent yet."""

    def __init__(self, row: Row, contract: Contract, scratch: Scratch) -> None:
        forms, parts = row.forms, contract.layout.parts
        self.values = torch.zeros(contract.layout.total)
        self.encoders = [Encoder(forms.push, p.numel, scratch, forms.top) for p in parts]
        if not row.has_feedback:
            for encoder in self.encoders:
                encoder.residual = None
        self._forms, self._scratch = forms, scratch
        self._frames = [torch.empty(e.frame_bytes, dtype=torch.uint8) for e in self.encoders]
        self._fetched = [
            torch.empty(frame_bytes(forms.fetch, p.numel), dtype=torch.uint8) for p in parts
        ]
        self._decoded = torch.empty(max(p.numel for p in parts))
        self.push_bytes = sum(frame.numel() for frame in self._frames)
        self.fetch_bytes = sum(frame.numel() for frame in self._fetched)

    def push(self, grad: Tensor, samples: int, parts: Sequence[Part]) -> None:
        for part, encoder, frame in zip(parts, self.encoders, self._frames, strict=True):
            encoder.encode_(_slice(grad, part.range), frame)
            decoded = self._decoded[: part.range.numel]
            decode_(self._forms.push, as_frame(frame), decoded)
            part.apply_(decoded, samples)

    def fetch(self, parts: Sequence[Part]) -> None:
        for part, frame in zip(parts, self._fetched, strict=True):
            encode_(self._forms.fetch, part.values, frame, self._scratch)
            decode_(self._forms.fetch, as_frame(frame), _slice(self.values, part.range))


def _slice(values: Tensor, part: PartRange) -> Tensor:
    return values[part.start : part.stop]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one training came to on the test split."""

    top1: float
    loss: float
    round_bytes: int
    """Of one push and one fetch of all parts."""


def train(row: Row, seed: int, workers: int, epochs: int, train: Split, test: Split) -> Outcome:
    """Train once from the first parameters of a seed."""
    job = Job(
        seed=seed,
        model=ModelConfig(factory="googlenet-small", width=0.25, args={"dropout": 0.0}),
        data=DataConfig(source="digits"),
    )
    model = make_model(job, train).train()
    named = trainable(model.named_parameters())
    lr, hyper = RULES[row.rule]
    contract = Contract(
        layout=layout_of(named, [Group(lr=lr, weight_decay=1e-4)]),
        rule=make_rule(row.rule, **hyper),
        schedule=Schedule(kind="poly", total=epochs * len(train)),
    )
    layout = contract.layout
    arena = Arena(layout, named)
    first = arena.gather()
    parts = [Part(part, contract) for part in layout.parts]
    for part in parts:
        part.load_({VALUES: _slice(first, part.range)})
    scratch = Scratch(layout.part_numel)
    replicas = [Replica(row, contract, scratch) for _ in range(workers)]
    for replica in replicas:
        replica.fetch(parts)

    step = 0
    for epoch in range(epochs):
        order = epoch_order(seed, epoch, len(train))
        for start, stop in batches(0, len(train), BATCH_SIZE):
            replica = replicas[step % workers]
            batch = train.samples.read(order[start:stop].tolist())
            arena.bind(replica.values)
            arena.zero_grad()
            loss_of(model, model(batch.inputs), batch.targets).backward()
            arena.collect()
            replica.push(arena.grad, stop - start, parts)
            replica.fetch(parts)
            step += 1

    arena.bind(torch.cat([part.values for part in parts]))
    accuracy = evaluate(model, test)
    assert accuracy.top1 is not None
    assert accuracy.loss is not None
    return Outcome(
        top1=accuracy.top1,
        loss=accuracy.loss,
        round_bytes=replicas[0].push_bytes + replicas[0].fetch_bytes,
    )


def table(rows: Sequence[Row], seeds: Sequence[int], workers: int, epochs: int) -> None:
    """Train every row with every seed and print a line each: medians, but for the mean."""
    job = Job(data=DataConfig(source="digits"))
    splits = open_data(job, "train"), open_data(job, "test")
    assert splits[0] is not None
    assert splits[1] is not None
    print("| compression | top-1 | from .. to | mean | loss | bytes a round | smaller by |")
    print("|---|---|---|---|---|---|---|", flush=True)
    plain_bytes = 0
    for row in rows:
        outcomes = [train(row, seed, workers, epochs, splits[0], splits[1]) for seed in seeds]
        top1 = [100 * outcome.top1 for outcome in outcomes]
        size = outcomes[0].round_bytes
        plain_bytes = plain_bytes or size
        print(
            f"| {row.name} | {statistics.median(top1):.1f} | {min(top1):.1f} .. {max(top1):.1f} | "
            f"{statistics.mean(top1):.1f} | "
            f"{statistics.median(outcome.loss for outcome in outcomes):.3f} | "
            f"{size:,} | {plain_bytes / size:.1f} |",
            flush=True,
        )


@dataclass(frozen=True, slots=True)
class Speed:
    """One form's work on all parts."""

    form: str
    grads: list[Tensor]
    encoders: list[Encoder]
    frames: list[Tensor]
    scratch: Scratch

    @classmethod
    def of(cls, form: str, top: float, grads: list[Tensor]) -> "Speed":
        scratch = Scratch(grads[0].numel())
        encoders = [Encoder(form, grad.numel(), scratch, top) for grad in grads]
        frames = [torch.empty(encoder.frame_bytes, dtype=torch.uint8) for encoder in encoders]
        return cls(form, grads, encoders, frames, scratch)

    def push(self) -> None:
        for encoder, grad, frame in zip(self.encoders, self.grads, self.frames, strict=True):
            encoder.encode_(grad, frame)

    def encode(self) -> None:
        for grad, frame in zip(self.grads, self.frames, strict=True):
            encode_(self.form, grad, frame, self.scratch)

    def decode(self) -> None:
        into = torch.empty_like(self.grads[0])
        for frame in self.frames:
            decode_(self.form, as_frame(frame), into)


def speeds(numel: int = 438_272, num_parts: int = 16) -> None:
    """Print milliseconds for encoding and decoding num_parts parts: 28 MB by default."""
    grads = [torch.randn(numel) * torch.randn(numel).exp() for _ in range(num_parts)]
    size_gb = 4e-9 * numel * num_parts
    print(f"{1000 * size_gb:.1f} MB of float32 in {num_parts} parts, torch {torch.__version__}")
    print("| form | encode a push | encode a fetch | decode | bytes an element |")
    print("|---|---|---|---|---|")
    for form, top in FORMS_TIMED:
        one = Speed.of(form, top, grads)
        cells = [
            f"{took_ms:.1f} ms, {1000 * size_gb / took_ms:.1f} GB/s"
            for took_ms in map(_median_ms, (one.push, one.encode, one.decode))
        ]
        each = sum(frame.numel() for frame in one.frames) / numel / num_parts
        print(f"| {form}{f' {top}' if top else ''} | {' | '.join(cells)} | {each:.3f} |")


def _median_ms(do: Callable[[], object], times: int = 15) -> float:
    took = []
    for _ in range(times + 2):
        began = time.perf_counter()
        do()
        took.append(1000 * (time.perf_counter() - began))
    return statistics.median(took[2:])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--workers", type=int, default=4, metavar="N")
    parser.add_argument("--epochs", type=int, default=5, metavar="N")
    parser.add_argument("--rules", action="store_true", help="other update rules than momentum")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name holds it")
    parser.add_argument("--speed", action="store_true", help="times instead of accuracies")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.speed:
        speeds()
        return 0
    rows = [row for row in (RULE_ROWS if args.rules else ROWS) if args.only in row.name]
    began = time.monotonic()
    table(rows, args.seeds, args.workers, args.epochs)
    print(f"{time.monotonic() - began:.0f} s, {args.workers} workers, {args.epochs} epochs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
