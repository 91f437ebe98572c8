"""The loop around a shard, over a transport made of lists."""

import json
from dataclasses import replace

import pytest
import torch

from distbelief.param_server.contract import Contract
from distbelief.param_server.errors import RemoteProtocolError, SnapshotFailed
from distbelief.param_server.identity import Identity
from distbelief.param_server.protocol import (
    REPLIES,
    Ack,
    Fetch,
    Hello,
    Params,
    Refusal,
    Welcome,
    encode,
)
from distbelief.param_server.report import REPORTS
from distbelief.param_server.reporter import Reporter
from distbelief.param_server.server import Saved, ShardServer, SnapshotConfig, respond
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.snapshot import SnapshotStore
from distbelief.param_server.transport import MemoryClient
from tests.param_server.jobs import (
    LAYOUT,
    RUN,
    TOKEN,
    Cluster,
    Peer,
    make_contract,
    make_layout,
    numbers,
    ready_shard,
    state_of,
)


class Wire:
    """A server transport: what arrives, what was sent, and whether it has gone out."""

    endpoint = "list"
    speaker = None

    def __init__(self):
        self.inbox, self.sent = [], []
        self.is_done, self.is_gone = True, False

    def recv(self, timeout_s):
        if not self.inbox:
            return None
        item = self.inbox.pop(0)
        if isinstance(item, Exception):
            raise item
        return item

    def send(self, peer, frames):
        if self.is_gone:
            return None
        self.sent.append((peer, [bytes(frame) for frame in frames]))
        return self

    def bound_intake(self, allowance):
        return 0

    def close(self):
        pass


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def serving(store=None, every_s=0.0):
    shard, [peer] = ready_shard()
    wire, clock = Wire(), Clock()
    return (
        ShardServer(shard, wire, store, SnapshotConfig(every_s=every_s), clock),
        peer,
        wire,
        clock,
    )


JUNK = [
    [],
    [b""],
    [b"GET / HTTP/1.1\r\n\r\n"],
    [b"\x82\xa1v\x01\xa2op" + b"\x91" * 1020 + b"\x01"],
    [b"\x91" * 60_000],
    [bytes(100_000)],
    [encode(Refusal(code="junk", text="no"))],
    [b"\xdf\xff\xff\xff\xff"],
]


@pytest.mark.parametrize("frames", JUNK, ids=range(len(JUNK)))
def test_junk_gets_one_short_refusal_and_is_counted(frames):
    shard, _ = ready_shard()
    before = state_of(shard)
    reply = respond(shard, b"stranger", frames, 0.0)
    assert isinstance(reply.message, Refusal)
    assert reply.message.code == "junk"
    assert reply.payload == ()
    assert len(encode(reply.message)) < 300
    assert shard.counts == {"junk": 1}
    assert state_of(shard) == before


def test_junk_reaches_no_shard_over_memory_either():
    cluster = Cluster(1)
    transport = MemoryClient(cluster.handlers)
    transport.connect(0, "memory-0")
    for frames in JUNK:
        transport.send(0, frames)
        received = transport.recv(0.0)
        assert received is not None
        reply = REPLIES.decode(received[1][0])
        assert isinstance(reply, Refusal)
    assert cluster.shards[0].counts == {"junk": len(JUNK)}


def test_a_message_of_too_many_frames_is_counted_and_the_loop_goes_on():
    server, peer, wire, _ = serving()
    wire.inbox = [
        RemoteProtocolError("a message of more than 4097 frames"),
        (peer.connection, [encode(Fetch(**peer.who, part=(0,)))]),
    ]
    server.serve_once(0.0)
    server.serve_once(0.0)
    assert server.shard.counts["junk"] == 1
    ((to, frames),) = wire.sent
    assert to == peer.connection
    assert isinstance(REPLIES.decode(frames[0]), Params)


