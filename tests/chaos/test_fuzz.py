"""Fuzz: mutated frames through every decoder. Only the protocol error leaves it.

A few seconds by default; the long run has 1,000,000 cases:

    DISTBELIEF_TEST_FUZZ=1000000 .venv/bin/python -m pytest --timeout 3600 tests/chaos/test_fuzz.py
"""

import contextlib
import os
import random
import struct
import typing
from collections import Counter

import msgpack
import pytest
import torch

from distbelief.param_server import wire
from distbelief.param_server.compress import FORMS, decode_, frame_bytes
from distbelief.param_server.contract import Contract
from distbelief.param_server.errors import RemoteProtocolError
from distbelief.param_server.protocol import REPLIES, REQUESTS, STATUSES, encode
from distbelief.param_server.server import respond
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.workers.notes import ANSWERS, NOTES
from tests.param_server.jobs import LAYOUT, RUN, TOKEN, Peer, make_contract, numbers

CASES = int(os.environ.get("DISTBELIEF_TEST_FUZZ", "50000"))
"""Of all decoders together."""

EDGES: tuple[object, ...] = (
    *(0, 1, 2, 15, 16, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32),
    *(2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63)),
    *(0.0, -0.0, 1.5, float("nan"), float("inf"), True, False, None, "", b"", [], {}),
)
TAGS = bytes([0xC0, 0xC1, 0xC4, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCF, 0xD3, 0xD4, 0xD8, 0xD9, 0xDB])
TAGS += bytes([0xDC, 0xDD, 0xDE, 0xDF, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xFF])


def sample(hint, rng: random.Random):
    """A value that a field of this kind may have."""
    kinds = {
        int: lambda: rng.randrange(2 ** rng.choice([1, 4, 8, 20, 52])),
        bool: lambda: rng.random() < 0.5,
        float: lambda: rng.random(),
        str: lambda: rng.choice(["", "w0", "job", "applied", "e000001-v000000000003", "x" * 300]),
        bytes: lambda: rng.randbytes(rng.randrange(20)),
    }
    return kinds[hint]()


def seeds(rng: random.Random) -> list[tuple[wire.Codec, bytes]]:
    """A valid header of every message there is, each with the codec that takes it."""
    found = []
    for codec in (REQUESTS, REPLIES, NOTES, ANSWERS):
        for cls in codec._messages.values():
            found += [(codec, _valid(cls, rng)) for _ in range(3)]
    return found


