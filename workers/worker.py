"""Worker: the loop of one model replica: take a lease, train on it, tell what it brought.

Knows nothing of how it was started. The controller hands out leases; parameters come from and
gradients go to the shards by way of Downpour.
"""

import logging
import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from distbelief.param_server.buffers import BufferLayout
from distbelief.param_server.client import Client, Identity
from distbelief.param_server.contract import Contract
from distbelief.param_server.errors import DistBeliefError
from distbelief.param_server.layout import trainable
from distbelief.param_server.transport import ClientTransport
from distbelief.workers.comm import Comm
from distbelief.workers.control import Control, Next, Shards, Stepped, Where, Work
from distbelief.workers.data import Images
from distbelief.workers.downpour import Downpour, DownpourConfig
from distbelief.workers.lease import batches, epoch_order

logger = logging.getLogger(__name__)


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
    device: str = "cpu"
    downpour: DownpourConfig = field(default_factory=DownpourConfig)

    def __post_init__(self) -> None:
        for name in ("batch_size", "merge_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def loss_of(model: nn.Module, outputs: object, targets: Tensor) -> Tensor:
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
        data: Images,
        control: Control,
        make_transport: Callable[[], ClientTransport],
    ) -> None:
        """model: in its first state, the same on every worker. control: the caller's to close.

        make_transport: called in the comm thread, which closes what it returns.
        """
        self._config = config
        self._identity = identity
        self._model = model.to(config.device)
        self._contract = contract
        self._data = data
        self._control = control
        self._make_transport = make_transport
        self._buffers = BufferLayout.of(model)
        self._order: tuple[int, Tensor] | None = None
        self._samples = 0
        self._told_pushes = 0
        self._samples_since_merge = 0
        self._steps_since_merge = 0

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
        )
        shards = self._control.until(where, Shards)
        if shards is None:
            return

        def make_client() -> Client:
            return Client(self._make_transport(), shards.endpoints, me, self._contract)

        named = trainable(self._model.named_parameters())
        with Comm(make_client, name=f"comm-{me.w}") as comm:
            comm.connect()
            downpour = Downpour(named, comm, self._contract, self._config.downpour)
            try:
                downpour.start(initialise=shards.initialise)
                self._train(downpour)
            finally:
                downpour.close()

    def _train(self, downpour: Downpour) -> None:
        me = self._identity
        self._model.train()
        taken = 0

        def finish() -> None:
            if self._samples > downpour.answered_samples:
                downpour.flush()
                self._tell(downpour, 0, 0.0)

        while True:
            note = Next(run=me.run, token=me.token, name=me.w, inc=me.inc, taken=taken)
            work = self._control.until(note, Work, on_idle=finish)
            if work is None:
                break
            taken += 1
            order = self._epoch(work.epoch)
            for start, stop in batches(work.start, work.stop, self._config.batch_size):
                indices = order[start:stop]
                loss = self._step(downpour, indices, work, start)
                self._tell(downpour, len(indices), loss)
        self._merge(downpour)
        downpour.leave()

    def _step(self, downpour: Downpour, indices: Tensor, work: Work, start: int) -> float:
        inputs, targets = self._data.batch(indices)
        inputs, targets = inputs.to(self._config.device), targets.to(self._config.device)
        downpour.zero_grad()
        loss = loss_of(self._model, self._model(inputs), targets)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteLoss(
                f"{self._identity.w}: the loss is {value} at step {downpour.num_steps}, epoch "
                f"{work.epoch}, samples {start} to {start + len(indices)}; nothing was pushed. "
                "Lower the learning rate, lower the momentum (it adds to what asynchrony brings), "
                "or clip: --set train.clip_norm=5"
            )
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        downpour.step(samples=len(indices))
        self._samples += len(indices)
        self._samples_since_merge += len(indices)
        self._steps_since_merge += 1
        if self._steps_since_merge >= self._config.merge_every_steps:
            self._merge(downpour)
        return value

    def _tell(self, downpour: Downpour, samples: int, loss: float) -> None:
        """Tell what a step brought, and what of earlier steps was answered since."""
        me, pushed = self._identity, downpour.last_pushed
        is_new = pushed is not None and downpour.num_answered > self._told_pushes
        refused, reason = 0, ""
        if pushed is not None and is_new and pushed.is_partial:
            refused = sum(pushed.statuses.values()) - pushed.statuses["applied"]
            reason = pushed.reasons[0] if pushed.reasons else ""
            logger.warning("%s push=%d refused parts=%d: %s", me.w, pushed.seq, refused, reason)
        self._control.tell(
            Stepped(
                run=me.run,
                token=me.token,
                name=me.w,
                inc=me.inc,
                answered=downpour.answered_samples,
                samples=samples,
                loss=loss,
                pushed=is_new,
                staleness=pushed.staleness if pushed is not None else 0,
                version=pushed.version if pushed is not None else 0,
                refused=refused,
                reason=reason,
            )
        )
        self._told_pushes = downpour.num_answered

    def _merge(self, downpour: Downpour) -> None:
        """Contribute this replica's buffers and take the merged ones."""
        layout = self._buffers
        if not (layout.num_floats or layout.num_integers):
            return
        merged = downpour.merge(self._samples_since_merge, *layout.read(self._model))
        if merged is not None:
            layout.write_(self._model, *merged)
        self._samples_since_merge = self._steps_since_merge = 0

    def _epoch(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            order = epoch_order(self._config.seed, epoch, len(self._data))
            self._order = (epoch, order)
        return self._order[1]
