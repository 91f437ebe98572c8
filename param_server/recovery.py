"""Recovery: what a shard that starts goes on from: of its own disk and the depot the newest."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

from distbelief.param_server.depot import Depot
from distbelief.param_server.errors import SnapshotCorrupt, SnapshotFailed, SnapshotFenced
from distbelief.param_server.image import ShardImage
from distbelief.param_server.listing import age_of, newest_first
from distbelief.param_server.snapshot import SnapshotStore

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""For a store that cannot be reached when a shard starts that needs it."""
AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Found:
    """The newest snapshot that is whole."""

    name: str
    image: ShardImage
    wrong: tuple[str, ...]
    """What was wrong with newer ones."""
    is_stored: bool
    """It is in the depot too, or there is none."""


def begin(
    store: SnapshotStore,
    depot: Depot | None,
    epoch: int,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Found | None:
    """Claim the disk and the depot for an epoch, and load what it goes on from.

    Raises: SnapshotFenced; SnapshotFailed where the depot cannot be used, and could have something
    newer than this disk; SnapshotCorrupt.
    """
    try:
        store.claim(epoch)  # from here on no earlier process saves there
    except SnapshotFenced:
        raise
    except SnapshotFailed as error:
        logger.error("%s", error)
    deadline = clock() + PATIENCE_S
    while depot is not None:
        try:
            depot.claim()
            return _stored(recover(store, depot), store, depot)
        except SnapshotFenced:
            raise
        except SnapshotFailed as error:
            if has_all(store.names(), epoch):
                logger.error("%s. The shard goes on from its own disk, which has all of it", error)
                found = recover(store, None)
                return None if found is None else replace(found, is_stored=False)
            if clock() >= deadline:
                raise
            logger.error("%s. There may be something newer: waiting for it", error)
            sleep(AGAIN_S)
    return recover(store, None)


def has_all(here: Iterable[str], epoch: int) -> bool:
    """No depot can have anything newer than these snapshots of the disk. Pure.

    The epoch before this one has saved here; and whatever it copied to the depot was here first.
    """
    names = newest_first(here)
    age = age_of(names[0]) if names else None
    return age is not None and age[0] == epoch - 1


def _stored(found: Found | None, store: SnapshotStore, depot: Depot) -> Found | None:
    """What only this disk has is copied now: nothing that was durable may become less so."""
    if found is None or found.is_stored:
        return found
    try:
        depot.put(store.folder / found.name)
    except SnapshotFenced:
        raise
    except SnapshotFailed as error:
        logger.error("%s. It is tried again while the shard serves", error)
        return found
    return replace(found, is_stored=True)


def recover(store: SnapshotStore, depot: Depot | None) -> Found | None:
    """Load the newest snapshot that is whole; None if there is none, whole or not.

    What only the depot has is copied to this disk first.
    Raises: SnapshotCorrupt if there are snapshots and not one of them is whole; SnapshotFailed
    where the depot or this disk cannot be used: an older one is not taken for that.
    """
    here, there = store.names(), [] if depot is None else depot.names()
    wrong: list[str] = []
    for name, is_here in choices(here, there):
        try:
            if is_here:
                image = store.load(name)
            else:
                assert depot is not None
                image = store.adopt(name, partial(depot.get, name))
        except SnapshotCorrupt as error:
            wrong.append(str(error))
        else:
            return Found(name, image, tuple(wrong), depot is None or name in there)
    if wrong:
        raise SnapshotCorrupt("no snapshot is whole: " + "; ".join(wrong))
    return None


def choices(here: Iterable[str], there: Iterable[str]) -> list[tuple[str, bool]]:
    """Which to try in which order: (name, whether the one on this disk). Pure.

    The newest first, whoever has it; of the same one first what need not be copied.
    """
    here, there = frozenset(here), frozenset(there)
    return [
        (name, is_here)
        for name in newest_first(here | there)
        for is_here in (True, False)
        if name in (here if is_here else there)
    ]