def test_a_contract_that_was_refused_in_many_words_does_not_stop_the_loop():
    server, peer, wire, _ = serving()
    theirs = Contract(make_layout(("x" * 60_000, (3,), 0)))
    hello = Hello(**{**peer.who, "ep": 0, "token": TOKEN})
    wire.inbox = [(b"new", [encode(hello), theirs.to_json()])]
    server.serve_once(0.0)
    reply = REPLIES.decode(wire.sent[0][1][0])
    assert isinstance(reply, Refusal)
    assert reply.code == "contract"


def test_a_push_answered_with_the_parts_holds_them_until_they_are_sent():
    server, peer, wire, _ = serving()
    wire.is_done = False
    message, payload = peer.make_push(peer.cut(numbers()), 1, fetch=True)
    wire.inbox = [(peer.connection, [encode(message), *payload])]
    server.serve_once(0.0)
    assert isinstance(REPLIES.decode(wire.sent[0][1][0]), Ack)
    held = [part.values for part in server.shard.parts.values()]
    peer.push_all(numbers(), 2)
    assert all(
        part.values is not old for part, old in zip(server.shard.parts.values(), held, strict=True)
    )
    wire.is_done = True
    server.serve_once(0.0)
    heap = next(iter(server.shard.parts.values()))._heap
    assert sum(map(len, heap._free.values())) == 3  # one of each part is free again
    now = [part.values for part in server.shard.parts.values()]
    peer.push_all(numbers(), 3)
    assert [part.values for part in server.shard.parts.values()] == now or all(
        a is b for a, b in zip(now, [p.values for p in server.shard.parts.values()], strict=True)
    )


def test_a_reply_that_nobody_takes_is_counted_and_lets_go_of_its_parts():
    server, peer, wire, _ = serving()
    wire.is_gone = True
    wire.inbox = [(peer.connection, [encode(Fetch(**peer.who, part=(0, 1)))])]
    server.serve_once(0.0)
    assert server.shard.counts["unsent"] == 1
    before = server.shard.parts[0].values
    peer.push_all(numbers(), 1)
    assert server.shard.parts[0].values is before


# Snapshots


def settle(server):
    """Let the snapshot thread end, and the loop take its result."""
    if server._saver is not None:
        server._saver.join(10)
    server.serve_once(0.0)


def test_a_snapshot_is_taken_when_it_is_due_and_makes_pushes_durable(tmp_path):
    store = SnapshotStore(tmp_path)
    server, peer, _, clock = serving(store, every_s=10.0)
    clock.now = 11.0
    server.serve_once(0.0)
    assert store.names() == []  # nothing was pushed
    peer.push_all(numbers(), 1)
    server.serve_once(0.0)
    settle(server)
    assert store.names() == ["e000001-v000000000001"]
    assert peer.push_all(numbers(), 2).durable == (1, 1, 1)
    clock.now = 20.0
    settle(server)
    assert len(store.names()) == 1
    clock.now = 22.0
    server.serve_once(0.0)
    settle(server)
    assert len(store.names()) == 2


def test_a_snapshot_is_due_too_where_one_part_stands_still(tmp_path):
    store = SnapshotStore(tmp_path)
    server, peer, _, clock = serving(store, every_s=10.0)
    for seq in (1, 2):
        peer.push({0: torch.ones(64)}, seq)
        clock.now += 11.0
        server.serve_once(0.0)
        settle(server)
        assert peer.ask(*peer.make_push({0: torch.ones(64)}, seq)).durable == (seq,)
    assert store.names() == ["e000001-v000000000000", "e000001-v000000000000-000001"]


def test_the_last_snapshot_is_taken_when_the_server_stops(tmp_path):
    store = SnapshotStore(tmp_path)
    server, peer, _, _ = serving(store)
    peer.push_all(numbers(), 1)
    server.serve(lambda: True)
    found = store.latest()
    assert found is not None
    assert found[0].version == 1


