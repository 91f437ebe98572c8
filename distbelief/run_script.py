"""Run a user's script in a worker's process, with its own argv and folder, as `python` would."""

import logging
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from distbelief.job import Job
from distbelief.param_server.errors import DistBeliefError
from distbelief.param_server.identity import Identity
from distbelief.param_server.reporter import Reporter
from distbelief.param_server.transport import ClientTransport
from distbelief.problem import Problem
from distbelief.spec import Spec
from distbelief.workers import session
from distbelief.workers.control import Control, Locator
from distbelief.workers.joined import Joined
from distbelief.workers.own import user_frames
from distbelief.workers.session import Stopped, WorkerInfo

logger = logging.getLogger(__name__)

OTHERS = re.compile(
    r"(LOCAL_|GROUP_|NODE_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+"
    r"|OMPI_COMM_WORLD_\w+|(PMI|MV2|PL_TRAINER)_\w+|SLURM_(NTASKS|PROCID|LOCALID)"
)
"""Variables by which libraries take a process for one of theirs and wait for others."""


def run_script(
    spec: Spec,
    job: Job,
    control: Control,
    make_transport: Callable[[], ClientTransport],
    is_leaving: Callable[[], bool] = lambda: False,
    reporter: Reporter | None = None,
) -> bool:
    """Run it to its end, or until the run is stopped; then push what is left and leave.

    is_leaving, reporter: as of `Worker`. Returns: it has left before the end of the run.
    Raises: Problem for a script that raises, exits with an error, or trains nothing; Refused,
        ShardUnavailable, ControllerGone.
    """
    identity = Identity(run=spec.run, w=spec.name, inc=spec.inc, token=spec.token)
    info = WorkerInfo(index=spec.index, count=job.workers, incarnation=spec.inc)
    compression = job.net.compression
    joined = Joined(
        identity,
        control,
        make_transport,
        info,
        job.seed,
        compression=compression,
        backup_bytes=job.save.backup_bytes,
        waits=job.save.ack == "durable",
        locate=Locator(identity, make_transport, spec.controller),
        history=spec.history if job.save.history else None,
        is_leaving=is_leaving,
        reporter=reporter,
        log_grad_norm=job.train.log_grad_norm,
    )
    session.set_current(joined)
    path = Path(job.script.path)
    before = sys.argv, sys.path[:]
    sys.argv = [job.script.path, *job.script.args]
    sys.path.insert(0, str(path.parent))
    for name in [name for name in os.environ if OTHERS.fullmatch(name)]:
        logger.info("%s=%s is not passed on to the script", name, os.environ.pop(name))
    logger.info("worker %s pid=%d runs %s", spec.name, os.getpid(), path)
    try:
        _run(path, joined)
        _check(path, spec.name, joined)
        joined.end()
    finally:
        joined.close()
        session.set_current(None)
        sys.argv, sys.path[:] = before
        sys.stdout.flush()
        sys.stderr.flush()
    logger.info("worker %s ends", spec.name)
    return joined.is_drained


def _run(path: Path, joined: Joined) -> None:
    try:
        runpy.run_path(str(path), run_name="__main__")
    except Stopped:
        logger.info("stopped, as the run is")
    except SystemExit as error:
        if error.code not in (None, 0) and not joined.is_stopped:
            raise Problem(
                "DB-SCRIPT-002",
                f"{path.name} ended itself with exit code {error.code}",
                why=user_frames(error),
                fix=f"see what it wrote before that; alone: python {path}",
            ) from error
    except DistBeliefError:
        raise
    except Exception as error:  # the user's code may raise anything
        if joined.is_stopped:  # it wrapped what ends it into something of its own
            logger.info("stopped, as the run is: %s", error)
            return
        logger.exception("%s raised", path)
        raise Problem(
            "DB-SCRIPT-001",
            f"{path.name} raised {type(error).__name__}: {error}",
            why=user_frames(error),
            fix=f"does it run alone? python {path}",
        ) from error


def _check(path: Path, name: str, joined: Joined) -> None:
    """See that the script has trained something, unless there was nothing left for it."""
    downpour = joined.downpour
    if joined.is_stopped:
        return
    if downpour is None:
        raise Problem(
            "DB-SCRIPT-003",
            f"{path.name} ended without making a Downpour: nothing was trained",
            fix="optimizer = distbelief.Downpour(model.parameters(), lr=...)",
        )
    if downpour.num_steps:
        return
    if joined.asked_for_leases and not joined.num_taken:
        logger.info("the other workers had taken all of the data")
        return
    raise Problem(
        "DB-SCRIPT-003",
        f"{path.name} ended without a single optimizer.step(): nothing was trained",
        why=f"{joined.num_counted} samples were handed to it",
        fix="call step() of the Downpour after each backward()",
    )
