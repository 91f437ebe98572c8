"""Asynchronous data-parallel training for PyTorch, after DistBelief (Dean et al. 2012).

This package stays lazy: every process of a job runs this file first, and a shard server must
not load the command line, Ray or the job's configuration with it.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distbelief.job import Job as Job
    from distbelief.launcher import launch as launch
    from distbelief.param_server.schedule import Schedule as Schedule
    from distbelief.result import Result as Result
    from distbelief.script import DataLoader as DataLoader
    from distbelief.script import Downpour as Downpour
    from distbelief.script import worker as worker

__version__ = "0.1.0.dev0"

_HOMES = {
    "DataLoader": "distbelief.script",
    "Downpour": "distbelief.script",
    "Job": "distbelief.job",
    "Result": "distbelief.result",
    "Schedule": "distbelief.param_server.schedule",
    "launch": "distbelief.launcher",
    "worker": "distbelief.script",
}
"""Public name -> the module that it is loaded from at its first use (PEP 562)."""

__all__ = [
    "DataLoader",
    "Downpour",
    "Job",
    "Result",
    "Schedule",
    "__version__",
    "launch",
    "worker",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
