"""Connections that are cut at every byte, and two processes that both take themselves for a shard.

Every 17th byte by default; every single one, in some minutes, with

    DISTBELIEF_TEST_EVERY_BYTE=1 .venv/bin/python -m pytest --timeout 3600 tests/chaos/test_cuts.py
"""

import contextlib
import json
import os
import signal
import threading
import time

import pytest
import torch
import zmq

from distbelief.chaos.proxy import Proxy
from distbelief.param_server.client import Client, Fetched
from distbelief.param_server.history import History
from distbelief.param_server.identity import Identity
from distbelief.param_server.ledger import Ledger, Record, read, recall
from distbelief.param_server.link import Patience
from distbelief.param_server.server import ShardServer, SnapshotConfig
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.snapshot import SnapshotStore
from distbelief.param_server.transport import ZmqClient, ZmqServer
from tests.helpers.children import Children, until
from tests.helpers.cluster import cluster
from tests.param_server.jobs import RUN, TOKEN, make_contract, make_layout, values_of

STRIDE = 1 if os.environ.get("DISTBELIEF_TEST_EVERY_BYTE") else 17
LAYOUT = make_layout(("w", (10,), 0))
CONTRACT = make_contract(LAYOUT)  # its rate is 0.1
CONVERSATION = {"to-shard": 1000, "from-shard": 600}
"""Bytes of handshake, hello and push, and of the answers: rather more than there are."""


@contextlib.contextmanager
def worker(port, folder, run=RUN, token=TOKEN, patience=None, **more):
    """A client through a port of this host, without shared memory; it keeps its pushes."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    client = Client(
        ZmqClient(context),
        [f"tcp://127.0.0.1:{port}"],
        Identity(run=run, w="w0", inc=1, token=token),
        CONTRACT,
        patience or Patience(retry_s=2.0, give_up_s=30.0),
        history=History(folder, "w0", 1),
        **more,
    )
    try:
        client.connect()
        client.initialise(torch.zeros(LAYOUT.total))
        yield client
    finally:
        client.close()
        context.term()


def gradient(seq: int) -> torch.Tensor:
    return torch.arange(10.0) + seq


def acks(folder):
    lines = (folder / "w0-000001.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["op"] == "ack"]


@pytest.mark.parametrize("direction", ["to-shard", "from-shard"])
def test_a_connection_cut_at_any_byte_applies_each_push_once(tmp_path, direction):
    with cluster(1) as made:
        proxy = Proxy(lambda: int(made.endpoints[0].rpartition(":")[2]))
        try:
            with worker(proxy.port, tmp_path, made.run, made.token) as client:
                base = Fetched(LAYOUT)
                client.fetch(base)
                statuses: list[str] = []
                proxy.cut_direction = direction
                for byte in range(1, CONVERSATION[direction], STRIDE):
                    proxy.cut_after = byte
                    proxy.drop()
                    ticket = client.start_push(gradient(client.seq + 1), 1, base, (b"",), base)
                    client.wait(ticket)
                    statuses += ticket.pushed.statuses
                num_pushed = client.seq
        finally:
            proxy.close()
        # Each was dropped once, and most of the connections after that were cut too.
        assert proxy.num_connections > 1.5 * num_pushed
        check_once(made, num_pushed, statuses)
        if direction == "from-shard":
            assert "dup" in statuses  # answers were lost, and the pushes came again
    assert [line["seq"] for line in acks(tmp_path)] == list(range(1, num_pushed + 1))


def check_once(made, num_pushed, statuses):
    """Every push is in the values once."""
    shard = made.shards[0]
    assert shard.parts[0].version == num_pushed == len(statuses)
    assert [one.seq for one in made.logs[0]] == list(range(1, num_pushed + 1))
    assert shard.counts["applied"] == num_pushed
    expected = torch.zeros(10)
    for seq in range(1, num_pushed + 1):
        expected.add_(gradient(seq), alpha=-0.1)
    assert torch.equal(values_of(shard), expected)


@pytest.mark.parametrize("direction", ["both", "to-shard", "from-shard"])
def test_a_network_that_lets_nothing_pass_for_a_while_applies_each_push_once(tmp_path, direction):
    with cluster(1) as made:
        proxy = Proxy(lambda: int(made.endpoints[0].rpartition(":")[2]))
        try:
            with worker(
                proxy.port, tmp_path, made.run, made.token, patience=Patience(retry_s=0.2)
            ) as client:
                base = Fetched(LAYOUT)
                client.fetch(base)
                statuses: list[str] = []
                for _ in range(2):
                    proxy.cut(direction)
                    ticket = client.start_push(gradient(client.seq + 1), 1, base, (b"",), base)
                    until_s = time.monotonic() + 0.4  # it asks again over new connections
                    while time.monotonic() < until_s:
                        client.poll(0.05)
                    assert not ticket.is_done
                    proxy.mend()
                    client.wait(ticket)
                    statuses += ticket.pushed.statuses
                num_pushed = client.seq
        finally:
            proxy.close()
        check_once(made, num_pushed, statuses)
        if direction == "from-shard":
            assert "dup" in statuses


def primary(pipe, folder, epoch: int) -> None:
    """A shard's process: says its port, and at its end whether it was deposed."""
    torch.set_num_threads(1)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    store = SnapshotStore(folder)
    store.claim(epoch)
    found = store.latest()
    image = None if found is None else found[0]
    ledger = Ledger(folder, epoch, keeps_all=True)
    config = ShardConfig(run=RUN, token=TOKEN, epoch=epoch)
    shard = Shard(config, image, on_push=ledger.write)
    if image is not None:
        recall(shard, image, folder)
    ledger.begin(image)
    transport = ZmqServer(context)
    saving = SnapshotConfig(every_s=0.1, backup_bytes=2**20)
    server = ShardServer(shard, transport, store, saving, ledger=ledger)
    pipe.send(int(transport.endpoint.rpartition(":")[2]))
    server.serve(pipe.poll)
    with contextlib.suppress(OSError):
        pipe.send((shard.is_deposed, values_of(shard).tolist()))
    transport.close()
    ledger.close()
    context.term()


