"""The shard's rules, in the order of the top of shard.py, each with what stays as it was."""

import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from distbelief.param_server.layout import Group
from distbelief.param_server.part import VALUES, Part
from distbelief.param_server.protocol import (
    Ack,
    Fetch,
    Hello,
    Init,
    Left,
    Merge,
    Query,
    Ready,
    Refusal,
    Report,
    Welcome,
    as_frame,
    checksum,
    encode,
)
from distbelief.param_server.schedule import Schedule
from distbelief.param_server.shard import Application, Shard, ShardConfig
from distbelief.param_server.update import SGD, Adam
from tests.param_server.jobs import (
    BUFFERS,
    LAYOUT,
    RUN,
    TOKEN,
    Peer,
    make_contract,
    make_layout,
    numbers,
    ready_shard,
    state_of,
    values_of,
)


def new_shard(**config):
    return Shard(ShardConfig(run=RUN, token=TOKEN, **config))


def ones(numel=64, value=1.0):
    return torch.full((numel,), value)


def refused(reply, code):
    assert isinstance(reply, Refusal), reply
    assert reply.code == code
    encode(reply)
    return reply.text


# Hello


def test_the_first_hello_brings_the_contract_and_is_told_the_parts():
    shard = new_shard()
    welcome = Peer(shard).hello(make_contract())
    assert welcome == Welcome(
        shard=0,
        shards=1,
        ep=1,
        is_ready=False,
        part=(0, 1, 2),
        version=(0, 0, 0),
        samples=(0, 0, 0),
        bseq=(0, 0, 0),
        restored=(0, 0, 0),
        credits=32,
    )
    assert repr(shard) == "<Shard 0/1 epoch 1 [parts: 3, version: 0, workers: 1]>"


def test_a_hello_without_a_contract_is_told_it():
    shard, _ = ready_shard()
    reader = Peer(shard, "reader", inc=0)
    reply = reader.send(Hello(**{**reader.who, "ep": 0, "token": TOKEN}))
    assert [bytes(frame) for frame in reply.payload] == [make_contract().to_json()]


def test_a_hello_without_a_contract_waits_for_the_first_worker():
    shard = new_shard()
    refused(Peer(shard, "reader", inc=0).hello(), "not-ready")
    assert shard.contract is None
    assert shard.stats()["workers"] == {}


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        ({"token": "wrong"}, "token", "the token is not this job's"),
        ({"token": "schlüssel"}, "token", "token"),
        ({"run": "other"}, "token", "this is run job, you ask for other"),
        ({"lo": 2, "hi": 3}, "version", "speaks protocol 2 to 3, shard 0 speaks 1"),
        ({"lo": 0, "hi": 0}, "version", "install the same distbelief"),
    ],
)
@pytest.mark.parametrize("is_ready", [True, False])
def test_a_stranger_is_refused_and_leaves_no_trace(changed, code, words, is_ready):
    shard = ready_shard()[0] if is_ready else new_shard()
    before = state_of(shard)
    assert words in refused(Peer(shard, "stranger").hello(make_contract(), **changed), code)
    assert state_of(shard) == before
    assert shard.counts[code] == 1
    assert shard._heard.keys() <= {"w0"}


def test_a_wrong_token_does_not_make_a_worker_look_alive():
    shard, _ = ready_shard()
    refused(Peer(shard, "w0").hello(token="wrong"), "token")
    peer = Peer(shard, "w0")
    peer.send(Hello(**{**peer.who, "ep": 0, "token": "wrong"}), now=99.0)
    assert shard.stats()["workers"] == {"w0": {"inc": 1, "heard": 0.0}}


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (
            make_contract(make_layout(("w", (10, 13), 0), ("b", (8,), 0), ("v", (50,), 0))),
            "b [7] float32 at 130 (lr 0.1, weight_decay 0.0) here, b [8] float32",
        ),
        (make_contract(rule=SGD(momentum=0.5)), "momentum=0.0"),
        (make_contract(schedule=Schedule(warmup=3)), "warmup=3"),
        (make_contract(clip_part_norm=2.0), "clip_part_norm 0.0 here, 2.0 there"),
        (make_contract(buffers=BUFFERS), "mean"),
    ],
    ids=["layout", "rule", "schedule", "clip", "buffers"],
)
def test_another_contract_is_refused_with_its_first_difference(theirs, words):
    shard, _ = ready_shard()
    before = state_of(shard)
    assert words in refused(Peer(shard, "w1").hello(theirs), "contract")
    assert state_of(shard) == before


