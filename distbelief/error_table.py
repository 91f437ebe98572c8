"""ErrorTable: errors by number of models and of crops, in the form of the paper's Table 3.

The cost is the number of times that a network is run on an image: models x crops. One model is the
one with the lowest top-1 error, over as many crops. Source: Szegedy et al. 2014 section 7, Table 3.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distbelief.ensemble import Ensemble
from distbelief.loaded import Members, batch_of, read_runs, where_it_began
from distbelief.problem import Problem
from distbelief.workers.feed import read_all


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table; errors in [0, 1]."""

    models: int
    crops: int
    cost: int
    top1_error: float
    top5_error: float | None
    """None below 6 classes."""
    best: str
    """The run of the one model; of several the empty text."""


@dataclass(frozen=True, slots=True)
class ErrorTable:
    """See the top of this file."""

    images: int
    rows: tuple[Row, ...]

    @property
    def base(self) -> Row:
        """What others are compared with: the first row, as in the paper."""
        return self.rows[0]


def error_table(
    runs: Sequence[Path],
    name: str,
    source: str | None = None,
    *,
    crops: Sequence[int] = (1, 10, 144),
    loaders: int | None = None,
    seen: Callable[[int, int], None] | None = None,
) -> ErrorTable:
    """Evaluate each run's model, and all together, over each number of crops.

    crops: of 1, 10 and 144; 0 is the image as in training. seen: told of the images so far over all
    numbers of crops, and of how many there will be. The rest as `evaluate_runs`. Raises: Problem.
    """
    members = read_runs(runs, name, source)
    singles: list[Row] = []
    all_of_them: list[Row] = []
    total, images = len(members.split) * len(crops), 0
    for number, count in enumerate(crops):
        before = number * len(members.split)

        def tell(done: int, before: int = before) -> None:
            if seen is not None:
                seen(before + done, total)

        with where_it_began(members.place, source):
            errors, images = _errors(members, count, members.loaders(loaders), tell)
        views = max(1, count)
        best = min(range(len(runs)), key=lambda i: errors[i][0])
        for into, models, found in (
            (singles, 1, errors[best]),
            (all_of_them, len(runs), errors[-1]),
        ):
            into.append(
                Row(
                    models=models,
                    crops=count,
                    cost=models * views,
                    top1_error=found[0],
                    top5_error=found[1],
                    best=str(runs[best]) if models == 1 else "",
                )
            )
    return ErrorTable(images, tuple(singles if len(runs) == 1 else [*singles, *all_of_them]))


def _errors(
    members: Members, crops: int, loaders: int, tell: Callable[[int], None]
) -> tuple[list[tuple[float, float | None]], int]:
    """Top-1 and top-5 error of each model, of their mean last, and of how many images."""
    split, ensemble = members.seen_as(crops), Ensemble(members.models)
    wrong1 = torch.zeros(len(members.models) + 1, dtype=torch.int64)
    wrong5, images, classes = wrong1.clone(), 0, 0
    with torch.inference_mode(), closing(read_all(split, batch_of(crops), loaders)) as batches:
        for batch in batches:
            if batch.num_good:
                each = ensemble.each(batch.inputs)
                probabilities = torch.cat((each, each.mean(0, keepdim=True)))
                classes = probabilities.shape[2]
                ones, fives = _hits(probabilities, batch.targets)
                wrong1 += batch.num_good - ones
                wrong5 += batch.num_good - fives
                images += batch.num_good
            tell(batch.stop)
    if not images:
        raise Problem("DB-DATA-006", f"no sample of the {split.name} split can be read")
    return [
        (int(one) / images, int(five) / images if classes > 5 else None)
        for one, five in zip(wrong1, wrong5, strict=True)
    ], images


def _hits(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """probabilities: [models, B, classes]; targets: int64 [B]. Returns: right ones of each model
    among the first and the first five, int64 [models]."""
    best = probabilities.topk(min(5, probabilities.shape[2]), dim=2).indices
    hits = best == targets.view(1, -1, 1)
    return hits[:, :, 0].sum(1), hits.any(2).sum(1)
