"""Run: the processes of one run from start to end, and the controller's loop over them."""

import json
import logging
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from torch import Tensor

from distbelief.controller import Controller
from distbelief.engine import Engine, LocalEngine, Process
from distbelief.job import Job, Until
from distbelief.live import LiveLine
from distbelief.param_server.client import Client, Fetched, Identity
from distbelief.param_server.errors import RemoteProtocolError
from distbelief.param_server.staleness import Staleness
from distbelief.param_server.transport import ZmqClient, ZmqServer
from distbelief.param_server.wire import encode
from distbelief.problem import Problem
from distbelief.process import Spec
from distbelief.result import Result
from distbelief.workers.control import NOTES, AnyNote
from distbelief.workers.lease import LeaseQueue

logger = logging.getLogger(__name__)

TICK_S = 0.05
LEASE_BATCHES = 4
"""Batches in one lease: so much of a lost worker's data waits until others have time for it."""
START_TIMEOUT_S = 120.0
"""Time for all shards to serve and the first worker to fetch."""
STOP_TIMEOUT_S = 60.0
"""Time for workers to finish their leases, and for shards to save."""


@dataclass(slots=True)
class Stop:
    """How urgently a run should end; raised by a signal handler, or by whoever called `launch`."""

    level: int = 0
    """0: go on. 1: finish the leases, save, end. 2: end now, without saving."""

    def ask(self) -> None:
        self.level += 1


class StoppedNow(Exception):
    """The second request to stop."""


@dataclass(frozen=True)
class Trained:
    """What the shards have at the end."""

    values: Tensor
    buffers: tuple[Tensor, Tensor] | None


