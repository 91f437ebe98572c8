"""Run: the processes of one run from start to end, and the controller's loop over them."""

import json
import logging
import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from torch import Tensor

from distbelief.controller import Controller
from distbelief.engine import Engine, LocalEngine, Process
from distbelief.folder import RunFolder
from distbelief.job import Job, Until
from distbelief.journal import Journal
from distbelief.live import LiveLine
from distbelief.param_server.client import Client, Fetched, Identity
from distbelief.param_server.contract import Contract
from distbelief.param_server.errors import RemoteProtocolError
from distbelief.param_server.staleness import Staleness
from distbelief.param_server.transport import ZmqClient, ZmqServer
from distbelief.param_server.wire import encode
from distbelief.problem import Problem
from distbelief.process import listen
from distbelief.result import Result
from distbelief.signals import take_news
from distbelief.spec import Spec
from distbelief.tail import Tail
from distbelief.workers.control import NOTES, AnyNote
from distbelief.workers.lease import LeaseQueue

logger = logging.getLogger(__name__)

TICK_S = 0.05
START_TIMEOUT_S = 120.0
"""Time for all shards to serve and the first worker to fetch."""
EXIT_TIMEOUT_S = 10.0
"""Time for processes that have said their last word to exit."""
STOP_TIMEOUT_S = 60.0
"""Time for workers to finish their leases, and for shards to save."""


@dataclass(slots=True)
class Stop:
    """How urgently a run should end; raised by a signal handler, or by whoever called `launch`."""

    level: int = 0
    """0: go on. 1: finish the leases, save, end. 2: end now, without saving."""

    def ask(self) -> None:
        self.level += 1

    def raise_to(self, level: int) -> None:
        self.level = max(self.level, level)


def stop_text(level: int, checkpoint: Mapping[str, Any] | None) -> str:  # Any: JSON
    """What a person is told who has asked to stop, once or twice."""
    if level == 1:
        return (
            "Stopping safely: workers finish what they have, then shards save. Ctrl-C again to "
            "stop now."
        )
    if checkpoint is None:
        return "Stopping now: nothing was saved."
    age_s = max(0, round(time.time() - checkpoint["at"]))
    return (
        f"Stopping now, nothing more is saved. The last checkpoint has {checkpoint['samples']:,} "
        f"samples ({age_s} s ago)."
    )


class StoppedNow(Exception):
    """The second request to stop."""


@dataclass(frozen=True)
class Trained:
    """What the shards have at the end."""

    contract: Contract
    values: Tensor
    buffers: tuple[Tensor, Tensor] | None


