"""FloorZmq: a hand-written server over ZeroMQ on TCP, in two manners.

simple   the whole gradient as one message, an answer, a question, all parameters as one message
chunk1   1 MiB at a time, everything on its way at once; the answer to a chunk is the fresh chunk

    push = start stop gradient      answer = start stop parameters, of stop - start elements
    a push of the simple manner is answered by an empty message, and `?` by all parameters
"""

import struct

import numpy as np
import zmq

from distbelief.bench import floor
from distbelief.bench.station import Station

_RANGE = struct.Struct("<qq")
_SIMPLE = b"!"
_ASK = b"?"


def serve(station: Station) -> None:
    """Be a server of both manners; it sends from the live parameters, without a copy."""
    import torch  # in servers alone

    from distbelief.bench.work import apply_

    torch.set_num_threads(1)
    spec, seat = station.spec, station.seat
    start, stop = floor.slices(spec["numel"], spec["shards"])[spec["index"]]
    array = np.zeros(stop - start, np.float32)
    values, momentum = torch.from_numpy(array), torch.zeros(stop - start)
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    _configure(router)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    station.say(endpoint=f"tcp://127.0.0.1:{port}")
    while not seat.is_stopped:
        if not router.poll(50):
            continue
        worker, head = router.recv(), router.recv()
        if head == _ASK:
            router.send(worker, zmq.SNDMORE)
            router.send(array.data, copy=False)
            continue
        frame = router.recv(copy=False)
        # Its own memory, which frombuffer takes for read only: nothing writes to it.
        grad = torch.from_numpy(np.frombuffer(frame.buffer, np.float32))
        if head == _SIMPLE:
            apply_(values, grad, momentum)
            router.send_multipart([worker, b""])
        else:
            low, high = _RANGE.unpack(head)
            apply_(values[low:high], grad, momentum[low:high])
            router.send_multipart([worker, head], zmq.SNDMORE)
            router.send(array[low:high].data, copy=False)
        del grad, frame  # before the next is received: one message of memory, not two


def work_simple(station: Station) -> None:
    """Be a worker that sends whole messages."""
    spec, seat = station.spec, station.seat
    grad, values = np.ones(spec["numel"], np.float32), np.zeros(spec["numel"], np.float32)
    dealers = _connect(station)
    ranges = floor.slices(spec["numel"], spec["shards"])
    station.say()

    def do_round() -> None:
        for dealer, (start, stop) in zip(dealers, ranges, strict=True):
            dealer.send(_SIMPLE, zmq.SNDMORE)
            dealer.send(grad[start:stop].data, copy=False)
        for dealer in dealers:
            dealer.recv()
            dealer.send(_ASK)
        for dealer, (start, stop) in zip(dealers, ranges, strict=True):
            dealer.recv_into(values[start:stop].data)

    seat.do_rounds(do_round, lambda: floor.look(seat, values), lambda: floor.ends(values))


def work_chunks(station: Station) -> None:
    """Be a worker that sends chunks."""
    spec, seat = station.spec, station.seat
    grad, values = np.ones(spec["numel"], np.float32), np.zeros(spec["numel"], np.float32)
    dealers = _connect(station)
    ranges = floor.slices(spec["numel"], spec["shards"])
    # One chunk of every server before the second of any, so that all of them are busy.
    plan = sorted(
        (low, server, high)
        for server, (start, stop) in enumerate(ranges)
        for low, high in floor.chunks(stop - start)
    )
    poller = zmq.Poller()
    for dealer in dealers:
        poller.register(dealer, zmq.POLLIN)
    number = {dealer: server for server, dealer in enumerate(dealers)}
    station.say()

    def do_round() -> None:
        for low, server, high in plan:
            start = ranges[server][0]
            dealers[server].send(_RANGE.pack(low, high), zmq.SNDMORE)
            dealers[server].send(grad[start + low : start + high].data, copy=False)
        left = len(plan)
        while left:
            for dealer in dealers if len(dealers) == 1 else dict(poller.poll()):
                start = ranges[number[dealer]][0]
                low, high = _RANGE.unpack(dealer.recv())
                dealer.recv_into(values[start + low : start + high].data)
                left -= 1

    seat.do_rounds(do_round, lambda: floor.look(seat, values), lambda: floor.ends(values))


def _configure(sock: "zmq.Socket[bytes]") -> None:
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.SNDHWM, 0)  # all chunks of all workers may be on their way
    sock.setsockopt(zmq.RCVHWM, 0)


def _connect(station: Station) -> "list[zmq.Socket[bytes]]":
    context = zmq.Context()
    dealers = []
    for served in station.hear()["servers"]:
        dealer = context.socket(zmq.DEALER)
        _configure(dealer)
        dealer.connect(served["endpoint"])
        dealers.append(dealer)
    return dealers
