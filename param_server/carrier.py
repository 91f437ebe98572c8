"""Carrier: the thread that copies a shard's snapshots into its depot, and owns that.

The shard's loop only leaves a name here and looks what has become of the one before. One is being
copied and one waits: a newer one takes its place. One that fails is tried again, or what is newer.
"""

import logging
import threading
from pathlib import Path

from distbelief.param_server.depot import Depot
from distbelief.param_server.errors import SnapshotFailed, SnapshotFenced

logger = logging.getLogger(__name__)

AGAIN_S = 1.0
"""From a copy that failed to the next try; twice as long after each, up to"""
AGAIN_MAX_S = 15.0


class Carrier:
    """See the top of this file. Used by one thread, but for what it does in its own."""

    def __init__(self, depot: Depot, folder: Path, again_s: float = AGAIN_S) -> None:
        """folder: of the snapshots on this machine's disk."""
        self._depot = depot
        self._folder = folder
        self._again_s = again_s
        self._lock = threading.Condition()
        self._hand = self._next = self._done = ""
        self._error: SnapshotFailed | None = None
        self._is_ending = False
        self._thread = threading.Thread(target=self._run, name="carrier")
        self._thread.start()

    @property
    def names(self) -> tuple[str, ...]:
        """Of snapshots that are still needed on this machine's disk. Any thread may ask."""
        with self._lock:
            return tuple(name for name in (self._hand, self._next) if name)

    @property
    def is_idle(self) -> bool:
        return not self.names

    @property
    def error(self) -> SnapshotFailed | None:
        """Why the last try failed; None while copies succeed."""
        with self._lock:
            return self._error

    def carry(self, name: str) -> None:
        """A snapshot is on disk: copy it, after the one that is being copied."""
        with self._lock:
            self._next = name
            self._lock.notify()

    def take_done(self) -> str:
        """The newest that is in the depot, once; empty if none has come there since."""
        with self._lock:
            done, self._done = self._done, ""
            return done

    def finish(self, timeout_s: float) -> bool:
        """Copy what is still to be copied, each tried once more; then end. May be called twice.

        Returns: all is there. It may still be at it where this takes too long: a store that does
        not answer can hold a thread for as long as it likes.
        """
        with self._lock:
            self._is_ending = True
            self._lock.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive() and self.error is None:
            with self._lock:
                self._error = SnapshotFailed(
                    f"{self._hand} was not copied to {self._depot.where} within {timeout_s:.0f} s"
                )
        return self.is_idle

    def abandon(self) -> None:
        """End without copying what waits."""
        with self._lock:
            self._next = ""
        self.finish(0.0)

    # Its own thread

    def _run(self) -> None:
        error: SnapshotFailed | None = SnapshotFailed("the thread that copies has ended early")
        try:
            error = self._carry_all()
        finally:
            with self._lock:
                self._error = error

    def _carry_all(self) -> SnapshotFailed | None:
        """Until the end; returns what was wrong then."""
        wait_s = self._again_s
        while name := self._take():
            error = self._try(name)
            with self._lock:
                self._report(name, error)
                if error is None:
                    wait_s = self._again_s
                    continue
                if self._is_ending or isinstance(error, SnapshotFenced):
                    return error
                self._lock.wait_for(lambda: self._is_ending, wait_s)
                wait_s = min(2 * wait_s, AGAIN_MAX_S)
        return None

    def _take(self) -> str:
        """The next one, when there is one; empty at the end."""
        with self._lock:
            self._lock.wait_for(lambda: self._next or self._hand or self._is_ending)
            if self._next:
                self._hand, self._next = self._next, ""
            return self._hand

    def _try(self, name: str) -> SnapshotFailed | None:
        try:
            self._depot.put(self._folder / name)
        except SnapshotFailed as error:
            return error
        return None

    def _report(self, name: str, error: SnapshotFailed | None) -> None:
        if error is None:
            self._done, self._hand = name, ""
            if self._error is not None:
                logger.info("%s takes snapshots again", self._depot.where)
        elif self._error is None and not isinstance(error, SnapshotFenced):
            logger.error("%s. Training goes on; it is tried again", error)
        self._error = error
