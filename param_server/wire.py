"""Wire: strict, bounded encoding of message headers. No sockets; it knows no particular message.

A message is a frozen dataclass; its header is one msgpack map of its fields:

    header  = { "v": 1, "op": <class.op>, <field name>: <value>, ... }     at most HEADER_MAX bytes
    value   = int in [0, 2**53) | bool | str (at most STR_MAX bytes) | float (finite)
            | bytes (at most BIN_MAX) | [value, ...] of one kind (at most LIST_MAX long)

Exactly the fields of the class, each of exactly the type of its annotation; an unknown key, a
missing key, a key twice, an extension type, a bool for an int: all are the same
RemoteProtocolError. No pickle.
"""

import math
import operator
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import repeat
from typing import Any, ClassVar, Protocol

import msgpack

from distbelief.param_server.errors import RemoteProtocolError

VERSION = 1
"""Protocol version; on every message."""

HEADER_MAX = 64 * 1024
STR_MAX = 4096
BIN_MAX = 16 * 1024
LIST_MAX = 4096
INT_END = 2**53


class Message(Protocol):
    """A frozen dataclass with the name of its verb."""

    op: ClassVar[str]


def _int(value: object) -> bool:
    return type(value) is int and 0 <= value < INT_END


def _bool(value: object) -> bool:
    return type(value) is bool


def _str(value: object) -> bool:
    if not isinstance(value, str) or len(value) > STR_MAX:  # a secret is sent as what it is
        return False
    return value.isascii() or len(value.encode(errors="replace")) <= STR_MAX


def _bytes(value: object) -> bool:
    return type(value) is bytes and len(value) <= BIN_MAX


def _float(value: object) -> bool:
    return type(value) is float and math.isfinite(value)


_CHECKS: Mapping[type, Callable[[object], bool]] = {
    int: _int,
    bool: _bool,
    str: _str,
    bytes: _bytes,
    float: _float,
}


def encode(message: Message) -> bytes:
    """The header of a message.

    Raises: ValueError if a field does not fit its annotation or the header is too long: a bug
    or a bad setting of ours, found before it is sent.
    """
    cls = type(message)
    header: dict[str, object] = {"v": VERSION, "op": cls.op}
    for name, check in _fields(cls).items():
        value = getattr(message, name)
        if not check(value):
            raise ValueError(f"{cls.op}: field {name} cannot be sent as {_short(value)}")
        header[name] = list(value) if type(value) is tuple else value
    packed: bytes = msgpack.packb(header)
    if len(packed) > HEADER_MAX:
        raise ValueError(f"{cls.op}: header of {len(packed)} bytes, the limit is {HEADER_MAX}")
    return packed


class Codec:
    """Decodes the headers of a closed list of messages."""

    def __init__(self, *messages: type[Message]) -> None:
        self._messages = {message.op: message for message in messages}
        assert len(self._messages) == len(messages), "two messages with one op"

    def decode(self, header: bytes | memoryview) -> Message:
        """Raises: RemoteProtocolError, and nothing else, whatever the bytes are."""
        if len(header) > HEADER_MAX:
            raise RemoteProtocolError(f"header of {len(header)} bytes, the limit is {HEADER_MAX}")
        try:
            data = msgpack.unpackb(
                header,
                max_str_len=STR_MAX,
                max_bin_len=BIN_MAX,
                max_array_len=LIST_MAX,
                max_map_len=64,
                max_ext_len=0,
                object_pairs_hook=_unique,
            )
        except Exception as error:
            raise RemoteProtocolError(f"not msgpack: {type(error).__name__}") from error
        if type(data) is not dict:
            raise RemoteProtocolError(f"header is a {type(data).__name__}, not a map")
        version, op = data.pop("v", None), data.pop("op", None)
        if not _int(version) or version != VERSION:
            raise RemoteProtocolError(
                f"protocol version {_short(version)}, this side speaks {VERSION}"
            )
        if type(op) is not str or op not in self._messages:
            raise RemoteProtocolError(f"unknown op {_short(op)}")
        return self._build(self._messages[op], data)

    def _build(self, cls: type[Message], data: dict[Any, Any]) -> Message:  # Any: from the peer
        checks = _fields(cls)
        if data.keys() != checks.keys():
            odd = sorted(map(_short, data.keys() ^ checks.keys()))
            raise RemoteProtocolError(f"{cls.op}: missing or unknown fields {', '.join(odd)}")
        for name, check in checks.items():
            if type(data[name]) is list:
                data[name] = tuple(data[name])
            if not check(data[name]):
                raise RemoteProtocolError(f"{cls.op}: field {name} is {_short(data[name])}")
        try:
            return cls(**data)
        except ValueError as error:  # from a __post_init__
            raise RemoteProtocolError(f"{cls.op}: {error}") from error


_FIELDS: dict[type, dict[str, Callable[[object], bool]]] = {}


def _fields(cls: type) -> dict[str, Callable[[object], bool]]:
    """Checks by field name, made once a class from its annotations."""
    if cls not in _FIELDS:
        hints = typing.get_type_hints(cls)
        _FIELDS[cls] = {f.name: _check(hints[f.name]) for f in fields(cls)}
    return _FIELDS[cls]


def _check(hint: Any) -> Callable[[object], bool]:  # Any: annotations have no common type
    if typing.get_origin(hint) is tuple:
        element, dots = typing.get_args(hint)
        assert dots is Ellipsis, hint
        of_element = _CHECKS[element]
        if element is int:
            return _ints
        return lambda value: (
            type(value) is tuple and len(value) <= LIST_MAX and all(map(of_element, value))
        )
    return _CHECKS[hint]


def _ints(value: object) -> bool:
    """Columns are long and on the way of every push: 1 us for 27 of them, one by one 4."""
    return type(value) is tuple and (
        not value
        or (
            len(value) <= LIST_MAX
            and all(map(operator.is_, map(type, value), repeat(int)))
            and min(value) >= 0
            and max(value) < INT_END
        )
    )


def _unique(pairs: list[tuple[object, object]]) -> dict[object, object]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key twice")
    return data


def _short(value: object) -> str:
    try:
        text = repr(value)
    except RecursionError:  # a thousand lists in each other fit into a header
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def sayable(text: str, limit: int = STR_MAX // 4) -> str:
    """A text that a header can carry, whatever of the peer's own words is quoted in it."""
    return text[:limit].encode(errors="replace").decode()
