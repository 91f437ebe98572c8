"""A worker's client over memory links to real shards: what is lost, refused, late or wrong."""

import json
import random

import pytest
import torch

from distbelief.param_server.client import Fetched
from distbelief.param_server.errors import LocalError, Refused, ShardUnavailable
from distbelief.param_server.protocol import REQUESTS, Push
from distbelief.param_server.transport import MemoryClient
from distbelief.param_server.update import SGD
from tests.param_server.jobs import (
    BUFFERS,
    LAYOUT,
    Cluster,
    make_contract,
    make_layout,
    numbers,
)

CONTRACT = make_contract(rule=SGD(momentum=0.9))
NONE_ABSENT = (b"",) * 3
both = pytest.mark.parametrize("num_shards", [1, 3])


def push(client, grad, base, into=None, samples=1, absent=NONE_ABSENT):
    ticket = client.start_push(grad, samples, base, absent, into)
    pushed = client.wait(ticket).pushed
    assert pushed is not None
    return pushed


def expected_after(steps):
    """What one worker with a plain momentum SGD would have."""
    parameter = torch.nn.Parameter(numbers())
    optim = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, fused=True)
    for seed in range(1, steps + 1):
        parameter.grad = numbers(seed=seed)
        optim.step()
    return parameter.detach()


@both
def test_values_come_back_as_they_were_brought(num_shards):
    cluster = Cluster(num_shards)
    client = cluster.started(CONTRACT, numbers())
    into = Fetched(client.layout)
    client.fetch(into)
    assert torch.equal(into.values, numbers())
    assert (into.version, into.bseq, into.samples) == ([0] * 3, [0] * 3, [0] * 3)
    assert not client.has_open


@both
def test_one_worker_equals_plain_sgd_with_momentum_bit_for_bit(num_shards):
    cluster = Cluster(num_shards)
    client = cluster.started(CONTRACT, numbers())
    current, following = Fetched(LAYOUT), Fetched(LAYOUT)
    client.fetch(current)
    for seed in range(1, 21):
        pushed = push(client, numbers(seed=seed), current, following, samples=4)
        assert pushed.statuses == {"applied": 3}
        assert (pushed.seq, pushed.staleness, pushed.version) == (seed, 0, seed)
        assert pushed.samples == 4 * seed
        assert not pushed.is_partial
        current, following = following, current
        assert current.version == [seed] * 3
        assert current.bseq == [seed] * 3
        assert current.samples == [4 * seed] * 3
    assert torch.equal(current.values, expected_after(20))


@both
def test_a_push_without_into_brings_no_values_back(num_shards):
    cluster = Cluster(num_shards)
    client = cluster.started(CONTRACT, numbers())
    base = Fetched(LAYOUT)
    client.fetch(base)
    push(client, numbers(seed=1), base)
    assert torch.equal(base.values, numbers())
    assert base.version == [0, 0, 0]
    assert torch.equal(cluster.values, expected_after(1))


@both
def test_several_pushes_may_be_on_the_way(num_shards):
    cluster = Cluster(num_shards)
    client = cluster.started(CONTRACT, numbers())
    base = Fetched(LAYOUT)
    client.fetch(base)
    tickets = [client.start_push(numbers(seed=s), 1, base, NONE_ABSENT, None) for s in (1, 2, 3)]
    assert client.has_open
    for ticket in tickets:
        client.wait(ticket)
    assert [ticket.pushed.staleness for ticket in tickets if ticket.pushed] == [0, 0, 0]
    assert torch.equal(cluster.values, expected_after(3))


def test_two_workers_see_each_others_staleness():
    cluster = Cluster(3, num_workers=2)
    one = cluster.started(CONTRACT, numbers())
    two = cluster.started(CONTRACT, numbers(), w="w1")
    bases = [Fetched(LAYOUT), Fetched(LAYOUT)]
    for client, base in zip((one, two), bases, strict=True):
        client.fetch(base)
    seen = [
        push(client, numbers(seed=step), base, base).staleness
        for step in range(4)
        for client, base in zip((one, two), bases, strict=True)
    ]
    assert seen == [0, 1, 1, 1, 1, 1, 1, 1]


# Lost messages


