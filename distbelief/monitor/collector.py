"""Collector: takes the reports of workers and shards. What is no report of this run is counted.

It is never anybody's duty to be read: workers and shards throw away what is not taken.
"""

import hmac
import logging
from collections import Counter

import zmq

from distbelief.monitor.decoder import decode_report
from distbelief.param_server.curve import Doorkeeper, DoorkeeperFailed, Keys
from distbelief.param_server.errors import RemoteProtocolError
from distbelief.param_server.report import AnyReport
from distbelief.param_server.wire import HEADER_MAX

logger = logging.getLogger(__name__)

QUEUE = 4
"""Reports of one process that wait here; the next ones wait there, and are dropped."""


class Collector:
    """PULL socket. Used by one thread."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        run: str,
        token: str,
        host: str = "127.0.0.1",
        wish: int = 0,
        keys: Keys | None = None,
    ) -> None:
        """wish: the port that would be best, where another is not taken; 0 for any.

        keys: encrypt, and take reports of those alone whose key is listed in them.
        Raises: OSError if nothing can be bound; DoorkeeperFailed if strangers would be let in.
        """
        self.counts: Counter[str] = Counter()
        """What was no report: `junk`, `strangers`."""
        self._run = run
        self._token = token.encode()
        self._doorkeeper = None if keys is None else Doorkeeper(context, keys)
        self._socket = context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, QUEUE)
        self._socket.setsockopt(zmq.MAXMSGSIZE, HEADER_MAX)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, 3000)
        # For a thousand peers each 2 s it is 2.5 % of a core; what dies here holds a file alone.
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, 20_000)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 60_000)
        self._socket.setsockopt(zmq.BACKLOG, 4096)
        if self._doorkeeper is not None:
            self._doorkeeper.watch_(self._socket)
        if ":" in host:
            self._socket.setsockopt(zmq.IPV6, 1)
            host = f"[{host}]"
        try:
            port = self._bind(host, wish)
            self.endpoint = f"tcp://{host}:{port}"
            if self._doorkeeper is not None:
                self._doorkeeper.test(self.endpoint, zmq.PUSH)
        except (zmq.ZMQError, DoorkeeperFailed):
            self.close()
            raise

    def recv(self, timeout_s: float) -> AnyReport | None:
        """The next report; None after the time-out, or for what was none."""
        if timeout_s and not self._socket.poll(round(timeout_s * 1000)):
            return None
        try:
            frame = self._socket.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        data, speaker = frame.bytes, None
        if self._doorkeeper is not None:
            speaker = str(frame.get("User-Id"))
        while frame.more:  # no report has a second frame
            frame = self._socket.recv(copy=False)
        try:
            report = decode_report(data)
        except RemoteProtocolError as error:
            self.counts["junk"] += 1
            logger.debug("junk: %s", error)
            return None
        is_ours = report.run == self._run and hmac.compare_digest(
            report.token.encode(), self._token
        )
        if not is_ours or speaker not in (None, report.name):
            self.counts["strangers"] += 1
            return None
        return report

    def close(self) -> None:
        self._socket.close()
        if self._doorkeeper is not None:
            self._doorkeeper.close()

    def _bind(self, host: str, wish: int) -> int:
        if wish:
            try:
                self._socket.bind(f"tcp://{host}:{wish}")
                return wish
            except zmq.ZMQError as error:
                logger.warning("port %d is taken (%s): another one is used", wish, error.strerror)
        return int(self._socket.bind_to_random_port(f"tcp://{host}"))
