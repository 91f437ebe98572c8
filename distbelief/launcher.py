"""Launcher: a job from start to end: model and data, the run, its parameters, its result.

Every way out but kill -9 leaves RUN/result.json behind.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distbelief import __version__
from distbelief.controller.machine import LEASE_BATCHES
from distbelief.engine import Engine, LocalEngine
from distbelief.environment import check_environment
from distbelief.evaluate import evaluate
from distbelief.evaluator import Evaluation, write_evaluation
from distbelief.factory import (
    make_contract,
    make_model,
    num_loaders,
    open_data,
    try_model,
    with_views,
)
from distbelief.folder import Launcher, RunFolder
from distbelief.job import Job, Until
from distbelief.launcher_log import launcher_log
from distbelief.live import LiveLine
from distbelief.model_file import save_model, save_tensors
from distbelief.param_server.contract import Contract
from distbelief.param_server.errors import DistBeliefError, SnapshotCorrupt
from distbelief.param_server.layout import trainable
from distbelief.param_server.snapshot import SnapshotStore
from distbelief.problem import Problem
from distbelief.result import Result
from distbelief.run import Run
from distbelief.signals import heeding
from distbelief.statistics import renew_statistics
from distbelief.stop import Stop, StoppedNow
from distbelief.stored import Copies, keep_copies
from distbelief.trained import Trained
from distbelief.workers.arena import Arena
from distbelief.workers.lease import LeaseQueue, Position
from distbelief.workers.split import Split

SPACE_FOR_LOGS = 2**20
"""Bytes."""

LEFT_OVER_S = 20.0
"""Time for the processes of a run whose launcher was killed to save and end."""

__all__ = ["Stop", "launch", "resume"]

logger = logging.getLogger(__name__)


def launch(job: Job, *, live: LiveLine | None = None, stop: Stop | None = None) -> Result:
    """Train a job and return what it came to. What goes wrong inside the run is in the result.

    live: where to show progress; plain lines on standard error by default.
    Raises: Problem, before anything is started, if the job cannot be run.
    """
    began = time.monotonic()
    check_environment(engine=job.engine)
    plan = _plan(job)
    queue = _queue(job, plan, None)
    run = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder = RunFolder.make(Path(job.run_dir), run)
    _check_space(job, plan, folder)
    return _run(job, plan, folder, queue, None, live, stop, began)


def resume(
    folder: RunFolder, job: Job, *, live: LiveLine | None = None, stop: Stop | None = None
) -> Result:
    """Go on with a run from its last checkpoint: the same versions, counts and place in the data.

    job: the run's own, with whatever is to change; model, update rule and number of shards stay.
    Raises: Problem, before anything is started, if it cannot go on.
    """
    began = time.monotonic()
    check_environment(engine=job.engine)
    launcher = folder.launcher
    if launcher is not None and launcher.is_alive and folder.result is None:
        raise Problem(
            "DB-RUN-008",
            f"run {folder.run} is still running, by process {launcher.pid}",
            fix=f"distbelief status {folder.run}; distbelief stop {folder.run}",
        )
    end_left_over(folder)
    checkpoint = folder.checkpoint
    if checkpoint is None:
        raise Problem(
            "DB-RUN-007",
            f"run {folder.run} has saved nothing to go on from",
            fix="start it anew: distbelief launch " + str(folder.config),
        )
    plan = _plan(job)
    _compare(folder, job, plan)
    queue = _queue(job, plan, checkpoint)
    _check_space(job, plan, folder)
    # Nothing of the run is changed before this line.
    return _run(job, plan, folder, queue, checkpoint, live, stop, began)


def end_left_over(folder: RunFolder) -> None:
    """End what a launcher that was killed has left running, or two of each shard would save.

    Shards save what they have when they are asked to end. Workers would push what they have, and
    wait for shards that are ending.
    """
    asked = time.monotonic()
    for name, pid in folder.left_over:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            os.kill(pid, signal.SIGTERM if name.startswith("shard") else signal.SIGKILL)
    while folder.left_over:
        time.sleep(0.1)
        if time.monotonic() - asked > LEFT_OVER_S:
            for _, pid in folder.left_over:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the launcher knows of the model and data of a job; nothing of a script's."""

    model: nn.Module | None = None
    contract: Contract | None = None
    train: Split | None = None
    test: Split | None = None