def test_a_long_difference_still_fits_a_header():
    groups = [Group(lr=0.1 + i) for i in range(2000)]
    shard, _ = ready_shard()
    theirs = make_contract(
        make_layout(*[(e.name, e.shape, 0) for e in LAYOUT.entries], groups=groups)
    )
    refused(Peer(shard, "w1").hello(theirs), "contract")
    odd = make_contract(make_layout(("\ud800" * 3000, (3,), 0)))
    refused(Peer(shard, "w1").hello(odd), "contract")


CONTRACT = json.loads(make_contract().to_json())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"[" * 100_000,
        json.dumps({**CONTRACT, "clip_part_norm": float("nan")}).encode(),
        json.dumps({**CONTRACT, "clip_part_norm": 10**400}).encode(),
        json.dumps({**CONTRACT, "rule": {"kind": "Adagrad", "eps": "x"}}).encode(),
        json.dumps({**CONTRACT, "schedule": {"kind": "constant", "power": 10**400}}).encode(),
        json.dumps({**CONTRACT, "schedule": {"kind": "constant", "odd": 1}}).encode(),
        json.dumps({**CONTRACT, "layout": {**CONTRACT["layout"], "part_max": 1e999}}).encode(),
        json.dumps({**CONTRACT, "layout": {**CONTRACT["layout"], "entries": []}}).encode(),
        json.dumps(
            {**CONTRACT, "layout": {**CONTRACT["layout"], "groups": [{"lr": 10**400}]}}
        ).encode(),
        json.dumps(
            {
                **CONTRACT,
                "layout": {**CONTRACT["layout"], "entries": [["w", [2**80], "float32", 0]]},
            }
        ).encode(),
        json.dumps({**CONTRACT, "buffers": {"floats": [["m", ["x"]]], "integers": []}}).encode(),
        json.dumps({**CONTRACT, "buffers": {"floats": 1, "integers": []}}).encode(),
        json.dumps({**CONTRACT, "odd" * 3000: 1, "rule": {"kind": "x" * 9000}}).encode(),
    ],
    ids=range(17),
)
def test_a_text_that_is_no_contract_is_refused(text):
    shard = new_shard()
    peer = Peer(shard)
    refused(peer.ask(Hello(**{**peer.who, "ep": 0, "token": TOKEN}), [text]), "contract")
    assert shard.contract is None
    assert shard.stats()["workers"] == {}


def test_a_hello_with_two_frames_is_junk():
    shard = new_shard()
    peer = Peer(shard)
    text = make_contract().to_json()
    refused(peer.ask(Hello(**{**peer.who, "ep": 0, "token": TOKEN}), [text, text]), "junk")
    assert shard.contract is None


def test_more_shards_than_parts_are_refused_at_hello():
    shard = new_shard(num_shards=4)
    assert "use at most 3 shards" in refused(Peer(shard).hello(make_contract()), "contract")


def test_an_old_incarnation_is_a_ghost():
    shard, [old] = ready_shard()
    new = Peer(shard, "w0", inc=2)
    new.hello(make_contract())
    before = state_of(shard)
    assert "was replaced by incarnation 2" in refused(old.hello(), "fenced")
    refused(old.ask(*old.make_push(old.cut(numbers()), 1)), "fenced")
    refused(old.ask(Fetch(**old.who, part=(0,))), "fenced")
    refused(old.leave(), "fenced")
    assert state_of(shard) == {**before, "workers": shard.stats()["workers"]}


def test_a_new_incarnation_begins_with_seq_1_and_its_forerunner_counts_as_another_worker():
    shard, [old] = ready_shard(make_contract(rule=SGD()))
    for seq in (1, 2):
        old.push_all(numbers(seed=seq), seq)
    new = Peer(shard, "w0", inc=2)
    assert new.hello(make_contract()).bseq == (0, 0, 0)
    ack = new.push_all(numbers(), 1, base=(0, 0, 0), bseq=(0, 0, 0))
    assert ack.status == ("applied",) * 3
    assert ack.staleness == (2, 2, 2)


# Rule 1: the whole message


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"run": "other"}, "token"),
        ({"w": "w9"}, "hello"),
        ({"inc": 0}, "hello"),
        ({"inc": 2}, "hello"),
        ({"ep": 0}, "epoch"),
        ({"ep": 2}, "deposed"),
    ],
)
def test_a_message_that_does_not_fit_the_hello_is_refused(changed, code):
    shard, [peer] = ready_shard()
    before = state_of(shard)
    message, payload = peer.make_push(peer.cut(numbers()), 1, **changed)
    refused(peer.ask(message, payload), code)
    assert state_of(shard) == before
    assert shard.counts == {code: 1}


