"""Process: what runs inside each process of a job, whichever engine started it.

    python -m distbelief.process < spec.json

The spec comes through standard input, for it holds the job's token and keys, which must not be seen
in a list of processes or an environment.
"""

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import zmq

from distbelief.controller.account import Tally
from distbelief.evaluator import run_evaluator
from distbelief.factory import make_contract, make_model, num_loaders, open_data, with_views
from distbelief.job import Job
from distbelief.listen import listen
from distbelief.open_files import allow_files
from distbelief.param_server.carrier import Carrier
from distbelief.param_server.contract import Contract
from distbelief.param_server.depot import Depot
from distbelief.param_server.errors import (
    DistBeliefError,
    Refused,
    SnapshotFailed,
    SnapshotFenced,
)
from distbelief.param_server.identity import Identity
from distbelief.param_server.ledger import Ledger, recall
from distbelief.param_server.recovery import Found, begin
from distbelief.param_server.report import EVERY_S, every_s
from distbelief.param_server.reporter import Reporter, ZmqSender
from distbelief.param_server.server import ShardServer, SnapshotConfig
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.shared import Shared
from distbelief.param_server.snapshot import SnapshotStore
from distbelief.param_server.storage import storage_of
from distbelief.param_server.transport import ZmqClient, keep_freed_memory
from distbelief.param_server.wire import sayable
from distbelief.problem import Problem
from distbelief.run_script import run_script
from distbelief.spec import Spec
from distbelief.stored import unusable
from distbelief.workers.control import Control, ControllerGone, Locator
from distbelief.workers.notes import QUARANTINED, Beat, Ended, Fence, Fenced, Halt, Serving
from distbelief.workers.own import user_frames
from distbelief.workers.worker import NonFiniteLoss, Worker

logger = logging.getLogger(__name__)

BEAT_S = 0.2
"""A shard asks this often whether it is still wanted."""
DRAIN_S = 20.0
"""A worker that is told to go by SIGTERM takes no longer; spot instances get 30 s and more."""
UNWIND_S = 5.0


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
    forget_imports()
    torch.set_num_threads(_threads(job, spec))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        if spec.role == "evaluator":  # the controller knows nothing of it
            run_evaluator(spec, job, context)
            return
        control = Control(ZmqClient(context, spec.keys), spec.controller)
        try:
            _run_told(spec, job, control, context)
        finally:
            control.close()
    finally:
        context.term()
        root.removeHandler(handler)
        handler.close()


def forget_imports() -> None:
    """Have the garbage collector look at what comes from here on alone. For a whole process.

    It looks at all there is only once what is new is a quarter of what is old. Torch makes 180,000
    objects: cycles that took long to end, such as those of a snapshot, stayed for a day, and with
    them the tuples that the interpreter keeps for later.
    """
    gc.freeze()
    gc.collect()  # from here on nothing is old


def _run_told(
    spec: Spec, job: Job, control: Control, context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    """Run, and tell the controller how it ended."""
    code, text, why, fix = "", "", "", ""
    is_drained = False
    try:
        if spec.role == "shard":
            _run_shard(spec, job, control, context)
        else:
            notice = Notice()
            with _on_sigterm(notice.take):
                try:
                    is_drained = _run_replica(spec, job, control, context, notice)
                finally:
                    notice.forget()
    except TimeIsUp as error:
        logger.error("%s", error)
        is_drained = True
    except (ControllerGone, Deposed) as error:
        logger.error("%s", error)
        return
    except Problem as error:
        code, text, why, fix = error.code, error.what, error.why, error.fix
    except NonFiniteLoss as error:
        code, text = "DB-TRAIN-001", str(error)
    except Refused as error:
        if error.code == "fenced":  # another process is this worker by now: not this one's run
            logger.error("%s", error)
            return
        code, text = "DB-RUN-001", str(error)
        if error.code == "quarantine":
            code, text = QUARANTINED, error.text
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
                is_drained=is_drained,
            )
        )
    except ControllerGone:
        logger.warning("nobody heard that %s ended", spec.name)


def _run_replica(
    spec: Spec,
    job: Job,
    control: Control,
    context: "zmq.Context[zmq.Socket[bytes]]",
    notice: "Notice",
) -> bool:
    """Returns: it has left before the end of the run."""
    with _reporter_of(spec, job, context) as reporter:
        if job.script.path:
            transport = partial(ZmqClient, context, spec.keys)
            return run_script(spec, job, control, transport, notice.is_taken, reporter)
        return _run_worker(spec, job, control, context, notice, reporter)


@contextlib.contextmanager
def _reporter_of(
    spec: Spec, job: Job, context: "zmq.Context[zmq.Socket[bytes]]"
) -> Iterator[Reporter | None]:
    """What tells the monitor; None where there is none."""
    if not spec.monitor:
        yield None
        return
    identity = Identity(run=spec.run, w=spec.name, inc=spec.inc, token=spec.token)
    often = EVERY_S if spec.role == "shard" else every_s(job.workers)
    reporter = Reporter(ZmqSender(context, spec.monitor, spec.keys), identity, often)
    try:
        yield reporter
    finally:
        reporter.close()


