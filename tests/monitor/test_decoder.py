import itertools
import math
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbelief.monitor.decoder import decode_report
from distbelief.monitor.simulate import Simulation
from distbelief.param_server.errors import RemoteProtocolError
from distbelief.param_server.report import REPORTS, ShardReport, WorkerReport
from distbelief.param_server.wire import HEADER_MAX, encode

MADE = [
    m
    for m in Simulation(4, 2, seed=1, meter=0.1).until(8.0)
    if isinstance(m, WorkerReport | ShardReport)
]
ONE = {
    cls.op: msgpack.unpackb(encode(next(m for m in reversed(MADE) if isinstance(m, cls))))
    for cls in (WorkerReport, ShardReport)
}


def both(data) -> list[Any]:
    """What wire's codec and ours make of it: the report, or None for a refusal."""
    found: list[Any] = []
    for decode in (REPORTS.decode, decode_report):
        try:
            found.append(decode(data))
        except RemoteProtocolError:
            found.append(None)
    return found


def test_every_report_is_read_as_wires_codec_reads_it():
    for made in MADE:
        assert decode_report(encode(made)) == made


BAD: list[Any] = [None, "x", "x" * 5000, -1, 2**53, 2**63, 1.5, 1.0, True, {}, b"", math.nan]
BAD += [[], [[]], [-1], ["x"], [True], [1.5], [math.nan], [math.inf], [0] * 5000]


@pytest.mark.parametrize("op", ONE)
def test_whatever_stands_in_a_field_is_taken_or_refused_as_wires_codec_does(op):
    for name, bad in itertools.product(ONE[op], BAD):
        packed = msgpack.packb({**ONE[op], name: bad})
        theirs, ours = both(packed)
        if theirs is None and ours is not None:
            # A whole number is the same value as a float.
            assert bad in (-1, 1.0, 2**53, 2**63, [-1]), (name, bad)
            assert getattr(ours, name) == (tuple(bad) if isinstance(bad, list) else bad)
        else:
            assert ours == theirs, (name, bad)


@pytest.mark.parametrize("op", ONE)
def test_a_field_that_is_missing_or_unknown_is_refused(op):
    for name in ONE[op]:
        short = {key: value for key, value in ONE[op].items() if key != name}
        assert both(msgpack.packb(short)) == [None, None]
    assert both(msgpack.packb({**ONE[op], "odd": 1})) == [None, None]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        b"\xc1",
        msgpack.packb([]),
        msgpack.packb({}),
        b"\x91" * 5000,
        b"x" * HEADER_MAX * 2,
    ],
)
def test_junk_is_refused(data):
    assert both(data) == [None, None]


@given(st.integers(0, 2**31), st.binary(min_size=1, max_size=8))
def test_changed_bytes_are_taken_or_refused_and_nothing_else(at, change):
    data = bytearray(encode(MADE[-1]))
    at %= len(data)
    data[at : at + len(change)] = change
    theirs, ours = both(bytes(data))
    if theirs is not None:
        assert ours == theirs
