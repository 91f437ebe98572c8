"""CIFAR-10 by the recipe `small`: 1, 4 and 8 workers against one plain torch process.

    python tests/bench/cifar.py [--data DIR] [--seeds 1 2 3] [--fleets 0 1 4 8] [--epochs 5]
        [--width 0.25] [--set KEY=VALUE] [--out DIR]

Both sides have the same samples of the same views in the same order of each epoch, the same first
parameters, and a rate that falls in a line to 0. 0 workers are the plain process: a torch loop and
torch.optim.SGD. The samples in flight are the same: a batch is shared out among the workers. Each
training is a run of its own, kept in --out; one that is there is not made again, so a table that
was cut off goes on. Prints the table; exits with 1 unless it holds what is asked (`CLAIMS`).
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distbelief.evaluate import evaluate
from distbelief.factory import make_contract, make_model, open_data, with_views
from distbelief.job import Job, compose
from distbelief.launcher import launch
from distbelief.model_file import save_model
from distbelief.param_server.layout import trainable
from distbelief.settings import gather, recipe
from distbelief.workers.feed import Feed
from distbelief.workers.lease import Lease
from distbelief.workers.worker import loss_of

PLAIN_TOP1 = 0.70
"""The plain process must come to this mean: no contest with a weak opponent."""
MAX_BEHIND_POINTS = {1: 1.0, 4: 1.0, 8: 2.0}
"""Workers -> how many points their mean may be below the plain process's."""

IN_FLIGHT = 128
"""Samples: the batch of the plain process, shared out among the workers."""
RULE_OF: Mapping[int, tuple[str, float, float | None]] = {
    0: ("momentum", 0.1, 0.9),
    1: ("momentum", 0.1, 0.9),
    4: ("momentum", 0.1, 0.0),
    8: ("momentum", 0.05, 0.0),
}
"""Update rule, learning rate and momentum by the number of workers: asynchrony brings momentum of
its own. What was tried is in docs/experiments.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one training came to on the test images."""

    workers: int
    seed: int
    top1: float
    samples: int
    train_s: float
    staleness: Mapping[str, float | None]
    folder: str


def make_job(
    data: Path, workers: int, seed: int, epochs: int, width: float, out: Path, sets: Sequence[str]
) -> Job:
    """What --set says counts for all."""
    batch = IN_FLIGHT // max(1, workers)
    rule, lr, momentum = RULE_OF[workers]
    flags = {
        "data.source": f"wds:{data}/{{split}}-*.tar",
        "data.seed": seed,
        "seed": seed,
        "engine": "local",
        "workers": max(1, workers),
        "until": f"{epochs}-epochs",
        "model.width": width,
        "model.args.dropout": 0.0,
        "train.batch_size": batch,
        "train.lr": lr,
        "monitor.on": False,
        "data.loaders": 0,
        "run_dir": str(out / f"workers{workers}-seed{seed}"),
    }
    free = {key: value for key, value in flags.items() if not said(sets, key)}
    job = compose(gather([recipe("small")], free, sets))
    if said(sets, "train.optimizer") or said(sets, "train.momentum"):
        return job
    return dataclasses.replace(
        job, train=dataclasses.replace(job.train, optimizer=rule, momentum=momentum)
    )


def said(sets: Sequence[str], key: str) -> bool:
    return any(one.startswith(f"{key}=") for one in sets)


def train_plainly(job: Job, epochs: int) -> Outcome:
    """With nothing but torch: its SGD, by the groups and the schedule of the job."""
    train, test = open_data(job, "train"), open_data(job, "test")
    assert train is not None
    assert test is not None
    train = with_views(job, train)
    model = make_model(job, train).train()
    contract = make_contract(job, model, len(train))
    config = job.train
    assert config.momentum is not None
    named = trainable(model.named_parameters())
    many = [p for _, p in named if p.ndim >= 2]
    few = [p for _, p in named if p.ndim < 2]
    groups = [
        {
            "params": parameters,
            "lr": config.lr * rate,
            "weight_decay": config.weight_decay * decay,
        }
        for parameters, rate, decay in (
            (many, 1.0, 1.0),
            (few, config.bias_lr, config.bias_decay),
        )
    ]
    optimizer = torch.optim.SGD(groups, momentum=config.momentum)
    samples = 0
    falling = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda _: contract.schedule.factor(samples)
    )
    began = time.monotonic()
    leases = iter([Lease(epoch, 0, len(train)) for epoch in range(epochs)])
    with Feed(train, lambda: next(leases, None), config.batch_size, seed=job.data_seed) as feed:
        for batch in feed.round():
            optimizer.zero_grad()
            loss_of(model, model(batch.inputs), batch.targets).backward()
            optimizer.step()
            samples += batch.num_good
            falling.step()
    train_s = time.monotonic() - began
    top1 = evaluate(model, test).top1
    assert top1 is not None
    folder = Path(job.run_dir) / "plain"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(job.to_toml(), encoding="utf-8")
    save_model(model, folder / "model.safetensors")
    return Outcome(
        workers=0,
        seed=job.seed,
        top1=top1,
        samples=samples,
        train_s=train_s,
        staleness={},
        folder=str(folder),
    )


