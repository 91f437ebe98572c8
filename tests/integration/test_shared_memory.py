"""Shards and workers of one host over real ZeroMQ: when they share memory, and who dies when."""

import os
import signal
import threading
import time
from contextlib import contextmanager

import pytest
import torch
import zmq

from distbelief.param_server.client import Client, Fetched
from distbelief.param_server.identity import Identity
from distbelief.param_server.link import Patience
from distbelief.param_server.memory import is_supported
from distbelief.param_server.server import ShardServer
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.shared import VECTORS, Shared
from distbelief.param_server.transport import ZmqClient, ZmqServer
from distbelief.param_server.update import SGD, Adagrad, Adam
from tests.helpers.children import Children, is_stopped, maps_of, nursery, until
from tests.helpers.collector import start_collector
from tests.helpers.peers import serve, work
from tests.param_server.jobs import (
    LAYOUT,
    RUN,
    TOKEN,
    TWO_GROUPS,
    make_contract,
    make_layout,
    numbers,
    values_of,
)

pytestmark = pytest.mark.skipif(not is_supported(), reason="no shared memory here")

MEGABYTES = make_layout(("w", (2**20,), 0), ("b", (1000,), 0))  # 17 parts of 256 KiB
CONTRACT = make_contract(LAYOUT, SGD(momentum=0.9))
ABSENT = (b"",) * 3


@pytest.fixture(scope="module", autouse=True)
def _collector():
    start_collector()


@pytest.fixture(scope="module")
def _nursery():
    with nursery("tests.helpers.peers") as context:
        yield context


@pytest.fixture
def children(_nursery):
    made = Children(_nursery)
    yield made
    made.close()


@contextmanager
def shards(num_shards=1, *, is_on=True, num_workers=1):
    """Shards in threads of this process, as [(shard, endpoint)]."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stop = threading.Event()
    shareds, transports, threads, made = [], [], [], []
    for index in range(num_shards):
        shared = Shared(is_on=is_on)
        config = ShardConfig(
            run=RUN, token=TOKEN, index=index, num_shards=num_shards, num_workers=num_workers
        )
        shard = Shard(config, make_home=shared.make_home)
        transport = ZmqServer(context)
        server = ShardServer(shard, transport, shared=shared)
        thread = threading.Thread(target=server.serve, args=(stop.is_set,))
        thread.start()
        shareds.append(shared)
        transports.append(transport)
        threads.append(thread)
        made.append((shard, transport.endpoint))
    try:
        yield made
    finally:
        stop.set()
        for thread, transport, shared in zip(threads, transports, shareds, strict=True):
            thread.join(30)
            transport.close()
            shared.close()
        context.term()


@contextmanager
def worker(endpoints, contract, w="w0", inc=1, *, memory=True, patience=None):
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    client = Client(
        ZmqClient(context),
        endpoints,
        Identity(run=RUN, w=w, inc=inc, token=TOKEN),
        contract,
        patience or Patience(retry_s=10.0, give_up_s=60.0),
        memory=memory,
    )
    try:
        client.connect()
        yield client
    finally:
        client.close()
        context.term()


def endpoints_of(running):
    return [endpoint for _, endpoint in running]


def push(client, grad, base, into=None, absent=None):
    absent = absent or (b"",) * len(client.layout.parts)
    return client.wait(client.start_push(grad, 1, base, absent, into)).pushed


def train(client, steps, absent_in_turn=()):
    """Pushes of numbers(seed=1...), in the client's own vector; the copies after each of them."""
    layout = client.layout
    grad, seen = client.vector(), []
    current, following = Fetched(layout), Fetched(layout)
    client.fetch(current)
    for seed in range(1, steps + 1):
        absent = None
        grad.copy_(numbers(layout, seed))
        if absent_in_turn:
            absent = layout.absent_masks(absent_in_turn[seed % len(absent_in_turn)])
        pushed = push(client, grad, current, following, absent)
        assert pushed.statuses == {"applied": len(layout.parts)}, pushed
        current, following = following, current
        seen.append((current.values.clone(), [*current.version], [*current.bseq]))
    return seen


