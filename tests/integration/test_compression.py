"""Compressed pushes and fetches, from a client to a shard and back."""

import threading
from contextlib import contextmanager

import pytest
import torch
import zmq

from distbelief.param_server.client import Client, Fetched
from distbelief.param_server.compress import BLOCK, Compression, Scratch, encode_, frame_bytes
from distbelief.param_server.identity import Identity
from distbelief.param_server.link import Patience
from distbelief.param_server.protocol import REQUESTS, Push
from distbelief.param_server.server import ShardServer
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.transport import MemoryClient, ZmqClient, ZmqServer
from distbelief.param_server.update import SGD, Adam
from tests.helpers.children import until
from tests.helpers.collector import start_collector
from tests.param_server.jobs import (
    LAYOUT,
    RUN,
    TOKEN,
    Cluster,
    make_contract,
    make_layout,
    numbers,
    ready_shard,
    state_of,
    values_of,
)

# 16 parts of 64 Ki elements, whose frames of all forms but topk go out without a copy.
LARGE = make_layout(("w", (1000, 1000), 0), ("b", (48576,), 0))
CONTRACT = make_contract(LARGE)  # lr 0.1
NONE_ABSENT = (b"",) * len(LARGE.parts)
PUSHES = [
    Compression(push="bfloat16"),
    Compression(push="int8"),
    Compression(push="topk", top=0.16),
    Compression(push="topk", top=0.001),
]
FETCHES = [Compression(fetch="bfloat16"), Compression(fetch="int8")]


@pytest.fixture(scope="module", autouse=True)
def _collector():
    start_collector()


