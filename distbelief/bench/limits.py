"""Limits: what this machine can do at all: copies, bare transports, empty round trips.

All items take turns, several times over, so that a slow minute hits all of them.
"""

import mmap
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import zmq

from distbelief.bench import sink
from distbelief.bench.board import Board, Order
from distbelief.bench.crew import START_S, STOP_S, Member
from distbelief.bench.plot import Bar
from distbelief.bench.region import Vector
from distbelief.bench.table import Column, spread
from distbelief.bench.window import Spread
from distbelief.bench.work import GOOGLENET_SIZE

MB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """What to measure."""

    size: int = GOOGLENET_SIZE
    """Float32 values in the vector that is copied and sent."""
    repeats: int = 5
    seconds: float = 0.2
    """Of each item, each time."""
    message_mb: Sequence[float] = (0.25, 1.0, 4.0)
    """Lengths of messages, besides the whole vector as one, in MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One item; median and range over the repeats."""

    item: str
    value: float
    value_min: float
    value_max: float
    unit: str
    check: str
    """right where what was copied is equal, or every byte sent was counted at the other end."""


@dataclass(frozen=True, slots=True)
class Item:
    """Something that can be done again and again."""

    name: str
    unit: str
    once: Callable[[], float]
    """Do it; returns GB moved, or the number of round trips."""
    is_right: Callable[[], bool]


def limits(
    config: LimitsConfig, on_progress: Callable[[str], None] = lambda text: None
) -> list[Row]:
    """Measure; senders in this process, sinks in processes of their own. Raises: Problem."""
    found: dict[str, list[float]] = {}
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        items = [*_copies(config.size)]
        for kind in sink.KINDS:
            items += stack.enter_context(_transport(kind, config))
        for turn in range(config.repeats):
            for item in items if turn % 2 == 0 else reversed(items):
                on_progress(f"turn {turn + 1} of {config.repeats}: {item.name}")
                found.setdefault(item.name, []).append(_measure(item, config.seconds))
        return [_row(item, found[item.name]) for item in items]


def _measure(item: Item, seconds: float) -> float:
    item.once()  # warm
    done, began = 0.0, time.perf_counter()
    while True:
        done += item.once()
        took = time.perf_counter() - began
        if took > seconds:
            return done / took if item.unit == "GB/s" else 1e6 * took / done


def _row(item: Item, values: Sequence[float]) -> Row:
    all_ = Spread.of(values)
    return Row(
        item=item.name,
        value=all_.median,
        value_min=all_.low,
        value_max=all_.high,
        unit=item.unit,
        check="right" if item.is_right() else "wrong",
    )


# Copies


def _copies(size: int) -> Iterator[Item]:
    source: Vector = np.ones(size, np.float32)
    target: Vector = np.zeros(size, np.float32)
    a, b = torch.from_numpy(source), torch.zeros(size)
    gb = 4 * size / 1e9
    fresh: list[bool] = []

    def copy() -> float:
        np.copyto(target, source)
        return gb

    def copy_by(threads: int) -> Callable[[], float]:
        def once() -> float:
            torch.set_num_threads(threads)
            b.copy_(a)
            return gb

        return once

    def copy_fresh() -> float:
        pages: Vector = np.frombuffer(mmap.mmap(-1, 4 * size), np.float32)
        np.copyto(pages, source)
        fresh[:] = [bool(pages[-1] == source[-1])]
        return gb

    mb = 4 * size / 1e6
    same = bool
    yield Item(
        f"copy {mb:.0f} MB, numpy", "GB/s", copy, lambda: same(np.array_equal(source, target))
    )
    for threads in (1, 2):
        name = f"copy {mb:.0f} MB, torch, threads {threads}"
        yield Item(name, "GB/s", copy_by(threads), lambda: torch.equal(a, b))
    yield Item(f"copy {mb:.0f} MB into fresh pages", "GB/s", copy_fresh, lambda: fresh == [True])


# Transports


