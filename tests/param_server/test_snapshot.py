"""Snapshots: bit for bit there and back, whole or not at all, and damage is always seen."""

import errno
import hashlib
import json
import os
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from distbelief.param_server.buffers import BufferLayout
from distbelief.param_server.errors import SnapshotCorrupt, SnapshotFailed
from distbelief.param_server.protocol import Sync
from distbelief.param_server.server import ShardServer, SnapshotConfig
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.snapshot import MANIFEST, TENSORS, SnapshotStore
from distbelief.param_server.update import Adam
from tests.param_server.jobs import (
    BUFFERS,
    RUN,
    TOKEN,
    Peer,
    make_contract,
    make_layout,
    numbers,
    ready_shard,
    state_of,
    values_of,
)
from tests.param_server.test_shared import Idle

CONTRACT = make_contract(rule=Adam(), buffers=BUFFERS)


def busy_shard(pushes=5):
    """Two workers, refused and partial pushes, buffers, some staleness."""
    shard, peers = ready_shard(CONTRACT, workers=2, num_workers=2)
    for seq in range(1, pushes + 1):
        for peer in peers:
            grad = numbers(seed=seq)
            if seq == 3:
                grad[70] = float("nan")
            peer.push_all(grad, seq, samples=8, bseq=(max(0, seq - 2),) * 3)
    for peer in peers:
        peer.merge(5, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([7]))
    return shard, peers


def save(shard, store):
    image = shard.image()
    try:
        return store.save(image)
    finally:
        image.release()


def restored(store, epoch=2, **config):
    found = store.latest()
    assert found is not None
    image, wrong = found
    shard = Shard(ShardConfig(run=RUN, token=TOKEN, num_workers=2, epoch=epoch, **config), image)
    return shard, wrong


@pytest.fixture
def store(tmp_path):
    return SnapshotStore(tmp_path / "shard-0")


def test_an_empty_folder_has_no_snapshot(store):
    assert store.latest() is None
    assert store.names() == []


def test_a_shard_comes_back_bit_for_bit(store):
    shard, _ = busy_shard()
    path = save(shard, store)
    assert path.name == "e000001-v000000000008"  # part 1 refused one push of each worker
    again, wrong = restored(store)
    assert wrong == []
    before, after = state_of(shard), state_of(again)
    assert after["parts"] == before["parts"]
    assert after["staleness"] == before["staleness"]
    assert after["contract"] == before["contract"]
    assert {w: row["inc"] for w, row in after["workers"].items()} == {"w0": 1, "w1": 1}
    assert again.is_ready
    merged = [shard._buffers.merged(), again._buffers.merged()]
    assert all(torch.equal(a, b) for a, b in zip(*merged, strict=True))
    assert again._buffers.samples == shard._buffers.samples


def test_a_restored_shard_goes_on_as_one_that_never_stopped(store):
    shard, _ = busy_shard()
    save(shard, store)
    again, _ = restored(store)
    for one in (shard, again):
        peers = [Peer(one, f"w{i}", ep=one.config.epoch, connection=b"new-%d" % i) for i in (0, 1)]
        for peer in peers:
            assert peer.hello(CONTRACT).bseq == (5, 5, 5)
        for seq in range(6, 10):
            for peer in peers:
                assert peer.push_all(numbers(seed=seq), seq).status == ("applied",) * 3
    assert torch.equal(values_of(shard), values_of(again))
    after = [state_of(one) for one in (shard, again)]
    assert after[0]["parts"] == after[1]["parts"]
    assert after[0]["staleness"] == after[1]["staleness"]


def test_a_push_from_before_the_snapshot_is_a_repetition_after_it(store):
    shard, _ = busy_shard()
    save(shard, store)
    again, _ = restored(store)
    peer = Peer(again, "w0", ep=2)
    peer.hello(CONTRACT)
    before = state_of(again)["parts"]
    ack = peer.push_all(numbers(seed=5), 5)
    assert ack.status == ("dup",) * 3
    assert ack.durable == (5, 5, 5)
    assert peer.push_all(numbers(seed=3), 3).status == ("dup", "spent", "dup")
    assert state_of(again)["parts"] == before


