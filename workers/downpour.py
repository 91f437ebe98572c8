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

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from distbelief.param_server.buffers import BufferLayout
from distbelief.param_server.client import Client, Fetched, Pushed, PushTicket
from distbelief.param_server.contract import Contract
from distbelief.param_server.layout import layout_of
from distbelief.param_server.link import Ticket
from distbelief.param_server.protocol import checksum
from distbelief.param_server.schedule import Schedule
from distbelief.param_server.traffic import Traffic
from distbelief.param_server.update import make_rule
from distbelief.workers import session
from distbelief.workers.arena import Arena
from distbelief.workers.comm import Calls
from distbelief.workers.exchange import Exchange
from distbelief.workers.groups import Params, name_groups
from distbelief.workers.notes import Outcome
from distbelief.workers.outgoing import Outgoing
from distbelief.workers.overlap import Beginning, Overlap
from distbelief.workers.session import Session
from distbelief.workers.staging import AT_ONCE, Reading, Ready, staging_of

logger = logging.getLogger(__name__)

FETCH_POLICIES = ("fresh", "latest")
MERGE_EVERY_STEPS = 20
"""Steps of a script between two merges of its module's buffers."""


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
    overlap: bool | None = False
    """Parts leave while backward is still running; see overlap.py for what that excludes. None:
    by itself, where that is allowed and the first step shows one gradient a tensor."""

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
        if self.overlap and not self.may_overlap:
            raise ValueError(
                "overlap needs n_fetch = n_push = 1, fetch_policy 'fresh' and no clip_norm: "
                "a part that leaves early can neither be summed up nor clipped with the others"
            )

    @property
    def may_overlap(self) -> bool:
        """Parts may leave while backward is still running."""
        is_plain = self.n_fetch == self.n_push == 1 and self.fetch_policy == "fresh"
        return is_plain and self.clip_norm == 0


