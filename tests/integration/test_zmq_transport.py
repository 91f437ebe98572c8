"""Real ZeroMQ on loopback: what a good client sees, also while others misbehave."""

import contextlib
import errno
import random
import socket
import threading
import time
from dataclasses import dataclass

import pytest
import torch
import zmq

from distbelief.param_server.client import Client, Fetched
from distbelief.param_server.contract import Contract
from distbelief.param_server.identity import Identity
from distbelief.param_server.link import Patience
from distbelief.param_server.protocol import REPLIES, Fetch, Hello, Refusal, encode
from distbelief.param_server.server import ShardServer
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.snapshot import SnapshotStore
from distbelief.param_server.transport import FRAMES_MAX, ZmqClient, ZmqServer
from distbelief.param_server.update import SGD
from tests.helpers.collector import start_collector
from tests.param_server.jobs import RUN, TOKEN, make_contract, make_layout, numbers, values_of

SMALL = make_layout(("w", (10, 13), 0), ("b", (7,), 0), ("v", (50,), 0))  # three parts
LARGE = make_layout(("w", (5 * 2**20,), 0))  # 16 parts of 1.25 MiB


@pytest.fixture(scope="module", autouse=True)
def _collector():
    start_collector()


@dataclass
class Host:
    """A shard served by a thread of this process."""

    server: ShardServer
    transport: ZmqServer
    thread: threading.Thread

    @property
    def shard(self):
        return self.server.shard

    @property
    def address(self):
        host, port = self.transport.endpoint.removeprefix("tcp://").split(":")
        return host, int(port)


@contextlib.contextmanager
def hosts(num_shards, folder=None, num_workers=1):
    """Shard servers in threads; afterwards all are stopped, joined and closed."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stop = threading.Event()
    running: list[Host] = []
    try:
        for index in range(num_shards):
            config = ShardConfig(
                run=RUN, token=TOKEN, index=index, num_shards=num_shards, num_workers=num_workers
            )
            transport = ZmqServer(context)
            store = SnapshotStore(folder / str(index)) if folder else None
            server = ShardServer(Shard(config), transport, store)
            thread = threading.Thread(target=server.serve, args=(stop.is_set,))
            running.append(Host(server, transport, thread))
            thread.start()
        yield running
    finally:
        stop.set()
        for host in running:
            host.thread.join(30)
            host.transport.close()
        context.term()
    assert not any(host.thread.is_alive() for host in running)


@contextlib.contextmanager
def connected(running, contract: Contract | None, w="w0", inc=1, retry_s=10.0):
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    client = Client(
        ZmqClient(context),
        [host.transport.endpoint for host in running],
        Identity(run=RUN, w=w, inc=inc, token=TOKEN),
        contract,
        Patience(retry_s=retry_s, give_up_s=60.0),
    )
    try:
        client.connect()
        yield client
    finally:
        client.close()
        context.term()


@contextlib.contextmanager
def stranger(host, kind=zmq.DEALER):
    """A bare socket that may send anything."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sock = context.socket(kind)
    sock.linger = 0
    sock.connect(host.transport.endpoint)
    try:
        yield sock
    finally:
        sock.close()
        context.term()


def push(client, grad, base, into=None):
    absent = (b"",) * len(client.layout.parts)
    pushed = client.wait(client.start_push(grad, 1, base, absent, into)).pushed
    assert pushed is not None
    return pushed


def train(client, steps, first=1):
    """Push numbers(seed=first...) one by one; the values after the last one."""
    current, following = Fetched(client.layout), Fetched(client.layout)
    client.fetch(current)
    for seed in range(first, first + steps):
        pushed = push(client, numbers(client.layout, seed), current, following)
        assert set(pushed.statuses) == {"applied"}
        current, following = following, current
    return current.values


def plain(layout, steps):
    parameter = torch.nn.Parameter(numbers(layout))
    optim = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, fused=True)
    for seed in range(1, steps + 1):
        parameter.grad = numbers(layout, seed)
        optim.step()
    return parameter.detach()


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


CONTRACT = make_contract(SMALL, SGD(momentum=0.9))


@pytest.mark.parametrize("layout", [SMALL, LARGE], ids=["187 elements", "20 MiB"])
def test_a_job_of_three_shards_equals_plain_sgd_bit_for_bit(layout, tmp_path):
    contract = make_contract(layout, SGD(momentum=0.9))
    with hosts(3, tmp_path) as running:
        with connected(running, contract) as client:
            client.initialise(numbers(layout))
            assert torch.equal(train(client, 4), plain(layout, 4))
            client.leave()
        with connected(running, None, w="reader", inc=0) as reader:
            into = Fetched(reader.layout)
            reader.fetch(into)
            assert torch.equal(into.values, plain(layout, 4))
    assert [len(SnapshotStore(tmp_path / str(i)).names()) for i in range(3)] == [1, 1, 1]


