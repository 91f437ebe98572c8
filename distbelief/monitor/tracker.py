"""Trackers: thin loggers for Weights & Biases, MLflow and trackio. None is needed, none imported
before it is asked for.

The tests of this project hold them against stand-ins with the signatures that the packages have in
their documentation; the packages themselves are not among its dependencies. Where to send what, and
with which key, is theirs to know: their own environment variables and files say so (WANDB_API_KEY,
WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID, ...).

An event is a 1 under its kind's name at its step: all three draw numbers.
"""

import time
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from distbelief.chronicle import Begin, Event
from distbelief.monitor.logger import flat, package

PROJECT = "distbelief"
PARAMS_MAX = 100
"""Parameters that MLflow takes at once."""
VALUE_MAX = 500
"""Characters of a parameter's value, which every store of MLflow takes."""
_ENDS = {"done": "FINISHED", "stopped": "KILLED"}
"""Word of the run's result -> MLflow's; the others are FAILED."""


class Wandb:
    """A Logger (logger.py) for Weights & Biases."""

    name = "wandb"

    def __init__(self) -> None:
        self._wandb: Any = None  # Any: it is not installed where types are checked
        self._run: Any = None

    def start(self, begin: Begin) -> None:
        self._wandb = package("wandb", self.name)
        self._run = self._wandb.init(
            project=PROJECT,
            id=begin.run,
            name=f"{begin.name}-{begin.run}",
            config=begin.config,
            dir=begin.run_path or None,
            resume="allow",  # the next attempt of a run goes on with it
            settings={"console": "off"},  # standard output is not ours
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def histogram(
        self, name: str, edges: Sequence[float], counts: Sequence[int], step: int
    ) -> None:
        histogram = self._wandb.Histogram(np_histogram=(list(counts), list(edges)))
        self._run.log({name: histogram}, step=step)

    def event(self, event: Event, step: int) -> None:
        self._run.log({f"events/{event.kind}": 1}, step=step)

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "done" else 1)


class Mlflow:
    """A Logger (logger.py) for MLflow. It has no histograms: those are left out."""

    name = "mlflow"

    def __init__(self) -> None:
        self._entities: Any = None  # Any: as above
        self._client: Any = None
        self._run_id = ""

    def start(self, begin: Begin) -> None:
        self._client = package("mlflow", self.name).MlflowClient()
        self._entities = package("mlflow.entities", self.name)
        if not self._run_id:  # it may be there already, and its parameters not
            found = self._client.get_experiment_by_name(PROJECT)
            experiment = self._client.create_experiment(PROJECT) if found is None else None
            run = self._client.create_run(
                found.experiment_id if experiment is None else experiment,
                tags={"distbelief.run": begin.run, "distbelief.attempt": str(begin.attempt)},
                run_name=f"{begin.name}-{begin.run}",
            )
            self._run_id = run.info.run_id
        params = iter(
            [
                self._entities.Param(key, str(value)[:VALUE_MAX])
                for key, value in flat(begin.config).items()
            ]
        )
        while some := list(islice(params, PARAMS_MAX)):
            self._client.log_batch(self._run_id, params=some)

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(key, value, now, step) for key, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def histogram(
        self, name: str, edges: Sequence[float], counts: Sequence[int], step: int
    ) -> None:
        pass

    def event(self, event: Event, step: int) -> None:
        self.log({f"events/{event.kind}": 1.0}, step)

    def finish(self, status: str) -> None:
        self._client.set_terminated(self._run_id, status=_ENDS.get(status, "FAILED"))


class Trackio:
    """A Logger (logger.py) for trackio."""

    name = "trackio"

    def __init__(self) -> None:
        self._trackio: Any = None  # Any: as above
        self._run: Any = None

    def start(self, begin: Begin) -> None:
        self._trackio = package("trackio", self.name)
        self._run = self._trackio.init(
            project=PROJECT,
            name=f"{begin.name}-{begin.run}",
            config=flat(begin.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,  # of the monitor's node, which says nothing of the workers'
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def histogram(
        self, name: str, edges: Sequence[float], counts: Sequence[int], step: int
    ) -> None:
        histogram = self._trackio.Histogram(np_histogram=(list(counts), list(edges)))
        self._run.log({name: histogram}, step=step)

    def event(self, event: Event, step: int) -> None:
        self._run.log({f"events/{event.kind}": 1}, step=step)

    def finish(self, status: str) -> None:
        self._run.finish()