class Run:
    """The processes of one run, and the controller's loop over them."""

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        queue: LeaseQueue,
        live: LiveLine,
        stop: Stop,
        result: Result,
        *,
        attempt: int = 1,
        digest: str = "",
        contract: Contract | None = None,
    ) -> None:
        """queue: where in the data to begin. attempt: 1, and one more at each resume.

        digest: of the training split, which workers must see too. contract: what shards that
        are restored go on with; None is what they were saved with.
        """
        until = Until.parse(job.until)
        self._job = job
        self._run = folder.run
        self._folder = folder
        self._live = live
        self._stop = stop
        self._result = result
        self._attempt = attempt
        self._contract = contract
        self._token = secrets.token_hex(16)
        self._is_script = bool(job.script.path)
        is_ours = not self._is_script  # a script ends when it ends
        self._controller = Controller(
            self._run,
            self._token,
            queue,
            job.shards,
            until.epochs if is_ours else None,
            until.updates if is_ours else None,
            until.seconds if is_ours else None,
            num_workers=job.workers,
            digest=digest,
            bad_max=math.ceil(job.data.max_bad * queue.num_samples) if is_ours else None,
        )
        self.journal = Journal(folder, self._controller, job.shards, attempt)
        self._samples_before = queue.done_samples
        self._workers: list[Process] = []
        self._shards: list[Process] = []
        self._tail = Tail(folder.logs / "w0.out") if self._is_script else None
        self._heeded = 0
        self._ending_since: float | None = None

    def train(self) -> Trained:
        """Start everything, train, stop everything; fills the result on every way out."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        engine: Engine | None = None
        try:
            inbox = listen(context, self._job.net, 0)
            try:
                engine = self._make_engine()
                self._start(engine, inbox.endpoint)
                self._watch(inbox)
                trained = self._finish(inbox, context)
                self._let_exit()
                return trained
            finally:
                self._fill_result()
                for process in (*self._workers, *self._shards):
                    process.kill()
                if engine is not None:
                    engine.close()
                inbox.close()
        finally:
            context.term()

    def _let_exit(self) -> None:
        """What a script has left to do when Python exits is its own; nobody waits for long."""
        deadline = time.monotonic() + EXIT_TIMEOUT_S
        processes = (*self._workers, *self._shards)
        while time.monotonic() < deadline and any(p.poll() is None for p in processes):
            time.sleep(TICK_S)

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
                    inc=self._attempt,
                    run=self._run,
                    token=self._token,
                    controller=endpoint,
                    job=self._job.to_json(),
                    run_path=str(self._folder.path.resolve()),
                    cwd=str(Path.cwd()),
                    contract=""
                    if self._contract is None or role == "worker"
                    else self._contract.to_json().decode(),
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
            running = [worker for worker in running if not self._has_ended(worker, inbox)]
            self._give_up_silent(now, running)
            self._check(now, began)
            self._heed_stop(now, running)
            self._show(now)
        if self._is_script:
            is_done = any(worker.name in self._controller.ended for worker in self._workers)
        else:
            is_done = self._controller.queue.is_finished
        if not is_done:
            raise Problem(
                "DB-RUN-005",
                f"all {self._job.workers} workers are lost",
                why=", ".join(self._controller.lost),
                fix=f"see {self._folder.logs}",
            )

    def _show(self, now: float, *, last: bool = False) -> None:
        """Write down how far the run is, and show it."""
        if self.journal.state == "starting" and self._controller.began_at is not None:
            self.journal.enter("training", now)
        self.journal.look(now)
        if self._tail is not None:
            for line in self._tail.lines(last=last):
                self._live.say(line)
        self._live.update(self._controller.progress(now))

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

    def _has_ended(self, worker: Process, inbox: ZmqServer) -> bool:
        controller = self._controller
        if worker.name in controller.ended:  # its process may still be at what Python does at exit
            return True
        why = worker.poll()
        if why is None:
            return False
        self._serve(inbox)  # its last word may have come with it
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
            what = text if text.startswith(name) else f"{name}: {text}"
            raise Problem(code, what, *controller.explained.get(name, ("", "")))
        for shard in self._shards:
            why = shard.poll()
            if why is not None:
                raise Problem(
                    "DB-RUN-003",
                    f"{shard.name} is lost ({why or 'it ended without a word'})",
                    why="this version does not restart shards while a run goes on",
                    fix=f"see {self._folder.logs}; distbelief resume goes on from what was saved",
                )
        serving = len(controller.endpoints)
        if serving < self._job.shards and now - began > START_TIMEOUT_S:
            raise Problem(
                "DB-RUN-004",
                f"{serving} of {self._job.shards} shards serve after {START_TIMEOUT_S:.0f} s",
                fix=f"see {self._folder.logs}",
            )
        patience_s = max(START_TIMEOUT_S, self._job.silence_s)
        # A script may do whatever it likes before it makes its Downpour.
        if not (self._is_script or controller.workers()) and now - began > patience_s:
            raise Problem(
                "DB-RUN-004",
                f"no worker has opened its data and reported within {patience_s:.0f} s",
                fix=f"see {self._folder.logs}; if the data takes so long: --set silence_s=...",
            )

    def _heed_stop(self, now: float, running: list[Process]) -> None:
        for text in take_news():
            self._live.say(text)
        self._stop.raise_to(self._folder.asked_stop())
        if self._stop.level >= 2:
            self._say_stop(2)
            raise StoppedNow
        queue = self._controller.queue
        if self._stop.level and not self._heeded:
            queue.stop()
            self.journal.enter("stopping", now)
            self._say_stop(1)
        if self._stop.level and not self._controller.is_initialised:
            raise StoppedNow  # nothing has happened yet that could be saved
        if not (queue.is_stopped or queue.is_finished):
            return
        self._ending_since = self._ending_since or now
        patience_s = max(STOP_TIMEOUT_S, self._job.silence_s)  # a batch may take that long
        if now - self._ending_since > patience_s:
            for worker in running:  # found as lost by the next look
                self._live.say(f"worker {worker.name} did not end within {patience_s:.0f} s")
                worker.kill()

    def _say_stop(self, level: int) -> None:
        if self._heeded < level:
            self._heeded = level
            self.journal.look(time.monotonic())  # a checkpoint that was just told of counts too
            self._live.say(stop_text(level, self.journal.checkpoint))

    def _give_up_silent(self, now: float, running: list[Process]) -> None:
        """A worker that is frozen holds leases that nobody else gets: end it."""
        silent = self._controller.silent(now, self._job.silence_s)
        for worker in running:
            if worker.name in silent:  # found as lost by the next look
                self._live.say(
                    f"worker {worker.name} has said nothing for {self._job.silence_s:.0f} s and "
                    "is ended (silence_s says how long one may be silent)"
                )
                worker.kill()

    # At the end

    def _finish(self, inbox: ZmqServer, context: "zmq.Context[zmq.Socket[bytes]]") -> Trained:
        """Fetch what the shards have, then let them save and end."""
        self.journal.enter("saving", time.monotonic())
        self._show(time.monotonic(), last=True)
        me = Identity(run=self._run, w="launcher", token=self._token)
        endpoints = [self._controller.endpoints[i] for i in range(self._job.shards)]
        client = Client(ZmqClient(context), endpoints, me)
        try:
            client.connect()
            fetched = Fetched(client.layout)
            client.fetch(fetched)
            nothing = client.contract.buffers.no_buffers()
            trained = Trained(client.contract, fetched.values, client.merge(0, *nothing))
            reports = [json.loads(text) for text in client.query()]
        finally:
            client.close()
        try:
            self._folder.write("shards.json", reports)
        except OSError as error:  # what the shards themselves save matters more
            logger.error("%s/shards.json cannot be written: %s", self._folder.path, error)
        staleness = Staleness.merged(Staleness.from_dict(r["staleness"]) for r in reports)
        result = self._result
        result.samples = min(min(report["samples"]) for report in reports)
        result.updates = min(min(report["version"]) for report in reports)
        result.staleness = dict(staleness.summary())
        self._controller.halt_shards(time.monotonic())
        in_time = self._wait_for_shards(inbox)
        self.journal.write_checkpoint()
        errors = [
            f"{name}: {text}" for name, (code, text) in self._controller.ended.items() if code
        ]
        if not in_time:
            errors.append(f"shards did not end within {STOP_TIMEOUT_S:.0f} s: nothing was saved")
        if errors:
            result.exit, result.error = "storage", {"code": "DB-STORE-001", "text": errors[0]}
        else:
            result.exit = "done" if self._is_complete else "stopped"
        return trained

    @property
    def _is_complete(self) -> bool:
        """The job came to its own end, or nobody has asked for another."""
        queue = self._controller.queue
        return not self._stop.level or (queue.is_exhausted and not queue.unfinished_samples)

    def _wait_for_shards(self, inbox: ZmqServer) -> bool:
        """Serve shards until all have ended; False if they take too long."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        ended = self._controller.ended
        while any(s.name not in ended and s.poll() is None for s in self._shards):
            self._serve(inbox)
            self._stop.raise_to(self._folder.asked_stop())
            if self._stop.level >= 2:
                self._say_stop(2)
                raise StoppedNow
            if time.monotonic() > deadline:
                return False
        return True

    def _fill_result(self) -> None:
        """What the controller knows, whichever way the run ended."""
        controller, result = self._controller, self._result
        if not result.samples:  # a snapshot may hold what its worker has not told yet
            saved = (self.journal.checkpoint or {"samples": 0})["samples"]
            result.samples = max(controller.queue.done_samples, saved)
        result.updates = result.updates or controller.updates
        result.refused = controller.refused
        names = (worker.name for worker in self._workers)
        result.worker_samples = {name: controller.worker_samples[name] for name in names}
        result.workers_lost = len(controller.lost)
        loss = controller.mean_loss
        result.train_loss = None if loss is None else round(loss, 6)
        result.train_s = round(controller.train_s, 3)
        samples = result.samples - self._samples_before
        result.samples_per_s = round(samples / max(controller.train_s, 1e-9), 1)
        result.skipped_samples = controller.skipped_samples
        result.bad_samples = len(controller.bad_samples)
        result.unfinished = controller.queue.unfinished_samples
        if self._tail is not None:
            for line in self._tail.lines(last=True):
                self._live.say(line)
        if controller.refused:
            self._live.say(
                f"{controller.refused} parts of pushes were refused, the last one because "
                f"{controller.refused_reason}"
            )
        if controller.bad_samples:
            name, why = next(iter(controller.bad_samples.items()))
            self._live.say(
                f"{len(controller.bad_samples)} samples could not be read and were left out; the "
                f"first is {name}: {why}"
            )
