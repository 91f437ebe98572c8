"""Recording: what the monitor knows, on disk, so that a finished run is shown again as it was.

    RUN/metrics/rows-1s-000123.safetensors   a chunk of 60 bins of each tier of Rows
                curves-near-...              600 seconds of the run's curves; -far: 600 minutes
                now.safetensors.z, meta.json all else: what is now, names, counts
                events.jsonl                 one event a line, in order

As much is kept as in memory: older chunks are removed. A worker costs 25 kB for the first hour,
1 kB for each that follows and 53 kB at most, beside 1 to 2 kB of what is now; the curves cost
260 kB an hour and 13 MB at most. A file is whole or not there; what is damaged is left out. Arrays
lie in safetensors, which can hold nothing else. This is the one file of the store that knows disks.
"""

import json
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from distbelief.monitor.events import KEPT
from distbelief.monitor.history import runs_of
from distbelief.monitor.source import Json
from distbelief.monitor.store import Store

logger = logging.getLogger(__name__)

EVERY_S = 60.0
"""Between two saves."""
VERSION = 1
ROWS_BINS, CURVE_BINS = 60, 600
LINE_MAX = 64 * 1024
SUFFIX = ".safetensors"
NOW = "now.safetensors.z"
DAMAGED = (OSError, ValueError, KeyError, IndexError, TypeError, SafetensorError, zlib.error)
"""Whatever a file may raise that was cut off or changed."""

Arrays = dict[str, NDArray[Any]]  # Any: each file says of what