def test_a_connection_without_hello_is_refused():
    _, [peer] = ready_shard()
    peer.connection = b"another"
    refused(peer.ask(*peer.make_push(peer.cut(numbers()), 1)), "hello")


def test_a_forgotten_connection_has_to_say_hello_again(monkeypatch):
    monkeypatch.setattr("distbelief.param_server.shard.SESSIONS_MAX", 2)
    shard, [first] = ready_shard()
    second, third = Peer(shard, "w1"), Peer(shard, "w2")
    second.hello()
    third.hello()
    refused(first.ask(Query(**first.who)), "hello")
    assert isinstance(third.ask(Query(**third.who)), Report)
    first.hello(make_contract())
    assert isinstance(first.ask(Query(**first.who)), Report)


def test_before_the_first_values_everybody_is_asked_to_wait():
    shard = new_shard()
    peer = Peer(shard)
    peer.hello(make_contract())
    before = state_of(shard)
    refused(peer.ask(Fetch(**peer.who, part=(0,))), "not-ready")
    refused(peer.ask(*peer.make_push(peer.cut(numbers()), 1)), "not-ready")
    refused(peer.merge(1, torch.zeros(3), torch.zeros(1, dtype=torch.int64)), "not-ready")
    assert state_of(shard) == {**before, "workers": shard.stats()["workers"]}
    assert shard.counts == {"not-ready": 3}


def test_a_foreign_part_is_refused_with_the_whole_message():
    shard, [peer] = ready_shard(num_shards=3, index=1)
    assert list(shard.parts) == [1]
    before = state_of(shard)
    message, payload = peer.make_push({1: ones()}, 1)
    both = replace(
        message,
        part=(1, 2),
        **{name: getattr(message, name) * 2 for name in ("base", "bseq", "numel", "crc", "absent")},
    )
    assert "shard 1 of 3 hosts no part 2" in refused(peer.ask(both, payload * 2), "part")
    refused(peer.ask(Fetch(**peer.who, part=(0,))), "part")
    assert state_of(shard) == before


@pytest.mark.parametrize("frames", [0, 2, 4])
def test_a_push_with_another_number_of_frames_is_junk(frames):
    shard, [peer] = ready_shard()
    before = state_of(shard)
    message, payload = peer.make_push(peer.cut(numbers()), 1)
    refused(peer.ask(message, (payload * 2)[:frames]), "junk")
    assert state_of(shard) == before


# Init


def test_first_values_are_taken_once():
    shard, [peer] = ready_shard()
    assert torch.equal(values_of(shard), numbers())
    refused(peer.init(numbers(seed=1)), "ready")
    assert torch.equal(values_of(shard), numbers())


@pytest.mark.parametrize("name", ["NaN", "crc", "frames", "parts", "bytes"])
def test_bad_first_values_are_refused_and_none_is_kept(name):
    shard = new_shard()
    peer = Peer(shard)
    peer.hello(make_contract())
    values = numbers()
    if name == "NaN":
        values[131] = float("nan")
    slices = list(peer.cut(values).values())
    crc = tuple(map(checksum, slices))
    payload = [as_frame(s) for s in slices]
    parts = (0, 1, 2)
    if name == "crc":
        crc = (*crc[:2], crc[2] ^ 1)
    elif name == "frames":
        payload = payload[:2]
    elif name == "parts":
        parts = (0, 2, 1)
    elif name == "bytes":
        payload[1] = payload[1][:-1]
    text = refused(
        peer.ask(Init(**peer.who, part=parts, numel=(64, 64, 59), crc=crc), payload), "junk"
    )
    if name == "NaN":
        assert "b[1] is nan" in text
    assert not shard.is_ready
    assert not values_of(shard).any()
    assert isinstance(peer.init(numbers()), Ready)


# Rule 2: repetitions and holes


def test_a_duplicate_push_is_applied_once_and_acknowledged_again():
    shard, [peer] = ready_shard(make_contract(rule=SGD(momentum=0.9)))
    message = peer.make_push(peer.cut(numbers(seed=1)), 1, fetch=True)
    first = peer.ask(*message)
    before = state_of(shard)
    reply = peer.send(*message)
    assert reply.message.status == ("dup",) * 3
    assert reply.message.version == first.version == (1, 1, 1)
    assert torch.equal(
        torch.cat([torch.frombuffer(f, dtype=torch.float32) for f in reply.payload]),
        values_of(shard),
    )
    reply.release()
    assert state_of(shard) == before
    assert shard.counts == {"applied": 3, "dup": 3}


