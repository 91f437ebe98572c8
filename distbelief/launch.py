"""Launch: a job from start to end: model and data, the run, its parameters, its result.

Every way out but kill -9 leaves RUN/result.json behind.
"""

import logging
import secrets
import sys
import time
from datetime import datetime
from pathlib import Path

from torch import nn

from distbelief.evaluate import evaluate, save_model
from distbelief.factory import load_images, make_contract, make_model, try_model
from distbelief.job import Job
from distbelief.live import LiveLine
from distbelief.param_server.contract import Contract
from distbelief.param_server.errors import DistBeliefError
from distbelief.param_server.layout import trainable
from distbelief.problem import Problem
from distbelief.result import Result
from distbelief.run import Run, Stop, StoppedNow, Trained
from distbelief.workers.arena import Arena

__all__ = ["Stop", "launch"]

logger = logging.getLogger(__name__)


def launch(job: Job, *, live: LiveLine | None = None, stop: Stop | None = None) -> Result:
    """Train a job and return what it came to. What goes wrong inside the run is in the result.

    live: where to show progress; plain lines on standard error by default.
    Raises: Problem, before anything is started, if the job cannot be run.
    """
    began = time.monotonic()
    images, test = load_images(job, "train"), load_images(job, "test")
    model = make_model(job, images)
    contract = make_contract(job, model, len(images))
    try_model(job, model, images)

    run = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder = _make_run_folder(Path(job.run_dir), run)
    (folder / "job.json").write_text(job.to_json() + "\n", encoding="utf-8")
    result = Result(
        run=run, run_dir=str(folder), engine=job.engine, workers=job.workers, shards=job.shards
    )
    try:
        with live or LiveLine(sys.stderr, plain=True) as line:
            line.say(
                f"run {run}: {job.model.factory}, {contract.layout.total:,} parameters in "
                f"{len(contract.layout.parts)} parts on {job.shards} shards, {job.workers} "
                f"workers by {job.engine}, {len(images)} samples of {job.data.source}, "
                f"until {job.until}\nrun folder {folder}"
            )
            trained = Run(job, run, folder, len(images), line, stop or Stop(), result).train()
        _take_parameters(model, contract, trained)
        save_model(model, folder)
        result.eval = evaluate(model, test, "test")
    except (StoppedNow, KeyboardInterrupt) as reason:
        result.exit = "stopped"
        if isinstance(reason, KeyboardInterrupt):
            raise
    except Problem as error:
        result.exit, result.error = "failed", {"code": error.code, "text": str(error)}
    except DistBeliefError as error:
        result.exit, result.error = "failed", {"code": "DB-RUN-001", "text": str(error)}
    except Exception as error:  # whatever it is, the result must say that there was no end
        logger.exception("the launcher failed")
        text = f"{type(error).__name__}: {error}"
        result.exit, result.error = "failed", {"code": "DB-RUN-009", "text": text}
    finally:
        result.wall_s = round(time.monotonic() - began, 3)
        try:
            result.write(folder)
        except OSError as error:  # the caller still gets it
            logger.error("%s/result.json cannot be written: %s", folder, error)
    return result


def _take_parameters(model: nn.Module, contract: Contract, trained: Trained) -> None:
    """Put what the shards had into the launcher's own copy of the model."""
    arena = Arena(contract.layout, trainable(model.named_parameters()))
    arena.bind(trained.values)
    arena.close()
    if trained.buffers is not None:
        contract.buffers.write_(model, *trained.buffers)


def _make_run_folder(parent: Path, run: str) -> Path:
    folder = parent / run
    try:
        (folder / "logs").mkdir(parents=True)
    except OSError as error:
        raise Problem(
            "DB-STORE-002",
            f"the run folder {folder} cannot be made: {error}",
            fix="name another place with --run-dir",
        ) from error
    return folder
