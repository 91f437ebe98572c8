"""Loaded: the models of runs, built again from what is in their folders, and evaluated."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from distbelief.confusion import Confusion
from distbelief.ensemble import Ensemble
from distbelief.evaluate import evaluate
from distbelief.factory import make_model, num_loaders, open_data
from distbelief.folder import RunFolder
from distbelief.job import Job
from distbelief.model_file import load_model
from distbelief.problem import Problem
from distbelief.result import Accuracy
from distbelief.workers.pixels import Pictures
from distbelief.workers.split import Split


@dataclass(frozen=True, slots=True)
class Members:
    """The models of several runs, of the same classes, and the data of the first."""

    job: Job
    split: Split
    models: list[nn.Module]
    place: RunFolder
    """Of the first: the user's own data is found from where it was launched."""

    def seen_as(self, crops: int) -> Split:
        """The split, each image as so many crops; 0 as in training. Raises: Problem."""
        if not crops:
            return self.split
        if not isinstance(self.split.samples, Pictures):
            raise Problem(
                "DB-DATA-007",
                f"crops are of image files, and {self.job.data.source} is in memory as it is",
                fix="leave --crops out",
            )
        return replace(self.split, samples=self.split.samples.crops(crops))

    def loaders(self, said: int | None) -> int:
        """Processes that decode, where nobody said how many."""
        return num_loaders(replace(self.job, workers=1), self.split) if said is None else said


def read_runs(
    runs: Sequence[Path], name: str, source: str | None = None, *, last: bool = False
) -> Members:
    """Build the models of several runs again. The rest as `evaluate_run`. Raises: Problem."""
    models: list[nn.Module] = []
    first: tuple[Job, Split, RunFolder] | None = None
    for run in runs:
        folder, job, model_file = _read_run(run, source, last=last)
        with where_it_began(folder, source):
            split = _open(job, name)
            if first is None:
                first = (job, split, folder)
            model = make_model(job, split)
            load_model(model, model_file)
            models.append(model.eval())
        mine, theirs = first[1], split
        if (mine.num_classes, mine.input_shape) != (theirs.num_classes, theirs.input_shape):
            raise Problem(
                "DB-USE-013",
                f"{run} has {theirs.num_classes} classes of {theirs.input_shape}, {runs[0]} has "
                f"{mine.num_classes} of {mine.input_shape}: no mean can be taken of them",
                fix="name runs of the same classes and image size",
            )
    assert first is not None
    return Members(first[0], first[1], models, first[2])


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
    members = read_runs(runs, name, source, last=last)
    return evaluate_members(members, source, crops=crops, loaders=loaders, seen=seen)


def evaluate_members(
    members: Members,
    source: str | None = None,
    *,
    crops: int = 0,
    loaders: int | None = None,
    seen: Callable[[int, int], None] | None = None,
    confusion: Confusion | None = None,
) -> Accuracy:
    """As `evaluate_runs`, of models that were read. confusion: as `evaluate`. Raises: Problem."""
    split = members.seen_as(crops)
    alone = len(members.models) == 1 and not crops
    with where_it_began(members.place, source):
        return evaluate(
            members.models[0] if alone else Ensemble(members.models),
            split,
            batch_size=batch_of(crops),
            num_loaders=members.loaders(loaders),
            seen=seen,
            confusion=confusion,
        )


def batch_of(crops: int) -> int:
    """Images that are read at once."""
    return max(1, 100 // max(1, crops))


@dataclass(frozen=True, slots=True)
class Loaded:
    """The model of a run, with what it is given."""

    job: Job
    model: nn.Module
    input_shape: tuple[int, int, int] | None


def load_run(run: Path, name: str, source: str | None = None, *, last: bool = False) -> Loaded:
    """Build the model of a run folder again; the split of that name says what it is given, unless
    the job itself does. The rest as `evaluate_run`. Raises: Problem."""
    folder, job, model_file = _read_run(run, source, last=last)
    args = job.model.args
    shape: tuple[int, int, int] | None
    with where_it_began(folder, source):
        said = [args.get(key) for key in ("in_channels", "image_size", "image_size")]
        if source is None and "num_classes" in args and all(type(n) is int for n in said):
            channels, height, width = said
            shape = (int(channels or 0), int(height or 0), int(width or 0))
            model = make_model(job, None)
        else:
            split = _open(job, name)
            shape, model = split.input_shape, make_model(job, split)
        load_model(model, model_file)
    return Loaded(job, model, shape)


def evaluate_run(
    run: Path, name: str, source: str | None = None, *, last: bool = False
) -> Accuracy:
    """Build the model of a run folder again and evaluate it on the split of that name.

    last: the last values, where the run's model is their average. source: other data than the
    run's. The user's modules are found from where the run was launched; that folder is the current
    one meanwhile. Raises: Problem.
    """
    folder, job, model_file = _read_run(run, source, last=last)
    with where_it_began(folder, source):
        split = _open(job, name)
        model = make_model(job, split)
        load_model(model, model_file)
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
def where_it_began(folder: RunFolder, source: str | None) -> Iterator[None]:
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
