"""Curve: keys of CurveZMQ, and the doorkeeper that lets in only whose key is listed.

    client                        server
    its pair, server's public     its pair, names by public key
       hello, vouch ───────────►  is there a name for that key?   no: closed, status 400
       ◄────────── ready          yes: every message carries the name

Both sides prove themselves and what passes is encrypted. Keys are Z85: 40 printable characters.

CURVE alone lets in every key. Who may come in is asked of a thread (ZAP), and where that thread is
missing or has died libzmq lets everybody in, unless ZAP_ENFORCE_DOMAIN is set together with a
domain that is not empty. So both are, the thread's answer cannot raise, it is there before the
socket is bound, and a server that lets a throw-away key in does not serve.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from distbelief.param_server.errors import DistBeliefError
from distbelief.param_server.secret import Secret

logger = logging.getLogger(__name__)

LIBZMQ_MIN = (4, 3, 5)
"""Servers of libzmq before 4.3.2 and 4.3.3 could be crashed by anybody (CVE-2019-13132,
CVE-2020-15166)."""
DOMAIN = "distbelief"
KEY_LENGTH = 40
SELF_TEST_S = 5.0
"""For one handshake with ourselves; it takes some milliseconds."""


class DoorkeeperFailed(DistBeliefError):
    """The doorkeeper does not keep strangers out, or cannot be had: this process must not serve."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A public key and its secret one."""

    public: str
    secret: Secret

    @classmethod
    def new(cls) -> "Pair":
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), Secret(secret.decode()))

    @classmethod
    def of(cls, secret: str) -> "Pair":
        """The pair of a secret key. Raises: ValueError if it is none."""
        try:
            if len(secret) != KEY_LENGTH:
                raise ValueError(f"{len(secret)} characters")
            return cls(zmq.curve_public(secret.encode("ascii")).decode(), Secret(secret))
        except (ValueError, KeyError, zmq.ZMQError):  # its own text might quote the key
            raise ValueError(f"not a key: {KEY_LENGTH} characters of Z85 are expected") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """What one process of a run has to know of keys."""

    mine: Pair
    """With which it connects to others."""
    server: str
    """Public key of all servers of the run."""
    serving: Secret | None = None
    """Their secret key, for a process that is one."""
    names: Mapping[str, str] = field(default_factory=dict)
    """By public key, the name of who may connect to it."""

    def to_dict(self) -> dict[str, Any]:  # Any: JSON
        """As JSON, with the secrets in it."""
        return {
            "mine": self.mine.secret,
            "server": self.server,
            "serving": self.serving,
            "names": dict(self.names),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Keys":  # Any: JSON
        serving = data["serving"]
        return cls(
            mine=Pair.of(data["mine"]),
            server=data["server"],
            serving=None if serving is None else Secret(serving),
            names=data["names"],
        )

    def connect_(self, sock: "zmq.Socket[bytes]") -> None:
        """Have a socket show this key and accept no other server. Before it connects."""
        sock.setsockopt(zmq.CURVE_PUBLICKEY, self.mine.public.encode())
        sock.setsockopt(zmq.CURVE_SECRETKEY, self.mine.secret.encode())
        sock.setsockopt(zmq.CURVE_SERVERKEY, self.server.encode())


def missing() -> str:
    """What connections need to be encrypted and this Python has not; empty if it has all."""
    if not zmq.has("curve"):
        return f"pyzmq {zmq.__version__} was built without CURVE"
    if zmq.zmq_version_info() < LIBZMQ_MIN:
        oldest = ".".join(map(str, LIBZMQ_MIN))
        return f"pyzmq {zmq.__version__} has libzmq {zmq.zmq_version()}, older than {oldest}"
    return ""


class _Authenticator(ThreadAuthenticator):
    """pyzmq's, which is given names for keys."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", names: Mapping[str, str]) -> None:
        super().__init__(context=context)
        self.configure_curve_callback(DOMAIN, self)
        self.own_test = b""
        """The key of our own test, whose refusal is no news."""
        self._names = names
        self._num_refused = 0

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a key is listed. An exception would end the thread, so there is none."""
        name = self._name_of(key)
        if not name and key != self.own_test:
            self._num_refused += 1
            if self._num_refused & (self._num_refused - 1) == 0:  # 1, 2, 4, 8 ...: no flood
                logger.warning("key %r is not listed; refused=%d", key, self._num_refused)
        return bool(name)

    def curve_user_id(self, client_public_key: bytes) -> str:
        return self._name_of(z85.encode(client_public_key))

    def stop(self) -> None:
        if self.pipe and not self.is_alive():
            self.pipe.close()  # pyzmq would wait for ever until a thread that has died takes leave
            self.pipe = None  # type: ignore[assignment]  # as pyzmq does it
        super().stop()

    def _name_of(self, key: bytes) -> str:
        try:
            return self._names.get(key.decode("ascii"), "")
        except Exception:  # whatever it is: who cannot be looked up is not let in
            logger.exception("a key cannot be looked up")
            return ""


class Doorkeeper:
    """Answers, for all sockets of one context, who may come in. Close it after them."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", keys: Keys) -> None:
        """Raises: DoorkeeperFailed where libzmq cannot encrypt."""
        assert keys.serving is not None, "these keys are of a process that does not serve"
        lacking = missing()
        if lacking:
            raise DoorkeeperFailed(f"connections cannot be encrypted: {lacking}")
        self._context = context
        self._keys = keys
        self.authenticator = _Authenticator(context, keys.names)
        self.authenticator.start()

    def watch_(self, sock: "zmq.Socket[bytes]") -> None:
        """Have a socket take nobody whom the doorkeeper does not let in. Before it is bound."""
        assert self._keys.serving is not None
        sock.setsockopt(zmq.CURVE_SERVER, 1)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self._keys.serving.encode())
        sock.setsockopt(zmq.ZAP_DOMAIN, DOMAIN.encode())
        sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def test(self, endpoint: str, kind: int = zmq.DEALER) -> None:
        """Knock at a bound socket with a key that nobody has listed.

        kind: of socket that may connect to it.
        Raises: DoorkeeperFailed if anything but a refusal comes of it.
        """
        knocking = Keys(mine=Pair.new(), server=self._keys.server)
        self.authenticator.own_test = knocking.mine.public.encode()
        event = knock(self._context, endpoint, knocking, kind)
        if event != zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise DoorkeeperFailed(
                f"{endpoint} did not refuse a key that is not listed (event {event}): it would "
                "let strangers in, so nothing is served there"
            )

    def close(self) -> None:
        """May be called twice."""
        self.authenticator.stop()


def knock(
    context: "zmq.Context[zmq.Socket[bytes]]",
    endpoint: str,
    keys: Keys | None,
    kind: int = zmq.DEALER,
) -> int | None:
    """Shake hands with a server, by keys or in the clear, and go.

    kind: of socket that the server takes.
    Returns: zmq.EVENT_HANDSHAKE_SUCCEEDED, EVENT_HANDSHAKE_FAILED_AUTH (the key is not listed), or
    another event of a handshake; None if none came in SELF_TEST_S.
    """
    sock = context.socket(kind)
    sock.setsockopt(zmq.LINGER, 0)
    if "[" in endpoint:
        sock.setsockopt(zmq.IPV6, 1)
    if keys is not None:
        keys.connect_(sock)
    monitor = sock.get_monitor_socket(HANDSHAKES)
    deadline = time.monotonic() + SELF_TEST_S
    try:
        sock.connect(endpoint)
        while (left_s := deadline - time.monotonic()) > 0:
            if monitor.poll(int(left_s * 1000)):
                return int(parse_monitor_message(monitor.recv_multipart())["event"])
        return None
    finally:
        sock.disable_monitor()
        monitor.close()
        sock.close()


HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
"""How a handshake may end."""
