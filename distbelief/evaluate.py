"""Evaluate: how good the parameters of a run are on a split of its data."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from distbelief.factory import load_images, make_model
from distbelief.job import Job
from distbelief.problem import Problem
from distbelief.result import Accuracy
from distbelief.workers.data import Images

MODEL = "model.safetensors"
"""The state dict of a run's model, in its run folder: parameters and buffers."""


def evaluate(model: nn.Module, images: Images, split: str, batch_size: int = 100) -> Accuracy:
    """Top-1 and top-5 accuracy.

    Raises: Problem if the model does not give one row of scores a sample.
    """
    was_training = model.training
    model.eval()
    top1 = top5 = 0
    with torch.inference_mode():
        for inputs, targets in images.batches(batch_size):
            outputs = model(inputs)
            if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2:
                raise Problem(
                    "DB-MODEL-005",
                    f"{type(model).__name__} gives {_describe(outputs)} in evaluation, not "
                    "scores of shape [batch, classes]",
                    fix="return the scores alone where not self.training",
                )
            k = min(5, outputs.shape[1])
            hits = outputs.topk(k, dim=1).indices == targets.unsqueeze(1)  # [B, k]
            top1 += int(hits[:, 0].sum())
            top5 += int(hits.any(dim=1).sum())
    model.train(was_training)
    return Accuracy(
        split, top1 / len(images), top5 / len(images) if images.num_classes > 5 else None
    )


def save_model(model: nn.Module, run: Path) -> Path:
    """Write the state dict; tied tensors once, under their first name."""
    path = run / MODEL
    kept: dict[str, torch.Tensor] = {}
    owners: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in owners:
            owners.add(id(tensor))
            kept[name] = tensor.detach().clone().contiguous()
    save_file(kept, path)
    return path


def evaluate_run(run: Path, split: str, source: str | None = None) -> Accuracy:
    """Build the model of a run folder again and evaluate it.

    source: other data than the run's. Raises: Problem.
    """
    try:
        job = Job.from_json((run / "job.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Problem(
            "DB-RUN-002",
            f"{run} is not a run folder: {error}",
            fix="name the folder that `distbelief launch` printed, such as runs/20261122-1015-ab12",
        ) from error
    if source is not None:
        job = replace(job, data=replace(job.data, source=source))
    if not (run / MODEL).is_file():
        raise Problem(
            "DB-RUN-006",
            f"{run} has no {MODEL}: the run has not ended, or it ended without saving",
            fix=f"if there is one, {run / 'result.json'} says how it ended",
        )
    images = load_images(job, split)
    model = make_model(job, images)
    try:
        tensors = load_file(run / MODEL)
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise Problem(
            "DB-MODEL-004",
            f"{run / MODEL} does not fit the run's model: {error}",
            fix="if the run has not ended yet, wait; if the model's code was changed, undo that",
        ) from error
    tied = set(missing) - _tied_names(model)
    if tied or unexpected:
        raise Problem(
            "DB-MODEL-004",
            f"{run / MODEL} does not fit the run's model: "
            f"{(sorted(tied) + list(unexpected))[0]} is on one side only",
            fix="was the model's code changed since the run?",
        )
    return evaluate(model, images, split)


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
