"""Small jobs in memory: real shards behind a transport that waits, and the Downpour on top."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distbelief.controller.machine import Controller
from distbelief.param_server.buffers import BufferLayout
from distbelief.param_server.client import Client
from distbelief.param_server.contract import Contract
from distbelief.param_server.identity import Identity
from distbelief.param_server.layout import Group, layout_of, trainable
from distbelief.param_server.link import Patience
from distbelief.param_server.protocol import REQUESTS, Push, as_tensor
from distbelief.param_server.server import respond
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.shared import Shared
from distbelief.param_server.transport import MemoryClient
from distbelief.param_server.update import SGD, Rule
from distbelief.param_server.wire import encode
from distbelief.workers.comm import Comm
from distbelief.workers.control import Control
from distbelief.workers.downpour import Downpour, DownpourConfig
from distbelief.workers.notes import NOTES, AnyNote, Serving

RUN, TOKEN = "job", "secret"
PATIENCE_S = 30.0
"""Nothing here waits so long unless it is broken."""


class Wire(MemoryClient):
    """A MemoryClient whose `recv` waits for `wake`, as a socket's does: no thread spins."""

    def __init__(self, handlers) -> None:
        super().__init__(handlers)
        self._bell = threading.Event()

    def recv(self, timeout_s: float):
        received = super().recv(0)
        if received is None:
            self._bell.wait(timeout_s)
            self._bell.clear()
        return received

    def wake(self) -> None:
        self._bell.set()


def contract_of(
    model: nn.Module,
    rule: Rule | None = None,
    lr: float = 0.1,
    groups: Sequence[Group] | None = None,
    group_of: dict[str, int] | None = None,
) -> Contract:
    named = trainable(model.named_parameters())
    layout = layout_of(named, groups or (Group(lr=lr),), group_of)
    return Contract(layout, rule or SGD(), buffers=BufferLayout.of(model))


class Servers:
    """All shards of one contract. `pushes` and `grads` are what shard 0 was sent, in order."""

    def __init__(
        self, contract: Contract, num_shards: int = 1, num_workers: int = 1, *, memory: bool = False
    ) -> None:
        """memory: share it with the workers; `close` then."""
        self.contract = contract
        self._memory = memory
        self.shared = [Shared(is_on=memory) for _ in range(num_shards)]
        self.shards = [
            Shard(
                ShardConfig(
                    run=RUN, token=TOKEN, index=i, num_shards=num_shards, num_workers=num_workers
                ),
                make_home=self.shared[i].make_home,
            )
            for i in range(num_shards)
        ]
        self.gate = threading.Event()
        """While it is closed, pushes wait."""
        self.gate.set()
        self.pushes: list[Push] = []
        self.grads: list[Tensor] = []
        self._lock = threading.Lock()
        self.handlers = {
            f"shard{i}": self._handler(shard, shared)
            for i, (shard, shared) in enumerate(zip(self.shards, self.shared, strict=True))
        }

    def close(self) -> None:
        for shared in self.shared:
            shared.close()

    def _handler(self, shard: Shard, shared: Shared):
        def handle(peer, frames):
            message = REQUESTS.decode(frames[0])
            if isinstance(message, Push):
                assert self.gate.wait(PATIENCE_S)
                if shard is self.shards[0]:
                    self.pushes.append(message)
                    parts = [as_tensor(frame) for frame in frames[1:]]
                    if parts:  # else they lie in shared memory
                        self.grads.append(torch.cat([part for part in parts if part is not None]))
            with self._lock:
                reply = respond(shard, peer, frames, 0.0, shared)
                sent = [encode(reply.message), *map(bytes, reply.payload)]
                reply.release()
            return sent

        return handle

    def client(self, w: str = "w0", inc: int = 1, token: str = TOKEN) -> Client:
        return Client(
            Wire(self.handlers),
            list(self.handlers),
            Identity(run=RUN, w=w, inc=inc, token=token),
            self.contract,
            Patience(),
            memory=self._memory,
        )

    @property
    def values(self) -> Tensor:
        return torch.cat([p.values for shard in self.shards for p in shard.parts.values()])

    @property
    def samples_pushed(self) -> int:
        return sum(push.samples for push in self.pushes)

    @contextmanager
    def worker(
        self, model: nn.Module, config: DownpourConfig | None = None, w: str = "w0"
    ) -> Iterator[Downpour]:
        """A replica that has fetched; the first one brings the parameters."""
        named = trainable(model.named_parameters())
        with Comm(lambda: self.client(w)) as comm:
            comm.connect()
            downpour = Downpour.of(named, comm, self.contract, config)
            downpour.start(initialise=not self.shards[0].is_ready)
            try:
                yield downpour
            finally:
                self.gate.set()
                downpour.close()


def control_of(controller: Controller, lock=None) -> Control:
    """A process's line to a controller in memory. lock: where several threads use one."""
    lock = lock or threading.Lock()

    def handle(_, frames):
        note = NOTES.decode(frames[0])
        assert isinstance(note, AnyNote)
        with lock:
            answer = controller.handle(note, 0.0)
        return None if answer is None else [encode(answer)]

    transport = MemoryClient({"controller": handle})
    return Control(transport, "controller", sleep=lambda _: time.sleep(0.002))


def serving(index: int, endpoint: str | None = None) -> Serving:
    return Serving(
        run=RUN,
        token=TOKEN,
        name=f"shard{index}",
        inc=1,
        endpoint=endpoint or f"shard{index}",
        pid=1,
        host="here",
    )


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def batches(num: int, inputs: int = 20, outputs: int = 10, size: int = 4):
    """The same batches each time: [(x, y), ...] of a regression."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, inputs, generator=generator),
            torch.randn(size, outputs, generator=generator),
        )
        for _ in range(num)
    ]