def _plan(job: Job) -> _Plan:
    """Open the data, build the model and try it on a batch. Raises: Problem."""
    if job.script.path:
        path = Path(job.script.path)
        if not path.is_file():
            raise Problem("DB-USE-004", f"there is no script {path}")
        return _Plan()
    train, test = open_data(job, "train"), open_data(job, "test")
    assert train is not None  # every source has this one
    train = with_views(job, train)
    model = make_model(job, train)
    contract = make_contract(job, model, len(train))
    try_model(job, model, train)
    return _Plan(model, contract, train, test)


def _compare(folder: RunFolder, job: Job, plan: _Plan) -> None:
    """Hold a job against the snapshots that it is to go on from. Raises: Problem."""
    stores = sorted(folder.snapshots.glob("shard*")) if folder.snapshots.is_dir() else []
    if len(stores) != job.shards:
        raise Problem(
            "DB-RUN-007",
            f"run {folder.run} has snapshots of {len(stores)} shards, the job has {job.shards}",
            why="parts cannot be moved between shards in this version",
            fix=f"distbelief resume {folder.run} --set shards={len(stores)}"
            if stores
            else "start it anew: distbelief launch " + str(folder.config),
        )
    for store in stores:
        try:
            found = SnapshotStore(store).latest()
        except SnapshotCorrupt as error:
            raise Problem("DB-STORE-003", str(error)) from error
        if found is None:
            raise Problem("DB-RUN-007", f"{store} holds no snapshot", fix="start the run anew")
        if plan.contract is None:  # a script's; its workers are held against the snapshot
            continue
        saved = found[0].contract
        difference = saved.layout.first_tensor_difference(plan.contract.layout)
        if difference is None and saved.buffers != plan.contract.buffers:
            difference = f"buffers {saved.buffers} here, {plan.contract.buffers} there"
        if difference is not None:
            raise Problem(
                "DB-MODEL-006",
                f"the model is not the one that run {folder.run} has trained: {difference}",
                why="here is what was saved, there is what the model's code makes now",
                fix="undo the change to the model's code or arguments, or start a new run",
            )
        mine, theirs = saved.rule, plan.contract.rule
        if type(mine) is not type(theirs) or mine.slots != theirs.slots:
            raise Problem(
                "DB-USE-001",
                f"run {folder.run} was trained with {saved.rule}, the job has "
                f"{plan.contract.rule}: their state is not the same",
                fix="leave train.optimizer as it was, or start a new run",
            )
        if saved.average.kind != plan.contract.average.kind:
            raise Problem(
                "DB-USE-001",
                f"run {folder.run} was trained with train.average.kind {saved.average.kind!r}, the "
                f"job says {plan.contract.average.kind!r}: an average cannot begin or change its "
                "kind in the middle",
                fix="leave train.average.kind as it was, or start a new run",
            )


def _check_space(job: Job, plan: _Plan, folder: RunFolder) -> None:
    """See that the disk has room for what the run will save. Raises: Problem."""
    if plan.contract is None:
        return
    a_copy = 4 * plan.contract.layout.total
    # The snapshots that are kept, the next one beside them, and the model.
    snapshots = (job.save.keep + 1) * (1 + len(plan.contract.slots)) * a_copy
    needed = snapshots + a_copy + SPACE_FOR_LOGS
    free = shutil.disk_usage(folder.path).free
    if free < needed:
        with contextlib.suppress(OSError):  # nothing is in it yet, or it is an older run's
            folder.logs.rmdir()
            folder.path.rmdir()
        raise Problem(
            "DB-STORE-002",
            f"{folder.path.parent} has {free / 2**20:,.1f} MiB free, the run saves up to "
            f"{needed / 2**20:,.1f} MiB",
            why=f"{job.save.keep + 1} snapshots with the state of {plan.contract.rule}, the "
            "model, and logs",
            fix="free some space, or name another place with --run-dir",
        )