class Recording:
    """See the top of this file. Used by one thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_damaged = 0
        self.saved_at: float | None = None
        self._done: dict[str, int] = {}
        """Newest bin of each kind of chunks that is on disk."""
        self._events: list[Json] = []
        self._num_lines = 0

    def watch(self, store: Store) -> None:
        """Hear of its events from now on."""
        store.on_event = self._events.append

    def save_if_due(self, store: Store, now: float) -> bool:
        """Raises: OSError."""
        if self.saved_at is None:
            self.saved_at = now
        if now - self.saved_at < EVERY_S:
            return False
        self.save(store, now)
        return True

    def save(self, store: Store, now: float) -> None:
        """Write what is new. Raises: OSError."""
        self.saved_at = now
        self.folder.mkdir(parents=True, exist_ok=True)
        num = len(store.fleet)
        for ring in store.rows.rings:
            cells = {m: table[:, :num] for m, table in ring.cells.items()}
            kind = f"rows-{ring.tier.bin_s}s"
            self._save_chunks(kind, ring.stamp, cells, ROWS_BINS, ring.tier.num_bins)
        curves = store.curves
        near = {"values": curves.near}
        self._save_chunks("curves-near", curves.near_stamp, near, CURVE_BINS, len(curves.near))
        far = {"values": curves.far}
        self._save_chunks("curves-far", curves.far_stamp, far, CURVE_BINS, len(curves.far))
        state, arrays = store.keep()
        _write(self.folder / NOW, zlib.compress(_packed(arrays), 1))
        state = {"format": VERSION, "series": curves.names, **state}
        _write(self.folder / "meta.json", json.dumps(state, separators=(",", ":")).encode())
        self._save_events(store)

    def load(self, store: Store) -> bool:
        """Fill a new store. Returns: whether there was anything; what is damaged is left out."""
        try:
            state = json.loads((self.folder / "meta.json").read_text())
            if state["format"] != VERSION:
                raise ValueError(f"format {state['format']}")
        except FileNotFoundError:
            return False
        except DAMAGED as error:
            self._damaged(self.folder / "meta.json", error)
            return False
        arrays = self._read(self.folder / NOW)
        try:
            store.restore(state, arrays)
        except DAMAGED as error:
            self._damaged(self.folder / NOW, error)
        num = len(store.fleet)
        store.rows.grow(num)
        for ring in store.rows.rings:
            kind = f"rows-{ring.tier.bin_s}s"
            for path, chunk in self._chunks(kind):
                try:
                    stamp, place = _places(chunk["stamp"], ring.tier.num_bins)
                    width = min(num, chunk["lag"].shape[1])
                    for metric, table in ring.cells.items():
                        # A worker that came later has no loss yet; elsewhere 0 says so.
                        table[place] = np.nan if metric == "loss" else 0
                        table[place, :width] = chunk[metric][:, :width]
                    ring.stamp[place] = stamp
                except DAMAGED as error:
                    self._damaged(path, error)
            self._done[kind] = int(ring.stamp.max())
        curves = store.curves
        if state.get("series") == curves.names:
            for kind, stamps, values in (
                ("curves-near", curves.near_stamp, curves.near),
                ("curves-far", curves.far_stamp, curves.far),
            ):
                for path, chunk in self._chunks(kind):
                    try:
                        stamp, place = _places(chunk["stamp"], len(stamps))
                        values[place] = chunk["values"]
                        stamps[place] = stamp
                    except DAMAGED as error:
                        self._damaged(path, error)
                self._done[kind] = int(stamps.max())
        self._load_events(store)
        return True

    def _save_chunks(
        self, kind: str, stamp: NDArray[np.int64], tables: Arrays, length: int, num_bins: int
    ) -> None:
        newest = int(stamp.max())
        done = self._done.get(kind, -1)
        for number, place in runs_of(stamp, length):
            if number < done // length:
                continue
            chunk = {"stamp": stamp[place]} | {m: table[place] for m, table in tables.items()}
            _write(self.folder / f"{kind}-{number:09d}{SUFFIX}", _packed(chunk))
        self._done[kind] = newest
        for path, number in self._numbered(kind):
            if (number + 1) * length <= newest - num_bins:
                path.unlink(missing_ok=True)

    def _numbered(self, kind: str) -> Iterator[tuple[Path, int]]:
        for path in sorted(self.folder.glob(f"{kind}-*{SUFFIX}")):
            number = path.name.removesuffix(SUFFIX).rpartition("-")[2]
            if number.isascii() and number.isdigit():
                yield path, int(number)

    def _chunks(self, kind: str) -> Iterator[tuple[Path, Arrays]]:
        for path, _ in self._numbered(kind):
            chunk = self._read(path)
            if chunk:
                yield path, chunk

    def _read(self, path: Path) -> Arrays:
        try:
            data = path.read_bytes()
            return load(zlib.decompress(data) if path.name == NOW else data)
        except DAMAGED as error:
            self._damaged(path, error)
            return {}

    def _damaged(self, path: Path, error: Exception) -> None:
        self.num_damaged += 1
        logger.warning("left out file=%s why=%s: %s", path, type(error).__name__, error)

    def _save_events(self, store: Store) -> None:
        path = self.folder / "events.jsonl"
        new, self._events[:] = list(self._events), []
        if self._num_lines + len(new) > 2 * KEPT:
            # As in memory, the newest are kept.
            lines = [_line(item) for item in store.log]
            _write(path, b"".join(lines))
            self._num_lines = len(lines)
        elif new:
            with path.open("ab") as file:
                file.write(b"".join(map(_line, new)))
            self._num_lines += len(new)

    def _load_events(self, store: Store) -> None:
        path = self.folder / "events.jsonl"
        try:
            with path.open("rb") as file:
                for line in file:
                    self._num_lines += 1
                    try:
                        item = json.loads(line[:LINE_MAX])
                        store.restore_event(item)
                    except DAMAGED:
                        self.num_damaged += 1
        except FileNotFoundError:
            return
        if self._num_lines and not line.endswith(b"\n"):
            with path.open("ab") as file:  # it was cut off there; begin a new line
                file.write(b"\n")


def _places(stamp: NDArray[Any], num_bins: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    stamp = stamp.astype(np.int64)
    return stamp, stamp % num_bins


def _line(item: Json) -> bytes:
    return json.dumps(item, separators=(",", ":")).encode() + b"\n"


def _packed(arrays: Arrays) -> bytes:
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    half = path.with_name(path.name + ".half")
    half.write_bytes(data)
    os.replace(half, path)
