"""Evaluate: how good the parameters of a run are on a split of its data."""

import logging
import math
from collections.abc import Callable
from contextlib import closing

import torch
from torch import Tensor, nn

from distbelief.confusion import Confusion
from distbelief.problem import Problem
from distbelief.result import Accuracy
from distbelief.workers.feed import move, read_all
from distbelief.workers.split import Split
from distbelief.workers.worker import loss_of

logger = logging.getLogger(__name__)


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int = 100,
    num_loaders: int = 0,
    seen: Callable[[int, int], None] | None = None,
    confusion: Confusion | None = None,
) -> Accuracy:
    """Mean loss, and for a classification top-1 and top-5 accuracy, of a model on its device.

    Samples that cannot be read are left out. num_loaders: processes that decode. seen: told of the
    samples so far, and of how many there are. confusion: counts which classes were taken for which.
    Raises: Problem if the model gives neither scores nor a loss, or nothing can be read.
    """
    was_training = model.training
    model.eval()
    tally = _Tally()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with torch.inference_mode(), closing(read_all(split, batch_size, num_loaders)) as batches:
            for batch in batches:
                for name, why in batch.bad:
                    logger.warning("left out %s: %s", name, why)
                if batch.num_good:
                    inputs, targets = move(batch.inputs, device), move(batch.targets, device)
                    outputs = model(inputs)
                    tally.add(model, outputs, targets, batch.num_good)
                    if confusion is not None and _are_scores(outputs, targets):
                        confusion.add(outputs, targets)
                if seen is not None:
                    seen(batch.stop, len(split))
    finally:
        model.train(was_training)
    if not tally.num_samples:
        raise Problem("DB-DATA-006", f"no sample of the {split.name} split can be read")
    return tally.accuracy(split)


class _Tally:
    """What evaluation has counted so far."""

    def __init__(self) -> None:
        self.num_samples = 0
        self._loss: float | None = 0.0
        self._top1: int | None = 0
        self._top5 = 0
        self._num_scores = 0

    def add(self, model: nn.Module, outputs: object, targets: object, num: int) -> None:
        """Raises: Problem if there is nothing to count."""
        self.num_samples += num
        if self._loss is not None:
            try:
                self._loss += num * float(loss_of(model, outputs, targets))
            except Exception:  # whatever a loss raises that is for training only
                logger.debug("no loss in evaluation", exc_info=True)
                self._loss = None
        if not _are_scores(outputs, targets):
            self._top1 = None
        elif self._top1 is not None:
            assert isinstance(outputs, Tensor)
            assert isinstance(targets, Tensor)
            self._num_scores = outputs.shape[1]
            best = outputs.topk(min(5, self._num_scores), dim=1).indices
            hits = best == targets.unsqueeze(1)  # [B, k]
            self._top1 += int(hits[:, 0].sum())
            self._top5 += int(hits.any(dim=1).sum())
        if self._top1 is None and self._loss is None:
            raise Problem(
                "DB-MODEL-005",
                f"{type(model).__name__} gives {_describe(outputs)} in evaluation, not "
                "scores of shape [batch, classes], and no loss can be made of it",
                fix="return the scores alone where not self.training, or give the model a "
                "method loss(outputs, targets) that takes what it returns then",
            )

    def accuracy(self, split: Split) -> Accuracy:
        num = self.num_samples
        loss = None if self._loss is None else self._loss / num
        has_top5 = self._top1 is not None and (split.num_classes or self._num_scores) > 5
        return Accuracy(
            split.name,
            None if self._top1 is None else self._top1 / num,
            self._top5 / num if has_top5 else None,
            round(loss, 6) if loss is not None and math.isfinite(loss) else None,
        )


def _are_scores(outputs: object, targets: object) -> bool:
    """Scores [B, classes] and classes int64 [B]."""
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and outputs.ndim == 2
        and targets.dtype == torch.int64
        and targets.shape == outputs.shape[:1]
    )


def _describe(outputs: object) -> str:
    if isinstance(outputs, torch.Tensor):
        return f"a tensor of shape {list(outputs.shape)}"
    return f"a {type(outputs).__name__}"
