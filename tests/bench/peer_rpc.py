"""PeerRpc: a parameter server by torch.distributed.rpc, after PyTorch's own tutorial.

A worker calls a function on the server with its gradients and gets the fresh parameters back, as
lists of tensors. The server locks, or two calls would run at once. Between processes of one host
TensorPipe takes shared memory by itself; the second variant keeps it to TCP.
"""

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import rpc

from distbelief.bench.board import HOLD_S
from distbelief.bench.station import Station
from distbelief.bench.system import System
from distbelief.bench.work import LR, MOMENTUM, Work

TIMEOUT_S = 60.0

RPC = System(
    name="torch rpc",
    transport="its own",
    server="tests.bench.peer_rpc:serve",
    worker="tests.bench.peer_rpc:work",
    has_folder=True,
    never_rests=True,  # tensorpipe polls its shared memory: more than one core of two
)
RPC_TCP = System(
    name="torch rpc tcp",
    transport="tcp",
    server=RPC.server,
    worker=RPC.worker,
    has_folder=True,
    never_rests=True,
    args={"is_tcp_only": True},
)


def shares(layout_work: Work, shards: int) -> list[list[tuple[int, ...]]]:
    """Whole tensors over the servers, by shape: the largest first to whoever has least."""
    load = [0] * shards
    shares: list[list[tuple[int, ...]]] = [[] for _ in range(shards)]
    for entry in sorted(layout_work.layout.entries, key=lambda entry: -entry.numel):
        least = load.index(min(load))
        load[least] += entry.numel
        shares[least].append(entry.shape)
    return shares


class ParameterServer:
    """Parameters, and torch's own optimizer."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        self.optimizer = torch.optim.SGD(self.parameters, lr=LR, momentum=MOMENTUM, fused=True)
        self.lock = threading.Lock()


_server: ParameterServer | None = None


def update_and_fetch(grads: list[Tensor]) -> list[Tensor]:
    """Runs on the server."""
    assert _server is not None
    with _server.lock:
        for parameter, grad in zip(_server.parameters, grads, strict=True):
            parameter.grad = grad
        _server.optimizer.step()
        return [parameter.detach() for parameter in _server.parameters]


def serve(station: Station) -> None:
    global _server
    torch.set_num_threads(1)
    spec = station.spec
    made = Work.from_dict(spec["work"])
    station.say()
    _server = ParameterServer(shares(made, spec["shards"])[spec["index"]])
    _join(station, f"server{spec['index']}", spec["index"])
    while not station.seat.is_stopped:
        time.sleep(HOLD_S)


def work(station: Station) -> None:
    torch.set_num_threads(1)
    spec, seat = station.spec, station.seat
    station.hear()
    grads = [
        [torch.ones(shape) for shape in shapes]
        for shapes in shares(Work.from_dict(spec["work"]), spec["shards"])
    ]
    _join(station, f"worker{spec['index']}", spec["shards"] + spec["index"])
    station.say()
    fetched: list[Tensor] = []

    def do_round() -> None:
        calls = [
            rpc.rpc_async(f"server{index}", update_and_fetch, args=(mine,))
            for index, mine in enumerate(grads)
        ]
        fetched[:] = [tensor for call in calls for tensor in call.wait()]

    def look() -> None:
        seat.look(len(fetched), sum(bool(one.min() != one.max()) for one in fetched))

    def ends() -> tuple[float, float]:
        return min(float(one.min()) for one in fetched), max(float(one.max()) for one in fetched)

    seat.do_rounds(do_round, look, ends)


def _join(station: Station, name: str, rank: int) -> None:
    spec = station.spec
    os.environ["TP_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    only_tcp: dict[str, Any] = {"_transports": ["uv"], "_channels": ["basic"]}  # Any: lists
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"file://{Path(spec['folder']) / 'rpc'}",  # a TCP store would listen everywhere
        rpc_timeout=TIMEOUT_S,
        **(only_tcp if spec.get("is_tcp_only") else {}),
    )
    world = spec["shards"] + spec["workers"]
    rpc.init_rpc(name, rank=rank, world_size=world, rpc_backend_options=options)
