"""Many workers, workers that never read, and workers faster than their shard.

200 workers by default, and 1,000 with

    DISTBELIEF_TEST_WORKERS=1000 .venv/bin/python -m pytest -s tests/chaos/test_overload.py
"""

import contextlib
import os
import sys
import threading
import time
from collections import Counter

import torch
import zmq

from distbelief.param_server.client import Fetched, PushTicket
from distbelief.param_server.part import Part
from distbelief.param_server.protocol import Fetch, Hello, Init, Push, as_frame, checksum, encode
from tests.chaos.test_connections import (
    CONTRACT,
    LAYOUT,
    MORE,
    rss_of,
    unharmed,
)
from tests.helpers.children import until
from tests.helpers.cluster import cluster, in_threads
from tests.param_server.jobs import RUN, TOKEN, make_contract, make_layout

PAUSE_S = 0.005
"""Between the pushes of two workers: each of 1,000 pushes every 5 seconds."""
WORKERS = int(os.environ.get("DISTBELIEF_TEST_WORKERS", "200"))


@contextlib.contextmanager
def sockets(number, port):
    """So many DEALERs."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.max_sockets = number + 10
    made = [context.socket(zmq.DEALER) for _ in range(number)]
    try:
        for sock in made:
            sock.linger = 0
            sock.connect(f"tcp://127.0.0.1:{port}")
        yield made
    finally:
        for sock in made:
            sock.close()
        context.term()


def answers(made, seconds=30.0):
    """Wait for one answer on every socket; seconds that the first and the others took."""
    poller = zmq.Poller()
    for sock in made:
        poller.register(sock, zmq.POLLIN)
    took: list[float] = []
    began = time.monotonic()
    while len(took) < len(made):
        assert time.monotonic() - began < seconds, f"{len(took)} of {len(made)} answered"
        for sock, _ in poller.poll(1000):
            sock.recv_multipart()
            took.append(time.monotonic() - began)
            poller.unregister(sock)
    return sorted(took)


def paced(made, messages, pause_s=PAUSE_S):
    """Send a message on each socket, one after the other; seconds to each one's answer, sorted."""
    poller = zmq.Poller()
    sent_at: dict[object, float] = {}
    took: list[float] = []
    for sock in made:
        poller.register(sock, zmq.POLLIN)
    waiting = list(zip(made, messages, strict=True))
    began = due = time.monotonic()
    while len(took) < len(made):
        assert time.monotonic() - began < 60, f"{len(took)} of {len(made)} answered"
        while waiting and time.monotonic() >= due:
            sock, message = waiting.pop()
            sock.send_multipart(message)
            sent_at[sock] = time.monotonic()
            due += pause_s
        for sock, _ in poller.poll(1):
            sock.recv_multipart()
            took.append(time.monotonic() - sent_at[sock])
            poller.unregister(sock)
    return sorted(took)


SMALL = make_layout(("w", (4096,), 0))  # 16 KiB
SMALL_CONTRACT = make_contract(SMALL)


