"""Open files: each worker is a connection, and each connection a descriptor of every shard."""

import resource

from distbelief.problem import Problem

SPARE = 200
"""Descriptors for everything else: logs, snapshots, what libraries open."""


def files_needed(num_workers: int) -> int:
    """A connection that is being replaced is there twice."""
    return 2 * num_workers + SPARE


def allow_files(num_workers: int) -> None:
    """Raise this process' limit of open files as far as its workers need, and no further.

    Processes that it starts inherit that. Raises: Problem where the system allows less.
    """
    need = files_needed(num_workers)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= need:
        return
    if hard != resource.RLIM_INFINITY and hard < need:
        raise Problem(
            "DB-ENV-007",
            f"{num_workers} workers may need {need} open files in a process, {hard} are allowed",
            why="each worker is a connection to the launcher and to every shard",
            fix=f"ulimit -Hn {need} as root, LimitNOFILE={need} of its service, or fewer workers",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
