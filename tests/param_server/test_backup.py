"""Upstream backup: what workers keep, and what becomes of it when shards are killed."""

import random

import pytest
import torch

from distbelief.param_server.backup import VECTORS_MAX, Backup, Parcel, window_of
from distbelief.param_server.client import Fetched
from distbelief.param_server.compress import Compression
from distbelief.param_server.errors import Refused
from distbelief.param_server.update import SGD
from tests.param_server.jobs import LAYOUT, Cluster, Peer, make_contract, numbers, ready_shard

# Whole numbers and a rate of 1: the sum of all pushes is exact, in whatever order they come.
CONTRACT = make_contract(rule=SGD(), layout=LAYOUT)
NONE_ABSENT = (b"",) * 3
VECTOR = 4 * LAYOUT.total
both = pytest.mark.parametrize("num_shards", [1, 3])


def whole(seed):
    return (
        torch.randint(-9, 9, (LAYOUT.total,), generator=torch.Generator().manual_seed(seed)) * 10.0
    )


class Worker:
    """Pushes gradients of whole numbers, and knows what should have become of them."""

    def __init__(self, cluster, w="w0", inc=1, window=4, first=True, **more):
        self.cluster, self.w = cluster, w
        self.transport = cluster.transport()
        self.client = cluster.client(
            w, inc, CONTRACT, self.transport, backup_bytes=window * VECTOR, **more
        )
        self.client.connect()
        if first:
            self.client.initialise(torch.zeros(LAYOUT.total))
        self.now, self.then = Fetched(LAYOUT), Fetched(LAYOUT)
        self.client.fetch(self.now)
        self.vector = self.client.vector()
        self.acked = []

    def begin(self, seed):
        self.vector.copy_(whole(seed))
        return self.client.start_push(self.vector, 1, self.now, NONE_ABSENT, self.then)

    def push(self, seed):
        ticket = self.client.wait(self.begin(seed))
        self.now, self.then = self.then, self.now
        assert ticket.vector is not None
        self.vector = ticket.vector
        self.acked.append(seed)
        return ticket.pushed


def expected(*seeds):
    return -0.1 * sum(whole(seed) for seed in seeds)


def assert_values(cluster, seeds):
    assert torch.allclose(cluster.values, expected(*seeds), rtol=0, atol=1e-4)


@both
def test_a_shard_that_was_killed_has_every_acknowledged_push_again(num_shards):
    cluster = Cluster(num_shards, saves=True)
    worker = Worker(cluster)
    for seed in range(1, 4):
        worker.push(seed)
    before = cluster.values.clone()
    shard = cluster.restart(0)
    assert shard.version == 0, "nothing was saved since the first values"
    worker.push(4)
    assert worker.client.num_resent > 0
    assert_values(cluster, range(1, 5))
    assert torch.equal(worker.now.values, cluster.values)
    assert not torch.equal(before, cluster.values)
    assert shard.counts["applied"] == 4 * len(shard.parts)
    assert shard.lost_double_fault == 0


@both
@pytest.mark.parametrize("saved_after", range(4))
def test_only_what_the_snapshot_lacks_is_sent_again(num_shards, saved_after):
    cluster = Cluster(num_shards, saves=True)
    worker = Worker(cluster, window=8)
    for seed in range(1, 5):
        if seed == saved_after + 1:
            cluster.save(0)
        worker.push(seed)
    shard = cluster.restart(0)
    worker.transport.cut(0)
    while worker.client.has_open or not shard.counts:
        worker.client.poll(0.0)
    assert shard.counts == {"applied": (4 - saved_after) * len(shard.parts)}
    assert_values(cluster, range(1, 5))


