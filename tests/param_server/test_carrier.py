"""The thread that copies snapshots to the store, and what a shard tells meanwhile."""

import threading
from typing import Any

import pytest

from distbelief.param_server.carrier import Carrier
from distbelief.param_server.depot import Depot
from distbelief.param_server.errors import SnapshotFailed, SnapshotFenced
from distbelief.param_server.protocol import Sync
from distbelief.param_server.server import ShardServer, SnapshotConfig
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.snapshot import SnapshotStore
from distbelief.param_server.storage import storage_of
from tests.helpers.children import until
from tests.helpers.stores import ObjectStore
from tests.param_server.jobs import RUN, TOKEN, Peer, make_contract, numbers, ready_shard
from tests.param_server.test_server import Clock, Wire, settle


class Shelf:
    """A depot that does as it is told: waits for `go`, fails, or is fenced."""

    where = "store/shard0"

    def __init__(self):
        self.put_names, self.errors = [], []
        self.go, self.begun = threading.Event(), threading.Event()
        self.go.set()

    def put(self, path):
        self.begun.set()
        assert self.go.wait(10)
        if self.errors:
            raise self.errors.pop(0)
        self.put_names.append(path.name)


@pytest.fixture
def shelf():
    return Shelf()


@pytest.fixture
def carrier(shelf, tmp_path):
    carrier = Carrier(shelf, tmp_path, again_s=0.01)
    yield carrier
    shelf.go.set()
    carrier.abandon()
    carrier._thread.join(10)


def test_of_those_that_wait_the_newest_is_copied(carrier, shelf):
    shelf.go.clear()
    carrier.carry("a")
    assert shelf.begun.wait(10)
    for name in "bcd":
        carrier.carry(name)
    assert carrier.names == ("a", "d")
    assert carrier.take_done() == ""
    shelf.go.set()
    until(lambda: carrier.is_idle)
    assert shelf.put_names == ["a", "d"]
    assert (carrier.take_done(), carrier.take_done()) == ("d", "")


def test_one_that_fails_is_tried_again_and_told_once(carrier, shelf, caplog):
    shelf.errors = [SnapshotFailed("no space left")] * 3
    carrier.carry("a")
    until(lambda: carrier.take_done() == "a")
    assert shelf.put_names == ["a"]
    assert carrier.error is None
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == [
        "no space left. Training goes on; it is tried again"
    ]


def test_a_newer_one_takes_the_place_of_one_that_fails(carrier, shelf):
    shelf.errors = [SnapshotFailed("no")]
    shelf.go.clear()
    carrier.carry("a")
    assert shelf.begun.wait(10)
    carrier.carry("b")
    shelf.go.set()
    until(lambda: carrier.is_idle)
    assert shelf.put_names == ["b"]


def test_who_is_fenced_tries_no_more(carrier, shelf):
    shelf.errors = [SnapshotFenced("epoch 2's")]
    carrier.carry("a")
    until(lambda: isinstance(carrier.error, SnapshotFenced))
    carrier.carry("b")
    carrier.finish(10)
    assert shelf.put_names == []
    assert isinstance(carrier.error, SnapshotFenced)


def test_at_the_end_what_waits_is_copied_and_what_fails_is_tried_once_more(carrier, shelf):
    shelf.errors = [SnapshotFailed("no")] * 100
    carrier.carry("a")
    until(lambda: carrier.error is not None)
    assert not carrier.finish(10)
    assert str(carrier.error) == "no"
    assert len(shelf.errors) < 100
    assert carrier.names == ("a",)


def test_a_store_that_does_not_answer_is_not_waited_for_for_ever(carrier, shelf):
    shelf.go.clear()
    carrier.carry("a")
    assert shelf.begun.wait(10)
    assert not carrier.finish(0.05)
    assert str(carrier.error) == "a was not copied to store/shard0 within 0 s"


def test_nothing_is_left_to_do_where_all_is_copied(carrier, shelf):
    carrier.carry("a")
    assert carrier.finish(10)
    assert carrier.take_done() == "a"


# With a shard


class Ward:
    """A shard's server whose snapshots go to an object store too."""

    def __init__(self, folder, epoch=1, shard=None):
        self.place = "objects://bucket/runs"
        self.store = SnapshotStore(folder)
        self.depot = Depot(storage_of(self.place, RUN), "shard0", epoch)
        self.carrier = Carrier(self.depot, folder, again_s=0.01)
        self.store.held = lambda: self.carrier.names
        self.clock = Clock()
        if shard is None:
            shard, [self.peer] = ready_shard(epoch=epoch)
        self.server = ShardServer(
            shard,
            Wire(),
            self.store,
            SnapshotConfig(every_s=10.0, backup_bytes=2**20),
            self.clock,
            carrier=self.carrier,
        )

    def save(self):
        """Whatever was pushed is on disk."""
        self.clock.now += 11.0
        self.server.serve_once(0.0)
        settle(self.server)

    def copied(self):
        until(lambda: self.carrier.is_idle)
        self.server.serve_once(0.0)


@pytest.fixture
def ward(tmp_path):
    ObjectStore.empty()
    ward = Ward(tmp_path / "disk")
    yield ward
    ward.carrier.abandon()
    ward.carrier._thread.join(10)
    ObjectStore.empty()


