"""Shared: the memory between a shard and the workers of its host, as the shard's process holds it.

The shard's values lie in a slab that workers map; the gradients lie in each worker's memory, which
this maps to read. Only headers go over ZeroMQ. A worker whose memory does not open here, because
it is on another host, is served over TCP like everybody else.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from distbelief.param_server.backup import VECTORS_MAX
from distbelief.param_server.layout import Layout, PartRange
from distbelief.param_server.memory import Memory, MemoryRefused, is_supported, without_memory
from distbelief.param_server.part import Heap, Home
from distbelief.param_server.protocol import Push
from distbelief.param_server.slab import Slab, slab_bytes

logger = logging.getLogger(__name__)

VECTORS = 4
"""Gradient vectors that a worker's memory has room for, if it keeps none of them."""
MOST_VECTORS = VECTORS + VECTORS_MAX
"""At most, with those that it keeps until they are durable; what is not used takes no memory."""
_PAGE = 4096


def vector_bytes(layout: Layout) -> int:
    """From one vector in a worker's memory to the next."""
    return -(-4 * layout.total // _PAGE) * _PAGE


def worker_bytes(layout: Layout, vectors: int = VECTORS) -> int:
    """Size of a worker's memory."""
    return vectors * vector_bytes(layout)


@dataclass(slots=True)
class _Worker:
    """A worker of this host."""

    memory: Memory
    gradients: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    """By the place of the vector and the index of the part."""


class Shared:
    """See the top of this file. Used by the thread that serves the shard."""

    def __init__(self, *, is_on: bool = True) -> None:
        """is_on: False makes everything go over TCP."""
        self._is_on = is_on and is_supported()
        self._slab: Memory | None = None
        self._workers: dict[bytes, _Worker] = {}

    def make_home(self, parts: Sequence[PartRange]) -> Home:
        """Where the values of the shard's parts live: for Shard."""
        if not self._is_on:
            return Heap()
        try:
            self._slab = Memory.create("shard", slab_bytes(parts))
        except OSError as error:
            logger.warning("%s: all workers are served over TCP", without_memory(error))
            self._is_on = False
            return Heap()
        return Slab(self._slab.array(), parts)

    def attach(self, peer: bytes, address: str, layout: Layout) -> str:
        """Map a worker's memory; returns the address of the slab, empty if they do not share.

        A worker that comes back on another connection has closed the one before: so its memory is
        mapped once, however often it comes.
        """
        for other, worker in list(self._workers.items()):
            if other == peer or worker.memory.address == address:
                self.detach(other)
        if self._slab is None or not address:
            return ""
        try:
            memory = Memory.open(address, "worker")
        except MemoryRefused as error:
            logger.info("a worker is served over TCP: %s", error)
            return ""
        vectors, rest = divmod(memory.size, vector_bytes(layout))
        if rest or not VECTORS <= vectors <= MOST_VECTORS:
            memory.close()
            logger.warning("a worker's memory has %d bytes, not those of its model", memory.size)
            return ""
        self._workers[peer] = _Worker(memory)
        return self._slab.address

    def gradients(self, peer: bytes, push: Push, layout: Layout) -> list[Tensor] | None:
        """The gradients of a push, one 1-D float32 tensor a part; None if they are not there.

        They are the worker's: read them before it is answered.
        """
        worker = self._workers.get(peer)
        if worker is None:
            return None
        of_part = worker.gradients.get(push.place)
        if of_part is None:
            step = vector_bytes(layout)
            if push.place % step or push.place >= worker.memory.size:
                return None
            of_part = worker.gradients[push.place] = {}
        found = []
        for index in push.part:
            gradient = of_part.get(index)
            if gradient is None:
                if index >= len(layout.parts):
                    return None
                part = layout.parts[index]
                gradient = worker.memory.vector(push.place + 4 * part.start, part.numel)
                of_part[index] = gradient
            found.append(gradient)
        return found

    def detach(self, peer: bytes) -> None:
        """Let go of a worker's memory."""
        worker = self._workers.pop(peer, None)
        if worker is not None:
            worker.gradients.clear()
            worker.memory.close()

    def sweep(self) -> None:
        """Let go of the memory of processes that are gone: until then it stays allocated."""
        for peer in [p for p, worker in self._workers.items() if not worker.memory.is_owner_alive]:
            self.detach(peer)

    def close(self) -> None:
        for peer in list(self._workers):
            self.detach(peer)
        if self._slab is not None:
            self._slab.close()
            self._slab = None

    @property
    def num_workers(self) -> int:
        """Workers served by shared memory."""
        return len(self._workers)