@contextmanager
def shard():
    """A shard in a thread of this process, as its server."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    stop = threading.Event()
    transport = ZmqServer(context)
    server = ShardServer(Shard(ShardConfig(run=RUN, token=TOKEN)), transport)
    thread = threading.Thread(target=server.serve, args=(stop.is_set,))
    thread.start()
    try:
        yield server
    finally:
        stop.set()
        thread.join(30)
        transport.close()
        context.term()


@contextmanager
def worker(server, compression, contract=CONTRACT):
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    client = Client(
        ZmqClient(context),
        [server._transport.endpoint],
        Identity(run=RUN, w="w0", inc=1, token=TOKEN),
        contract,
        Patience(retry_s=10.0, give_up_s=60.0),
        compression=compression,
    )
    try:
        client.connect()
        client.initialise(numbers(contract.layout))
        yield client
    finally:
        client.close()
        context.term()


def push(client, grad, base, into=None):
    return client.wait(client.start_push(grad, 1, base, NONE_ABSENT, into)).pushed


def rounding(form, values):
    """How far a value may be from what it comes out as, element by element."""
    if form == "bfloat16":
        return values.abs() * 2**-8
    parts = [values[part.start : part.stop] for part in LARGE.parts]
    steps = [
        piece.abs().max().expand(piece.numel()) / 254
        for part in parts
        for piece in part.split(BLOCK)
    ]
    return torch.cat(steps)


def assert_within(actual, exact, bound):
    worst = ((actual - exact).abs() - bound - exact.abs() * 1e-6).max()
    assert float(worst) <= 1e-7, f"{float(worst)} further off than the form's rounding"


@pytest.mark.parametrize("compression", PUSHES, ids=lambda c: f"{c.push} {c.top}")
def test_a_push_is_applied_within_the_rounding_of_its_form(compression):
    grad = numbers(LARGE, 1)
    with shard() as server, worker(server, compression) as client:
        base = Fetched(LARGE)
        client.fetch(base)
        assert torch.equal(base.values, numbers(LARGE)), "a fetch is not compressed"
        assert push(client, grad, base).statuses == {"applied": len(LARGE.parts)}
        moved = (numbers(LARGE) - values_of(server.shard)) / 0.1
        if compression.push == "topk":
            for part in LARGE.parts:
                piece, exact = moved[part.start : part.stop], grad[part.start : part.stop]
                kept = frame_bytes("topk", part.numel, compression.top) // 6
                largest = exact.abs().topk(kept).indices
                assert int(piece.count_nonzero()) == kept
                assert_within(piece[largest], exact[largest], exact[largest].abs() * 2**-8 + 1e-5)
        else:
            assert_within(moved, grad, rounding(compression.push, grad) + 1e-5)
            assert not torch.equal(moved, grad)


@pytest.mark.parametrize("compression", PUSHES[1:], ids=lambda c: f"{c.push} {c.top}")
def test_what_a_push_leaves_out_comes_with_the_next_ones(compression):
    """Moved and not yet sent are together what was asked for; int8 is never behind by more than
    its rounding, and topk reaches other coordinates in the second step than in the first."""
    grad = numbers(LARGE, 1)
    with shard() as server, worker(server, compression) as client:
        base = Fetched(LARGE)
        client.fetch(base)
        before, reached = values_of(server.shard), []
        for _ in range(4):
            push(client, grad, base)
            moved = (before - values_of(server.shard)) / 0.1
            reached.append(int(moved.count_nonzero()))
        left = torch.cat([client._encoders[part.index][0].residual for part in LARGE.parts])
        torch.testing.assert_close(moved + left, 4 * grad, atol=3e-5, rtol=0)
        if compression.push == "int8":
            assert_within(moved, 4 * grad, rounding("int8", grad) * 1.02 + 3e-5)
        else:
            assert reached[0] < reached[-1]


@pytest.mark.parametrize("compression", FETCHES, ids=lambda c: c.fetch)
def test_a_fetch_is_within_the_rounding_of_its_form(compression):
    with shard() as server, worker(server, compression) as client:
        base, into = Fetched(LARGE), Fetched(LARGE)
        client.fetch(base)
        assert_within(base.values, numbers(LARGE), rounding(compression.fetch, numbers(LARGE)))
        assert not torch.equal(base.values, numbers(LARGE))
        for seed in range(1, 4):
            push(client, numbers(LARGE, seed), base, into)
            exact = values_of(server.shard)
            assert_within(into.values, exact, rounding(compression.fetch, exact))
            assert into.version == into.bseq == [seed] * len(LARGE.parts)
        expected = numbers(LARGE)
        for seed in range(1, 4):
            expected.add_(numbers(LARGE, seed), alpha=-0.1)
        torch.testing.assert_close(exact, expected)  # the shard's own are never rounded


MIXED = [
    Compression(push="bfloat16", fetch="int8"),
    Compression(push="int8", fetch="bfloat16"),
    Compression(push="topk", top=0.1, fetch="bfloat16"),
]


def frames_of(shard):
    """How many frames a shard has made that are free now."""
    return sum(len(free) for free in shard._frames._free.values())


@pytest.mark.parametrize("compression", MIXED, ids=repr)
def test_frames_that_zeromq_sends_from_where_they_lie_are_used_again(compression):
    with shard() as server, worker(server, compression) as client:
        base, into = Fetched(LARGE), Fetched(LARGE)
        client.fetch(base)
        grad = numbers(LARGE, 1) * 1e-3
        for _ in range(12):
            push(client, grad, base, into)
            base, into = into, base
            exact = values_of(server.shard)
            assert_within(base.values, exact, rounding(compression.fetch, exact))
        until(lambda: not server._sending)
        # Twice the parts, as ZeroMQ may let go of a reply after the next push has come.
        assert 4 <= frames_of(server.shard) <= 2 * len(LARGE.parts)


@pytest.mark.parametrize("compression", MIXED, ids=repr)
def test_a_hundred_pushes_need_no_more_frames_than_one(compression):
    recording = Recording(compression)
    recording.train(1)
    ours = {i: frame.data_ptr() for i, (_, frame) in recording.client._encoders.items()}
    assert len(ours) == 3
    recording.train(99)
    assert frames_of(recording.cluster.shards[0]) == 3
    assert {i: f.data_ptr() for i, (_, f) in recording.client._encoders.items()} == ours


@pytest.mark.parametrize("compression", PUSHES[:3], ids=lambda c: c.push)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e30])
def test_a_bad_gradient_is_refused_by_its_name_and_the_next_one_is_taken(compression, bad):
    with shard() as server, worker(server, compression) as client:
        base = Fetched(LARGE)
        client.fetch(base)
        grad = numbers(LARGE, 1)
        at = LARGE.parts[2].start + 5
        grad[at] = bad
        pushed = push(client, grad, base)
        assert pushed.statuses == {"applied": len(LARGE.parts) - 1, "nonfinite": 1}
        name = LARGE.name_at(at)
        told = "their squares overflow" if bad == -1e30 and compression.push == "bfloat16" else name
        assert told in pushed.reasons[0]
        assert server.shard.parts[2].version == 0
        grad[at] = 1.0
        assert push(client, grad, base).statuses == {"applied": len(LARGE.parts)}
        assert bool(torch.isfinite(values_of(server.shard)).all())


# What is refused


@pytest.mark.parametrize(
    ("contract", "reason"),
    [
        (make_contract(LARGE, Adam()), "push cannot be topk with adam"),
        (make_contract(LARGE, SGD(), clip_part_norm=1.0), "with clip_part_norm"),
    ],
)
def test_a_form_that_does_not_suit_the_job_is_refused_before_anything_is_sent(contract, reason):
    cluster = Cluster(1)
    client = Client(
        cluster.transport(),
        cluster.endpoints,
        Identity(run=RUN, w="w0", inc=1, token=TOKEN),
        contract,
        compression=Compression(push="topk"),
    )
    with pytest.raises(ValueError, match=reason):
        client.connect()
    assert cluster.shards[0].contract is None
    client.close()


def compressed(form, values, top=0.16):
    frame = torch.empty(frame_bytes(form, values.numel(), top), dtype=torch.uint8)
    encode_(form, values, frame, Scratch(values.numel()))
    return frame


def cut_off(frame):
    return frame[:-1].clone()


def longer(frame):
    return torch.cat([frame, frame[-6:]])


def descending(frame):
    kept = len(frame) // 6
    frame[: 4 * kept].view(torch.int32).copy_(torch.arange(kept, 0, -1))
    return frame


def negative_scale(frame):
    frame[:4].view(torch.float32).fill_(-1.0)
    return frame


@pytest.mark.parametrize(
    ("form", "damage"),
    [
        ("bfloat16", cut_off),
        ("bfloat16", longer),
        ("int8", cut_off),
        ("int8", longer),
        ("int8", negative_scale),
        ("topk", cut_off),
        ("topk", descending),
    ],
)
def test_a_frame_that_is_none_of_its_form_is_refused_and_consumes_the_seq(form, damage):
    served, [peer] = ready_shard()
    frames = {i: compressed(form, g) for i, g in peer.cut(numbers(seed=1)).items()}
    frames[1] = damage(frames[1])
    numel = tuple(part.numel for part in LAYOUT.parts)
    before = served.parts[1].values.clone()
    ack = peer.push(frames, 1, dt=form, numel=numel)
    assert ack.status == ("applied", "form", "applied")
    assert "w0 push 1 part 1: " in ack.text[1]
    assert torch.equal(served.parts[1].values, before)
    assert (ack.version, ack.bseq) == ((1, 0, 1), (1, 1, 1))
    good = {i: compressed(form, g) for i, g in peer.cut(numbers(seed=1)).items()}
    assert peer.push(good, 1, dt=form, numel=numel).status[1] == "spent"
    assert peer.push(good, 2, dt=form, numel=numel).status == ("applied",) * 3


@pytest.mark.parametrize("form", ["bfloat16", "int8", "topk"])
def test_a_frame_for_another_number_of_values_is_refused_and_consumes_the_seq(form):
    served, [peer] = ready_shard()
    frames = {i: compressed(form, g) for i, g in peer.cut(numbers(seed=1)).items()}
    ack = peer.push(frames, 1, dt=form, numel=(64, 65, 59))
    assert ack.status == ("applied", "numel", "applied")
    assert served.parts[1].version == 0
    assert peer.push(frames, 1, dt=form, numel=(64, 64, 59)).status[1] == "spent"


@pytest.mark.parametrize("form", ["bfloat16", "int8", "topk"])
def test_a_frame_that_was_damaged_on_the_way_is_refused(form):
    served, [peer] = ready_shard()
    frames = {i: compressed(form, g) for i, g in peer.cut(numbers(seed=1)).items()}
    numel = tuple(part.numel for part in LAYOUT.parts)
    message, payload = peer.make_push(frames, 1, dt=form, numel=numel)
    frames[2][-1] ^= 1
    assert peer.ask(message, payload).status == ("applied", "applied", "checksum")
    assert served.parts[2].version == 0


def test_a_form_that_nobody_knows_is_junk():
    _, [peer] = ready_shard()
    before = state_of(peer.shard)
    with pytest.raises(ValueError, match="form 'float16'"):
        peer.make_push(peer.cut(numbers()), 1, dt="float16")
    assert state_of(peer.shard) == before


# What is lost


class Recording:
    """Memory links to shards that keep every push that was sent, lost or not."""

    def __init__(self, compression):
        self.cluster = Cluster(1)
        self.pushes = []
        self.transport = MemoryClient(self.cluster.handlers)
        self._send = self.transport.send
        self.transport.send = self._record  # type: ignore[method-assign]
        self.client = Client(
            self.transport,
            self.cluster.endpoints,
            Identity(run=RUN, w="w0", inc=1, token=TOKEN),
            make_contract(),
            Patience(retry_s=1.0, give_up_s=5.0),
            self.cluster.time.clock,
            self.cluster.time.sleep,
            compression=compression,
        )
        self.client.connect()
        self.client.initialise(numbers())

    def _record(self, link, frames):
        if isinstance(REQUESTS.decode(frames[0]), Push):
            self.pushes.append([bytes(frame) for frame in frames])
        self._send(link, frames)

    def train(self, steps, lose_reply=(), lose_request=()):
        """Lose the reply to, or the request of, the first try of these steps."""
        base, into, seen = Fetched(LAYOUT), Fetched(LAYOUT), []
        self.client.fetch(base)
        for step in range(self.client.seq + 1, self.client.seq + steps + 1):
            if step in lose_reply:
                self.transport.lose_reply.add(self.transport._num_sent)
            if step in lose_request:
                self.transport.lose_request.add(self.transport._num_sent)
            ticket = self.client.start_push(numbers(seed=step), 1, base, (b"",) * 3, into)
            self.client.wait(ticket)
            seen.append(ticket.pushed)
            base, into = into, base
        return seen, base.values.clone()


@pytest.mark.parametrize("compression", MIXED, ids=repr)
def test_a_push_that_is_sent_again_is_the_same_to_the_byte_and_applied_once(compression):
    """The residual is in the frame already: encoding it again would send it twice."""
    calm, lossy = Recording(compression), Recording(compression)
    _, expected = calm.train(6)
    seen, values = lossy.train(6, lose_reply={2, 5}, lose_request={3})
    assert [dict(pushed.statuses) for pushed in seen] == [
        {"applied": 3},
        {"dup": 3},
        {"applied": 3},
        {"applied": 3},
        {"dup": 3},
        {"applied": 3},
    ]
    assert len(lossy.pushes) == 9
    for first, again in ((1, 2), (3, 4), (6, 7)):
        assert lossy.pushes[first] == lossy.pushes[again]
    once = [sent for n, sent in enumerate(lossy.pushes) if n not in (2, 4, 7)]
    assert [sent[1:] for sent in once] == [sent[1:] for sent in calm.pushes]
    assert torch.equal(values, expected)
    assert torch.equal(lossy.cluster.values, calm.cluster.values)
    assert len(lossy.cluster.applied) == 18


def test_a_compressed_push_is_smaller_by_as_much_as_is_said():
    sizes = {}
    for form in ("float32", "bfloat16", "int8"):
        recording = Recording(Compression(push=form))
        recording.train(1)
        sizes[form] = [len(frame) for frame in recording.pushes[0][1:]]
    assert sizes == {
        "float32": [256, 256, 236],
        "bfloat16": [128, 128, 118],
        "int8": [68, 68, 63],
    }
