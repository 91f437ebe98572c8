"""Chronicle: what the launcher tells the monitor of the run as a whole. No socket, no clock.

    to the monitor's standard input, one JSON object a line:
        Begin, once; then RunReport about once a second, Event as it happens, End at the end

The launcher writes without waiting: a monitor that does not read costs lines, never time.
"""

from typing import Any

import msgspec

KINDS = (
    "join",  # a worker has reported for the first time
    "crash",  # a process is lost: killed, ended without a word, or frozen
    "recover",  # it is back, as the next incarnation or epoch
    "drain",  # a worker was asked to leave
    "leave",  # a worker has left
    "quarantine",  # pushes of a worker were refused again and again
    "checkpoint",  # all shards have saved something new
    "storage",  # a snapshot could not be written, or can again
    "state",  # the run has come to another state
    "scale",  # another number of workers was asked for
    "config",  # something of the configuration has changed
    "error",  # whatever ends the run
    "slow",  # the monitor's own: a finding has come up
    "well",  # the monitor's own: a finding has gone
)
"""Kinds of events."""


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as the controller knows it."""

    name: str
    inc: int = 0
    pid: int = 0
    host: str = ""
    state: str = "starting"
    """starting, training, draining, left, lost (to be started again), ended or given-up."""
    samples: int = 0
    restarts: int = 0


class ShardState(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    inc: int = 0
    pid: int = 0
    host: str = ""
    state: str = "starting"
    """starting, serving, lost or ended."""
    restarts: int = 0
    storage_error: str = ""


class Begin(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The run, as it is configured. Nothing here is secret."""

    at: float
    """Unix time, as in all that follows."""
    run: str
    name: str
    """What a person calls it: the model's or script's name."""
    attempt: int
    version: str
    """Of distbelief."""
    engine: str
    num_workers: int
    num_shards: int
    config: dict[str, Any]  # Any: JSON
    """The job's settings as config.toml has them."""
    parameters: int
    """0 where a script brings its model."""
    unit: str
    """Of the run's end: epochs, updates, seconds, or none."""
    target: float
    """How many of them; 0 for none."""
    run_path: str


class RunReport(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The run as the controller sees it."""

    at: float
    state: str
    """starting, training, stopping, saving, evaluating or ended."""
    samples: int
    total_samples: int | None
    updates: int
    loss: float | None
    samples_per_s: float
    eta_s: float | None
    epoch: float | None
    """As far as it is: 1.5 is half through the second."""
    refused: int
    workers: list[WorkerState]
    """All that were ever started, in the order of their numbers."""
    shards: list[ShardState]
    controller_restarts: int
    dropped: int
    """Lines that were not written because the monitor did not read."""
    accounting: dict[str, int] = {}
    """Samples by their fate, as in result.json."""


class Event(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Something happened."""

    at: float
    kind: str
    """One of KINDS."""
    who: str
    """Name of the process; empty for the run."""
    text: str
    node: str = ""
    detail: dict[str, Any] = {}  # Any: JSON


class Evaluated(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The evaluator has looked at the model."""

    at: float
    samples: int
    """Applied by then, by the part furthest behind."""
    loss: float | None
    top1: float | None
    """In [0, 1]; None where the data is no classification."""


class End(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The run has ended."""

    at: float
    result: dict[str, Any]  # Any: JSON
    """As result.json."""


AnyEntry = Begin | RunReport | Event | Evaluated | End

_ENCODER = msgspec.json.Encoder()
_DECODER: msgspec.json.Decoder[AnyEntry] = msgspec.json.Decoder(AnyEntry)


def encode(entry: AnyEntry) -> bytes:
    """One line, with its end."""
    return _ENCODER.encode(entry) + b"\n"


def decode(line: bytes) -> AnyEntry:
    """Raises: msgspec.DecodeError."""
    return _DECODER.decode(line)