def _queue(job: Job, plan: _Plan, checkpoint: Mapping[str, Any] | None) -> LeaseQueue:  # Any: JSON
    position = None if checkpoint is None else Position.from_dict(checkpoint["position"])
    if plan.train is None:
        return LeaseQueue(0, 0, position=position)
    lease = LEASE_BATCHES * job.train.batch_size
    until = Until.parse(job.until)
    try:
        queue = LeaseQueue(len(plan.train), lease, until.epochs, job.train.warm_start, position)
    except ValueError as error:
        fix = "give the run the data that it had, or start a new one"
        raise Problem("DB-DATA-002", str(error), fix=fix) from error
    done = checkpoint is not None and until.updates and checkpoint["updates"] >= until.updates
    if queue.is_finished or done:
        raise Problem(
            "DB-RUN-009",
            f"the run has done all of its {job.until} already",
            fix="give it a later end: distbelief resume RUN --until 20-epochs",
        )
    return queue


def _run(
    job: Job,
    plan: _Plan,
    folder: RunFolder,
    queue: LeaseQueue,
    checkpoint: Mapping[str, Any] | None,  # Any: JSON
    live: LiveLine | None,
    stop: Stop | None,
    began: float,
) -> Result:
    attempt = 1 if checkpoint is None else checkpoint["attempt"] + 1
    result = Result(
        run=folder.run,
        run_dir=str(folder.path),
        engine=job.engine,
        workers=job.workers,
        shards=job.shards,
        attempt=attempt,
    )
    stop = stop or Stop()
    run: Run | None = None
    try:
        folder.forget_stop()
        (folder.path / "result.json").unlink(missing_ok=True)
        folder.config.write_text(job.to_toml(), encoding="utf-8")
        folder.write_launcher(Launcher.of_this_process(__version__))
        if checkpoint is not None:  # incarnations and epochs are never used again
            folder.write("checkpoint.json", {**checkpoint, "attempt": attempt})
    except OSError as error:
        raise Problem(
            "DB-STORE-002",
            f"{folder.path} cannot be written: {error.strerror or error}",
            fix="free some space, or name another place with --run-dir",
        ) from error
    copies: Copies | None = None
    try:
        copies = keep_copies(job, folder)
        with launcher_log(folder), live or LiveLine(sys.stderr, plain=True) as line:
            line.watch(folder)
            line.say(_headline(job, plan, folder, checkpoint))
            for warning in job.warnings():
                line.say(f"WARNING: {warning}")
            with heeding(stop), contextlib.closing(make_engine(job, line.say)) as engine:
                job = engine.settle(job, folder)
                if told := job.net.protection:
                    line.say(told)
                run = Run(
                    job,
                    folder,
                    engine,
                    queue,
                    line,
                    stop,
                    result,
                    attempt=attempt,
                    digest="" if plan.train is None else plan.train.digest,
                    contract=None if checkpoint is None else plan.contract,
                    layout=None if plan.contract is None else plan.contract.layout,
                )
                folder.write_keys(run.listed_keys)
                trained = run.train()
            run.journal.enter("evaluating", time.monotonic())
            run.tell(time.monotonic())
        _keep(job, plan, folder, trained, result)
    except (StoppedNow, KeyboardInterrupt) as reason:
        result.exit = "stopped"
        if isinstance(reason, KeyboardInterrupt):
            raise
    except Problem as error:
        result.exit = "storage" if error.code.startswith("DB-STORE") else "failed"
        result.error = {"code": error.code, "text": str(error)}
    except DistBeliefError as error:
        result.exit, result.error = "failed", {"code": "DB-RUN-001", "text": str(error)}
    except Exception as error:  # whatever it is, the result must say that there was no end
        logger.exception("the launcher failed")
        text = f"{type(error).__name__}: {error}"
        result.exit, result.error = "failed", {"code": "DB-RUN-010", "text": text}
    finally:
        result.wall_s = round(time.monotonic() - began, 3)
        folder.forget_stop()
        if run is not None:
            run.journal.enter("ended", time.monotonic())
        _tell_saved(result, folder, None if run is None else run.journal.checkpoint)
        try:
            result.write(folder.path)
        except OSError as error:  # the caller still gets it
            logger.error("%s/result.json cannot be written: %s", folder.path, error)
        if copies is not None:
            copies.close()
        if run is not None:
            run.spectator.close(json.loads(result.to_json()), time.time())
    return result


