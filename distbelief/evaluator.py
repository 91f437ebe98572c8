"""Evaluator: a process that evaluates what the shards have, again and again, while workers train.

It fetches as a worker does and pushes nothing, so nobody waits for it; the average of the values
where the job has one. What it finds are lines of RUN/evaluations.jsonl; the launcher's own last
look is one of them.
"""

import json
import logging
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from distbelief.evaluate import evaluate
from distbelief.factory import make_model, num_loaders, open_data, with_views
from distbelief.job import Job
from distbelief.keyring import EVALUATOR
from distbelief.param_server.errors import DistBeliefError
from distbelief.param_server.identity import Identity
from distbelief.param_server.layout import trainable
from distbelief.param_server.transport import ZmqClient
from distbelief.spec import Spec
from distbelief.statistics import renew_statistics
from distbelief.trained import Trained, fetch_trained
from distbelief.workers.arena import Arena
from distbelief.workers.control import Locator

if TYPE_CHECKING:
    import zmq
    from torch import nn

logger = logging.getLogger(__name__)

FILE = "evaluations.jsonl"
NICE = 10
"""Training comes first."""
PAUSE_S = 0.5
GIVE_UP_S = 60.0
"""It ends if nobody can say for so long where the shards are: the run is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One look at a model while it is trained."""

    at: float
    """Unix seconds, of the fetch."""
    samples: int
    """Applied by the part furthest behind, at about the fetch."""
    updates: int
    top1: float | None
    top5: float | None
    loss: float | None
    is_average: bool
    """Of the average of the values, not of the last ones."""
    seconds: float
    """That it took."""


def write_evaluation(run: Path, found: Evaluation) -> None:
    """Add a line. Raises: OSError."""
    with (run / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(found)) + "\n")


def read_evaluations(run: Path) -> list[Evaluation]:
    """What was found so far, the oldest first; lines that are damaged are left out."""
    try:
        lines = (run / FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(Evaluation(**json.loads(line)))
        except (ValueError, TypeError):
            logger.warning("%s has a damaged line", run / FILE)
    return found


def take_values(model: "nn.Module", trained: Trained) -> None:
    """Put what was fetched into a model: the average, if there is one, and the buffers."""
    arena = Arena(trained.contract.layout, trainable(model.named_parameters()))
    average = trained.average if trained.averaged else None
    arena.bind(trained.values if average is None else average)
    arena.close()
    if trained.buffers is not None:
        trained.contract.buffers.write_(model, *trained.buffers)


def run_evaluator(spec: Spec, job: Job, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    """Evaluate every `evaluate.every_s` seconds until the launcher ends this process."""
    os.nice(NICE)
    test = open_data(job, "test")
    if test is None:
        logger.warning("%s has no test split: there is nothing to evaluate on", job.data.source)
        return
    train = open_data(job, "train")
    assert train is not None  # every source has this one
    train = with_views(job, train)
    model = make_model(job, train)
    loaders = num_loaders(replace(job, workers=1), test)
    me = Identity(run=spec.run, w=EVALUATOR, inc=spec.inc, token=spec.token)
    locator = Locator(me, lambda: ZmqClient(context, spec.keys), spec.controller)
    heard = time.monotonic()
    while time.monotonic() - heard < GIVE_UP_S:
        began, at = time.monotonic(), time.time()
        where = list(locator())
        if not where:
            time.sleep(PAUSE_S)
            continue
        heard = time.monotonic()
        try:
            trained, reports = fetch_trained(
                ZmqClient(context, spec.keys), me, lambda: list(locator()), GIVE_UP_S
            )
        except DistBeliefError as error:  # no parameters yet, or a shard is being started again
            logger.info("not now: %s", error)
            time.sleep(PAUSE_S)
            continue
        take_values(model, trained)
        if trained.averaged:
            renew_statistics(model, train, job.train.batch_size, job.data_seed)
        accuracy = evaluate(model, test, num_loaders=loaders)
        found = Evaluation(
            at=at,
            samples=min(min(report["samples"]) for report in reports),
            updates=min(min(report["version"]) for report in reports),
            top1=accuracy.top1,
            top5=accuracy.top5,
            loss=accuracy.loss if math.isfinite(accuracy.loss or 0.0) else None,
            is_average=trained.average is not None and trained.averaged > 0,
            seconds=round(time.monotonic() - began, 3),
        )
        write_evaluation(Path(spec.run_path), found)
        logger.info("%s", found)
        time.sleep(max(PAUSE_S, began + job.evaluate.every_s - time.monotonic()))