def test_a_push_is_durable_when_its_snapshot_is_in_the_store(ward):
    ward.peer.push_all(numbers(), 1)
    ObjectStore.failing = OSError("503")
    ward.save()
    until(lambda: ward.carrier.error is not None)
    ward.server.serve_once(0.0)
    assert ward.store.names() == ["e000001-v000000000001"]
    assert ward.server.saved is None
    assert ward.peer.push_all(numbers(), 2).durable == (0, 0, 0)
    assert "objects://bucket/runs/job/shard0 cannot be claimed: 503" in ward.server.storage_error
    synced = ward.peer.ask(Sync(**ward.peer.who, wants=False))
    assert (synced.is_stalled, synced.is_saved) == (True, False)
    ObjectStore.failing = None
    ward.copied()
    assert ward.server.storage_error is None
    saved: Any = ward.server.saved
    assert (saved.name, saved.taken_at) == ("e000001-v000000000001", 11.0)
    assert ward.peer.push_all(numbers(), 3).durable == (1, 1, 1)
    assert ward.depot.names() == ["e000001-v000000000001"]


def test_while_the_store_fails_the_disk_still_gets_its_snapshots(ward):
    ObjectStore.failing = OSError("503")
    for seq in range(1, 6):
        ward.peer.push_all(numbers(), seq)
        ward.save()
    assert ward.store.names()[-1] == "e000001-v000000000005"
    assert len(ward.store.names()) <= 4  # the newest two, the one in hand and the one that waits
    ObjectStore.failing = None
    ward.copied()
    assert ward.depot.names()[0] == "e000001-v000000000005"
    assert ward.peer.push_all(numbers(), 6).durable == (5, 5, 5)


def test_what_is_being_copied_is_not_removed_from_the_disk(ward, monkeypatch):
    go, begun = threading.Event(), threading.Event()
    put_file = ObjectStore.put_file

    def slow(self, source, path, **kwargs):
        begun.set()
        assert go.wait(10)
        put_file(self, source, path, **kwargs)

    monkeypatch.setattr(ObjectStore, "put_file", slow)
    for seq in range(1, 6):
        ward.peer.push_all(numbers(), seq)
        ward.save()
        assert begun.wait(10)
    assert ward.store.names()[0] == "e000001-v000000000001"
    go.set()
    ward.copied()
    assert ward.depot.names() == ["e000001-v000000000005", "e000001-v000000000001"]
    ward.peer.push_all(numbers(), 6)
    ward.save()
    assert ward.store.names() == [f"e000001-v00000000000{n}" for n in (5, 6)]


def test_while_one_is_being_copied_a_full_backup_brings_no_other(ward):
    ObjectStore.failing = OSError("503")
    ward.peer.push_all(numbers(), 1)
    ward.save()
    for seq in range(2, 66):  # half of what a worker may keep, and more
        ward.peer.push_all(numbers(), seq)
    ward.server.shard.is_waited_for = True
    for _ in range(3):
        ward.server.serve_once(0.0)
        settle(ward.server)
    assert len(ward.store.names()) == 1
    ObjectStore.failing = None
    ward.copied()
    ward.server.serve_once(0.0)
    settle(ward.server)
    ward.copied()
    assert ward.depot.names()[0] == "e000001-v000000000065"


def test_the_last_snapshot_is_in_the_store_when_the_server_ends(ward):
    ward.peer.push_all(numbers(), 1)
    ward.server.serve(lambda: True)
    assert ward.depot.names() == ["e000001-v000000000001"]
    assert ward.server.saved is not None
    assert ward.server.saved.name == "e000001-v000000000001"
    assert ward.server.storage_error is None


def test_a_last_snapshot_that_the_store_does_not_take_is_told(ward):
    ObjectStore.failing = OSError("503")
    ward.peer.push_all(numbers(), 1)
    ward.server.serve(lambda: True)
    assert ward.server.saved is None
    assert "503" in ward.server.storage_error
    assert ward.store.names() == ["e000001-v000000000001"]


def test_a_shard_whose_successor_is_in_the_store_ends_and_writes_nothing(ward, caplog):
    Depot(storage_of(ward.place, RUN), "shard0", 2).claim()
    ward.peer.push_all(numbers(), 1)
    ward.save()
    until(lambda: ward.carrier.error is not None)
    ward.server.serve(lambda: False)  # comes back at once
    assert ward.server.shard.is_deposed
    assert ward.server.saved is None
    assert storage_of(ward.place, RUN).names("shard0") == ["e000002"]
    assert "is epoch 2's, this one is 1" in caplog.text


def test_what_it_went_on_from_is_durable_once_it_is_in_the_store(ward, tmp_path):
    ward.peer.push_all(numbers(), 1)
    ObjectStore.failing = OSError("503")
    ward.save()
    ward.carrier.abandon()
    ward.carrier._thread.join(10)
    name = ward.store.names()[-1]
    image = ward.store.load(name)
    shard = Shard(ShardConfig(run=RUN, token=TOKEN, epoch=2), image)
    again = Ward(tmp_path / "disk", 2, shard)
    again.server.carry(name, image)
    peer = Peer(shard, "w0", ep=2)
    peer.hello(make_contract())
    assert peer.push_all(numbers(), 2).durable == (0, 0, 0)
    ObjectStore.failing = None
    again.copied()
    assert peer.push_all(numbers(), 3).durable == (1, 1, 1)
    assert again.server.saved is None  # `resume` would believe that it was taken just now
    again.carrier.abandon()
    again.carrier._thread.join(10)
