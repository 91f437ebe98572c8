"""Reporter: sends reports to the monitor about once a second, and never waits for anything.

What the monitor does not take at once is thrown away and counted: a monitor that was killed, or
stands still, costs its reports and nothing else. It is found again by itself on its port.
"""

import contextlib
import logging
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from typing import Protocol, TypedDict

import zmq

from distbelief.param_server.curve import Keys
from distbelief.param_server.identity import Identity
from distbelief.param_server.report import EVERY_S, AnyReport
from distbelief.param_server.wire import encode

logger = logging.getLogger(__name__)

QUEUE = 2
"""Reports that wait for the monitor at most; the next ones are dropped."""


class Head(TypedDict):
    """The fields that every report begins with."""

    run: str
    token: str
    name: str
    inc: int
    n: int
    at: float
    span_s: float
    pid: int
    host: str
    rss_bytes: int


class Sender(Protocol):
    """Where reports go."""

    def send(self, data: bytes) -> bool:
        """Without waiting; False: nobody took it."""
        ...

    def close(self) -> None: ...


class ZmqSender:
    """PUSH socket. Made and used by one thread."""

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, keys: Keys | None = None
    ) -> None:
        """keys: those to show; None speaks clear."""
        self._socket = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for who is not there
        self._socket.setsockopt(zmq.RECONNECT_IVL, 200)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 2000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 10_000)
        if "[" in endpoint:
            self._socket.setsockopt(zmq.IPV6, 1)
        if keys is not None:
            keys.connect_(self._socket)
        self._socket.connect(endpoint)

    def send(self, data: bytes) -> bool:
        try:
            self._socket.send(data, zmq.DONTWAIT)
        except zmq.ZMQError:  # nobody there, or not reading
            return False
        return True

    def close(self) -> None:
        self._socket.close()


class Reporter:
    """See the top of this file. Used by one thread."""

    def __init__(
        self,
        sender: Sender,
        identity: Identity,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """sender: closed by `close`. identity: whose reports these are."""
        self.num_dropped = 0
        self._sender = sender
        self._identity = identity
        self._every_s = every_s
        self._clock = clock
        self._wall = wall
        self._told_at = clock()
        self._n = 0
        self._host = socket.gethostname()

    @property
    def is_due(self) -> bool:
        return self._clock() - self._told_at >= self._every_s

    def tell(self, make: Callable[[Head], AnyReport]) -> None:
        """Make a report and send it. Whatever goes wrong in it is not training's business."""
        now = self._clock()
        self._n += 1
        me = self._identity
        head = Head(
            run=me.run,
            token=me.token,
            name=me.w,
            inc=me.inc,
            n=self._n,
            at=self._wall(),
            span_s=now - self._told_at,
            pid=os.getpid(),
            host=self._host,
            rss_bytes=_rss_bytes(),
        )
        self._told_at = now
        try:
            data = encode(make(head))
        except ValueError as error:  # of a value that no field can carry
            logger.debug("no report: %s", error)
            self.num_dropped += 1
            return
        if not self._sender.send(data):
            self.num_dropped += 1

    def close(self) -> None:
        self._sender.close()


def _rss_bytes() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the nearest that there is
    return peak if sys.platform == "darwin" else peak * 1024
