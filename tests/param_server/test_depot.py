"""Snapshots in a store: whole or not there, never over a successor's, on disks and on objects."""

import shutil

import pytest
import torch

from distbelief.param_server.depot import Depot
from distbelief.param_server.errors import SnapshotCorrupt, SnapshotFailed, SnapshotFenced
from distbelief.param_server.recovery import begin, choices, has_all, recover
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.snapshot import SnapshotStore
from distbelief.param_server.storage import storage_of
from tests.helpers.stores import ObjectStore
from tests.param_server.jobs import RUN, TOKEN, Peer, make_contract, numbers, ready_shard, values_of


@pytest.fixture(params=["path", "objects"])
def place(request, tmp_path):
    """A store of a kind, with a place for the run."""
    ObjectStore.empty()
    found = {
        "path": str(tmp_path / "store"),
        "file": f"file://{tmp_path}/store",
        "memory": f"memory://{tmp_path.name}",
        "objects": "objects://bucket/runs",
    }[request.param]
    storage_of(found, RUN).begin()
    yield found
    ObjectStore.empty()


@pytest.fixture
def objects():
    ObjectStore.empty()
    yield "objects://bucket/runs"
    ObjectStore.empty()


class Host:
    """A machine with a disk, on which the shard runs in one epoch after another."""

    def __init__(self, place, folder, name):
        self.place = place
        self.disk = folder / name
        self.shard: Shard
        self.peer: Peer

    def depot(self, epoch):
        return Depot(storage_of(self.place, RUN), "shard0", epoch)

    def start(self, epoch):
        """A process of the shard; the very first brings the first values."""
        self.epoch = epoch
        self.depot_ = self.depot(epoch)
        self.store = SnapshotStore(self.disk)
        found = begin(self.store, self.depot_, epoch, sleep=lambda _: None)
        if found is None:
            self.shard, [self.peer] = ready_shard(epoch=epoch)
        else:
            self.shard = Shard(ShardConfig(run=RUN, token=TOKEN, epoch=epoch), found.image)
            self.peer = Peer(self.shard, "w0", ep=epoch)
            self.peer.hello(make_contract())
        return found

    def push(self, seq):
        self.peer.push_all(numbers(seed=seq), seq)

    def save(self):
        image = self.shard.image()
        path = self.store.save(image)
        image.release()
        return path

    def put(self):
        path = self.save()
        self.depot_.put(path)
        return path.name

    @property
    def seq(self):
        return self.shard.parts[0].table["w0"].seq


@pytest.fixture
def hosts(place, tmp_path):
    return [Host(place, tmp_path, f"host{i}") for i in range(3)]


@pytest.mark.parametrize("place", ["path", "file", "memory", "objects"], indirect=True)
def test_another_host_with_an_empty_disk_goes_on_bit_for_bit(hosts):
    one, two, _ = hosts
    one.start(1)
    for seq in (1, 2, 3):
        one.push(seq)
    name = one.put()
    shutil.rmtree(one.disk)
    found = two.start(2)
    assert (found.name, found.is_stored, found.wrong) == (name, True, ())
    assert torch.equal(values_of(two.shard), values_of(one.shard))
    assert two.seq == 3
    assert two.store.names() == [name]  # on its own disk by now
    for host in (one, two):
        host.push(4)
    assert torch.equal(values_of(two.shard), values_of(one.shard))


def test_the_newest_are_kept_and_nothing_else_is_left(hosts):
    one = hosts[0]
    one.start(1)
    names = []
    for seq in range(1, 6):
        one.push(seq)
        names.append(one.put())
    assert one.depot_.names() == [names[4], names[3]]
    files = storage_of(one.place, RUN).names("shard0")
    assert sorted(files) == sorted(
        ["e000001", *(name + end for name in names[3:] for end in (".json", ".safetensors"))]
    )


