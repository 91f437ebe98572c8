"""Floor: what the hand-written systems have in common that ours is measured against.

They do the same work with nothing else: no checks, no retries, no snapshots, no names. What ours
loses against them is the price of those. Workers load no torch; servers apply with torch's kernel.
"""

from itertools import pairwise

import numpy as np

from distbelief.bench.board import Seat
from distbelief.bench.region import Vector
from distbelief.bench.system import System

CHUNK = 2**18
"""Elements of a chunk: 1 MiB of float32."""


def slices(size: int, shards: int) -> list[tuple[int, int]]:
    """Equal half-open ranges of the vector, one a server."""
    cuts = [size * i // shards for i in range(shards + 1)]
    return list(pairwise(cuts))


def chunks(numel: int) -> list[tuple[int, int]]:
    """Half-open ranges of at most a chunk."""
    return [(start, min(start + CHUNK, numel)) for start in range(0, numel, CHUNK)]


def look(seat: Seat, values: Vector) -> None:
    """Count the chunks of a fetched vector whose elements differ: they are of several moments."""
    ranges = chunks(len(values))
    torn = sum(bool(np.ptp(values[start:stop])) for start, stop in ranges)
    seat.look(len(ranges), torn)


def ends(values: Vector) -> tuple[float, float]:
    """Smallest and largest."""
    return float(values.min()), float(values.max())


FLOORS = {
    floor.name: floor
    for floor in (
        System(
            name="shm direct",
            transport="shm",
            server="distbelief.bench.floor_memory:serve",
            worker="distbelief.bench.floor_memory:work",
        ),
        System(
            name="zmq simple",
            transport="tcp",
            server="distbelief.bench.floor_zmq:serve",
            worker="distbelief.bench.floor_zmq:work_simple",
        ),
        System(
            name="zmq chunk1",
            transport="tcp",
            server="distbelief.bench.floor_zmq:serve",
            worker="distbelief.bench.floor_zmq:work_chunks",
        ),
        System(
            name="socket chunk1",
            transport="tcp",
            server="distbelief.bench.floor_socket:serve",
            worker="distbelief.bench.floor_socket:work",
        ),
    )
}