def test_the_image_is_of_one_moment_while_pushes_go_on(store):
    shard, [peer, _] = busy_shard()
    expected = values_of(shard).clone()
    image = shard.image()
    for seq in (6, 7):
        peer.push_all(numbers(seed=seq), seq)
    store.save(image)
    image.release()
    again, _ = restored(store)
    assert torch.equal(values_of(again), expected)
    assert {row.seq for part in again.parts.values() for row in part.table.values()} == {5}


def test_the_newest_two_are_kept(store):
    shard, [peer, _] = busy_shard()
    paths = []
    for seq in range(6, 10):
        paths.append(save(shard, store))
        peer.push_all(numbers(seed=seq), seq)
    assert store.names() == [path.name for path in paths[-2:]]
    assert [p.name for p in store.folder.iterdir() if p.name not in store.names()] == []


def test_the_same_image_is_not_written_twice(store):
    shard, _ = busy_shard()
    path = save(shard, store)
    written = (path / TENSORS).stat().st_mtime_ns
    assert save(shard, store) == path
    assert (path / TENSORS).stat().st_mtime_ns == written


def test_a_push_to_some_parts_only_makes_another_snapshot_of_the_same_version(store):
    """The part furthest behind gives the name; that it stands still says nothing of the others."""
    shard, [peer, _] = busy_shard()
    first = save(shard, store)
    names = [first.name]
    for seq in range(6, 9):
        peer.push({0: torch.ones(64)}, seq)
        names.append(save(shard, store).name)
        again, _ = restored(store)
        assert torch.equal(values_of(again), values_of(shard))
        assert again.parts[0].table["w0"].seq == seq
    assert names == [first.name, *(f"{first.name}-{n:06d}" for n in (1, 2, 3))]
    assert store.names() == names[-2:]


def test_a_refused_push_makes_another_snapshot_too(store):
    shard, [peer, _] = busy_shard()
    save(shard, store)
    peer.push({0: torch.full((64,), float("nan"))}, 6)
    save(shard, store)
    again, _ = restored(store)
    assert again.parts[0].table["w0"].seq == 6


def test_a_later_epoch_is_newer_whatever_its_version(store):
    shard, _ = busy_shard()
    save(shard, store)
    again, _ = restored(store, epoch=2)
    assert save(again, store).name == "e000002-v000000000008"
    assert restored(store, epoch=3)[0].config.epoch == 3


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"epoch": 1}, "epoch 1: a later one has been here"),
        ({"epoch": 0}, "epoch 0: a later one"),
        ({"index": 1, "num_shards": 2}, "this is run job shard 1 of 2"),
    ],
)
def test_a_snapshot_of_something_else_is_refused(store, config, words):
    shard, _ = busy_shard()
    save(shard, store)
    with pytest.raises(ValueError, match=words):
        restored(store, **config)


def test_fewer_than_two_kept_snapshots_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 2"):
        SnapshotStore(tmp_path, keep=1)


def test_buffers_of_floats_only_are_saved_too(store):
    contract = make_contract(buffers=BufferLayout(floats=(("mean", (3,)),)))
    shard, _ = ready_shard(contract)
    shard._buffers.add("w0", 3, torch.ones(3), torch.empty(0, dtype=torch.int64))
    save(shard, store)
    again, _ = restored(store)
    merged = again._buffers.merged()
    assert merged is not None
    assert merged[0].tolist() == [1, 1, 1]
    assert merged[1].numel() == 0


# Damage


def two_snapshots(store):
    shard, [peer, _] = busy_shard()
    older = save(shard, store)
    expected = values_of(shard).clone()
    peer.push_all(numbers(seed=6), 6)
    newer = save(shard, store)
    return older, newer, expected


