"""The codec: what goes in comes out, and of anything else only RemoteProtocolError leaves it."""

import random
import typing
from dataclasses import fields

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbelief.param_server.errors import RemoteProtocolError
from distbelief.param_server.protocol import (
    REPLIES,
    REQUESTS,
    Ack,
    AnyReply,
    AnyRequest,
    Fetch,
    Hello,
    Init,
    Params,
    Push,
    Query,
    Refusal,
    Welcome,
)
from distbelief.param_server.wire import (
    BIN_MAX,
    HEADER_MAX,
    INT_END,
    LIST_MAX,
    STR_MAX,
    encode,
    sayable,
)

EVERY = [*typing.get_args(AnyRequest), *typing.get_args(AnyReply)]
COLUMNS = (Welcome, Init, Fetch, Params, Push, Ack)

VALUES = {
    int: st.integers(0, INT_END - 1),
    bool: st.booleans(),
    str: st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    bytes: st.binary(max_size=40),
}


def value_of(cls, name, hint, length):
    if name in ("run", "w"):
        return st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)
    if name in ("dt", "back"):
        return st.sampled_from(["float32", "bfloat16", "int8", "topk"])
    if name == "seq" and cls is Push:
        return st.integers(1, INT_END - 1)
    if typing.get_origin(hint) is tuple:
        if name == "part":
            return st.lists(VALUES[int], min_size=length, max_size=length, unique=True).map(tuple)
        element = VALUES[typing.get_args(hint)[0]]
        return st.lists(element, min_size=length, max_size=length).map(tuple)
    return VALUES[hint]


@st.composite
def messages(draw, classes=tuple(EVERY)):
    cls = draw(st.sampled_from(classes))
    length = draw(st.integers(1, 5))
    hints = typing.get_type_hints(cls)
    made = {f.name: draw(value_of(cls, f.name, hints[f.name], length)) for f in fields(cls)}
    if made.get("average"):
        made |= {"values": True, "back": "float32"}
    if cls is Push:
        made["place"] = 0
        if draw(st.booleans()):  # in shared memory
            made |= {"dt": "shared", "place": draw(VALUES[int]), "numel": (), "crc": ()}
            made |= {"fetch": False, "absent": ()}
    return cls(**made)


def codec_of(message):
    return REQUESTS if isinstance(message, AnyRequest) else REPLIES


QUERY = {"v": 1, "op": "query", "run": "job", "w": "w0", "inc": 1, "ep": 1}
HELLO = {**QUERY, "op": "hello", "token": "secret", "lo": 1, "hi": 1}
PUSH = {
    **QUERY,
    "op": "push",
    "seq": 1,
    "samples": 1,
    "dt": "float32",
    "fetch": True,
    "part": [0, 1],
    "base": [0, 0],
    "bseq": [0, 0],
    "numel": [64, 64],
    "crc": [1, 2],
    "absent": [b"", b""],
}


def pack(data, **changed):
    return msgpack.packb({**data, **changed})


@given(messages())
def test_every_message_comes_back_as_it_was_sent(message):
    assert codec_of(message).decode(encode(message)) == message


def test_a_header_may_lie_in_a_memoryview():
    assert REQUESTS.decode(memoryview(pack(QUERY))) == Query(run="job", w="w0", inc=1, ep=1)


def without(data, key):
    return msgpack.packb({k: v for k, v in data.items() if k != key})


DEEP = b"\x82\xa1v\x01\xa2op" + b"\x91" * 1020 + b"\x01"

