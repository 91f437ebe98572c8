"""The schema of `--json`: every line is one of these, with all fields and no other."""

from dataclasses import fields
from typing import Any

import msgspec

from distbelief.record import VERSION, AnyRecord
from distbelief.result import Result


def check_record(data: dict[str, Any]) -> Any:
    """The line as its class. Raises: AssertionError or msgspec.ValidationError."""
    assert data["v"] == VERSION
    if data["type"] == "result":
        assert set(data) == {"type", "v", *(field.name for field in fields(Result))}
        return msgspec.convert(data, Result)
    record = msgspec.convert(data, AnyRecord)
    assert msgspec.to_builtins(record) == data, "other fields"
    return record