def test_the_disk_is_taken_where_it_has_the_newest_and_the_store_gets_it(hosts):
    one = hosts[0]
    one.start(1)
    one.push(1)
    one.put()
    one.push(2)
    path = one.save()  # it was killed before this was copied
    found = one.start(2)
    assert (found.name, found.is_stored) == (path.name, True)
    assert one.depot_.names()[0] == path.name
    assert one.seq == 2


def test_what_the_store_has_of_a_later_epoch_counts_more_than_an_older_disk(hosts):
    one, two, _ = hosts
    one.start(1)
    for seq in (1, 2, 3):
        one.push(seq)
        one.save()
    one.depot_.put(one.store.folder / one.store.names()[0])  # seq 2
    two.start(2)
    assert two.seq == 2
    two.push(3)
    two.put()
    found = one.start(3)
    assert found.name.startswith("e000002")
    assert torch.equal(values_of(one.shard), values_of(two.shard))


def damage(place, name):
    storage = storage_of(place, RUN)
    data = bytearray(storage.read(name))
    data[len(data) // 2] ^= 1
    storage.write(name, bytes(data))


@pytest.mark.parametrize("end", [".json", ".safetensors"])
def test_a_damaged_one_is_left_for_the_one_before_and_named(hosts, end):
    one, two, _ = hosts
    one.start(1)
    for seq in (1, 2):
        one.push(seq)
        name = one.put()
    damage(one.place, f"shard0/{name}{end}")
    found = two.start(2)
    assert two.seq == 1
    assert len(found.wrong) == 1
    assert name in found.wrong[0]
    assert [p.name for p in two.disk.iterdir() if p.name.startswith(".")] == []


def test_a_damaged_one_on_the_disk_is_taken_from_the_store(hosts):
    one = hosts[0]
    one.start(1)
    one.push(1)
    name = one.put()
    (one.disk / name / "tensors.safetensors").write_bytes(b"damaged")
    found = one.start(2)
    assert (found.name, one.seq) == (name, 1)
    assert len(found.wrong) == 1
    assert one.store.load(name).version == 1  # and mended on the disk


def test_where_none_is_whole_it_says_so(hosts):
    one, two, _ = hosts
    one.start(1)
    one.push(1)
    damage(one.place, f"shard0/{one.put()}.safetensors")
    with pytest.raises(SnapshotCorrupt, match="no snapshot is whole"):
        two.start(2)


# Fencing


def test_an_old_epoch_that_comes_back_is_refused_and_changes_nothing_of_its_successors(hosts):
    one, two, _ = hosts
    one.start(1)
    one.push(1)
    one.put()
    two.start(2)
    two.push(2)
    names = [two.put()]
    before = storage_of(one.place, RUN).names("shard0")
    one.push(2)
    with pytest.raises(SnapshotFenced, match=r"is epoch 2's, this one is 1"):
        one.put()
    with pytest.raises(SnapshotFenced):
        one.put()
    assert storage_of(one.place, RUN).names("shard0") == before
    two.push(3)
    names.append(two.put())
    assert two.depot_.names() == names[::-1]


def test_an_old_epoch_is_refused_as_soon_as_its_successor_has_begun(hosts):
    one, two, _ = hosts
    one.start(1)
    one.push(1)
    one.put()
    two.start(2)  # and has written nothing yet
    one.push(2)
    with pytest.raises(SnapshotFenced):
        one.put()


class Between:
    """A storage that does something else before one of its own calls."""

    def __init__(self, storage, call, do):
        self._storage, self._call, self._do = storage, call, do
        self.root = storage.root

    def __getattr__(self, name):
        if name == self._call and self._do is not None:
            do, self._do = self._do, None
            do()
        return getattr(self._storage, name)


@pytest.mark.parametrize("call", ["put", "write", "read", "names", "remove"])
@pytest.mark.parametrize("seen", [False, True])
def test_at_whatever_moment_the_successor_begins_nothing_durable_is_lost(hosts, call, seen):
    """Its beginning comes before each kind of call of a put, or of its last look."""
    one, two, _ = hosts
    one.start(1)
    for seq in (1, 2, 3):
        one.push(seq)
        one.put()
    one.push(4)
    began = []
    storage = storage_of(one.place, RUN)
    one.depot_._storage = Between(storage, call, lambda: began.append(two.start(2)))
    if seen:  # the last look before durable, after the manifest
        one.depot_._storage = Between(
            storage,
            "write",
            lambda: setattr(
                one.depot_,
                "_storage",
                Between(storage, "names", lambda: began.append(two.start(2))),
            ),
        )
    try:
        one.put()
        is_durable = True
    except SnapshotFenced:
        is_durable = False
    if began:
        assert two.seq == 4 or not is_durable
        assert two.seq >= 3
    else:
        assert is_durable


def test_two_processes_of_one_epoch_are_two_launchers_and_the_second_is_refused(hosts):
    one, two, _ = hosts
    one.start(1)
    with pytest.raises(SnapshotFenced, match=r"is epoch 1's, this one is 1"):
        two.start(1)


def test_an_old_epoch_that_wakes_while_it_removes_leaves_the_newest(hosts):
    one, two, _ = hosts
    one.start(1)
    for seq in (1, 2, 3):
        one.push(seq)
        one.put()
    one.push(4)
    storage = storage_of(one.place, RUN)

    def successor():
        two.start(2)
        two.push(5)
        two.put()

    one.depot_._storage = Between(storage, "remove", successor)
    one.put()  # durable: its successor has begun from it
    assert two.seq == 5
    assert two.depot_.names()[0].startswith("e000002")
    found = recover(SnapshotStore(one.disk.parent / "third"), two.depot_)
    assert found is not None
    assert found.image.parts[0].table["w0"].seq == 5


# Failures


@pytest.fixture
def lonely(objects, tmp_path):
    host = Host(objects, tmp_path, "host")
    host.start(1)
    host.push(1)
    host.put()
    host.push(2)
    return host


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("503 Slow Down")])
def test_a_put_that_fails_leaves_what_was_there_and_can_be_done_again(lonely, torn, error):
    before = lonely.depot_.names()
    ObjectStore.failing, ObjectStore.torn = error, torn
    with pytest.raises(SnapshotFailed, match="could not be copied to objects://bucket"):
        lonely.put()
    ObjectStore.failing = None
    assert lonely.depot_.names() == before
    name = lonely.put()
    assert lonely.depot_.names() == [name, *before]
    files = storage_of(lonely.place, RUN).names("shard0")
    assert len(files) == 1 + 2 * 2


