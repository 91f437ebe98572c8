"""Api: answers to what may be asked over HTTP, as bytes. It knows no server and no socket.

Every parameter is checked before the Source is asked: what is unknown, twice there or out of its
range is refused with a word of what is allowed. What is answered within one second is the same for
all viewers, so it is made once.
"""

import gzip
import json
import math
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_args
from urllib.parse import parse_qsl

import msgspec

from distbelief.chronicle import KINDS
from distbelief.folder import RunFolder
from distbelief.monitor.access import HEADERS, TOKEN_HEADER, error
from distbelief.monitor.source import STATUSES, Group, Json, Metric, Source
from distbelief.monitor.stream import Stream, TooOld
from distbelief.param_server.place import NAME

PREFIX = "/api/v1/"
GZIP_MIN = 2048
"""Below that it is not worth the time; a tick of a second is never asked for twice."""
CACHE_MAX = 64
"""Answers that are kept for the others, until there is news."""
BODY_MAX = 4096
"""Bytes of an action."""
NAMES_MAX = 3000
"""Characters of names that the heatmap's header may have: proxies take some 4 kB of headers."""
CELLS_MAX = 4_000_000
LOG_BYTES = 64 * 1024
"""Of the end of a log that are looked at."""
LOG_NAMES = ("launcher", "controller", "monitor")
"""Processes with a log besides workers and shards."""
ACTIONS = ("drain", "stop")
"""What the launcher heeds. Shards save by themselves, every `save.every_s` seconds."""
_ENCODE = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: bytes
    content_type: str = "application/json; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, data: Any, status: int = 200, **headers: str) -> "Reply":  # Any: JSON
        return cls(status, _ENCODE(data), headers=headers)


class Refused(Exception):
    """It is answered with an error."""

    def __init__(self, status: int, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.hint = status, message, hint

    @property
    def reply(self) -> Reply:
        return Reply.json(error(self.status, self.message, self.hint), self.status)


class Scrape(Protocol):
    """Who knows Prometheus: see metrics.py."""

    def render(self, source: Source, accept: str) -> tuple[bytes, str]:
        """(text, content type)."""
        ...


class Report(Protocol):
    """See report.py."""

    def render(self, source: Source) -> tuple[bytes, str]:
        """(HTML, the Content-Security-Policy that fits it)."""
        ...


class Query:
    """The parameters of one request, each of which must be taken by somebody."""

    def __init__(self, text: str) -> None:
        """Raises: Refused for what is twice there."""
        self._left: dict[str, str] = {}
        self._taken: list[str] = []
        try:
            pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=32)
        except ValueError:
            raise Refused(400, "There are too many parameters.") from None
        for name, value in pairs:
            if name in self._left:
                raise Refused(400, f"{name[:40]} is there twice.", "Give it once.")
            self._left[name] = value

    def text(self, name: str, default: str = "", length: int = 200) -> str:
        self._taken.append(name)
        value = self._left.pop(name, default)
        if len(value) > length:
            raise Refused(400, f"{name} is too long.", f"It may have {length} characters.")
        return value

    def one_of(self, name: str, words: Sequence[str], default: str) -> str:
        value = self.text(name, default)
        if value not in words:
            raise Refused(400, f"{name} is {value[:40]!r}.", f"It may be {', '.join(words)}.")
        return value

    def some_of(self, name: str, words: Sequence[str]) -> str:
        value = self.text(name)
        odd = [word for word in value.split(",") if word and word not in words]
        if odd:
            raise Refused(400, f"{name} has {odd[0][:40]!r}.", f"It may have {', '.join(words)}.")
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        text = self.text(name)
        if not text:
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise Refused(
                400, f"{name} is {text[:40]!r}.", f"It must be a number from {least:g} to {most:g}."
            )
        return value

    def whole(self, name: str, default: int, least: int, most: int) -> int:
        value = self.number(name, default, least, most)
        if value != int(value):
            raise Refused(400, f"{name} is {value:g}.", "It must be a whole number.")
        return int(value)

    def end(self) -> None:
        """Raises: Refused for what nobody took."""
        if self._left:
            known = ", ".join(self._taken) or "none"
            raise Refused(
                400, f"There is no parameter {next(iter(self._left))[:40]!r}.", f"Known: {known}."
            )