def _run_worker(
    spec: Spec,
    job: Job,
    control: Control,
    context: "zmq.Context[zmq.Socket[bytes]]",
    notice: "Notice",
    reporter: Reporter | None,
) -> bool:
    split = open_data(job, "train")
    assert split is not None  # every source has this one
    split = with_views(job, split)
    model = make_model(job, split)
    contract = make_contract(job, model, len(split))
    # From here on each incarnation of each worker draws its own numbers (dropout).
    torch.manual_seed((job.seed + 1) * 1_000_003 + spec.index * 1009 + spec.inc)
    identity = Identity(run=spec.run, w=spec.name, inc=spec.inc, token=spec.token)
    config = job.worker_config
    compute = replace(config.compute, device=_device(job, spec.index))
    worker = Worker(
        replace(config, num_loaders=num_loaders(_at_host(job, spec), split), compute=compute),
        identity,
        model,
        contract,
        split,
        control,
        lambda: ZmqClient(context, spec.keys),
        Locator(identity, lambda: ZmqClient(context, spec.keys), spec.controller),
        spec.history if job.save.history else None,
        notice.is_taken,
        reporter,
    )
    logger.info("worker %s pid=%d begins", spec.name, os.getpid())
    worker.run()
    logger.info("worker %s ends", spec.name)
    return worker.is_drained


def _run_shard(
    spec: Spec, job: Job, control: Control, context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    allow_files(job.workers)
    config = ShardConfig(
        run=spec.run,
        token=spec.token,
        index=spec.index,
        num_shards=job.shards,
        num_workers=job.workers,
        epoch=spec.inc,
        budget=job.net.budget_mb * 2**20,
        guard=job.guard,
    )
    store = SnapshotStore(Path(spec.run_path) / "snapshots" / spec.name, job.save.keep)
    depot = _depot_of(spec, job)
    found = _begin(spec, job, store, depot)
    image = found.image if found is not None else None
    if image is not None and spec.contract:
        image = replace(image, contract=Contract.from_json(spec.contract.encode()))
    shared = Shared(is_on=job.net.shared_memory)
    ledger = Ledger(store.folder, spec.inc, keeps_all=job.save.history)
    is_kept = job.save.ack != "none"
    shard = Shard(
        config,
        image=image,
        on_push=ledger.write if is_kept else None,
        make_home=shared.make_home,
    )
    if is_kept:
        if image is not None:
            recall(shard, image, store.folder)
        ledger.begin(image)
    net = job.net
    port = net.port + 1 + spec.index if net.port else 0  # the controller has the first one
    host = spec.host or net.host
    transport = listen(context, host, port, spec.port, spec.keys, net.is_encrypted)
    announce = net.announce
    halt = threading.Event()
    stack = contextlib.ExitStack()
    carrier = None
    try:
        if depot is not None:
            carrier = Carrier(depot, store.folder)
            store.held = partial(getattr, carrier, "names")
        saving = SnapshotConfig(every_s=job.save.every_s, backup_bytes=job.save.backup_bytes)
        reporter = stack.enter_context(_reporter_of(spec, job, context))
        server = ShardServer(
            shard,
            transport,
            store,
            saving,
            shared=shared,
            ledger=ledger,
            reporter=reporter,
            carrier=carrier,
        )
        if found is not None and not found.is_stored:
            server.carry(found.name, found.image)
        control.ask(
            Serving(
                run=spec.run,
                token=spec.token,
                name=spec.name,
                inc=spec.inc,
                endpoint=f"tcp://{announce[spec.index]}" if announce else transport.endpoint,
                pid=os.getpid(),
                host=socket.gethostname(),
                samples=tuple(part.samples for part in shard.parts.values()),
            )
        )
        logger.info("shard %s pid=%d serves at %s", spec.name, os.getpid(), transport.endpoint)
        with _on_sigterm(halt.set):
            beating = _Beating(spec, control, server, halt)
            server.serve(beating)
        if shard.is_deposed:
            raise Deposed(f"{spec.name} epoch {spec.inc} was replaced by a later one")
        if shard.spoiled:
            raise Problem(
                "DB-TRAIN-003",
                f"{spec.name}: {shard.spoiled}",
                why="gradients were finite, and what they add up to is not",
                fix="distbelief resume goes on from the last snapshot; lower the learning rate, or "
                "refuse such gradients: --set guard.max_norm=...",
            )
        control.ask(beating.beat())  # the last snapshot
        logger.info("shard %s ends: %r", spec.name, shard)
        if server.storage_error is not None:
            raise Problem("DB-STORE-001", server.storage_error)
    finally:
        stack.close()
        if carrier is not None:
            carrier.abandon()
        transport.close()
        shared.close()
        ledger.close()


def _depot_of(spec: Spec, job: Job) -> Depot | None:
    """Where the shard's snapshots are kept too. Raises: Problem."""
    if not job.save.store:
        return None
    try:
        storage = storage_of(job.save.store, spec.run)
    except (OSError, ValueError) as error:
        raise unusable(job.save.store, str(error)) from error
    return Depot(storage, spec.name, spec.inc, job.save.keep)


def _begin(spec: Spec, job: Job, store: SnapshotStore, depot: Depot | None) -> Found | None:
    """Take over from all earlier epochs. Raises: Deposed, Problem."""
    try:
        found = begin(store, depot, spec.inc)
    except SnapshotFenced as error:
        raise Deposed(str(error)) from error
    except SnapshotFailed as error:
        raise unusable(job.save.store, str(error)) from error
    for wrong in () if found is None else found.wrong:
        logger.error("snapshot not used: %s", wrong)
    return found


class Deposed(Exception):
    """Another process is this shard by now; nothing is to be told or saved."""


class TimeIsUp(BaseException):
    """A worker that was told to go has not come to an end in time."""


class Notice:
    """SIGTERM to a worker: its machine is about to go away, as a spot instance's does.

    It ends its step, pushes what it has, and leaves; after DRAIN_S it ends wherever it is. Then
    the controller asks the shards what came of its last push.
    """

    def __init__(self) -> None:
        self._is_taken = False
        self._before: Any = None  # Any: a handler, as typeshed has it

    def take(self) -> None:
        if not self._is_taken:
            self._is_taken = True
            self._before = signal.signal(signal.SIGALRM, self._ring)
            signal.setitimer(signal.ITIMER_REAL, DRAIN_S)

    def is_taken(self) -> bool:
        return self._is_taken

    def forget(self) -> None:
        """The worker has come to its end: the alarm is off."""
        if self._is_taken:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)

    def _ring(self, *_: object) -> None:
        # What unwinds may wait for shards that do not answer: that is not waited for either.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
        signal.setitimer(signal.ITIMER_REAL, UNWIND_S)
        raise TimeIsUp(
            f"this worker was told to go {DRAIN_S:.0f} s ago, and has not come to an end"
        )