# When


@pytest.mark.parametrize("num_shards", [1, 3])
def test_on_one_host_memory_is_shared(num_shards):
    with shards(num_shards) as running, worker(endpoints_of(running), CONTRACT) as client:
        assert client.is_shared
        client.initialise(numbers())
        train(client, 2)
        mapped = maps_of(os.getpid(), "worker")
        client.leave()
        assert maps_of(os.getpid(), "worker") == mapped - num_shards


@pytest.mark.parametrize(("memory", "is_on"), [(False, True), (True, False)])
def test_it_is_not_where_either_side_says_no(memory, is_on):
    with (
        shards(2, is_on=is_on) as running,
        worker(endpoints_of(running), CONTRACT, memory=memory) as client,
    ):
        assert not client.is_shared
        client.initialise(numbers())
        train(client, 2)
        assert not client.vector().is_shared()


RULES = [
    SGD(),
    SGD(momentum=0.9, nesterov=True),
    Adagrad(),
    Adam(),
    Adam(decoupled=True),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_shared_or_not_the_same_pushes_give_the_same_bits(rule, num_shards):
    """Two groups, one with weight decay, clipping, and tensors that are absent now and then."""
    contract = make_contract(TWO_GROUPS, rule, clip_part_norm=5.0)
    absent: tuple[list[str], ...] = ([], ["b"], ["w"], ["w", "b", "v"], ["v"])
    seen = []
    for memory in (True, False):
        with (
            shards(num_shards) as running,
            worker(endpoints_of(running), contract, memory=memory) as client,
        ):
            assert client.is_shared == memory
            client.initialise(numbers())
            seen.append(train(client, 7, absent))
            values = torch.cat([values_of(shard) for shard, _ in running])
            assert torch.equal(values, seen[-1][-1][0])
            del values
    for (one, *rest), (other, *others) in zip(*seen, strict=True):
        assert torch.equal(one, other)
        assert rest == others
    assert not torch.equal(seen[0][0][0], seen[0][-1][0])


def test_vectors_beyond_those_there_is_room_for_are_pushed_by_value():
    with shards() as running, worker(endpoints_of(running), CONTRACT) as client:
        client.initialise(torch.zeros(LAYOUT.total))
        base, into = Fetched(LAYOUT), Fetched(LAYOUT)
        client.fetch(base)
        vectors = [client.vector() for _ in range(VECTORS + 1)]
        assert all(not vector.any() for vector in vectors)
        assert len({vector.data_ptr() for vector in vectors}) == VECTORS + 1
        for seed, vector in enumerate(vectors):
            vector.copy_(numbers(seed=seed))
        [[shard, _]] = running
        is_here = [client._place(client._links[0], vector) is not None for vector in vectors]
        assert is_here == [True] * VECTORS + [False]
        for seed, vector in enumerate(vectors):
            assert push(client, vector, base, into).statuses == {"applied": 3}
            assert torch.equal(into.values, values_of(shard))
            assert into.bseq == into.version == [seed + 1] * 3
            base, into = into, base
        del vectors, vector


def test_a_reader_without_a_contract_fetches_by_value():
    with shards(2) as running, worker(endpoints_of(running), CONTRACT) as client:
        client.initialise(numbers())
        [*_, (values, version, _)] = train(client, 3)
        with worker(endpoints_of(running), None, w="eval", inc=0) as reader:
            assert not reader.is_shared
            into = Fetched(reader.layout)
            reader.fetch(into)
            assert torch.equal(into.values, values)
            assert into.version == version


def test_a_nan_is_refused_by_its_name_and_the_others_go_on():
    with shards() as running, worker(endpoints_of(running), CONTRACT) as client:
        client.initialise(numbers())
        [[shard, _]] = running
        grad, base, into = client.vector(), Fetched(LAYOUT), Fetched(LAYOUT)
        client.fetch(base)
        grad.copy_(numbers(seed=1))
        grad[133] = torch.nan
        pushed = push(client, grad, base, into)
        assert pushed.is_partial
        assert pushed.statuses == {"applied": 2, "nonfinite": 1}
        assert "b[3] is nan" in pushed.reasons[0]
        assert into.version == [1, 1, 0]
        assert torch.equal(into.values[128:], numbers()[128:])
        grad[133] = 0.0
        assert push(client, grad, into, base).statuses == {"applied": 3}
        assert (base.version, base.bseq) == ([2, 2, 1], [2, 2, 2])
        assert torch.equal(base.values, values_of(shard))


# Staleness


def test_staleness_is_exact_where_another_push_comes_between_ack_and_read():
    """The values are read later than the ack was written: then they hold pushes of others."""
    with (
        shards(num_workers=2) as running,
        worker(endpoints_of(running), CONTRACT) as one,
        worker(endpoints_of(running), CONTRACT, w="w1") as two,
    ):
        one.initialise(numbers())
        bases = [Fetched(LAYOUT), Fetched(LAYOUT)]
        grads = [one.vector(), two.vector()]
        for client, base in zip((one, two), bases, strict=True):
            client.fetch(base)
        ticket = one.start_push(grads[0], 1, bases[0], ABSENT, bases[0])
        until(lambda: running[0][0].version == 1)
        assert push(two, grads[1], bases[1], bases[1]).staleness == 1
        assert push(two, grads[1], bases[1], bases[1]).staleness == 0
        one.wait(ticket)
        assert (bases[0].version, bases[0].bseq) == ([3, 3, 3], [1, 1, 1])
        assert push(one, grads[0], bases[0], bases[0]).staleness == 0
        assert push(two, grads[1], bases[1]).staleness == 1
        del grads


def test_staleness_is_exact_with_two_own_pushes_on_the_way():
    """Values read for the ack of the first hold the second, which that ack does not count."""
    with (
        shards(num_workers=2) as running,
        worker(endpoints_of(running), CONTRACT) as one,
        worker(endpoints_of(running), CONTRACT, w="w1") as two,
    ):
        one.initialise(numbers())
        base, into, other = Fetched(LAYOUT), Fetched(LAYOUT), Fetched(LAYOUT)
        first, second, grad = one.vector(), one.vector(), two.vector()
        one.fetch(base)
        two.fetch(other)
        tickets = [
            one.start_push(first, 1, base, ABSENT, into),
            one.start_push(second, 1, base, ABSENT, None),
        ]
        until(lambda: running[0][0].version == 2)
        for ticket in tickets:
            one.wait(ticket)
        push(two, grad, other)
        staleness = push(one, first, into).staleness
        del first, second, grad
    assert staleness == 1


# What goes wrong


def test_a_part_in_the_middle_of_a_change_is_asked_for_by_value():
    with shards() as running, worker(endpoints_of(running), CONTRACT) as client:
        client.initialise(numbers())
        [[shard, _]] = running
        into = Fetched(LAYOUT)
        client._slabs[0][1]._patience_s = 0.05
        row = shard.parts[1]._row
        row[0] = 1
        client.fetch(into)
        assert torch.equal(into.values, numbers())
        assert (into.version, into.bseq) == ([0] * 3, [0] * 3)
        grad = client.vector()
        grad.copy_(numbers(seed=1))
        ticket = client.start_push(grad, 1, into, ABSENT, into)
        until(lambda: shard.version == 1)
        row[0] = 3
        client.wait(ticket)
        assert torch.equal(into.values, values_of(shard))
        assert (into.version, into.bseq) == ([1] * 3, [1] * 3)
        row[0] = 2
        del row, grad


def test_a_connection_that_is_cut_is_opened_again_and_memory_shared_again():
    patience = Patience(retry_s=0.3, give_up_s=60.0)
    with (
        shards(2) as running,
        worker(endpoints_of(running), CONTRACT, patience=patience) as client,
    ):
        client.initialise(numbers())
        grad, base, into = client.vector(), Fetched(LAYOUT), Fetched(LAYOUT)
        client.fetch(base)
        fds = len(os.listdir("/proc/self/fd"))
        mapped = [maps_of(os.getpid(), owner) for owner in ("worker", "shard")]
        for seed in range(1, 4):
            grad.copy_(numbers(seed=seed))
            ticket = client.start_push(grad, 1, base, ABSENT, into)
            for link, (_, endpoint) in enumerate(running):
                client._transport.connect(link, endpoint)
            client.wait(ticket)
            base, into = into, base
        assert client.is_shared
        assert base.bseq == base.version == [3] * 3
        assert torch.equal(base.values, torch.cat([values_of(shard) for shard, _ in running]))
        until(lambda: len(os.listdir("/proc/self/fd")) <= fds)
        assert [maps_of(os.getpid(), owner) for owner in ("worker", "shard")] == mapped
        del grad


def start_shard(children, **more):
    child = children.start(serve, **more)
    return child, child.hear()


def heard_pushes(child, number):
    for _ in range(number):
        said = child.hear()
        assert isinstance(said, tuple), said
    return said


BIG = make_contract(MEGABYTES, SGD(momentum=0.9))


def test_a_worker_that_is_killed_holds_nothing_and_the_others_go_on(children):
    shard, endpoint = start_shard(children, num_workers=2)
    dying = children.start(work, [endpoint], BIG, "w0")
    heard_pushes(dying, 3)
    living = children.start(work, [endpoint], BIG, "w1")
    heard_pushes(living, 3)
    assert maps_of(shard.pid, "worker") == 2
    heard_pushes(dying, 5)
    dying.kill()
    until(lambda: maps_of(shard.pid, "worker") == 1, seconds=3.0)
    turn, statuses = heard_pushes(living, 20)
    assert statuses == {"applied": len(MEGABYTES.parts)}
    assert turn >= 23
    # The file itself is gone too: the only memory of workers that is left is that of the other.
    assert {pid for pid in (shard.pid, living.pid) if maps_of(pid, "worker") == 1} == {
        shard.pid,
        living.pid,
    }
    assert living.close() == 0
    until(lambda: maps_of(shard.pid, "worker") == 0, seconds=3.0)
    assert shard.close() == 0


def test_a_shard_that_is_killed_is_missed_and_the_worker_ends(children):
    shard, endpoint = start_shard(children)
    one = children.start(work, [endpoint], BIG, give_up_s=0.8)
    heard_pushes(one, 5)
    shard.kill()
    began = time.monotonic()
    while isinstance(said := one.hear(10.0), tuple):
        pass
    assert said.startswith("ShardUnavailable: shard 0 at")
    assert time.monotonic() - began < 5.0
    one.process.join(10.0)
    assert one.process.exitcode == 0
    assert one.close() == 0


def test_a_worker_that_is_stopped_while_it_reads_holds_nobody_up(children):
    shard, endpoint = start_shard(children, num_workers=2)
    stopping = children.start(work, [endpoint], BIG, "w0", stop_at=4)
    heard_pushes(stopping, 3)
    until(lambda: is_stopped(stopping.pid))
    living = children.start(work, [endpoint], BIG, "w1")
    began = time.monotonic()
    heard_pushes(living, 50)
    assert time.monotonic() - began < 5.0, "a copy of 4 MiB takes a millisecond"
    os.kill(stopping.pid, signal.SIGCONT)
    turn, statuses = heard_pushes(stopping, 5)
    assert (turn, statuses) == (8, {"applied": len(MEGABYTES.parts)})
    assert stopping.close() == 0
    assert living.close() == 0
    assert shard.close() == 0
