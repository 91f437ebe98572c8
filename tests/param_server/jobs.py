"""Small jobs for the tests of this folder: a layout of three parts, shards, messages, a client."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distbelief.param_server.buffers import BufferLayout
from distbelief.param_server.client import Client
from distbelief.param_server.contract import Contract
from distbelief.param_server.identity import Identity
from distbelief.param_server.image import ShardImage
from distbelief.param_server.layout import PART_MAX, Entry, Group, Layout
from distbelief.param_server.link import Patience
from distbelief.param_server.protocol import (
    Ack,
    Fetch,
    Hello,
    Init,
    Leave,
    Merge,
    Params,
    Push,
    Refusal,
    as_frame,
    as_tensor,
    checksum,
    encode,
)
from distbelief.param_server.schedule import Schedule
from distbelief.param_server.server import respond
from distbelief.param_server.shard import Application, Shard, ShardConfig
from distbelief.param_server.transport import MemoryClient
from distbelief.param_server.update import SGD, Rule

RUN, TOKEN = "job", "secret"


def make_layout(
    *tensors: tuple[str, tuple[int, ...], int],
    groups: Sequence[Group] = (Group(lr=0.1),),
    part_max: int = PART_MAX,
) -> Layout:
    entries, offset = [], 0
    for name, shape, group in tensors:
        entry = Entry(name=name, shape=shape, dtype="float32", offset=offset, group=group)
        entries.append(entry)
        offset = entry.stop
    return Layout(tuple(entries), tuple(groups), part_max)


# 187 elements in parts of 64, 64 and 59; w lies in all three, b and v in the last.
LAYOUT = make_layout(("w", (10, 13), 0), ("b", (7,), 0), ("v", (50,), 0))
TWO_GROUPS = make_layout(
    ("w", (10, 13), 0),
    ("b", (7,), 1),
    ("v", (50,), 0),
    groups=(Group(lr=0.1, weight_decay=0.01), Group(lr=0.2)),
)
BUFFERS = BufferLayout(floats=(("mean", (3,)),), integers=(("count", ()),))


def make_contract(
    layout: Layout = LAYOUT,
    rule: Rule | None = None,
    schedule: Schedule | None = None,
    clip_part_norm: float = 0.0,
    buffers: BufferLayout | None = None,
) -> Contract:
    return Contract(
        layout,
        rule or SGD(),
        schedule or Schedule(),
        clip_part_norm,
        buffers or BufferLayout(),
    )


def numbers(layout: Layout = LAYOUT, seed: int = 0) -> Tensor:
    return torch.randn(layout.total, generator=torch.Generator().manual_seed(seed))


@dataclass
class Peer:
    """A worker seen by one shard: makes messages and hands them over, without any network."""

    shard: Shard
    w: str = "w0"
    inc: int = 1
    ep: int = 1
    connection: bytes = b""

    def __post_init__(self) -> None:
        self.connection = self.connection or f"{self.w}/{self.inc}".encode()

    @property
    def who(self):
        return {"run": RUN, "w": self.w, "inc": self.inc, "ep": self.ep}

    def send(self, message, payload=(), now: float = 0.0) -> Any:
        """The Reply, untyped: a test knows which message it expects in it."""
        return self.shard.handle(self.connection, message, payload, now)

    def ask(self, message, payload=()) -> Any:
        reply = self.send(message, payload)
        reply.release()
        return reply.message

    def hello(self, contract: Contract | None = None, **changed):
        message = Hello(**{**self.who, "ep": 0, "token": TOKEN, **changed})
        return self.ask(message, [contract.to_json()] if contract else [])

    def init(self, values: Tensor):
        assert self.shard.contract is not None
        slices = [values[p.range.start : p.range.stop] for p in self.shard.parts.values()]
        return self.ask(
            Init(
                **self.who,
                part=tuple(self.shard.parts),
                numel=tuple(s.numel() for s in slices),
                crc=tuple(map(checksum, slices)),
            ),
            [as_frame(s) for s in slices],
        )

    def make_push(self, grads: dict[int, Tensor], seq: int, **changed):
        """(message, payload); base is each part's current version unless said."""
        parts = [self.shard.parts[index] for index in grads]
        fields = {
            **self.who,
            "seq": seq,
            "samples": 1,
            "dt": "float32",
            "fetch": False,
            "part": tuple(grads),
            "base": tuple(part.version for part in parts),
            "bseq": (seq - 1,) * len(parts),
            "numel": tuple(grad.numel() for grad in grads.values()),
            "crc": tuple(checksum(grad) for grad in grads.values()),
            "absent": (b"",) * len(parts),
            **changed,
        }
        return Push(**fields), [as_frame(grad) for grad in grads.values()]

    def push(self, grads: dict[int, Tensor], seq: int, **changed) -> Ack:
        reply = self.ask(*self.make_push(grads, seq, **changed))
        assert isinstance(reply, Ack), reply
        return reply

    def push_all(self, grad: Tensor, seq: int, **changed) -> Ack:
        """Push a whole vector to all the parts of the shard."""
        return self.push(self.cut(grad), seq, **changed)

    def cut(self, grad: Tensor) -> dict[int, Tensor]:
        return {i: grad[p.range.start : p.range.stop] for i, p in self.shard.parts.items()}

    def fetch(self, *parts: int, average: bool = False) -> tuple[Params, list[Tensor]]:
        asked = parts or tuple(self.shard.parts)
        reply = self.send(Fetch(**self.who, part=asked, average=average))
        assert isinstance(reply.message, Params), reply.message
        tensors = [
            tensor.clone() for frame in reply.payload if (tensor := as_tensor(frame)) is not None
        ]
        reply.release()
        return reply.message, tensors

    def merge(self, samples: int, floats: Tensor, integers: Tensor):
        message = Merge(
            **self.who, samples=samples, floats=floats.numel(), integers=integers.numel()
        )
        reply = self.send(message, [as_frame(floats), as_frame(integers)])
        if isinstance(reply.message, Refusal):
            return reply.message
        return (
            torch.frombuffer(bytearray(reply.payload[0]), dtype=torch.float32),
            torch.frombuffer(bytearray(reply.payload[1]), dtype=torch.int64),
        )

    def leave(self):
        return self.ask(Leave(**self.who))


