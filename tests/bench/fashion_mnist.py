"""Fashion-MNIST: asynchronous workers against one plain torch process at the same samples.

    python tests/bench/fashion_mnist.py [--seeds 0 1 2] [--workers 4] [--epochs 3] [--json FILE]

Both sides train GoogLeNet at width 0.25 from the same first parameters, visit the data in the
same order of epochs and let the rate fall in a line to 0 over the samples. The plain side is a
torch loop and torch.optim.SGD; the asynchronous side is `launch` with plain subprocesses. Exits
with 1 unless the plain side is good enough and the asynchronous side close enough to it, both in
the mean over the seeds. docs/experiments.md has the numbers and what was tried.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from distbelief.evaluate import evaluate
from distbelief.factory import make_model, open_data
from distbelief.job import DataConfig, Job, ModelConfig, TrainConfig
from distbelief.launcher import launch
from distbelief.param_server.layout import trainable
from distbelief.workers.order import epoch_order
from distbelief.workers.split import Split
from distbelief.workers.worker import loss_of

PLAIN_TOP1 = 0.88
"""The plain process must come to this mean top-1 at least: no contest with a weak opponent."""
MAX_BEHIND_POINTS = 1.5
"""The workers' mean top-1 may be so many percentage points below the plain process's."""

BATCH_SIZE = 128
"""Samples in flight at once: the batch of the plain process, shared out among the workers."""
LR, MOMENTUM = 0.03, 0.9
"""Of the plain process, at that batch."""
MOMENTUM_OF = {1: MOMENTUM, 4: 0.7, 8: 0.5}
"""Explicit momentum from so many workers on; asynchrony brings its own on top (Mitliagkas et al.
2016). The best by workers after Liu et al. 2018; for 2 workers they too have 0.9."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one training came to on the test split."""

    seed: int
    top1: float
    samples: int
    train_s: float
    staleness: dict[str, int | float | None] | None = None
    """p50, p95, max; None for the plain process."""

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.train_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Both sides over all seeds. Spreads are standard deviations of a sample, None for one seed."""

    plain_top1: float
    plain_spread: float | None
    async_top1: float
    async_spread: float | None

    @classmethod
    def of(cls, plain: Sequence[Outcome], asynchronous: Sequence[Outcome]) -> "Summary":
        ours, theirs = [o.top1 for o in asynchronous], [o.top1 for o in plain]
        return cls(
            plain_top1=statistics.mean(theirs),
            plain_spread=statistics.stdev(theirs) if len(theirs) > 1 else None,
            async_top1=statistics.mean(ours),
            async_spread=statistics.stdev(ours) if len(ours) > 1 else None,
        )

    @property
    def behind_points(self) -> float:
        """Percentage points from the plain process down to the workers; negative: they lead."""
        return 100 * (self.plain_top1 - self.async_top1)

    @property
    def criteria(self) -> dict[str, bool]:
        return {
            f"plain process at {PLAIN_TOP1} or better": self.plain_top1 >= PLAIN_TOP1,
            f"workers at most {MAX_BEHIND_POINTS} points behind": (
                self.behind_points <= MAX_BEHIND_POINTS
            ),
        }


def make_job(seed: int, workers: int, epochs: int) -> Job:
    """The job of so many workers. The plain process follows the one of 1 worker.

    The batch is shared out, so that the samples in flight stay the same. The rate follows batch
    and momentum, so that lr / (1 - momentum) / batch, the way a sample's gradient moves the
    parameters in the long run, stays the same.
    """
    batch_size = max(1, BATCH_SIZE // workers)
    momentum = MOMENTUM_OF[max(n for n in MOMENTUM_OF if n <= workers)]
    return Job(
        workers=workers,
        shards=2,
        engine="local",
        until=f"{epochs}-epochs",
        seed=seed,
        model=ModelConfig(factory="googlenet-small", width=0.25, args={"dropout": 0.0}),
        data=DataConfig(source="fashion-mnist"),
        train=TrainConfig(
            batch_size=batch_size,
            lr=LR * batch_size / BATCH_SIZE * (1 - momentum) / (1 - MOMENTUM),
            optimizer="momentum",
            momentum=momentum,
        ),
    )


def train_plainly(job: Job, epochs: int, train: Split, test: Split) -> Outcome:
    """Train in this process with nothing but torch."""
    config = job.train
    assert config.momentum is not None
    model = make_model(job, train).train()
    parameters = [parameter for _, parameter in trainable(model.named_parameters())]
    optimizer = torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum)
    total, samples = epochs * len(train), 0
    # The factor at the samples before a step, which the shards' `poly` schedule uses too.
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1 - samples / total)
    began = time.monotonic()
    for epoch in range(epochs):
        for indices in epoch_order(job.seed, epoch, len(train)).split(config.batch_size):
            batch = train.samples.read(indices.tolist())
            optimizer.zero_grad()
            loss_of(model, model(batch.inputs), batch.targets).backward()
            optimizer.step()
            samples += len(indices)
            falling.step()
    train_s = time.monotonic() - began
    top1 = evaluate(model, test).top1
    assert top1 is not None
    return Outcome(seed=job.seed, top1=top1, samples=samples, train_s=train_s)


def train_asynchronously(job: Job) -> Outcome:
    """Train with the job's workers and shards, each a process of its own.

    Raises: RuntimeError if the run did not go undisturbed to its end.
    """
    result = launch(job)
    if result.exit != "done" or result.workers_lost or result.refused or result.eval is None:
        raise RuntimeError(f"the run was disturbed: {result.to_json()}")
    assert result.eval.top1 is not None
    return Outcome(
        seed=job.seed,
        top1=result.eval.top1,
        samples=result.samples,
        train_s=result.train_s,
        staleness=result.staleness,
    )


def compare(
    seeds: Sequence[int],
    workers: int,
    epochs: int,
    show: Callable[[Outcome, Outcome], None],
) -> tuple[list[Outcome], list[Outcome]]:
    """Train both sides with each seed: outcomes of the plain process, and of the workers.

    show: called with the two outcomes of a seed as soon as they are there.
    Raises: RuntimeError if the two did not train on the same number of samples.
    """
    plain: list[Outcome] = []
    asynchronous: list[Outcome] = []
    for seed in seeds:
        job = make_job(seed, 1, epochs)
        train, test = open_data(job, "train"), open_data(job, "test")
        assert train is not None
        assert test is not None
        theirs = train_plainly(job, epochs, train, test)
        ours = train_asynchronously(make_job(seed, workers, epochs))
        if ours.samples != theirs.samples:
            raise RuntimeError(f"seed {seed}: {ours.samples} samples against {theirs.samples}")
        plain.append(theirs)
        asynchronous.append(ours)
        show(theirs, ours)
    return plain, asynchronous


def describe(name: str, job: Job, processes: str) -> str:
    """The settings in which the two sides differ."""
    train = job.train
    return (
        f"{name}: {processes}, batch {train.batch_size}, lr {train.lr:.4g}, "
        f"momentum {train.momentum:.4g}"
    )


COLUMNS = ("seed", "plain", "async", "points", "stale p50/p95/max", "samples/s", "seconds")
WIDTHS = (5, 7, 7, 7, 18, 13, 13)


def line(cells: Sequence[object]) -> str:
    return " ".join(str(cell).rjust(width) for cell, width in zip(cells, WIDTHS, strict=True))


def seed_line(plain: Outcome, ours: Outcome) -> str:
    stale = ours.staleness or {}
    return line(
        (
            ours.seed,
            f"{plain.top1:.4f}",
            f"{ours.top1:.4f}",
            f"{100 * (ours.top1 - plain.top1):+.2f}",
            "/".join(str(stale[key]) for key in ("p50", "p95", "max")),
            f"{plain.samples_per_s:.0f} {ours.samples_per_s:.0f}",
            f"{plain.train_s:.0f} {ours.train_s:.0f}",
        )
    )


def summary_lines(summary: Summary) -> list[str]:
    def spread(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    means = ("mean", f"{summary.plain_top1:.4f}", f"{summary.async_top1:.4f}")
    spreads = ("std", spread(summary.plain_spread), spread(summary.async_spread))
    return [
        line((*means, f"{-summary.behind_points:+.2f}", "", "", "")).rstrip(),
        line((*spreads, "", "", "", "")).rstrip(),
        *(f"{'PASS' if ok else 'FAIL'} {claim}" for claim, ok in summary.criteria.items()),
    ]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--workers", type=int, default=4, metavar="N")
    parser.add_argument("--epochs", type=int, default=3, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    args = parser.parse_args(argv)
    if args.workers < 1 or args.epochs < 1:
        parser.error("--workers and --epochs must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)  # as each worker has on a machine of few cores
    plain_job, job = (make_job(args.seeds[0], n, args.epochs) for n in (1, args.workers))
    print(
        f"Fashion-MNIST, {args.epochs} epochs, GoogLeNet at width {job.model.width}, torch "
        f"{torch.__version__} on {os.cpu_count()} cores; test top-1"
    )
    print(describe("plain", plain_job, "1 process"))
    print(describe("async", job, f"{job.workers} workers and {job.shards} shards"))
    print(line(COLUMNS), flush=True)

    plain, asynchronous = compare(
        args.seeds,
        args.workers,
        args.epochs,
        lambda theirs, ours: print(seed_line(theirs, ours), flush=True),
    )
    summary = Summary.of(plain, asynchronous)
    print("\n".join(summary_lines(summary)))
    if args.json is not None:
        data = {
            "plain_job": asdict(plain_job),
            "async_job": asdict(job),
            "plain": [asdict(outcome) for outcome in plain],
            "async": [asdict(outcome) for outcome in asynchronous],
            "summary": {**asdict(summary), "behind_points": summary.behind_points},
            "criteria": summary.criteria,
        }
        args.json.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    return 0 if all(summary.criteria.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
