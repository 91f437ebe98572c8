"""Run: one run from start to end: start its processes, watch them, take what they trained."""

import json
import logging
import math
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import zmq

from distbelief import __version__
from distbelief.chronicle import Begin
from distbelief.chronicler import Chronicler
from distbelief.controller.account import Account
from distbelief.controller.entry import HaltShards, StopWork
from distbelief.controller.machine import CONTROLLER, Controller
from distbelief.controller.standby import Standby
from distbelief.engine import Engine, Process
from distbelief.examiner import Examiner
from distbelief.folder import RunFolder
from distbelief.job import Job, Until
from distbelief.journal import Journal
from distbelief.keyring import EVALUATOR, LAUNCHER, MONITOR, keyring_of
from distbelief.live import LiveLine
from distbelief.open_files import allow_files
from distbelief.param_server.contract import Contract
from distbelief.param_server.identity import Identity
from distbelief.param_server.layout import Layout
from distbelief.param_server.secret import Secret
from distbelief.param_server.staleness import Staleness
from distbelief.param_server.transport import ZmqClient
from distbelief.problem import Problem
from distbelief.result import Result
from distbelief.signals import take_news
from distbelief.spec import Spec
from distbelief.spectator import Spectator
from distbelief.staff import Staff
from distbelief.stop import Stop, StoppedNow, stop_text
from distbelief.tail import Tail
from distbelief.trained import Trained, fetch_trained
from distbelief.workers.lease import LeaseQueue

logger = logging.getLogger(__name__)

TICK_S = 0.05
START_TIMEOUT_S = 120.0
"""Time for all shards to serve and the first worker to fetch."""
INCS = 1000
"""Incarnations that an evaluator has in one attempt of a run."""
STOP_TIMEOUT_S = 60.0
"""Time for workers to finish their leases, and for shards to save."""


