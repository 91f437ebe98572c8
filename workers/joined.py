"""Joined: the session of a process that the launcher started, with its shards and controller."""

import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from distbelief.param_server.client import Client
from distbelief.param_server.compress import Compression
from distbelief.param_server.contract import Contract
from distbelief.param_server.history import History
from distbelief.param_server.identity import Identity
from distbelief.param_server.reporter import Reporter
from distbelief.param_server.transport import ClientTransport
from distbelief.workers.comm import Calls, Comm
from distbelief.workers.control import Control
from distbelief.workers.diary import Diary
from distbelief.workers.lease import Lease
from distbelief.workers.notes import (
    Beat,
    Denied,
    Drain,
    Halt,
    Leaving,
    Next,
    Over,
    Shards,
    Stepped,
    Wait,
    Where,
    Who,
    Work,
)
from distbelief.workers.session import Replica, Stopped, WorkerInfo
from distbelief.workers.staging import Known

logger = logging.getLogger(__name__)

BEAT_S = 0.5
"""A script's process asks this often, between two steps, whether it should stop."""
TOLD_MAX = 32
"""Notes without a reply between two such questions: a queue full of notes to a controller that
is gone would block for ever (transport.HWM)."""


class Joined:
    """The session of a process that the launcher started."""

    def __init__(
        self,
        identity: Identity,
        control: Control,
        make_transport: Callable[[], ClientTransport],
        info: WorkerInfo,
        seed: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        *,
        compression: Compression | None = None,
        backup_bytes: int = 0,
        waits: bool = False,
        locate: Callable[[], Sequence[str]] | None = None,
        history: Path | None = None,
        is_leaving: Callable[[], bool] = lambda: False,
        reporter: Reporter | None = None,
        log_grad_norm: bool = False,
    ) -> None:
        """control: the caller's to close. The rest: as of `Worker`."""
        self.info = info
        self.seed = seed
        self.downpour: Replica | None = None
        self.is_stopped = False
        self.is_drained = False
        """It is stopped, and the run goes on without it."""
        self._is_leaving = is_leaving
        self.num_taken = 0
        """Samples taken for the script's loader."""
        self.num_counted = 0
        """Samples of the batches that were handed to the script."""
        self.asked_for_leases = False
        self._identity = identity
        self._who: Who = {
            "run": identity.run,
            "token": identity.token,
            "name": identity.w,
            "inc": identity.inc,
        }
        self._control = control
        self._make_transport = make_transport
        self._compression = compression
        self._backup_bytes = backup_bytes
        self._waits = waits
        self._locate = locate
        self._history = history
        self._clock = clock
        self._sleep = sleep
        self._comm: Comm | None = None
        self._leases = 0
        self._count = 0
        self._dropped = 0
        self._told_pushes = 0
        self._num_told = 0
        self._beaten_at = clock()
        self._iteration = 0
        self._epoch = -1
        self._is_first = True
        """No lease was asked for in this iteration."""
        self._has_given = False
        self._has_trained = False
        """In this iteration."""
        self._reporter = reporter
        self._log_grad_norm = log_grad_norm
        self._diary = Diary()
        self._seen_pushes = 0

    @property
    def is_shared(self) -> bool:
        return True

    def join(self, contract: Contract) -> tuple[Calls, bool]:
        if self._comm is not None:
            raise ValueError(
                "this process has a Downpour already: give all parameters to one, as groups"
            )
        me = self._identity
        where = Where(
            **self._who, pid=os.getpid(), host=socket.gethostname(), num_samples=0, digest=""
        )
        if self._is_leaving():
            self._leave()
        shards = self._control.until(where, Shards)
        if shards is None:
            self._stop()
        assert shards is not None
        self._comm = Comm(
            lambda: Client(
                self._make_transport(),
                shards.endpoints,
                me,
                contract,
                memory=True,
                compression=self._compression,
                backup_bytes=self._backup_bytes,
                waits=self._waits,
                locate=self._locate,
                history=None if self._history is None else History(self._history, me.w, me.inc),
            ),
            name=f"comm-{me.w}",
        )
        self._comm.start()
        self._comm.connect()
        return self._comm, shards.initialise

    def begin(self, downpour: Replica) -> None:
        self.downpour = downpour
        downpour.measures_norm = self._log_grad_norm
        self._diary.device = downpour.device
        self._diary.begin(self._clock())
        self._tell(0)

    def stepped(self, downpour: Replica) -> None:
        if self.num_taken and not self.num_counted:
            raise ValueError(
                "samples are taken from distbelief.DataLoader, but its batches are not: a library "
                "has made a loader of its own around its sampler, and nobody can count what is "
                "trained on. Give it the loader unprepared, as docs/examples/huggingface_digits.py"
            )
        if downpour.num_steps == 1 and not self.num_taken and self.info.count > 1:
            text = (
                f"no distbelief.DataLoader with shuffle=True is in use: each of the "
                f"{self.info.count} workers goes through all of the data, and a step counts as one "
                "sample unless it is told: step(samples=n)"
            )
            logger.warning(text)
            sys.stderr.write(f"distbelief: {text}\n")
        self._write_down(downpour)
        self._tell(downpour.last_samples)
        if self._is_leaving():
            self._leave()
        now = self._clock()
        if now - self._beaten_at < BEAT_S and self._num_told < TOLD_MAX:
            return
        self._beaten_at, self._num_told = now, 0
        answer = self._control.ask(Beat(**self._who))
        if isinstance(answer, Drain):
            self._leave()
        if isinstance(answer, Halt):
            self._stop()

    def iterate(self) -> int:
        # An iteration that only looked at samples, as to see their shape or to measure accuracy,
        # is no epoch: they come again. One that was given nothing is: others had it all.
        if self._has_trained or not self._has_given:
            self._epoch += 1
        self._iteration += 1
        self._is_first, self._has_given, self._has_trained = True, False, False
        return self._iteration

    def take(self, num_samples: int, batch_size: int, iteration: int) -> Lease | None:
        self._check_newest(iteration)
        self.asked_for_leases = True
        while True:
            if self._is_first:
                self._settle()
            answer = self._control.ask(
                Next(
                    **self._who,
                    taken=self._leases,
                    upto=self._epoch,
                    num_samples=num_samples,
                    batch_size=batch_size,
                    is_first=self._is_first,
                    kept=self.downpour.claimed_samples if self.downpour is not None else 0,
                )
            )
            if isinstance(answer, Work):
                self._is_first, self._has_given = False, True
                self._leases += 1
                self.num_taken += answer.stop - answer.start
                return Lease(answer.epoch, answer.start, answer.stop)
            if isinstance(answer, Drain) or self._is_leaving():
                self._leave()
            if isinstance(answer, Halt):
                self._stop()
            if isinstance(answer, Denied):
                raise ValueError(
                    f"{answer.text}. All loaders with shuffle=True share one set of training data: "
                    "leave it out for others, such as the test data"
                )
            if isinstance(answer, Over):
                return None
            assert isinstance(answer, Wait)
            self._sleep(0.1)

    def forget_count(self) -> None:
        self._count = 0

    def count(self, num_samples: int, iteration: int) -> None:
        self._check_newest(iteration)
        self._count += num_samples
        self.num_counted += num_samples

    def wait_for_data(self, seconds: float) -> None:
        self._diary.wait_for_data(seconds)

    def uncount(self, num_samples: int) -> None:
        self._dropped += num_samples

    def take_count(self) -> int:
        count, self._count = self._count, 0
        self._has_trained = self._has_trained or count > 0
        return count

    def end(self) -> None:
        """The script has ended: push what is left, and say that this worker pushes no more.

        Raises: Refused, ShardUnavailable.
        """
        downpour = self.downpour
        if downpour is not None and downpour.num_steps:
            self._settle()
            self._report(downpour, is_last=True)
            downpour.merge_buffers()
            downpour.leave()

    def close(self) -> None:
        """End the comm thread. May be called twice."""
        if self._comm is not None:
            self._comm.close()

    def _write_down(self, downpour: Replica) -> None:
        """A step, for the monitor."""
        pushed = downpour.last_pushed if downpour.num_answered > self._seen_pushes else None
        self._seen_pushes, loss = downpour.num_answered, downpour.last_loss
        now = self._clock()
        self._diary.end(
            now,
            time.time(),
            downpour.exchange,
            downpour.last_samples,
            None if pushed is None else pushed.staleness,
            0 if pushed is None else pushed.version,
            None if loss is None else Known(loss),
            downpour.grad_norm,
        )
        self._report(downpour)

    def _report(self, downpour: Replica, *, is_last: bool = False) -> None:
        """Tell the monitor, if it is time."""
        if self._reporter is not None and (is_last or self._reporter.is_due):
            now, traffic = self._clock(), downpour.traffic
            self._reporter.tell(lambda head: self._diary.report(head, now, traffic))

    def _settle(self) -> None:
        """Have every push answered, and tell it."""
        downpour = self.downpour
        if downpour is not None:
            if downpour.has_unanswered:
                downpour.flush()
            self._tell(0)

    def _check_newest(self, iteration: int) -> None:
        if iteration != self._iteration:
            raise ValueError(
                "two iterations over shuffled data at a time: a new one has begun, and the samples "
                "of this one have gone to other workers. Leave out shuffle=True for the data that "
                "this worker is not to share"
            )

    def _leave(self) -> None:
        """End the script; `end` then pushes what has accrued, and the rest is for others."""
        if not self.is_drained:
            self.is_drained = True
            self._control.tell(Leaving(**self._who))
        self._stop()

    def _stop(self) -> None:
        self.is_stopped = True
        raise Stopped

    def _tell(self, samples: int) -> None:
        downpour = self.downpour
        assert downpour is not None
        is_new = downpour.num_answered > self._told_pushes
        self._told_pushes = downpour.num_answered
        self._num_told += 1
        loss = downpour.last_loss
        knows_loss = loss is not None and math.isfinite(loss)
        self._control.tell(
            Stepped(
                **self._who,
                answered=downpour.answered_samples,
                skipped=downpour.skipped_samples + self._dropped,
                samples=samples,
                loss=loss if loss is not None and knows_loss else 0.0,
                knows_loss=knows_loss,
                **downpour.outcome(is_new),
            )
        )
