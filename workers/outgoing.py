"""Outgoing: a gradient vector that is pushed: where it is computed, and where shards read it."""

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from distbelief.param_server.client import Client, Fetched, PushTicket
from distbelief.workers.staging import AT_ONCE, Mark, Ready, Staging


class Outgoing:
    """See the top of this file. It must not change from a push until that is answered: shards of
    this host read it in place."""

    def __init__(self, staging: Staging, host: Tensor) -> None:
        """host: 1-D float32 [layout.total], as `Client.vector` gives."""
        self.host = host
        self.grad = host if staging.is_in_place else staging.vector(host.numel())
        """1-D float32 [layout.total]; on the CPU `host` itself."""
        self._staging = staging
        staging.pin(host)

    def turn(self, host: Tensor) -> None:
        """Take another vector of the host: the one before is kept until its push is durable."""
        if self.grad is self.host:
            self.grad = host
        self.host = host
        self._staging.pin(host)

    def copy_out(self, start: int, stop: int, after: Mark) -> Ready:
        """Bring a range of it to the host. In the comm thread."""
        return self._staging.copy_out(self.grad[start:stop], self.host[start:stop], after)

    def push(
        self,
        client: Client,
        samples: int,
        base: Fetched,
        absent: Sequence[bytes],
        into: Fetched | None,
        after: Mark,
        checks: Sequence[Callable[[], object]] = (),
    ) -> PushTicket:
        """Push all of it, as `Client.start_push`. In the comm thread.

        checks: called before any of it leaves; what they raise stops the push.
        """
        if self.grad is self.host:
            for check in checks:
                check()
            return client.start_push(self.host, samples, base, absent, into)
        copies = [self.copy_out(parts[0].start, parts[-1].stop, after) for parts in client.messages]
        wait_for(copies[0], client)
        for check in checks:
            check()
        ticket = client.begin_push(samples, base, into, self.host)
        for index, copy in enumerate(copies):  # while one is sent the next are on their way
            copy.wait()
            client.send_push(ticket, index, self.host, absent)
        return ticket


def wait_for(copy: Ready, client: Client) -> None:
    """Until the device has computed a range and it is on the host. In the comm thread."""
    if copy is AT_ONCE:
        return
    began = time.monotonic()
    copy.wait()
    client.traffic.device_s += time.monotonic() - began
