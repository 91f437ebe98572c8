"""Caffe's file of weights: both forms of a layer, both forms of a shape, and what is refused."""

import contextlib
import re
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from distbelief.model.caffemodel import read_caffemodel, write_caffemodel


def field(number: int, kind: int, payload: bytes) -> bytes:
    """One field of a protocol buffer by hand. kind: 0 for a number, 2 for bytes of a length."""
    key = varint(number << 3 | kind)
    return key + (payload if kind == 0 else varint(len(payload)) + payload)


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def old_blob(shape: tuple[int, int, int, int], numbers: list[float]) -> bytes:
    lengths = b"".join(field(i, 0, varint(n)) for i, n in enumerate(shape, start=1))
    return lengths + field(5, 2, struct.pack(f"<{len(numbers)}f", *numbers))


def old_layer(name: str, *blobs: bytes) -> bytes:
    """As in 2014: name is field 4, type 5, blobs 6, and layers field 2 of the net."""
    inner = field(4, 2, name.encode()) + field(5, 0, varint(4))
    return field(2, 2, inner + b"".join(field(6, 2, blob) for blob in blobs))


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=9),
        st.lists(
            arrays(np.float32, array_shapes(max_dims=4, max_side=4), elements=st.floats(width=32)),
            min_size=1,
            max_size=3,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_what_is_written_is_read(layers):
    data = write_caffemodel("a net", [(name, "Convolution", own) for name, own in layers.items()])
    found = read_caffemodel(data)
    assert list(found) == list(layers)
    for name, own in layers.items():
        assert [one.shape for one in found[name]] == [one.shape for one in own]
        assert all(map(np.array_equal, found[name], own, [True] * len(own)))


def test_the_form_of_2014_is_read():
    data = (
        field(1, 2, b"GoogleNet")
        + old_layer("data")  # has no weights
        + old_layer(
            "conv1/7x7_s2", old_blob((2, 1, 1, 2), [1, 2, 3, 4]), old_blob((1, 1, 1, 2), [5, 6])
        )
    )
    found = read_caffemodel(data)
    assert list(found) == ["conv1/7x7_s2"]
    weight, bias = found["conv1/7x7_s2"]
    assert weight.tolist() == [[[[1.0, 2.0]]], [[[3.0, 4.0]]]]
    assert bias.tolist() == [[[[5.0, 6.0]]]]
    assert weight.dtype == bias.dtype == np.float32


def test_unknown_fields_are_skipped():
    data = field(77, 2, b"later") + write_caffemodel("n", [("a", "X", [np.ones(2)])])
    assert read_caffemodel(data)["a"][0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no layer in it has weights"),
        (b"hello, world", "not a caffemodel"),
        (old_layer("a", old_blob((2, 2, 1, 1), [1.0])), "a: a blob of shape [2, 2, 1, 1] holds 1"),
        (
            old_layer("a", old_blob((2**32, 2**32, 1, 1), [])),
            "shape [4294967296, 4294967296, 1, 1] holds 0 numbers",
        ),
        (old_layer("a", old_blob((1, 1, 1, 1), [1.0])) * 2, "two layers are called a"),
    ],
    ids=["empty", "text", "short", "overflow", "twice"],
)
def test_what_is_no_file_of_weights_is_refused(data, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_caffemodel(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    with contextlib.suppress(ValueError):
        assert read_caffemodel(data)
