"""Live: the line a person watches while a run trains; plain lines where there is no terminal."""

import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from distbelief.controller.pace import Progress
from distbelief.launcher_log import events
from distbelief.terminal import outliving

PLAIN_EVERY_S = 10.0
"""Seconds between two plain lines."""


class LiveLine:
    """Shows progress and events, as long as there is somebody to see them.

    A context manager; used by one thread.
    """

    def __init__(
        self, out: TextIO, *, plain: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """plain: one line every PLAIN_EVERY_S and for each event, instead of a line that moves."""
        self._console = Console(file=outliving(out), highlight=False, soft_wrap=True)
        self._live = (
            None
            if plain or not self._console.is_terminal
            else Live(console=self._console, refresh_per_second=4, transient=True)
        )
        self._clock = clock
        self._shown_at = float("-inf")

    def __enter__(self) -> "LiveLine":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """An event: stays on the screen, above the line."""
        events.info("%s", text)
        self._console.print(Text(text))

    def update(self, progress: Progress) -> None:
        """Show how far the run is."""
        now = self._clock()
        if self._live is not None:
            self._live.update(Text(_line(progress)))
        elif now - self._shown_at >= PLAIN_EVERY_S:
            if progress.samples:
                self._console.print(Text(_line(progress)))
            self._shown_at = now


def _line(p: Progress) -> str:
    total = "" if p.total_samples is None else f"/{p.total_samples}"
    share = "" if not p.total_samples else f" ({p.samples / p.total_samples:.0%})"
    loss = "-" if p.loss is None else f"{p.loss:.4g}"
    stale = p.staleness
    quantiles = "/".join(
        _or_dash(v) for v in (stale.quantile(0.5), stale.quantile(0.95), stale.maximum)
    )
    refused = f" refused={p.refused}" if p.refused else ""
    return (
        f"samples={p.samples}{total}{share} eta={_duration(p.eta_s)} loss={loss} "
        f"samples/s={p.samples_per_s:.0f} staleness p50/p95/max={quantiles} "
        f"workers={p.num_workers} updates={p.updates}{refused}"
    )


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
