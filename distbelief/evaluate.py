"""Evaluate: how good the parameters of a run are on a split of its data."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distbelief.ensemble import Ensemble
from distbelief.factory import make_model, num_loaders, open_data
from distbelief.folder import RunFolder
from distbelief.job import Job
from distbelief.problem import Problem
from distbelief.result import Accuracy
from distbelief.workers.feed import move, read_all
from distbelief.workers.pixels import Pictures
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
) -> Accuracy:
    """Mean loss, and for a classification top-1 and top-5 accuracy, of a model on its device.

    Samples that cannot be read are left out. num_loaders: processes that decode. seen: told of the
    samples so far, and of how many there are.
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
                    tally.add(model, model(inputs), targets, batch.num_good)
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


def save_model(model: nn.Module, path: Path) -> None:
    """Write the state dict, parameters and buffers; tied tensors once, under their first name."""
    kept: dict[str, torch.Tensor] = {}
    owners: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in owners:
            owners.add(id(tensor))
            kept[name] = tensor.detach().clone().contiguous()
    save_tensors(kept, path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a model's file whole. Raises: Problem if it cannot be written."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(dict(tensors), part)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise Problem(
            "DB-STORE-004",
            f"{path} cannot be written: {error}",
            why="the run has ended; its shards have saved what was trained, if they could",
            fix="free some space, then: distbelief resume, with a later --until if it was done",
        ) from error


def evaluate_runs(
    runs: Sequence[Path],
    name: str,
    source: str | None = None,
    *,
    last: bool = False,
    crops: int = 0,
    loaders: int | None = None,
    seen: Callable[[int, int], None] | None = None,
) -> Accuracy:
    """Evaluate the mean of several runs' models, over crops of each image, on the first one's data.

    crops: 1, 10 or 144 (crops.py); 0 takes the image as in training. loaders: processes that
    decode. seen: told of the samples so far, and of how many there are. The rest as evaluate_run.
    Raises: Problem.
    """
    models: list[nn.Module] = []
    first: tuple[Job, Split] | None = None
    for run in runs:
        folder, job, model_file = _read_run(run, source, last=last)
        with _where_it_began(folder, source):
            split = _open(job, name)
            if first is None:
                first = (job, split)
            model = make_model(job, split)
            _load(model, model_file)
            models.append(model)
        mine, theirs = first[1], split
        if (mine.num_classes, mine.input_shape) != (theirs.num_classes, theirs.input_shape):
            raise Problem(
                "DB-USE-013",
                f"{run} has {theirs.num_classes} classes of {theirs.input_shape}, {runs[0]} has "
                f"{mine.num_classes} of {mine.input_shape}: no mean can be taken of them",
                fix="name runs of the same classes and image size",
            )
    assert first is not None
    job, split = first
    if crops:
        if not isinstance(split.samples, Pictures):
            raise Problem(
                "DB-DATA-007",
                f"crops are of image files, and {job.data.source} is in memory as it is",
                fix="leave --crops out",
            )
        split = replace(split, samples=split.samples.crops(crops))
    alone = replace(job, workers=1)
    with _where_it_began(_read_run(runs[0], source, last=last)[0], source):
        return evaluate(
            Ensemble(models),
            split,
            batch_size=max(1, 100 // max(1, crops)),
            num_loaders=num_loaders(alone, split) if loaders is None else loaders,
            seen=seen,
        )


def evaluate_run(
    run: Path, name: str, source: str | None = None, *, last: bool = False
) -> Accuracy:
    """Build the model of a run folder again and evaluate it on the split of that name.

    last: the last values, where the run's model is their average. source: other data than the
    run's. The user's modules are found from where the run was launched; that folder is the current
    one meanwhile. Raises: Problem.
    """
    folder, job, model_file = _read_run(run, source, last=last)
    with _where_it_began(folder, source):
        split = _open(job, name)
        model = make_model(job, split)
        _load(model, model_file)
        return evaluate(model, split, num_loaders=num_loaders(replace(job, workers=1), split))


def _open(job: Job, name: str) -> Split:
    split = open_data(job, name)
    if split is None:
        raise Problem(
            "DB-DATA-005",
            f"{job.data.source} has no {name} split",
            fix="evaluate on the other one with --split train, or name data with --data",
        )
    return split


def _read_run(run: Path, source: str | None, *, last: bool) -> tuple[RunFolder, Job, Path]:
    """A run's folder, its job with other data if that is wanted, and the file of its model."""
    folder = RunFolder(run.resolve())
    try:
        job = Job.from_toml(folder.config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, Problem) as error:
        raise Problem(
            "DB-RUN-002",
            f"{run} is not a run folder: {error.what if isinstance(error, Problem) else error}",
            fix="name the folder that `distbelief launch` printed, such as runs/20261122-1015-ab12",
        ) from error
    if job.script.path:
        raise Problem(
            "DB-RUN-012",
            f"{run} is the run of a script, {job.script.path}: what its model is, and its data, "
            "only the script knows",
            fix=f"evaluate in the script; its trained tensors are in {folder.model}",
        )
    if source is not None:
        job = replace(job, data=replace(job.data, source=source))
    model_file = folder.last if last else folder.model
    if last and folder.model.is_file() and not model_file.is_file():
        model_file = folder.model  # nothing was averaged: the last values are the model
    if not model_file.is_file():
        raise Problem(
            "DB-RUN-006",
            f"{run} has no {model_file.name}: the run has not ended, or it ended without saving",
            fix=f"if there is one, {run / 'result.json'} says how it ended",
        )
    return folder, job, model_file


@contextmanager
def _where_it_began(folder: RunFolder, source: str | None) -> Iterator[None]:
    """The folder where the run was launched, if it is there, as the current one."""
    began, here = folder.launcher, Path.cwd()
    if began is None or source is not None or not Path(began.cwd).is_dir():
        yield
        return
    os.chdir(began.cwd)
    try:
        yield
    finally:
        os.chdir(here)


def _load(model: nn.Module, path: Path) -> None:
    """Put a saved state dict into a model. Raises: Problem if they do not fit."""
    try:
        tensors = load_file(path)
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise Problem(
            "DB-MODEL-004",
            f"{path} does not fit the run's model: {error}",
            fix="if the run has not ended yet, wait; if the model's code was changed, undo that",
        ) from error
    tied = set(missing) - _tied_names(model)
    if tied or unexpected:
        raise Problem(
            "DB-MODEL-004",
            f"{path} does not fit the run's model: "
            f"{(sorted(tied) + list(unexpected))[0]} is on one side only",
            fix="was the model's code changed since the run?",
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


def _tied_names(model: nn.Module) -> set[str]:
    """Names of the state dict that are another name of an earlier tensor."""
    owners: set[int] = set()
    tied: set[str] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        (tied if id(tensor) in owners else set()).add(name)
        owners.add(id(tensor))
    return tied
