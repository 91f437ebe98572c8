"""Downpour: the policy of when to push and when to fetch; a `torch.optim.Optimizer` to its user.

The client's pseudo-code of Dean et al. 2012 (appendix), with step counted from 0:

    if step % n_fetch == 0: fetch                 asynchronously
    gradient = compute(parameters, batch)
    accrued += gradient
    parameters -= alpha * gradient                the local step
    if step % n_push == 0: push accrued; accrued = 0
    step += 1

so the first push carries one gradient and later ones n_push, as a sum. Two fetch policies:

`fresh`   waits for the answer to its own push, which brings the fresh parameters in the same
          round trip. With one worker the staleness is 0 and training equals plain torch. The
          local step is taken only where no fetch would overwrite it at once (n_fetch > 1).
`latest`  never waits: the paper's weakly synchronised threads. One push is on its way at a
          time (depth 1); gradients that come meanwhile accrue for the next one. Parameters turn
          to what was fetched as soon as it is there, between two steps.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import Parameter

from distbelief.param_server.client import Client, Fetched, Pushed, PushTicket
from distbelief.param_server.contract import Contract
from distbelief.param_server.link import Ticket
from distbelief.workers.arena import Arena
from distbelief.workers.comm import Comm

FETCH_POLICIES = ("fresh", "latest")


@dataclass(frozen=True, slots=True, kw_only=True)
class DownpourConfig:
    """When a worker pushes and fetches."""

    n_fetch: int = 1
    """Fetch before every n-th step. The paper's experiments use 1."""
    n_push: int = 1
    """Push after every n-th step. The paper's experiments use 1."""
    fetch_policy: str = "fresh"
    """fresh: wait for the answer to the own push. latest: never wait."""
    local_lr: float = 0.0
    """The paper's alpha: rate of the plain local step between two fetches; 0 takes none."""
    clip_norm: float = 0.0
    """The whole gradient is scaled down to this norm before it leaves; 0 switches it off."""

    def __post_init__(self) -> None:
        for name in ("n_fetch", "n_push"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.fetch_policy not in FETCH_POLICIES:
            raise ValueError(
                f"fetch_policy {self.fetch_policy!r} is none of {', '.join(FETCH_POLICIES)}"
            )
        for name in ("local_lr", "clip_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


class Downpour(torch.optim.Optimizer):
    """Pushes the gradients of a replica and keeps its parameters up to date.

    `zero_grad()` opens a step and `step(samples=n)` ends it. Between the two, gradients may be
    read and changed in place. Nothing leaves before `step()`.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, Parameter]],
        comm: Comm,
        contract: Contract,
        config: DownpourConfig | None = None,
    ) -> None:
        """named: as `layout.trainable` returns; the contract's layout is of these.

        comm: of a client with this contract. It stays the caller's to close.
        """
        layout = contract.layout
        grouped: list[dict[str, Any]] = [  # Any: torch's type of a parameter group
            {
                "params": [
                    p for (_, p), e in zip(named, layout.entries, strict=True) if e.group == i
                ],
                "lr": group.lr,
                "weight_decay": group.weight_decay,
            }
            for i, group in enumerate(layout.groups)
        ]
        super().__init__([group for group in grouped if group["params"]], {})
        self._lrs = [group["lr"] for group in self.param_groups]
        self._comm = comm
        self._contract = contract
        self._config = config or DownpourConfig()
        self._arena = Arena(layout, named)
        self._current, self._next = Fetched(layout), Fetched(layout)
        self._accrued = torch.zeros(layout.total) if self._accrues else self._arena.grad
        self._sending = torch.zeros(layout.total) if self._config.fetch_policy == "latest" else None
        self._accrued_samples = 0
        self._accrued_absent: set[str] | None = None
        self._base = self._current
        """The copy that the newest gradient in the sum was computed on."""
        self._future: Future[Ticket] | None = None
        self._future_fetches = False
        self._is_fetch_due = False
        self.num_steps = 0
        """Steps taken."""
        self.last_pushed: Pushed | None = None
        """What became of the newest push that was answered."""
        self.num_answered = 0
        """Pushes answered."""
        self.answered_samples = 0
        """Samples whose pushes were answered, applied or refused."""
        self._accrued_steps = 0
        self._sent_samples = 0

    @property
    def _accrues(self) -> bool:
        return self._config.n_push > 1 or self._config.fetch_policy == "latest"

    def start(self, *, initialise: bool) -> None:
        """Fetch the parameters, after bringing this replica's own as the first if it is to.

        Raises: Refused, ShardUnavailable.
        """
        if initialise:
            values = self._arena.gather()
            self._run(_whole(lambda client: client.initialise(values)))
        self._run(_whole(lambda client: client.fetch(self._current)))
        self._arena.bind(self._current.values)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begin a step: no parameter has a gradient. `set_to_none` is there for torch's sake."""
        self._arena.zero_grad()

    @overload
    def step(self, closure: None = None, *, samples: int = 1) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], *, samples: int = 1) -> float: ...

    def step(self, closure: Callable[[], float] | None = None, *, samples: int = 1) -> float | None:
        """End a step: accrue its gradient, push and fetch as the policy says.

        samples: how many samples the gradient is the mean of; counted, not multiplied.
        Raises: ValueError for a sparse gradient or a learning rate that was changed here;
            Refused, ShardUnavailable.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_lr()
        absent = self._arena.collect()
        if self._config.clip_norm:
            clip_(self._arena.grad, self._config.clip_norm)
        self._accrue(samples, absent)
        is_push_due = self.num_steps % self._config.n_push == 0
        self.num_steps += 1
        is_fetch_due = self.num_steps % self._config.n_fetch == 0
        if self._config.fetch_policy == "fresh":
            self._step_fresh(is_push_due, is_fetch_due)
        else:
            self._step_latest(is_push_due, is_fetch_due)
        return loss

    def flush(self) -> None:
        """Push what has accrued, wait for every answer, and take the fresh parameters."""
        self._settle(wait=True)
        if self._accrued_steps:
            self._push(into=self._next)
        else:
            self._fetch()
        self._settle(wait=True)

    def merge(self, samples: int, floats: Tensor, integers: Tensor) -> tuple[Tensor, Tensor] | None:
        """Contribute buffers and wait for the merged ones, as `Client.merge`."""
        merged: list[tuple[Tensor, Tensor] | None] = []
        self._run(_whole(lambda client: merged.append(client.merge(samples, floats, integers))))
        return merged[0]

    def leave(self) -> None:
        """Say that this worker pushes no more."""
        self._run(_whole(lambda client: client.leave()))

    def close(self) -> None:
        """Take the hooks off the parameters."""
        self._arena.close()

    # Policies

    def _step_fresh(self, is_push_due: bool, is_fetch_due: bool) -> None:
        if is_push_due:
            self._push(into=self._next if is_fetch_due else None)
        elif is_fetch_due:
            self._fetch()
        if not is_fetch_due:
            self._step_locally()
        self._settle(wait=True)

    def _step_latest(self, is_push_due: bool, is_fetch_due: bool) -> None:
        self._step_locally()
        self._settle(wait=False)
        self._is_fetch_due = self._is_fetch_due or is_fetch_due
        if self._future is not None:
            return  # the gradient stays accrued and goes with a later push
        # A push that fell due while another was on its way is made up for now.
        if is_push_due or self._accrued_steps >= self._config.n_push:
            self._push(into=self._next if self._is_fetch_due else None)
        elif self._is_fetch_due:
            self._fetch()

    def _step_locally(self) -> None:
        if self._config.local_lr:
            self._current.values.add_(self._arena.grad, alpha=-self._config.local_lr)
            self._arena.bind(self._current.values)

    # Moves

    def _accrue(self, samples: int, absent: Iterable[str]) -> None:
        self._accrued_steps += 1
        self._accrued_samples += samples
        # Its versions, not the copy: by the time of the push a newer one may be current.
        self._base = copy(self._current)
        self._base.version, self._base.bseq = self._base.version[:], self._base.bseq[:]
        if self._accrued is not self._arena.grad:
            self._accrued.add_(self._arena.grad)
        if self._accrued_absent is None:
            self._accrued_absent = set(absent)
        else:  # absent from the sum only if it was from every gradient in it
            self._accrued_absent &= set(absent)

    def _push(self, into: Fetched | None) -> None:
        assert self._future is None
        absent = self._contract.layout.absent_masks(self._accrued_absent or ())
        samples, base, grad = self._accrued_samples, self._base, self._accrued
        self._future = self._comm.submit(
            lambda client: client.start_push(grad, samples, base, absent, into)
        )
        self._future_fetches = into is not None
        if into is not None:
            self._is_fetch_due = False
        self._sent_samples = samples
        self._accrued_steps = self._accrued_samples = 0
        self._accrued_absent = None
        if self._sending is not None:  # the gradient on its way must not change: take the other
            self._accrued, self._sending = self._sending, self._accrued
            self._accrued.zero_()

    def _fetch(self) -> None:
        assert self._future is None
        into = self._next
        self._future = self._comm.submit(lambda client: client.start_fetch(into))
        self._future_fetches = True
        self._is_fetch_due = False

    def _settle(self, *, wait: bool) -> None:
        """Take the answer to what is on its way, if it is there or is to be waited for."""
        if self._future is None or not (wait or self._future.done()):
            return
        ticket = self._future.result()
        self._future = None
        if isinstance(ticket, PushTicket):
            self.last_pushed = ticket.pushed
            self.num_answered += 1
            self.answered_samples += self._sent_samples
            if self._sending is None and self._accrues:
                self._accrued.zero_()
        if self._future_fetches:
            self._current, self._next = self._next, self._current
            self._arena.bind(self._current.values)

    def _run(self, call: Callable[[Client], Ticket]) -> None:
        self._comm.submit(call).result()

    def _check_lr(self) -> None:
        for group, lr in zip(self.param_groups, self._lrs, strict=True):
            if group["lr"] != lr:
                raise ValueError(
                    f"the learning rate was changed from {lr} to {group['lr']} on this worker, "
                    "but the shards apply the updates: describe its course by the job's "
                    "schedule (train.schedule), which every shard follows by samples applied"
                )


def clip_(grad: Tensor, limit: float) -> None:
    """Scale a gradient down to a norm in place, as torch.nn.utils.clip_grad_norm_ does.

    A gradient whose norm is not finite becomes NaN throughout, and every shard refuses it.
    """
    norm = float(torch.linalg.vector_norm(grad))
    if math.isfinite(norm):
        grad.mul_(min(1.0, limit / (norm + 1e-6)))
    else:  # of no use as a whole: so that no shard takes the parts that happen to be finite
        grad.fill_(math.nan)


def _whole(conversation: Callable[[Client], object]) -> Callable[[Client], Ticket]:
    """A conversation that waits for its replies itself, as one call of the comm thread."""

    def call(client: Client) -> Ticket:
        conversation(client)
        return Ticket(0)

    return call
