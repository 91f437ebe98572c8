"""Onlooker: asks a run's monitor what it sees, for a terminal. A thread of its own.

Whoever shows it takes the newest answers and never waits for any. Every request has a time limit
and every answer a size limit; a monitor that is gone, stopped or odd costs what it knows.
"""

import contextlib
import http.client
import logging
import socket
import threading
import time
from collections import deque
from typing import TypeVar
from urllib.parse import parse_qs, quote, urlsplit

import msgspec

from distbelief.folder import RunFolder
from distbelief.monitor.access import KEY, TOKEN_HEADER, is_loopback
from distbelief.monitor.link import Link, read_link
from distbelief.sight import Events, Happened, Kpi, Meta, Page, Sight, Snapshot, kpi_of_status

_T = TypeVar("_T")
logger = logging.getLogger(__name__)

EVERY_S = 1.0
TIMEOUT_S = 2.0
"""For one answer."""
BODY_MAX = 4 * 2**20
EVENTS_MAX = 1000
"""That nobody has taken yet; older ones are dropped."""
SHOWN = 4
"""Newest events that a Sight has."""
NAME_EVERY_S = 10.0
ROWS_MAX = 12

NONE_YET = "no monitor watches this run"
ELSEWHERE = "its monitor serves on another machine only"


class Onlooker:
    """See the top of this file. Started once; others read `sight` and call `take_events`."""

    def __init__(self, folder: RunFolder, *, since_start: bool) -> None:
        """since_start: events from the run's beginning are told, not only those that come."""
        self.sight: Sight | None = None
        """The newest look; replaced whole. None before the first."""
        self.sort = "-ratio"
        self.find = ""
        """Part of a worker's or a node's name: rows of others are left out."""
        self._folder = folder
        self._asker = Asker()
        self._events: deque[Happened] = deque(maxlen=EVENTS_MAX)
        self._newest: deque[Happened] = deque(maxlen=SHOWN)
        self._after = -1
        """Number of the newest event that is known; -1: none was asked for."""
        self._since_start = since_start
        self._meta: Meta | None = None
        self._meta_at = float("-inf")
        self._pid = 0
        self._wake = threading.Event()
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="onlooker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread; one that waits for an answer is cut off."""
        self._is_over = True
        self._wake.set()
        self._asker.cut()
        if self._thread.ident is not None:
            self._thread.join(2 * TIMEOUT_S)

    def hurry(self) -> None:
        """Look at once: something else is asked for."""
        self._wake.set()

    def take_events(self) -> list[Happened]:
        """Those that came since the last call."""
        found: list[Happened] = []
        with contextlib.suppress(IndexError):
            while True:
                found.append(self._events.popleft())
        return found

    def _run(self) -> None:
        while not self._is_over:
            try:
                self.sight = self.look()
            except Exception:  # a bug of ours here must not take the panel along
                logger.exception("what the monitor sees cannot be shown")
            self._wake.wait(EVERY_S)
            self._wake.clear()
        self._asker.close()

    def look(self) -> Sight:
        """Ask once."""
        link = read_link(self._folder.path)
        if link is None or not link.is_alive:
            return self._without(NONE_YET)
        if not is_near(link):
            return self._without(ELSEWHERE)
        try:
            return self._ask(link)
        except (OSError, http.client.HTTPException) as error:
            return self._without(f"the monitor does not answer ({_reason(error)})", link.url)
        except (msgspec.DecodeError, ValueError) as error:
            return self._without(f"the monitor's answer is odd ({error})", link.url)
        finally:
            if self._is_over:
                self._asker.close()

    def _ask(self, link: Link) -> Sight:
        ask = self._asker
        ask.go_to(link.url)
        if link.pid != self._pid:  # another process has other numbers
            self._pid, self._after, self._meta = link.pid, -1, None
        now = time.monotonic()
        if self._meta is None or now - self._meta_at > NAME_EVERY_S:
            self._meta, self._meta_at = ask.get("meta", Meta), now
        snapshot = ask.get("snapshot", Snapshot)
        find = f"&q={quote(self.find)}" if self.find else ""
        page = ask.get(f"workers?sort={self.sort}&limit={ROWS_MAX}{find}", Page)
        self._ask_events()
        return Sight(
            run=self._folder.run,
            state=self._state(),
            name=self._meta.name,
            kpi=snapshot.kpi,
            seq=snapshot.seq,
            t=snapshot.t,
            age_s=snapshot.age_s,
            findings=snapshot.findings,
            shards=snapshot.shards,
            page=page,
            events=list(self._newest),
            url=link.url,
        )

    def _ask_events(self) -> None:
        is_first = self._after < 0
        found = self._asker.get(f"events?after={self._after}&limit=200", Events)
        self._after = found.seq
        self._newest.extend(found.items)
        if not is_first or self._since_start:
            self._events.extend(found.items)
            self._since_start = False  # one that was started again tells what it had read

    def _state(self) -> str:
        """The launcher knows it before the monitor does."""
        status = self._folder.status
        assert self._meta is not None
        return self._meta.state if status is None else str(status.get("state", ""))

    def _without(self, why: str, url: str = "") -> Sight:
        """What the launcher has written down."""
        status = self._folder.status or {}
        try:
            kpi, at = kpi_of_status(status), float(status["at"])
        except (KeyError, TypeError, AttributeError, ValueError):
            kpi, at = Kpi(), time.time()
        return Sight(
            run=self._folder.run,
            state=str(status.get("state", "starting")),
            name="" if self._meta is None else self._meta.name,
            kpi=kpi,
            t=at,
            events=list(self._newest),
            url=url,
            unknown=why,
        )


class Asker:
    """One connection to a monitor, kept open. Used by one thread, but for `cut`."""

    def __init__(self) -> None:
        self._url = ""
        self._base = ""
        self._secret = ""
        self._connection: http.client.HTTPConnection | None = None
        self._is_cut = False

    def go_to(self, url: str) -> None:
        """Raises: ValueError for what is no link."""
        if url == self._url:
            return
        self.close()
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError("it has no http link")
        self._url = url
        self._base = parts.path.rstrip("/")
        self._secret = parse_qs(parts.query).get(KEY, [""])[0]
        self._connection = http.client.HTTPConnection(
            parts.hostname, parts.port or 80, timeout=TIMEOUT_S
        )

    def get(self, what: str, shape: type[_T]) -> _T:
        """Raises: OSError, HTTPException, msgspec.DecodeError, ValueError."""
        connection = self._connection
        if connection is None or self._is_cut:
            raise ConnectionError("there is no connection")
        try:
            connection.request(
                "GET", f"{self._base}/api/v1/{what}", headers={TOKEN_HEADER: self._secret}
            )
            answer = connection.getresponse()
            body = answer.read(BODY_MAX + 1)
        except BaseException:
            self.close()
            raise
        if answer.status != 200 or len(body) > BODY_MAX:
            self.close()
            size = f", {len(body)} bytes" if len(body) > BODY_MAX else ""
            raise ValueError(f"status {answer.status}{size}")
        return msgspec.json.decode(body, type=shape)

    def cut(self) -> None:
        """From another thread: whoever waits for an answer waits no more."""
        self._is_cut = True
        connection = self._connection
        sock = None if connection is None else connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(2)

    def close(self) -> None:
        self._url = ""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def is_near(link: Link) -> bool:
    """It can be asked from here: what serves there on the loopback is another program here."""
    try:
        name = urlsplit(link.url).hostname or ""
    except ValueError:
        return False
    return link.host == socket.gethostname() or not is_loopback(name)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"{TIMEOUT_S:.0f} s"
    return str(error) or type(error).__name__