def lossy(cluster, num_steps, lose_request=(), lose_reply=()):
    transport = cluster.transport()
    client = cluster.client(contract=CONTRACT, transport=transport)
    transport.lose_request |= set(lose_request)
    transport.lose_reply |= set(lose_reply)
    client.connect()
    client.initialise(numbers())
    current, following = Fetched(LAYOUT), Fetched(LAYOUT)
    client.fetch(current)
    for seed in range(1, num_steps + 1):
        assert not push(client, numbers(seed=seed), current, following).is_partial
        current, following = following, current
        assert current.bseq == [seed] * 3
    return client, current


@both
@pytest.mark.parametrize("lose", ["lose_request", "lose_reply"])
@pytest.mark.parametrize("at", range(14))
def test_whichever_message_is_lost_each_push_is_applied_exactly_once(num_shards, lose, at):
    cluster = Cluster(num_shards)
    client, current = lossy(cluster, 5, **{lose: {at}})
    assert torch.equal(current.values, expected_after(5))
    assert torch.equal(cluster.values, expected_after(5))
    keys = [(a.w, a.seq, a.part) for a in cluster.applied]
    assert sorted(keys) == [("w0", seq, part) for seq in range(1, 6) for part in range(3)]
    assert not client.has_open


@pytest.mark.parametrize("seed", range(10))
def test_many_lost_messages_change_no_bit(seed):
    rng = random.Random(seed)
    cluster = Cluster(3)
    lost = [{n for n in range(200) if rng.random() < 0.08} for _ in range(2)]
    _, current = lossy(cluster, 10, *lost)
    assert torch.equal(current.values, expected_after(10))
    assert len(cluster.applied) == 30


def test_a_hello_that_was_lost_is_said_again():
    """A link that lost a message and went on, as a DEALER does when its peer comes back."""
    cluster = Cluster(1)
    client = cluster.started(CONTRACT, numbers())
    cluster.shards[0]._sessions.clear()
    into = Fetched(LAYOUT)
    client.fetch(into)
    assert torch.equal(into.values, numbers())


def test_pushes_on_the_way_are_all_sent_again_in_their_order():
    cluster = Cluster(1)
    transport = cluster.transport()
    client = cluster.started(CONTRACT, numbers(), transport=transport)
    base, into = Fetched(LAYOUT), Fetched(LAYOUT)
    client.fetch(base)
    sent = transport._num_sent
    transport.lose_reply |= {sent, sent + 1, sent + 2}
    tickets = [client.start_push(numbers(seed=s), 1, base, NONE_ABSENT, into) for s in (1, 2, 3)]
    for ticket in tickets:
        client.wait(ticket)
    assert [ticket.pushed.statuses for ticket in tickets if ticket.pushed] == [{"dup": 3}] * 3
    assert torch.equal(cluster.values, expected_after(3))
    assert into.bseq == [3, 3, 3]


def test_staleness_stays_exact_where_replies_were_lost():
    """The values of a repeated push 1 hold push 2 as well: it is not subtracted once more."""
    cluster = Cluster(1, num_workers=2)
    transport = cluster.transport()
    one = cluster.started(CONTRACT, numbers(), transport=transport)
    two = cluster.started(CONTRACT, numbers(), w="w1")
    base, into, other = Fetched(LAYOUT), Fetched(LAYOUT), Fetched(LAYOUT)
    one.fetch(base)
    sent = transport._num_sent
    transport.lose_reply |= {sent, sent + 1}
    first = one.start_push(numbers(seed=1), 1, base, NONE_ABSENT, into)
    second = one.start_push(numbers(seed=2), 1, base, NONE_ABSENT, None)
    one.wait(first)
    one.wait(second)
    two.fetch(other)
    push(two, numbers(seed=3), other)
    assert push(one, numbers(seed=4), into).staleness == 1


def test_a_shard_that_never_answers_is_given_up():
    cluster = Cluster(3)
    client = cluster.started(CONTRACT, numbers())
    cluster.handlers["memory-1"] = lambda peer, frames: None
    base = Fetched(LAYOUT)
    began = cluster.time.now
    with pytest.raises(ShardUnavailable, match="shard 1 at memory-1 has not answered fetch for"):
        client.fetch(base)
    assert 5.0 < cluster.time.now - began < 8.0


def test_a_shard_that_says_hello_and_nothing_else_is_given_up_too():
    cluster = Cluster(1)
    client = cluster.started(CONTRACT, numbers())
    real = cluster.handlers["memory-0"]
    cluster.handlers["memory-0"] = lambda peer, frames: (
        real(peer, frames) if b"hello" in bytes(frames[0]) else None
    )
    with pytest.raises(ShardUnavailable, match="has not answered fetch"):
        client.fetch(Fetched(LAYOUT))


