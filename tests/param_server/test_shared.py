"""The memory between a shard and the workers of its host, in one process and without a network."""

import os

import pytest
import torch

from distbelief.param_server.backup import VECTORS_MAX
from distbelief.param_server.memory import Memory, is_supported
from distbelief.param_server.part import Heap
from distbelief.param_server.protocol import SHARED, Ack, Hello, Leave, Push, Refusal, encode
from distbelief.param_server.server import ShardServer, respond
from distbelief.param_server.shard import CREDITS_MAX, Shard, ShardConfig
from distbelief.param_server.shared import VECTORS, Shared, vector_bytes, worker_bytes
from distbelief.param_server.slab import Slab, SlabReader, slab_bytes
from tests.param_server.jobs import (
    LAYOUT,
    RUN,
    TOKEN,
    Peer,
    make_contract,
    numbers,
    state_of,
    values_of,
)

pytestmark = pytest.mark.skipif(not is_supported(), reason="no shared memory here")

STEP = vector_bytes(LAYOUT)


def push_of(part=(0, 1, 2), place=0, seq=1, peer="w0", **changed):
    return Push(
        **{
            "run": RUN,
            "w": peer,
            "inc": 1,
            "ep": 1,
            "seq": seq,
            "samples": 1,
            "dt": SHARED,
            "fetch": False,
            "part": part,
            "base": (0,) * len(part),
            "bseq": (0,) * len(part),
            "numel": (),
            "crc": (),
            "absent": (),
            "place": place,
            **changed,
        }
    )


def maps(owner=""):
    with open("/proc/self/maps") as file:
        return sum(f"memfd:distbelief-{owner}" in line for line in file)


@pytest.fixture
def worker():
    memory = Memory.create("worker", worker_bytes(LAYOUT))
    yield memory
    memory.close()


@pytest.fixture
def shared():
    made = Shared()
    made.make_home(LAYOUT.parts)
    yield made
    made.close()
    assert maps("worker") <= 1  # the worker's own


def test_a_worker_is_told_where_the_slab_is(shared, worker):
    address = shared.attach(b"a", worker.address, LAYOUT)
    slab = Memory.open(address, "shard")
    assert slab.size == slab_bytes(LAYOUT.parts)
    assert shared.num_workers == 1
    slab.close()


def test_gradients_are_those_that_lie_in_the_workers_memory(shared, worker):
    shared.attach(b"a", worker.address, LAYOUT)
    for vector in range(VECTORS):
        worker.vector(vector * STEP, LAYOUT.total).copy_(numbers(seed=vector))
    for vector in range(VECTORS):
        found = shared.gradients(b"a", push_of((2, 0), vector * STEP), LAYOUT)
        assert [len(g) for g in found] == [59, 64]
        assert torch.equal(found[0], numbers(seed=vector)[128:])
        assert torch.equal(found[1], numbers(seed=vector)[:64])
    worker.vector(0, LAYOUT.total).fill_(5.0)
    [found] = shared.gradients(b"a", push_of((1,)), LAYOUT)
    assert found.eq(5.0).all(), "no copy of them is kept"


@pytest.mark.parametrize(
    "place", [4, 64, STEP - 4, STEP + 1, VECTORS * STEP, (VECTORS + 1) * STEP, 2**52]
)
def test_a_place_where_no_vector_begins_has_no_gradients(shared, worker, place):
    shared.attach(b"a", worker.address, LAYOUT)
    assert shared.gradients(b"a", push_of(place=place), LAYOUT) is None


def test_a_part_that_the_model_has_not_has_no_gradient(shared, worker):
    shared.attach(b"a", worker.address, LAYOUT)
    assert shared.gradients(b"a", push_of((0, 3)), LAYOUT) is None
    assert shared.gradients(b"b", push_of(), LAYOUT) is None