@pytest.mark.parametrize("name", [TENSORS, MANIFEST])
def test_a_flipped_bit_anywhere_is_seen_and_the_older_snapshot_used(store, name):
    _, newer, expected = two_snapshots(store)
    file = newer / name
    whole = file.read_bytes()
    rng = random.Random(3)
    for _ in range(1000):
        damaged = bytearray(whole)
        bit = rng.randrange(8 * len(whole))
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(SnapshotCorrupt, match=newer.name):
            store.load(newer.name)
    shard, [wrong] = restored(store)
    assert str(file) in wrong
    assert torch.equal(values_of(shard), expected)


@pytest.mark.parametrize("name", [TENSORS, MANIFEST])
def test_a_truncated_or_lengthened_file_is_seen(store, name):
    _, newer, _ = two_snapshots(store)
    file = newer / name
    whole = file.read_bytes()
    for length in (0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(SnapshotCorrupt, match=newer.name):
            store.load(newer.name)
    file.write_bytes(whole + b"}")
    with pytest.raises(SnapshotCorrupt, match=newer.name):
        store.load(newer.name)
    file.unlink()
    with pytest.raises(SnapshotCorrupt, match=newer.name):
        store.load(newer.name)


def test_a_snapshot_cut_at_every_4_kib_is_seen_and_says_which_file_and_what_digest(store):
    contract = make_contract(make_layout(("w", (60_000,), 0)))
    shard, [peer] = ready_shard(contract)
    save(shard, store)
    expected = values_of(shard).clone()
    peer.push_all(torch.ones(60_000), 1)
    newer = save(shard, store)
    whole = (newer / TENSORS).read_bytes()
    assert len(whole) > 240_000
    for length in range(0, len(whole), 4096):
        (newer / TENSORS).write_bytes(whole[:length])
        found = store.latest()
        assert found is not None
        image, [wrong] = found
        assert str(newer / TENSORS) in wrong
        assert "SHA-256" in wrong
        assert f"size {length}, written {len(whole)}" in wrong
        values = torch.cat([part.tensors["values"] for part in image.parts])
        assert torch.equal(values, expected)


def rewrite(path, change):
    """A manifest with a right digest and a wrong body."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest["body"])
    text = json.dumps(manifest["body"], sort_keys=True)
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda body: body.update(format=1), "format 1, this version reads 2"),
        (lambda body: body["file"].update(name="../../x"), "is no name of a file of ours"),
        (lambda body: body["file"].update(name="/etc/passwd"), "is no name of a file of ours"),
        (lambda body: body.pop("parts"), "KeyError"),
        (lambda body: body.update(contract="{}"), "RemoteProtocolError"),
    ],
    ids=["format", "path", "absolute path", "parts", "contract"],
)
def test_a_manifest_of_another_making_is_refused(store, change, words):
    _, newer, _ = two_snapshots(store)
    rewrite(newer, change)
    with pytest.raises(SnapshotCorrupt, match=words):
        store.load(newer.name)


def test_no_whole_snapshot_is_an_error_and_not_a_fresh_start(store):
    older, newer, _ = two_snapshots(store)
    for path in (older, newer):
        (path / MANIFEST).write_text("{}")
    with pytest.raises(SnapshotCorrupt, match=r"no snapshot in .* is whole") as corrupt:
        store.latest()
    assert older.name in str(corrupt.value)
    assert newer.name in str(corrupt.value)


# A write that fails


class NoSpace:
    """A call that works `times` times, and then says that the disk is full, or worse."""

    def __init__(self, real, times, number=errno.ENOSPC):
        self.real, self.left, self.number = real, times, number

    def __call__(self, *args):
        self.left -= 1
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*args)


@pytest.mark.parametrize(
    ("call", "times"),
    [("save_file", 0), ("os.fsync", 0), ("os.fsync", 1), ("os.fsync", 2), ("os.fsync", 3)],
)
def test_a_failed_write_leaves_what_was_there_and_nothing_half_done(
    store, monkeypatch, call, times
):
    older, newer, _ = two_snapshots(store)
    shard, _ = restored(store)
    with monkeypatch.context() as patched:
        real = os.fsync if call == "os.fsync" else save_file
        patched.setattr(f"distbelief.param_server.snapshot.{call}", NoSpace(real, times))
        with pytest.raises(SnapshotFailed, match="No space left"):
            save(shard, store)
        names = sorted(p.name for p in store.folder.iterdir())
        if times < 3:  # the last fsync, of the folder, comes after the rename
            assert names == [older.name, newer.name]
        with pytest.raises(SnapshotFailed, match="No space left"):
            save(shard, store)
    assert not any(name.startswith(".") for name in names)
    assert restored(store, epoch=3)[1] == []
    assert save(shard, store).name.startswith("e000002")


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("call", ["save_file", "os.fsync"])
def test_training_goes_on_while_a_disk_fails_and_acknowledgements_say_what_is_durable(
    store, monkeypatch, call, number
):
    shard, [peer] = ready_shard()
    clock = [0.0]
    config = SnapshotConfig(every_s=1.0)
    server = ShardServer(shard, Idle(), store, config, lambda: clock[0])

    def go_on(seq):
        ack = peer.push_all(numbers(seed=seq), seq)
        assert set(ack.status) == {"applied"}
        clock[0] += 2.0
        server.look()
        if server._saver is not None:
            server._saver.join()
        server.look()
        return ack

    def sync():
        return peer.ask(Sync(**peer.who, wants=False))

    go_on(1)
    assert sync().durable == (1, 1, 1)
    assert not sync().is_stalled
    [before] = store.names()
    with monkeypatch.context() as patched:
        real = os.fsync if call == "os.fsync" else save_file
        failing = NoSpace(real, 0, number)
        patched.setattr(f"distbelief.param_server.snapshot.{call}", failing)
        for seq in range(2, 6):
            assert go_on(seq).durable == (1, 1, 1)
        assert sync().is_stalled
        assert server.storage_error is not None
        assert os.strerror(number) in server.storage_error
        assert str(store.folder) in server.storage_error
        assert store.names() == [before]
    go_on(6)
    assert not sync().is_stalled
    assert sync().durable == (6, 6, 6)
    assert restored(store)[1] == []
    assert not server.storage_error


def test_a_full_disk_leaves_the_snapshot_before(store):
    older, newer, _ = two_snapshots(store)
    script = f"""
import resource, signal, sys
from pathlib import Path
from distbelief.param_server.errors import SnapshotFailed
from distbelief.param_server.shard import Shard, ShardConfig
from distbelief.param_server.snapshot import SnapshotStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = SnapshotStore(Path({str(store.folder)!r}))
image, _ = store.latest()
shard = Shard(ShardConfig(run="job", token="secret", epoch=2), image)
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
try:
    store.save(shard.image())
except SnapshotFailed as error:
    sys.exit(0)
sys.exit("it was written")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in store.folder.iterdir()) == [older.name, newer.name]
    assert restored(store)[1] == []


def test_what_a_killed_process_left_half_written_is_swept_up(store):
    shard, _ = busy_shard()
    half = store.folder / ".e000001-v000000000003.4711"
    half.mkdir(parents=True)
    (half / TENSORS).write_bytes(b"half")
    assert store.names() == []
    path = save(shard, store)
    assert os.listdir(store.folder) == [path.name]


def test_a_link_in_place_of_what_was_written_is_not_followed(store, tmp_path):
    _, newer, _ = two_snapshots(store)
    (newer / TENSORS).rename(tmp_path / "elsewhere")
    (newer / TENSORS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SnapshotCorrupt, match="is a link to"):
        store.load(newer.name)
    found = store.latest()
    assert found is not None
    assert "is a link to" in found[1][0]
    newer.rename(tmp_path / "moved")
    newer.symlink_to(tmp_path / "moved")
    with pytest.raises(SnapshotCorrupt, match="is a link to"):
        store.load(newer.name)


@pytest.mark.parametrize("name", ["..", "/etc", "a/b", ""])
def test_a_snapshot_is_loaded_from_its_folder_alone(store, name):
    with pytest.raises(SnapshotCorrupt, match="is no name of a file of ours"):
        store.load(name)
