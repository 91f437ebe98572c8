"""Exchange: how long a step waited for the shards, and for what. No clock."""

from dataclasses import dataclass


@dataclass(slots=True)
class Exchange:
    """Of one step: from when its gradient was handed over until the next one may begin.

    Seconds on the wall. What neither field names was waiting for the push: making it ready, and
    everything from its first byte to its answer.
    """

    seconds: float = 0.0
    fetch_s: float = 0.0
    """Of those, for parameters: an answer that brings nothing else, or copying those that came
    with the answer to the push."""
    device_s: float = 0.0
    """Of those, for a device that still computed the gradient; 0 on the CPU."""
