"""Transport: the seam between messages and the network: ROUTER/DEALER over ZeroMQ, or memory.

A server transport has one inbox and many peers; a client transport has numbered links, one to
each server, and one inbox for all of them. Frames are bytes-like; the first is the header.
Settings of ZeroMQ and their reasons stand beside them: the defaults lose or hoard messages.
"""

import contextlib
import ctypes
import errno
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import zmq

from distbelief.param_server.errors import RemoteProtocolError

Frame = bytes | memoryview

FRAMES_MAX = 4097
"""Header and payload frames of one message; more are read and thrown away."""

HWM = 64
"""Messages queued per peer. The real bound are the requests a client may have open (client.py)."""

FRAME_MAX = 64 * 2**20
"""Longest frame taken, in bytes. Longer ones close the connection before they are read."""

COPY_BELOW = 65_536
"""pyzmq copies smaller frames on sending anyway; larger ones are sent from where they lie."""


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_MALLOC_KEEPS = 32 * 2**20
"""The most that glibc takes as a threshold."""


def keep_freed_memory() -> None:
    """Have malloc keep what ZeroMQ frees for the next message. For a whole process, at its start.

    By default glibc gives every received megabyte back to the kernel, and the next one has to be
    mapped and zeroed again: 2,000 to 4,700 page faults for each push and fetch of 28 MB.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc: slower, not wrong
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_THRESHOLD, _MALLOC_KEEPS)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


class Delivery(Protocol):
    """Tells when the memory of a sent message is free again. Not whether it arrived."""

    @property
    def is_done(self) -> bool: ...


class ServerTransport(Protocol):
    """One inbox, many peers. Used by one thread."""

    @property
    def endpoint(self) -> str: ...

    def recv(self, timeout_s: float) -> tuple[bytes, list[Frame]] | None:
        """The next message as (peer, frames), or None after the time-out.

        Raises: RemoteProtocolError if a message had too many frames; it is gone then.
        """
        ...

    def send(self, peer: bytes, frames: Sequence[Frame]) -> Delivery | None:
        """Send without waiting. None if the peer is gone or too slow: it will ask again."""
        ...

    def close(self) -> None: ...


class ClientTransport(Protocol):
    """Numbered links to servers, one inbox. Used by one thread, except for `wake`."""

    def connect(self, link: int, endpoint: str) -> None:
        """Open a link; an open link of that number is closed first and its queue forgotten."""
        ...

    def send(self, link: int, frames: Sequence[Frame]) -> None: ...

    def recv(self, timeout_s: float) -> tuple[int, list[Frame]] | None:
        """The next message as (link, frames), or None after the time-out or a `wake`."""
        ...

    def wake(self) -> None:
        """Make a `recv` that waits return. Any thread may call it."""
        ...

    def close(self) -> None: ...


class _Sent:
    """Delivery of one multipart message, by its last large frame: they are written in order."""

    def __init__(self, tracker: zmq.MessageTracker | None) -> None:
        self._tracker = tracker

    @property
    def is_done(self) -> bool:
        return self._tracker is None or self._tracker.done


def _configure(sock: zmq.Socket[bytes]) -> None:
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.SNDHWM, HWM)
    sock.setsockopt(zmq.RCVHWM, HWM)
    sock.setsockopt(zmq.MAXMSGSIZE, FRAME_MAX)  # default: a header may claim terabytes
    sock.setsockopt(zmq.HANDSHAKE_IVL, 3000)  # silent connections are closed after 3 s, not 30
    # A frozen or cut peer: found after 10 s. The I/O thread answers, so a long step, which may
    # hold the interpreter, does not look dead.
    sock.setsockopt(zmq.HEARTBEAT_IVL, 2000)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)
    sock.setsockopt(zmq.HEARTBEAT_TTL, 10_000)
    sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
    sock.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)


def _recv_frames(sock: zmq.Socket[bytes], keep: int) -> list[zmq.Frame]:
    """All frames of a message that is there; beyond `keep` they are dropped as they come.

    `recv_multipart` would first build a list of whatever number a peer cares to send.
    """
    frames: list[zmq.Frame] = []
    too_many = False
    while True:
        frame = sock.recv(copy=False)
        if len(frames) < keep:
            frames.append(frame)
        else:
            too_many = True
        if not frame.more:
            break
    if too_many:
        raise RemoteProtocolError(f"a message of more than {keep} frames")
    return frames


def _send_frames(
    sock: zmq.Socket[bytes], frames: Sequence[Frame | bytes], flags: int, *, track: bool
) -> _Sent:
    """Send, large frames from where they lie. track: tell when their memory is free again.

    pyzmq's tracker of a whole multipart message is that of its last frame, whatever its size.
    """
    large = [memoryview(frame).nbytes >= COPY_BELOW for frame in frames]
    last = len(frames) - 1
    tracked = max((i for i, is_large in enumerate(large) if is_large), default=-1) if track else -1
    tracker = None
    for i, frame in enumerate(frames):
        more = flags | (zmq.SNDMORE if i < last else 0)
        if i == tracked:
            tracker = sock.send(frame, more, copy=False, track=True)
        else:
            sock.send(frame, more, copy=not large[i])
    return _Sent(tracker)


class ZmqServer:
    """ROUTER socket. Bind to a loopback address unless the job says otherwise."""

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", host: str = "127.0.0.1", port: int = 0
    ) -> None:
        """Bind to a port of `host`, an address of this machine; 0 takes a free one.

        Raises: OSError if the port is in use.
        """
        self._socket = context.socket(zmq.ROUTER)
        _configure(self._socket)
        # Without it a reply to a vanished peer is dropped silently; with it we see and count.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.BACKLOG, 4096)  # 1,000 workers connect in 0.2 s, not 1.4 s
        if ":" in host:
            self._socket.setsockopt(zmq.IPV6, 1)
            host = f"[{host}]"
        try:
            if port:
                self._socket.bind(f"tcp://{host}:{port}")
            else:
                port = self._socket.bind_to_random_port(f"tcp://{host}")
        except zmq.ZMQError as error:
            self._socket.close()
            raise OSError(error.errno, os.strerror(error.errno or 0)) from error
        self.endpoint = f"tcp://{host}:{port}"
        self._timeout_ms = -1

    def recv(self, timeout_s: float) -> tuple[bytes, list[Frame]] | None:
        timeout_ms = int(timeout_s * 1000)
        if timeout_ms != self._timeout_ms:
            self._socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
            self._timeout_ms = timeout_ms
        try:
            frames = _recv_frames(self._socket, FRAMES_MAX + 1)
        except zmq.Again:
            return None
        peer: bytes = frames[0].bytes
        return peer, [frame.buffer for frame in frames[1:]]

    def send(self, peer: bytes, frames: Sequence[Frame]) -> Delivery | None:
        try:
            return _send_frames(self._socket, [peer, *frames], zmq.DONTWAIT, track=True)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH, errno.ECONNRESET):
                return None
            raise

    def close(self) -> None:
        self._socket.close()


class ZmqClient:
    """One DEALER a link, and a socket pair that `wake` writes to."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self._context = context
        self._links: dict[int, zmq.Socket[bytes]] = {}
        self._poller = zmq.Poller()
        self._waker, self._bell = socket.socketpair()
        self._waker.setblocking(False)
        self._bell.setblocking(False)
        self._poller.register(self._bell, zmq.POLLIN)
        self._ready: deque[int] = deque()

    def connect(self, link: int, endpoint: str) -> None:
        self._disconnect(link)
        dealer = self._context.socket(zmq.DEALER)
        _configure(dealer)
        dealer.setsockopt(zmq.RECONNECT_IVL, 50)
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        if "[" in endpoint:
            dealer.setsockopt(zmq.IPV6, 1)
        dealer.connect(endpoint)
        self._poller.register(dealer, zmq.POLLIN)
        self._links[link] = dealer

    def send(self, link: int, frames: Sequence[Frame]) -> None:
        _send_frames(self._links[link], frames, 0, track=False)

    def recv(self, timeout_s: float) -> tuple[int, list[Frame]] | None:
        if not self._ready:
            events = dict(self._poller.poll(int(timeout_s * 1000)))
            if self._bell.fileno() in events or self._bell in events:
                self._bell.recv(4096)
            self._ready.extend(link for link, dealer in self._links.items() if dealer in events)
        if not self._ready:
            return None
        link = self._ready.popleft()
        return link, [frame.buffer for frame in _recv_frames(self._links[link], FRAMES_MAX)]

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake already; closed: nobody waits
            self._waker.send(b"!")

    def close(self) -> None:
        for link in list(self._links):
            self._disconnect(link)
        self._poller.unregister(self._bell)
        self._waker.close()
        self._bell.close()

    def _disconnect(self, link: int) -> None:
        # A kept DEALER would deliver, after a reconnect, the later half of its queue without
        # the message that was on the way when the peer died: so queue and socket go together.
        dealer = self._links.pop(link, None)
        if dealer is not None:
            self._poller.unregister(dealer)
            dealer.close()
            self._ready = deque(other for other in self._ready if other != link)


