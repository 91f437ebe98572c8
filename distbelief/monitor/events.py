"""EventLog: what happened, numbered, the newest kept. No clock."""

import json
from collections import deque
from collections.abc import Iterator

from distbelief.chronicle import KINDS, Event
from distbelief.monitor.source import Json

KEPT = 20_000
TEXT_MAX = 500
DETAIL_MAX = 4096


class EventLog:
    """See the top of this file. Numbers are given by whoever adds."""

    def __init__(self, kept: int = KEPT) -> None:
        self._items: deque[Json] = deque(maxlen=kept)
        self.newest = 0
        """Number of the newest one; 0 if there is none."""
        self.by_kind: dict[str, int] = {}
        """How many there were of each kind, those forgotten too."""

    def add(self, seq: int, event: Event, node: str = "") -> Json:
        """Keep an event, cut to what a page may be asked to show."""
        detail = event.detail
        if detail and len(json.dumps(detail, default=str)) > DETAIL_MAX:
            detail = {"cut": True}
        item: Json = {
            "seq": seq,
            "at": event.at,
            "kind": event.kind if event.kind in KINDS else "error",
            "who": event.who[:64],
            "node": (event.node or node)[:64],
            "text": event.text[:TEXT_MAX],
            "detail": detail,
        }
        self.restore(item)
        return item

    def restore(self, item: Json) -> None:
        """Keep one as it was kept before."""
        self._items.append(item)
        self.newest = item["seq"]
        self.by_kind[item["kind"]] = self.by_kind.get(item["kind"], 0) + 1

    def __iter__(self) -> Iterator[Json]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def find(
        self, after: int = -1, limit: int = 200, kind: str = "", worker: str = "", q: str = ""
    ) -> tuple[int, list[Json]]:
        """(how many match, the newest of them in order). kind: words with commas."""
        kinds, q = set(filter(None, kind.split(","))), q.lower()
        found: deque[Json] = deque(maxlen=max(0, limit))
        total = 0
        for item in self._items:
            if (
                item["seq"] > after
                and (not kinds or item["kind"] in kinds)
                and (not worker or item["who"] == worker)
                and (not q or q in f"{item['who']} {item['node']} {item['text']}".lower())
            ):
                total += 1
                found.append(item)
        return total, list(found)
