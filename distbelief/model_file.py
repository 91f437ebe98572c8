"""ModelFile: the state dict of a model in a safetensors file, written whole and held against what
it is read into."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distbelief.problem import Problem


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


def load_model(model: nn.Module, path: Path) -> None:
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


def _tied_names(model: nn.Module) -> set[str]:
    """Names of the state dict that are another name of an earlier tensor."""
    owners: set[int] = set()
    tied: set[str] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        (tied if id(tensor) in owners else set()).add(name)
        owners.add(id(tensor))
    return tied
