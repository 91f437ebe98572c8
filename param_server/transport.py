"""Transport: the seam between messages and the network: ROUTER/DEALER over ZeroMQ, or memory.

A server transport has one inbox and many peers; a client transport has numbered links, one to
each server, and one inbox for all of them. Frames are bytes-like; the first is the header.
Settings of ZeroMQ and their reasons stand beside them: the defaults lose or hoard messages.
"""

import contextlib
import ctypes
import errno
import logging
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import zmq
from zmq.utils.monitor import parse_monitor_message

from distbelief.param_server.curve import HANDSHAKES, Doorkeeper, DoorkeeperFailed, Keys
from distbelief.param_server.errors import RemoteProtocolError
from distbelief.param_server.intake import Intake

logger = logging.getLogger(__name__)

Frame = bytes | memoryview

FRAMES_MAX = 4097
"""Header and payload frames of one message; more are read and thrown away."""

HWM = 64
"""Messages queued per peer. The real bound are the requests a client may have open (client.py)."""

FRAME_MAX = 64 * 2**20
"""Longest frame taken, in bytes. Longer ones close the connection before they are read."""

FRAME_HEAD = 2
"""Bytes before each frame on its way, at least."""

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

    @property
    def speaker(self) -> str | None:
        """Whose key sent what `recv` returned last; None where there are no keys."""
        ...

    def recv(self, timeout_s: float) -> tuple[bytes, list[Frame]] | None:
        """The next message as (peer, frames), or None after the time-out.

        Raises: RemoteProtocolError if a message had too many frames; it is gone then.
        """
        ...

    def send(self, peer: bytes, frames: Sequence[Frame]) -> Delivery | None:
        """Send without waiting. None if the peer is gone or too slow: it will ask again."""
        ...

    def bound_intake(self, allowance: Callable[[bytes], int]) -> int:
        """End connections that bring more than whole messages; see intake.py. Often.

        Returns: how many were ended so far.
        """
        ...

    def close(self) -> None: ...


class ClientTransport(Protocol):
    """Numbered links to servers, one inbox. Used by one thread, except for `wake`."""

    def connect(self, link: int, endpoint: str) -> None:
        """Open a link; an open link of that number is closed first and its queue forgotten."""
        ...

    def send(self, link: int, frames: Sequence[Frame]) -> None: ...

    def recv(self, timeout_s: float) -> tuple[int, list[Frame]] | None:
        """The next message as (link, frames), or None after the time-out or a `wake`.

        Without frames: the link was cut. It is connected again by itself, but what was on its way
        is gone: open a new one.
        """
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


def _recv_frames(sock: zmq.Socket[bytes], keep: int) -> tuple[list[zmq.Frame], int]:
    """All frames of a message that is there, and how many bytes it had on its way.

    Beyond `keep` they are dropped as they come; `recv_multipart` would first build a list of
    whatever number a peer cares to send.
    """
    frames: list[zmq.Frame] = []
    size = num_frames = 0
    while True:
        frame = sock.recv(copy=False)
        num_frames += 1
        size += len(frame)
        if len(frames) < keep:
            frames.append(frame)
        if not frame.more:
            return frames, size + num_frames * FRAME_HEAD


def _descriptor(frame: zmq.Frame) -> int:
    """Of the connection that a frame came through; -1 where ZeroMQ does not say."""
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:  # of a peer that speaks ZMTP 1 or 2
        return -1


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


_GONE = (zmq.EHOSTUNREACH, errno.ECONNRESET)


