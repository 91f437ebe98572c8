"""Listing: what the depot of a shard holds at one moment; who may write there, and what may go.

    e<epoch>                                        a claim: that epoch has begun
    e<epoch>-v<version>[-<n>].safetensors           the tensors of a snapshot
    e<epoch>-v<version>[-<n>].json                  its manifest, written last: now it is there

Every name carries the epoch of whoever has written it, so no epoch writes over another's files.
Pure: no I/O.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from distbelief.param_server.errors import SnapshotFenced

TENSORS = ".safetensors"
MANIFEST = ".json"
_CLAIM = re.compile(r"e(\d{6,12})")
_SNAPSHOT = re.compile(r"e(\d{6,12})-v(\d{12,18})(?:-(\d{6,12}))?")

Age = tuple[int, int, int]


def claim_of(epoch: int) -> str:
    """The name of an epoch's claim."""
    return f"e{epoch:06d}"


def age_of(name: str) -> Age | None:
    """Epoch, version and number of a snapshot's name, which sort by age; None for no such name."""
    match = _SNAPSHOT.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2]), int(match[3] or 0))


def newest_first(names: Iterable[str]) -> list[str]:
    """Names of snapshots, each once; others are left out."""
    aged = {name: age for name in names if (age := age_of(name)) is not None}
    return sorted(aged, key=aged.__getitem__, reverse=True)


@dataclass(frozen=True, slots=True)
class Listing:
    """See the top of this file."""

    claims: frozenset[int]
    whole: tuple[str, ...]
    """Snapshots with their tensors and manifest, newest first."""
    torn: tuple[str, ...]
    """Those with only one of the two."""

    @classmethod
    def of(cls, files: Iterable[str]) -> "Listing":
        """Files that are not ours are passed over."""
        claims: set[int] = set()
        manifests: set[str] = set()
        tensors: set[str] = set()
        for file in files:
            if claim := _CLAIM.fullmatch(file):
                claims.add(int(claim[1]))
            elif file.endswith(MANIFEST):
                manifests.add(file.removesuffix(MANIFEST))
            elif file.endswith(TENSORS):
                tensors.add(file.removesuffix(TENSORS))
        whole, torn = newest_first(manifests & tensors), newest_first(manifests ^ tensors)
        return cls(frozenset(claims), tuple(whole), tuple(torn))

    @property
    def epoch(self) -> int:
        """The latest that has claimed the depot, or has left something there; 0 if none has."""
        ages = [age for name in (*self.whole, *self.torn) if (age := age_of(name)) is not None]
        return max([*self.claims, *(age[0] for age in ages)], default=0)

    def check(self, epoch: int, where: str) -> None:
        """See that an epoch may still write. Raises: SnapshotFenced if a later one has come."""
        if self.epoch > epoch:
            raise SnapshotFenced(f"{where} is epoch {self.epoch}'s, this one is {epoch}")

    def surplus(self, epoch: int, keep: int) -> list[str]:
        """Files that an epoch may remove, in this order.

        Never what a later epoch has written, nor the newest `keep` snapshots. A manifest goes
        before its tensors: what is half removed is not there. What is torn was left by a process
        that ended; the caller itself is writing nothing.
        """
        old = [name for name in (*self.whole[keep:], *self.torn) if _epoch_of(name) <= epoch]
        files = [file for name in reversed(old) for file in (name + MANIFEST, name + TENSORS)]
        return files + [claim_of(one) for one in sorted(self.claims) if one < epoch]


def _epoch_of(name: str) -> int:
    age = age_of(name)
    assert age is not None  # Listing.of has no other names
    return age[0]
