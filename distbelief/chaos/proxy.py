"""Proxy: TCP between the workers and one shard, that does what networks do to connections.

It cuts them without either end noticing: nothing passes, in one direction or both, and new
connections are taken and left in silence, as where packets are lost. It ends them while replies
are on their way. And it takes whole messages out of the middle, which TCP does not do but what
stands behind it may: ZeroMQ drops what does not fit into a queue.
"""

import contextlib
import select
import socket
import threading
from collections.abc import Callable

CHUNK = 65536
DIRECTIONS = ("both", "to-shard", "from-shard")
GREETING = 64
"""Bytes at the beginning of a ZeroMQ connection that are no frames (ZMTP 3.1)."""
MORE, LONG, COMMAND = 1, 2, 4
FOLLOWING_S = 0.1
"""A message is lost only if another one comes within this time: its receiver can see the hole."""


class Proxy:
    """Forwards every connection to a port of this host, in threads of its own."""

    def __init__(self, target: Callable[[], int], host: str = "127.0.0.1") -> None:
        """target: asked for the shard's port at each connection."""
        self._target = target
        self._host = host
        self._listener = socket.create_server((host, 0), backlog=4096)
        self.port: int = self._listener.getsockname()[1]
        self._passes = {"to-shard": threading.Event(), "from-shard": threading.Event()}
        for event in self._passes.values():
            event.set()
        self.cut_after: int | None = None
        """End the next connection after so many bytes, at least 1, in one direction; once."""
        self.cut_direction = "to-shard"
        """In which direction they are counted."""
        self.num_connections = 0
        """Taken so far."""
        self.lose_next = 0
        """So many of the next connections lose the first message after the one that opens them."""
        self.num_lost = 0
        """Messages taken out so far."""
        self._is_closed = False
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def cut(self, direction: str = "both") -> None:
        """Let nothing pass."""
        for name, event in self._passes.items():
            if direction in ("both", name):
                event.clear()

    def mend(self) -> None:
        """Let everything pass again."""
        for event in self._passes.values():
            event.set()

    def drop(self) -> None:
        """End every connection at once, with all that is on its way, and let new ones pass."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for sock in sockets:
            _end(sock)
        self.mend()

    def close(self) -> None:
        self._is_closed = True
        _end(self._listener)
        self.drop()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        for event in self._passes.values():
            event.wait()
        try:
            server = socket.create_connection((self._host, self._target()), timeout=5)
        except OSError:
            _end(client)
            return
        server.settimeout(None)
        for sock in (client, server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._sockets |= {client, server}
            limit, self.cut_after = self.cut_after, None
            is_losing = self.lose_next > 0
            self.lose_next -= is_losing
        is_to_shard = self.cut_direction == "to-shard"
        there, back = (limit, None) if is_to_shard else (None, limit)
        pump = self._lose_one if is_losing else self._copy
        arguments = (pump, client, server, self._passes["to-shard"], there)
        threading.Thread(target=self._pump, args=arguments, daemon=True).start()
        self._pump(self._copy, server, client, self._passes["from-shard"], back)

    def _pump(
        self,
        pump: Callable[[socket.socket, socket.socket, threading.Event, int | None], None],
        source: socket.socket,
        sink: socket.socket,
        passes: threading.Event,
        limit: int | None,
    ) -> None:
        with contextlib.suppress(OSError):
            pump(source, sink, passes, limit)
        with self._lock:
            self._sockets -= {source, sink}
        for sock in (source, sink):
            _end(sock)

    def _copy(
        self, source: socket.socket, sink: socket.socket, passes: threading.Event, limit: int | None
    ) -> None:
        while data := source.recv(CHUNK if limit is None else max(1, min(CHUNK, limit))):
            passes.wait()
            sink.sendall(data)
            if limit is not None:
                limit -= len(data)
                if limit <= 0:
                    return

    def _lose_one(
        self, source: socket.socket, sink: socket.socket, passes: threading.Event, limit: int | None
    ) -> None:
        """Copy, without the second message."""
        reader = _Reader(source)
        for _ in range(GREETING):  # each end waits for some of the other's before it goes on
            sink.sendall(reader.take(1))
        is_second = False
        while True:
            message, is_command = reader.message()
            if not is_command and is_second and reader.has_more(FOLLOWING_S):
                self.num_lost += 1
                break
            passes.wait()
            sink.sendall(message)
            is_second = is_second or not is_command
        self._copy(source, sink, passes, limit)


class _Reader:
    """Cuts one direction of a ZeroMQ connection into messages."""

    def __init__(self, source: socket.socket) -> None:
        self._source = source

    def has_more(self, timeout_s: float) -> bool:
        return bool(select.select([self._source], [], [], timeout_s)[0])

    def take(self, size: int) -> bytes:
        """Raises: OSError at the end."""
        found = bytearray()
        while len(found) < size:
            data = self._source.recv(size - len(found))
            if not data:
                raise ConnectionResetError("the end")
            found += data
        return bytes(found)

    def message(self) -> tuple[bytes, bool]:
        """All frames of the next message as they came, and whether it is one of ZeroMQ's own."""
        found = bytearray()
        while True:
            flags = self.take(1)
            length = self.take(8 if flags[0] & LONG else 1)
            found += flags + length + self.take(int.from_bytes(length, "big"))
            if not flags[0] & MORE:
                return bytes(found), bool(flags[0] & COMMAND)


def _end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