def test_an_older_push_than_the_last_is_acknowledged_too():
    shard, [peer] = ready_shard()
    first = peer.make_push(peer.cut(numbers(seed=1)), 1)
    peer.ask(*first)
    peer.push_all(numbers(seed=2), 2)
    before = state_of(shard)
    assert peer.ask(*first).status == ("dup",) * 3
    assert state_of(shard) == before


def test_an_ack_tells_the_last_own_push_that_its_values_hold():
    """Both replies were lost: the values sent with the first one hold the second push too."""
    _, [peer] = ready_shard()
    first = peer.make_push(peer.cut(numbers(seed=1)), 1)
    assert peer.ask(*first).bseq == (1, 1, 1)
    peer.push_all(numbers(seed=2), 2)
    assert peer.ask(*first).bseq == (2, 2, 2)


def test_the_same_seq_with_other_content_is_a_conflict():
    shard, [peer] = ready_shard()
    peer.push_all(numbers(seed=1), 1)
    before = state_of(shard)
    ack = peer.push_all(numbers(seed=2), 1)
    assert ack.status == ("conflict",) * 3
    assert "seq 1 was used before with other content" in ack.text[0]
    assert state_of(shard) == before


def test_a_push_that_was_refused_is_not_called_applied_when_it_comes_again():
    shard, [peer] = ready_shard()
    bad = peer.make_push({0: ones(value=float("nan"))}, 1)
    assert peer.ask(*bad).status == ("nonfinite",)
    before = state_of(shard)
    assert peer.ask(*bad).status == ("spent",)
    assert peer.push({0: ones()}, 1).status == ("spent",)
    assert state_of(shard) == before


def test_a_hole_is_refused_and_does_not_consume_the_seq():
    shard, [peer] = ready_shard()
    before = state_of(shard)
    ack = peer.push_all(numbers(), 2)
    assert ack.status == ("gap",) * 3
    assert "the next seq here is 1" in ack.text[0]
    assert ack.bseq == (0, 0, 0)
    assert state_of(shard) == before
    assert peer.push_all(numbers(), 1).status == ("applied",) * 3


# Rule 3: the seq is consumed, the part unchanged


def poisoned(index, value):
    grad = numbers(seed=3)
    grad[index] = value
    return grad


def unchanged_but_consumed(before, shard, parts, w="w0", seq=1):
    after = state_of(shard)
    for index, (version, samples, table, is_ready, tensors) in before["parts"].items():
        now = after["parts"][index]
        if index in parts:
            assert now[:2] == (version, samples)
            assert now[3:] == (is_ready, tensors)
            assert now[2][w].seq == seq
            assert now[2][w].refused[-1] == seq
            assert {k: v for k, v in now[2].items() if k != w} == {
                k: v for k, v in table.items() if k != w
            }


@pytest.mark.parametrize(
    ("index", "value", "words"),
    [
        (0, float("nan"), "w[0] is nan (1 values of part 0"),
        (100, float("inf"), "w[100] is inf"),
        (136, float("-inf"), "b[6] is -inf (1 values of part 2"),
        (186, float("nan"), "v[49] is nan"),
        (70, 3e38, "every value is finite, but their squares overflow"),
    ],
)
def test_poison_is_refused_by_the_name_of_its_element(index, value, words):
    shard, [peer] = ready_shard(make_contract(rule=SGD(momentum=0.9)))
    before = state_of(shard)
    hit = index // 64
    ack = peer.push_all(poisoned(index, value), 1)
    assert ack.status == tuple("nonfinite" if i == hit else "applied" for i in range(3))
    assert words in ack.text[hit]
    assert ack.version == tuple(0 if i == hit else 1 for i in range(3))
    unchanged_but_consumed(before, shard, [hit])
    assert peer.push_all(numbers(), 2).status == ("applied",) * 3


@pytest.mark.parametrize(
    ("grads", "changed", "word", "words"),
    [
        ({0: ones(63)}, {}, "numel", "63 values, the part has 64: was the model changed?"),
        ({0: ones(64)}, {"numel": (63,)}, "numel", "was the model changed?"),
        ({0: ones(64)}, {"absent": (b"\x02",)}, "numel", "absent mask of part 0"),
        ({0: ones(64)}, {"absent": (b"\x00\x00",)}, "numel", "2 bytes for 1 tensors"),
        ({0: ones(64)}, {"crc": (7,)}, "checksum", "damaged on the way"),
        ({0: ones(64, float("nan"))}, {"crc": (7,)}, "checksum", "damaged on the way"),
        ({0: ones(64)}, {"base": (1,)}, "base", "base version 1, the part is at 0"),
        ({0: ones(64, float("nan"))}, {"base": (1,)}, "base", "the part is at 0"),
    ],
)
def test_a_push_that_does_not_fit_consumes_its_seq(grads, changed, word, words):
    shard, [peer] = ready_shard(make_contract(rule=SGD(momentum=0.9)))
    before = state_of(shard)
    ack = peer.push(grads, 1, **changed)
    assert ack.status == (word,)
    assert words in ack.text[0]
    assert shard.counts == {word: 1}
    unchanged_but_consumed(before, shard, [0])
    assert shard.staleness.counts == {}
    assert peer.push({0: ones()}, 2).status == ("applied",)


