"""Stream: what viewers are told as it happens, and the ring that they go on from. Pure.

    group, once a second:   event ..., meta (if it has changed), finding (if others), tick
    between two of them:    event ...

A message is made into bytes once, whoever reads it. Events and ticks carry their number as `id`;
meta and finding have that of the tick after them and no `id`, so a viewer that is cut off between
them is sent both again. A viewer that does not keep up is sent the newest tick and all events, and
nothing waits for it here: a slow one costs a number, not memory.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import msgspec

from distbelief.monitor.source import Json, Source

SPAN_S = 120.0
RING_MAX = 4096
RING_BYTES = 16 * 2**20
VIEWERS_MAX = 64
RETRY_MS = 1000
COMMENT_S = 15.0
COMMENT = b": all is well\n\n"
EVENTS_MAX = 1000
"""At once; older ones are in the list of events."""

_ENCODE = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Message:
    """One of tick, event, finding, meta, bye."""

    kind: str
    seq: int
    at: float
    wire: bytes
    """As server-sent event."""
    begin: int
    """Where its JSON begins in that."""

    @classmethod
    def of(
        cls, kind: str, seq: int, data: Json, at: float = 0.0, *, has_id: bool = True
    ) -> "Message":
        head = f"id: {seq}\n" if has_id else ""
        head += f"event: {kind}\ndata: "
        return cls(kind, seq, at, b"%s%s\n\n" % (head.encode(), _ENCODE(data)), len(head))

    @property
    def data(self) -> bytes:
        """JSON, in one line."""
        return self.wire[self.begin : -2]


class TooOld(Exception):
    """What a viewer has is too old, or of another process: it must begin anew."""


class Ring:
    """The messages of the last SPAN_S, in order. `floor`: all later ones are here."""

    def __init__(self, floor: int = 0) -> None:
        self.floor = self.newest = floor
        self._messages: deque[Message] = deque()
        self._size = 0

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, message: Message) -> None:
        self._messages.append(message)
        self._size += len(message.wire)
        self.newest = max(self.newest, message.seq)
        oldest_at = message.at - SPAN_S
        while len(self._messages) > 1 and (
            self._messages[0].at < oldest_at
            or len(self._messages) > RING_MAX
            or self._size > RING_BYTES
        ):
            gone = self._messages.popleft()
            self._size -= len(gone.wire)
            self.floor = max(self.floor, gone.seq)

    def after(self, seq: int) -> list[Message]:
        """All later ones. Raises: TooOld."""
        if not self.floor <= seq <= self.newest:
            raise TooOld(f"there are messages from {self.floor} to {self.newest}")
        found = []
        for message in reversed(self._messages):
            if message.seq <= seq:
                break
            found.append(message)
        return found[::-1]

    def later(self, seq: int) -> list[Message]:
        """Those of `after` that a viewer still needs who has missed some: of ticks, the newest."""
        found = self.after(seq)
        last = max((m.seq for m in found if m.kind == "tick"), default=0)
        return [m for m in found if m.kind != "tick" or m.seq == last]


class Stream:
    """Makes messages of what a Source has, and hands them to viewers."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.ring = Ring(source.seq)
        self.num_viewers = 0
        self._event_seq = source.seq
        self._meta: Json = {}
        self._findings: list[tuple[Any, ...]] = []  # Any: JSON
        self._tick: Message | None = None
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """Nothing more will come."""
        return self._is_over

    def publish(self, now: float) -> bool:
        """Take up what is new since the last call. Returns: whether there was anything."""
        before = self.ring.newest
        self._publish_events(now)
        return self.ring.newest != before

    def publish_tick(self, now: float) -> None:
        """The same, and a tick. To be called when the source has closed a second."""
        tick = self.source.tick()
        seq = tick["seq"]
        self._publish_events(now)
        meta = self._meta_now()
        if meta != self._meta:
            self._meta = meta
            self._add("meta", seq, now, self.source.meta(), has_id=False)
        told = [(f.get("id"), f.get("severity"), f.get("who")) for f in tick["findings"]]
        if told != self._findings:
            self._findings = told
            self._add("finding", seq, now, self.source.findings(), has_id=False)
        self._tick = self._add("tick", seq, now, tick)

    def end(self, reason: str, now: float) -> None:
        """Say good-bye; viewers are to end when they have it."""
        if not self._is_over:
            seq = max(self.source.seq, self.ring.newest + 1)
            data = {"seq": seq, "t": now, "reason": reason, "exit": self.source.meta()["exit"]}
            self._add("bye", seq, now, data)
            self._is_over = True

    def delta(self, after: int) -> bytes:
        """What came after: a JSON list of {event, seq, data}. Raises: TooOld."""
        items = [
            b'{"event":"%s","seq":%d,"data":%s}' % (m.kind.encode(), m.seq, m.data)
            for m in self.ring.after(after)
        ]
        return b"[" + b",".join(items) + b"]"

    def greeting(self, is_again: bool = False) -> tuple[bytes, int]:
        """What a viewer is told who begins, or must begin anew: then meta has `resync`.

        Returns: that, and the number after which it goes on.
        """
        meta = self.source.meta()
        if is_again:
            meta["resync"] = True
        first = Message.of("meta", meta["seq"], meta, has_id=False)
        tick = self._tick
        if tick is None:  # nothing was published yet, or nothing ever is: a recording
            now = self.source.tick()
            tick = Message.of("tick", now["seq"], now)
        return first.wire + tick.wire, tick.seq

    def _publish_events(self, now: float) -> None:
        if self.source.seq <= self._event_seq:
            return
        found = self.source.events(after=self._event_seq, limit=EVENTS_MAX)
        self._event_seq = self.source.seq
        for item in found["items"]:
            self._add("event", item["seq"], now, item)

    def _meta_now(self) -> Json:
        meta = self.source.meta()
        del meta["seq"], meta["t"]
        return meta

    def _add(self, kind: str, seq: int, now: float, data: Json, *, has_id: bool = True) -> Message:
        message = Message.of(kind, seq, data, now, has_id=has_id)
        self.ring.add(message)
        return message


class Viewer:
    """Where one reader of the stream is."""

    def __init__(self, stream: Stream, after: int | None) -> None:
        """after: the number of the last message it has; None for one that begins."""
        self._stream = stream
        self._is_new = True
        self.seq = after

    def take(self) -> list[bytes]:
        """All that it is to be sent now."""
        ring, seq, out = self._stream.ring, self.seq, []
        if self._is_new:
            out.append(f"retry: {RETRY_MS}\n\n".encode())
        if seq is None:
            greeting, self.seq = self._stream.greeting()
            out.append(greeting)
        else:
            try:
                # Who comes back gets every second that it missed, who is slow does not.
                found = ring.after(seq) if self._is_new else ring.later(seq)
                out += [m.wire for m in found]
                self.seq = ring.newest
            except TooOld:
                greeting, self.seq = self._stream.greeting(is_again=True)
                out.append(greeting)
        self._is_new = False
        return out
