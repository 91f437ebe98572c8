"""Intake: what connections have sent that is no whole message yet, and which of them to end.

ZeroMQ hands a message over when all its frames are there, and no option of it bounds what it
holds until then: one message that never ends takes all memory (250 MB a second were seen), and
frames without content take 64 bytes for each 2 on the wire. So where the memory of this process
has grown, the kernel is asked what every connection has brought, and whoever is far ahead of the
messages that came out of it is hung up on. An honest worker opens a new connection and asks again.

In the steady state this costs one addition a message and one look at this process' memory a tick.
"""

import fcntl
import os
import socket
import struct
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GROWN_BYTES = 8 * 2**20
"""The connections are looked at when the process has grown by so much since the last time."""

STRANGER_BYTES = 2**20
"""What a connection that nobody has vouched for may be ahead: far more than any hello."""

STRANGERS_BYTES = 16 * 2**20
"""What all of them together may be ahead."""

PEERS_MAX = 10_000
"""Peers remembered before those that are gone are looked for."""

BEATS_PER_S = 64
"""Bytes a second of heartbeats, which are no messages: rather too many."""

_TCP_INFO = 11
_BYTES_RECEIVED = 128  # offset of tcpi_bytes_received, since Linux 4.1
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class _Peer:
    """One connection out of which a message has come."""

    fd: int
    inode: int
    since: float
    arrived: int = 0
    """Bytes of its whole messages."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """A connection, and how many bytes of unfinished messages it has brought."""

    fd: int
    inode: int
    peer: bytes | None
    """None if no message has come out of it yet."""
    size: int


class Intake:
    """See the top of this file. Used by one thread; one for each listening socket."""

    def __init__(self, port: int, clock: Callable[[], float]) -> None:
        self.num_ended = 0
        self._port = port
        self._clock = clock
        self._peers: dict[bytes, _Peer] = {}
        self._rss = rss()
        self._is_able = sys.platform == "linux"

    def note(self, peer: bytes, size: int, fd: int) -> None:
        """A whole message has come. fd: of its connection."""
        known = self._peers.get(peer)
        if known is None:
            if len(self._peers) >= PEERS_MAX:
                self._forget_gone()
            known = self._peers[peer] = _Peer(fd, _inode(fd), self._clock())
        known.arrived += size

    def knows(self, peer: bytes) -> bool:
        """It has sent a message before."""
        return peer in self._peers

    def look(self, allowance: Callable[[bytes], int]) -> None:
        """End connections that are too far ahead, if this process has grown.

        allowance: bytes that a peer may be ahead; 0 for one that nobody vouches for.
        """
        now = rss()
        if now - self._rss < GROWN_BYTES:
            self._rss = min(self._rss, now)
            return
        self._rss = now
        for one in to_end(self.ahead(), allowance):
            if _end(one.fd, one.inode):
                self.num_ended += 1

    def ahead(self) -> list[Ahead]:
        """Every connection of the port; those that are gone are forgotten."""
        if not self._is_able:
            return []
        by_inode = {known.inode: (peer, known) for peer, known in self._peers.items()}
        found: list[Ahead] = []
        here: dict[bytes, _Peer] = {}
        now = self._clock()
        for fd, inode in _sockets():
            received = _received(fd, self._port)
            if received is None:
                continue
            peer, known = by_inode.get(inode, (None, None))
            if peer is not None and known is not None:
                here[peer] = known
                received -= known.arrived + int((now - known.since + 10) * BEATS_PER_S)
            found.append(Ahead(fd, inode, peer, max(0, received)))
        self._peers = here
        return found

    def _forget_gone(self) -> None:
        self.ahead()
        if len(self._peers) >= PEERS_MAX:  # so many are really there: count those anew
            self._peers.clear()


def to_end(found: list[Ahead], allowance: Callable[[bytes], int]) -> list[Ahead]:
    """Those that are too far ahead: each by itself, and then all strangers together."""
    ended: list[Ahead] = []
    strangers: list[Ahead] = []
    for one in found:
        allowed = 0 if one.peer is None else allowance(one.peer)
        if one.size > max(allowed, STRANGER_BYTES):
            ended.append(one)
        elif not allowed:
            strangers.append(one)
    strangers.sort(key=lambda one: one.size)
    total = sum(one.size for one in strangers)
    while total > STRANGERS_BYTES:
        worst = strangers.pop()
        total -= worst.size
        ended.append(worst)
    return ended


def rss() -> int:
    """Bytes of this process' memory that are in use, without what is shared; 0 if unknown."""
    try:
        fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * _PAGE


def _sockets() -> list[tuple[int, int]]:
    """Descriptors of this process that are sockets, with their inodes."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:["):
            found.append((int(name), int(target[8:-1])))
    return found


def _received(fd: int, port: int) -> int | None:
    """Bytes that a connection of the port has brought into this process; None for others."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return None
    try:
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.getsockname()[1] != port:
            return None
        sock.getpeername()  # the listening socket has none
        info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 256)
        (received,) = struct.unpack_from("Q", info, _BYTES_RECEIVED)
        (unread,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
        return int(received - unread)
    except (OSError, struct.error):
        return None
    finally:
        sock.detach()  # it is ZeroMQ's


def _inode(fd: int) -> int:
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return -1


def _end(fd: int, inode: int) -> bool:
    """Hang up. ZeroMQ, whose descriptor it is, finds the end and closes it."""
    if _inode(fd) != inode:  # it is gone, and the number another's
        return False
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return False
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False
    finally:
        sock.detach()
    return True
