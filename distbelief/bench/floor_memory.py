"""FloorMemory: the shortest way between processes of one host.

The worker's gradient is computed where the server reads it, one message over a Unix socket says
that it is there, the server applies it in one pass, and the worker copies the parameters out
from where they lie. Nothing keeps another worker's push from changing them meanwhile: reads may
be torn.
"""

import os

import numpy as np
import zmq

from distbelief.bench import floor
from distbelief.bench.region import Region
from distbelief.bench.station import Station


def serve(station: Station) -> None:
    """Be a server: `register` opens a worker's memory, one byte applies what is in it."""
    import torch  # in servers alone

    from distbelief.bench.work import apply_

    torch.set_num_threads(1)
    spec, seat = station.spec, station.seat
    start, stop = floor.slices(spec["numel"], spec["shards"])[spec["index"]]
    region = Region.create("shard", stop - start)
    values = torch.from_numpy(region.values)
    momentum = torch.zeros(stop - start)
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    endpoint = f"ipc://@distbelief-bench-{os.getpid()}"  # abstract: no file is left behind
    router.bind(endpoint)
    station.say(endpoint=endpoint, path=region.path)
    grads: dict[bytes, torch.Tensor] = {}
    while not seat.is_stopped:
        if not router.poll(50):
            continue
        worker, message = router.recv_multipart()
        if message == b"":
            apply_(values, grads[worker], momentum)
        else:
            whole = Region.open(message.decode(), spec["numel"])
            grads[worker] = torch.from_numpy(whole.values[start:stop])
        router.send_multipart([worker, b""])


def work(station: Station) -> None:
    """Be a worker."""
    spec, seat = station.spec, station.seat
    size = spec["numel"]
    grad = Region.create("worker", size)
    grad.values[:] = 1
    context = zmq.Context()
    dealers, shared = [], []
    for served, (start, stop) in zip(
        station.hear()["servers"], floor.slices(size, spec["shards"]), strict=True
    ):
        dealer = context.socket(zmq.DEALER)
        dealer.connect(served["endpoint"])
        dealer.send(grad.path.encode())
        dealer.recv()
        dealers.append(dealer)
        shared.append((start, stop, Region.open(served["path"], stop - start).values))
    values = np.zeros(size, np.float32)
    station.say()

    def do_round() -> None:
        for dealer in dealers:
            dealer.send(b"")
        for dealer in dealers:
            dealer.recv()
        for start, stop, theirs in shared:
            np.copyto(values[start:stop], theirs)

    seat.do_rounds(do_round, lambda: floor.look(seat, values), lambda: floor.ends(values))
