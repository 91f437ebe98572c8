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
    buffers: tuple[Tensor, Tensor] | None


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
        trained = Trained(client.contract, fetched.values, client.merge(0, *nothing))
        return trained, [json.loads(text) for text in client.query()]
    finally:
        client.close()