Handler = Callable[[bytes, list[Frame]], Sequence[Frame] | None]


class MemoryClient:
    """Links straight into handlers of this process: no sockets, no threads, no waiting.

    handlers: endpoint -> function (peer, frames) -> reply's frames, or None for no reply.
    Each `send` runs the handler at once. `lose_request` and `lose_reply` may each be told to
    lose the n-th message (from 0, over all links), for tests of what a retry does.
    """

    def __init__(self, handlers: dict[str, Handler]) -> None:
        self._handlers = handlers
        self._links: dict[int, tuple[str, bytes]] = {}
        self._inbox: deque[tuple[int, list[Frame]]] = deque()
        self._num_peers = 0
        self._num_sent = 0
        self.lose_request: set[int] = set()
        self.lose_reply: set[int] = set()

    def connect(self, link: int, endpoint: str) -> None:
        self._num_peers += 1
        self._inbox = deque(item for item in self._inbox if item[0] != link)
        self._links[link] = (endpoint, f"{id(self)}-{self._num_peers}".encode())

    def send(self, link: int, frames: Sequence[Frame]) -> None:
        number, self._num_sent = self._num_sent, self._num_sent + 1
        if number in self.lose_request:
            return
        endpoint, peer = self._links[link]
        reply = self._handlers[endpoint](peer, [bytes(frame) for frame in frames])
        if reply is not None and number not in self.lose_reply:
            self._inbox.append((link, [bytes(frame) for frame in reply]))

    def recv(self, timeout_s: float) -> tuple[int, list[Frame]] | None:
        return self._inbox.popleft() if self._inbox else None

    def wake(self) -> None:
        pass

    def close(self) -> None:
        self._links.clear()