def test_bytes_that_are_no_floats_consume_their_seq_too():
    _, [peer] = ready_shard()
    message, _ = peer.make_push({0: ones()}, 1)
    ack = peer.ask(message, [b"abc"])
    assert ack.status == ("numel",)
    assert "odd bytes" in ack.text[0]


def test_a_damaged_frame_sent_again_whole_stays_refused():
    _, [peer] = ready_shard()
    message, payload = peer.make_push({0: ones()}, 1)
    damaged = bytearray(payload[0])
    damaged[0] ^= 1
    assert peer.ask(message, [bytes(damaged)]).status == ("checksum",)
    assert peer.ask(message, payload).status == ("spent",)


def test_reasons_of_many_parts_fit_one_header():
    layout = make_layout(("w" * 60, (64 * 1024,), 0), part_max=64)
    shard, [peer] = ready_shard(make_contract(layout))
    ack = peer.push({i: ones(value=float("nan")) for i in shard.parts}, 1)
    assert len(ack.part) == 1024
    encode(ack)
    encode(peer.fetch()[0])


# Rule 4: applied


def test_a_push_changes_values_version_samples_and_table_together():
    shard, [peer] = ready_shard(make_contract(rule=SGD()))
    grad = numbers(seed=1)
    ack = peer.push_all(grad, 1, samples=32, fetch=True)
    torch.testing.assert_close(values_of(shard), numbers() - 0.1 * grad)
    assert (ack.version, ack.samples) == ((1, 1, 1), (32, 32, 32))
    assert ack.numel == (64, 64, 59)
    assert [part.table["w0"].seq for part in shard.parts.values()] == [1, 1, 1]


def test_a_push_of_some_parts_leaves_the_others():
    shard, [peer] = ready_shard()
    before = state_of(shard)["parts"]
    peer.push({1: ones()}, 1)
    after = state_of(shard)["parts"]
    assert after[0] == before[0]
    assert after[2] == before[2]
    assert after[1] != before[1]


def test_the_shard_does_not_keep_the_payload():
    shard, [peer] = ready_shard(make_contract(rule=SGD(momentum=0.9)))
    message, payload = peer.make_push({0: ones()}, 1)
    buffer = bytearray(payload[0])
    peer.ask(message, [memoryview(buffer)])
    before = state_of(shard)
    buffer[:] = bytes(len(buffer))
    assert state_of(shard) == before


def test_absent_tensors_stay_while_the_version_rises():
    shard, [peer] = ready_shard(make_contract(rule=SGD(momentum=0.9)))
    masks = LAYOUT.absent_masks(["b"])
    peer.push_all(numbers(seed=1), 1)
    before = {name: t.clone() for name, t in shard.parts[2].tensors.items()}
    ack = peer.push_all(numbers(seed=2), 2, absent=masks)
    assert ack.version == (2, 2, 2)
    for name, tensor in shard.parts[2].tensors.items():
        assert torch.equal(tensor[2:9], before[name][2:9])
        assert not torch.equal(tensor[9:], before[name][9:])


def test_a_fetch_in_flight_does_not_see_a_later_push():
    shard, [peer] = ready_shard()
    reply = peer.send(Fetch(**peer.who, part=(0, 2)))
    peer.push_all(numbers(seed=1), 1)
    held = torch.cat([torch.frombuffer(frame, dtype=torch.float32) for frame in reply.payload])
    assert torch.equal(held, torch.cat([numbers()[:64], numbers()[128:]]))
    assert reply.message.version == (0, 0)
    reply.release()
    params, (values,) = peer.fetch(1)
    assert params.version == (1,)
    assert params.bseq == (1,)
    assert torch.equal(values, shard.parts[1].values)


def test_clipping_counts_each_part_for_itself():
    contract = make_contract(rule=SGD(), clip_part_norm=1.0)
    shard, [peer] = ready_shard(contract, values=torch.zeros(187))
    peer.push({0: ones(), 1: ones(value=0.01)}, 1)
    torch.testing.assert_close(shard.parts[0].values, ones(value=-0.1 / 8))
    torch.testing.assert_close(shard.parts[1].values, ones(value=-0.001))


