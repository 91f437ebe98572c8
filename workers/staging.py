"""Staging: how flat vectors get from where the model computes to where the shards see them.

On the CPU that is one memory: nothing moves, and every wait is over at once. On a CUDA device the
model computes in vectors that never change their address (so compiled code and CUDA graphs may
keep it), shards and sockets use pinned vectors of the host, and two side streams copy between
them, so that neither the training thread nor the computing stands still for a copy:

    computing   backward ● mark ······················ mark ● backward is over    ● forward
    stream out            └► copy_out ─► Ready.wait()           │                 │
    comm thread                          └ sends, takes answers ┴► (answered)     │
    stream in                                                     copy_in ─► hold ┘

A mark says up to where the computing must have come before a copy begins; `hold` lets what is
computed from there on wait, on the device, until a copy has ended. The thread that trains calls
nothing that waits for the device; only the comm thread does, in `Ready.wait`.
"""

import logging
import math
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from distbelief.param_server.protocol import checksum

logger = logging.getLogger(__name__)

PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every device of the process."""


class Ready(Protocol):
    """A copy that is on its way."""

    def wait(self) -> None:
        """Block this thread until it has ended."""
        ...


class Reading(Protocol):
    """A number on its way from the device."""

    @property
    def is_there(self) -> bool: ...

    @property
    def value(self) -> float:
        """Blocks this thread until it is there."""
        ...


Mark = tuple[torch.cuda.Event, ...]
"""A moment of the computing; empty on the CPU, where what was called for is done."""


class Staging(Protocol):
    """See the top of this file. `copy_*` may be called in any thread."""

    is_in_place: bool
    """The host's vectors are computed in: there is nothing to copy."""

    def vector(self, numel: int) -> Tensor:
        """1-D float32 of zeros, where the model computes."""
        ...

    def pin(self, host: Tensor) -> None:
        """Speed up copies from and to a vector of the host, which must live until `close`."""
        ...

    def stream(self) -> torch.cuda.Stream | None:
        """What this thread computes on."""
        ...

    def mark(self, streams: Iterable[torch.cuda.Stream | None] = ()) -> Mark:
        """All that was called for up to now on these streams, by default on this thread's."""
        ...

    def copy_out(self, source: Tensor, host: Tensor, after: Mark) -> Ready:
        """Copy to the host. Nobody may write to `source` until it is ready."""
        ...

    def copy_in(self, host: Tensor, target: Tensor, after: Mark) -> Ready:
        """Copy from the host. `after`: the last use of what `target` held."""
        ...

    def hold(self, ready: Ready) -> None:
        """Whatever this thread computes from here on waits for a copy, without blocking it."""
        ...

    def read(self, scalar: Tensor) -> Reading:
        """Begin to read a tensor of one number."""
        ...

    def fingerprint(self, vector: Tensor) -> Reading:
        """Begin to sum up the bits of a 1-D float32 vector: to tell whether it was changed."""
        ...

    def close(self) -> None:
        """Wait for every copy and let go of the host's memory. May be called twice."""
        ...


def staging_of(tensors: Iterable[Tensor]) -> Staging:
    """On one CUDA device that one's; else none: what is elsewhere is copied tensor by tensor."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) == 1 and (device := devices.pop()).type == "cuda":
        return Cuda(device)
    return InPlace()


class Known:
    """What is there already, as a Ready and a Reading."""

    is_there = True

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def wait(self) -> None:
        pass


AT_ONCE = Known()


class InPlace:
    """On the CPU."""

    is_in_place = True

    def vector(self, numel: int) -> Tensor:
        return torch.zeros(numel)

    def pin(self, host: Tensor) -> None:
        pass

    def stream(self) -> None:
        return None

    def mark(self, streams: Iterable[torch.cuda.Stream | None] = ()) -> Mark:
        return ()

    def copy_out(self, source: Tensor, host: Tensor, after: Mark) -> Ready:
        return AT_ONCE

    def copy_in(self, host: Tensor, target: Tensor, after: Mark) -> Ready:
        return AT_ONCE

    def hold(self, ready: Ready) -> None:
        pass

    def read(self, scalar: Tensor) -> Reading:
        return Known(float(scalar.detach()))

    def fingerprint(self, vector: Tensor) -> Reading:
        return Known(checksum(vector))

    def close(self) -> None:
        pass


class Cuda:
    """Of one CUDA device."""

    is_in_place = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._in = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # nor this
        self._pinned: list[int] = []
        """Addresses that are to be let go of."""

    def vector(self, numel: int) -> Tensor:
        return torch.zeros(numel, device=self._device)

    def pin(self, host: Tensor) -> None:
        """Pin it where it lies; copies from and to what cannot be pinned are slower.

        Of shared memory these are the pages of this process's own mapping.
        """
        address = host.data_ptr()
        if host.numel() == 0 or address in self._pinned:
            return
        with torch.cuda.device(self._device):
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # nor this
            failed = int(runtime.cudaHostRegister(address, host.nbytes, PORTABLE))
            if not failed:
                self._pinned.append(address)
                return
            logger.warning("memory is not pinned bytes=%d: CUDA error %d", host.nbytes, failed)
            # The runtime keeps the error, and the next one who launches a kernel would get it.
            try:
                torch.zeros(1, device=self._device)
            except RuntimeError as error:
                logger.debug("cleared: %s", error)

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def mark(self, streams: Iterable[torch.cuda.Stream | None] = ()) -> Mark:
        return tuple([_record(stream or self.stream()) for stream in streams or (None,)])

    def copy_out(self, source: Tensor, host: Tensor, after: Mark) -> Ready:
        return self._copy(self._out, source, host, after)

    def copy_in(self, host: Tensor, target: Tensor, after: Mark) -> Ready:
        return self._copy(self._in, host, target, after)

    def hold(self, ready: Ready) -> None:
        assert isinstance(ready, _OnItsWay)
        self.stream().wait_event(ready.event)

    def read(self, scalar: Tensor) -> Reading:
        host = torch.empty((), dtype=scalar.dtype, pin_memory=True)  # torch keeps a stock of these
        host.copy_(scalar.detach().reshape(()), non_blocking=True)
        return _OnItsWay(_record(self.stream()), host)

    def fingerprint(self, vector: Tensor) -> Reading:
        return self.read(vector.view(torch.int32).sum())

    def close(self) -> None:
        self._out.synchronize()
        self._in.synchronize()
        for address in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]  # nor this
        self._pinned.clear()

    def _copy(self, stream: torch.cuda.Stream, source: Tensor, into: Tensor, after: Mark) -> Ready:
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            into.copy_(source, non_blocking=True)
        return _OnItsWay(_record(stream))


class _OnItsWay:
    """A copy of which an event tells, and its number where it has one."""

    def __init__(self, event: torch.cuda.Event, host: Tensor | None = None) -> None:
        self.event = event
        self._host = host

    def wait(self) -> None:
        self.event.synchronize()

    @property
    def is_there(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]  # nor this

    @property
    def value(self) -> float:
        self.wait()
        return math.nan if self._host is None else self._host.item()


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    # Who waits for it sleeps, and leaves the core alone.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # nor this
    event.record(stream)
    return event