@both
@pytest.mark.parametrize("at", range(14))
def test_a_shard_killed_with_any_message_on_its_way_applies_each_push_once(num_shards, at):
    """The shard is replaced in the middle of a push, whichever message that hits."""
    cluster = Cluster(num_shards, saves=True)
    worker = Worker(cluster)
    worker.push(1)
    count = [0]
    real = dict(cluster.handlers)

    def handler(endpoint, index):
        def handle(peer, frames):
            count[0] += 1
            if count[0] == at:
                cluster.restart(index)
            reply = real[endpoint](peer, frames)
            return None if count[0] == at + 1 else reply

        return handle

    for index, endpoint in enumerate(cluster.endpoints):
        cluster.handlers[endpoint] = handler(endpoint, index)
    for seed in range(2, 6):
        worker.push(seed)
    assert_values(cluster, range(1, 6))
    assert all(
        part.version == 5 and part.table["w0"].seq == 5
        for shard in cluster.shards
        for part in shard.parts.values()
    )


@pytest.mark.parametrize("seed", range(12))
def test_many_kills_lose_and_repeat_nothing(seed):
    """Two workers, two shards; shards save, and are killed, at any time."""
    rng = random.Random(seed)
    cluster = Cluster(2, num_workers=2, saves=True)
    workers = [Worker(cluster, "w0", window=6), Worker(cluster, "w1", window=3, first=False)]
    for number in range(1, 61):
        rng.choice(workers).push(number)
        if rng.random() < 0.2:
            cluster.save(rng.randrange(2))
        if rng.random() < 0.3:
            index = rng.randrange(2)
            cluster.restart(index)
            for worker in rng.sample(workers, rng.randrange(3)):
                worker.transport.cut(index)
    for worker in workers:
        worker.client.leave()
    for index in range(2):
        cluster.restart(index)
    assert_values(cluster, [s for worker in workers for s in worker.acked])
    assert sum(len(worker.acked) for worker in workers) == 60
    assert all(
        {w: row.seq for w, row in part.table.items()}
        == {worker.w: len(worker.acked) for worker in workers if worker.acked}
        for shard in cluster.shards
        for part in shard.parts.values()
    )


def test_staleness_across_a_restart_counts_from_where_the_shard_began_again():
    cluster = Cluster(1, num_workers=2, saves=True)
    one = Worker(cluster, "w0", window=8)
    two = Worker(cluster, "w1", window=8, first=False)
    for seed in range(1, 4):
        one.push(seed)
    assert two.push(10).staleness == 3
    cluster.restart(0)
    assert one.push(4).staleness == 0, "its copy was of version 3, the shard's is 0: nobody else"
    # Its copy has all of that, so at most what was applied again counts.
    assert two.push(11).staleness <= 4
    assert two.push(12).staleness == 0
    assert_values(cluster, [1, 2, 3, 4, 10, 11, 12])


def test_a_full_backup_waits_until_something_is_durable():
    cluster = Cluster(1, saves=True)
    worker = Worker(cluster, window=2)
    saved = set()
    for seed in range(1, 9):
        worker.push(seed)
        assert len(worker.client._backup.kept) <= 2
        saved.add(cluster.images[0].version)
    assert saved == {0, 3, 6}
    assert worker.client._backup._num_made <= 4, "vectors are used again"


def test_what_was_pushed_is_not_written_to_until_it_is_durable():
    cluster = Cluster(1, saves=True)
    worker = Worker(cluster, window=3)
    kept = {}
    for seed in range(1, 7):
        kept[seed] = worker.vector
        worker.push(seed)
        first = worker.client._backup.first or seed + 1
        for one in range(first, seed + 1):
            assert torch.equal(kept[one], whole(one))
        assert worker.vector.data_ptr() not in {kept[n].data_ptr() for n in range(first, seed + 1)}


def test_with_waits_a_push_is_done_when_it_is_durable():
    cluster = Cluster(3, saves=True)
    worker = Worker(cluster, waits=True)
    for seed in range(1, 4):
        worker.push(seed)
        for index, image in cluster.images.items():
            assert {p.table["w0"].seq for p in image.parts} == {seed}, index
    for index in range(3):
        cluster.restart(index)
    assert_values(cluster, [1, 2, 3])