def test_each_part_follows_the_schedule_by_its_own_samples():
    contract = make_contract(rule=SGD(), schedule=Schedule(kind="step", every=10, gamma=0.5))
    shard, [peer] = ready_shard(contract, values=torch.zeros(187))
    peer.push({0: ones()}, 1, samples=10)
    peer.push({0: ones(), 1: ones()}, 2, samples=10)
    # part 1 has a hole: its first push never came
    assert shard.parts[1].version == 0
    peer.push({1: ones()}, 1, samples=10)
    torch.testing.assert_close(shard.parts[0].values, ones(value=-0.15))
    torch.testing.assert_close(shard.parts[1].values, ones(value=-0.1))


def test_every_application_is_told_to_the_observer():
    log: list[Application] = []
    _, [peer] = ready_shard(on_apply=log.append)
    peer.push({0: ones(), 1: ones(value=float("nan"))}, 1, samples=4)
    peer.push({0: ones()}, 1)
    peer.push({0: ones(value=2.0)}, 2, samples=4)
    assert [(a.part, a.version, a.w, a.inc, a.seq, a.staleness, a.samples) for a in log] == [
        (0, 1, "w0", 1, 1, 0, 4),
        (0, 2, "w0", 1, 2, 0, 4),
    ]
    assert [a.crc for a in log] == [checksum(ones()), checksum(ones(value=2.0))]


# Staleness


class Worker:
    """Pushes part 0 and keeps the base as the protocol says."""

    def __init__(self, peer):
        self.peer, self.seq, self.base, self.bseq = peer, 0, 0, 0

    def fetch(self):
        params, _ = self.peer.fetch(0)
        self.base, self.bseq = params.version[0], params.bseq[0]

    def push(self, takes_reply=True, value=1.0):
        self.seq += 1
        ack = self.peer.push({0: ones(value=value)}, self.seq, base=(self.base,), bseq=(self.bseq,))
        if takes_reply:
            self.base, self.bseq = ack.version[0], ack.bseq[0]
        return ack.staleness[0]


def workers(count, num_workers=None, **more):
    shard, peers = ready_shard(workers=count, num_workers=num_workers or count, **more)
    return shard, [Worker(peer) for peer in peers]


def test_one_worker_is_never_stale():
    shard, [one] = workers(1)
    assert [one.push() for _ in range(5)] == [0] * 5
    assert shard.staleness.counts == {0: 5}


def test_pushes_of_others_since_the_fetch_are_counted():
    _, [one, two] = workers(2)
    assert [one.push(), two.push(), two.push(), one.push(), two.push()] == [0, 1, 0, 2, 1]


def test_own_pushes_since_the_fetch_are_not_counted():
    _, [one, two] = workers(2)
    assert [one.push(takes_reply=False) for _ in range(4)] == [0, 0, 0, 0]
    two.fetch()
    two.push()
    assert one.push(takes_reply=False) == 1
    one.fetch()
    assert one.push() == 0


def test_own_refused_pushes_are_not_subtracted():
    _, [one, two] = workers(2)
    nan = float("nan")
    assert one.push(takes_reply=False) == 0
    assert one.push(takes_reply=False, value=nan) == 0
    assert one.push(takes_reply=False, value=nan) == 0
    two.fetch()
    two.push()
    two.push()
    assert one.push(takes_reply=False) == 2
    one.fetch()
    two.push()
    assert one.push() == 1


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_the_mean_staleness_of_w_workers_in_turn_is_w_minus_1(count):
    shard, crew = workers(count)
    for worker in crew:
        worker.fetch()
    for _ in range(10):
        for worker in crew:
            worker.push()
    assert shard.staleness.steady_mean == count - 1
    assert shard.staleness.steady_pushes == 9 * count
    assert sum(shard.staleness.counts.values()) == 10 * count


def test_the_mean_staleness_of_workers_in_any_order_comes_near_w_minus_1():
    shard, crew = workers(4)
    rng = random.Random(1)
    for worker in crew:
        worker.push()
    for _ in range(2000):
        rng.choice(crew).push()
    assert shard.staleness.steady_mean == pytest.approx(3, abs=0.02)


def test_the_window_of_the_law_ends_when_the_first_worker_leaves():
    shard, crew = workers(2)
    for _ in range(3):
        for worker in crew:
            worker.push()
    mean, pushes = shard.staleness.steady_mean, shard.staleness.steady_pushes
    assert isinstance(crew[0].peer.leave(), Left)
    for _ in range(5):
        crew[1].push()
    assert (shard.staleness.steady_mean, shard.staleness.steady_pushes) == (mean, pushes)
    assert mean == 1


