"""Malformed, half-open and never-ending connections to a live shard: a good worker goes on.

Some hundreds of connections by default; the long run has 100,000:

    DISTBELIEF_TEST_CONNECTIONS=100000 .venv/bin/python -m pytest --timeout 3600 \
        tests/chaos/test_connections.py
"""

import contextlib
import os
import random
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
import torch
import zmq

from distbelief.param_server.client import Client, Fetched
from distbelief.param_server.identity import Identity
from distbelief.param_server.link import Patience
from distbelief.param_server.protocol import Hello, encode
from distbelief.param_server.transport import ZmqClient
from tests.helpers.children import until
from tests.param_server.jobs import RUN, TOKEN, make_contract, make_layout

CONNECTIONS = int(os.environ.get("DISTBELIEF_TEST_CONNECTIONS", "400"))

LAYOUT = make_layout(("w", (2**18,), 0))  # 1 MiB
CONTRACT = make_contract(LAYOUT)
STATE = 4 * LAYOUT.total
BUDGET = 16 * 2**20
MORE = BUDGET + 2 * STATE + 64 * 2**20
"""I6: bytes that a shard may take beyond what it had when it began."""

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
HEAD = b"\x04" + bytes([len(READY)])


class Good(threading.Thread):
    """A worker that pushes ones, all the time, and counts the answers."""

    def __init__(self, port: int) -> None:
        super().__init__(name="good")
        self.num_applied = 0
        self.slowest_s = 0.0
        self.error: BaseException | None = None
        self.values = torch.empty(0)
        self._port = port
        self._stop_asked = threading.Event()

    def run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            client = Client(
                ZmqClient(context),
                [f"tcp://127.0.0.1:{self._port}"],
                Identity(run=RUN, w="good", inc=1, token=TOKEN),
                CONTRACT,
                Patience(retry_s=5.0, give_up_s=30.0),
            )
            try:
                self._push(client)
            finally:
                client.close()
        except BaseException as error:  # noqa: BLE001  # the test raises it in its own thread
            self.error = error
        finally:
            context.term()

    def _push(self, client: Client) -> None:
        client.connect()
        client.initialise(torch.zeros(LAYOUT.total))
        base, grad = Fetched(LAYOUT), torch.ones(LAYOUT.total)
        client.fetch(base)
        absent = (b"",) * len(LAYOUT.parts)
        while not self._stop_asked.is_set():
            began = time.monotonic()
            ticket = client.start_push(grad, 1, base, absent, None)
            client.wait(ticket)
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            assert set(ticket.pushed.statuses) == {"applied"}
            self.num_applied += 1
            time.sleep(0.002)
        client.fetch(base)
        self.values = base.values

    def __enter__(self):
        self.start()
        until(lambda: self.num_applied > 3 or self.error, 20)
        return self

    def __exit__(self, *_):
        self._stop_asked.set()
        self.join(60)
        if self.error is not None:
            raise self.error