def make_engine(job: Job, say: Callable[[str], None]) -> Engine:
    """Raises: Problem."""
    if job.engine == "local":
        return LocalEngine()
    # Here and not at the top: Ray takes half a second to import, and --engine local works where it
    # is not installed.
    try:
        from distbelief.ray_engine import RayEngine
    except ImportError as error:
        fix = "pip install ray, or use --engine local"
        raise Problem("DB-ENV-001", f"Ray cannot be imported: {error}", fix=fix) from error
    say("starting Ray" if job.address == "local" else f"joining the cluster at {job.address}")
    return RayEngine(job)


def _headline(
    job: Job,
    plan: _Plan,
    folder: RunFolder,
    checkpoint: Mapping[str, Any] | None,  # Any: JSON
) -> str:
    """What a person is told at the start."""
    least = f"{job.min_workers} to " if job.min_workers else ""
    workers = f"{least}{job.workers} workers and {job.shards} shards by {job.engine}"
    if plan.contract is None or plan.train is None:
        text = f"run {folder.run}: {job.script.path}, {workers}"
    else:
        layout = plan.contract.layout
        text = (
            f"run {folder.run}: {job.model.factory}, {layout.total:,} parameters in "
            f"{len(layout.parts)} parts, {workers}, {len(plan.train)} samples of "
            f"{job.data.source}, until {job.until}"
        )
    if checkpoint is not None:
        text += f"; goes on from {checkpoint['samples']:,} samples"
    return text + f"\nrun folder {folder.path}"


def _keep(job: Job, plan: _Plan, folder: RunFolder, trained: Trained, result: Result) -> None:
    """Save what was trained, and evaluate it where the launcher has a model and test data.

    Where the shards have averaged, the average is the model, and the last values are kept too.
    """
    kept = [(trained.values, folder.model)]
    if trained.average is not None:
        result.averaged = trained.averaged
        kept = [(trained.values, folder.last), (trained.average, folder.model)]
    for values, path in kept:
        if plan.model is None or plan.contract is None:
            save_tensors(_named(trained, values), path)
            continue
        _take_parameters(plan.model, plan.contract, trained, values)
        if values is trained.average and plan.train is not None:
            renew_statistics(plan.model, plan.train, job.train.batch_size, job.data_seed)
        save_model(plan.model, path)
        if plan.test is None:
            continue
        loaders = num_loaders(replace(job, workers=1), plan.test)
        began = time.monotonic()
        accuracy = evaluate(plan.model, plan.test, num_loaders=loaders)
        if path == folder.model:
            result.eval = accuracy
            if job.evaluate.every_s:
                _write_last(folder, result, time.monotonic() - began)
        else:
            result.eval_last = accuracy


def _write_last(folder: RunFolder, result: Result, seconds: float) -> None:
    """The evaluator's last line: what the run came to."""
    assert result.eval is not None
    last = Evaluation(
        at=time.time(),
        samples=result.samples,
        updates=result.updates,
        top1=result.eval.top1,
        top5=result.eval.top5,
        loss=result.eval.loss,
        is_average=result.averaged > 0,
        seconds=round(seconds, 3),
    )
    try:
        write_evaluation(folder.path, last)
    except OSError as error:  # it is in the result
        logger.error("%s", error)


def _named(trained: Trained, values: Tensor) -> dict[str, Tensor]:
    """By name, for a script's run: the launcher has no model of it."""
    layout, buffers = trained.contract.layout, trained.contract.buffers
    tensors = {e.name: values[e.offset : e.stop].view(e.shape) for e in layout.entries}
    if trained.buffers is not None:
        tensors |= buffers.named(*trained.buffers)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _tell_saved(
    result: Result,
    folder: RunFolder,
    checkpoint: Mapping[str, Any] | None,  # Any: JSON
) -> None:
    if checkpoint is None:
        return
    result.saved = {key: checkpoint[key] for key in ("samples", "updates", "at")}
    if result.exit != "done":
        result.resume = folder.resume_command


def _take_parameters(
    model: nn.Module, contract: Contract, trained: Trained, values: Tensor
) -> None:
    """Put what the shards had into the launcher's own copy of the model."""
    arena = Arena(contract.layout, trainable(model.named_parameters()))
    arena.bind(values)
    arena.close()
    if trained.buffers is not None:
        contract.buffers.write_(model, *trained.buffers)
