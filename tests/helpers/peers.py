"""What child processes of tests do: shards and workers that share memory. See children.py.

Each function is given a pipe: it ends when the other end hangs up.
"""

import os
import signal
from itertools import count

import torch
import zmq

from distbelief.param_server.client import Client, Fetched
from distbelief.param_server.contract import Contract
from distbelief.param_server.identity import Identity
from distbelief.param_server.layout import Layout
from distbelief.param_server.link import Patience
from distbelief.param_server.memory import Memory
from distbelief.param_server.part import VALUES, Part
from distbelief.param_server.server import ShardServer
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.shared import Shared
from distbelief.param_server.slab import Slab, slab_bytes
from distbelief.param_server.transport import ZmqClient, ZmqServer
from tests.param_server.jobs import RUN, TOKEN, make_contract, numbers


def apply_for_ever(pipe, layout: Layout, *, pins: bool) -> None:
    """Every value of a part is its version, and rises as fast as it can.

    pins: hold the values over every other change, so that they move to another buffer.
    """
    torch.set_num_threads(1)
    contract = make_contract(layout)  # lr 0.1
    memory = Memory.create("shard", slab_bytes(layout.parts))
    slab = Slab(memory.array(), layout.parts)
    parts = [Part(part, contract, slab) for part in layout.parts]
    grads = [torch.full((part.range.numel,), -10.0) for part in parts]
    for part in parts:
        part.load_({VALUES: torch.zeros(part.range.numel)})
    pipe.send(memory.address)
    for turn in count():
        held = [part.pin() for part in parts] if pins and turn % 2 else []
        for part, grad in zip(parts, grads, strict=True):
            part.apply_(grad, 1)
        for pin in held:
            pin.release()
        if turn % 16 == 0 and pipe.poll():
            return


def serve(pipe, *, is_on: bool = True, num_workers: int = 1) -> None:
    """A shard; says its endpoint."""
    torch.set_num_threads(1)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    shared = Shared(is_on=is_on)
    config = ShardConfig(run=RUN, token=TOKEN, num_workers=num_workers)
    transport = ZmqServer(context)
    server = ShardServer(Shard(config, make_home=shared.make_home), transport, None, shared=shared)
    pipe.send(transport.endpoint)
    server.serve(pipe.poll)
    transport.close()
    shared.close()
    context.term()


def work(
    pipe,
    endpoints: list[str],
    contract: Contract,
    w: str = "w0",
    *,
    give_up_s: float = 60.0,
    stop_at: int = 0,
) -> None:
    """Push and fetch for ever; says how often it has, and the error it ends by.

    stop_at: stops itself (SIGSTOP) in the middle of reading the values of that push.
    """
    torch.set_num_threads(1)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    client = Client(
        ZmqClient(context),
        endpoints,
        Identity(run=RUN, w=w, inc=1, token=TOKEN),
        contract,
        Patience(retry_s=give_up_s / 4, give_up_s=give_up_s),
        memory=True,
    )
    try:
        client.connect()
        assert client.is_shared
        client.initialise(numbers(contract.layout))
        grad = client.vector()
        grad.copy_(numbers(contract.layout, 1))
        copies = [Fetched(contract.layout), Fetched(contract.layout)]
        client.fetch(copies[0])
        absent = (b"",) * len(contract.layout.parts)
        for turn in count(1):
            if turn == stop_at:
                _stop_in_the_middle(client)
            ticket = client.start_push(grad, 1, copies[0], absent, copies[1])
            client.wait(ticket)
            copies.reverse()
            pipe.send((turn, dict(ticket.pushed.statuses)))
            if pipe.poll():
                return
    except OSError:  # nobody listens any more
        pass
    except Exception as error:  # noqa: BLE001  # the test looks at it
        pipe.send(f"{type(error).__name__}: {error}")
    finally:
        client.close()
        context.term()


def _stop_in_the_middle(client: Client) -> None:
    reader = client._slabs[0][1]
    view = reader._view

    def stop_and_view(part, place):
        if part.index == 2:  # others of this message have been copied, others not
            reader._view = view  # type: ignore[method-assign]
            os.kill(os.getpid(), signal.SIGSTOP)
        return view(part, place)

    reader._view = stop_and_view  # type: ignore[method-assign]