class Run:
    """The processes of one run, and the controller's loop over them."""

    def __init__(
        self,
        job: Job,
        run: str,
        folder: Path,
        num_samples: int,
        live: LiveLine,
        stop: Stop,
        result: Result,
    ) -> None:
        until = Until.parse(job.until)
        self._job = job
        self._run = run
        self._folder = folder
        self._live = live
        self._stop = stop
        self._result = result
        self._token = secrets.token_hex(16)
        lease = LEASE_BATCHES * job.train.batch_size
        queue = LeaseQueue(num_samples, lease, until.epochs, job.train.warm_start)
        self._controller = Controller(
            run, self._token, queue, job.shards, until.epochs, until.updates, until.seconds
        )
        self._workers: list[Process] = []
        self._shards: list[Process] = []
        self._num_written = 0
        self._ending_since: float | None = None

    def train(self) -> Trained:
        """Start everything, train, stop everything; fills the result on every way out."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        engine: Engine | None = None
        try:
            inbox = ZmqServer(context, self._job.net.host)
            try:
                engine = self._make_engine()
                self._start(engine, inbox.endpoint)
                self._watch(inbox)
                return self._finish(inbox, context)
            finally:
                self._fill_result()
                for process in (*self._workers, *self._shards):
                    process.kill()
                if engine is not None:
                    engine.close()
                inbox.close()
        finally:
            context.term()

    def _make_engine(self) -> Engine:
        if self._job.engine == "local":
            return LocalEngine()
        # Here and not at the top: Ray takes half a second to import, and --engine local works
        # where it is not installed.
        try:
            from distbelief.ray_engine import RayEngine
        except ImportError as error:
            fix = "pip install ray, or use --engine local"
            raise Problem("DB-ENV-001", f"Ray cannot be imported: {error}", fix=fix) from error
        self._live.say("starting Ray")
        return RayEngine(self._job.address, self._job.workers + self._job.shards)

    def _start(self, engine: Engine, endpoint: str) -> None:
        self._live.say(f"starting {self._job.shards} shards and {self._job.workers} workers")
        for role, processes, count in (
            ("shard", self._shards, self._job.shards),
            ("worker", self._workers, self._job.workers),
        ):
            for index in range(count):
                spec = Spec(
                    role=role,
                    index=index,
                    inc=1,
                    run=self._run,
                    token=self._token,
                    controller=endpoint,
                    job=self._job.to_json(),
                    run_path=str(self._folder.resolve()),
                    cwd=str(Path.cwd()),
                )
                processes.append(engine.start(spec))

    # While workers train

    def _watch(self, inbox: ZmqServer) -> None:
        """Answer processes and look after them until the last worker has ended."""
        began = time.monotonic()
        running = list(self._workers)
        while running:
            self._serve(inbox)
            now = time.monotonic()
            self._controller.tick(now)
            running = [worker for worker in running if not self._has_ended(worker)]
            self._give_up_silent(now, running)
            self._check(now, began)
            self._heed_stop(now, running)
            self._live.update(self._controller.progress(now))
        if self._controller.began_at is None and self._stop.level:
            raise StoppedNow  # there is nothing to save yet
        if not self._controller.queue.is_finished:
            raise Problem(
                "DB-RUN-005",
                f"all {self._job.workers} workers are lost",
                why=", ".join(self._controller.lost),
                fix=f"see {self._folder}/logs",
            )

    def _serve(self, inbox: ZmqServer) -> None:
        """Take what has come in, after waiting a little for the first note."""
        timeout_s = TICK_S
        for _ in range(1000):
            try:
                received = inbox.recv(timeout_s)
                if received is None:
                    return
                peer, frames = received
                note = NOTES.decode(frames[0] if frames else b"")
            except RemoteProtocolError as error:
                logger.debug("junk: %s", error)
                continue
            timeout_s = 0.0
            assert isinstance(note, AnyNote)  # the codec knows no other messages
            answer = self._controller.handle(note, time.monotonic())
            if answer is not None:
                inbox.send(peer, [encode(answer)])

    def _has_ended(self, worker: Process) -> bool:
        why = worker.poll()
        if why is None:
            return False
        controller = self._controller
        if worker.name not in controller.ended:
            samples = controller.lose(worker.name)
            self._live.say(
                f"worker {worker.name} is lost ({why or 'it ended without a word'}): {samples} "
                f"samples it had not finished go to the others"
            )
        return True

    def _check(self, now: float, began: float) -> None:
        """Whatever ends the run with an error."""
        controller = self._controller
        if controller.first_error is not None:
            name, code, text = controller.first_error
            raise Problem(code, text if text.startswith(name) else f"{name}: {text}")
        for shard in self._shards:
            why = shard.poll()
            if why is not None:
                raise Problem(
                    "DB-RUN-003",
                    f"{shard.name} is lost ({why or 'it ended without a word'})",
                    why="this version does not restart shards",
                    fix=f"see {self._folder}/logs, and {self._folder}/snapshots if it had saved",
                )
        if controller.began_at is None and now - began > START_TIMEOUT_S:
            raise Problem(
                "DB-RUN-004",
                f"no worker has begun within {START_TIMEOUT_S:.0f} s: "
                f"{len(controller.endpoints)} of {self._job.shards} shards serve",
                fix=f"see {self._folder}/logs",
            )
        if len(controller.members) != self._num_written:
            self._num_written = len(controller.members)
            _write_json(self._folder / "processes.json", controller.processes())

    def _heed_stop(self, now: float, running: list[Process]) -> None:
        if self._stop.level >= 2:
            self._live.say("stopping now, nothing is saved")
            raise StoppedNow
        queue = self._controller.queue
        if self._stop.level and not queue.is_stopped:
            queue.stop()
            self._live.say("stopping safely: workers finish their leases, then shards save")
        if not (queue.is_stopped or queue.is_finished):
            return
        self._ending_since = self._ending_since or now
        patience_s = max(STOP_TIMEOUT_S, self._job.silence_s)  # a batch may take that long
        if now - self._ending_since > patience_s:
            for worker in running:  # found as lost by the next look
                self._live.say(f"worker {worker.name} did not end within {patience_s:.0f} s")
                worker.kill()

    def _give_up_silent(self, now: float, running: list[Process]) -> None:
        """A worker that is frozen holds leases that nobody else gets: end it."""
        silent = self._controller.silent(now, self._job.silence_s)
        for worker in running:
            if worker.name in silent:  # found as lost by the next look
                self._live.say(
                    f"worker {worker.name} has said nothing for {self._job.silence_s:.0f} s"
                )
                worker.kill()

    # At the end

    def _finish(self, inbox: ZmqServer, context: "zmq.Context[zmq.Socket[bytes]]") -> Trained:
        """Fetch what the shards have, then let them save and end."""
        me = Identity(run=self._run, w="launcher", token=self._token)
        endpoints = [self._controller.endpoints[i] for i in range(self._job.shards)]
        client = Client(ZmqClient(context), endpoints, me)
        try:
            client.connect()
            fetched = Fetched(client.layout)
            client.fetch(fetched)
            nothing = client.contract.buffers.no_buffers()
            trained = Trained(fetched.values, client.merge(0, *nothing))
            reports = [json.loads(text) for text in client.query()]
        finally:
            client.close()
        _write_json(self._folder / "shards.json", reports)
        staleness = Staleness.merged(Staleness.from_dict(r["staleness"]) for r in reports)
        result = self._result
        result.samples = min(min(report["samples"]) for report in reports)
        result.updates = min(min(report["version"]) for report in reports)
        result.staleness = {
            "p50": staleness.quantile(0.5),
            "p95": staleness.quantile(0.95),
            "max": staleness.maximum,
        }
        self._controller.is_halting_shards = True
        in_time = self._wait_for_shards(inbox)
        errors = [
            f"{name}: {text}" for name, (code, text) in self._controller.ended.items() if code
        ]
        if not in_time:
            errors.append(f"shards did not end within {STOP_TIMEOUT_S:.0f} s: nothing was saved")
        if errors:
            result.exit, result.error = "storage", {"code": "DB-STORE-001", "text": errors[0]}
        else:
            result.exit = "stopped" if self._stop.level else "done"
        return trained

    def _wait_for_shards(self, inbox: ZmqServer) -> bool:
        """Serve shards until all have ended; False if they take too long."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while any(shard.poll() is None for shard in self._shards):
            self._serve(inbox)
            if self._stop.level >= 2:
                raise StoppedNow
            if time.monotonic() > deadline:
                return False
        return True

    def _fill_result(self) -> None:
        """What the controller knows, whichever way the run ended."""
        controller, result = self._controller, self._result
        result.samples = result.samples or controller.queue.done_samples
        result.updates = result.updates or controller.updates
        result.refused = controller.refused
        names = (worker.name for worker in self._workers)
        result.worker_samples = {name: controller.worker_samples[name] for name in names}
        result.workers_lost = len(controller.lost)
        loss = controller.mean_loss
        result.train_loss = None if loss is None else round(loss, 6)
        result.train_s = round(controller.train_s, 3)
        result.samples_per_s = round(result.samples / max(controller.train_s, 1e-9), 1)
        if controller.refused:
            self._live.say(
                f"{controller.refused} parts of pushes were refused, the last one because "
                f"{controller.refused_reason}"
            )


def _write_json(path: Path, data: Any) -> None:  # Any: JSON
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
