"""Hosts for the tests of this folder; skipped, with the reason, without root or the tools."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, missing


@pytest.fixture
def make_hosts(tmp_path: Path, repo_root: Path) -> Iterator[Callable[[int], Hosts]]:
    """Makes so many hosts that run this tree's code; they are gone after the test."""
    why = missing()
    if why is not None:
        pytest.skip(f"no hosts: {why}")
    with ExitStack() as stack:

        def make(num: int) -> Hosts:
            env = {"PYTHONPATH": str(repo_root), "RAY_USAGE_STATS_ENABLED": "0"}
            return stack.enter_context(Hosts.up(num, tmp_path / "hosts", env))

        yield make