@pytest.mark.parametrize(
    "junk",
    [[b""], [b"junk"], [b"\x91" * 2000], [b"\xc0", b"x"]],
    ids=["empty", "text", "deep", "nil"],
)
def test_a_damaged_reply_is_asked_for_again(junk):
    cluster = Cluster(1)
    client = cluster.started(CONTRACT, numbers())
    base, into = Fetched(LAYOUT), Fetched(LAYOUT)
    client.fetch(base)
    real, damaged = cluster.handlers["memory-0"], [junk]
    cluster.handlers["memory-0"] = lambda peer, frames: (
        damaged.pop() if (reply := real(peer, frames)) and damaged else reply
    )
    assert push(client, numbers(seed=1), base, into).statuses == {"dup": 3}
    assert torch.equal(into.values, expected_after(1))


def test_a_reply_with_frames_of_another_size_fills_nothing():
    cluster = Cluster(1)
    client = cluster.started(CONTRACT, numbers())
    real, cut = cluster.handlers["memory-0"], [1]

    def handler(peer, frames):
        reply = real(peer, frames)
        if len(reply) == 4 and cut:
            cut.pop()
            reply[2] = reply[2][:-4]
        return reply

    cluster.handlers["memory-0"] = handler
    into = Fetched(LAYOUT)
    client.fetch(into)
    assert not cut
    assert torch.equal(into.values, numbers())


def test_a_shard_that_answers_one_by_one_is_not_called_silent():
    """Each answer takes 0.6 of the 1 s before a retry; the last one comes after 2.4 s."""
    layout = make_layout(("w", (64 * 16,), 0))
    cluster = Cluster(1)
    transport = cluster.transport()
    client = cluster.started(make_contract(layout), numbers(layout), transport=transport)
    into = Fetched(layout)
    ticket = client.start_fetch(into)
    real = transport.recv

    def slow(timeout_s):
        cluster.time.now += 0.6
        return real(timeout_s)

    transport.recv = slow  # type: ignore[method-assign]
    connections = transport._num_peers
    client.wait(ticket)
    assert transport._num_peers == connections
    assert torch.equal(into.values, numbers(layout))


# Refusals


def test_a_refused_hello_raises_its_code():
    cluster = Cluster(1)
    cluster.started(CONTRACT, numbers())
    with pytest.raises(Refused, match=r"the token is not this job's \[token\]") as refused:
        cluster.client("w1", contract=CONTRACT, token="wrong").connect()
    assert refused.value.code == "token"


def test_another_model_is_refused_by_the_name_of_its_first_tensor():
    cluster = Cluster(3)
    cluster.started(CONTRACT, numbers())
    theirs = make_contract(make_layout(("w", (10, 13), 0), ("b", (6,), 0), ("v", (51,), 0)))
    with pytest.raises(Refused, match=r"b \[7\] .* here, b \[6\] .* there") as refused:
        cluster.client("w1", contract=theirs).connect()
    assert refused.value.code == "contract"


def test_a_replaced_worker_is_told_so_at_once():
    cluster = Cluster(3)
    old = cluster.started(CONTRACT, numbers())
    base = Fetched(LAYOUT)
    old.fetch(base)
    cluster.started(CONTRACT, numbers(), inc=2)
    with pytest.raises(Refused) as refused:
        push(old, numbers(), base)
    assert refused.value.code == "fenced"
    assert torch.equal(cluster.values, numbers())


def test_a_replaced_worker_is_told_so_after_a_lost_message_too():
    cluster = Cluster(1)
    transport = cluster.transport()
    old = cluster.started(CONTRACT, numbers(), transport=transport)
    base = Fetched(LAYOUT)
    old.fetch(base)
    cluster.started(CONTRACT, numbers(), inc=2)
    transport.lose_request.add(transport._num_sent)
    with pytest.raises(Refused) as refused:
        push(old, numbers(), base)
    assert refused.value.code == "fenced"


def test_endpoints_in_another_order_are_an_error_of_ours():
    cluster = Cluster(3)
    order = [cluster.endpoints[i] for i in (0, 2, 1)]
    with pytest.raises(LocalError, match="memory-2 is shard 2 of 3, expected 1 of 3"):
        cluster.client(contract=CONTRACT, endpoints=order).connect()