def test_many_workers_connect_and_are_answered_in_time(shard):
    pid, port = shard
    base = rss_of(pid)
    parts = tuple(range(len(SMALL.parts)))
    grad = torch.full((SMALL.total,), 1e-3)
    frames = [as_frame(grad[part.start : part.stop]) for part in SMALL.parts]
    with sockets(WORKERS, port) as workers:
        began = time.monotonic()
        for i, sock in enumerate(workers):
            hello = Hello(run=RUN, w=f"w{i}", inc=1, ep=0, token=TOKEN)
            sock.send_multipart([encode(hello), SMALL_CONTRACT.to_json()])
        answers(workers)
        connect_s = time.monotonic() - began
        init = Init(
            run=RUN,
            w="w0",
            inc=1,
            ep=1,
            part=parts,
            numel=tuple(part.numel for part in SMALL.parts),
            crc=tuple(checksum(grad[part.start : part.stop]) for part in SMALL.parts),
        )
        workers[0].send_multipart([encode(init), *frames])
        answers(workers[:1])
        acks: list[float] = []
        for seq in range(1, 2 + WORKERS // 500):
            messages = [
                Push(
                    run=RUN,
                    w=f"w{i}",
                    inc=1,
                    ep=1,
                    seq=seq,
                    samples=1,
                    dt="float32",
                    fetch=False,
                    part=parts,
                    base=(0,) * len(parts),
                    bseq=(seq - 1,) * len(parts),
                    numel=tuple(part.numel for part in SMALL.parts),
                    crc=(),
                    absent=(),
                )
                for i in range(WORKERS)
            ]
            acks += paced(workers, [[encode(push), *frames] for push in messages])
        burst_s = paced(
            workers,
            [
                [encode(ask)]
                for ask in [
                    Fetch(run=RUN, w=f"w{i}", inc=1, ep=1, part=parts) for i in range(WORKERS)
                ]
            ],
            pause_s=0.0,
        )[-1]
        more = rss_of(pid) - base
    acks.sort()
    p99 = acks[int(0.99 * len(acks))]
    told = f"{WORKERS} workers: {connect_s:.2f} s, p99 {p99:.3f} s, {more / 2**20:.0f} MiB more"
    sys.stdout.write(f"{told}; all at once {burst_s:.2f} s\n")
    assert connect_s < 2.0
    assert p99 < 1.0
    assert more < MORE


def test_workers_that_never_read_hurt_themselves_alone(shard):
    """Each asks for the parameters, again and again, and takes no answer."""
    _, port = shard
    with unharmed(shard) as good, sockets(3, port) as slow:
        for i, sock in enumerate(slow):
            hello = Hello(run=RUN, w=f"slow{i}", inc=1, ep=0, token=TOKEN)
            sock.send_multipart([encode(hello), CONTRACT.to_json()])
        answers(slow)
        parts = tuple(range(len(LAYOUT.parts)))
        seen, until_s = good.num_applied, time.monotonic() + 0.7
        asked = 0
        while time.monotonic() < until_s:
            for i, sock in enumerate(slow):
                fetch = Fetch(run=RUN, w=f"slow{i}", inc=1, ep=1, part=parts)
                with contextlib.suppress(zmq.Again):
                    sock.send(encode(fetch), zmq.DONTWAIT)
                    asked += 1
            time.sleep(0.002)
        assert asked > 300
        assert good.num_applied > seen + 10


def test_a_shard_that_is_ten_times_too_slow_grows_not_and_is_fair(monkeypatch):
    """Four workers push as fast as they can, over the network's path."""
    contract = make_contract(make_layout(("w", (2**17,), 0)))  # 512 KiB
    real = Part.apply_

    def slow(*args):
        time.sleep(0.0005)
        real(*args)

    monkeypatch.setattr(Part, "apply_", slow)
    counts: Counter[str] = Counter()
    sizes: list[int] = []
    with cluster(1, num_workers=4) as made:
        stop = threading.Event()

        def work(w):
            client = made.client(w, contract)
            try:
                client.connect()
                client.initialise(torch.zeros(contract.layout.total))
                base = Fetched(contract.layout)
                client.fetch(base)
                grad, absent = torch.ones(contract.layout.total), (b"",) * len(base.version)
                open_pushes: list[PushTicket] = []
                while not stop.is_set():
                    open_pushes.append(client.start_push(grad, 1, base, absent, None))
                    if len(open_pushes) > 3:
                        client.wait(open_pushes.pop(0))
                        counts[w] += 1
                while open_pushes:
                    client.wait(open_pushes.pop(0))
            finally:
                client.close()

        def watch():
            until(lambda: sum(counts.values()) > 40)
            before = dict(counts)
            for _ in range(10):
                time.sleep(0.06)
                sizes.append(rss_of(os.getpid()))
            stop.set()
            for w in list(counts):
                counts[w] -= before.get(w, 0)

        in_threads([*(lambda i=i: work(f"w{i}") for i in range(4)), watch])
    assert max(counts.values()) <= 1.25 * min(counts.values()) + 2, counts
    assert min(counts.values()) > 5
    assert max(sizes) - sizes[0] < 16 * 2**20
