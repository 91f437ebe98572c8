"""A run of a user's script in memory: a real controller, a real shard, and workers' sessions.

Every worker of the run lives in this process; `Script.be` says which one the next lines are.
"""

import threading
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from distbelief.controller.account import Tally
from distbelief.controller.machine import Controller
from distbelief.param_server.identity import Identity
from distbelief.param_server.server import respond
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.transport import MemoryClient
from distbelief.param_server.wire import encode
from distbelief.workers import session
from distbelief.workers.control import Control
from distbelief.workers.joined import Joined
from distbelief.workers.lease import LeaseQueue, Position
from distbelief.workers.notes import NOTES, AnyNote, Beat, Fence, Fenced, Who
from distbelief.workers.session import WorkerInfo
from tests.workers.jobs import RUN, TOKEN, Wire, serving


class Script:
    """Controller and shard of a run, and the sessions of its workers. A context manager."""

    def __init__(
        self, num_workers: int = 1, position: Position | None = None, seed: int = 0
    ) -> None:
        """num_workers: as the sessions tell the script. Nobody waits for others to gather."""
        self.now = 0.0
        self.seed = seed
        self.num_workers = num_workers
        self.queue = LeaseQueue(0, 0, position=position)
        self.controller = Controller(RUN, TOKEN, self.queue, 1)
        self.shard = Shard(ShardConfig(run=RUN, token=TOKEN, num_workers=num_workers))
        self.sessions: list[Joined] = []
        self.notes: list[AnyNote] = []
        self.slept: list[float] = []
        self._lock = threading.Lock()
        self.controller.handle(serving(0, "shard0"), 0.0)

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.sessions:
            one.close()
        session.set_current(None)

    def control(self) -> Control:
        def handle(_, frames):
            note = NOTES.decode(frames[0])
            assert isinstance(note, AnyNote)
            self.notes.append(note)
            answer = self.controller.handle(note, self.now)
            return None if answer is None else [encode(answer)]

        return Control(MemoryClient({"controller": handle}), "controller", sleep=self._sleep)

    def transport(self) -> Wire:
        def handle(peer, frames):
            with self._lock:
                reply = respond(self.shard, peer, frames, 0.0)
                sent = [encode(reply.message), *map(bytes, reply.payload)]
                reply.release()
            return sent

        return Wire({"shard0": handle})

    def be(self, index: int = 0, inc: int = 1, **more: Any) -> Joined:
        """From here on this process is that worker; it is made at the first call, of `more`."""
        for one in self.sessions:
            if one.info.index == index:
                session.set_current(one)
                return one
        joined = Joined(
            Identity(run=RUN, w=f"w{index}", inc=inc, token=TOKEN),
            self.control(),
            self.transport,
            WorkerInfo(index=index, count=self.num_workers),
            self.seed,
            clock=lambda: self.now,
            sleep=self._sleep,
            **more,
        )
        self.sessions.append(joined)
        session.set_current(joined)
        return joined

    def beat(self) -> None:
        """The shard asks whether it is still wanted, and does what it is told."""
        who: Who = {"run": RUN, "token": TOKEN, "name": "shard0", "inc": 1}
        answer = self.controller.handle(Beat(**who), self.now)
        while isinstance(answer, Fence):
            tally = asdict(Tally.of(self.shard.fence(answer.w, answer.inc)))
            note = Fenced(**who, w=answer.w, of_inc=answer.inc, **tally)
            answer = self.controller.handle(note, self.now)

    @property
    def values(self) -> Tensor:
        """What the shard has."""
        return torch.cat([part.values for part in self.shard.parts.values()])

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        assert len(self.slept) < 10_000, "waits for ever"


class Numbers(Dataset[Any]):
    """Sample i is the number i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def linear(inputs: int = 20, outputs: int = 10) -> nn.Linear:
    """The same one each time."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Linear(inputs, outputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model