def test_the_window_of_the_law_does_not_begin_before_all_have_pushed():
    shard, [one, _] = workers(2)
    for _ in range(5):
        one.push()
    assert shard.staleness.steady_mean is None


# Buffers


def buffered(count=2):
    shard, peers = ready_shard(make_contract(buffers=BUFFERS), workers=count)
    return shard, peers


def mean(*numbers):
    return torch.tensor(numbers)


def integer(value):
    return torch.tensor([value])


def test_nobody_has_contributed_yet():
    _, [one, _] = buffered()
    reply = one.send(merge_message(one, 0, 0, 0))
    assert (reply.message.floats, reply.message.integers) == (0, 0)


def merge_message(peer, samples, floats, integers):
    return Merge(**peer.who, samples=samples, floats=floats, integers=integers)


def test_one_workers_buffers_come_back_to_the_bit():
    _, [one, _] = buffered()
    floats, integers = one.merge(7, mean(0.1, 0.2, 0.3), integer(3))
    assert torch.equal(floats, mean(0.1, 0.2, 0.3))
    assert integers.tolist() == [3]


def test_floats_are_merged_by_samples_and_integers_by_the_maximum():
    _, [one, two] = buffered()
    one.merge(1, mean(0.0, 4.0, 8.0), integer(9))
    floats, integers = two.merge(3, mean(4.0, 0.0, 8.0), integer(2))
    assert floats.tolist() == [3.0, 1.0, 8.0]
    assert integers.tolist() == [9]


def test_a_new_contribution_replaces_the_workers_former_one():
    _, [one, two] = buffered()
    one.merge(1, mean(100.0, 0.0, 0.0), integer(1))
    two.merge(1, mean(0.0, 0.0, 0.0), integer(1))
    floats, _ = one.merge(1, mean(2.0, 0.0, 0.0), integer(1))
    assert floats.tolist() == [1.0, 0.0, 0.0]


def test_a_worker_that_died_is_forgotten():
    _, [dead, alive] = buffered()
    dead.merge(1, mean(100.0, 0.0, 0.0), integer(1))
    for _ in range(20):
        floats, _ = alive.merge(1, mean(1.0, 1.0, 1.0), integer(1))
    assert floats.tolist() == [1.0, 1.0, 1.0]


def test_a_reader_sees_the_merge_without_contributing():
    shard, [one, two] = buffered()
    one.merge(1, mean(1.0, 2.0, 3.0), integer(4))
    reply = two.send(merge_message(two, 0, 0, 0), [])
    assert torch.frombuffer(bytearray(reply.payload[0]), dtype=torch.float32).tolist() == [1, 2, 3]
    assert set(shard._buffers.contributions) == {"w0"}


@pytest.mark.parametrize(
    ("floats", "integers"),
    [
        (torch.zeros(2), torch.zeros(1, dtype=torch.int64)),
        (torch.zeros(3), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(4), torch.zeros(0, dtype=torch.int64)),
        (mean(0.0, float("nan"), 0.0), torch.zeros(1, dtype=torch.int64)),
        (mean(0.0, float("inf"), 0.0), torch.zeros(1, dtype=torch.int64)),
    ],
)
def test_buffers_that_do_not_fit_are_refused(floats, integers):
    shard, [one, _] = buffered()
    refused(one.merge(1, floats, integers), "buffers")
    assert not shard._buffers.contributions


def test_buffers_without_their_frames_are_refused():
    _, [one, _] = buffered()
    refused(one.ask(merge_message(one, 1, 3, 1), []), "buffers")


# Reports


def test_a_query_is_answered_with_json():
    _, [peer, _] = ready_shard(workers=2)
    peer.push_all(numbers(), 1, samples=5)
    reply = peer.send(Query(**peer.who), now=12.5)
    report = json.loads(bytes(reply.payload[0]))
    assert report == {
        "shard": 0,
        "epoch": 1,
        "is_ready": True,
        "version": [1, 1, 1],
        "samples": [5, 5, 5],
        "counts": {"applied": 3},
        "lost_double_fault": 0,
        "refused_in_a_row": {},
        "staleness": {"counts": [[0, 3]], "steady_pushes": 0, "steady_sum": 0},
        "workers": {"w0": {"inc": 1, "heard": 12.5}, "w1": {"inc": 1, "heard": 0.0}},
    }


# Many workers


