"""Keyboard: keys as they are pressed, without Enter, and the terminal as it was on every way out.

Ctrl-C stays what it is, a signal. SIGTERM, SIGHUP and Ctrl-Z put the terminal back too: whoever
is left with it can see what they type.
"""

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from types import FrameType
from typing import Any

_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Keyboard:
    """A context manager, for the main thread. Without a terminal it has no keys."""

    def __init__(self, descriptor: int | None = None) -> None:
        """descriptor: of the terminal; standard input by default."""
        self._descriptor = descriptor
        self._before: list[Any] | None = None  # Any: as termios has it
        self._handlers: dict[int, Any] = {}  # Any: as signal has it

    def __enter__(self) -> "Keyboard":
        with contextlib.suppress(OSError, ValueError, termios.error):
            descriptor = sys.stdin.fileno() if self._descriptor is None else self._descriptor
            # One in the background would be stopped by the kernel for asking.
            if os.isatty(descriptor) and os.tcgetpgrp(descriptor) == os.getpgrp():
                self._descriptor = descriptor
                self._before = termios.tcgetattr(descriptor)
        if self._before is not None:
            for number in _ENDING:
                self._handlers[number] = signal.signal(number, self._end)
            self._handlers[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._suspend)
            self._take()
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def keys(self, timeout_s: float) -> str:
        """What was pressed, as soon as there is something; what is no character is left out."""
        if self._before is None or self._descriptor is None:
            select.select([], [], [], timeout_s)
            return ""
        if not select.select([self._descriptor], [], [], timeout_s)[0]:
            return ""
        data = os.read(self._descriptor, 1024)
        if not data:  # the terminal is gone
            raise EOFError
        if data.startswith(b"\x1b") and len(data) > 1:  # an arrow, or another key of several bytes
            return ""
        return data.decode(errors="ignore")

    def _take(self) -> None:
        if self._before is not None and self._descriptor is not None:
            tty.setcbreak(self._descriptor, termios.TCSADRAIN)

    def _put_back(self) -> None:
        if self._before is not None and self._descriptor is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)

    def _end(self, number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    def _suspend(self, *_: object) -> None:
        self._put_back()
        os.kill(os.getpid(), signal.SIGSTOP)  # goes on here when it is continued
        self._take()