def test_too_few_endpoints_are_an_error_of_ours():
    cluster = Cluster(3)
    with pytest.raises(LocalError, match="memory-0 is shard 0 of 3, expected 0 of 1"):
        cluster.client(contract=CONTRACT, endpoints=["memory-0"]).connect()


def test_a_partial_push_says_which_parts_refused_and_why():
    cluster = Cluster(3)
    client = cluster.started(CONTRACT, numbers())
    base, into = Fetched(LAYOUT), Fetched(LAYOUT)
    client.fetch(base)
    grad = numbers(seed=1)
    grad[100] = float("nan")
    pushed = push(client, grad, base, into)
    assert pushed.is_partial
    assert pushed.statuses == {"applied": 2, "nonfinite": 1}
    (reason,) = pushed.reasons
    assert "w0 push 1 part 1: gradient of w[100] is nan" in reason
    assert (pushed.version, into.version) == (0, [1, 0, 1])
    assert push(client, numbers(seed=2), into, into).statuses == {"applied": 3}


def test_a_refused_push_whose_reply_was_lost_is_still_partial():
    cluster = Cluster(1)
    transport = cluster.transport()
    client = cluster.started(CONTRACT, numbers(), transport=transport)
    base = Fetched(LAYOUT)
    client.fetch(base)
    grad = numbers(seed=1)
    grad[0] = float("inf")
    transport.lose_reply.add(transport._num_sent)
    pushed = push(client, grad, base)
    assert pushed.statuses == {"spent": 1, "dup": 2}
    assert pushed.is_partial


def test_absent_tensors_travel_with_the_push():
    cluster = Cluster(3)
    client = cluster.started(CONTRACT, numbers())
    base = Fetched(LAYOUT)
    client.fetch(base)
    pushed = push(client, numbers(seed=1), base, absent=LAYOUT.absent_masks(["b"]))
    assert pushed.statuses == {"applied": 3}
    assert torch.equal(cluster.values[130:137], numbers()[130:137])
    assert torch.equal(cluster.values[:130], expected_after(1)[:130])


# Before the first values


def test_an_evaluator_without_a_contract_learns_it():
    cluster = Cluster(3)
    cluster.started(CONTRACT, numbers())
    reader = cluster.client("reader", inc=0)
    reader.connect()
    assert reader.contract == CONTRACT
    into = Fetched(reader.layout)
    reader.fetch(into)
    assert torch.equal(into.values, numbers())


def test_an_evaluator_waits_for_the_first_worker():
    cluster = Cluster(3)
    cluster.time.while_asleep = [lambda: None, lambda: cluster.started(CONTRACT, numbers())]
    reader = cluster.client("reader", inc=0)
    reader.connect()
    assert reader.contract == CONTRACT
    assert cluster.time.slept == [0.05, 0.05]


@both
def test_a_fetch_waits_until_somebody_brings_the_values(num_shards):
    cluster = Cluster(num_shards)
    first = cluster.client(contract=CONTRACT)
    second = cluster.client("w1", contract=CONTRACT)
    first.connect()
    second.connect()
    cluster.time.while_asleep = [lambda: None, lambda: first.initialise(numbers())]
    into = Fetched(LAYOUT)
    second.fetch(into)
    assert torch.equal(into.values, numbers())
    assert cluster.time.slept == [0.05, 0.05]


def test_a_fetch_waits_for_the_last_shard_too():
    cluster = Cluster(3)
    first = cluster.client(contract=CONTRACT)
    first.connect()
    first._links[1].is_ready = True  # it dies before it has brought all of them
    first.initialise(numbers())
    rescuer = cluster.client("w1", contract=CONTRACT)
    rescuer.connect()
    second = cluster.client("w2", contract=CONTRACT)
    second.connect()
    cluster.time.while_asleep = [lambda: rescuer.initialise(numbers())]
    into = Fetched(LAYOUT)
    second.fetch(into)
    assert torch.equal(into.values, numbers())


def test_nobody_brings_the_values():
    cluster = Cluster(1)
    client = cluster.client(contract=CONTRACT)
    client.connect()
    with pytest.raises(ShardUnavailable, match="no first worker has brought the parameters"):
        client.fetch(Fetched(LAYOUT))


def test_only_the_first_brings_the_values():
    cluster = Cluster(3)
    one = cluster.client(contract=CONTRACT)
    two = cluster.client("w1", contract=CONTRACT)
    one.connect()
    two.connect()
    one.initialise(numbers())
    two.initialise(numbers(seed=1))
    assert torch.equal(cluster.values, numbers())


