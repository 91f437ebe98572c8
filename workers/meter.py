"""Meter: is asynchrony hurting? Computes some gradients again, on newer parameters.

A gradient is always late: by the time that it is applied, others have changed the parameters. For
a small share of the steps this looks at how much that matters. When the answer to a push has
brought the fresh parameters, the same batch goes through the model once more, with the same random
numbers, and the new gradient is held against the one that was pushed. Between the two lie the
updates of others, which are the staleness, and the worker's own: one alone even in a run of one
worker, which is what the others are to be compared with.

Nothing of it is pushed, and training goes on as if it had not been: random numbers and buffers are
what they were. It costs a forward and a backward pass, and a copy of the gradient, each time.
"""

import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distbelief.param_server.layout import trainable


class Measurement(NamedTuple):
    """One gradient, held against the one that a later moment would have had."""

    updates: int
    """Between the parameters of both: the staleness, and the worker's own."""
    cosine: float
    """1: it still points where the fresh one does. Below 0: it does harm."""
    gap: float
    """Loss of the batch on the newer parameters less the one on its own."""
    rate: float
    """What is left of the learning rate: the old one's length along the fresh one, over that's."""


class Meter:
    """Measures some steps of a replica. Used by its training thread.

    For each step: `begin`, forward and backward, `keep`, the push and its answer, `measure`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_of: Callable[[object, Any], Tensor],  # Any: targets, as the data has them
        share: float,
        seed: int,
        precision: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """loss_of: of (outputs, targets), a scalar. share: of the steps, 0 to 1. seed: of the
        worker; its random numbers are of no other use. precision: in which the model computes."""
        self._loss = _Loss(model, loss_of)
        self._precision = precision
        self._named = trainable(model.named_parameters())
        self._share = share
        self._random = random.Random(seed)
        self._numbers: tuple[Tensor, list[Tensor]] | None = None
        """States of the random numbers' generators before the step; None where it is not due."""
        self._buffers: Mapping[str, Tensor] = {}
        self._kept: tuple[list[Tensor | None], Tensor] | None = None

    def begin(self) -> None:
        """A step begins: decide whether it is measured."""
        self._numbers = self._kept = None
        if self._random.random() < self._share:
            self._numbers = _numbers()
            self._buffers = {name: one.clone() for name, one in self._loss.named_buffers()}

    def keep(self, loss: Tensor) -> None:
        """Backward is done, and nothing has changed its gradients yet."""
        if self._numbers is not None:
            grads = [p.grad for _, p in self._named]
            copies = [None if grad is None else grad.detach().clone() for grad in grads]
            self._kept = (copies, loss.detach())

    def measure(self, inputs: Any, targets: Any, staleness: int) -> Measurement | None:
        """The parameters are fresh now. None where this step is not measured.

        inputs, targets: of the step. staleness: of its push.
        """
        if self._numbers is None or self._kept is None:
            return None
        (old, loss_then), self._kept = self._kept, None
        now = _numbers()
        _set_numbers(*self._numbers)
        try:
            fresh, loss = self._fresh(inputs, targets)
        finally:
            _set_numbers(*now)
        ours = fresh[0].new_zeros(3, dtype=torch.float64) if fresh else torch.zeros(3)
        for before, after in zip(old, fresh, strict=True):
            if before is not None:
                dots = (before * after).sum(), (before * before).sum(), (after * after).sum()
                ours = ours + torch.stack(dots).double()
            else:
                ours[2] += (after * after).sum()
        both, then, after_all = ours.tolist()
        scale = (then * after_all) ** 0.5
        return Measurement(
            updates=staleness + 1,
            cosine=max(-1.0, min(1.0, both / scale)) if scale else 0.0,
            gap=(loss - loss_then).item(),
            rate=both / after_all if after_all else 0.0,
        )

    def _fresh(self, inputs: Any, targets: Any) -> tuple[list[Tensor], Tensor]:
        # Not at the top: only who measures waits for this import.
        from torch.func import functional_call

        # Copies of the parameters' views: no hook of theirs sees this backward.
        leaves = {f"model.{n}": p.detach().requires_grad_() for n, p in self._named}
        with torch.enable_grad():
            values = {**self._buffers, **leaves}
            with self._precision():
                loss = functional_call(self._loss, values, (inputs, targets))
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        grads = [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves.values(), found, strict=True)
        ]
        return grads, loss.detach()


class _Loss(nn.Module):
    """A model and its loss, so that both see the same parameters."""

    def __init__(self, model: nn.Module, loss_of: Callable[[object, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss_of = loss_of

    def forward(self, inputs: Any, targets: Any) -> Tensor:
        return self._loss_of(self.model(inputs), targets)


def _numbers() -> tuple[Tensor, list[Tensor]]:
    is_cuda: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's own
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if is_cuda else []


def _set_numbers(cpu: Tensor, cuda: list[Tensor]) -> None:
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