def test_shards_that_cannot_save_do_not_stop_training(caplog):
    cluster = Cluster(1, saves=True)
    worker = Worker(cluster, window=2)
    cluster.saves = False
    cluster.shards[0].is_stalled = True
    for seed in range(1, 9):
        worker.push(seed)
    assert worker.client._backup.num_dropped == 6
    assert "cannot save: pushes before" in caplog.text
    assert_values(cluster, range(1, 9))
    cluster.restart(0)
    worker.push(9)
    assert_values(cluster, [7, 8, 9]), "the others are lost, and the shard goes on"


def test_the_first_values_are_brought_again_until_they_are_saved():
    cluster = Cluster(2, saves=True)
    cluster.saves = False
    client = cluster.client("w0", 1, CONTRACT, backup_bytes=4 * VECTOR)
    client.connect()

    def late():
        cluster.saves = True

    def again():
        cluster.restart(0).is_stalled = False

    cluster.time.while_asleep += [lambda: None, again, lambda: None, late]
    client.initialise(numbers())
    assert set(cluster.images) == {0, 1}
    assert cluster.shards[0].config.epoch == 2
    into = Fetched(LAYOUT)
    client.fetch(into)
    assert torch.equal(into.values, numbers())


def test_leaving_waits_until_all_is_durable():
    cluster = Cluster(2, saves=True)
    worker = Worker(cluster, window=8)
    for seed in range(1, 4):
        worker.push(seed)
    assert {p.version for p in cluster.images[0].parts} == {0}
    worker.client.leave()
    for image in cluster.images.values():
        assert {p.version for p in image.parts} == {3}


def test_without_a_backup_a_killed_shard_goes_on_and_has_lost_some():
    cluster = Cluster(1, saves=True)
    worker = Worker(cluster, window=4)
    worker.client.close()
    plain = Cluster(1)
    client = plain.started(CONTRACT, torch.zeros(LAYOUT.total))
    now, then = Fetched(LAYOUT), Fetched(LAYOUT)
    client.fetch(now)
    plain.save(0)
    for seed in (1, 2):
        client.wait(client.start_push(whole(seed), 1, now, NONE_ABSENT, then))
        now, then = then, now
    plain.restart(0)
    client.wait(client.start_push(whole(3), 1, now, NONE_ABSENT, then))
    assert_values(plain, [3])
    assert plain.shards[0].parts[0].table["w0"].seq == 3


@pytest.mark.parametrize("push", ["bfloat16", "int8", "topk"])
def test_compressed_pushes_are_sent_again_as_they_were(push):
    compression = Compression(push=push, fetch="bfloat16", top=0.1)
    one, two = Cluster(1, saves=True), Cluster(1, saves=True)
    workers = [Worker(c, window=8, compression=compression) for c in (one, two)]
    for seed in range(1, 5):
        for worker in workers:
            worker.push(seed)
    one.restart(0)
    for worker in workers:
        worker.push(5)
    # Fetched values do not matter to these gradients: the same frames, the same bits.
    assert torch.equal(one.values, two.values)


def test_a_double_fault_is_counted_to_the_push():
    """The worker dies with pushes that no snapshot has, and then the shard does."""
    cluster = Cluster(1, num_workers=2, saves=True)
    dead, alive = Worker(cluster, "w0", window=8), Worker(cluster, "w1", window=8, first=False)
    for seed in range(1, 4):
        dead.push(seed)
    cluster.save(0)
    for seed in range(4, 6):
        dead.push(seed)
    alive.push(10)
    shard = cluster.restart(0)
    shard.remember("w0", 1, 5, [0, 1, 2])
    shard.remember("w1", 1, 1, [0, 1, 2])
    assert shard.lost_double_fault == 3 * 2 + 3 * 1, "as long as nobody has sent them again"
    alive.push(11)
    assert shard.lost_double_fault == 3 * 2
    cluster.save(0)
    shard = cluster.restart(0)
    assert shard.lost_double_fault == 3 * 2, "a snapshot keeps the count"
    again = Worker(cluster, "w0", inc=2, window=8, first=False)
    again.push(6)
    assert shard.lost_double_fault == 3 * 2
    assert "w0" not in shard.parts[0].owed
    assert_values(cluster, [1, 2, 3, 6, 10, 11])


