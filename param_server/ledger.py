"""Ledger: what a shard has acknowledged, written down before each ack leaves.

What a process has written survives it: a killed shard takes its memory along, but not the
kernel's page cache. So nothing here is synced, and after kill -9 the next process still knows
which acknowledged pushes its snapshot lacks. Those it is owed by their workers (`Part.owe`); the
history checker reads the same files.

    file   = ledger-e<epoch>-<number>        a new number each time a snapshot is taken
    file   = record*                         a torn record at the end is one that was not acked
    record = length (4 bytes, little-endian), msgpack of a Begun or a Record, as an array
"""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgpack

from distbelief.param_server.image import ShardImage
from distbelief.param_server.protocol import Ack, Push
from distbelief.param_server.shard import Shard

logger = logging.getLogger(__name__)

_LENGTH = 4
RECORD_MAX = 2**20
"""Bytes; more is a damaged file."""


class Begun(NamedTuple):
    """An epoch begins, from a snapshot."""

    epoch: int
    at: float
    """Seconds of the host's monotonic clock."""
    of_epoch: int
    """In which the snapshot was taken; 0 if there is none."""
    part: Sequence[int]
    version: Sequence[int]
    """Of the parts in the snapshot."""


class Record(NamedTuple):
    """One acknowledged push, with a column a part."""

    epoch: int
    at: float
    w: str
    inc: int
    seq: int
    samples: int
    part: Sequence[int]
    status: Sequence[str]
    version: Sequence[int]
    """Of the part, after it."""
    base: Sequence[int]
    bseq: Sequence[int]
    staleness: Sequence[int]
    crc: Sequence[int]
    """Empty where the push did not leave its host."""


class Ledger:
    """The files of one shard in one folder, written by its epoch. Used by one thread."""

    def __init__(self, folder: Path, epoch: int, *, keeps_all: bool = False) -> None:
        """keeps_all: leave everything there, for the history checker."""
        self._folder = folder
        self._epoch = epoch
        self._keeps_all = keeps_all
        self._number = 0
        self._fd = -1
        self._marks: list[str] = []
        """Files with which the newest snapshots on disk begin, oldest first."""
        self.error = ""
        """Why something could not be written; lost pushes may be miscounted then."""

    def write(self, push: Push, ack: Ack) -> None:
        """Note one push before its ack is sent."""
        record = Record(
            self._epoch,
            time.monotonic(),
            push.w,
            push.inc,
            push.seq,
            push.samples,
            push.part,
            ack.status,
            ack.version,
            push.base,
            push.bseq,
            ack.staleness,
            push.crc,
        )
        self._append(record)

    def begin(self, image: ShardImage | None) -> None:
        """Note what this epoch goes on from."""
        parts = () if image is None else image.parts
        begun = Begun(
            self._epoch,
            time.monotonic(),
            0 if image is None else image.epoch,
            [part.index for part in parts],
            [part.version for part in parts],
        )
        self._append(begun)

    def _append(self, record: Record | Begun) -> None:
        data: bytes = msgpack.packb(record)
        try:
            if self._fd < 0:
                self._fd = self._open()
            os.write(self._fd, len(data).to_bytes(_LENGTH, "little") + data)
        except OSError as error:
            if not self.error:
                logger.error("%s cannot be written: %s", self._path, error)
            self.error = str(error)

    def turn(self) -> str:
        """A snapshot is taken: what comes from here on is not in it. Returns where it begins."""
        self.close()
        self._number += 1
        return self._path.name

    def forget(self, start: str, keep: int) -> None:
        """The snapshot whose `turn` returned `start` is on disk, and `keep` of them stay there."""
        self._marks.append(start)
        del self._marks[:-keep]
        if self._keeps_all or len(self._marks) < keep:
            return
        for name in names(self._folder):
            if name < self._marks[0]:
                (self._folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def _path(self) -> Path:
        return self._folder / f"ledger-e{self._epoch:06d}-{self._number:06d}"

    def _open(self) -> int:
        self._folder.mkdir(parents=True, exist_ok=True)
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def names(folder: Path) -> list[str]:
    """Files of ledgers, in the order in which they were written."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("ledger-e"))


def read(folder: Path) -> Iterator[Record | Begun]:
    """All records of a shard, in their order; what is torn at the end of a file is left out."""
    for name in names(folder):
        data = (folder / name).read_bytes()
        at = 0
        while len(data) - at > _LENGTH:
            length = int.from_bytes(data[at : at + _LENGTH], "little")
            start, at = at + _LENGTH, at + _LENGTH + length
            if not 0 < length <= RECORD_MAX or at > len(data):
                break
            try:
                fields = msgpack.unpackb(data[start:at])
                kind = Begun if len(fields) == len(Begun._fields) else Record
                yield kind(*fields)
            except (ValueError, TypeError, msgpack.UnpackException):
                break


def recall(shard: Shard, image: ShardImage, folder: Path) -> None:
    """Tell a restored shard what was acknowledged after its image was taken."""
    version = {part.index: part.version for part in image.parts}
    for record in read(folder):
        if isinstance(record, Begun):
            continue
        after = [
            index
            for index, status, now in zip(record.part, record.status, record.version, strict=True)
            if status == "applied"
            and index in version
            and (record.epoch, now) > (image.epoch, version[index])
        ]
        if after and record.epoch < shard.config.epoch:
            shard.remember(record.w, record.inc, record.seq, after)