class Api:
    """See the top of this file. Used by one thread."""

    def __init__(
        self,
        source: Source,
        stream: Stream,
        folder: RunFolder | None = None,
        *,
        actions: bool = False,
        scrape: Scrape | None = None,
        report: Report | None = None,
    ) -> None:
        """folder: the run's, for logs and actions; None where there is none."""
        self.source = source
        self.stream = stream
        self.scrape = scrape
        self.report = report
        self._folder = folder
        self._has_actions = actions
        self._cache: dict[tuple[str, str], Reply] = {}
        self._cached_seq = -1
        self._routes: dict[str, Callable[[Query], Reply]] = {
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/metrics": self._metrics,
            "/report.html": self._report,
            PREFIX + "delta": self._delta,
        }
        self._shared: dict[str, Callable[[Query], Reply]] = {
            PREFIX + name: answer
            for name, answer in {
                "meta": self._meta,
                "snapshot": self._snapshot,
                "workers": self._workers,
                "series": self._series,
                "heatmap": self._heatmap,
                "distribution": self._distribution,
                "updates": self._updates,
                "meter": self._meter,
                "shards": self._shards,
                "events": self._events,
                "findings": self._findings,
            }.items()
        }

    def get(self, path: str, query: str = "", accept: str = "") -> Reply:
        """Answer a GET."""
        try:
            if path in self._shared:
                return self._remembered(path, query)
            asked = Query(query)
            if path == "/metrics":
                asked.end()
                return self._metrics(asked, accept)
            if path in self._routes:
                return self._routes[path](asked)
            folder, _, name = path.rpartition("/")
            if folder + "/" == PREFIX + "workers/":
                return self._worker(name, asked)
            if folder == "/logs":
                return self._log(name, asked)
            if folder + "/" == PREFIX + "actions/" and self._has_actions:
                raise Refused(405, "An action is asked for by POST.")
            raise Refused(
                404, f"There is nothing at {path[:80]}.", "docs/dashboard.md has the API."
            )
        except Refused as refused:
            return refused.reply

    def post(self, path: str, headers: Mapping[str, str], body: bytes) -> Reply:
        """Do an action."""
        try:
            folder, _, name = path.rpartition("/")
            if not self._has_actions or self._folder is None or folder + "/" != PREFIX + "actions/":
                hint = "Start the run with --set monitor.actions=true." if folder else ""
                raise Refused(404, "There are no actions here.", hint)
            if name not in ACTIONS:
                raise Refused(404, f"There is no action {name[:40]!r}.", f"{', '.join(ACTIONS)}.")
            # A form of another site can send neither of these two without asking first.
            if headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
                raise Refused(415, "An action is JSON.", "Content-Type: application/json")
            if not headers.get(TOKEN_HEADER):
                raise Refused(403, f"{TOKEN_HEADER} is missing.", f"Send {TOKEN_HEADER}.")
            return self._act(self._folder, name, _body(body))
        except Refused as refused:
            return refused.reply

    # What all viewers share

    def _remembered(self, path: str, query: str) -> Reply:
        if self.source.seq != self._cached_seq:
            self._cache.clear()
            self._cached_seq = self.source.seq
        reply = self._cache.get((path, query))
        if reply is None:
            reply = self._shared[path](Query(query))
            if len(self._cache) < CACHE_MAX:
                self._cache[path, query] = reply
        return reply

    def _meta(self, query: Query) -> Reply:
        query.end()
        return Reply.json(self.source.meta())

    def _snapshot(self, query: Query) -> Reply:
        query.end()
        return Reply.json(self.source.snapshot())

    def _workers(self, query: Query) -> Reply:
        sort = query.text("sort", "-ratio", 40)
        limit = query.whole("limit", 50, 1, 1000)
        cursor = query.text("cursor", "", 80)
        q = query.text("q", "", 80)
        status = query.some_of("status", STATUSES)
        query.end()
        try:
            return Reply.json(self.source.workers(sort, limit, cursor, q, status))
        except ValueError as odd:
            raise Refused(400, str(odd)) from odd

    def _worker(self, name: str, query: Query) -> Reply:
        window = query.number("window", 900.0, 1.0, 86_400.0)
        query.end()
        try:
            return Reply.json(self.source.worker(name, window))
        except KeyError:
            raise Refused(
                404, f"There is no worker {name[:64]!r}.", f"GET {PREFIX}workers lists them."
            ) from None

    def _series(self, query: Query) -> Reply:
        names = query.text("names", "", 400)
        start, end = self._span(query)
        points = query.whole("points", 600, 2, 5000)
        query.end()
        listed = [name for name in names.split(",") if name]
        if not listed:
            raise Refused(400, "names is missing.", "For example names=loss,samples_per_s.")
        try:
            return Reply.json(self.source.series(listed, start, end, points))
        except ValueError as odd:
            raise Refused(400, str(odd)) from odd

    def _heatmap(self, query: Query) -> Reply:
        start, end = self._span(query)
        cols = query.whole("cols", 450, 1, 2000)
        rows = query.whole("rows", 340, 1, 5000)
        group = query.one_of("group", get_args(Group), "node")
        metric = query.one_of("metric", get_args(Metric), "ratio")
        node = query.text("node", "", 64)
        query.end()
        if rows * cols > CELLS_MAX:
            raise Refused(
                400, f"{rows} x {cols} are too many cells.", f"At most {CELLS_MAX:,} are answered."
            )
        try:
            found = self.source.heatmap(
                start,
                end,
                cols,
                rows,
                group,  # type: ignore[arg-type]  # it is one of them
                metric,  # type: ignore[arg-type]  # it is one of them
                node,
            )
        except ValueError as odd:
            raise Refused(400, str(odd)) from odd
        now = {"seq": self.source.seq, "t": self.source.meta()["t"]}
        head = {**now, **found.head, "metric": metric}
        names = json.dumps({"ids": found.ids, "nodes": found.nodes}, separators=(",", ":"))
        body = found.data
        if len(names) <= NAMES_MAX:
            head |= {"ids": found.ids, "nodes": found.nodes}
        else:  # they follow the cells, from that byte on
            head["names"] = len(body)
            body += names.encode()
        text = json.dumps(head, separators=(",", ":"))  # in ASCII, as headers are
        return Reply(200, body, "application/octet-stream", {"X-DB-Heatmap": text})

    def _distribution(self, query: Query) -> Reply:
        window = query.number("window", 60.0, 1.0, 600.0)
        query.end()
        return Reply.json(self.source.distribution(window))

    def _updates(self, query: Query) -> Reply:
        window = query.number("window", 60.0, 1.0, 600.0)
        limit = query.whole("n", 2000, 1, 5000)
        query.end()
        return Reply.json(self.source.updates(window, limit))

    def _meter(self, query: Query) -> Reply:
        query.end()
        return Reply.json(self.source.meter())

    def _shards(self, query: Query) -> Reply:
        query.end()
        return Reply.json(self.source.shards())

    def _events(self, query: Query) -> Reply:
        after = query.whole("after", -1, -1, 2**53)
        limit = query.whole("limit", 200, 1, 20_000)
        kind = query.some_of("kind", KINDS)
        worker = query.text("worker", "", 64)
        q = query.text("q", "", 80)
        query.end()
        return Reply.json(self.source.events(after, limit, kind, worker, q))

    def _findings(self, query: Query) -> Reply:
        query.end()
        return Reply.json(self.source.findings())

    def _span(self, query: Query) -> tuple[float, float]:
        """from and to; by default the last quarter of an hour."""
        end = query.number("to", self.source.meta()["t"], 0.0, 1e11)
        start = query.number("from", end - 900.0, -1e11, 1e11)
        if not start < end:
            raise Refused(400, "from is not before to.", "Both are unix seconds.")
        return start, end

    # The rest

    def _healthz(self, query: Query) -> Reply:
        query.end()
        return Reply.json({"ok": True})

    def _readyz(self, query: Query) -> Reply:
        query.end()
        ok = bool(self.source.meta()["shards"])
        return Reply.json({"ok": ok}, 200 if ok else 503)

    def _metrics(self, query: Query, accept: str = "") -> Reply:
        if self.scrape is None:
            raise Refused(404, "There are no metrics of a run that is over.")
        body, content_type = self.scrape.render(self.source, accept)
        return Reply(200, body, content_type)

    def _report(self, query: Query) -> Reply:
        query.end()
        if self.report is None:
            raise Refused(404, "There is no report here.", "distbelief report RUN -o report.html")
        body, csp = self.report.render(self.source)
        return Reply(200, body, "text/html; charset=utf-8", {"Content-Security-Policy": csp})

    def _delta(self, query: Query) -> Reply:
        after = query.whole("after", -1, -1, 2**53)
        query.end()
        try:
            return Reply(200, self.stream.delta(after))
        except TooOld as old:
            body = error(
                410, f"resync: {old}.", f"Ask for {PREFIX}snapshot, and go on from its seq."
            )
            return Reply.json({**body, "resync": True}, 410)

    def _log(self, name: str, query: Query) -> Reply:
        num_lines = query.whole("lines", 50, 1, 1000)
        query.end()
        meta = self.source.meta()
        known = name in LOG_NAMES or name in meta["worker_order"] or name in meta["shards"]
        if self._folder is None or not known or not NAME.fullmatch(name):
            raise Refused(404, f"There is no log of {name[:64]!r}.")
        text = log_end(self._folder, name, num_lines)
        return Reply(200, text.encode(), "text/plain; charset=utf-8")

    def _act(self, folder: RunFolder, name: str, body: Json) -> Reply:
        what = name
        try:
            if name == "stop":
                word = body.pop("how", "safe")
                if word not in ("safe", "now"):
                    raise Refused(400, "how is neither safe nor now.")
                _nothing_left(body)
                folder.ask_stop(word)
            else:
                if name == "drain":
                    worker = body.pop("worker", None)
                    if worker not in self.source.meta()["worker_order"]:
                        raise Refused(404, "worker is no worker of this run.", '{"worker": "w1"}')
                    what = f"drain-{worker}"
                _nothing_left(body)
                folder.ask(what)
        except OSError as failed:
            raise Refused(500, f"The run cannot be asked: {failed.strerror}.") from failed
        return Reply.json({"seq": self.source.seq, "t": self.source.meta()["t"], "id": what}, 202)


