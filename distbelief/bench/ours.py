"""Ours: this system in a bench: the real shard server and client, by their public names."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import zmq

from distbelief.bench.station import Station
from distbelief.bench.system import System
from distbelief.bench.work import Course, Work
from distbelief.keyring import Keyring
from distbelief.param_server.client import Client, Fetched
from distbelief.param_server.compress import Compression
from distbelief.param_server.contract import Contract
from distbelief.param_server.curve import Keys
from distbelief.param_server.identity import Identity
from distbelief.param_server.server import ShardServer, SnapshotConfig
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.shared import Shared
from distbelief.param_server.snapshot import SnapshotStore
from distbelief.param_server.transport import ZmqClient, ZmqServer, keep_freed_memory

RUN = "bench"
NAME = "distbelief"
CURVE = "curve"
FLOAT32 = "float32"
TOLERANCE = {FLOAT32: None, "bfloat16": 0.02, "int8": 0.02, "topk": 1.0}
"""By form on the wire: how far values may be off. With topk an element comes late, so little can
be said of one moment."""


def ours(
    transport: str,
    *,
    compress: str = FLOAT32,
    durability: str = "none",
    snapshot_s: float = 1.0,
    workers: int = 1,
) -> System:
    """This system over one transport; `curve` is TCP with encryption, for `workers` at most.

    compress: a codec of the client. durability: `snapshots` writes one every `snapshot_s` while
    the clock runs.
    """
    # Of this crew alone, as the token: they go to its processes by a pipe and nowhere else.
    names = [f"w{index}" for index in range(workers)]
    ring = Keyring(names, ["shard0"]) if transport == CURVE else None
    return System(
        name=NAME,
        transport=transport,
        server="distbelief.bench.ours:serve",
        worker="distbelief.bench.ours:work",
        args={
            "transport": transport,
            "compress": compress,
            "snapshot_s": snapshot_s if durability == "snapshots" else 0.0,
            "token": secrets.token_hex(16),
            "keys": {name: ring.of(name).to_dict() for name in (*names, "shard0")} if ring else {},
        },
        has_folder=durability == "snapshots",
        is_whole=compress == FLOAT32,
        tolerance=TOLERANCE[compress],
    )


def serve(station: Station) -> None:
    """Be a shard until told to stop."""
    keep_freed_memory()
    torch.set_num_threads(1)
    spec = station.spec
    config = ShardConfig(
        run=RUN,
        token=spec["token"],
        index=spec["index"],
        num_shards=spec["shards"],
        num_workers=spec["workers"],
    )
    store = None
    if spec["snapshot_s"]:
        store = SnapshotStore(Path(spec["folder"]) / f"shard{spec['index']}")
    shared = Shared() if spec["transport"] == "shm" else None
    shard = Shard(config, make_home=None if shared is None else shared.make_home)
    transport = ZmqServer(zmq.Context(), keys=_keys(station, "shard0"))
    saving = SnapshotConfig(every_s=spec["snapshot_s"])
    server = ShardServer(shard, transport, store, saving, shared=shared)
    station.say(endpoint=transport.endpoint)
    server.serve(lambda: station.seat.is_stopped)


def make_client(station: Station, endpoints: list[str], contract: Contract) -> Client:
    """The client of a worker's seat; not connected yet."""
    spec = station.spec
    form = spec["compress"]
    # Parameters have no topk; bfloat16 is what goes with it.
    compression = Compression(push=form, fetch="bfloat16" if form == "topk" else form)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    identity = Identity(run=RUN, w=f"w{spec['index']}", inc=1, token=spec["token"])
    return Client(
        ZmqClient(context, _keys(station, identity.w)),
        endpoints,
        identity,
        contract,
        memory=spec["transport"] == "shm",
        compression=compression,
    )


def _keys(station: Station, name: str) -> Keys | None:
    """All shards of a bench have one name: they do not speak to each other."""
    made = station.spec["keys"].get(name)
    return None if made is None else Keys.from_dict(made)


def endpoints_of(station: Station) -> list[str]:
    """Where the shards are, once the driver knows."""
    return [served["endpoint"] for served in station.hear()["servers"]]


@contextmanager
def connected(station: Station, work: Work) -> Iterator[Client]:
    """A client that is connected, with shards that have parameters."""
    client = make_client(station, endpoints_of(station), work.contract)
    client.connect()
    try:
        if station.spec["index"] == 0:
            client.initialise(torch.zeros(work.size))
        yield client
    finally:
        client.close()


def work(station: Station) -> None:
    """Be a worker until told to stop."""
    keep_freed_memory()
    torch.set_num_threads(1)
    made = Work.from_dict(station.spec["work"])
    with connected(station, made) as client:
        worker = _Worker(station, client)
        station.say(is_shared=client.is_shared)
        station.seat.do_rounds(worker.do_round, worker.look, worker.publish)


class _Worker:
    """Pushes one gradient again and again, and fetches what becomes of it."""

    def __init__(self, station: Station, client: Client) -> None:
        self._seat = station.seat
        self._client = client
        self._layout = client.layout
        self._tolerance = TOLERANCE[station.spec["compress"]]
        self._grad = client.vector()
        self._grad.fill_(1.0)
        self._absent = self._layout.absent_masks(())
        self._copy = Fetched(self._layout)  # the one that the floors have too
        self._course = Course()
        client.fetch(self._copy)

    def do_round(self) -> None:
        ticket = self._client.start_push(self._grad, 1, self._copy, self._absent, self._copy)
        self._client.wait(ticket)
        if ticket.pushed.is_partial:
            self._seat.refuse(1)

    def look(self) -> None:
        """Every part is of one moment, and of the version that it says."""
        torn = wrong = 0
        for part in self._layout.parts:
            low, high = map(float, self._copy.values[part.start : part.stop].aminmax())
            version = self._copy.version[part.index]
            if self._tolerance is None and low != high:
                torn += 1
            elif not self._course.agrees(low, high, version, self._tolerance):
                wrong += 1
        self._seat.look(len(self._layout.parts), torn, wrong)

    def publish(self) -> tuple[float, float]:
        low, high = self._copy.values.aminmax()
        return float(low), float(high)