# The rest


def test_buffers_are_merged_on_the_first_shard():
    contract = make_contract(buffers=BUFFERS)
    cluster = Cluster(3)
    one = cluster.started(contract, numbers())
    two = cluster.started(contract, numbers(), w="w1")
    assert two.merge(0, torch.empty(0), torch.empty(0, dtype=torch.int64)) is None
    one.merge(1, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5]))
    merged = two.merge(1, torch.tensor([3.0, 2.0, 1.0]), torch.tensor([4]))
    assert merged is not None
    assert merged[0].tolist() == [2.0, 2.0, 2.0]
    assert merged[1].tolist() == [5]


def test_every_shard_reports_and_is_told_of_a_leave():
    cluster = Cluster(3)
    client = cluster.started(CONTRACT, numbers())
    assert [json.loads(text)["shard"] for text in client.query()] == [0, 1, 2]
    client.leave()
    assert [shard._has_left for shard in cluster.shards] == [{"w0"}] * 3
    client.close()


def test_a_message_carries_at_most_four_parts():
    layout = make_layout(("w", (64 * 11,), 0), part_max=64)
    cluster = Cluster(2)
    client = cluster.started(make_contract(layout), numbers(layout))
    seen: list[tuple[object, int]] = []

    def listening(real):
        def handle(peer, frames):
            seen.append((REQUESTS.decode(frames[0]), len(frames)))
            return real(peer, frames)

        return handle

    for endpoint, real in list(cluster.handlers.items()):
        cluster.handlers[endpoint] = listening(real)
    base = Fetched(layout)
    client.fetch(base)
    push(client, numbers(layout), base, absent=(b"",) * 11)
    pushes = [(m.part, frames) for m, frames in seen if isinstance(m, Push)]
    assert pushes == [  # the layers near the loss first
        ((10,), 2),
        ((6, 7, 8, 9), 5),
        ((4, 5), 3),
        ((0, 1, 2, 3), 5),
    ]


class Counting(MemoryClient):
    """Counts the requests that are under way."""

    def __init__(self, handlers):
        super().__init__(handlers)
        self.under_way = self.most = 0

    def connect(self, link, endpoint):
        super().connect(link, endpoint)
        self.under_way = 0

    def send(self, link, frames):
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        super().send(link, frames)

    def recv(self, timeout_s):
        received = super().recv(timeout_s)
        self.under_way -= received is not None
        return received


ELEVEN = make_layout(("w", (64 * 11,), 0), part_max=64)


@pytest.mark.parametrize(("budget", "most"), [(1, 1), (2 * 4 * 704, 2), (2**20, 3)])
def test_no_more_requests_are_under_way_than_there_are_credits(budget, most):
    cluster = Cluster(1, budget=budget)  # its messages are of 4, 4 and 3 parts of 256 bytes
    transport = Counting(cluster.handlers)
    client = cluster.started(make_contract(ELEVEN), numbers(ELEVEN), transport=transport)
    base = Fetched(ELEVEN)
    client.fetch(base)
    transport.most = 0
    pushed = push(client, numbers(ELEVEN, 1), base, base, absent=(b"",) * 11)
    assert (pushed.statuses["applied"], transport.most, client.has_open) == (11, most, False)
    assert torch.equal(base.values, numbers(ELEVEN).add(numbers(ELEVEN, 1), alpha=-0.1))


@pytest.mark.parametrize("lose", ["lose_request", "lose_reply"])
@pytest.mark.parametrize("at", range(3, 9))
def test_what_waits_for_credits_is_not_lost_with_a_message(lose, at):
    cluster = Cluster(1, budget=1)
    transport = Counting(cluster.handlers)
    client = cluster.started(make_contract(ELEVEN), numbers(ELEVEN), transport=transport)
    base = Fetched(ELEVEN)
    getattr(transport, lose).add(at)
    client.fetch(base)
    pushed = push(client, numbers(ELEVEN, 1), base, base, absent=(b"",) * 11)
    assert not pushed.is_partial
    assert torch.equal(base.values, numbers(ELEVEN).add(numbers(ELEVEN, 1), alpha=-0.1))
    assert torch.equal(cluster.values, base.values)
    assert {part.version for part in cluster.shards[0].parts.values()} == {1}