class ZmqServer:
    """ROUTER socket. Bind to a loopback address unless the job says otherwise."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        host: str = "127.0.0.1",
        port: int = 0,
        keys: Keys | None = None,
    ) -> None:
        """Bind to a port of `host`, an address of this machine; 0 takes a free one.

        keys: encrypt, and let in only whose key is listed in them; one such server a context. None
        lets everybody in, and what is sent can be read on the way.
        Raises: OSError if the port is in use; DoorkeeperFailed if strangers would be let in.
        """
        self.speaker: str | None = None
        self._doorkeeper = Doorkeeper(context, keys) if keys is not None else None
        self._socket = context.socket(zmq.ROUTER)
        _configure(self._socket)
        if self._doorkeeper is not None:
            self._doorkeeper.watch_(self._socket)
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
            self.close()
            raise OSError(error.errno, os.strerror(error.errno or 0)) from error
        self.endpoint = f"tcp://{host}:{port}"
        self._timeout_ms = -1
        self._intake = Intake(port, time.monotonic)
        if self._doorkeeper is not None:
            try:
                self._doorkeeper.test(self.endpoint)
            except DoorkeeperFailed:
                self.close()
                raise

    def recv(self, timeout_s: float) -> tuple[bytes, list[Frame]] | None:
        timeout_ms = int(timeout_s * 1000)
        if timeout_ms != self._timeout_ms:
            self._socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
            self._timeout_ms = timeout_ms
        try:
            frames, size = _recv_frames(self._socket, FRAMES_MAX + 1)
        except zmq.Again:
            return None
        peer: bytes = frames[0].bytes
        if len(frames) > 1:
            fd = -1 if self._intake.knows(peer) else _descriptor(frames[1])
            self._intake.note(peer, size - len(peer), fd)
        if frames[-1].more:  # the others are gone
            raise RemoteProtocolError(f"a message of more than {FRAMES_MAX} frames")
        if self._doorkeeper is not None:
            self.speaker = str(frames[-1].get("User-Id"))
        return peer, [frame.buffer for frame in frames[1:]]

    def wait(self, timeout_s: float, descriptor: int) -> None:
        """Until a message is there, or something on the descriptor, or the time is over."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(descriptor, zmq.POLLIN)
        poller.poll(round(timeout_s * 1000))

    def send(self, peer: bytes, frames: Sequence[Frame]) -> Delivery | None:
        whole = [peer, *frames]
        try:
            return _send_frames(self._socket, whole, zmq.DONTWAIT, track=True)
        except zmq.Again:
            # Of a peer that answers quickly, libzmq may not have looked yet whether it has read:
            # 15 of 10,000 small replies were refused. Asking for the events has it look.
            self._socket.getsockopt(zmq.EVENTS)
        except zmq.ZMQError as error:
            if error.errno in _GONE:
                return None
            raise
        try:
            return _send_frames(self._socket, whole, zmq.DONTWAIT, track=True)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, *_GONE):
                return None
            raise

    def bound_intake(self, allowance: Callable[[bytes], int]) -> int:
        self._intake.look(allowance)
        return self._intake.num_ended

    def close(self) -> None:
        self._socket.close()
        if self._doorkeeper is not None:
            self._doorkeeper.close()


_REFUSED: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "does not know our key",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "encrypts and this side does not, or the other way round",
}


class ZmqClient:
    """One DEALER a link, and a socket pair that `wake` writes to."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", keys: Keys | None = None) -> None:
        """keys: those to show, and of the servers that may be spoken to; None speaks clear."""
        self._context = context
        self._keys = keys
        self._is_through: dict[int, bool] = {}
        """By link: the handshake was a success."""
        self._warned: set[str] = set()
        """Servers whose refusal was told."""
        self._links: dict[int, zmq.Socket[bytes]] = {}
        self._monitors: dict[int, zmq.Socket[bytes]] = {}
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
        dealer.setsockopt(zmq.RECONNECT_IVL, 20)
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 200)  # a shard is back within half a second
        if "[" in endpoint:
            dealer.setsockopt(zmq.IPV6, 1)
        if self._keys is not None:
            self._keys.connect_(dealer)
        # A peer that was killed is known at once, and not only when its answer is overdue.
        monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED | HANDSHAKES)
        dealer.connect(endpoint)
        self._poller.register(dealer, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)
        self._links[link], self._monitors[link] = dealer, monitor
        self._is_through[link] = False

    def send(self, link: int, frames: Sequence[Frame]) -> None:
        _send_frames(self._links[link], frames, 0, track=False)

    def recv(self, timeout_s: float) -> tuple[int, list[Frame]] | None:
        deadline = time.monotonic() + timeout_s
        while not self._ready:
            left_s = max(0.0, deadline - time.monotonic())
            events = dict(self._poller.poll(int(left_s * 1000)))
            is_woken = self._bell.fileno() in events or self._bell in events
            if is_woken:
                self._bell.recv(4096)
            self._ready.extend(link for link, dealer in self._links.items() if dealer in events)
            if not self._ready:  # what has come before a cut is read first
                for link, monitor in self._monitors.items():
                    if monitor in events and self._is_cut(link, monitor):
                        return link, []
                if is_woken or not events:
                    return None
        link = self._ready.popleft()
        frames, _ = _recv_frames(self._links[link], FRAMES_MAX)
        if frames[-1].more:  # the others are gone
            raise RemoteProtocolError(f"a message of more than {FRAMES_MAX} frames")
        return link, [frame.buffer for frame in frames]

    def _is_cut(self, link: int, monitor: "zmq.Socket[bytes]") -> bool:
        """Take in what has happened to a link; True if something on its way may be lost.

        Nothing is where the handshake has failed: ZeroMQ keeps what waits, and tries again in a
        while. A new link would try at once, and so without end.
        """
        told = parse_monitor_message(monitor.recv_multipart())
        event, was_through = told["event"], self._is_through[link]
        self._is_through[link] = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
        server = told["endpoint"].decode()
        if event in _REFUSED and server not in self._warned:
            self._warned.add(server)
            logger.warning("%s %s", server, _REFUSED[event])
        return event == zmq.EVENT_DISCONNECTED and was_through

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
            monitor = self._monitors.pop(link)
            for sock in (dealer, monitor):
                self._poller.unregister(sock)
            dealer.disable_monitor()
            monitor.close()
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

    def cut(self, link: int) -> None:
        """Lose what is on its way to this side, and tell it that the link was cut."""
        self._inbox = deque(item for item in self._inbox if item[0] != link)
        self._inbox.append((link, []))

    def wake(self) -> None:
        pass

    def close(self) -> None:
        self._links.clear()