class _Line(Protocol):
    """The sender's side of a sink."""

    sent: int
    """Bytes since the start; of the message type's payload alone."""

    def send(self, piece: memoryview) -> None: ...

    def ask(self) -> int:
        """How many bytes have come: a round trip, and the end of whatever is on its way."""
        ...


class _ZmqLine:
    def __init__(self, pair: "zmq.Socket[bytes]") -> None:
        self.sent = 0
        self._pair = pair

    def send(self, piece: memoryview) -> None:
        self._pair.send(piece, copy=False)
        self.sent += len(piece)

    def ask(self) -> int:
        self._pair.send(b"")
        if not self._pair.poll(int(1000 * START_S)):
            raise TimeoutError("the sink does not answer")
        count: int = sink.LENGTH.unpack(self._pair.recv())[0]
        return count


class _SocketLine:
    def __init__(self, link: socket.socket) -> None:
        self.sent = 0
        self._link = link
        self._answer = memoryview(bytearray(sink.LENGTH.size))

    def send(self, piece: memoryview) -> None:
        self._link.sendall(sink.LENGTH.pack(len(piece)))
        self._link.sendall(piece)
        self.sent += len(piece)

    def ask(self) -> int:
        self._link.sendall(sink.LENGTH.pack(0))
        if not sink.receive(self._link, self._answer):
            raise EOFError("the sink is gone")
        count: int = sink.LENGTH.unpack(self._answer)[0]
        return count


@contextmanager
def _transport(kind: str, config: LimitsConfig) -> Iterator[list[Item]]:
    """The items of one transport, while its sink lives."""
    with ExitStack() as stack:
        board = Board.create()
        stack.callback(board.close)
        spec = {"role": "distbelief.bench.sink:serve", "board": board.path, "seat": 0, "kind": kind}
        member = Member(f"sink {kind}", spec, {})
        stack.callback(member.close)
        served = member.hear(time.monotonic() + START_S)
        line: _Line
        if kind == "socket tcp":
            link = socket.create_connection(("127.0.0.1", served["port"]))
            stack.callback(link.close)
            link.settimeout(START_S)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line = _SocketLine(link)
        else:
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            stack.callback(context.destroy, 0)
            pair = context.socket(zmq.PAIR)
            pair.connect(served["endpoint"])
            line = _ZmqLine(pair)
        yield [*_items(kind, line, config)]
        board.tell(Order.STOP, range(1))
        if kind != "socket tcp":  # that one ends when its link does
            member.end(STOP_S)


def _items(kind: str, line: _Line, config: LimitsConfig) -> Iterator[Item]:
    data = memoryview(bytearray(4 * config.size))

    def one_way(length: int) -> Callable[[], float]:
        def once() -> float:
            for start in range(0, len(data), length):
                line.send(data[start : start + length])
            line.ask()
            return len(data) / 1e9

        return once

    def empty() -> float:
        line.ask()
        return 1.0

    def is_right() -> bool:
        return line.ask() == line.sent

    for mb in config.message_mb:
        yield Item(f"{kind} one way, {mb:g} MiB", "GB/s", one_way(int(mb * MB)), is_right)
    name = f"{kind} one way, {len(data) / 1e6:.0f} MB as one"
    yield Item(name, "GB/s", one_way(len(data)), is_right)
    yield Item(f"{kind} empty round trip", "us", empty, is_right)


def columns() -> list[Column[Row]]:
    """Of the table."""

    def value(row: Row) -> str:
        return spread(row.value, row.value_min, row.value_max, 2 if row.unit == "GB/s" else 0)

    return [
        Column("item", lambda row: row.item, is_text=True),
        Column("", value),
        Column("unit", lambda row: row.unit, is_text=True),
        Column("result", lambda row: row.check, is_text=True),
    ]


def bars(rows: Sequence[Row]) -> list[Bar]:
    """For a plot: of what has a speed; round trips are left out."""
    return [
        Bar(row.item.replace(", ", "\n"), "", row.value, row.value_min, row.value_max)
        for row in rows
        if row.unit == "GB/s"
    ]