def test_a_sent_gradient_may_change_once_its_ack_is_there():
    """Frames above 64 KiB are sent from where they lie; a copy would hide a fault here."""
    contract = make_contract(LARGE, SGD())
    with hosts(2) as running, connected(running, contract) as client:
        client.initialise(torch.zeros(LARGE.total))
        base = Fetched(LARGE)
        client.fetch(base)
        arena = torch.empty(LARGE.total)
        for step in range(1, 7):
            arena.fill_(float(step))
            assert push(client, arena, base).statuses == {"applied": len(LARGE.parts)}
            arena.fill_(float("nan"))
        into = Fetched(LARGE)
        client.fetch(into)
        expected = torch.zeros(LARGE.total)
        for step in range(1, 7):
            expected.add_(torch.full((LARGE.total,), float(step)), alpha=-0.1)
        torch.testing.assert_close(into.values, expected, rtol=1e-6, atol=0)
        assert into.values.unique().numel() == 1


def test_values_in_a_reply_are_of_one_version_while_another_worker_pushes():
    """Each fetched part is constant: a torn or overwritten one would hold two values."""
    contract = make_contract(LARGE, SGD())
    with hosts(1, num_workers=2) as running, connected(running, contract) as reader:
        reader.initialise(torch.zeros(LARGE.total))
        stop = threading.Event()
        errors: list[BaseException] = []

        def keep_pushing():
            try:
                with connected(running, contract, w="w1") as client:
                    base, grad = Fetched(LARGE), torch.ones(LARGE.total)
                    while not stop.is_set():
                        push(client, grad, base)
            except BaseException as error:  # noqa: BLE001  # the test raises it in its own thread
                errors.append(error)

        pusher = threading.Thread(target=keep_pushing)
        pusher.start()
        try:
            until(lambda: running[0].shard.version > 0 or errors)
            into = Fetched(LARGE)
            for _ in range(15):
                reader.fetch(into)
                for part in LARGE.parts:
                    values = into.values[part.start : part.stop]
                    assert float(values[0]) == float(values.min()) == float(values.max())
                    assert float(values[0]) == pytest.approx(
                        -0.1 * into.version[part.index], rel=1e-4
                    )
        finally:
            stop.set()
            pusher.join(30)
        assert errors == []
        assert min(into.version) > 0
        until(lambda: not running[0].server._sending)


def test_junk_messages_are_refused_while_a_good_client_works():
    rng = random.Random(5)
    with hosts(1) as running, connected(running, CONTRACT) as client, stranger(running[0]) as bad:
        client.initialise(numbers(SMALL))
        replies = 0
        for _ in range(200):
            bad.send_multipart([rng.randbytes(rng.randrange(40)) for _ in range(rng.randint(1, 5))])
        bad.send(b"\x82\xa1v\x01\xa2op" + b"\x91" * 1020 + b"\x01")
        bad.send(encode(Hello(run=RUN, w="w0", inc=9, ep=0, token="guess")))
        assert torch.equal(train(client, 5), plain(SMALL, 5))
        until(lambda: running[0].shard.counts["junk"] == 201)
        while bad.poll(200):
            reply = REPLIES.decode(bad.recv_multipart()[0])
            assert isinstance(reply, Refusal)
            assert reply.code in ("junk", "token")
            replies += 1
        assert replies + running[0].shard.counts["unsent"] == 202
        assert running[0].shard.counts["token"] == 1


@pytest.mark.parametrize("frames", [FRAMES_MAX + 1, 50_000])
def test_a_message_of_too_many_frames_is_thrown_away(frames):
    with hosts(1) as running, connected(running, CONTRACT) as client, stranger(running[0]) as bad:
        client.initialise(numbers(SMALL))
        bad.send_multipart([b""] * frames)
        bad.send_multipart([b"junk"])
        assert bad.poll(10_000)
        assert len(bad.recv_multipart()) == 1  # to the second message; the first gets no answer
        assert running[0].shard.counts["junk"] == 2
        assert torch.equal(train(client, 3), plain(SMALL, 3))


def test_raw_bytes_on_the_port_do_not_disturb_a_good_client():
    rng = random.Random(6)
    with hosts(1) as running, connected(running, CONTRACT) as client:
        client.initialise(numbers(SMALL))
        open_sockets = []
        try:
            for text in (
                b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                rng.randbytes(5000),
                b"\xff" + bytes(8) + b"\x7f\x03\x00" + rng.randbytes(500),
                b"",
            ):
                sock = socket.create_connection(running[0].address, timeout=5)
                open_sockets.append(sock)
                with contextlib.suppress(OSError):  # it may hang up on us
                    sock.sendall(text)
            assert torch.equal(train(client, 5), plain(SMALL, 5))
        finally:
            for sock in open_sockets:
                sock.close()