class _Beating:
    """Is it time to stop? Asks the controller every BEAT_S, or is told by a signal."""

    def __init__(
        self, spec: Spec, control: Control, server: ShardServer, halt: threading.Event
    ) -> None:
        self._spec = spec
        self._control = control
        self._server = server
        self._halt = halt
        self._fenced: Fenced | None = None
        """What is to be told before the next beat."""

    def __call__(self) -> bool:
        if self._halt.is_set():
            return True
        lease_s = self._spec.lease_s
        try:
            every_s = BEAT_S if self._fenced is None else 0.0
            answer = self._control.hear(self._fenced or self.beat(), every_s)
            if answer is not None:
                self._fenced = self._fence(answer) if isinstance(answer, Fence) else None
            if lease_s:  # the controller may have given this shard to another host
                silence_s = time.monotonic() - self._control.granted_at
                self._server.is_suspended = silence_s > lease_s
            return isinstance(answer, Halt)
        except ControllerGone as error:
            logger.error("%s; saving and ending", error)
            return True

    def _fence(self, fence: Fence) -> Fenced:
        tally = Tally.of(self._server.shard.fence(fence.w, fence.inc))
        return Fenced(
            run=self._spec.run,
            token=self._spec.token,
            name=self._spec.name,
            inc=self._spec.inc,
            w=fence.w,
            of_inc=fence.inc,
            **asdict(tally),
        )

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


def _device(job: Job, index: int) -> str:
    """Where a worker computes: those of a machine take turns at its GPUs."""
    if job.device != "cuda" or torch.cuda.device_count() < 2:
        return job.device
    return f"cuda:{index % torch.cuda.device_count()}"


def _at_host(job: Job, spec: Spec) -> Job:
    """The job as it is seen from one host: with the workers that are there."""
    beside = spec.beside or job.workers
    return replace(job, workers=beside, min_workers=min(job.min_workers, beside))


def _threads(job: Job, spec: Spec) -> int:
    cores, workers = os.cpu_count() or 1, _at_host(job, spec).workers
    if spec.role == "evaluator":
        return 1
    if spec.role == "shard":
        # Cores that no worker needs; beyond 4 the memory is the limit.
        return min(max(1, (cores - workers) // job.shards), 4)
    return job.threads or max(1, cores // workers)


def be_process(spec: Spec) -> None:
    """Be the process of a spec in a child that has been forked; does not return for a shard."""
    with spec.out.open("ab") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    run_process(spec)
    _leave(spec)


def main() -> None:
    """Entry of a subprocess: read the spec, be that process."""
    spec = Spec.from_json(sys.stdin.read())
    run_process(spec)
    _leave(spec)


def _leave(spec: Spec) -> None:
    if spec.role == "shard":  # all is saved and said; torch takes half a second to leave
        logging.shutdown()
        os._exit(0)


if __name__ == "__main__":
    main()
