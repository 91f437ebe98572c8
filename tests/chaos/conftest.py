"""What the tests of this folder share: a process that forks shards, and such a shard."""

import pytest

from tests.helpers.children import Children, nursery
from tests.helpers.collector import start_collector
from tests.helpers.peers import serve


@pytest.fixture(scope="package", autouse=True)
def _collector():
    start_collector()


@pytest.fixture(scope="package")
def breeder():
    """Forks processes; started once for the folder."""
    with nursery("tests.helpers.peers", "tests.chaos.test_cuts") as context:
        yield context


@pytest.fixture
def shard(breeder):
    """A shard's process without shared memory: (pid, port)."""
    children = Children(breeder)
    child = children.start(serve, is_on=False)
    endpoint = child.hear()
    yield child.pid, int(endpoint.rpartition(":")[2])
    assert child.close() == 0
    children.close()