def test_it_tells_what_was_saved_and_when_it_was_so(tmp_path):
    server, peer, _, clock = serving(SnapshotStore(tmp_path), every_s=10.0)
    told = [server.saved]
    peer.push_all(numbers(), 1)
    clock.now = 11.0
    server.serve_once(0.0)
    clock.now = 15.0  # it took so long to write
    peer.push_all(numbers(), 2)
    settle(server)
    told.append(server.saved)
    clock.now = 30.0
    server.serve(lambda: True)
    told.append(server.saved)
    assert told == [
        None,
        Saved("e000001-v000000000001", version=1, samples=1, taken_at=11.0),
        Saved("e000001-v000000000002", version=2, samples=2, taken_at=30.0),
    ]


def test_the_samples_of_a_snapshot_are_those_of_the_part_furthest_behind(tmp_path):
    server, peer, _, _ = serving(SnapshotStore(tmp_path))
    peer.push({0: torch.ones(64)}, 1)
    server.serve(lambda: True)
    assert server.saved is not None
    assert (server.saved.version, server.saved.samples) == (0, 0)


def test_a_snapshot_that_holds_the_same_has_the_same_name_and_a_later_moment(tmp_path):
    server, peer, _, clock = serving(SnapshotStore(tmp_path), every_s=10.0)
    peer.push_all(numbers(), 1)
    clock.now = 11.0
    server.serve_once(0.0)
    settle(server)
    first = server.saved
    clock.now = 15.0
    server.serve(lambda: True)
    assert first is not None
    assert server.saved == replace(first, taken_at=15.0)


def test_without_parameters_or_without_a_store_nothing_is_saved(tmp_path):
    store = SnapshotStore(tmp_path / "x")
    ShardServer(Shard(ShardConfig(run=RUN, token=TOKEN)), Wire(), store).serve(lambda: True)
    assert not store.folder.exists()
    serving()[0].serve(lambda: True)


class FullStore(SnapshotStore):
    is_full = True

    def save(self, image):
        if self.is_full:
            raise SnapshotFailed("could not write: No space left on device")
        return super().save(image)


def test_a_full_disk_stalls_what_is_durable_and_says_so_while_training_goes_on(tmp_path, caplog):
    store = FullStore(tmp_path)
    server, peer, _, clock = serving(store, every_s=10.0)
    assert server.saved is None
    for seq in (1, 2, 3):
        peer.push_all(numbers(), seq)
        clock.now += 11.0
        server.serve_once(0.0)
        settle(server)
        assert server.storage_error is not None
        assert "No space left" in server.storage_error
        assert server.saved is None
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert peer.push_all(numbers(), 4).durable == (0, 0, 0)
    store.is_full = False
    clock.now += 11.0
    server.serve_once(0.0)
    settle(server)
    assert server.storage_error is None
    assert peer.push_all(numbers(), 5).durable == (4, 4, 4)


def test_a_negative_interval_is_refused():
    with pytest.raises(ValueError, match=r"every_s must be at least 0, got -1"):
        SnapshotConfig(every_s=-1)


def test_a_stranger_over_the_wire_is_asked_for_the_token():
    shard = Shard(ShardConfig(run=RUN, token=TOKEN))
    peer = Peer(shard)
    hello = encode(Hello(**{**peer.who, "ep": 0, "token": "wrong"}))
    reply = respond(shard, b"p", [hello, make_contract().to_json()], 0.0)
    assert isinstance(reply.message, Refusal)
    assert reply.message.code == "token"
    hello = encode(Hello(**{**peer.who, "ep": 0, "token": TOKEN}))
    reply = respond(shard, b"p", [hello, make_contract().to_json()], 0.0)
    assert isinstance(reply.message, Welcome)
    assert json.dumps(shard.stats())
    assert len(shard.parts) == len(LAYOUT.parts)


class Mailbox:
    """Where a reporter's reports go."""

    def __init__(self):
        self.reports = []
        self.is_there = True

    def send(self, data):
        if self.is_there:
            self.reports.append(REPORTS.decode(data))
        return self.is_there

    def close(self):
        pass


