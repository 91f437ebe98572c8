"""Decoder: reports out of the form of wire.py, a tenth of the time that its Codec takes. Pure.

A thousand workers send a thousand reports a second, and the Codec looks at every value in Python:
100 us a report. Here types and bounds are compiled, by msgspec. What is taken is the same, but for
one thing: of a key that is there twice the last one counts.
"""

import math
import typing
from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import Annotated, Any, Literal

import msgspec

from distbelief.param_server.errors import RemoteProtocolError
from distbelief.param_server.report import AnyReport, ShardReport, WorkerReport
from distbelief.param_server.wire import HEADER_MAX, INT_END, LIST_MAX, STR_MAX, VERSION

_PLAIN: dict[Any, Any] = {  # Any: types
    int: Annotated[int, msgspec.Meta(ge=0, lt=INT_END)],
    str: Annotated[str, msgspec.Meta(max_length=STR_MAX)],
    float: float,
    bool: bool,
}


class _Form:
    """How a class of reports is read."""

    def __init__(self, cls: type[AnyReport]) -> None:
        hints = typing.get_type_hints(cls)
        self.names = [field.name for field in fields(cls)]
        self.values: Callable[[Any], tuple[Any, ...]] = attrgetter(*self.names)  # Any: of the peer
        floats = [name for name in self.names if hints[name] is float]
        columns = [name for name in self.names if hints[name] == tuple[float, ...]]
        self.floats: Callable[[Any], tuple[float, ...]] = attrgetter(*floats)
        self.columns: Callable[[Any], Any] = attrgetter(*columns)
        self.is_one_column = len(columns) == 1
        self.cls = cls
        self.struct = msgspec.defstruct(
            cls.__name__,
            [("v", Literal[VERSION]), *((name, _typed(hints[name])) for name in self.names)],
            tag_field="op",
            tag=cls.op,
            forbid_unknown_fields=True,
            kw_only=True,
            gc=False,
        )

    def build(self, read: Any) -> AnyReport:  # Any: one of self.struct
        """Raises: ValueError."""
        columns = self.columns(read)
        # A sum is finite if all are, but for values that no report has.
        sums = [sum(columns)] if self.is_one_column else list(map(sum, columns))
        if not math.isfinite(sum(sums) + sum(self.floats(read))):
            raise ValueError("a value is not finite")
        return self.cls(**dict(zip(self.names, self.values(read), strict=True)))


def _typed(hint: Any) -> Any:  # Any: annotations have no common type
    if typing.get_origin(hint) is tuple:
        column = tuple.__class_getitem__((_PLAIN[typing.get_args(hint)[0]], ...))
        return Annotated[column, msgspec.Meta(max_length=LIST_MAX)]
    return _PLAIN[hint]


_FORMS = {form.struct: form for form in (_Form(WorkerReport), _Form(ShardReport))}
_DECODER = msgspec.msgpack.Decoder(typing.Union[tuple(_FORMS)])  # noqa: UP007 - not known before


def decode_report(data: bytes) -> AnyReport:
    """Raises: RemoteProtocolError, and nothing else, whatever the bytes are."""
    if len(data) > HEADER_MAX:
        raise RemoteProtocolError(f"header of {len(data)} bytes, the limit is {HEADER_MAX}")
    try:
        read = _DECODER.decode(data)
        return _FORMS[type(read)].build(read)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise RemoteProtocolError(f"no report: {error}") from error
