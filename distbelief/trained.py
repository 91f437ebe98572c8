"""Trained: what the shards have at the end of a run, fetched as a worker would."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distbelief.param_server.client import Client, Fetched
from distbelief.param_server.contract import Contract
from distbelief.param_server.identity import Identity
from distbelief.param_server.transport import ClientTransport

PAUSE_S = 0.05


@dataclass(frozen=True)
class Trained:
    """What the shards have at the end."""

    contract: Contract
    values: Tensor
    """The last ones, float32 [layout.total]."""
    buffers: tuple[Tensor, Tensor] | None
    average: Tensor | None = None
    """Of the values over the updates, as `values`; None where the job averages none."""
    averaged: int = 0
    """Updates that are in the average, of the part with the fewest."""


def fetch_trained(
    transport: ClientTransport,
    me: Identity,
    locate: Callable[[], list[str]],
    patience_s: float,
) -> tuple[Trained, list[Any]]:  # Any: JSON
    """All that the shards have, and what they tell of themselves.

    transport: closed at the end. locate: where they are, empty for one that is on its way; for so
    long it is waited for. Raises: as `Client`.
    """
    deadline = time.monotonic() + patience_s
    while not all(locate()) and time.monotonic() < deadline:
        time.sleep(PAUSE_S)
    client = Client(transport, locate(), me, locate=locate)
    try:
        client.connect()
        fetched = Fetched(client.layout)
        client.fetch(fetched)
        nothing = client.contract.buffers.no_buffers()
        average, averaged = None, 0
        if client.contract.average.slots:
            averages = Fetched(client.layout)
            client.fetch_average(averages)
            average, averaged = averages.values, min(averages.version)
        buffers = client.merge(0, *nothing)
        trained = Trained(client.contract, fetched.values, buffers, average, averaged)
        return trained, [json.loads(text) for text in client.query()]
    finally:
        client.close()