def _body(body: bytes) -> Json:
    try:
        data = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise Refused(400, "The body is no JSON object.", '{"worker": "w1"}')
    return data


def _nothing_left(body: Json) -> None:
    if body:
        raise Refused(400, f"{next(iter(body))[:40]!r} is not known here.")


def log_end(folder: RunFolder, name: str, num_lines: int) -> str:
    """The last lines of a process's output and log; empty where there are none."""
    lines: list[str] = []
    for kind in ("out", "log"):
        lines += _last_lines(folder.logs / f"{name}.{kind}", num_lines)
    return "".join([f"{line}\n" for line in lines[-num_lines:]])


def _last_lines(path: Path, num_lines: int) -> list[str]:
    """Of a log that may be growing; none where it cannot be read."""
    try:
        # A run's own code writes there too: no link is followed, and no pipe is waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return []
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return []
        start = max(0, status.st_size - LOG_BYTES)
        file.seek(start)
        lines = file.read(LOG_BYTES).split(b"\n")
    if start:
        del lines[0]  # it is cut
    if lines and not lines[-1]:
        del lines[-1]
    return [line.decode(errors="replace").rstrip("\r") for line in lines[-num_lines:]]


def packed(reply: Reply, accept_encoding: str) -> Reply:
    """As gzip, where that is taken and makes it much smaller."""
    takes = any(
        name.strip().lower() == "gzip" and quality.replace(" ", "") not in ("q=0", "q=0.0")
        for name, _, quality in (one.partition(";") for one in accept_encoding.split(","))
    )
    if not takes or len(reply.body) < GZIP_MIN or "Content-Encoding" in reply.headers:
        return reply
    body = gzip.compress(reply.body, compresslevel=1, mtime=0)
    headers = {**reply.headers, "Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
    return Reply(reply.status, body, reply.content_type, headers)


def complete(reply: Reply) -> dict[str, str]:
    """All headers of an answer."""
    return {**HEADERS, "Content-Type": reply.content_type, **reply.headers}
