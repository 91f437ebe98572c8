"""Constants: what the model is told of a machine's speed. Measured by bench/constants.py."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

FORMS = ("float32", "bfloat16", "int8")
"""Of values on the wire."""
LOCAL = "local"
"""Values that stay on their host: float32, and no checksum is made of them."""
SHRINK = {"float32": 1.0, "bfloat16": 2.0, "int8": 3.9}
"""How many times smaller a form is; int8 has a scale for each few values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Speeds of one machine. A GB is 1e9 bytes of parameters as float32, whatever the form."""

    shard_gb_per_s: Mapping[str, float]
    """By form, and `local`: what the one thread of a shard takes in, applies and gives back."""
    worker_gb_per_s: Mapping[str, float]
    """By form, and `local`: what the comm thread of a worker makes ready and takes in again."""
    part_us: float
    """Of a shard's thread, for each part of a push, whatever its length."""
    message_us: float
    """Of a shard's thread, for each message of a push."""
    tcp_gb_per_s: float
    """Bytes that one network thread moves, in one direction."""
    curve_gb_per_s: float
    """The same, encrypted."""
    round_trip_us: float
    """Of an empty message between two processes of one host, there and back."""
    source: str = ""
    """Where and when it was measured."""

    def __post_init__(self) -> None:
        for name in ("shard_gb_per_s", "worker_gb_per_s"):
            speeds = getattr(self, name)
            if not isinstance(speeds, Mapping) or set(speeds) != {*FORMS, LOCAL}:
                raise ValueError(f"{name} must have {', '.join((*FORMS, LOCAL))}")
            for form, speed in speeds.items():
                _see_positive(f"{name} of {form}", speed)
        for name in ("tcp_gb_per_s", "curve_gb_per_s", "part_us", "message_us", "round_trip_us"):
            _see_positive(name, getattr(self, name))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Constants":
        """Raises: ValueError naming what is wrong."""
        data: Any = json.loads(text)  # Any: JSON
        if not isinstance(data, dict):
            raise ValueError("it is no JSON object")
        unknown = sorted(set(data) - set(cls.__dataclass_fields__))
        missing = sorted(set(cls.__dataclass_fields__) - set(data) - {"source"})
        if unknown or missing:
            what = f"lacks {missing[0]}" if missing else f"has an unknown {unknown[0][:40]!r}"
            raise ValueError(f"it {what}")
        return cls(**data)


def _see_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above 0, got {str(value)[:40]}")
