"""Factory: from the name of a model to an nn.Module and its contract with the shards."""

import copy
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distbelief.job import Job
from distbelief.param_server.buffers import BufferLayout
from distbelief.param_server.contract import Contract
from distbelief.param_server.layout import layout_of, trainable
from distbelief.param_server.partition import Partition
from distbelief.problem import Problem
from distbelief.workers.arena import refuse_sparse_modules
from distbelief.workers.data import Images, load
from distbelief.workers.worker import loss_of

KNOWN: Mapping[str, tuple[str, Mapping[str, Any]]] = {  # Any: arguments of the factory
    "googlenet": ("distbelief.model.googlenet:GoogLeNet", {}),
    "googlenet-small": (
        "distbelief.model.googlenet:GoogLeNet",
        {"stem": "small", "norm": "batch", "aux": False, "init": "xavier"},
    ),
}
"""Short names: factory and arguments. googlenet is the paper's network; googlenet-small is its
batch-norm variant for images of 16 to 64 pixels."""

IMAGE_SIZE = {"digits": 16}
"""What image_size = 0 means, by source."""


def make_model(job: Job, images: Images) -> nn.Module:
    """Build the job's model for its data; the same for the same seed, on every machine.

    Raises: Problem if the factory cannot be found, raises, or returns something else.
    """
    path, args = KNOWN.get(job.model.factory, (job.model.factory, {}))
    factory = _find(path)
    offered = {
        "num_classes": images.num_classes,
        "in_channels": images.inputs.shape[1],
        "image_size": images.inputs.shape[-1],
        "width": job.model.width,
    }
    given = {**args, **job.model.args}
    takes = _parameters(factory)
    if job.model.width != 1 and "width" not in takes:
        raise Problem("DB-USE-003", f"{path} takes no width, but width is {job.model.width}")
    given = {**{name: value for name, value in offered.items() if name in takes}, **given}
    torch.manual_seed(job.seed)
    try:
        model = factory(**given)
    except Exception as error:  # the user's code may raise anything
        raise Problem(
            "DB-MODEL-001",
            f"the model factory {path} raised {type(error).__name__}: {error}",
            why=_user_frames(error),
            fix='call it yourself: python -c "from '
            + path.replace(":", " import ")
            + f'; {path.rpartition(":")[2]}({", ".join(f"{k}={v!r}" for k, v in given.items())})"',
        ) from error
    if not isinstance(model, nn.Module):
        raise Problem(
            "DB-MODEL-002",
            f"the model factory {path} returned a {type(model).__name__}, not an nn.Module",
        )
    return model


def make_contract(job: Job, model: nn.Module, num_samples: int) -> Contract:
    """What workers and shards of this job agree on. num_samples: of the training split.

    Raises: Problem naming the parameter that cannot be trained, or that shards are too many.
    """
    try:
        refuse_sparse_modules(model.named_modules())
        named = trainable(model.named_parameters())
        groups = job.train.groups
        group_of = {n: int(len(groups) > 1 and p.ndim < 2) for n, p in named}
        contract = Contract(
            layout=layout_of(named, groups, group_of),
            rule=job.train.rule,
            schedule=job.schedule(num_samples),
            clip_part_norm=job.train.clip_part_norm,
            buffers=BufferLayout.of(model),
        )
        Partition(contract.layout, job.shards)
    except ValueError as error:
        raise Problem("DB-MODEL-003", str(error)) from error
    return contract


def try_model(job: Job, model: nn.Module, images: Images) -> None:
    """Run one batch through a copy of the model, so that a misfit shows before the start.

    Raises: Problem if its forward pass or its loss does.
    """
    trial = copy.deepcopy(model)
    inputs, targets = images.batch(torch.arange(min(job.train.batch_size, len(images))))
    try:
        with torch.no_grad():
            loss_of(trial, trial.train()(inputs), targets)
    except Exception as error:  # the user's code may raise anything
        raise Problem(
            "DB-MODEL-005",
            f"a first batch {list(inputs.shape)} failed in {type(model).__name__}: "
            f"{type(error).__name__}: {error}",
            why=_user_frames(error),
            fix="does the model fit the data? See num_classes, in_channels and image_size",
        ) from error


def load_images(job: Job, split: str) -> Images:
    """Open a split of the job's data.

    Raises: Problem.
    """
    kind = job.data.source.partition(":")[0]
    size = job.data.image_size or IMAGE_SIZE.get(kind, 0)
    try:
        return load(job.data.source, split, size)
    except (ValueError, OSError) as error:
        raise Problem("DB-DATA-001", str(error)) from error


def _find(path: str) -> Callable[..., object]:
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise Problem(
            "DB-USE-003",
            f"model {path!r} is neither {', '.join(KNOWN)} nor module:factory",
            fix="write it as --model my_net:Net, for a file my_net.py in this folder",
        )
    here = str(Path.cwd())
    if here not in sys.path:  # as `python` itself would: the user's own files come first
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script, not a module, may even end the process
        raise Problem(
            "DB-MODEL-001",
            f"importing {module_name} raised {type(error).__name__}: {error}",
            why=_user_frames(error),
            fix=f"call it from the folder where `python -c 'import {module_name}'` works",
        ) from error
    factory: Callable[..., object] | None = getattr(module, name, None)
    if not callable(factory):
        raise Problem("DB-MODEL-001", f"{module_name} has no callable {name!r}")
    return factory


def _parameters(factory: Callable[..., object]) -> set[str]:
    try:
        return set(inspect.signature(factory).parameters)
    except ValueError:  # written in C, without a signature
        return set()


def _user_frames(error: BaseException) -> str:
    """The traceback without our own frames and the import machinery."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and "importlib" not in frame.filename
    ]
    return "".join(traceback.format_list(frames)).rstrip()
