"""Update rules: state, and a pure step on 1-D tensors. They know no shards, workers or network.

The arithmetic is torch's own fused kernels, those that `torch.optim` runs with fused=True, called
without its wrappers (9 us of 11 for a small part); a rule here says which state a part keeps and
how the part's version and schedule enter.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

Pieces = list[Tensor]
"""Ranges of one part, each 1-D float32: one call of a kernel takes all of them."""


class UpdateRule(Protocol):
    """State names plus a step in place. Implementations are frozen and hold no tensors."""

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the state tensors; each is float32, as long as the part, and begins at 0."""
        ...

    def apply_(
        self,
        values: Pieces,
        grad: Pieces,
        state: Mapping[str, Pieces],
        *,
        lr: float,
        weight_decay: float,
        step: int,
    ) -> None:
        """Apply one gradient in place.

        values, grad, state[slot]: ranges that correspond; grad is read only.
        step: pushes already applied to the part (0 for the first).
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SGD:
    """Gradient descent, classical momentum, Nesterov's momentum.

        g += weight_decay * values;  buf = momentum * buf + g
        values -= lr * (g + momentum * buf  if nesterov else  buf)

    The buffer begins at 0, which equals torch's "first buffer is the first gradient".
    Source: Szegedy et al. 2014 section 6 (momentum 0.9); torch.optim.SGD for the form.
    """

    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")

    @property
    def slots(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def apply_(
        self,
        values: Pieces,
        grad: Pieces,
        state: Mapping[str, Pieces],
        *,
        lr: float,
        weight_decay: float,
        step: int,
    ) -> None:
        torch._fused_sgd_(
            values,
            grad,
            state["momentum"] if self.momentum else [],
            weight_decay=weight_decay,
            momentum=self.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=False,
            is_first_step=False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Adagrad:
    """Adagrad as Downpour SGD uses it: each part needs only its own sums of squares.

        g += weight_decay * values;  sum_sq += g**2
        values -= lr * g / (sqrt(sum_sq) + eps)

    The paper gives neither eps nor a first accumulator; both are torch's (1e-10 outside the
    root, 0). Source: Dean et al. 2012 section 4.1.
    """

    eps: float = 1e-10

    slots: ClassVar[tuple[str, ...]] = ("sum_sq",)

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def apply_(
        self,
        values: Pieces,
        grad: Pieces,
        state: Mapping[str, Pieces],
        *,
        lr: float,
        weight_decay: float,
        step: int,
    ) -> None:
        torch._fused_adagrad_(
            values,
            grad,
            state["sum_sq"],
            _steps(step, len(values)),
            lr=lr,
            lr_decay=0.0,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam:
    """Adam, or AdamW where the decay is decoupled. The bias correction counts the part's version.

    Source: Kingma and Ba 2015; Loshchilov and Hutter 2019; torch.optim for the form.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decoupled: bool = False

    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"betas must be in [0, 1), got {self.beta1} and {self.beta2}")
        _check_eps(self.eps)

    def apply_(
        self,
        values: Pieces,
        grad: Pieces,
        state: Mapping[str, Pieces],
        *,
        lr: float,
        weight_decay: float,
        step: int,
    ) -> None:
        (torch._fused_adamw_ if self.decoupled else torch._fused_adam_)(
            values,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            [],
            _steps(step, len(values)),
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )


def _steps(step: int, pieces: int) -> list[Tensor]:
    """Pushes applied with this one, as the kernels take it; torch's wrappers add the 1 too."""
    return [torch.tensor(float(step + 1))] * pieces


def _check_eps(eps: float) -> None:
    # Not 0, as torch allows: an element whose gradient was always 0 would become 0 / 0.
    if not 0 < float(eps) < math.inf:
        raise ValueError(f"eps must be a finite number above 0, got {eps}")


Rule = SGD | Adagrad | Adam


@dataclass(frozen=True, slots=True)
class _Named:
    make: Callable[..., Rule]
    fixed: Mapping[str, Any]  # Any: hyper-parameters are bools and floats
    defaults: Mapping[str, Any]


RULES: Mapping[str, _Named] = {
    "sgd": _Named(SGD, {"momentum": 0.0, "nesterov": False}, {}),
    "momentum": _Named(SGD, {"nesterov": False}, {"momentum": 0.9}),
    "nesterov": _Named(SGD, {"nesterov": True}, {"momentum": 0.9}),
    "adagrad": _Named(Adagrad, {}, {"eps": 1e-10}),
    "adam": _Named(Adam, {"decoupled": False}, {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}),
    "adamw": _Named(Adam, {"decoupled": True}, {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}),
}


def make_rule(name: str, **hyper: float) -> Rule:
    """The rule of a name, with its defaults where `hyper` is silent.

    Raises: ValueError for an unknown name, or a hyper-parameter the rule does not have.
    """
    if name not in RULES:
        raise ValueError(f"update rule {name!r} is none of {', '.join(RULES)}")
    named = RULES[name]
    for key in hyper:
        if key not in named.defaults:
            takes = ", ".join(named.defaults) or "none"
            raise ValueError(f"update rule {name} has no {key!r} (it takes: {takes})")
    return named.make(**{**named.defaults, **hyper, **named.fixed})


def momentum_for(workers: int) -> float:
    """The highest momentum that did well with so many asynchronous workers.

    Up to 8: Liu et al. 2018 (best of 0.9, 0.7, 0.5 for 1 and 2, 4, and 8). Beyond that asynchrony
    brings more than 0.9 of its own (1 - 1/M; Mitliagkas et al. 2016), and none is left to add.
    """
    for most, momentum in ((2, 0.9), (4, 0.7), (8, 0.5)):
        if workers <= most:
            return momentum
    return 0.0


def rule_as_dict(rule: Rule) -> dict[str, Any]:  # Any: JSON
    """JSON form of a rule; `rule_from_dict` reads it back."""
    return {"kind": type(rule).__name__, **asdict(rule)}


def rule_from_dict(data: Mapping[str, Any]) -> Rule:  # Any: JSON
    """Raises: ValueError, TypeError or KeyError where the data is not a rule."""
    kinds: dict[str, Callable[..., Rule]] = {"SGD": SGD, "Adagrad": Adagrad, "Adam": Adam}
    hyper = dict(data)
    kind = hyper.pop("kind")
    for key, value in hyper.items():
        if (type(value) is bool) != (key in ("nesterov", "decoupled")):
            raise ValueError(f"update rule {kind} cannot have {key}={value!r}")
    return kinds[kind](**hyper)