REFUSED = {
    "nothing": b"",
    "not a map": msgpack.packb([1, 2]),
    "an integer": b"\x01",
    "trailing bytes": pack(QUERY) + b"\x00",
    "bool for int": pack(QUERY, inc=True),
    "float for int": pack(QUERY, inc=1.0),
    "str for int": pack(QUERY, inc="1"),
    "negative": pack(QUERY, inc=-1),
    "2**53": pack(QUERY, inc=INT_END),
    "2**64-1": pack(QUERY, inc=2**64 - 1),
    "nil": pack(QUERY, inc=None),
    "NaN": pack(QUERY, inc=float("nan")),
    "bytes for str": pack(QUERY, w=b"w0"),
    "int for bool": pack(PUSH, fetch=1),
    "str for bytes": pack(PUSH, absent=["", ""]),
    "bool in a list": pack(PUSH, base=[0, True]),
    "float in a list": pack(PUSH, base=[0, 0.0]),
    "list in a list": pack(PUSH, base=[0, [0]]),
    "int for a list": pack(PUSH, base=0),
    "unknown key": pack(QUERY, odd=1),
    "missing key": without(QUERY, "inc"),
    "missing version": without(QUERY, "v"),
    "missing op": without(QUERY, "op"),
    "other version": pack(QUERY, v=2),
    "version as bool": pack(QUERY, v=True),
    "unknown op": pack(QUERY, op="format-disk"),
    "op of a reply": pack(QUERY, op="welcome"),
    "op as list": pack(QUERY, op=["query"]),
    "ext type": pack(QUERY, inc=msgpack.ExtType(5, b"")),
    "long ext type": pack(QUERY, inc=msgpack.ExtType(5, b"abc")),
    "timestamp": pack(QUERY, inc=msgpack.Timestamp(1)),
    "key twice": b"\x87" + pack(QUERY)[1:] + msgpack.packb("inc") + b"\x02",
    "op twice": b"\x87" + pack(QUERY)[1:] + msgpack.packb("op") + msgpack.packb("leave"),
    "key of bytes": pack(QUERY)[:1].replace(b"\x86", b"\x87") + pack(QUERY)[1:] + b"\xc4\x01x\x01",
    "key of int": b"\x87" + pack(QUERY)[1:] + b"\x01\x01",
    "long str": pack(HELLO, token="x" * (STR_MAX + 1)),
    "long list": pack(QUERY, op="fetch", part=list(range(LIST_MAX + 1))),
    "long bytes": pack(PUSH, absent=[b"", bytes(BIN_MAX + 1)]),
    "long header": pack(HELLO, token="x" * HEADER_MAX),
    "claims 2**32 elements": b"\xdd\xff\xff\xff\xff",
    "claims 2**32 keys": b"\xdf\xff\xff\xff\xff",
    "claims 4 GB of str": b"\xdb\xff\xff\xff\xff",
    "deep": DEEP,
    "deeper": b"\x91" * 60_000,
    "deep in a field": pack(QUERY)[:-1] + b"\x91" * 1020 + b"\x01",
    "not UTF-8": pack(HELLO, token="xx").replace(b"\xa2xx", b"\xa2\xff\xfe"),
    "name with a slash": pack(QUERY, w="../w0"),
    "empty name": pack(QUERY, w=""),
    "name of 65": pack(QUERY, run="x" * 65),
    "no part": pack(QUERY, op="fetch", part=[]),
    "part twice in a fetch": pack(QUERY, op="fetch", part=[1, 1]),
    "part twice in a push": pack(PUSH, part=[1, 1]),
    "short column": pack(PUSH, crc=[1]),
    "long column": pack(PUSH, crc=[1, 2, 3]),
    "short column of init": pack(QUERY, op="init", part=[0, 1], numel=[1, 1], crc=[1]),
    "seq 0": pack(PUSH, seq=0),
    "other dtype": pack(PUSH, dt="float64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_but_the_exact_fields_is_refused(name):
    with pytest.raises(RemoteProtocolError):
        REQUESTS.decode(REFUSED[name])


def test_what_is_refused_is_said_briefly():
    with pytest.raises(RemoteProtocolError) as refused:
        REQUESTS.decode(pack(HELLO, lo="x" * 4000))
    assert len(str(refused.value)) < 200


def test_a_list_of_replies_needs_whole_columns_too():
    ack = {"v": 1, "op": "ack", "ep": 1, "seq": 1, "part": [0, 1], "numel": [], "credits": 2}
    columns = ("status", "text", "version", "samples", "bseq", "staleness", "durable")
    whole = {name: ["", ""] if name in ("status", "text") else [0, 0] for name in columns}
    assert isinstance(REPLIES.decode(pack({**ack, **whole})), Ack)
    for name in columns:
        with pytest.raises(RemoteProtocolError):
            REPLIES.decode(pack({**ack, **whole}, **{name: whole[name][:1]}))


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(junk):
    for codec in (REQUESTS, REPLIES):
        with pytest.raises(RemoteProtocolError):
            codec.decode(junk)


@given(messages(), st.data())
def test_a_truncated_header_is_refused(message, data):
    header = encode(message)
    cut = data.draw(st.integers(0, len(header) - 1))
    with pytest.raises(RemoteProtocolError):
        codec_of(message).decode(header[:cut])


def test_20_000_mutations_raise_nothing_else():
    rng = random.Random(7)
    seeds = [pack(HELLO), pack(PUSH), pack(QUERY), DEEP, pack(QUERY, op="fetch", part=[0, 1, 2])]
    seeds.append(encode(Refusal(code="junk", text="no")))
    passed = 0
    for _ in range(20_000):
        header = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            where = rng.randrange(len(header) + 1)
            match rng.randrange(4):
                case 0 if where < len(header):
                    header[where] ^= 1 << rng.randrange(8)
                case 1:
                    header[where : where + rng.randint(1, 8)] = b""
                case 2:
                    header[where:where] = rng.randbytes(rng.randint(1, 8))
                case _:
                    header[where : where + 1] = rng.choice((b"\xc0", b"\xd6", b"\xdd", b"\xff\xff"))
        for codec in (REQUESTS, REPLIES):
            try:
                codec.decode(bytes(header))
                passed += 1  # a changed digit is a message too
            except RemoteProtocolError:
                pass
    assert passed < 10_000


@pytest.mark.parametrize(
    "message",
    [
        Query(run="job", w="w0", inc=-1, ep=1),
        Query(run="job", w="w0", inc=INT_END, ep=1),
        Query(run="job", w="w0", inc=True, ep=1),
        Query(run="job", w="w0", inc=1.0, ep=1),  # type: ignore[arg-type]  # what is tested
        Hello(run="job", w="w0", inc=1, ep=0, token="x" * (STR_MAX + 1)),
        Hello(run="job", w="w0", inc=1, ep=0, token="ü" * (STR_MAX // 2 + 1)),
        Fetch(run="job", w="w0", inc=1, ep=1, part=tuple(range(LIST_MAX + 1))),
        Params(
            ep=1,
            part=tuple(range(2**50, 2**50 + 4000)),
            version=tuple(range(2**50, 2**50 + 4000)),
            samples=tuple(range(2**50, 2**50 + 4000)),
            bseq=tuple(range(2**50, 2**50 + 4000)),
            numel=tuple(range(2**50, 2**50 + 4000)),
        ),
    ],
    ids=["negative", "2**53", "bool", "float", "long", "long in UTF-8", "long list", "long header"],
)
def test_what_the_other_side_would_refuse_is_not_sent(message):
    with pytest.raises(ValueError, match=message.op):
        encode(message)


@given(st.text())
def test_any_text_can_be_said_once_it_is_made_sayable(text):
    sent = encode(Refusal(code="junk", text=sayable(text * 50)))
    assert isinstance(REPLIES.decode(sent), Refusal)
