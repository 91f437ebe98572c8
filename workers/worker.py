"""Worker: the loop of one model replica: take a lease, train on it, tell what it brought.

Knows nothing of how it was started, nor where data comes from. The controller hands out leases,
the feed makes batches of them; parameters come from and gradients go to the shards by way of
Downpour.
"""

import logging
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from distbelief.param_server.buffers import BufferLayout
from distbelief.param_server.client import Client
from distbelief.param_server.compress import Compression
from distbelief.param_server.contract import Contract
from distbelief.param_server.errors import DistBeliefError, RemoteProtocolError
from distbelief.param_server.history import History
from distbelief.param_server.identity import Identity
from distbelief.param_server.layout import trainable
from distbelief.param_server.reporter import Reporter
from distbelief.param_server.transport import ClientTransport
from distbelief.param_server.wire import sayable
from distbelief.workers.comm import Comm
from distbelief.workers.compute import Compute, ComputeConfig
from distbelief.workers.control import Control
from distbelief.workers.diary import Diary
from distbelief.workers.downpour import Downpour, DownpourConfig
from distbelief.workers.feed import Batch, Feed
from distbelief.workers.lease import Lease
from distbelief.workers.meter import Meter
from distbelief.workers.notes import (
    Bad,
    Beat,
    Denied,
    Drain,
    Halt,
    Leaving,
    Next,
    Shards,
    Stepped,
    Wait,
    Where,
    Work,
)
from distbelief.workers.split import Split
from distbelief.workers.staging import Reading

logger = logging.getLogger(__name__)

BEAT_S = 0.5
"""A worker asks this often, between two steps, whether it is to leave."""
BAD_MAX = 16
"""Bad samples in one note."""
NAME_MAX = 400
"""Characters of a sample's name in a note, from its end, and of why it is bad."""


class NonFiniteLoss(DistBeliefError):
    """The loss is NaN or Inf: the parameters, or this batch, are beyond use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """How a worker trains."""

    batch_size: int = 32
    """Samples in a batch of one worker; the last of an epoch may be shorter, or longer by one."""
    seed: int = 0
    """Of the job: the order of the data follows from it and is the same for all workers."""
    merge_every_steps: int = 20
    """Steps between two contributions of buffers such as BatchNorm's statistics."""
    num_loaders: int = 0
    """Processes that read and decode batches ahead; 0 does it between two steps."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    downpour: DownpourConfig = field(default_factory=DownpourConfig)
    compression: Compression = field(default_factory=Compression)
    """Of what goes to and comes from shards of other hosts."""
    backup_bytes: int = 0
    """Pushed gradients that are kept until they are durable, in bytes; see backup.py."""
    waits: bool = False
    """A push is done when it is durable."""
    meter: float = 0.0
    """Share of the steps whose gradient is computed again; see meter.py."""
    log_grad_norm: bool = False
    """Tell the monitor the norm of each gradient."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "merge_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_loaders < 0:
            raise ValueError(f"num_loaders must be at least 0, got {self.num_loaders}")


def loss_of(model: nn.Module, outputs: object, targets: Any) -> Tensor:  # Any: as the data has it
    """The scalar to minimise: the model's own `loss(outputs, targets)` if it has one.

    Otherwise cross entropy of the outputs [B, classes] with the targets int64 [B].
    """
    own = getattr(model, "loss", None)
    if callable(own):
        loss = own(outputs, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"{type(model).__name__}.loss must return a scalar tensor, got {loss}")
        return loss
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"{type(model).__name__} returns a {type(outputs).__name__}: give it a method "
            "loss(outputs, targets) that makes a scalar of it"
        )
    return F.cross_entropy(outputs, targets)