class Downpour(torch.optim.Optimizer):
    """Pushes the gradients of a replica and keeps its parameters up to date.

    In a script it takes the place of an optimizer of torch: `distbelief launch script.py` runs
    the script once in each worker; by itself the script trains alone. The update rule runs on the
    shards; all parameters that differ from theirs are brought or fetched when it is made, so load
    weights before.

    Gradients may be read and changed in place between backward and `step()`, as by
    `clip_grad_norm_` or a `GradScaler`; they accumulate until `zero_grad()`, as in torch. Nothing
    leaves before `step()`.
    """

    _arena: Arena
    _session: Session | None
    _module: nn.Module | None
    _frozen: list[tuple[str, Parameter]]
    _first_checksum: int | None

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        rule: str | None = None,
        momentum: float | None = None,
        beta1: float | None = None,
        beta2: float | None = None,
        eps: float | None = None,
        weight_decay: float = 0.0,
        schedule: Schedule | None = None,
        n_fetch: int = 1,
        n_push: int = 1,
        fetch_policy: str = "fresh",
        local_lr: float = 0.0,
        clip_norm: float = 0.0,
        clip_part_norm: float = 0.0,
        overlap: bool = False,
        module: nn.Module | None = None,
    ) -> None:
        """params: as of torch's optimizers: parameters, (name, parameter) pairs, or groups, which
        may differ in lr and weight_decay.

        rule: sgd, momentum, nesterov, adagrad, adam or adamw; by default momentum where a
        momentum is given, else sgd. momentum, beta1, beta2, eps: of the rule.
        schedule: of the rate by samples applied, on the shards; a rate that is changed here, as
        torch's schedulers do, is refused by the next step.
        n_fetch, n_push, fetch_policy, local_lr, clip_norm, overlap: see DownpourConfig.
        clip_part_norm: each part's gradient is clipped to it by its shard.
        module: gives the parameters their names, and its buffers (BatchNorm's statistics) are
        merged over the workers.

        Raises: ValueError for what cannot be trained, or a second Downpour in one process;
            Refused where other workers came with another model or rule; ShardUnavailable.
        """
        given = {"momentum": momentum, "beta1": beta1, "beta2": beta2, "eps": eps}
        rule = rule or ("sgd" if momentum is None else "momentum")
        made = name_groups(params, lr, weight_decay, module)
        contract = Contract(
            layout=layout_of(made.named, made.groups, made.group_of),
            rule=make_rule(rule, **{k: v for k, v in given.items() if v is not None}),
            schedule=schedule or Schedule(),
            clip_part_norm=clip_part_norm,
            buffers=BufferLayout() if module is None else BufferLayout.of(module),
        )
        config = DownpourConfig(
            n_fetch=n_fetch,
            n_push=n_push,
            fetch_policy=fetch_policy,
            local_lr=local_lr,
            clip_norm=clip_norm,
            overlap=overlap,
        )
        here = session.current()
        comm, initialise = here.join(contract)
        self._bind(made.named, comm, contract, config, is_script=True)
        self._session = here
        self._module = module
        self._frozen = made.frozen
        self.start(initialise=initialise)
        if module is not None:
            self.take_buffers(module)
        self._first_checksum = checksum(self._arena.gather())
        here.begin(self)

    @classmethod
    def of(
        cls,
        named: Sequence[tuple[str, Parameter]],
        comm: Calls,
        contract: Contract,
        config: DownpourConfig | None = None,
    ) -> "Downpour":
        """For a loop that has its contract and its line to the shards already.

        named: as `layout.trainable` returns; the contract's layout is of these.
        comm: of a client with this contract; it stays the caller's to close. Call `start` next.
        """
        self = cls.__new__(cls)
        self._bind(named, comm, contract, config or DownpourConfig(), is_script=False)
        return self

    def _bind(
        self,
        named: Sequence[tuple[str, Parameter]],
        comm: Calls,
        contract: Contract,
        config: DownpourConfig,
        *,
        is_script: bool,
    ) -> None:
        """is_script: what happens between backward and `step` is not our own code."""
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
        self._is_made = False
        super().__init__([group for group in grouped if group["params"]], {})
        self._is_made = True
        self._settings = [_settings(group) for group in self.param_groups]
        self._session = None
        self._module = None
        self._frozen = []
        self._first_checksum = None
        self._comm = comm
        self._contract = contract
        self._config = config
        self._staging = staging = staging_of(parameter for _, parameter in named)
        client = comm.connect()
        self._traffic = client.traffic
        self._accrued = Outgoing(staging, client.vector())
        """What the next push carries: the gradient itself, or a sum."""
        self._sending = (
            Outgoing(staging, client.vector()) if config.fetch_policy == "latest" else None
        )
        """The other one: what is on its way must not change."""
        grad = staging.vector(layout.total) if self._accrues else self._accrued.grad
        self._arena = Arena(layout, named, grad, staging)
        self._current, self._next = Fetched(layout), Fetched(layout)
        for fetched in (self._current, self._next):
            staging.pin(fetched.values)
        self._bound: Ready = AT_ONCE
        """The device has read the copy that it computes on."""
        self._checks: list[Callable[[], object]] = []
        """Called before the next push leaves."""
        self._announced = 0
        self._accrued_samples = 0
        self._accrued_absent: set[str] | None = None
        self._base = self._current
        """The copy that the newest gradient in the sum was computed on."""
        self._future: Future[Ticket] | None = None
        self._pushing: Outgoing | None = None
        """What the future is a push of."""
        self._future_fetches = False
        self._is_fetch_due = False
        self.num_steps = 0
        """Steps taken."""
        self.exchange = Exchange()
        """Of the newest step."""
        self._before = (0.0, 0.0)
        """Seconds that copying, and waiting for the device, had taken when the step ended."""
        self.measures_norm = False
        """Compute `grad_norm` in each step."""
        self._norm: Reading | None = None
        self.last_samples = 0
        """Samples of the newest step."""
        self._loss: Reading | None = None
        self.last_pushed: Pushed | None = None
        """What became of the newest push that was answered."""
        self.num_answered = 0
        """Pushes answered."""
        self.answered_samples = 0
        """Samples whose pushes were answered, applied or refused."""
        self.skipped_samples = 0
        """Samples whose gradient was thrown away by `zero_grad` before a step had taken it, as
        where a GradScaler has found an overflow: nothing of them was pushed."""
        self._partial_samples = self._missed_samples = self._spoiled_samples = 0
        """Of those answered; see `Stepped`."""
        self._merged_samples = 0
        self._accrued_steps = 0
        self._sent_samples = 0
        self._is_in_step = False
        self._claimed = 0
        """Samples of the gradient so far."""
        self._arena.on_backward = self._claim
        self._is_script = is_script
        self._overlap: Overlap | None = None
        self._overlaps_later = (
            config.overlap is None and config.may_overlap and len(client.messages) > 1
        )
        """Unless the first step shows that gradients come in several pieces."""
        if config.overlap:
            self._start_overlapping()

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
        self._bound = self._arena.bind(self._current.values)

    def __getstate__(self) -> dict[str, Any]:  # Any: as torch has it
        """Refused: what copy, deepcopy and pickle ask for.

        Raises: TypeError.
        """
        raise TypeError(
            "a Downpour cannot be copied or pickled: it is one worker's line to the shards. Save "
            "the model's state_dict(); the state of the update rule is in the shards' snapshots"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:  # Any: as torch has it
        """Refused: the shards' layout was fixed when this was made.

        Raises: ValueError.
        """
        if getattr(self, "_is_made", False):
            raise ValueError(
                "a parameter group cannot be added: the layout of the shards was fixed when "
                "Downpour was made. Give it all groups at once; a group that should rest has "
                "requires_grad=False or no gradient"
            )
        # Not torch's own, which would import torch._dynamo (1.7 s in every worker); what it looks
        # at, groups.py has looked at.
        self.param_groups.append(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begin a step: no parameter has a gradient; with set_to_none=False one of zeros."""
        if self._overlap is not None and self._overlap.is_open:  # backward has failed half-way
            self._settle_overlapping(self._overlap.give_up())
        # A gradient that no step has taken: a GradScaler passes over those that overflow.
        self.skipped_samples += self._claimed
        self._claimed = self._announced = 0
        # With overlap a gradient that is there already would be taken for a second one.
        self._arena.zero_grad(set_to_none or self._overlap is not None)

    def announce(self, samples: int) -> None:
        """Say before backward how many samples its gradient is the mean of: with overlap its
        parts have left by the time that `step` is told."""
        self._announced = samples

    def watch(self, loss: Tensor, check: Callable[[float], object]) -> Reading:
        """Have a number looked at before anything of this step is pushed.

        loss: of one element. check: what it raises stops the push. On the CPU it is called at
        once; on another device, where its value comes later, by the comm thread, and `step`
        raises what it raised (with fetch_policy `latest` a later step may).
        """
        reading = self._staging.read(loss)
        if self._staging.is_in_place:
            check(reading.value)
        else:
            self._checks.append(lambda: check(reading.value))
        return reading

    @property
    def traffic(self) -> Traffic:
        """What passes between this replica and the shards."""
        return self._traffic

    @property
    def device(self) -> str:
        """What it computes on: `cpu`, `cuda`, ...; of several, that of the first parameter."""
        return str(self._arena.device.type)

    @property
    def grad_norm(self) -> Reading | None:
        """L2 norm of the newest step's gradient, clipped as it is pushed; None if it is not
        measured."""
        return self._norm

    @property
    def last_loss(self) -> float | None:
        """What the closure of the newest step returned."""
        return None if self._loss is None else self._loss.value

    @overload
    def step(self, closure: None = None, *, samples: int | None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], *, samples: int | None = None) -> float: ...

    def step(
        self, closure: Callable[[], float] | None = None, *, samples: int | None = None
    ) -> float | None:
        """End a step: accrue its gradient, push and fetch as the policy says.

        samples: how many samples the gradient is the mean of; counted, not multiplied. By
        default what distbelief.DataLoader has handed out since the last step; 1 without it.
        Raises: ValueError for a sparse gradient, a learning rate that was changed here, or a
            parameter that was replaced; Refused, ShardUnavailable; Stopped, which ends the
            script, where the run is to stop.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._loss = None if loss is None else self._staging.read(torch.as_tensor(loss))
        began, self.exchange = time.monotonic(), Exchange()
        self._before = self.traffic.fill_s, self.traffic.device_s
        self._check_settings()
        self._check_parameters()
        if self._overlap is not None and self._overlap.is_open:
            if samples not in (None, self.last_samples):
                raise ValueError(
                    f"step was told of {samples} samples, but parts of the push have left with "
                    f"{self.last_samples}: with overlap=True samples are what "
                    "distbelief.DataLoader counts, or 1"
                )
        else:
            counted = self._count_samples()
            self.last_samples = samples or counted
        self.num_steps += 1
        if self._overlap is not None:
            self._step_overlapping()
        else:
            self._take_step(self.last_samples)
            if self._overlaps_later:
                self._decide_to_overlap()
        self._announced = 0
        self.exchange.seconds = time.monotonic() - began
        if self._module is not None and self.num_steps % MERGE_EVERY_STEPS == 0:
            self.merge_buffers()
        if self._session is not None:
            self._session.stepped(self)
        return loss

    def _take_step(self, samples: int) -> None:
        absent = self._arena.collect()
        if self._config.clip_norm:
            clip_(self._arena.grad, self._config.clip_norm)
        self._measure_norm()
        self._accrue(samples, absent)
        is_push_due = (self.num_steps - 1) % self._config.n_push == 0
        is_fetch_due = self.num_steps % self._config.n_fetch == 0
        if self._config.fetch_policy == "fresh":
            self._step_fresh(is_push_due, is_fetch_due)
        else:
            self._step_latest(is_push_due, is_fetch_due)

    @property
    def claimed_samples(self) -> int:
        """Samples of the gradient that no step has taken yet."""
        return self._claimed

    @property
    def has_unanswered(self) -> bool:
        """Something has accrued, or is on its way."""
        return bool(self._accrued_steps) or self._future is not None

    def flush(self) -> None:
        """Push what has accrued, wait for every answer, and take the fresh parameters."""
        self._settle(wait=True)
        if self._accrued_steps:
            self._push(into=self._next)
        else:
            self._fetch()
        self._settle(wait=True)

    def outcome(self, is_new: bool) -> Outcome:
        """What became of the newest push that was answered, if nobody has told it yet."""
        outcome = Outcome(
            pushed=False,
            staleness=0,
            version=0,
            refused=0,
            reason="",
            partial=self._partial_samples,
            missed=self._missed_samples,
            spoiled=self._spoiled_samples,
        )
        pushed = self.last_pushed
        if pushed is None or not is_new:
            return outcome
        refused = sum(pushed.statuses.values()) - pushed.statuses["applied"]
        outcome["pushed"] = True
        outcome["staleness"] = pushed.staleness
        outcome["version"] = pushed.version
        outcome["refused"] = refused if pushed.is_partial else 0
        outcome["reason"] = pushed.reasons[0] if pushed.is_partial and pushed.reasons else ""
        return outcome

    def merge(self, samples: int, floats: Tensor, integers: Tensor) -> tuple[Tensor, Tensor] | None:
        """Contribute buffers and wait for the merged ones, as `Client.merge`."""
        merged: list[tuple[Tensor, Tensor] | None] = []
        self._run(_whole(lambda client: merged.append(client.merge(samples, floats, integers))))
        return merged[0]

    def merge_buffers(self) -> None:
        """Merge the buffers of `module` with the other workers', and take the merged ones."""
        layout = self._contract.buffers
        samples = self.answered_samples - self._merged_samples
        if self._module is None or not samples or not (layout.num_floats or layout.num_integers):
            return
        merged = self.merge(samples, *layout.read(self._module))
        if merged is not None:
            layout.write_(self._module, *merged)
        self._merged_samples = self.answered_samples

    def take_buffers(self, module: nn.Module) -> None:
        """Take the merged buffers that the shards have, as a run that goes on has them."""
        layout = self._contract.buffers
        if layout.num_floats or layout.num_integers:
            merged = self.merge(0, *layout.no_buffers())
            if merged is not None:
                layout.write_(module, *merged)

    def leave(self) -> None:
        """Say that this worker pushes no more."""
        self._run(_whole(lambda client: client.leave()))

    def close(self) -> None:
        """Take the hooks off the parameters, and wait for copies from and to a device."""
        self._arena.close()
        self._staging.close()

    # Policies

    def _claim(self) -> None:
        """Backward has used the batches that were handed out up to now."""
        if self._session is not None:
            self._claimed += self._session.take_count()

    def _count_samples(self) -> int:
        self._claim()
        count, self._claimed = self._claimed, 0
        return self._announced or count or 1

    def _start_overlapping(self) -> None:
        self._overlap = Overlap(
            self._arena,
            self._accrued,
            self._comm,
            self._begin_overlapping,
            verifies=self._is_script,
        )

    def _decide_to_overlap(self) -> None:
        self._overlaps_later = False
        if self._arena.is_repeated:
            logger.info("no overlap: some tensors get their gradient in several pieces")
            return
        self._arena.forget_touches()
        self._start_overlapping()

    def _begin_overlapping(self) -> Beginning:
        if not self._is_in_step:
            self.last_samples = self._count_samples()
        return Beginning(self.last_samples, self._versions(), self._next, self._take_checks())

    def _take_checks(self) -> list[Callable[[], object]]:
        checks, self._checks = self._checks, []
        return checks

    def _step_overlapping(self) -> None:
        self._is_in_step = True
        try:
            assert self._overlap is not None
            future = self._overlap.finish(self._arena.collect())
            self._measure_norm()
            self._settle_overlapping(future)
        finally:
            self._is_in_step = False

    def _settle_overlapping(self, future: Future[Ticket]) -> None:
        assert self._overlap is not None
        self._future = future
        self._pushing = self._accrued
        self._future_fetches = True
        self._sent_samples = self.last_samples
        self._settle(wait=True)
        self._arena.forget_touches()
        try:
            self._overlap.verify()
        finally:
            self._overlap.reset()

    def _measure_norm(self) -> None:
        if self.measures_norm:
            self._norm = self._staging.read(torch.linalg.vector_norm(self._arena.grad))

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
            self._arena.step_locally(self._config.local_lr)

    # Moves

    def _accrue(self, samples: int, absent: Iterable[str]) -> None:
        self._accrued_steps += 1
        self._accrued_samples += samples
        self._base = self._versions()
        if self._accrues:
            if self._accrued_steps == 1:  # whatever it held has been answered
                self._accrued.grad.copy_(self._arena.grad)
            else:
                self._accrued.grad.add_(self._arena.grad)
        if self._accrued_absent is None:
            self._accrued_absent = set(absent)
        else:  # absent from the sum only if it was from every gradient in it
            self._accrued_absent &= set(absent)

    def _versions(self) -> Fetched:
        """The versions of the current copy: by the time of the push a newer one may be current."""
        base = copy(self._current)
        base.version, base.bseq = base.version[:], base.bseq[:]
        return base

    def _push(self, into: Fetched | None) -> None:
        assert self._future is None
        absent = self._contract.layout.absent_masks(self._accrued_absent or ())
        samples, base, outgoing = self._accrued_samples, self._base, self._accrued
        after, checks, bound = self._staging.mark(), self._take_checks(), self._bound

        def push(client: Client) -> Ticket:
            bound.wait()  # `into` is what was bound before that
            return outgoing.push(client, samples, base, absent, into, after, checks)

        self._future = self._comm.submit(push)
        self._pushing = outgoing
        self._future_fetches = into is not None
        if into is not None:
            self._is_fetch_due = False
        self._sent_samples = samples
        self._accrued_steps = self._accrued_samples = 0
        self._accrued_absent = None
        if self._sending is not None:
            self._accrued, self._sending = self._sending, self._accrued

    def _fetch(self) -> None:
        assert self._future is None
        into, bound = self._next, self._bound

        def fetch(client: Client) -> Ticket:
            bound.wait()  # as in a push
            return client.start_fetch(into)

        self._future = self._comm.submit(fetch)
        self._future_fetches = True
        self._is_fetch_due = False

    def _settle(self, *, wait: bool) -> None:
        """Take the answer to what is on its way, if it is there or is to be waited for."""
        if self._future is None or not (wait or self._future.done()):
            return
        ticket = self._wait_for(self._future)
        self._future = None
        if isinstance(ticket, PushTicket):
            self.last_pushed = ticket.pushed
            self.num_answered += 1
            self.answered_samples += self._sent_samples
            self._count_refused(ticket.pushed)
            if ticket.vector is not None:
                self._turn(ticket.vector)
        if self._future_fetches:
            self._current, self._next = self._next, self._current
            self._bound = self._arena.bind(self._current.values)

    def _wait_for(self, future: Future[Ticket]) -> Ticket:
        began, exchange = time.monotonic(), self.exchange
        ticket = future.result()
        waited_s = time.monotonic() - began
        if not isinstance(ticket, PushTicket):
            exchange.fetch_s += waited_s
            return ticket
        # Other answers are still on their way while parameters are copied, and the device computes
        # while others are sent: what was waited for either is at most the time that it took.
        filled_s, computed_s = self._before
        exchange.device_s = min(waited_s, self.traffic.device_s - computed_s)
        exchange.fetch_s = min(waited_s - exchange.device_s, self.traffic.fill_s - filled_s)
        return ticket

    def _count_refused(self, pushed: Pushed) -> None:
        parts, samples = sum(pushed.statuses.values()), self._sent_samples
        refused = parts - pushed.statuses["applied"] - pushed.statuses["dup"]
        if refused == parts:
            self._spoiled_samples += samples
        elif refused:
            self._partial_samples += samples
            self._missed_samples += samples * refused

    def _turn(self, vector: Tensor) -> None:
        """What was pushed is kept until it is durable; the next gradient goes elsewhere."""
        outgoing = self._pushing
        assert outgoing is not None
        is_arenas = outgoing.grad is self._arena.grad
        outgoing.turn(vector)
        if is_arenas and outgoing.grad is vector:
            self._arena.turn_grad(vector, keeps=self._is_script)

    def _run(self, call: Callable[[Client], Ticket]) -> None:
        self._comm.submit(call).result()

    def _check_settings(self) -> None:
        for group, before in zip(self.param_groups, self._settings, strict=True):
            now = _settings(group)
            if now == before:
                continue
            if now["lr"] != before["lr"]:
                raise ValueError(
                    f"the learning rate was changed from {before['lr']} to {now['lr']} on this "
                    "worker, but the shards apply the updates: describe its course by schedule= "
                    "(of Downpour; train.schedule in a job), which every shard follows by samples "
                    "applied, and take away the scheduler"
                )
            raise ValueError(
                f"a parameter group was changed on this worker, from {before} to {now}, but the "
                "shards apply the updates: give Downpour its settings when it is made"
            )

    def _check_parameters(self) -> None:
        self._arena.check()
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise ValueError(
                    f"{name} {list(parameter.shape)} was frozen when Downpour was made and is not "
                    "any more: the shards have no place for it. Unfreeze all that will ever be "
                    "trained before Downpour is made, and freeze it again after; a parameter "
                    "that gets no gradient rests"
                )
        if self._first_checksum is None:
            return
        if checksum(self._arena.gather()) != self._first_checksum:
            raise ValueError(
                "the parameters were changed between Downpour and the first step, but the shards "
                "have those from before: load weights first, then make Downpour"
            )
        self._first_checksum = None


def clip_(grad: Tensor, limit: float) -> None:
    """Scale a gradient down to a norm in place, as torch.nn.utils.clip_grad_norm_ does.

    A gradient whose norm is not finite becomes NaN throughout, and every shard refuses it.
    """
    norm = torch.linalg.vector_norm(grad)
    scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
    # One that is not finite is of no use as a whole: so that no shard takes the parts of it that
    # happen to be. Without a look at the number, which would wait for a device.
    grad.mul_(torch.where(torch.isfinite(norm), scale, math.nan))


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:  # Any: as torch has it
    return {key: group[key] for key in ("lr", "weight_decay")}


def _whole(conversation: Callable[[Client], object]) -> Callable[[Client], Ticket]:
    """A conversation that waits for its replies itself, as one call of the comm thread."""

    def call(client: Client) -> Ticket:
        conversation(client)
        return Ticket(0)

    return call