def ready_shard(
    contract: Contract | None = None,
    num_workers: int = 1,
    workers: int = 1,
    on_apply=None,
    values: Tensor | None = None,
    **config,
) -> tuple[Shard, list[Peer]]:
    """A shard with parameters, and workers w0, w1, ... that have said hello to it."""
    contract = contract or make_contract()
    shard = Shard(
        ShardConfig(run=RUN, token=TOKEN, num_workers=num_workers, **config), on_apply=on_apply
    )
    peers = [Peer(shard, f"w{i}") for i in range(workers)]
    for peer in peers:
        peer.hello(contract)
    peers[0].init(numbers(contract.layout) if values is None else values)
    assert shard.is_ready
    return shard, peers


def values_of(shard: Shard) -> Tensor:
    return torch.cat([part.values for part in shard.parts.values()])


def state_of(shard: Shard):
    """Everything that a refused message promises to leave alone, ready for `==`."""
    return {
        "parts": {
            index: (
                part.version,
                part.samples,
                dict(part.table),
                part.is_ready,
                {name: tensor.tolist() for name, tensor in part.tensors.items()},
            )
            for index, part in shard.parts.items()
        },
        "staleness": shard.staleness.as_dict(),
        "workers": shard.stats()["workers"],
        "contract": shard.contract,
    }


@dataclass
class FakeTime:
    """A clock that only moves when somebody sleeps, or polls and finds nothing."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)
    while_asleep: list[Callable[[], object]] = field(default_factory=list)
    """Called one after the other, one at each sleep."""

    def clock(self) -> float:
        self.now += 0.01
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        if self.while_asleep:
            self.while_asleep.pop(0)()


@dataclass
class Cluster:
    """Real shards behind memory endpoints."""

    num_shards: int
    num_workers: int = 1
    applied: list[Application] = field(default_factory=list)
    budget: int = 2**20
    saves: bool = False
    """A shard saves as soon as somebody waits for that."""

    def __post_init__(self) -> None:
        self.time = FakeTime()
        self.images: dict[int, ShardImage] = {}
        """What each shard has saved last."""
        self.shards = [self._make(index, 1) for index in range(self.num_shards)]
        self.endpoints = [f"memory-{index}" for index in range(self.num_shards)]
        self.handlers = {
            endpoint: self._handler(index) for index, endpoint in enumerate(self.endpoints)
        }

    def _make(self, index: int, epoch: int) -> Shard:
        config = ShardConfig(
            run=RUN,
            token=TOKEN,
            index=index,
            num_shards=self.num_shards,
            num_workers=self.num_workers,
            budget=self.budget,
            epoch=epoch,
        )
        shard = Shard(config, self.images.get(index), on_apply=self.applied.append)
        shard.is_stalled = not self.saves
        return shard

    def save(self, index: int) -> None:
        """Save a shard."""
        image = self.shards[index].image()
        tensors = [{n: t.clone() for n, t in part.tensors.items()} for part in image.parts]
        parts = [replace(p, tensors=t) for p, t in zip(image.parts, tensors, strict=True)]
        image.release()
        self.images[index] = replace(image, parts=tuple(parts), pins=())
        self.shards[index].mark_durable(image)

    def restart(self, index: int) -> Shard:
        """Kill a shard; another process goes on from what it has saved."""
        self.shards[index] = self._make(index, self.shards[index].config.epoch + 1)
        return self.shards[index]

    def _handler(self, index: int):
        def handle(peer, frames):
            shard = self.shards[index]
            reply = respond(shard, peer, frames, 0.0)
            if self.saves and shard.is_waited_for and shard.is_ready:
                shard.is_waited_for = False
                self.save(index)
            sent = [encode(reply.message), *map(bytes, reply.payload)]
            reply.release()
            return sent

        return handle

    def transport(self) -> MemoryClient:
        return MemoryClient(self.handlers)

    def client(
        self,
        w: str = "w0",
        inc: int = 1,
        contract: Contract | None = None,
        transport: MemoryClient | None = None,
        token: str = TOKEN,
        endpoints: Sequence[str] | None = None,
        **more: Any,
    ) -> Client:
        return Client(
            transport or self.transport(),
            endpoints or self.endpoints,
            Identity(run=RUN, w=w, inc=inc, token=token),
            contract,
            Patience(retry_s=1.0, give_up_s=5.0, pause_s=0.05),
            self.time.clock,
            self.time.sleep,
            **more,
        )

    def started(self, contract: Contract, values: Tensor, w: str = "w0", **more) -> Client:
        """A client that is connected to shards that have parameters."""
        client = self.client(w, contract=contract, **more)
        client.connect()
        client.initialise(values)
        return client

    @property
    def values(self) -> Tensor:
        return torch.cat([values_of(shard) for shard in self.shards])
