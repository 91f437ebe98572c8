"""Report: a run as one file that opens without a server, with the numbers that the page shows.

It is the page itself with its script and style inside, and with the answers that it would ask for:
those of the whole run and of its newest 5 minutes, quarter of an hour and hour. Of more than
DETAILED workers the worst have their details, of more than LISTED the worst are in the list.
Nothing is loaded from elsewhere, and the policy inside it allows nothing else to run.
"""

import base64
import gzip
import hashlib
import math
import re
from collections.abc import Callable
from typing import Literal

import msgspec

from distbelief.monitor.bundle import bundle
from distbelief.monitor.pages import INDEX, Pages
from distbelief.monitor.source import Group, Json, Source

SPANS = (300.0, 900.0, 3600.0)
"""Newest seconds of which there are curves and heatmaps, besides those of the whole run."""
NAMES = (
    "loss", "loss_smooth", "val_loss", "samples_per_s", "ratio.p95", "trip.fetch_p95",
    "trip.push_p95", "fair",
)  # fmt: skip
"""Of the curves that the page draws."""
POINTS = 1200
COLS, ROWS = 450, 340
LISTED, DETAILED = 1000, 64
LOG_LINES = 50
EVENTS = 20_000
GROUPS: tuple[Group, ...] = ("node", "worst")
METRICS: tuple[Literal["ratio", "seconds"], ...] = ("ratio", "seconds")

Log = Callable[[str, int], str]
"""The last lines of a process's log; empty where there are none."""


class Report:
    """Makes them."""

    def __init__(self, pages: Pages, log: Log, clock: Callable[[], float]) -> None:
        """clock: unix time."""
        self._pages = pages
        self._log = log
        self._clock = clock

    def render(self, source: Source) -> tuple[bytes, str]:
        """(HTML, the Content-Security-Policy that fits it). Takes up to a second."""
        pages = self._pages
        style = pages.text("style.css")
        script = bundle({name: pages.text(name) for name in pages.names}, "app.js")
        policy = (
            "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
            f"script-src '{_hash(script)}'; style-src '{_hash(style)}'"
        )
        icon = f"data:image/svg+xml;base64,{_base64(pages.text('favicon.svg').encode())}"
        data = msgspec.json.encode(self._record(source))
        recorded = _base64(gzip.compress(data, 6, mtime=0))
        page = re.sub(r'<link rel="modulepreload"[^>]*>\n', "", pages.text(INDEX))
        for pattern, new in (
            (r'<meta charset="utf-8">', f'\\g<0>\n<meta http-equiv="Content-Security-Policy" '
             f'content="{policy}">'),
            (r'<link rel="stylesheet"[^>]*>', lambda _: f"<style>{style}</style>"),
            (r'<script type="module"[^>]*></script>\n', ""),
            (r"</body>", lambda _: f'<script type="text/plain" id="recorded">{recorded}</script>\n'
             f'<script type="module">{script}</script>\n</body>'),
        ):  # fmt: skip
            page, count = re.subn(pattern, new, page)
            assert count == 1, pattern
        return page.replace('"favicon.svg"', f'"{icon}"').encode(), policy

    def _record(self, source: Source) -> Json:
        """What recorded.js looks up."""
        meta = source.meta()
        workers = source.workers("id", LISTED)
        worst = source.workers("-ratio", LISTED)["items"]
        if workers["total"] > LISTED:
            workers = {**workers, "items": worst}
        found = source.findings()["items"]
        named = [one["who"] for one in found if one["who"] in meta["worker_order"]]
        detailed = list(dict.fromkeys([*named, *(one["id"] for one in worst)]))[:DETAILED]
        spans = _spans(meta)
        longest = max(1.0, max(end - start for start, end in spans))
        return {
            "made": self._clock(),
            "tick": source.tick(),
            "answers": {
                "meta": meta,
                "snapshot": source.snapshot(),
                "workers": workers,
                "distribution": source.distribution(),
                "updates": source.updates(60.0, 1500),
                "meter": source.meter(),
                "shards": source.shards(),
                "events": source.events(-1, EVENTS),
                "findings": {**source.findings(), "items": found},
            },
            "details": {name: source.worker(name, min(longest, 86_400.0)) for name in detailed},
            "logs": {name: self._log(name, LOG_LINES) for name in detailed},
            "series": [source.series(list(NAMES), *span, POINTS) for span in spans],
            "heatmaps": [
                _cells(source, span, group, metric)
                for span in spans
                for group in GROUPS
                for metric in METRICS
            ],
        }


def _spans(meta: Json) -> list[tuple[float, float]]:
    """From when to when there are curves: of the whole run first."""
    now = meta["t"] if meta["ended"] is None else min(meta["t"], meta["ended"] + 5.0)
    end = math.ceil(now) + 1.0
    begin = math.floor(end - 60.0 if meta["started"] is None else meta["started"])
    begin = min(begin, end - 10.0)
    return [(begin, end), *((end - s, end) for s in SPANS if end - s > begin)]


def _cells(source: Source, span: tuple[float, float], group: Group, metric: str) -> Json:
    found = source.heatmap(*span, COLS, ROWS, group, "seconds" if metric == "seconds" else "ratio")
    head = {"ids": found.ids, "nodes": found.nodes, "metric": metric, **found.head}
    start, end = span
    told = {"from": start, "to": end, "group": group, "metric": metric, "head": head}
    return {**told, "cells": _base64(found.data)}


def _hash(text: str) -> str:
    """As a policy names what may run."""
    return f"sha256-{_base64(hashlib.sha256(text.encode()).digest())}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