@pytest.mark.parametrize("more", [-1, 1, -STEP, (VECTORS_MAX + 1) * STEP])
def test_memory_of_another_size_is_not_taken(shared, more, caplog):
    memory = Memory.create("worker", worker_bytes(LAYOUT) + more)
    assert shared.attach(b"a", memory.address, LAYOUT) == ""
    assert shared.num_workers == 0
    assert maps("worker") == 1
    assert f"memory has {worker_bytes(LAYOUT) + more} bytes" in caplog.text
    memory.close()


@pytest.mark.parametrize("address", ["", "junk", f"9999999999:3:5:{'0' * 64}", "x" * 4000])
def test_a_worker_without_memory_here_is_not_told_of_the_slab(shared, address):
    assert shared.attach(b"a", address, LAYOUT) == ""
    assert shared.num_workers == 0


def test_a_slab_is_not_taken_for_a_workers_memory(shared, worker):
    address = shared.attach(b"a", worker.address, LAYOUT)
    assert shared.attach(b"b", address, LAYOUT) == ""


def test_a_worker_that_says_hello_again_is_mapped_once(shared, worker):
    """Each retry comes on a new connection, and nobody tells the shard that the old one is gone."""
    for n in range(50):
        assert shared.attach(b"%d" % n, worker.address, LAYOUT)
    assert shared.num_workers == 1
    assert maps("worker") == 2
    assert shared.gradients(b"48", push_of(), LAYOUT) is None
    assert shared.gradients(b"49", push_of(), LAYOUT) is not None
    for _ in range(50):
        assert shared.attach(b"49", worker.address, LAYOUT)
    assert maps("worker") == 2
    assert shared.attach(b"49", "", LAYOUT) == "", "and now without memory"
    assert maps("worker") == 1


def test_two_workers_have_two_memories(shared, worker):
    another = Memory.create("worker", worker_bytes(LAYOUT))
    for peer, memory in ((b"a", worker), (b"b", another)):
        assert shared.attach(peer, memory.address, LAYOUT)
        memory.vector(0, 187).fill_(float(peer[0]))
    assert [float(shared.gradients(p, push_of(), LAYOUT)[0][0]) for p in (b"a", b"b")] == [97, 98]
    shared.detach(b"a")
    assert shared.gradients(b"a", push_of(), LAYOUT) is None
    assert float(shared.gradients(b"b", push_of(), LAYOUT)[0][0]) == 98
    another.close()


def test_detaching_lets_go_and_may_be_done_twice(shared, worker):
    shared.attach(b"a", worker.address, LAYOUT)
    shared.gradients(b"a", push_of(), LAYOUT)
    assert maps("worker") == 2
    shared.detach(b"a")
    shared.detach(b"a")
    assert maps("worker") == 1


def test_only_the_memory_of_processes_that_are_gone_is_swept(shared, worker, monkeypatch):
    another = Memory.create("worker", worker_bytes(LAYOUT))
    shared.attach(b"a", worker.address, LAYOUT)
    shared.attach(b"b", another.address, LAYOUT)
    shared.sweep()
    assert shared.num_workers == 2
    gone = {another.address}
    monkeypatch.setattr(Memory, "is_owner_alive", property(lambda m: m.address not in gone))
    shared.sweep()
    assert shared.num_workers == 1
    assert shared.gradients(b"a", push_of(), LAYOUT) is not None
    another.close()


def test_all_is_let_go_at_the_end(worker):
    before = len(os.listdir("/proc/self/fd"))
    shared = Shared()
    home = shared.make_home(LAYOUT.parts)
    assert isinstance(home, Slab)
    shared.attach(b"a", worker.address, LAYOUT)
    shared.close()
    shared.close()
    del home
    assert maps() == 1
    assert len(os.listdir("/proc/self/fd")) == before
    assert shared.attach(b"a", worker.address, LAYOUT) == ""


def test_switched_off_it_shares_nothing(worker):
    shared = Shared(is_on=False)
    assert isinstance(shared.make_home(LAYOUT.parts), Heap)
    assert shared.attach(b"a", worker.address, LAYOUT) == ""
    assert shared.gradients(b"a", push_of(), LAYOUT) is None
    shared.sweep()
    shared.close()


