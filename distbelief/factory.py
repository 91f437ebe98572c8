"""Factory: from the name of a model to an nn.Module and its contract with the shards."""

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import islice
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
from distbelief.workers.data import open_split
from distbelief.workers.feed import Batch, default_loaders, read_all
from distbelief.workers.own import UserError, find, user_frames
from distbelief.workers.pixels import Pictures
from distbelief.workers.split import Split
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
"""What image_size = 0 means, where a source's own size does not suit."""
TRIALS = 10
"""The trial takes a batch that can be read from so many first ones."""


def make_model(job: Job, split: Split | None) -> nn.Module:
    """Build the job's model for its data; the same for the same seed, on every machine.

    The factory is offered num_classes, in_channels, image_size and width, as far as the data
    tells them. split: None where model.args say all that.

    Raises: Problem if the factory cannot be found, raises, or returns something else.
    """
    path, args = KNOWN.get(job.model.factory, (job.model.factory, {}))
    factory = _find(path)
    shape = None if split is None else split.input_shape
    told = {
        "num_classes": None if split is None else split.num_classes,
        "in_channels": None if shape is None else shape[0],
        "image_size": shape[-1] if shape is not None and shape[-1] == shape[-2] else None,
    }
    known = {name: value for name, value in told.items() if value is not None}
    offered = {**known, "width": job.model.width}
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
            why=user_frames(error),
            fix=_unknown(set(told) - set(known), takes - set(given), job.data.source)
            + 'call it yourself: python -c "from '
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
            average=job.average(num_samples),
            clip_part_norm=job.train.clip_part_norm,
            buffers=BufferLayout.of(model),
        )
        Partition(contract.layout, job.shards)
    except ValueError as error:
        raise Problem("DB-MODEL-003", str(error)) from error
    return contract


def try_model(job: Job, model: nn.Module, split: Split) -> None:
    """Run one batch through a copy of the model, so that a misfit shows before the start.

    Raises: Problem if its forward pass or its loss does, or no batch can be read.
    """
    trial = copy.deepcopy(model)
    batch = _first_batch(split, job.train.batch_size)
    try:
        with torch.no_grad():
            loss_of(trial, trial.train()(batch.inputs), batch.targets)
    except Exception as error:  # the user's code may raise anything
        raise Problem(
            "DB-MODEL-005",
            f"a first batch {_shape(batch.inputs)} failed in {type(model).__name__}: "
            f"{type(error).__name__}: {error}",
            why=user_frames(error),
            fix="does the model fit the data? See num_classes, in_channels and image_size",
        ) from error


def open_data(job: Job, split: str) -> Split | None:
    """Open a split of the job's data; None if there is no test split, a training split always is.

    Raises: Problem.
    """
    kind = job.data.source.partition(":")[0]
    size = job.data.image_size or IMAGE_SIZE.get(kind, 0)
    try:
        return open_split(job.data.source, split, size)
    except UserError as error:
        raise Problem("DB-DATA-004", str(error), why=error.frames, fix=error.fix) from error
    except (ValueError, OSError) as error:
        raise Problem("DB-DATA-001", str(error)) from error


def with_views(job: Job, split: Split) -> Split:
    """The training split as workers see it: with the views that the job wants drawn.

    Raises: Problem if it holds no image files.
    """
    if job.data.views == "middle":
        return split
    if not isinstance(split.samples, Pictures):
        raise Problem(
            "DB-DATA-007",
            f"data.views is {job.data.views!r}, but {job.data.source} holds no image files: its "
            "samples are in memory as they are",
            fix="leave data.views as it is, or train on folder:PATH or wds:PATTERN",
        )
    return replace(split, samples=split.samples.drawn(job.data.views, job.data_seed))


def num_loaders(job: Job, split: Split) -> int:
    """Processes that decode in each worker of the job."""
    if job.data.loaders is not None:
        return job.data.loaders
    return default_loaders(split, job.workers)


def _first_batch(split: Split, batch_size: int) -> Batch:
    """The first batch that can be read; the launcher itself reads it."""
    bad: tuple[tuple[str, str], ...] = ()
    try:
        with closing(read_all(split, batch_size)) as batches:
            for batch in islice(batches, TRIALS):
                bad += batch.bad
                if batch.num_good >= min(2, batch.num_positions):  # one is none to a BatchNorm
                    return batch
    except Exception as error:  # the user's own data may raise anything
        raise Problem(
            "DB-DATA-004",
            f"reading a first batch raised {type(error).__name__}: {error}",
            why=user_frames(error),
        ) from error
    raise Problem(
        "DB-DATA-006",
        f"the first {len(bad)} samples cannot be read; {bad[0][0]}: {bad[0][1]}",
        fix="look at one of these files yourself",
    )


def _shape(inputs: object) -> str:
    return str(list(inputs.shape)) if isinstance(inputs, torch.Tensor) else type(inputs).__name__


def _find(path: str) -> Callable[..., object]:
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise Problem(
            "DB-USE-003",
            f"model {path!r} is neither {', '.join(KNOWN)} nor module:factory",
            fix="write it as --model my_net:Net, for a file my_net.py in this folder",
        )
    if module_name == "__main__":
        raise Problem(
            "DB-USE-003",
            f"model {path!r} lies in the program that runs here, which workers do not have",
            fix="put it into a file of its own, such as my_net.py, and name it my_net:" + name,
        )
    try:
        return find(path)
    except UserError as error:
        raise Problem("DB-MODEL-001", str(error), why=error.frames, fix=error.fix) from error


def _unknown(untold: set[str], missing: set[str], source: str) -> str:
    """A hint where the factory takes something that the data does not tell."""
    names = sorted(untold & missing)
    if not names:
        return ""
    return (
        f"{source} does not tell {', '.join(names)}: --set model.args.{names[0]}=..., or give "
        "your dataset that attribute; or "
    )


def _parameters(factory: Callable[..., object]) -> set[str]:
    try:
        return set(inspect.signature(factory).parameters)
    except ValueError:  # written in C, without a signature
        return set()
