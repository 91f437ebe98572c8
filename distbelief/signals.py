"""Signals: how Ctrl-C, SIGTERM and a closed terminal reach a run.

    1st Ctrl-C or SIGTERM   the run stops safely: workers finish their leases, shards save
    2nd                     it stops now, without saving
    3rd                     the process ends on the spot
    SIGHUP                  the terminal is gone; the run goes on

A handler only sets flags; the run's loop says what is to be said. Outside that loop (while data
is opened, while the model is evaluated) nobody looks at flags, so there the first signal is a
KeyboardInterrupt, as it is anywhere else.
"""

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Protocol

HUNG_UP = "The terminal is closed (SIGHUP): the run goes on."
_SHOW_CURSOR = b"\x1b[?25h\n"

_Handler = Callable[[int, FrameType | None], Any] | int | None  # Any: as typeshed has it


class Asked(Protocol):
    """What a signal is passed on to: `distbelief.stop.Stop`."""

    def ask(self) -> None: ...


class Signals:
    """Takes the signals of this process while it is entered. For the main thread."""

    def __init__(self) -> None:
        self.first: int | None = None
        """The signal that asked to stop first; the exit code is 128 + this."""
        self.news: deque[str] = deque()
        """What the run's loop should say."""
        self.last_words: Callable[[], bytes] | None = None
        """Written to standard output where the process ends on the spot."""
        self.stop: Asked | None = None
        """What the run's loop looks at, while there is one."""
        self._num_asked = 0
        self._before: dict[int, _Handler] = {}

    def __enter__(self) -> "Signals":
        global _current
        assert _current is None
        self._before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._hang_up)
        _current = self
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.first = self.first or number
        self._num_asked += 1
        if self._num_asked >= 3:
            if os.isatty(2):  # the live line may have hidden it
                os.write(2, _SHOW_CURSOR)
            if self.last_words is not None:
                with contextlib.suppress(Exception):
                    os.write(1, self.last_words())
            os._exit(128 + self.first)
        if self.stop is None:
            raise KeyboardInterrupt
        self.stop.ask()

    def _hang_up(self, *_: object) -> None:
        self.news.append(HUNG_UP)


_current: Signals | None = None
"""A process has one set of handlers, so there is one of these."""


@contextlib.contextmanager
def heeding(stop: Asked) -> Iterator[None]:
    """Around the run's loop, which looks at `stop`: signals ask it instead of interrupting.

    Where the command line has not taken the signals, they are taken here; in a thread that may
    not, they stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with Signals() if _current is None else contextlib.nullcontext(_current) as signals:
        signals.stop = stop
        try:
            yield
        finally:
            signals.stop = None


def take_news() -> list[str]:
    """What signals have brought since the last call, for the run's loop to say and to log."""
    texts: list[str] = []
    while _current is not None and _current.news:
        texts.append(_current.news.popleft())
    return texts