class Worker:
    """One replica. `run` trains until the controller has no more work for it."""

    def __init__(
        self,
        config: WorkerConfig,
        identity: Identity,
        model: nn.Module,
        contract: Contract,
        split: Split,
        control: Control,
        make_transport: Callable[[], ClientTransport],
        locate: Callable[[], Sequence[str]] | None = None,
        history: Path | None = None,
        is_leaving: Callable[[], bool] = lambda: False,
        reporter: Reporter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """model: in its first state, the same on every worker. control: the caller's to close.

        make_transport: called in the comm thread, which closes what it returns.
        locate: as of `Client`. history: folder for a `History`. is_leaving: asked between two
        steps: the machine is about to go away. reporter: the caller's to close; None tells no
        monitor.
        """
        self.is_drained = False
        """It has left, or leaves, before the end of the run."""
        self._is_leaving = is_leaving
        self._clock = clock
        self._beaten_at = clock()
        self._locate = locate
        self._history = history
        self._config = config
        self._identity = identity
        self._compute = Compute(model, partial(loss_of, model), config.compute)
        self._model = self._compute.model
        self._contract = contract
        self._split = split
        self._control = control
        self._make_transport = make_transport
        self._buffers = BufferLayout.of(model)
        self._is_halted = False
        self._taken = 0
        self._samples = 0
        self._told_pushes = 0
        self._samples_since_merge = 0
        self._steps_since_merge = 0
        self._untold: deque[tuple[int, Reading]] = deque()
        """Steps that the controller has not been told of: their samples and losses."""
        self._left_out: deque[tuple[int, int]] = deque()
        """Samples that were not trained on: (trained on before them, how many)."""
        self._answered_left_out = 0
        self._bad: set[str] = set()
        self._reporter = reporter
        self._diary = Diary(device=config.compute.device)
        self._meter = Meter(
            self._model,
            partial(loss_of, self._model),
            config.meter,
            seed=identity.inc,
            precision=self._compute.precision,
        )

    def run(self) -> None:
        """Train until told to halt.

        Raises: NonFiniteLoss; Refused, ShardUnavailable, ControllerGone; whatever the model does.
        """
        me = self._identity
        where = Where(
            run=me.run,
            token=me.token,
            name=me.w,
            inc=me.inc,
            pid=os.getpid(),
            host=socket.gethostname(),
            num_samples=len(self._split),
            digest=self._split.digest,
        )
        # First of all, because it may fork: there is no comm thread yet.
        with Feed(
            self._split,
            self._next_lease,
            self._config.batch_size,
            seed=self._config.seed,
            num_loaders=self._config.num_loaders,
        ) as feed:
            shards = None if self._should_leave() else self._control.until(where, Shards)
            if shards is not None:
                self._join(feed, shards)

    def _join(self, feed: Feed, shards: Shards) -> None:
        me = self._identity

        def make_client() -> Client:
            return Client(
                self._make_transport(),
                shards.endpoints,
                me,
                self._contract,
                memory=True,
                compression=self._config.compression,
                backup_bytes=self._config.backup_bytes,
                waits=self._config.waits,
                locate=self._locate,
                history=None if self._history is None else History(self._history, me.w, me.inc),
            )

        named = trainable(self._model.named_parameters())
        with Comm(make_client, name=f"comm-{me.w}") as comm:
            comm.connect()
            downpour = Downpour.of(named, comm, self._contract, self._config.downpour)
            downpour.measures_norm = self._config.log_grad_norm
            try:
                downpour.start(initialise=shards.initialise)
                downpour.take_buffers(self._model)
                self._train(downpour, feed)
            finally:
                downpour.close()

    def _train(self, downpour: Downpour, feed: Feed) -> None:
        self._model.train()
        while not self._is_halted:
            self._diary.skip(time.monotonic())
            batches = feed.round()
            while (batch := self._wait_for(batches)) is not None:
                self._take(downpour, batch)
                if self._should_leave():
                    break  # what was read ahead is for others
            # No lease for now: others may wait for what is half done here.
            if self._samples > downpour.answered_samples:
                downpour.flush()
                self._tell_all(downpour, wait=True)
            self._report(downpour)
            if not (self._is_halted or self._should_leave()):
                self._control.pause()
        # Before the last words to the shards: while those are waited for it finds its way.
        self._report(downpour, is_last=True)
        self._merge(downpour)
        downpour.leave()

    def _wait_for(self, batches: Iterator[Batch]) -> Batch | None:
        began = time.monotonic()
        batch = next(batches, None)
        self._diary.wait_for_data(time.monotonic() - began)
        return batch

    def _should_leave(self) -> bool:
        """Whether to go before the end of the run; the controller is told at once."""
        if not (self.is_drained or self._is_halted):
            now, me = self._clock(), self._identity
            is_asked = self._is_leaving()
            if not is_asked and now - self._beaten_at >= BEAT_S:
                self._beaten_at = now
                beat = Beat(run=me.run, token=me.token, name=me.w, inc=me.inc)
                is_asked = isinstance(self._control.ask(beat), Drain)
            if is_asked:
                self._leave()
        return self.is_drained

    def _leave(self) -> None:
        me = self._identity
        self.is_drained = self._is_halted = True
        logger.info("worker %s leaves before the end", me.w)
        self._control.tell(Leaving(run=me.run, token=me.token, name=me.w, inc=me.inc))

    def _next_lease(self) -> Lease | None:
        """A lease, or None: to wait, or to halt."""
        me = self._identity
        note = Next(run=me.run, token=me.token, name=me.w, inc=me.inc, taken=self._taken)
        answer = self._control.ask(note)
        if isinstance(answer, Work):
            self._taken += 1
            return Lease(answer.epoch, answer.start, answer.stop)
        if isinstance(answer, Denied):
            raise DistBeliefError(answer.text)
        if isinstance(answer, Drain):
            if not self.is_drained:
                self._leave()
            return None
        if not isinstance(answer, Wait | Halt):
            raise RemoteProtocolError(f"{answer.op} in answer to {note.op}")
        self._is_halted = isinstance(answer, Halt)
        return None

    def _take(self, downpour: Downpour, batch: Batch) -> None:
        """Train on what could be read of a batch, and tell."""
        if batch.bad:
            self._tell_bad(batch)
        # Batch normalisation cannot train on one sample, and a run should not end because the
        # others of its batch were bad; where batches are of one sample, that is how they are.
        trained = 0 if batch.bad and batch.num_good == 1 else batch.num_good
        if trained:
            self._untold.append((trained, self._step(downpour, batch)))
        if trained < batch.num_positions:
            self._left_out.append((self._samples, batch.num_positions - trained))
        self._tell_all(downpour, wait=False)

    def _step(self, downpour: Downpour, batch: Batch) -> Reading:
        """Train on a batch; returns its loss, which a device may not have computed yet."""
        inputs, targets = self._compute.place(batch.inputs, batch.targets)
        began = time.monotonic()
        downpour.zero_grad()
        downpour.announce(batch.num_good)
        self._meter.begin()
        loss = self._compute.loss(inputs, targets)
        reading = downpour.watch(loss, partial(self._check, downpour.num_steps, batch))
        self._compute.backward(loss)
        self._diary.compute(time.monotonic() - began)
        self._meter.keep(loss)
        answered = downpour.num_answered
        downpour.step(samples=batch.num_good)
        pushed = downpour.last_pushed if downpour.num_answered > answered else None
        self._diary.end(
            time.monotonic(),
            time.time(),
            downpour.exchange,
            batch.num_good,
            None if pushed is None else pushed.staleness,
            0 if pushed is None else pushed.version,
            reading,
            downpour.grad_norm,
        )
        if pushed is not None:
            measured = self._meter.measure(inputs, targets, pushed.staleness)
            if measured is not None:
                self._diary.measure(measured)
        self._samples += batch.num_good
        self._samples_since_merge += batch.num_good
        self._steps_since_merge += 1
        if self._steps_since_merge >= self._config.merge_every_steps:
            self._merge(downpour)
        return reading

    def _check(self, step: int, batch: Batch, loss: float) -> None:
        """Raises: NonFiniteLoss. Nothing of the step has left then; see `Downpour.watch`."""
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"{self._identity.w}: the loss is {loss} at step {step}, epoch {batch.epoch}, "
                f"samples {batch.start} to {batch.stop}; nothing was pushed. Lower the learning "
                "rate, lower the momentum (it adds to what asynchrony brings), or clip: --set "
                "train.clip_norm=5"
            )

    def _tell_all(self, downpour: Downpour, *, wait: bool) -> None:
        """Tell of the steps whose loss is there, or wait for it, and of what was answered."""
        has_told = False
        while self._untold and (wait or self._untold[0][1].is_there):
            samples, loss = self._untold.popleft()
            self._tell(downpour, samples, loss.value)
            has_told = True
        if not has_told:
            self._tell(downpour, 0, 0.0)
        self._report(downpour)

    def _report(self, downpour: Downpour, *, is_last: bool = False) -> None:
        """Tell the monitor, if it is time."""
        if self._reporter is not None and (is_last or self._reporter.is_due):
            now, traffic = time.monotonic(), downpour.traffic
            self._reporter.tell(lambda head: self._diary.report(head, now, traffic))

    def _tell(self, downpour: Downpour, samples: int, loss: float) -> None:
        """Tell what a step brought, and what of earlier steps was answered since."""
        me = self._identity
        is_new = downpour.num_answered > self._told_pushes
        outcome = downpour.outcome(is_new)
        if outcome["refused"]:
            logger.warning("%s refused parts=%d: %s", me.w, outcome["refused"], outcome["reason"])
            self._compute.refused()
        # In their turn: a lease counts as done from its beginning on.
        while self._left_out and self._left_out[0][0] <= downpour.answered_samples:
            self._answered_left_out += self._left_out.popleft()[1]
        self._control.tell(
            Stepped(
                run=me.run,
                token=me.token,
                name=me.w,
                inc=me.inc,
                answered=downpour.answered_samples,
                left_out=self._answered_left_out,
                samples=samples,
                loss=loss,
                **outcome,
            )
        )
        self._told_pushes = downpour.num_answered

    def _tell_bad(self, batch: Batch) -> None:
        """Name samples that could not be read, each once."""
        me = self._identity
        new = [(name, why) for name, why in batch.bad if name not in self._bad]
        self._bad.update(name for name, _ in new)
        for name, why in new:
            logger.warning("%s left out %s: %s", me.w, name, why)
        for first in range(0, len(new), BAD_MAX):
            some = new[first : first + BAD_MAX]
            self._control.tell(
                Bad(
                    run=me.run,
                    token=me.token,
                    name=me.w,
                    inc=me.inc,
                    samples=tuple(sayable(name[-NAME_MAX:]) for name, _ in some),
                    reasons=tuple(sayable(why[:NAME_MAX]) for _, why in some),
                )
            )

    def _merge(self, downpour: Downpour) -> None:
        """Contribute this replica's buffers and take the merged ones."""
        layout = self._buffers
        if not (layout.num_floats or layout.num_integers):
            return
        merged = downpour.merge(self._samples_since_merge, *layout.read(self._model))
        if merged is not None:
            layout.write_(self._model, *merged)
        self._samples_since_merge = self._steps_since_merge = 0
