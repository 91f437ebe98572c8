"""Compute: how a replica goes from a batch to gradients: device, precision, layout, compiler.

Parameters and gradients are float32 whatever the precision of the layers between them: the shards
hold the only weights there are ("master weights"), and a worker's copies of them in half precision
live for one step.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distbelief.workers.feed import move

logger = logging.getLogger(__name__)

PRECISIONS: Mapping[str, torch.dtype | None] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SCALE = 2.0**10
"""Of the loss for float16, whose smallest gradients would be 0 (Micikevicius et al. 2018)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeConfig:
    """How a worker computes."""

    device: str = "cpu"
    precision: str = "float32"
    """Of the layers for which torch holds it safe; one of `PRECISIONS`."""
    channels_last: bool = False
    """Images are laid out with their channels innermost, which tensor cores like."""
    compile: bool = False
    """The model goes through torch.compile."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is none of {', '.join(PRECISIONS)}")


class Compute:
    """See the top of this file. Used by a worker's training thread."""

    def __init__(
        self,
        model: nn.Module,
        loss_of: Callable[[object, Any], Tensor],  # Any: targets, as the data has them
        config: ComputeConfig,
    ) -> None:
        """model: moved to the device, and its own. loss_of: of (outputs, targets), a scalar."""
        self.model = model.to(config.device)
        self._loss_of = loss_of
        self._config = config
        self._dtype = PRECISIONS[config.precision]
        self._scale = SCALE if config.precision == "float16" else 1.0
        if self._scale != 1:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    # Before anybody sees it: parts of a gradient leave while backward still runs.
                    parameter.register_hook(lambda grad: grad / self._scale)  # type: ignore[no-untyped-call]
        self._run: Callable[[Any], Any] = self.model
        if config.compile:
            self._run = torch.compile(self.model)

    @property
    def scale(self) -> float:
        """What the loss is multiplied by before backward, and each gradient divided by after."""
        return self._scale

    def place(self, inputs: Any, targets: Any) -> tuple[Any, Any]:  # Any: structures of tensors
        """A batch on the device, laid out as was asked for."""
        inputs, targets = move(inputs, self._config.device), move(targets, self._config.device)
        if self._config.channels_last and isinstance(inputs, Tensor) and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return inputs, targets

    def loss(self, inputs: Any, targets: Any) -> Tensor:  # Any: as above
        """The loss of a batch that was placed, a scalar."""
        with self.precision():
            return self._loss_of(self._run(inputs), targets)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, float32, in the parameters."""
        (loss if self._scale == 1 else loss * self._scale).backward()  # type: ignore[no-untyped-call]  # torch's own

    def refused(self) -> None:
        """A shard has refused a gradient that was not finite: in float16 the scale was too much."""
        if self._scale > 1:
            self._scale /= 2
            logger.warning("float16 has overflowed: the loss is scaled by %g", self._scale)

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """In which the layers compute."""
        if self._dtype is None:
            yield
            return
        with torch.autocast(torch.device(self._config.device).type, self._dtype):
            yield
