"""Caffemodel: Caffe's file of trained weights, a protocol buffer, read and written.

Of caffe.proto only the fields that hold weights are described here; others are skipped, as
protocol buffers have it. Both forms of a layer are read, that of 2014, in which BVLC published its
GoogLeNet, and the later one; the later is written. Nothing here knows a network.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

Blobs = dict[str, list["np.ndarray[Any, np.dtype[np.float32]]"]]
"""Layer -> its arrays, such as [weight, bias]."""

_INT32, _INT64, _FLOAT, _DOUBLE, _TEXT, _MESSAGE = 5, 3, 2, 1, 9, 11
"""Types of a field, as descriptor.proto numbers them."""
_FIELDS: Mapping[str, Sequence[tuple[str, int, int, bool, str]]] = {
    "BlobShape": [("dim", 1, _INT64, True, "")],
    "BlobProto": [
        ("num", 1, _INT64, False, ""),
        ("channels", 2, _INT64, False, ""),
        ("height", 3, _INT64, False, ""),
        ("width", 4, _INT64, False, ""),
        ("data", 5, _FLOAT, True, ""),
        ("shape", 7, _MESSAGE, False, "BlobShape"),
        ("double_data", 8, _DOUBLE, True, ""),
    ],
    "V1LayerParameter": [
        ("name", 4, _TEXT, False, ""),
        ("type", 5, _INT32, False, ""),
        ("blobs", 6, _MESSAGE, True, "BlobProto"),
    ],
    "LayerParameter": [
        ("name", 1, _TEXT, False, ""),
        ("type", 2, _TEXT, False, ""),
        ("blobs", 7, _MESSAGE, True, "BlobProto"),
    ],
    "NetParameter": [
        ("name", 1, _TEXT, False, ""),
        ("layers", 2, _MESSAGE, True, "V1LayerParameter"),
        ("layer", 100, _MESSAGE, True, "LayerParameter"),
    ],
}
"""Message -> its fields: name, number, type, whether it is repeated, message that it holds."""


def read_caffemodel(data: bytes) -> Blobs:
    """The weights of each layer that has some, float32, in the file's order.

    Raises: ValueError for what is no such file, a blob whose shape does not fit its numbers, two
    layers of a name, or no weights at all.
    """
    net = _messages()["NetParameter"]()
    try:
        net.ParseFromString(data)
    except DecodeError as error:
        raise ValueError(f"not a caffemodel: {error}") from error
    found: Blobs = {}
    for layer in (*net.layers, *net.layer):
        if not layer.blobs:
            continue
        if layer.name in found:
            raise ValueError(f"two layers are called {layer.name}")
        found[layer.name] = [_array(layer.name, blob) for blob in layer.blobs]
    if not found:
        raise ValueError("not a caffemodel: no layer in it has weights")
    return found


def write_caffemodel(
    name: str, layers: Sequence[tuple[str, str, Sequence["np.ndarray[Any, Any]"]]]
) -> bytes:
    """name: of the net. layers: (name, Caffe's type such as Convolution, its arrays)."""
    net = _messages()["NetParameter"](name=name)
    for layer, kind, arrays in layers:
        entry = net.layer.add(name=layer, type=kind)
        for array in arrays:
            blob = entry.blobs.add()
            blob.shape.dim.extend(array.shape)
            blob.data.extend(np.asarray(array, np.float32).ravel().tolist())
    out: bytes = net.SerializeToString()
    return out


def _array(layer: str, blob: Any) -> "np.ndarray[Any, np.dtype[np.float32]]":  # Any: a message
    shape = list(blob.shape.dim) or [blob.num, blob.channels, blob.height, blob.width]
    numbers = np.array(blob.data if len(blob.data) else blob.double_data, np.float32)
    # Not by numpy: a product of huge dimensions would wrap around there.
    if any(length < 0 for length in shape) or _product(shape) != numbers.size:
        raise ValueError(f"{layer}: a blob of shape {shape} holds {numbers.size:,} numbers")
    return numbers.reshape(shape)


def _product(shape: Sequence[int]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


@cache
def _messages() -> Mapping[str, Any]:  # Any: classes made at run time
    """The messages as classes, in a pool of their own: others may know a `caffe` of theirs."""
    file = descriptor_pb2.FileDescriptorProto(
        name="weights.proto", package="caffe", syntax="proto2"
    )
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, kind, is_repeated, holds in fields:
            entry = message.field.add(
                name=field, number=number, type=kind, label=1 + 2 * is_repeated
            )
            if holds:
                entry.type_name = f".caffe.{holds}"
            if is_repeated and kind in (_FLOAT, _DOUBLE, _INT64):
                entry.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe.{name}"))
        for name in _FIELDS
    }
