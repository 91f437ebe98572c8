"""FloorSocket: a hand-written server over plain TCP sockets, 1 MiB at a time, both ways at once.

The server has a thread for each worker, which reads a chunk into memory it keeps, applies it, and
sends the fresh chunk back; receiving, applying and sending leave the interpreter free. No header:
chunks come in their order. TCP's own buffers carry what is on its way.
"""

import socket
import threading
from contextlib import suppress

import numpy as np

from distbelief.bench import floor
from distbelief.bench.station import Station

_BUFFER = 4 * 2**20


def serve(station: Station) -> None:
    """Be a server."""
    import torch  # in servers alone

    from distbelief.bench.work import apply_

    torch.set_num_threads(1)
    spec, seat = station.spec, station.seat
    start, stop = floor.slices(spec["numel"], spec["shards"])[spec["index"]]
    array = np.zeros(stop - start, np.float32)
    values, momentum = torch.from_numpy(array), torch.zeros(stop - start)
    applying = threading.Lock()

    def attend(link: socket.socket) -> None:
        buffer = np.empty(min(floor.CHUNK, stop - start), np.float32)
        grad = torch.from_numpy(buffer)
        with suppress(OSError, EOFError):  # the worker has gone
            while True:
                for low, high in floor.chunks(stop - start):
                    _receive(link, buffer[: high - low].data.cast("B"))
                    with applying:
                        apply_(values[low:high], grad[: high - low], momentum[low:high])
                    link.sendall(array[low:high].data.cast("B"))

    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    listener.settimeout(0.05)
    station.say(port=listener.getsockname()[1])
    while not seat.is_stopped:
        with suppress(TimeoutError):
            link, _ = listener.accept()
            link.settimeout(None)
            _configure(link)
            threading.Thread(target=attend, args=(link,), daemon=True).start()


def work(station: Station) -> None:
    """Be a worker: one thread sends, this one receives."""
    spec, seat = station.spec, station.seat
    size = spec["numel"]
    grad, values = np.ones(size, np.float32), np.zeros(size, np.float32)
    outgoing, incoming = grad.data.cast("B"), values.data.cast("B")
    links = []
    for served, (start, stop) in zip(
        station.hear()["servers"], floor.slices(size, spec["shards"]), strict=True
    ):
        link = socket.create_connection(("127.0.0.1", served["port"]))
        _configure(link)
        bell = threading.Semaphore(0)
        piece = outgoing[4 * start : 4 * stop]
        threading.Thread(target=_send, args=(link, piece, bell), daemon=True).start()
        links.append((link, incoming[4 * start : 4 * stop], bell))
    station.say()

    def do_round() -> None:
        for _, _, bell in links:
            bell.release()
        for link, piece, _ in links:
            _receive(link, piece)

    seat.do_rounds(do_round, lambda: floor.look(seat, values), lambda: floor.ends(values))


def _send(link: socket.socket, piece: memoryview, bell: threading.Semaphore) -> None:
    while True:
        bell.acquire()
        link.sendall(piece)


def _receive(link: socket.socket, into: memoryview) -> None:
    while len(into):
        received = link.recv_into(into, len(into), socket.MSG_WAITALL)
        if not received:
            raise EOFError
        into = into[received:]


def _configure(link: socket.socket) -> None:
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
