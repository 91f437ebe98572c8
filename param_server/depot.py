"""Depot: the snapshots of one shard in a store that other hosts reach, beside those on its disk.

A snapshot is there as soon as its manifest is, which has the digests of itself and of the tensors
and is written last; listing.py has the names. So a reader never takes half of one, on stores
without a rename too.

Fencing, without compare-and-swap. A new epoch writes its claim, and *then* looks for the newest
snapshot. Whoever puts a snapshot writes it whole, and *then* looks for claims: only if there is no
later one is the snapshot durable. Where a store shows what was written from then on (see
storage.py), one of the two sees the other: either the old epoch is told that it is fenced, or the
new one finds its snapshot and goes on from it. What is told to be durable is never lost to a
successor. An old epoch that does not see the claim at once may still write files of its own
epoch: they are older than every file of the new one, and nobody goes on from them any more.
"""

import logging
from pathlib import Path

from distbelief.param_server import snapshot
from distbelief.param_server.errors import SnapshotCorrupt, SnapshotFailed, SnapshotFenced
from distbelief.param_server.listing import MANIFEST, TENSORS, Listing, claim_of
from distbelief.param_server.storage import Storage

logger = logging.getLogger(__name__)


class Depot:
    """See the top of this file. Its methods may run in any one thread."""

    def __init__(self, storage: Storage, shard: str, epoch: int, keep: int = 2) -> None:
        """shard: its name, under which its files are. epoch: of whom this is; keep: as of
        SnapshotStore."""
        self.where = f"{storage.root}/{shard}"
        self.epoch = epoch
        self._storage = storage
        self._shard = shard
        self._keep = keep
        self._has_begun = False
        """The claim may be there: it was written, or its writing has failed."""
        self._has_claimed = False

    def claim(self) -> Listing:
        """Say for good that this epoch saves here: no earlier one may. May be called again.

        Returns: what is there, to go on from.
        Raises: SnapshotFenced if this one or a later one has been here; SnapshotFailed.
        """
        if self._has_claimed:
            return self._checked()
        try:
            if not self._has_begun:
                self._see_that_it_is_new()
            self._has_begun = True
            self._storage.make(self._shard)
            self._storage.write(self._name(claim_of(self.epoch)), str(self.epoch).encode())
        except OSError as error:
            raise SnapshotFailed(f"{self.where} cannot be claimed: {error}") from error
        listing = self._checked()
        if self.epoch not in listing.claims:
            raise SnapshotFailed(f"{self.where} does not show the claim that was just written")
        self._has_claimed = True
        return listing

    def names(self) -> list[str]:
        """Snapshots there, newest first. Raises: SnapshotFailed."""
        return list(self._list().whole)

    def latest_epoch(self) -> int:
        """That has been here; 0 if none has. Raises: SnapshotFailed."""
        return self._list().epoch

    def put(self, folder: Path) -> None:
        """Copy a snapshot of this machine there; it is durable when this returns.

        Raises: SnapshotFenced; SnapshotFailed: it may be there or not, and may be put again.
        """
        name = folder.name
        before = self.claim()
        try:
            manifest = (folder / snapshot.MANIFEST).read_bytes()
            if name in before.whole and self._storage.read(self._name(name + MANIFEST)) != manifest:
                # Of a folder that somebody has emptied meanwhile: it must not look whole.
                self._storage.remove(self._name(name + MANIFEST))
            elif name in before.whole:
                return
            self._storage.put(self._name(name + TENSORS), folder / snapshot.TENSORS)
            self._storage.write(self._name(name + MANIFEST), manifest)
        except OSError as error:
            raise SnapshotFailed(f"{name} could not be copied to {self.where}: {error}") from error
        after = self._checked()
        if name not in after.whole:
            raise SnapshotFailed(f"{self.where} does not show {name}, which was just written")
        self._prune(after)

    def get(self, name: str, folder: Path) -> None:
        """Copy a snapshot from there into a folder, as SnapshotStore has it. Nothing is checked.

        Raises: SnapshotFailed; SnapshotCorrupt where it is not there any more.
        """
        try:
            self._storage.get(self._name(name + MANIFEST), folder / snapshot.MANIFEST)
            self._storage.get(self._name(name + TENSORS), folder / snapshot.TENSORS)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and name not in self._list().whole:
                raise SnapshotCorrupt(f"{self.where}/{name} is not there any more") from error
            raise SnapshotFailed(f"{self.where}/{name} cannot be read: {error}") from error

    def _see_that_it_is_new(self) -> None:
        """Of two with the same number one was started by another launcher."""
        before = self._list().epoch
        if before >= self.epoch:
            raise SnapshotFenced(f"{self.where} is epoch {before}'s, this one is {self.epoch}")

    def _checked(self) -> Listing:
        listing = self._list()
        listing.check(self.epoch, self.where)
        return listing

    def _list(self) -> Listing:
        try:
            return Listing.of(self._storage.names(self._shard))
        except OSError as error:
            raise SnapshotFailed(f"{self.where} cannot be read: {error}") from error

    def _prune(self, listing: Listing) -> None:
        for file in listing.surplus(self.epoch, self._keep):
            try:
                self._storage.remove(self._name(file))
            except OSError as error:  # it is tried again after the next one
                logger.warning("%s/%s cannot be removed: %s", self.where, file, error)
                return

    def _name(self, file: str) -> str:
        return f"{self._shard}/{file}"
