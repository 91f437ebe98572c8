"""Asynchronous data-parallel training for PyTorch, after DistBelief (Dean et al. 2012).

This package stays lazy: every process of a job runs this file first, and a shard server must
not load the command line, Ray or the job's configuration with it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distbelief.job import Job as Job

__version__ = "0.1.0.dev0"
__all__ = ["Job", "__version__"]


def __getattr__(name: str) -> object:
    """Load a public name at its first use (PEP 562)."""
    if name == "Job":
        from distbelief.job import Job

        return Job
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