def test_without_memory_files_everything_goes_over_the_network(monkeypatch, worker, caplog):
    def refuse(owner, size):
        raise PermissionError(1, "Operation not permitted")

    shared = Shared()
    with monkeypatch.context() as patched:
        patched.setattr(Memory, "create", refuse)
        assert isinstance(shared.make_home(LAYOUT.parts), Heap)
    assert "the container, has no memory files: all workers" in caplog.text
    assert shared.attach(b"a", worker.address, LAYOUT) == ""


# With a shard


class Served:
    """A shard with parameters in a slab, spoken to by `respond`."""

    def __init__(self, shared):
        self.shared = shared
        self.shard = Shard(ShardConfig(run=RUN, token=TOKEN), make_home=shared.make_home)
        peer = Peer(self.shard, "first")
        peer.hello(make_contract())
        peer.init(numbers())

    def ask(self, peer, message, *payload):
        frames = [encode(message), *payload]
        reply = respond(self.shard, peer, frames, 0.0, self.shared)
        reply.release()
        return reply.message

    def hello(self, peer, memory="", **changed):
        fields = {"run": RUN, "w": "w0", "inc": 1, "ep": 0, "token": TOKEN, "memory": memory}
        return self.ask(peer, Hello(**{**fields, **changed}))

    def assert_refused(self, code, text, peer, *message):
        before = state_of(self.shard)
        reply = self.ask(peer, *message)
        assert isinstance(reply, Refusal), reply
        assert (reply.code, text in reply.text) == (code, True), reply
        after = state_of(self.shard)
        before.pop("workers")  # when they were heard
        after.pop("workers")
        assert after == before


@pytest.fixture
def served():
    shared = Shared()
    made = Served(shared)
    yield made
    shared.close()
    vars(made).clear()  # pytest keeps it for a while, and its values would keep the slab mapped


def test_a_push_in_shared_memory_is_applied_where_it_lies(served, worker):
    welcome = served.hello(b"a", worker.address)
    assert welcome.credits == CREDITS_MAX  # what is shared takes nothing of the budget
    worker.vector(STEP, LAYOUT.total).copy_(numbers(seed=1))
    ack = served.ask(b"a", push_of(place=STEP))
    assert isinstance(ack, Ack)
    assert (ack.status, ack.version, ack.bseq, ack.numel, ack.credits) == (
        ("applied",) * 3,
        (1, 1, 1),
        (1, 1, 1),
        (),
        0,
    )
    expected = numbers().add(numbers(seed=1), alpha=-0.1)
    assert torch.equal(values_of(served.shard), expected)
    slab = Memory.open(welcome.memory, "shard")
    into = torch.zeros(LAYOUT.total)
    assert SlabReader(slab.array(), LAYOUT.parts).read(LAYOUT.parts, into, lambda *_: None)
    assert torch.equal(into, expected)
    slab.close()
    assert torch.equal(worker.vector(STEP, LAYOUT.total), numbers(seed=1)), "read only"


def test_a_push_in_shared_memory_that_is_repeated_is_applied_once(served, worker):
    served.hello(b"a", worker.address)
    worker.vector(0, LAYOUT.total).fill_(1.0)
    assert served.ask(b"a", push_of()).status == ("applied",) * 3
    values = values_of(served.shard)
    served.hello(b"b", worker.address)  # on a new connection, as after a time-out
    worker.vector(0, LAYOUT.total).fill_(2.0)
    assert served.ask(b"b", push_of()).status == ("dup",) * 3
    assert torch.equal(values_of(served.shard), values)


def test_a_push_on_an_unknown_connection_is_asked_for_a_hello(served, worker):
    """With junk instead the worker would have ended, where a hello makes up for it."""
    served.hello(b"a", worker.address)
    served.assert_refused("hello", "has not said hello", b"b", push_of())


def test_a_push_of_a_worker_that_shares_nothing_is_junk(served):
    assert served.hello(b"a").memory == ""
    served.assert_refused("junk", "a push of 3 parts with 0 frames", b"a", push_of())