@pytest.mark.parametrize("rule", [SGD(momentum=0.9), Adam()], ids=["momentum", "adam"])
@pytest.mark.parametrize("seed", range(5))
def test_any_interleaving_equals_a_replay_of_the_pushes_one_by_one(rule, seed):
    """Repetitions, NaN, holes and fetches in between leave no trace in the bits."""
    rng = random.Random(seed)
    log: list[Application] = []
    contract = make_contract(rule=rule)
    shard, peers = ready_shard(contract, workers=4, num_workers=4, on_apply=log.append)
    sent: dict[tuple[str, int, int], torch.Tensor] = {}
    seqs = {peer.w: 0 for peer in peers}
    last: dict[str, Any] = {}
    for step in range(120):
        peer = rng.choice(peers)
        match rng.randrange(8):
            case 0 if peer.w in last:
                peer.ask(*last[peer.w])
            case 1:
                peer.push_all(numbers(seed=step), seqs[peer.w] + 2)
            case 2:
                held = peer.send(Fetch(**peer.who, part=(0, 1, 2)))
                peers[0].ask(Query(**peers[0].who))
                rng.choice([held.release, lambda: None])()
            case _:
                seqs[peer.w] += 1
                grad = numbers(seed=step)
                if rng.random() < 0.1:
                    grad[rng.randrange(187)] = float("nan")
                last[peer.w] = peer.make_push(peer.cut(grad), seqs[peer.w])
                peer.ask(*last[peer.w])
                for index, piece in peer.cut(grad).items():
                    sent[peer.w, seqs[peer.w], index] = piece
    replayed = {part.index: Part(part, contract) for part in LAYOUT.parts}
    for index, part in replayed.items():
        part.load_({VALUES: numbers()[part.range.start : part.range.stop]})
        for version, applied in enumerate((a for a in log if a.part == index), start=1):
            assert applied.version == version
            part.apply_(sent[applied.w, applied.seq, index], applied.samples)
        for name, tensor in part.tensors.items():
            assert torch.equal(tensor, shard.parts[index].tensors[name])
        assert part.version == shard.parts[index].version
    keys = [(a.w, a.inc, a.seq, a.part) for a in log]
    assert len(set(keys)) == len(keys)
    assert len(log) > 100


def test_an_ack_tells_what_is_durable_to_the_incarnation_that_pushed_it():
    shard, [old] = ready_shard()
    old.push_all(numbers(seed=1), 1)
    image = shard.image()
    ack = old.push_all(numbers(seed=2), 2)
    assert ack.durable == (0, 0, 0)
    shard.mark_durable(image)
    image.release()
    assert old.push_all(numbers(seed=3), 3).durable == (1, 1, 1)
    new = Peer(shard, "w0", inc=2)
    new.hello(make_contract())
    ack = new.push_all(numbers(seed=4), 1)
    assert isinstance(ack, Ack)
    assert ack.durable == (0, 0, 0)


# Credits


def credits_of(peer: Peer) -> set[int]:
    """As the replies to a hello, a fetch and a push tell them."""
    seq = peer.shard.parts[0].table[peer.w].seq + 1 if peer.w in peer.shard.parts[0].table else 1
    welcome, params = peer.hello(), peer.fetch()[0]
    return {welcome.credits, params.credits, peer.push_all(numbers(), seq, fetch=True).credits}


@pytest.mark.parametrize(
    ("budget", "workers", "want"),
    [(1, 1, 1), (6, 1, 6), (6, 3, 2), (6, 4, 1), (6, 20, 1), (6, 2, 3), (40, 1, 32), (40, 2, 20)],
)
def test_the_workers_share_the_budget(budget, workers, want):
    num_bytes = 4 * LAYOUT.total
    _, peers = ready_shard(workers=workers, budget=budget * num_bytes)
    assert all(credits_of(peer) == {want} for peer in peers)


def test_a_worker_that_leaves_leaves_its_credits_to_the_others():
    _, (one, other) = ready_shard(workers=2, budget=6 * 4 * LAYOUT.total)
    assert credits_of(one) == {3}
    other.leave()
    assert credits_of(one) == {6}


def test_what_has_no_payload_says_nothing_of_credits():
    _, (peer,) = ready_shard()
    assert peer.ask(Fetch(**peer.who, part=(0, 1), values=False)).credits == 0


def test_a_short_message_brings_no_more_credits_than_a_long_one():
    _, (peer,) = ready_shard(budget=3 * 4 * LAYOUT.total)
    assert {peer.fetch(part)[0].credits for part in (0, 1, 2)} == {3}
    assert peer.push({2: numbers()[LAYOUT.parts[2].start :]}, 1).credits == 3
