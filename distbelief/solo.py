"""Solo: the session of a script that was started by itself: one process, no servers.

The shard is the same state machine that a shard's process serves, called in place; so a script
computes the same alone as with one worker.
"""

import sys
from collections.abc import Sequence

from distbelief.param_server.client import Client
from distbelief.param_server.contract import Contract
from distbelief.param_server.identity import Identity
from distbelief.param_server.server import respond
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.transport import Frame, MemoryClient
from distbelief.param_server.wire import encode
from distbelief.workers.comm import Calls, Inline
from distbelief.workers.lease import Lease
from distbelief.workers.session import Replica, WorkerInfo

RUN, TOKEN = "solo", "solo"


class Solo:
    """See the top of this file; what the methods promise is in `Session`."""

    info = WorkerInfo(index=0, count=1)
    seed = 0
    is_shared = False

    def __init__(self) -> None:
        self._count = 0
        self._shard: Shard | None = None

    def join(self, contract: Contract) -> tuple[Calls, bool]:
        if self._shard is not None:
            raise ValueError(
                "this process has a Downpour already: give all parameters to one, as groups"
            )
        sys.stderr.write(
            "distbelief: no launcher: this process trains alone, without servers. To distribute "
            "it: distbelief launch SCRIPT --workers 4\n"
        )
        shard = self._shard = Shard(ShardConfig(run=RUN, token=TOKEN))

        def handle(peer: bytes, frames: Sequence[Frame]) -> Sequence[Frame]:
            reply = respond(shard, peer, frames, 0.0)
            answer: list[Frame] = [
                encode(reply.message),
                *(bytes(frame) for frame in reply.payload),
            ]
            reply.release()
            return answer

        me = Identity(run=RUN, w="w0", inc=1, token=TOKEN)
        client = Client(MemoryClient({"here": handle}), ["here"], me, contract)
        client.connect()
        return Inline(client), True

    def begin(self, downpour: Replica) -> None:
        pass

    def stepped(self, downpour: Replica) -> None:
        pass

    def iterate(self) -> int:
        raise AssertionError("nobody to share with")

    def take(self, num_samples: int, batch_size: int, iteration: int) -> Lease | None:
        raise AssertionError("nobody to share with")

    def forget_count(self) -> None:
        self._count = 0

    def count(self, num_samples: int, iteration: int) -> None:
        self._count += num_samples

    def wait_for_data(self, seconds: float) -> None:
        pass

    def uncount(self, num_samples: int) -> None:
        pass

    def take_count(self) -> int:
        count, self._count = self._count, 0
        return count
