"""Process: what runs inside each process of a job, whichever engine started it.

    python -m distbelief.process < spec.json

The spec comes through standard input, for it holds the job's token, which must not be seen in a
list of processes or an environment.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import zmq

from distbelief.factory import make_contract, make_model, num_loaders, open_data
from distbelief.job import Job, NetConfig
from distbelief.param_server.client import Identity
from distbelief.param_server.contract import Contract
from distbelief.param_server.errors import DistBeliefError, Refused
from distbelief.param_server.server import ShardServer, SnapshotConfig
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.shared import Shared
from distbelief.param_server.snapshot import SnapshotStore
from distbelief.param_server.transport import ZmqClient, ZmqServer, keep_freed_memory
from distbelief.param_server.wire import sayable
from distbelief.problem import Problem
from distbelief.run_script import run_script
from distbelief.spec import Spec
from distbelief.workers.control import Beat, Control, ControllerGone, Ended, Halt, Serving
from distbelief.workers.own import user_frames
from distbelief.workers.worker import NonFiniteLoss, Worker

logger = logging.getLogger(__name__)

BEAT_S = 0.2
"""A shard asks this often whether it is still wanted."""


def run_process(spec: Spec) -> None:
    """Be the shard or worker of the spec until it is told to halt. Logs go to the run folder."""
    os.chdir(spec.cwd)
    handler = logging.FileHandler(Path(spec.run_path) / "logs" / f"{spec.name}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    job = Job.from_json(spec.job)
    keep_freed_memory()
    torch.set_num_threads(_threads(job, spec.role))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        control = Control(ZmqClient(context), spec.controller)
        try:
            _run_told(spec, job, control, context)
        finally:
            control.close()
    finally:
        context.term()
        root.removeHandler(handler)
        handler.close()


def _run_told(
    spec: Spec, job: Job, control: Control, context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    """Run, and tell the controller how it ended."""
    code, text, why, fix = "", "", "", ""
    try:
        if spec.role == "shard":
            _run_shard(spec, job, control, context)
        elif job.script.path:
            run_script(spec, job, control, lambda: ZmqClient(context))
        else:
            _run_worker(spec, job, control, context)
    except ControllerGone as error:
        logger.error("%s", error)
        return
    except Problem as error:
        code, text, why, fix = error.code, error.what, error.why, error.fix
    except NonFiniteLoss as error:
        code, text = "DB-TRAIN-001", str(error)
    except Refused as error:
        code, text = "DB-RUN-001", str(error)
        if error.code == "contract" and "use at most" in error.text:
            code, text = "DB-MODEL-003", error.text
            fix = "start it with fewer: --shards " + error.text.rpartition("at most ")[2].split()[0]
    except DistBeliefError as error:
        code, text = "DB-RUN-001", str(error)
    except Exception as error:
        logger.exception("%s ended", spec.name)
        code, text, why = "DB-TRAIN-002", f"{type(error).__name__}: {error}", user_frames(error)
    if code:
        logger.error("%s: %s", code, text)
    try:
        control.ask(
            Ended(
                run=spec.run,
                token=spec.token,
                name=spec.name,
                inc=spec.inc,
                code=code,
                text=sayable(text),
                why=sayable(why),
                fix=sayable(fix),
            )
        )
    except ControllerGone:
        logger.warning("nobody heard that %s ended", spec.name)


def _run_worker(
    spec: Spec, job: Job, control: Control, context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    split = open_data(job, "train")
    assert split is not None  # every source has this one
    model = make_model(job, split)
    contract = make_contract(job, model, len(split))
    # From here on each incarnation of each worker draws its own numbers (dropout).
    torch.manual_seed((job.seed + 1) * 1_000_003 + spec.index * 1009 + spec.inc)
    identity = Identity(run=spec.run, w=spec.name, inc=spec.inc, token=spec.token)
    worker = Worker(
        replace(job.worker_config, num_loaders=num_loaders(job, split)),
        identity,
        model,
        contract,
        split,
        control,
        lambda: ZmqClient(context),
    )
    logger.info("worker %s pid=%d begins", spec.name, os.getpid())
    worker.run()
    logger.info("worker %s ends", spec.name)


def _run_shard(
    spec: Spec, job: Job, control: Control, context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    config = ShardConfig(
        run=spec.run,
        token=spec.token,
        index=spec.index,
        num_shards=job.shards,
        num_workers=job.workers,
        epoch=spec.inc,
        budget=job.net.budget_mb * 2**20,
    )
    store = SnapshotStore(Path(spec.run_path) / "snapshots" / spec.name, job.save.keep)
    found = store.latest()
    if found is not None:
        for wrong in found[1]:
            logger.error("snapshot not used: %s", wrong)
    image = found[0] if found is not None else None
    if image is not None and spec.contract:
        image = replace(image, contract=Contract.from_json(spec.contract.encode()))
    shared = Shared(is_on=job.net.shared_memory)
    shard = Shard(config, image=image, make_home=shared.make_home)
    transport = listen(context, job.net, 1 + spec.index)
    halt = threading.Event()
    try:
        saving = SnapshotConfig(every_s=job.save.every_s)
        server = ShardServer(shard, transport, store, saving, shared=shared)
        control.ask(
            Serving(
                run=spec.run,
                token=spec.token,
                name=spec.name,
                inc=spec.inc,
                endpoint=transport.endpoint,
                pid=os.getpid(),
                host=socket.gethostname(),
            )
        )
        logger.info("shard %s pid=%d serves at %s", spec.name, os.getpid(), transport.endpoint)
        with _on_sigterm(halt.set):
            beating = _Beating(spec, control, server, halt)
            server.serve(beating)
        control.ask(beating.beat())  # the last snapshot
        logger.info("shard %s ends: %r", spec.name, shard)
        if server.storage_error is not None:
            raise Problem("DB-STORE-001", server.storage_error)
    finally:
        transport.close()
        shared.close()


class _Beating:
    """Is it time to stop? Asks the controller every BEAT_S, or is told by a signal."""

    def __init__(
        self, spec: Spec, control: Control, server: ShardServer, halt: threading.Event
    ) -> None:
        self._spec = spec
        self._control = control
        self._server = server
        self._halt = halt

    def __call__(self) -> bool:
        if self._halt.is_set():
            return True
        try:
            return self._control.is_told(self.beat(), every_s=BEAT_S, kind=Halt)
        except ControllerGone as error:
            logger.error("%s; saving and ending", error)
            return True

    def beat(self) -> Beat:
        saved = self._server.saved
        return Beat(
            run=self._spec.run,
            token=self._spec.token,
            name=self._spec.name,
            inc=self._spec.inc,
            storage_error=sayable(self._server.storage_error or ""),
            saved="" if saved is None else saved.name,
            version=0 if saved is None else saved.version,
            samples=0 if saved is None else saved.samples,
            age_s=0.0 if saved is None else time.monotonic() - saved.taken_at,
        )


class _on_sigterm:
    """Call something at SIGTERM, where this thread may set handlers (it may not under Ray)."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._is_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        if self._is_main:
            self._before = signal.signal(signal.SIGTERM, lambda *_: self._call())

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            signal.signal(signal.SIGTERM, self._before)


def listen(context: "zmq.Context[zmq.Socket[bytes]]", net: NetConfig, place: int) -> ZmqServer:
    """Listen where the job says: its port and `place`, or any free port.

    Raises: Problem if somebody else listens there.
    """
    port = net.port + place if net.port else 0
    try:
        return ZmqServer(context, net.host, port)
    except OSError as error:
        raise Problem(
            "DB-ENV-005",
            f"cannot listen at {net.host} port {port or 'any'}: {error.strerror}",
            why="another run, or another program, may be using it",
            fix="choose another --set net.port=..., or leave net.port out for free ports",
        ) from error


def _threads(job: Job, role: str) -> int:
    cores = os.cpu_count() or 1
    if role == "shard":
        # Cores that no worker needs; beyond 4 the memory is the limit.
        return min(max(1, (cores - job.workers) // job.shards), 4)
    return job.threads or max(1, cores // job.workers)


def main() -> None:
    """Entry of a subprocess: read the spec, be that process."""
    spec = Spec.from_json(sys.stdin.read())
    run_process(spec)
    if spec.role == "shard":  # all is saved and said; torch takes half a second to leave
        logging.shutdown()
        os._exit(0)


if __name__ == "__main__":
    main()
