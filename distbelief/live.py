"""Live: what a person or a program sees of a run while it trains: a panel, plain lines, or JSON.

    panel    in a terminal; drawn by a thread of its own, above it what is said stays
    plain    a line every PLAIN_EVERY_S, and one for each event
    JSON     on one stream a tick every second, events and findings; on the other what is said

What is shown comes from the run's monitor (onlooker.py), and where that does not answer from the
controller. The thread that trains only leaves word: it never waits for a terminal that has been
stopped with Ctrl-S, a reader that does not read, or a monitor.
"""

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

import msgspec
from rich.console import Console, ConsoleDimensions
from rich.live import Live
from rich.text import Text

from distbelief.controller.pace import Progress
from distbelief.folder import RunFolder
from distbelief.launcher_log import events
from distbelief.onlooker import Onlooker
from distbelief.panel import panel
from distbelief.plain import event_line, tick_line
from distbelief.record import Findings, event_of, finding_of, line, tick_of
from distbelief.sight import Sight, kpi_of_progress
from distbelief.terminal import outliving

logger = logging.getLogger(__name__)

PLAIN_EVERY_S = 30.0
"""Seconds between two plain lines: a night in a CI log is a thousand of them."""
TICK_EVERY_S = 1.0
"""Seconds between two ticks of JSON."""
DRAW_EVERY_S = 0.25
WAITING_MAX = 10_000
"""Things said that nobody has shown yet; older ones are dropped."""
LEAVE_S = 3.0
"""For showing what is left at the end; a terminal that is stopped does not hold the run up."""
UNSAID = ("slow", "well", "recover", "quarantine", "storage")
"""Events that the launcher itself does not tell."""
KEYS = "Ctrl-C stop safely   elsewhere: distbelief top, logs -f, stop"


class LiveLine:
    """See the top of this file.

    A context manager; used by one thread. Not entered, it shows everything at once.
    """

    def __init__(
        self,
        out: TextIO,
        *,
        plain: bool,
        records: TextIO | None = None,
        color: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """plain: lines instead of a panel. records: where lines of JSON go; then `out` gets only
        what is said. color: None as the terminal and NO_COLOR have it."""
        no_color = None if color is None else not color
        self._console = Console(file=outliving(out), highlight=False, no_color=no_color)
        self._records = None if records is None else outliving(records)
        is_panel = not plain and records is None and self._console.is_terminal and not in_ci()
        # Drawn by our thread: rich's own would hold a lock that the run would wait for.
        self._live = (
            Live(console=self._console, auto_refresh=False, transient=True) if is_panel else None
        )
        self._drawn: tuple[Sight, ConsoleDimensions] | None = None
        self._clock = clock
        self._shown_at = float("-inf")
        self.folder: RunFolder | None = None
        """Of the run, as soon as there is one."""
        self._run = ""
        self._progress: Progress | None = None
        self._progress_at = 0.0
        self._onlooker: Onlooker | None = None
        self._findings = Findings()
        self._said: deque[str] = deque(maxlen=WAITING_MAX)
        self._news = threading.Event()
        self._is_over = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "LiveLine":
        self._thread = threading.Thread(target=self._serve, name="live", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._onlooker is not None:
            self._onlooker.close()
        thread, self._thread = self._thread, None
        self._is_over = True
        self._news.set()
        if thread is not None:
            thread.join(LEAVE_S)
            if thread.is_alive():
                logger.info("the terminal takes nothing: the end is not shown there")

    def watch(self, folder: RunFolder) -> None:
        """That is the run. From here on its monitor is asked."""
        self.folder, self._run = folder, folder.run
        if self._thread is not None and self._onlooker is None:
            self._onlooker = Onlooker(folder, since_start=True)
            self._onlooker.start()

    def say(self, text: str) -> None:
        """Something that stays on the screen, above the panel."""
        events.info("%s", text)
        self._said.append(text)
        self._news.set()
        if self._thread is None:
            self._step()

    def update(self, progress: Progress) -> None:
        """Show how far the run is."""
        self._progress, self._progress_at = progress, time.time()
        if self._thread is None:
            self._step()

    # What the thread does

    def _serve(self) -> None:
        live = self._live
        try:
            if live is not None:
                live.start()
            while not self._is_over:
                self._news.wait(DRAW_EVERY_S)
                self._news.clear()
                self._step()
            self._step()
        except Exception:  # the run goes on
            logger.exception("what the run does cannot be shown any more")
        finally:
            if live is not None:
                with contextlib.suppress(Exception):
                    live.stop()

    def _step(self) -> None:
        """Show what is new."""
        while self._said:
            self._print(self._said.popleft())
        sight = self._sight()
        happened = [] if self._onlooker is None else self._onlooker.take_events()
        if self._records is not None:
            for event in happened:
                self._write(line(event_of(self._run, event)))
            if sight is not None and self._is_due(TICK_EVERY_S):
                for finding in self._findings.new(sight.findings):
                    self._write(line(finding_of(sight.run, finding)))
                self._write(line(tick_of(sight)))
        elif self._live is not None:
            size = self._console.size
            if sight is not None and self._is_news(sight, size):
                self._drawn = sight, size
                self._live.update(panel(sight, size.width, size.height, keys=KEYS), refresh=True)
        else:
            for event in happened:
                if event.kind in UNSAID:
                    self._print(event_line(event))
            if sight is not None and sight.kpi.progress.samples and self._is_due(PLAIN_EVERY_S):
                self._print(tick_line(sight))

    def _sight(self) -> Sight | None:
        """What the monitor sees, else what the controller knows."""
        seen = None if self._onlooker is None else self._onlooker.sight
        if seen is not None and not seen.unknown:
            return seen
        if self._progress is None:
            return seen
        kpi = kpi_of_progress(self._progress)
        if seen is None:
            state = "training" if self._progress.samples else "starting"
            return Sight(
                run=self._run, state=state, kpi=kpi, t=self._progress_at, unknown="not asked yet"
            )
        newer: Sight = msgspec.structs.replace(seen, kpi=kpi, t=self._progress_at)
        return newer

    def _is_news(self, sight: Sight, size: ConsoleDimensions) -> bool:
        """It is to be drawn again; not each time, for a line to a terminal may be slow."""
        if self._drawn is None or size != self._drawn[1]:
            return True
        if sight.unknown:  # the controller's numbers change all the time
            return self._is_due(TICK_EVERY_S)
        return sight is not self._drawn[0]

    def _is_due(self, every_s: float) -> bool:
        now = self._clock()
        if now - self._shown_at < every_s:
            return False
        self._shown_at = now
        return True

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def _write(self, text: str) -> None:
        assert self._records is not None
        self._records.write(text + "\n")
        self._records.flush()


def in_ci() -> bool:
    """Where nobody watches, and every line is kept."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")