@pytest.mark.parametrize("how", ["it saves", "it hears"])
def test_a_primary_that_was_stopped_and_replaced_neither_saves_nor_acknowledges(
    tmp_path, breeder, how
):
    """how: it finds out by its next snapshot, or by a worker that has seen the later epoch."""
    folder, history = tmp_path / "shard0", tmp_path / "history"
    children = Children(breeder)
    old = children.start(primary, folder, 1)
    ports = [old.hear()]
    proxy = Proxy(lambda: ports[-1])
    stop = threading.Event()

    def push_on(client, base):
        while not stop.is_set():
            client.wait(client.start_push(gradient(client.seq + 1), 1, base, (b"",), base))
            time.sleep(0.002)

    try:
        with worker(proxy.port, history, backup_bytes=2**20) as client:
            base = Fetched(LAYOUT)
            client.fetch(base)
            thread = threading.Thread(target=push_on, args=(client, base))
            thread.start()
            until(lambda: SnapshotStore(folder).names() and len(acks(history)) > 40)
            os.kill(old.pid, signal.SIGSTOP)
            time.sleep(0.2)
            new = children.start(primary, folder, 2)
            ports.append(new.hear())
            proxy.drop()
            until(lambda: acks(history)[-1]["ep"] == 2)
            names = [name for name in SnapshotStore(folder).names() if name.startswith("e000001")]
            if how == "it hears":
                ports.append(ports[0])
            os.kill(old.pid, signal.SIGCONT)
            if how == "it hears":
                proxy.drop()
            assert old.hear()[0] is True
            ports.append(ports[1])
            proxy.drop()
            seen = len(acks(history))
            until(lambda: len(acks(history)) > seen + 5)
            stop.set()
            thread.join(30)
            client.leave()
            num_pushed = client.seq
        new.say()
        is_deposed, values = new.hear()
        assert not is_deposed
        left = [name for name in SnapshotStore(folder).names() if name.startswith("e000001")]
        assert set(left) <= set(names)
    finally:
        stop.set()
        proxy.close()
        children.close()
    epochs = [line["ep"] for line in acks(history)]
    assert epochs == sorted(epochs)
    expected = torch.zeros(10)
    applied = [one for one in read(folder) if isinstance(one, Record) and one.epoch == 2]
    began = SnapshotStore(folder)
    assert began.epoch == 2
    for seq in range(1, num_pushed + 1):
        expected.add_(gradient(seq), alpha=-0.1)
    torch.testing.assert_close(torch.tensor(values), expected, rtol=1e-5, atol=1e-4)
    assert [one.seq for one in applied if "applied" in one.status] == list(
        range(applied[0].seq, num_pushed + 1)
    )
