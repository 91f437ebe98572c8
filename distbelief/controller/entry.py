"""Entry: what the controller's process and its standby write to each other, over two pipes.

    to the process      start, then orders
    from the process    ready | failed, then heard and done, in the order in which they happened

    frame   = length of the entry (4 bytes, the first the highest), entry
    entry   = one msgpack map with its kind, fields checked against their types

The controller is a state machine: its state, and the entries since, give its state now. So an entry
is written before anybody is answered because of it.
"""

import struct
import typing
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import msgspec

from distbelief.controller.machine import Controller
from distbelief.param_server.secret import Secret

T_co = TypeVar("T_co", covariant=True)

_LENGTH = struct.Struct(">I")


class Order(Protocol[T_co]):
    """Something that the launcher has the controller do."""

    def apply(self, controller: Controller) -> T_co: ...


class Lose(msgspec.Struct, frozen=True, tag=True):
    name: str

    def apply(self, controller: Controller) -> int:
        return controller.lose(self.name)


class LoseShard(msgspec.Struct, frozen=True, tag=True):
    name: str

    def apply(self, controller: Controller) -> str:
        return controller.lose_shard(self.name)


class Admit(msgspec.Struct, frozen=True, tag=True):
    name: str

    def apply(self, controller: Controller) -> None:
        controller.admit(self.name)


class Leave(msgspec.Struct, frozen=True, tag=True):
    name: str

    def apply(self, controller: Controller) -> None:
        controller.drain(self.name)


class Tick(msgspec.Struct, frozen=True, tag=True):
    now: float

    def apply(self, controller: Controller) -> None:
        controller.tick(self.now)


class StopWork(msgspec.Struct, frozen=True, tag=True):
    def apply(self, controller: Controller) -> None:
        controller.queue.stop()


class HaltShards(msgspec.Struct, frozen=True, tag=True):
    now: float

    def apply(self, controller: Controller) -> None:
        controller.halt_shards(self.now)


AnyOrder = Lose | LoseShard | Admit | Leave | Tick | StopWork | HaltShards


class Start(msgspec.Struct, frozen=True, tag=True):
    """All that the process has to know. It holds secrets: for a pipe to it and nothing else."""

    state: Controller
    inc: int
    """Which process of the controller's this is: 1, 2, ..."""
    host: str
    port: int
    """0 for any."""
    wish: int
    """The port that its predecessor had, where the job names none; 0 for none."""
    num_peers: int
    """Connections to make room for."""
    is_encrypted: bool
    keys: dict[str, Any] | None  # Any: as of `Keys.to_dict`
    log: str
    """File for what it has to say."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """It listens."""

    endpoint: str
    inc: int
    pid: int
    host: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """It cannot listen; as of `Problem`."""

    code: str
    what: str
    why: str
    fix: str


class Heard(msgspec.Struct, frozen=True, tag=True):
    """A note has come, as `Controller.handle` takes it."""

    note: bytes
    now: float
    speaker: str | None


class Done(msgspec.Struct, frozen=True, tag=True):
    """An order was carried out."""

    number: int
    """Of the order; 0 for a tick of its own."""
    order: AnyOrder


class Ordered(msgspec.Struct, frozen=True, tag=True):
    """The standby wants this done."""

    number: int
    order: AnyOrder


AnyEntry = Start | Ready | Failed | Heard | Done | Ordered


def frame(entry: AnyEntry) -> bytes:
    """An entry as it goes through a pipe."""
    body = _ENCODER.encode(entry)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Entries out of the bytes of a pipe, which come in pieces."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[AnyEntry]:
        """Raises: msgspec.DecodeError, which would be a mistake of ours."""
        self._bytes += data
        while len(self._bytes) >= _LENGTH.size:
            stop = _LENGTH.size + _LENGTH.unpack_from(self._bytes)[0]
            if len(self._bytes) < stop:
                return
            body = bytes(self._bytes[_LENGTH.size : stop])
            del self._bytes[:stop]
            yield _DECODER.decode(body)


def _encode(value: object) -> object:
    if isinstance(value, deque):
        return list(value)
    if isinstance(value, Secret):
        return str.__str__(value)  # the text itself: this pipe is where it is meant to go
    raise NotImplementedError(type(value).__name__)


def _decode(kind: Any, value: Any) -> Any:  # Any: annotations and what they are of
    """Of the collections that msgspec does not know itself."""
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin is deque:
        return deque(msgspec.convert(value, list[of[0]], dec_hook=_decode))  # type: ignore[valid-type]
    if origin is Counter:
        return Counter(msgspec.convert(value, dict[of[0], int], strict=False))  # type: ignore[valid-type]
    raise NotImplementedError(str(kind))


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_encode)
_DECODER: msgspec.msgpack.Decoder[AnyEntry] = msgspec.msgpack.Decoder(AnyEntry, dec_hook=_decode)