def rss_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fds_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextlib.contextmanager
def unharmed(shard):
    """A good worker makes progress meanwhile, and memory and descriptors stay in their bounds."""
    pid, port = shard
    base = rss_of(pid)  # before it holds any parameter
    with Good(port) as good:
        files = fds_of(pid)
        peak, watching = [rss_of(pid)], threading.Event()

        def watch():
            while not watching.wait(0.01):
                peak[0] = max(peak[0], rss_of(pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield good
        finally:
            watching.set()
            watcher.join()
        seen = good.num_applied
        until(lambda: good.num_applied > seen + 3 or good.error)
        until(lambda: fds_of(pid) <= files)
        assert peak[0] <= base + MORE, f"{(peak[0] - base) / 2**20:.0f} MiB more"
    assert good.slowest_s < 5.0
    torch.testing.assert_close(
        good.values, torch.full((LAYOUT.total,), -0.1 * good.num_applied), rtol=1e-4, atol=0
    )


def shake_hands(sock: socket.socket) -> bytes:
    """Open a connection as ZeroMQ does; what is sent before the other side is ready is refused.

    Returns: what has come beyond the handshake.
    """
    sock.sendall(GREETING + HEAD + READY)
    received = b""
    while b"Identity" not in received:
        came = sock.recv(4096)
        assert came, "it hung up in the handshake"
        received += came
    return received.partition(b"Identity")[2]


def misbehave(sock: socket.socket, kind: int, rng: random.Random) -> None:
    """Send what one bad connection sends."""
    if kind == 0:
        damaged = bytearray(GREETING)
        damaged[rng.randrange(64)] ^= 1 << rng.randrange(8)
        sock.sendall(bytes(damaged) + HEAD + READY)
        return
    if kind == 1:
        ready = bytearray(READY)
        for _ in range(rng.randrange(1, 4)):
            ready[rng.randrange(len(ready))] = rng.randrange(256)
        sock.sendall(GREETING + HEAD + bytes(ready))
        return
    if kind == 2:
        sock.sendall(b"POST /train HTTP/1.1\r\nHost: shard\r\nContent-Length: 9999999\r\n\r\n")
        return
    if kind == 3:
        sock.sendall(rng.randbytes(rng.randrange(200)))
        return
    shake_hands(sock)
    if kind == 4:
        sock.sendall(rng.randbytes(rng.randrange(1, 300)))
    elif kind == 5:
        ping = b"\x04PING" + rng.randbytes(rng.choice([0, 1, 2, 18, 19, 200]))
        sock.sendall(b"\x04" + bytes([len(ping)]) + ping)
    elif kind == 6:  # a frame that claims more than there is
        claimed = rng.choice([2**16, 2**26, 2**27, 2**40, 2**63, 2**64 - 1])
        sock.sendall(b"\x02" + struct.pack(">Q", claimed) + rng.randbytes(50))
    else:  # whole messages that are none of ours
        frames = [rng.randbytes(rng.randrange(200)) for _ in range(rng.randrange(1, 5))]
        for i, frame in enumerate(frames):
            sock.sendall(bytes([i < len(frames) - 1, len(frame)]) + frame)


def test_malformed_connections_do_not_disturb_a_good_worker(shard):
    rng = random.Random(9)
    _, port = shard
    with unharmed(shard) as good:
        progress = good.num_applied
        for number in range(CONNECTIONS):
            with contextlib.suppress(OSError):  # it may hang up on us
                sock = socket.create_connection(("127.0.0.1", port), timeout=5)
                with sock:
                    misbehave(sock, number % 8, rng)
                    if number % 50 == 0:
                        sock.settimeout(0.05)
                        sock.recv(256)
            if number % 10_000 == 9_999:
                assert good.num_applied > progress, "the good worker stands still"
                progress = good.num_applied
        assert good.num_applied > progress or CONNECTIONS >= 10_000


def test_half_open_connections_are_closed_and_slow_ones_hold_no_memory(shard):
    """Silent ones, ones that stop within the greeting, and ones that stop within a frame."""
    pid, port = shard
    with unharmed(shard), contextlib.ExitStack() as stack:
        silent = []
        for number in range(60):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=1))
            if number % 3 == 1:
                sock.sendall(GREETING[: 1 + number % 63])
            elif number % 3 == 2:
                shake_hands(sock)
                sock.sendall(b"\x02" + struct.pack(">Q", 2**20) + b"x")
            else:
                silent.append(sock)
        until(lambda: fds_of(pid) >= 60)
        for sock in silent[: None if CONNECTIONS > 1000 else 1]:  # 3 s, HANDSHAKE_IVL
            sock.settimeout(8)
            while sock.recv(100):
                pass


def is_cut(sock: socket.socket) -> bool:
    """The other side has hung up, or does within a second."""
    sock.settimeout(1.0)
    try:
        while sock.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


LARGE = b"\x03" + struct.pack(">Q", 2**20) + bytes(2**20)
EMPTY = b"\x01\x00" * 2**19


@pytest.mark.parametrize("frames", [LARGE, EMPTY], ids=["large frames", "empty frames"])
def test_a_message_that_never_ends_is_cut_before_it_takes_the_memory(shard, frames):
    _, port = shard
    with unharmed(shard), socket.create_connection(("127.0.0.1", port), timeout=1) as sock:
        with contextlib.suppress(OSError):
            shake_hands(sock)
            for _ in range(400):
                sock.sendall(frames)
        assert is_cut(sock)


def test_many_messages_that_stop_in_the_middle_are_cut_too(shard):
    _, port = shard
    with unharmed(shard), contextlib.ExitStack() as stack:
        socks = []
        for _ in range(30):
            socks.append(
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=1))
            )
            with contextlib.suppress(OSError):
                shake_hands(socks[-1])
                socks[-1].sendall(b"\x02" + struct.pack(">Q", 32 * 2**20) + bytes(24 * 2**20))
        assert sum(map(is_cut, socks[:25])) >= 20


def test_a_worker_may_not_flood_either(shard):
    """One that has said hello may be ahead by the budget, and no more."""
    _, port = shard
    hello = encode(Hello(run=RUN, w="flood", inc=1, ep=0, token=TOKEN))
    contract = CONTRACT.to_json()
    message = b"\x01" + bytes([len(hello)]) + hello
    message += b"\x02" + struct.pack(">Q", len(contract)) + contract
    with unharmed(shard), socket.create_connection(("127.0.0.1", port), timeout=1) as sock:
        received = shake_hands(sock)
        sock.sendall(message)
        while b"welcome" not in received:
            came = sock.recv(4096)
            assert came, "it hung up"
            received += came
        sent = 0
        with contextlib.suppress(OSError):
            for _ in range(400):
                sock.sendall(LARGE)
                sent += len(LARGE)
        assert sent >= BUDGET
        assert is_cut(sock)
