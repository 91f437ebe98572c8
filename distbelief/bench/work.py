"""Work: the one piece of work that every system of `bench wire` does over and over.

A round is: push a full gradient, apply SGD with momentum 0.9 on the server, fetch all parameters.
All parameters begin at 0 and every gradient is 1 everywhere, so at any time all elements are
equal, and how many pushes they have seen can be read off their value.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distbelief.param_server.contract import Contract
from distbelief.param_server.layout import Entry, Group, Layout, layout_of, trainable
from distbelief.param_server.update import make_rule

LR = 1e-4
MOMENTUM = 0.9
GOOGLENET_TENSORS = 116
GOOGLENET_SIZE = 6_998_552
"""Of the network without its two auxiliary classifiers, 1,000 classes."""


@dataclass(frozen=True)
class Work:
    """The vector that travels."""

    layout: Layout

    @classmethod
    def of(cls, size: int | None = None) -> "Work":
        """GoogLeNet's tensors; with a size, one tensor of so many parameters."""
        return cls.googlenet() if size is None else cls.flat(size)

    @classmethod
    def googlenet(cls) -> "Work":
        from distbelief.model.googlenet import GoogLeNet

        with torch.device("meta"):  # names and shapes alone
            model = GoogLeNet(aux=False)
        layout = layout_of(trainable(model.named_parameters()), (Group(lr=LR),))
        assert (len(layout.entries), layout.total) == (GOOGLENET_TENSORS, GOOGLENET_SIZE)
        return cls(layout)

    @classmethod
    def flat(cls, size: int) -> "Work":
        entry = Entry(name="flat", shape=(size,), dtype="float32", offset=0)
        return cls(Layout((entry,), (Group(lr=LR),)))

    @property
    def size(self) -> int:
        """Parameters."""
        return self.layout.total

    @property
    def round_bytes(self) -> int:
        """There and back, float32; what a codec saves is not taken off."""
        return 2 * 4 * self.size

    @property
    def contract(self) -> Contract:
        """What our own shards and workers agree on."""
        return Contract(layout=self.layout, rule=make_rule("momentum", momentum=MOMENTUM))

    def as_dict(self) -> dict[str, Any]:  # Any: JSON
        return self.layout.as_dict()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Work":  # Any: JSON
        return cls(Layout.from_dict(data))


def apply_(values: Tensor, grad: Tensor, momentum: Tensor) -> None:
    """The work's update in one pass, for servers that are written by hand: torch's own kernel."""
    torch._fused_sgd_(
        [values],
        [grad],
        [momentum],
        weight_decay=0.0,
        momentum=MOMENTUM,
        lr=LR,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


class Course:
    """What the parameters are worth after n pushes: the kernel on a handful of them."""

    def __init__(self) -> None:
        # Not torch.optim.SGD, which is the same to the bit, but takes 2 s to load, in each worker.
        self._value, self._grad, self._momentum = torch.zeros(64), torch.ones(64), torch.zeros(64)
        self._values = [0.0]

    def after(self, pushes: int) -> float:
        """The value that every element has then, exactly."""
        while len(self._values) <= pushes:
            apply_(self._value, self._grad, self._momentum)
            self._values.append(float(self._value[0]))
        return self._values[pushes]

    def slack(self, pushes: int) -> float:
        """Half of what the last push has changed: within it no other number of pushes is."""
        return abs(self.after(pushes) - self.after(max(0, pushes - 1))) / 2

    def agrees(self, low: float, high: float, pushes: int, tolerance: float | None) -> bool:
        """Parameters from low to high have seen so many pushes.

        tolerance: None wants the very bits; otherwise a share of the value, besides the slack.
        """
        want = self.after(pushes)
        slack = 0.0 if tolerance is None else self.slack(pushes) + tolerance * abs(want)
        return want - slack <= low <= high <= want + slack  # not where one is NaN