def test_a_push_on_the_old_connection_of_a_worker_that_came_back_changes_nothing(served, worker):
    served.hello(b"a", worker.address)
    served.hello(b"b", worker.address)
    served.assert_refused("junk", "with 0 frames", b"a", push_of())
    assert served.ask(b"b", push_of()).status == ("applied",) * 3


@pytest.mark.parametrize(
    ("code", "text", "changed"),
    [
        ("junk", "with 0 frames", {"place": 4}),
        ("junk", "with 0 frames", {"place": VECTORS * STEP}),
        ("part", "hosts no part 3", {"part": (0, 1, 3)}),
        ("epoch", "is in epoch 1", {"ep": 0}),
        ("hello", "has not said hello", {"w": "w1"}),
        ("hello", "has not said hello", {"inc": 2}),
        ("token", "this is run", {"run": "another"}),
    ],
)
def test_what_is_wrong_with_the_whole_push_changes_nothing(served, worker, code, text, changed):
    served.hello(b"a", worker.address)
    served.assert_refused(code, text, b"a", push_of(**changed))


@pytest.mark.parametrize(
    "changed",
    [{"numel": (64, 64, 59)}, {"crc": (0, 0, 0)}, {"fetch": True}],
)
def test_a_push_in_shared_memory_names_nothing_of_a_payload(changed):
    with pytest.raises(ValueError, match="no payload, in neither direction"):
        push_of(**changed)


def test_frames_that_come_with_a_push_in_shared_memory_are_not_looked_at(served, worker):
    served.hello(b"a", worker.address)
    worker.vector(0, LAYOUT.total).fill_(1.0)
    assert served.ask(b"a", push_of(), b"x" * 256, b"").status == ("applied",) * 3
    torch.testing.assert_close(values_of(served.shard), numbers() - 0.1)


def test_a_shard_that_shares_nothing_refuses_a_push_in_shared_memory():
    served = Served(Shared(is_on=False))
    served.shared = None
    served.assert_refused("hello", "has not said hello", b"a", push_of())
    served.hello(b"a")
    served.assert_refused("junk", "with 0 frames", b"a", push_of())


def test_a_bad_gradient_is_named_and_consumes_the_seq(served, worker):
    served.hello(b"a", worker.address)
    vector = worker.vector(0, LAYOUT.total)
    vector.fill_(1.0)
    vector[140] = torch.nan  # of v, in the last part
    before = served.shard.parts[2].values.clone()
    ack = served.ask(b"a", push_of())
    assert ack.status == ("applied", "applied", "nonfinite")
    assert "gradient of v[3] is nan (1 values of part 2 are not finite)" in ack.text[2]
    assert torch.equal(served.shard.parts[2].values, before)
    vector.fill_(1.0)
    assert served.ask(b"a", push_of()).status == ("dup", "dup", "spent")


def test_a_worker_whose_hello_is_refused_is_not_mapped(served, worker):
    reply = served.hello(b"a", worker.address, token="guess")
    assert isinstance(reply, Refusal)
    assert served.shared.num_workers == 0


def test_a_worker_that_leaves_is_let_go(served, worker):
    served.hello(b"a", worker.address)
    assert served.shared.num_workers == 1
    served.ask(b"a", Leave(run=RUN, w="w0", inc=1, ep=1))
    assert served.shared.num_workers == 0


class Idle:
    """A server transport where nothing comes."""

    endpoint = "idle"
    speaker = None

    def recv(self, timeout_s):
        return None

    def send(self, peer, frames):
        return None

    def bound_intake(self, allowance):
        return 0

    def close(self):
        pass


def test_the_server_sweeps_once_a_second(served):
    now, swept = [0.0], []
    served.shared.sweep = lambda: swept.append(now[0])
    server = ShardServer(served.shard, Idle(), clock=lambda: now[0], shared=served.shared)
    for _ in range(25):
        server.serve_once(0.0)
        now[0] += 0.125
    assert swept == [1.0, 2.0, 3.0]