class Run:
    """See the top of this file. Used once, by one thread."""

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        engine: Engine,
        queue: LeaseQueue,
        live: LiveLine,
        stop: Stop,
        result: Result,
        *,
        attempt: int = 1,
        digest: str = "",
        contract: Contract | None = None,
        layout: Layout | None = None,
    ) -> None:
        """queue: where in the data to begin. attempt: 1, and one more at each resume.

        layout: of the model, where the launcher knows it. digest: of the training split, which
        workers must see too. contract: what shards that are restored go on with; None is what they
        were saved with.
        """
        until = Until.parse(job.until)
        self._job = job
        self._run = folder.run
        self._folder = folder
        self._live = live
        self._stop = stop
        self._result = result
        # Both are of this start alone: a resumed run has others.
        self._token = Secret(secrets.token_hex(16))
        self._keyring = keyring_of(job)
        self._is_script = bool(job.script.path)
        is_ours = not self._is_script  # a script ends when it ends
        controller = Controller(
            self._run,
            self._token,
            queue,
            job.shards,
            until.epochs if is_ours else None,
            until.updates if is_ours else None,
            until.seconds if is_ours else None,
            num_workers=job.workers,
            min_workers=job.min_workers,
            digest=digest,
            bad_max=math.ceil(job.data.max_bad * queue.num_samples) if is_ours else None,
        )
        self._controller = controller
        """To be read. What is to be done to it goes through the standby."""
        self._standby = Standby(
            controller,
            job.net,
            None if self._keyring is None else self._keyring.of(LAUNCHER),
            folder.logs,
            job.restarts,
            self._say_of_controller,
        )
        self.spectator = Spectator(
            job,
            self._run,
            folder.path,
            self._token,
            None if self._keyring is None else self._keyring.of(MONITOR),
            begin_of(job, self._run, folder.path, attempt, layout),
            live.say,
        )
        """Lives on until the result is told."""
        self.journal = Journal(folder, self._controller, job.shards, attempt)
        self._samples_before = queue.done_samples
        self._staff = Staff(
            job,
            folder,
            engine,
            self._standby,
            live.say,
            self._token,
            self._keyring,
            attempt,
            contract,
            self._notice,
            lambda: self.spectator.endpoint,
        )
        self._chronicler = Chronicler(controller, self._staff)
        self._examiner = (
            Examiner(self._evaluator_spec(attempt), live.say, self.spectator.tell)
            if (job.evaluate.every_s and is_ours)
            else None
        )
        self._tail = Tail(folder.logs / "w0.out") if self._is_script else None
        self._account: Account | None = None
        """At the end, with what the shards have said of it."""
        self._is_proven = False
        """The shards have been asked, and have nothing that is not accounted for."""
        self._whole_at = float("-inf")
        """When all shards were last seen to serve."""
        self._heeded = 0
        self._ending_since: float | None = None

    @property
    def listed_keys(self) -> Mapping[str, str] | None:
        """Public keys by name; None where nothing is encrypted."""
        return None if self._keyring is None else self._keyring.listed

    def train(self) -> Trained:
        """Start everything, train, stop everything; fills the result on every way out."""
        allow_files(self._job.workers)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self.spectator.start()
            self._standby.start()
            self.spectator.wait()
            self._staff.start()
            self._watch()
            trained = self._finish(context)
            self._staff.let_exit()
            return trained
        finally:
            self._fill_result()
            if self._examiner is not None:
                self._examiner.close()
            self._staff.close()
            self._standby.close()
            context.term()

    def _evaluator_spec(self, attempt: int) -> Spec:
        return Spec(
            role="evaluator",
            index=0,
            inc=attempt * INCS,
            run=self._run,
            token=self._token,
            controller="",
            job=self._job.to_json(),
            run_path=str(self._folder.path.resolve()),
            cwd=str(Path.cwd()),
            keys=None if self._keyring is None else self._keyring.of(EVALUATOR),
        )

    # While workers train

    def _watch(self) -> None:
        """Look after the processes until the last worker has ended."""
        staff = self._staff
        began = time.monotonic()
        while True:
            self._standby.follow(TICK_S)
            now = time.monotonic()
            running = staff.look(now)
            self._check(now, began)
            self._heed_stop(now, running)
            staff.heed_asked()
            staff.heed_leaving()
            if self._examiner is not None and self._controller.is_initialised:
                self._examiner.look(self._standby.endpoint)
            staff.end_unneeded(running)
            is_someone = running or staff.is_any_waiting or staff.is_short
            if not (is_someone or self._controller.is_settling):
                break
            staff.start_due(now)
            self._show(now)
        if self._is_script:
            ended, leaving = self._controller.ended, self._controller.is_leaving
            is_done = any(name in ended and not leaving(name) for name in staff.workers)
        else:
            is_done = self._controller.queue.is_finished
        if not is_done and not staff.has_given_up:
            return  # all were drained: what they have done is saved, and the run can go on
        if not is_done:
            raise Problem(
                "DB-RUN-005",
                f"all {self._job.workers} workers are lost",
                why=", ".join(self._controller.lost),
                fix=f"see {self._folder.logs}",
            )

    def _show(self, now: float, *, last: bool = False) -> None:
        """Write down how far the run is, and show it."""
        if self.journal.state == "starting" and self._controller.pace.began_at is not None:
            self.journal.enter("training", now)
        self.journal.look(now)
        if self._tail is not None:
            for line in self._tail.lines(last=last):
                self._live.say(line)
        self._live.update(self._controller.progress(now))
        self.tell(now)

    def tell(self, now: float) -> None:
        """Tell the monitor what there is to tell."""
        spectator = self.spectator
        spectator.look()
        for entry in self._chronicler.look(
            now,
            time.time(),
            self.journal.state,
            self.journal.checkpoint,
            self._standby.num_restarts,
            spectator.num_dropped,
        ):
            spectator.tell(entry)

    def _notice(self, kind: str, who: str, text: str) -> None:
        self._chronicler.notice(kind, who, text)

    def _say_of_controller(self, text: str) -> None:
        self._live.say(text)
        self._notice("crash", CONTROLLER, text)

    def _check(self, now: float, began: float) -> None:
        """Whatever ends the run with an error."""
        controller = self._controller
        if controller.first_error is not None:
            name, code, text = controller.first_error
            what = text if text.startswith(name) else f"{name}: {text}"
            raise Problem(code, what, *controller.explained.get(name, ("", "")))
        serving = len(controller.endpoints)
        if serving == self._job.shards:
            self._whole_at = now
        elif now - max(began, self._whole_at) > START_TIMEOUT_S:
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
            self._standby.do(StopWork())
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

    # At the end

    def _finish(self, context: "zmq.Context[zmq.Socket[bytes]]") -> Trained:
        """Fetch what the shards have, then let them save and end."""
        self.journal.enter("saving", time.monotonic())
        self._show(time.monotonic(), last=True)
        with ThreadPoolExecutor(1) as pool:
            keys = None if self._keyring is None else self._keyring.of(LAUNCHER)
            me = Identity(run=self._run, w=LAUNCHER, token=self._token)
            fetching = pool.submit(
                fetch_trained, ZmqClient(context, keys), me, self._locate, START_TIMEOUT_S
            )
            while not fetching.done():  # a shard may be lost even now
                self._standby.follow(TICK_S)
                now = time.monotonic()
                self._staff.look_after_shards(now)
                self._staff.start_due(now)
                self.tell(now)
            trained, reports = fetching.result()
        try:
            self._folder.write("shards.json", reports)
        except OSError as error:  # what the shards themselves save matters more
            logger.error("%s/shards.json cannot be written: %s", self._folder.path, error)
        staleness = Staleness.merged(Staleness.from_dict(r["staleness"]) for r in reports)
        self._account = replace(self._controller.account)
        result = self._result
        result.samples = min(min(report["samples"]) for report in reports)
        result.updates = min(min(report["version"]) for report in reports)
        result.staleness = dict(staleness.summary())
        self._is_proven = self._account.prove(self._counted(reports))
        result.lost_double_fault = sum(report["lost_double_fault"] for report in reports)
        self._standby.do(HaltShards(time.monotonic()))
        in_time = self._wait_for_shards()
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

    def _counted(self, reports: list[Any]) -> list[int]:  # Any: JSON
        """Samples that shards have applied since this start, part by part."""
        before = self._controller.samples_before
        counted: list[int] = []
        for report in reports:
            samples = report["samples"]
            begun = before.get(f"shard{report['shard']}") or (0,) * len(samples)
            counted += [now - then for now, then in zip(samples, begun, strict=True)]
        return counted

    def _locate(self) -> list[str]:
        """Where the shards are, empty for one that is on its way. Another thread asks."""
        endpoints = dict(self._controller.endpoints)
        return [endpoints.get(i, "") for i in range(self._job.shards)]

    @property
    def _is_complete(self) -> bool:
        """The job came to its own end, or nobody has asked for another."""
        queue = self._controller.queue
        is_all = queue.is_exhausted and not queue.unfinished_samples
        return is_all or not (self._stop.level or self._staff.are_all_drained)

    def _wait_for_shards(self) -> bool:
        """Serve shards until all have ended; False if they take too long."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while not self._staff.are_shards_gone:
            self._standby.follow(TICK_S)
            self.tell(time.monotonic())
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
        result.worker_samples = {
            name: controller.worker_samples[name] for name in self._staff.workers
        }
        result.workers_lost = len(controller.lost)
        result.shard_restarts = self._staff.shard_restarts
        result.controller_restarts = self._standby.num_restarts
        result.drained = list(controller.drained)
        loss = controller.pace.mean_loss
        result.train_loss = None if loss is None else round(loss, 6)
        result.train_s = round(controller.pace.train_s, 3)
        samples = result.samples - self._samples_before
        result.samples_per_s = round(samples / max(controller.pace.train_s, 1e-9), 1)
        result.skipped_samples = controller.skipped_samples
        result.accounting = {
            "handed_out": controller.queue.handed_out,
            **(self._account or controller.account).as_dict(),
            "returned": controller.queue.returned_samples,
            "in_flight": controller.queue.in_flight,
            "adds_up": controller.adds_up and self._is_proven,
        }
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


def begin_of(job: Job, run: str, path: Path, attempt: int, layout: Layout | None) -> Begin:
    """What the monitor is told of a job first. Nothing of it is secret."""
    until = Until.parse(job.until)
    unit, target = "epochs", float(until.epochs or 0)
    if until.updates is not None:
        unit, target = "updates", float(until.updates)
    if until.seconds is not None:
        unit, target = "seconds", float(until.seconds)
    if job.script.path:
        unit, target = "none", 0.0
    return Begin(
        at=time.time(),
        run=run,
        name=Path(job.script.path).name if job.script.path else job.model.factory,
        attempt=attempt,
        version=__version__,
        engine=job.engine,
        num_workers=job.workers,
        num_shards=job.shards,
        config=json.loads(job.to_json()),
        parameters=0 if layout is None else layout.total,
        unit=unit,
        target=target,
        run_path=str(path.resolve()),
    )
