"""Probe: what a host of a cluster is like, seen from it, and how fast it reaches another one.

It is an object that is called from afar, one on each host. For a measurement one host listens and
another sends, each for about `SEND_S`:

    > b"p" x 1, answered by the same, PINGS times; b"d"; then bytes until the sender has no more
    < the number of those, 8 bytes
"""

import os
import secrets
import shutil
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from distbelief.doctor import TORCH, in_child
from distbelief.outpost import versions
from distbelief.param_server.storage import storage_of

SEND_S = 0.5
SEND_MAX = 256 * 2**20
"""Bytes of one measurement."""
PINGS = 5
WAIT_S = 5.0
_BLOCK = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a host is like."""

    at: float
    """Its clock, Unix seconds."""
    versions: Mapping[str, str]
    gpus: int | None
    """That torch sees; None where torch cannot be asked."""
    free: int
    """Bytes on the disk of its home, where run folders are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """How fast one host reaches another."""

    bytes_per_s: float
    round_trip_s: float


class Probe:
    """See the top of this file. Used by one thread."""

    def clock(self) -> float:
        return time.time()

    def facts(self) -> Facts:
        found, _ = in_child(TORCH)
        return Facts(
            at=time.time(),
            versions=versions(),
            gpus=None if found is None else len(found[1]),
            free=shutil.disk_usage(Path.home()).free,
        )

    def listen(self, address: str) -> int:
        """Take one measurement at an address of this host. Returns: the port."""
        server = socket.create_server((address, 0), family=_family(address))
        server.settimeout(WAIT_S)
        threading.Thread(target=_receive, args=(server,), daemon=True).start()
        port: int = server.getsockname()[1]
        return port

    def reach(self, address: str, port: int) -> Link | str:
        """Measure the way to one that listens; or why it cannot be reached."""
        try:
            with socket.create_connection((address, port), timeout=WAIT_S) as connection:
                return _measure(connection)
        except OSError as error:
            return error.strerror or str(error)

    def store(self, place: str, run: str, name: str) -> str:
        """Write a file into a store. Returns: why it cannot be; empty where it can."""
        try:
            storage = storage_of(place, run)
            storage.begin()
            storage.make("")
            storage.write(name, secrets.token_bytes(8))
        except (OSError, ValueError) as error:
            return str(error)
        return ""

    def stored(self, place: str, run: str) -> list[str] | str:
        """The names of files in a store; or why there are none to be had."""
        try:
            return storage_of(place, run).names("")
        except (OSError, ValueError) as error:
            return str(error)

    def clear(self, place: str, run: str, names: list[str]) -> None:
        """Remove what was written."""
        storage = storage_of(place, run)
        for name in names:
            storage.remove(name)
        folder = Path(place) / run
        if os.path.isabs(place) and folder.is_dir():
            folder.rmdir()


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _receive(server: socket.socket) -> None:
    """One measurement, whoever it is that comes: a number is all that is given away."""
    with server:
        try:
            connection, _ = server.accept()
        except OSError:
            return
    with connection:
        connection.settimeout(WAIT_S)
        try:
            while connection.recv(1) == b"p":
                connection.sendall(b"p")
            got, room = 0, bytearray(_BLOCK)
            while size := connection.recv_into(room):
                got += size
            connection.sendall(struct.pack("!Q", got))
        except OSError:
            return


def _measure(connection: socket.socket) -> Link:
    """Raises: OSError."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    trips = []
    for _ in range(PINGS):
        began = time.monotonic()
        connection.sendall(b"p")
        connection.recv(1)
        trips.append(time.monotonic() - began)
    connection.sendall(b"d")
    block, sent, began = bytes(_BLOCK), 0, time.monotonic()
    while sent < SEND_MAX and time.monotonic() - began < SEND_S:
        connection.sendall(block)
        sent += len(block)
    connection.shutdown(socket.SHUT_WR)
    told = connection.recv(8)
    seconds = max(time.monotonic() - began, 1e-9)
    if len(told) != 8 or struct.unpack("!Q", told)[0] != sent:
        raise OSError(f"of {sent} bytes not all came")
    return Link(bytes_per_s=sent / seconds, round_trip_s=min(trips))