def _valid(cls, rng: random.Random) -> bytes:
    columns = rng.randrange(1, 6)
    fields: dict[str, typing.Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if typing.get_origin(hint) is typing.ClassVar or name == "op":
            continue
        if typing.get_origin(hint) is tuple:
            element = typing.get_args(hint)[0]
            fields[name] = tuple(sample(element, rng) for _ in range(columns))
        else:
            fields[name] = sample(hint, rng)
    fields |= {name: tuple(range(columns)) for name in ("part",) if name in fields}
    fields |= {name: "w0" for name in ("w", "run", "name") if name in fields}
    fields |= {name: rng.choice(FORMS) for name in ("dt", "back") if name in fields}
    fields |= (
        {"status": tuple(rng.choices(list(STATUSES), k=columns))} if "status" in fields else {}
    )
    fields |= {"seq": 1 + fields["seq"]} if "seq" in fields else {}
    fields |= {"place": 0} if "place" in fields else {}
    fields |= {"values": True, "back": "float32"} if fields.get("average") else {}
    return encode(cls(**fields))


def mutate(header: bytes, rng: random.Random) -> bytes:
    """Something near a valid header: damaged bytes, or odd values in a whole map."""
    if rng.random() < 0.35:
        return _odd_map(header, rng)
    data = bytearray(header)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.choice(TAGS)
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 3:
            del data[at : at + rng.randrange(1, 9)]
        elif kind == 4:
            data[at:at] = struct.pack(">BI", rng.choice(b"\xc6\xc9\xdb\xdd\xdf"), 2**32 - 1)
        else:
            other = rng.randrange(len(data) + 1)
            data[at:at] = data[other : other + rng.randrange(64)]
        data = data or bytearray(b"\x80")
    return bytes(data)


def _odd_map(header: bytes, rng: random.Random) -> bytes:
    fields = msgpack.unpackb(header)
    key = rng.choice([*fields, "v", "op", "extra"])
    odd = rng.choice(EDGES)
    value = fields.get(key)
    kind = rng.randrange(4)
    if kind == 0:
        fields.pop(key, None)
    elif kind == 1 and isinstance(value, list) and value:
        value[rng.randrange(len(value))] = odd
    elif kind == 2 and isinstance(value, list):
        fields[key] = value * rng.choice([0, 2, 1000])
    else:
        fields[key] = odd
    try:
        return bytes(msgpack.packb(fields))
    except (ValueError, OverflowError):  # of the mutation, not of the decoder
        return header[:-1]


def test_only_the_protocol_error_leaves_the_decoders_of_mutated_headers():
    rng = random.Random(20)
    valid = seeds(rng)
    outcomes: Counter[str] = Counter()
    for _ in range(CASES):
        codec, header = rng.choice(valid)
        try:
            message = codec.decode(mutate(header, rng))
        except RemoteProtocolError as error:
            outcomes["refused"] += 1
            wire.sayable(str(error)).encode()  # as a refusal quotes it
        else:
            outcomes["taken"] += 1
            assert codec.decode(encode(message)) == message  # as strict as what we send
    assert outcomes["refused"] > CASES // 2
    assert outcomes["taken"] > CASES // 100  # it was not all nonsense either


def test_a_shard_answers_mutated_messages_with_one_short_reply_and_keeps_its_values():
    """Through the whole shard: the header, its frames, and what they do to a good worker."""
    rng = random.Random(21)
    shard = Shard(ShardConfig(run=RUN, token=TOKEN))
    contract = make_contract()
    good, bad = Peer(shard, "good"), Peer(shard, "bad")
    good.hello(contract)
    good.init(torch.zeros(LAYOUT.total))
    bad.hello(contract)
    peers = [b"stranger", bad.connection]
    valid = [header for codec, header in seeds(rng) if codec is REQUESTS]
    pushed, expected = 0, torch.zeros(LAYOUT.total)
    for case in range(CASES // 10):
        header = mutate(rng.choice(valid), rng)
        sizes = rng.choices([0, 3, 236, 256], k=rng.randrange(5))
        frames = [header, *map(rng.randbytes, sizes)]
        reply = respond(shard, rng.choice(peers), frames, 0.0)
        assert len(encode(reply.message)) < 4096
        reply.release()
        if case % 100 == 0:
            pushed += 1
            grad = numbers(seed=pushed)
            assert set(good.push_all(grad, pushed).status) == {"applied"}
            expected.add_(grad, alpha=-0.1)
    assert shard.counts["junk"] > CASES // 40
    assert shard.parts[0].table.keys() <= {"good", "bad", "w0"}
    assert torch.equal(torch.cat([part.values for part in shard.parts.values()]), expected)


def test_only_the_protocol_error_leaves_the_decoders_of_mutated_payloads():
    """Compressed frames, and contracts: what else of a peer's bytes is looked into."""
    rng = random.Random(22)
    good = make_contract().to_json()
    into = torch.empty(64)
    for case in range(CASES // 10):
        if case % 2:
            form = rng.choice(FORMS)
            size = max(0, frame_bytes(form, 64) + rng.choice([0, 0, 0, -1, 1, 7]))
            frame = rng.randbytes(size)
            if rng.random() < 0.3:
                frame = bytes(len(frame))
            with contextlib.suppress(RemoteProtocolError):
                decode_(form, memoryview(bytearray(frame)), into)
        else:
            data = bytearray(good)
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(data))
                data[at : at + rng.randrange(3)] = rng.choice(
                    [b"0", b"-", b"9" * 30, b"1e999", b"NaN", b"[", b"}", b'"', b"null", b"\xff"]
                )
            with contextlib.suppress(RemoteProtocolError):
                Contract.from_json(bytes(data))


@pytest.mark.parametrize("depth", [100, 1000, 60_000])
def test_nesting_without_end_is_no_crash(depth):
    for codec in (REQUESTS, REPLIES, NOTES, ANSWERS):
        with pytest.raises(RemoteProtocolError):
            codec.decode(b"\x91" * depth + b"\x01")