def test_a_frame_longer_than_the_limit_closes_its_connection_only():
    with hosts(1) as running, connected(running, CONTRACT) as client, stranger(running[0]) as bad:
        client.initialise(numbers(SMALL))
        bad.send(bytes(64 * 2**20 + 1))
        assert torch.equal(train(client, 3), plain(SMALL, 3))
        assert running[0].shard.counts["junk"] == 0


def test_a_peer_that_vanishes_before_its_reply_leaves_nothing_held():
    contract = make_contract(LARGE, SGD(momentum=0.9))
    with hosts(1) as running, connected(running, contract) as client:
        client.initialise(numbers(LARGE))
        shard = running[0].shard
        hello = Hello(run=RUN, w="ghost", inc=1, ep=0, token=TOKEN)
        fetch = Fetch(run=RUN, w="ghost", inc=1, ep=1, part=tuple(range(16)))
        for _ in range(3):
            with stranger(running[0]) as ghost:
                ghost.send(encode(hello))
                assert ghost.poll(5000)
                for _ in range(8):
                    ghost.send(encode(fetch))
                until(lambda: running[0].server._sending or shard.counts["unsent"])
        assert torch.equal(train(client, 2), plain(LARGE, 2))
        until(lambda: not running[0].server._sending)
        assert all(cell.pins == 0 for part in shard.parts.values() for cell in part._cells.values())


def test_a_cut_connection_is_opened_again_and_each_push_applied_once():
    """The client loses its sockets in the middle, as after a time-out."""
    with hosts(3) as running, connected(running, CONTRACT, retry_s=0.3) as client:
        client.initialise(numbers(SMALL))
        current, following = Fetched(SMALL), Fetched(SMALL)
        client.fetch(current)
        for seed in range(1, 5):
            ticket = client.start_push(numbers(SMALL, seed), 1, current, (b"",) * 3, following)
            for link, host in enumerate(running):
                client._transport.connect(link, host.transport.endpoint)  # with what was queued
            client.wait(ticket)
            current, following = following, current
        assert torch.equal(current.values, plain(SMALL, 4))
        assert torch.equal(torch.cat([values_of(host.shard) for host in running]), current.values)


def test_wake_ends_a_wait_from_another_thread():
    with hosts(1) as running, connected(running, CONTRACT) as client:
        timer = threading.Timer(0.05, client.wake)
        began = time.monotonic()
        timer.start()
        client.poll(20.0)
        timer.join()
        assert time.monotonic() - began < 10


def test_waking_a_closed_client_does_nothing():
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    transport = ZmqClient(context)
    transport.close()
    transport.wake()
    context.term()


def test_a_server_answers_on_ipv6_too():
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        with contextlib.closing(ZmqServer(context, "::1")) as server:
            assert server.endpoint.startswith("tcp://[::1]:")
            with contextlib.closing(ZmqClient(context)) as client:
                client.connect(0, server.endpoint)
                client.send(0, [b"ping"])
                received = server.recv(5.0)
                assert received is not None
                peer, frames = received
                assert [bytes(frame) for frame in frames] == [b"ping"]
                server.send(peer, [b"pong", bytes(100_000)])
                answer = client.recv(5.0)
                assert answer is not None
                assert [len(frame) for frame in answer[1]] == [4, 100_000]
    except zmq.ZMQError as error:
        pytest.skip(f"no IPv6 here: {error}")
    finally:
        context.term()


def test_a_reply_to_a_peer_that_is_gone_is_not_sent():
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with contextlib.closing(ZmqServer(context)) as server:
        assert server.send(b"nobody", [b"x"]) is None
        assert server.recv(0.0) is None
    context.term()


@pytest.fixture
def context():
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.term()


def test_a_port_that_somebody_listens_at_is_refused_and_nothing_stays_open(context):
    holder: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    first = ZmqServer(holder)
    port = int(first.endpoint.rpartition(":")[2])
    with pytest.raises(OSError, match="Address already in use") as error:
        ZmqServer(context, port=port)
    assert error.value.errno == errno.EADDRINUSE
    first.close()
    holder.term()
    again = ZmqServer(context, port=port)
    assert again.endpoint == f"tcp://127.0.0.1:{port}"
    again.close()


def test_an_address_of_another_machine_is_refused(context):
    with pytest.raises(OSError, match="Cannot assign requested address"):
        ZmqServer(context, "203.0.113.7")  # of no machine: kept for documents


def test_no_reply_is_refused_to_a_peer_that_reads_them_all():
    """Before it looked a second time, the server refused one in 600 such replies."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with (
        contextlib.closing(ZmqServer(context)) as server,
        contextlib.closing(ZmqClient(context)) as client,
    ):
        client.connect(0, server.endpoint)
        for _ in range(6000):
            client.send(0, [b"x" * 200])
            received = server.recv(10.0)
            assert received is not None
            assert server.send(received[0], [b"y" * 200]) is not None
            assert client.recv(10.0) is not None
    context.term()