def test_half_a_manifest_is_not_a_snapshot(lonely, tmp_path):
    storage = storage_of(lonely.place, RUN)
    path = lonely.save()
    storage.put(f"shard0/{path.name}.safetensors", path / "tensors.safetensors")
    storage.write(f"shard0/{path.name}.json", (path / "manifest.json").read_bytes()[:100])
    other = Host(lonely.place, tmp_path, "other")
    found = other.start(2)
    assert other.seq == 1
    assert "JSONDecodeError" in found.wrong[0]


def test_the_same_name_with_other_content_is_written_anew(lonely):
    """Of a disk that somebody has emptied under a shard."""
    name = lonely.put()
    lonely.peer.push({0: torch.ones(64)}, 3)
    shutil.rmtree(lonely.disk / name)
    path = lonely.save()
    assert path.name == name
    lonely.depot_.put(path)
    assert lonely.depot_.names()[0] == name
    storage = storage_of(lonely.place, RUN)
    assert storage.read(f"shard0/{name}.json") == (path / "manifest.json").read_bytes()


def test_a_store_that_does_not_show_what_was_written_is_not_trusted(lonely, monkeypatch):
    monkeypatch.setattr(ObjectStore, "invalidate_cache", lambda self, path=None: None)
    with pytest.raises(SnapshotFailed, match="does not show"):
        lonely.put()


