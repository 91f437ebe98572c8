"""What a process does for as long as it runs leaves nothing behind: no object more each time.

CPython keeps up to 2,000 tuples of each length for later. `tuple(x for ...)` takes one of length
10, cuts it, and gives back one of the length that came out: one more is kept with each call, for
as long as minutes to hours, which looks like a leak. `tuple([...])` takes the right one at once.
"""

import gc
import math
import sys
from collections.abc import Callable

import pytest

from distbelief.param_server.protocol import Fetch, Sync
from distbelief.param_server.register import Register, Saving
from distbelief.param_server.reporter import Head
from distbelief.param_server.traffic import Traffic, Trip
from distbelief.process import forget_imports
from distbelief.workers.diary import Diary
from distbelief.workers.exchange import Exchange
from distbelief.workers.staging import Known
from tests.param_server.jobs import LAYOUT, RUN, ready_shard

TIMES = 300
BLOCKS_MAX = TIMES // 3
"""Of the interpreter's memory: some come and go; one each time is what is looked for."""

HEAD = Head(
    run=RUN, token="t", name="w0", inc=1, n=1, at=1.8e9, span_s=1.0, pid=7, host="h", rss_bytes=1
)


def grown(call: Callable[[], object]) -> int:
    """Blocks more that the interpreter holds after many calls."""
    gc.collect()  # empties what is kept for later
    gc.disable()
    try:
        for _ in range(100):  # what is made once; of lists and dicts no more than 80 are kept
            call()
        before = sys.getallocatedblocks()
        for _ in range(TIMES):
            call()
        return sys.getallocatedblocks() - before
    finally:
        gc.enable()


def shards_reports() -> Callable[[], object]:
    shard, peers = ready_shard(workers=2)
    register = Register(shard)

    def call() -> None:
        for peer in peers:
            fetch = Fetch(**peer.who, part=(0, 1))
            register.note(fetch, peer.ask(fetch), 0.1, (0, 0), has_waited=True)
        register.report(HEAD, Saving())

    return call


def answers() -> Callable[[], object]:
    _, (peer,) = ready_shard()
    return lambda: (
        peer.ask(Fetch(**peer.who, part=(0, 1))),
        peer.ask(Sync(**peer.who, wants=True)),
    )


def images() -> Callable[[], object]:
    shard, _ = ready_shard()
    return lambda: shard.image().release()


def workers_reports() -> Callable[[], object]:
    diary, traffic = Diary(), Traffic()

    def call() -> None:
        for _ in range(9):  # steps a second
            diary.end(1.0, 1.8e9, Exchange(0.1), 32, staleness=3, version=9, loss=Known(1.0))
            traffic.trips += [Trip(0, True, 0.001)] * 2
        diary.report(HEAD, 1.0, traffic)

    return call


def masks() -> Callable[[], object]:
    return lambda: LAYOUT.absent_masks(["b"])


@pytest.mark.parametrize("make", [shards_reports, answers, images, workers_reports, masks])
def test_nothing_is_left_behind(make: Callable[[], Callable[[], object]]):
    assert grown(make()) < BLOCKS_MAX


def full_collections(objects: int) -> int:
    """While so many objects are made of which each is a cycle."""
    before: int = gc.get_stats()[2]["collections"]
    for _ in range(objects):
        cycle: list[object] = []
        cycle.append(cycle)
    after: int = gc.get_stats()[2]["collections"]
    return after - before


def test_what_was_imported_does_not_put_off_looking_for_garbage():
    objects = 2 * math.prod(gc.get_threshold()) + 20_000
    gc.collect()
    assert full_collections(objects) == 0
    forget_imports()
    try:
        assert full_collections(objects)
    finally:
        gc.unfreeze()
        gc.collect()