def train_asynchronously(job: Job) -> Outcome:
    """Raises: RuntimeError if the run did not go undisturbed to its end."""
    result = launch(job)
    if result.exit != "done" or result.workers_lost or result.refused or result.eval is None:
        raise RuntimeError(f"the run was disturbed: {result.to_json()}")
    assert result.eval.top1 is not None
    return Outcome(
        workers=job.workers,
        seed=job.seed,
        top1=result.eval.top1,
        samples=result.samples,
        train_s=result.train_s,
        staleness=result.staleness,
        folder=result.run_dir,
    )


def outcome_of(job: Job, workers: int, epochs: int, out: Path) -> Outcome:
    """Of a training that has been made, or is made now."""
    kept = out / f"workers{workers}-seed{job.seed}.json"
    if kept.is_file():
        return Outcome(**json.loads(kept.read_text(encoding="utf-8")))
    made = train_asynchronously(job) if workers else train_plainly(job, epochs)
    kept.write_text(json.dumps(dataclasses.asdict(made)), encoding="utf-8")
    print(
        f"{workers or 'plain'} seed {made.seed}: {made.top1:.4f}, {made.train_s:.0f} s, "
        f"staleness {dict(made.staleness)}",
        file=sys.stderr,
        flush=True,
    )
    return made


def rule_text(job: Job) -> str:
    momentum = job.train.momentum
    return job.train.optimizer + ("" if momentum is None else f" {momentum:g}")


def row(workers: int, outcomes: Sequence[Outcome], plain: float, job: Job) -> str:
    tops = [outcome.top1 for outcome in outcomes]
    mean = statistics.mean(tops)
    spread = statistics.stdev(tops) if len(tops) > 1 else 0.0
    stale = [
        "/".join(f"{o.staleness[key]:.0f}" for key in ("p50", "p95", "max"))
        for o in outcomes
        if o.staleness
    ]
    return (
        f"| {workers or 'plain torch'} | {job.train.batch_size} | {job.train.lr:.4g} | "
        f"{rule_text(job)} | {', '.join(f'{top:.4f}' for top in tops)} | "
        f"**{mean:.4f}** ({spread:.4f}) | {100 * (mean - plain):+.2f} | "
        f"{', '.join(stale) or '-'} | {statistics.mean(o.train_s for o in outcomes):.0f} |"
    )


def main() -> int:
    """Entry of the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--fleets", type=int, nargs="+", default=[0, 1, 4, 8])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--set", dest="sets", action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[int, list[Outcome]] = {workers: [] for workers in args.fleets}
    jobs: dict[int, Job] = {}
    for seed in args.seeds:
        for workers in args.fleets:
            jobs[workers] = make_job(
                args.data.resolve(), workers, seed, args.epochs, args.width, args.out, args.sets
            )
            found[workers].append(outcome_of(jobs[workers], workers, args.epochs, args.out))
    means = {
        workers: statistics.mean(outcome.top1 for outcome in outcomes)
        for workers, outcomes in found.items()
    }
    plain = means.get(0, PLAIN_TOP1)
    print(
        "| workers | batch | lr | rule | top-1 by seed | mean (std) | points | "
        "staleness p50/p95/max | seconds |\n|---|---|---|---|---|---|---|---|---|"
    )
    for workers, outcomes in found.items():
        print(row(workers, outcomes, plain, jobs[workers]))
    claims = {f"plain process at {PLAIN_TOP1} or better": plain >= PLAIN_TOP1} | {
        f"{workers} workers at most {most} points behind": 100 * (plain - means[workers]) <= most
        for workers, most in MAX_BEHIND_POINTS.items()
        if workers in means
    }
    for claim, is_true in claims.items():
        print(f"{'PASS' if is_true else 'FAIL'} {claim}")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