def test_what_is_gone_when_it_is_asked_for_is_no_snapshot(lonely, tmp_path):
    with pytest.raises(SnapshotCorrupt, match="is not there any more"):
        lonely.depot_.get("e000001-v000000000099", tmp_path)


@pytest.mark.parametrize("kind", ["claim", "names", "latest_epoch"])
def test_a_disk_that_is_not_mounted_is_not_an_empty_one(tmp_path, kind):
    depot = Depot(storage_of(str(tmp_path / "gone"), RUN), "shard0", 1)
    with pytest.raises(SnapshotFailed, match=r"gone.* cannot be read: .*No such file"):
        getattr(depot, kind)()


def test_an_unmounted_disk_takes_no_snapshot(tmp_path):
    host = Host(str(tmp_path / "store"), tmp_path, "host")
    storage_of(host.place, RUN).begin()
    host.start(1)
    host.push(1)
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(SnapshotFailed):
        host.put()
    assert not (tmp_path / "store").exists()


# What to begin with


def test_choices_are_the_newest_first_and_what_is_here_before_what_is_there():
    a, b, c = "e000001-v000000000001", "e000001-v000000000002", "e000002-v000000000001"
    assert choices([a, b], [b, c]) == [(c, False), (b, True), (b, False), (a, True)]
    assert choices([], []) == []


def test_only_a_disk_on_which_the_epoch_before_has_saved_has_all():
    assert has_all(["e000003-v000000000001", "e000001-v000000000009"], 4)
    assert not has_all(["e000003-v000000000001"], 5)
    assert not has_all([], 1)


class Away:
    """A storage that cannot be reached for some calls."""

    def __init__(self, storage, calls):
        self._storage, self.calls = storage, calls
        self.root = storage.root

    def __getattr__(self, name):
        if self.calls:
            self.calls -= 1
            raise OSError("connection refused")
        return getattr(self._storage, name)


def begin_with(host, epoch, calls):
    """What a start comes to where the store is away for so many calls."""
    depot = Depot(Away(storage_of(host.place, RUN), calls), "shard0", epoch)
    now = [0.0]
    found = begin(
        SnapshotStore(host.disk), depot, epoch, lambda: now[0], lambda s: now.append(now.pop() + s)
    )
    return found, depot, now[0]


def test_a_start_without_the_store_goes_on_where_the_disk_has_all_of_it(lonely):
    lonely.save()
    found, depot, waited_s = begin_with(lonely, 2, 10**9)
    assert found is not None
    assert found.image.parts[0].table["w0"].seq == 2
    assert not found.is_stored
    assert waited_s == 0.0
    depot._storage.calls = 0
    depot.put(lonely.disk / found.name)  # the claim is made up for
    assert depot.names()[0] == found.name
    lonely.push(3)
    with pytest.raises(SnapshotFenced):
        lonely.depot_.put(lonely.disk / found.name)


def test_a_start_that_may_lack_something_waits_for_the_store(lonely, tmp_path):
    other = Host(lonely.place, tmp_path, "other")
    found, _, waited_s = begin_with(other, 2, 5)
    assert found is not None
    assert found.is_stored
    assert waited_s == 5.0


def test_a_start_that_may_lack_something_ends_where_the_store_stays_away(lonely, tmp_path):
    other = Host(lonely.place, tmp_path, "other")
    with pytest.raises(SnapshotFailed, match="connection refused"):
        begin_with(other, 2, 10**9)


def test_a_claim_whose_answer_was_lost_is_this_ones_own(lonely):
    depot = lonely.depot(2)
    storage = depot._storage

    class Lost(Away):
        def write(self, name, data):
            storage.write(name, data)
            raise OSError("timed out")

    depot._storage = Lost(storage, 0)
    with pytest.raises(SnapshotFailed, match="timed out"):
        depot.claim()
    depot._storage = storage
    assert 2 in depot.claim().claims