def test_a_worker_that_has_given_pushes_up_leaves_a_hole_that_is_counted():
    shard, [peer] = ready_shard(make_contract(), values=torch.zeros(LAYOUT.total))
    peer.push_all(whole(1), 1)
    shard.remember("w0", 1, 3, [0, 1, 2])
    peer.hello(make_contract(), first=5)
    assert shard.lost_double_fault == 3 * 2
    assert peer.push_all(whole(5), 5).status == ("applied",) * 3
    assert shard.lost_double_fault == 3 * 2


def test_a_shard_that_hears_of_a_later_epoch_is_deposed():
    shard, [peer] = ready_shard(make_contract())
    peer.ep = 2
    message, payload = peer.make_push(peer.cut(whole(1)), 1)
    assert peer.ask(message, payload).code == "deposed"
    assert shard.is_deposed
    assert shard.version == 0

    other, _ = ready_shard(make_contract())
    assert Peer(other, "w0").hello(make_contract(), ep=2).code == "deposed"
    assert other.is_deposed


def test_a_client_takes_no_answer_from_an_earlier_epoch():
    cluster = Cluster(1, saves=True)
    worker = Worker(cluster)
    worker.push(1)
    old = cluster.shards[0]
    cluster.restart(0)
    worker.push(2)
    new, cluster.shards[0] = cluster.shards[0], old  # a ghost has come back in its place
    ticket = worker.begin(3)
    for _ in range(3):
        worker.client.poll(0.0)
    assert not ticket.is_done
    assert old.is_deposed
    assert old.version == 1
    cluster.shards[0] = new
    cluster.time.now += 1.0
    worker.client.wait(ticket)
    assert_values(cluster, [1, 2, 3])


def test_a_replaced_worker_sends_nothing_again():
    cluster = Cluster(1, saves=True)
    ghost = Worker(cluster, "w0", inc=1)
    ghost.push(1)
    cluster.restart(0)
    Worker(cluster, "w0", inc=2, first=False).push(2)
    ghost.transport.cut(0)
    with pytest.raises(Refused, match="ghost"):
        ghost.push(3)
    assert_values(cluster, [2])


@pytest.mark.parametrize(
    ("vector", "budget", "window"),
    [(28_000_000, 256 * 2**20, 9), (4, 2**28, VECTORS_MAX), (2**30, 2**20, 2), (0, 1, 2 - 1)],
)
def test_the_window_is_what_fits_into_the_budget(vector, budget, window):
    assert window_of(vector, budget) == max(2, window)


def test_a_backup_gives_the_parts_that_a_shard_lacks():
    backup = Backup(3, 4, lambda: torch.zeros(3))
    for seq in (1, 2):
        kept = backup.begin(seq, torch.zeros(3))
        kept.parcels.append(
            Parcel(
                seq=seq,
                samples=1,
                parts=LAYOUT.parts,
                grad=kept.vector,
                masks=NONE_ABSENT,
                base=(5, 5, 5),
                bseq=(0, 0, 0),
                ep=1,
            )
        )
        kept.is_answered = True
    found = backup.lacking([0, 2], [1, 0])
    assert [(p.seq, [part.index for part in p.parts]) for p in found] == [(1, [2]), (2, [0, 2])]
    found[0].rebase(2, {0: (1, 1), 2: (3, 0)})
    assert (found[0].base, found[0].bseq, found[0].ep) == ((3,), (0,), 2)
    backup.note([0, 1, 2], [1, 2, 2])
    backup.release()
    assert backup.first == 2
    backup.note([0], [2])
    backup.release()
    assert backup.first is None
