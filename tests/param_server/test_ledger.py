"""The ledger: what a shard has acknowledged, as it is found again after a kill."""

import pytest
import torch

from distbelief.param_server.ledger import Begun, Ledger, Record, names, read, recall
from distbelief.param_server.shard import Shard, ShardConfig
from tests.param_server.jobs import LAYOUT, RUN, TOKEN, Peer, make_contract, numbers


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path / "shard0", 1)
    yield made
    made.close()


def shard_with(ledger, image=None, epoch=1):
    config = ShardConfig(run=RUN, token=TOKEN, epoch=epoch)
    return Shard(config, image, on_push=ledger.write)


def trained(ledger, pushes=3):
    shard = shard_with(ledger)
    peer = Peer(shard)
    peer.hello(make_contract())
    peer.init(torch.zeros(LAYOUT.total))
    for seq in range(1, pushes + 1):
        peer.push_all(numbers(seed=seq), seq)
    return shard, peer


def records(folder):
    return [entry for entry in read(folder) if isinstance(entry, Record)]


def test_each_push_is_in_the_file_before_its_ack_leaves(ledger, tmp_path):
    shard = shard_with(ledger)
    peer = Peer(shard)
    peer.hello(make_contract())
    peer.init(torch.zeros(LAYOUT.total))
    for seq in (1, 2):
        ack = peer.push_all(numbers(seed=seq), seq)
        last = records(tmp_path / "shard0")[-1]
        assert (last.w, last.inc, last.seq, last.epoch) == ("w0", 1, seq, 1)
        assert tuple(last.version) == ack.version
        assert tuple(last.status) == ack.status == ("applied",) * 3


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_record_that_was_torn_by_a_kill_is_left_out(cut, ledger, tmp_path):
    trained(ledger)
    (file,) = (tmp_path / "shard0").iterdir()
    file.write_bytes(file.read_bytes()[:-cut])
    assert [record.seq for record in records(tmp_path / "shard0")] == [1, 2]


def test_junk_in_a_file_ends_it_without_an_error(ledger, tmp_path):
    trained(ledger)
    (file,) = (tmp_path / "shard0").iterdir()
    with file.open("ab") as opened:
        opened.write(b"\xff" * 100)
    assert len(records(tmp_path / "shard0")) == 3


def test_files_that_no_snapshot_needs_go(ledger, tmp_path):
    folder = tmp_path / "shard0"
    shard, peer = trained(ledger)
    for seq in (4, 5, 6):
        start = ledger.turn()
        ledger.forget(start, keep=2)
        peer.push_all(numbers(seed=seq), seq)
    assert names(folder) == [f"ledger-e000001-{n:06d}" for n in (2, 3)]
    assert [record.seq for record in records(folder)] == [5, 6]
    assert shard.version == 6


def test_a_ledger_that_keeps_all_does(tmp_path):
    ledger = Ledger(tmp_path, 1, keeps_all=True)
    trained(ledger)
    for _ in range(5):
        ledger.forget(ledger.turn(), keep=2)
    assert len(records(tmp_path)) == 3
    ledger.close()
    ledger.close()


def test_the_next_epoch_knows_what_was_acknowledged_after_its_snapshot(ledger, tmp_path):
    shard, peer = trained(ledger, pushes=2)
    image = shard.image()
    peer.push_all(numbers(seed=3), 3)
    peer.push_all(numbers(seed=4), 4)
    after = Shard(ShardConfig(run=RUN, token=TOKEN, epoch=2), image)
    recall(after, image, tmp_path / "shard0")
    assert [part.num_owed("w0") for part in after.parts.values()] == [2, 2, 2]
    assert [part.lost for part in after.parts.values()] == [0, 0, 0]
    Peer(after, inc=2, ep=2).hello(make_contract(), inc=2)
    assert [part.lost for part in after.parts.values()] == [2, 2, 2]
    assert after.lost_double_fault == 2 * 3
    image.release()


def test_a_snapshot_that_has_it_all_is_owed_nothing(ledger, tmp_path):
    shard, _ = trained(ledger)
    image = shard.image()
    after = Shard(ShardConfig(run=RUN, token=TOKEN, epoch=2), image)
    recall(after, image, tmp_path / "shard0")
    assert [part.num_owed("w0") for part in after.parts.values()] == [0, 0, 0]
    image.release()


def test_an_epoch_says_what_it_goes_on_from(ledger, tmp_path):
    shard, _ = trained(ledger)
    image = shard.image()
    second = Ledger(tmp_path / "shard0", 2)
    second.begin(image)
    second.close()
    begun = [entry for entry in read(tmp_path / "shard0") if isinstance(entry, Begun)]
    assert [(one.epoch, one.of_epoch, list(one.version)) for one in begun] == [(2, 1, [3, 3, 3])]
    image.release()


def test_a_disk_that_takes_nothing_is_told_and_does_not_stop_the_shard(tmp_path, caplog):
    (tmp_path / "shard0").write_text("a file where the folder should be")
    ledger = Ledger(tmp_path / "shard0", 1)
    shard, _ = trained(ledger)
    assert shard.version == 3
    assert ledger.error
    assert sum("cannot be written" in record.message for record in caplog.records) == 1


def test_a_folder_without_a_ledger_has_no_records(tmp_path):
    assert list(read(tmp_path / "nowhere")) == []
