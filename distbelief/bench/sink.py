"""Sink: a process that takes bytes and says how many came, for measuring a transport alone.

zmq   a message of one frame is taken; an empty one is answered by the number of bytes so far
tcp   length[8] bytes[length]; a length of 0 is answered in the same way, as 8 bytes
"""

import os
import socket
import struct

import zmq

from distbelief.bench.station import Station

LENGTH = struct.Struct("<q")
KINDS = ("zmq tcp", "zmq ipc", "socket tcp")
_BUFFER = 2**22


def serve(station: Station) -> None:
    """Be a sink of the kind that is named, for one sender."""
    if station.spec["kind"] == "socket tcp":
        _serve_socket(station)
    else:
        _serve_zmq(station)


def _serve_zmq(station: Station) -> None:
    pair = zmq.Context().socket(zmq.PAIR)
    if station.spec["kind"] == "zmq tcp":
        endpoint = f"tcp://127.0.0.1:{pair.bind_to_random_port('tcp://127.0.0.1')}"
    else:
        endpoint = f"ipc://@distbelief-bench-sink-{os.getpid()}"
        pair.bind(endpoint)
    station.say(endpoint=endpoint)
    total = 0
    while not station.seat.is_stopped:
        if pair.poll(50):
            frame = pair.recv(copy=False)
            if len(frame):
                total += len(frame)
            else:
                pair.send(LENGTH.pack(total))


def _serve_socket(station: Station) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    station.say(port=listener.getsockname()[1])
    link, _ = listener.accept()
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer, head = memoryview(bytearray(_BUFFER)), memoryview(bytearray(LENGTH.size))
    total = 0
    while receive(link, head):
        (left,) = LENGTH.unpack(head)
        if not left:
            link.sendall(LENGTH.pack(total))
        total += left
        while left:
            count = min(left, _BUFFER)
            if not receive(link, buffer[:count]):
                return
            left -= count


def receive(link: socket.socket, into: memoryview) -> bool:
    """Fill it. Returns: False where the other side has closed."""
    while len(into):
        count = link.recv_into(into, len(into), socket.MSG_WAITALL)
        if not count:
            return False
        into = into[count:]
    return True