def watched(store=None):
    shard, [peer] = ready_shard()
    wire, clock, mailbox = Wire(), Clock(), Mailbox()
    me = Identity(run=RUN, w="shard0", inc=2, token=TOKEN)
    reporter = Reporter(mailbox, me, clock=clock, wall=lambda: 1000.0 + clock.now)
    server = ShardServer(shard, wire, store, SnapshotConfig(), clock, reporter=reporter)
    return server, peer, wire, clock, mailbox


def push_through(server, peer, wire, seq):
    message, payload = peer.make_push({0: torch.ones(64)}, seq, fetch=True)
    wire.inbox.append((peer.connection, [encode(message), *payload]))
    server.serve_once(0.0)


def test_the_monitor_is_told_once_a_second_of_what_was_handled():
    server, peer, wire, clock, mailbox = watched()
    push_through(server, peer, wire, 1)
    assert mailbox.reports == []
    clock.now = 1.0
    push_through(server, peer, wire, 2)
    (report,) = mailbox.reports
    assert (report.name, report.inc, report.n) == ("shard0", 2, 1)
    assert (report.span_s, report.at) == (1.0, 1001.0)
    assert (report.w, report.pushes, report.base) == (("w0",), (2,), (2,))  # of what it has pushed
    assert report.received_bytes == 2 * 4 * 64
    assert report.sent_bytes >= report.received_bytes  # the parts went back with the answers
    clock.now = 1.5
    server.serve_once(0.0)
    assert len(mailbox.reports) == 1


def test_junk_and_a_monitor_that_is_gone_stop_no_shard():
    server, peer, wire, clock, mailbox = watched()
    mailbox.is_there = False
    wire.inbox.append((b"x", [b"GET / HTTP/1.1"]))
    clock.now = 1.0
    server.serve_once(0.0)
    push_through(server, peer, wire, 1)
    mailbox.is_there = True
    clock.now = 2.0
    server.serve_once(0.0)
    (report,) = mailbox.reports
    assert (report.n, report.pushes) == (2, (1,))  # the hole says that one was lost


def test_the_last_report_has_what_came_since_the_one_before(tmp_path):
    server, peer, wire, clock, mailbox = watched(SnapshotStore(tmp_path))
    push_through(server, peer, wire, 1)
    clock.now = 0.25
    server.serve(lambda: True)
    (report,) = mailbox.reports
    assert (report.pushes, report.span_s) == ((1,), 0.25)


def test_the_monitor_is_told_of_snapshots_and_of_a_disk_that_is_full(tmp_path):
    server, peer, wire, clock, mailbox = watched(SnapshotStore(tmp_path))
    push_through(server, peer, wire, 1)
    server._start_saving()
    server._saver.join()
    clock.now = 2.0
    server.serve_once(0.0)
    (report,) = mailbox.reports
    assert report.saved == server.saved.name
    assert (report.saved_at, report.save_s) == (1000.0, 2.0)  # taken at 0, looked after at 2
    server.storage_error = "no space left"
    clock.now = 3.0
    server.serve_once(0.0)
    assert mailbox.reports[-1].storage_error == "no space left"


def test_a_shard_that_may_have_been_replaced_answers_nothing():
    server, peer, wire, _ = serving()
    before = state_of(server.shard)
    server.is_suspended = True
    message, payload = peer.make_push({0: torch.ones(64)}, seq=1)
    push = (peer.connection, [encode(message), *payload])
    wire.inbox.append(push)
    server.serve_once(0.0)
    assert wire.sent == []
    assert state_of(server.shard) == before
    assert server.shard.counts["suspended"] == 1
    server.is_suspended = False
    wire.inbox.append(push)
    server.serve_once(0.0)
    assert isinstance(REPLIES.decode(wire.sent[0][1][0]), Ack)
