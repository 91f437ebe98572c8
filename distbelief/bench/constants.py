"""Constants: what `distbelief simulate` is told of this machine, measured on it.

The shard's and the worker's figures are of their own code, with nothing but memory between them:
client and shard take turns in one thread, so what each takes can be told apart. The network
thread's are of ZeroMQ over the loopback. Told is the best of some turns: others that run on the
machine make a turn longer and never shorter.
"""

import datetime
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
import zmq

from distbelief.bench.work import GOOGLENET_SIZE, Work
from distbelief.param_server.client import Client, Fetched
from distbelief.param_server.compress import Compression
from distbelief.param_server.identity import Identity
from distbelief.param_server.server import respond
from distbelief.param_server.shard import Reply, Shard, ShardConfig
from distbelief.param_server.transport import Frame, keep_freed_memory
from distbelief.param_server.wire import encode
from distbelief.simulation.constants import FORMS, LOCAL, Constants

RUN, TOKEN = "bench", "bench"
NEAR, FAR = "tcp://127.0.0.1:1", "tcp://shard:1"
"""Endpoints of nothing; by them a client knows whether checksums are wanted."""
TINY = (1024, 64)
"""Parameters of vectors of 16 parts and of one, in which there is nothing to do but overhead."""
FRAME = 2**20
"""Bytes; a part on the wire is as long."""
FRAMES = 32
PUSHES_MIN = 5


class _Pair:
    """A client and a shard with nothing between them, and the time that the shard takes of it.

    It is the client's transport itself: what is sent is handled at once, and nothing is copied.
    """

    def __init__(self, size: int, form: str) -> None:
        self.layout = Work.flat(size).layout
        self._shard = Shard(ShardConfig(run=RUN, token=TOKEN))
        self._shard_s = 0.0
        self._answers: deque[tuple[int, list[Frame]]] = deque()
        self._replies: list[Reply] = []
        on_wire = "float32" if form == LOCAL else form
        self._client = Client(
            self,
            [NEAR if form == LOCAL else FAR],
            Identity(run=RUN, w="w0", inc=1, token=TOKEN),
            Work.flat(size).contract,
            compression=Compression(push=on_wire, fetch=on_wire),
        )
        self._client.connect()
        self._client.initialise(torch.zeros(size))
        self._copies = [Fetched(self.layout), Fetched(self.layout)]
        self._client.fetch(self._copies[0])
        self._grad = torch.ones(size)
        self._absent = self.layout.absent_masks(())

    def push(self) -> tuple[float, float]:
        """One push with its answer. Returns: seconds of the shard, and of the client."""
        self._shard_s, began = 0.0, time.perf_counter()
        base, into = self._copies
        self._client.wait(self._client.start_push(self._grad, 1, base, self._absent, into))
        took = time.perf_counter() - began
        for reply in self._replies:
            reply.release()
        self._replies.clear()
        self._copies.reverse()
        return self._shard_s, took - self._shard_s

    @property
    def num_messages(self) -> int:
        return len(self._client.messages)

    # As a transport.

    def connect(self, link: int, endpoint: str) -> None:
        pass

    def send(self, link: int, frames: Sequence[Frame]) -> None:
        began = time.perf_counter()
        reply = respond(self._shard, b"w0", frames, 0.0)
        self._answers.append((link, [encode(reply.message), *reply.payload]))
        self._replies.append(reply)
        self._shard_s += time.perf_counter() - began

    def recv(self, timeout_s: float) -> tuple[int, list[Frame]] | None:
        return self._answers.popleft() if self._answers else None

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass


def measure(
    seconds: float = 0.5,
    size: int = GOOGLENET_SIZE,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Constants:
    """Measure in this process, so many seconds a figure."""
    keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        on_progress("overhead")
        many, one = (_best(_Pair(tiny, LOCAL), seconds)[0] for tiny in TINY)
        # 16 parts are 4 messages: many = 16 p + 4 m, one = p + m.
        part_s = max((many - 4 * one) / 12, 1e-7)
        message_s = max(one - part_s, 1e-7)
        shard: dict[str, float] = {}
        worker: dict[str, float] = {}
        for form in (LOCAL, *FORMS):
            on_progress(form)
            pair = _Pair(size, form)
            shard_s, worker_s = _best(pair, seconds)
            parts = len(pair.layout.parts)
            messages = pair.num_messages
            fixed_s = parts * part_s + messages * message_s
            shard[form] = 4e-9 * size / max(shard_s - fixed_s, 0.1 * shard_s)
            worker[form] = 4e-9 * size / worker_s
        on_progress("network")
        tcp, round_trip_s = _network(seconds, is_encrypted=False)
        curve, _ = _network(seconds, is_encrypted=True)
    finally:
        torch.set_num_threads(threads)
    return Constants(
        shard_gb_per_s={form: _rounded(speed) for form, speed in shard.items()},
        worker_gb_per_s={form: _rounded(speed) for form, speed in worker.items()},
        part_us=_rounded(1e6 * part_s),
        message_us=_rounded(1e6 * message_s),
        tcp_gb_per_s=_rounded(tcp),
        curve_gb_per_s=_rounded(curve),
        round_trip_us=_rounded(1e6 * round_trip_s),
        source=f"{datetime.date.today()}, {os.cpu_count()} {platform.machine()} cores, torch "
        f"{torch.__version__}, libzmq {zmq.zmq_version()}",
    )


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _best(pair: _Pair, seconds: float) -> tuple[float, float]:
    """Least seconds of the shard and of the client for one push."""
    pair.push()  # touches its pages for the first time
    until = time.perf_counter() + seconds
    took = [pair.push() for _ in range(PUSHES_MIN)]
    while time.perf_counter() < until:
        took.append(pair.push())
    return min(shard for shard, _ in took), min(client for _, client in took)


def _network(seconds: float, *, is_encrypted: bool) -> tuple[float, float]:
    """GB a second from one network thread to another, and seconds of an empty round trip."""
    with ExitStack() as stack:
        ends: list[zmq.Socket[bytes]] = []
        for _ in range(2):
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            stack.callback(context.destroy, 0)
            end = context.socket(zmq.PAIR)
            end.set_hwm(4 * FRAMES)
            ends.append(end)
        here, there = ends
        if is_encrypted:
            _encrypt(here, there)
        port = there.bind_to_random_port("tcp://127.0.0.1")
        here.connect(f"tcp://127.0.0.1:{port}")
        frame = bytes(FRAME)

        def send() -> None:
            for _ in range(FRAMES):
                here.send(frame)  # without a copy pyzmq keeps a thread for ever
            for _ in range(FRAMES):
                there.recv(copy=False)

        def ask() -> None:
            here.send(b"")
            there.recv()
            there.send(b"")
            here.recv()

        return FRAMES * FRAME / 1e9 / _least(send, seconds), _least(ask, seconds / 4)


def _encrypt(here: "zmq.Socket[bytes]", there: "zmq.Socket[bytes]") -> None:
    public, secret = zmq.curve_keypair()
    there.curve_server = True
    there.curve_publickey, there.curve_secretkey = public, secret
    here.curve_publickey, here.curve_secretkey = zmq.curve_keypair()
    here.curve_serverkey = public


def _least(call: Callable[[], None], seconds: float) -> float:
    call()
    best, until = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < until:
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best
