"""The feed: batches of leases in their order, with and without loader processes."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from distbelief.workers.embedded import split_of
from distbelief.workers.feed import Batch, Feed, default_loaders, move, read_all
from distbelief.workers.lease import Lease
from distbelief.workers.order import epoch_order
from distbelief.workers.own import Rows, Stream
from distbelief.workers.pixels import BadSample, Pictures
from distbelief.workers.split import Split
from tests.workers.test_pixels import GOOD

LOADERS = pytest.mark.parametrize("num_loaders", [0, 1, 2])


def numbers(num: int = 20) -> Split:
    """Sample i is (i, i)."""
    return split_of(torch.arange(float(num)).view(-1, 1), torch.arange(num), None, "train")


def own(samples: Rows | Stream) -> Split:
    return Split(
        samples=samples,
        name="train",
        num_classes=None,
        input_shape=None,
        digest="",
        is_ordered=isinstance(samples, Stream),
    )


class Leases:
    """Hands out leases until there is a None."""

    def __init__(self, *leases: Lease | None) -> None:
        self.left = list(leases)
        self.num_asked = 0

    def __call__(self) -> Lease | None:
        self.num_asked += 1
        return self.left.pop(0) if self.left else None


def seen(batches: Iterator[Batch]) -> list[int]:
    return [int(target) for batch in batches for target in batch.targets]


@LOADERS
def test_batches_are_the_leases_cut_in_their_order(num_loaders):
    leases = Leases(Lease(0, 0, 7), Lease(0, 12, 20), Lease(1, 0, 4))
    with Feed(numbers(), leases, 3, seed=5, num_loaders=num_loaders) as feed:
        batches = list(feed.round())
    places = [(batch.epoch, batch.start, batch.stop) for batch in batches]
    assert places == [(0, 0, 3), (0, 3, 7), (0, 12, 15), (0, 15, 18), (0, 18, 20), (1, 0, 4)]
    orders = [epoch_order(5, epoch, 20).tolist() for epoch in (0, 1)]
    assert seen(iter(batches)) == [*orders[0][:7], *orders[0][12:20], *orders[1][:4]]
    assert all(batch.num_good == batch.num_positions == len(batch.inputs) for batch in batches)


@LOADERS
def test_a_round_ends_where_there_is_no_lease_and_everything_has_come_out(num_loaders):
    leases = Leases(Lease(0, 0, 9), None, Lease(0, 9, 20), None, None, Lease(1, 0, 20), None)
    with Feed(numbers(), leases, 2, num_loaders=num_loaders) as feed:
        rounds = [seen(feed.round()) for _ in range(5)]
    assert rounds == [list(range(9)), list(range(9, 20)), [], list(range(20)), []]


@LOADERS
def test_without_a_seed_the_split_is_read_in_its_own_order(num_loaders):
    assert seen(read_all(numbers(), 6, num_loaders)) == list(range(20))


@LOADERS
def test_what_asking_for_a_lease_raises_comes_through(num_loaders):
    def ask() -> Lease | None:
        raise ConnectionError("gone")

    with (
        Feed(numbers(), ask, 2, num_loaders=num_loaders) as feed,
        pytest.raises(ConnectionError, match="gone"),
    ):
        list(feed.round())


class Torn(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int):
        if index == 5:
            raise LookupError("page 5 is torn")
        return torch.zeros(2), index


@LOADERS
def test_an_error_of_the_users_data_comes_through_and_leaves_no_process(num_loaders):
    with (
        Feed(own(Rows(Torn())), Leases(Lease(0, 0, 8)), 2, num_loaders=num_loaders) as feed,
        pytest.raises(LookupError, match="page 5 is torn"),
    ):
        list(feed.round())
    assert multiprocessing.active_children() == []


class Files:
    """Two good images and a bad one, again and again."""

    def __len__(self) -> int:
        return 9

    def name(self, index: int) -> str:
        return f"file{index}"

    def load(self, index: int) -> bytes:
        if index % 3 == 1:
            raise BadSample(self.name(index), "torn")
        return GOOD

    def close(self) -> None:
        pass


def pictures() -> Split:
    return Split(
        samples=Pictures(Files(), list(range(9)), 8),
        name="train",
        num_classes=9,
        input_shape=(3, 8, 8),
        digest="",
        is_decoding=True,
    )


@LOADERS
def test_bad_samples_are_left_out_of_their_batch_and_named(num_loaders):
    batches = list(read_all(pictures(), 4, num_loaders))
    assert [batch.num_good for batch in batches] == [3, 3]  # 9 samples in 4 + 5
    assert [batch.num_positions for batch in batches] == [4, 5]
    assert [batch.bad for batch in batches] == [
        (("file1", "torn"),),
        (("file4", "torn"), ("file7", "torn")),
    ]
    assert seen(iter(batches)) == [0, 2, 3, 5, 6, 8]


@LOADERS
def test_pixels_come_out_normalised(num_loaders):
    batch = next(iter(list(read_all(pictures(), 9, num_loaders))))
    assert batch.inputs.dtype == torch.float32
    assert float(batch.inputs[0, 0, 0, 0]) == pytest.approx((200 / 255 - 0.485) / 0.229, abs=1e-5)


def test_a_batch_of_bad_samples_alone_comes_out_empty():
    batches = list(read_all(pictures(), 1))
    assert (batches[1].inputs, batches[1].num_good, batches[1].num_positions) == (None, 0, 1)


class Words(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        return {"ids": torch.tensor([index]), "text": str(index)}, (torch.tensor(index), [1.5])


@LOADERS
def test_structures_of_tensors_come_through(num_loaders):
    batch = next(iter(list(read_all(own(Rows(Words())), 4, num_loaders))))
    assert batch.inputs["ids"].tolist() == [[0], [1], [2], [3]]
    assert batch.inputs["text"] == ["0", "1", "2", "3"]
    assert batch.targets[0].tolist() == [0, 1, 2, 3]


class Counting(IterableDataset[Any]):
    """Splits itself over loader processes, as streams are told to."""

    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for number in range(first, 12, step):
            yield torch.tensor(number), number

    def __len__(self) -> int:
        return 12


@LOADERS
def test_a_stream_is_read_in_its_own_order_by_one_process_at_most(num_loaders):
    split = own(Stream(Counting(), "it"))
    leases = Leases(Lease(0, 0, 4), Lease(0, 8, 12), Lease(1, 4, 8))
    with Feed(split, leases, 4, seed=3, num_loaders=num_loaders) as feed:
        assert len(multiprocessing.active_children()) == min(num_loaders, 1)
        assert seen(feed.round()) == [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7]


def test_loaders_are_there_before_the_first_round_and_gone_after_the_last():
    feed = Feed(numbers(), Leases(Lease(0, 0, 20)), 4, num_loaders=2)
    before = {child.pid for child in multiprocessing.active_children()}
    assert len(before) == 2
    list(feed.round())
    list(feed.round())
    assert {child.pid for child in multiprocessing.active_children()} == before
    feed.close()
    feed.close()
    assert multiprocessing.active_children() == []


def test_no_lease_is_asked_for_before_the_first_round():
    leases = Leases(Lease(0, 0, 20))
    with Feed(numbers(), leases, 4, num_loaders=1):
        assert leases.num_asked == 0


def test_loaders_read_ahead_but_only_so_far():
    leases = Leases(*(Lease(0, start, start + 2) for start in range(0, 20, 2)))
    with Feed(numbers(), leases, 2, num_loaders=2) as feed:
        batches = feed.round()
        next(batches)
        assert leases.num_asked == 5  # this batch, and two ahead for each of two loaders
        list(batches)


@LOADERS
def test_the_feed_draws_no_numbers_that_a_model_would_draw(num_loaders):
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    with Feed(numbers(), Leases(Lease(0, 0, 20)), 4, seed=1, num_loaders=num_loaders) as feed:
        list(feed.round())
        list(feed.round())
    assert torch.rand(4).equal(wanted)


class Slow(Dataset[Any]):
    """A sample takes 20 ms of waiting, as from a disk."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int):
        began = time.monotonic()
        time.sleep(0.02)
        return torch.tensor([began, time.monotonic()], dtype=torch.float64), os.getpid()


def test_loaders_read_at_the_same_time():
    read = read_all(own(Rows(Slow())), 4, 2)
    spans = [
        (int(pid), *map(float, span))
        for batch in read
        for span, pid in zip(batch.inputs, batch.targets, strict=True)
    ]
    pids = {pid for pid, _, _ in spans}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert any(
        one != other and begin < end_of_other and begin_of_other < end
        for one, begin, end in spans
        for other, begin_of_other, end_of_other in spans
    )


def test_how_many_loaders_there_are_by_default(monkeypatch):
    for cores, workers, count in ((2, 1, 1), (2, 4, 1), (16, 2, 7), (64, 1, 8), (16, 16, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        assert default_loaders(pictures(), workers) == count
    assert default_loaders(numbers(), 1) == 0
    assert default_loaders(own(Rows(Words())), 1) == 0


def test_move_goes_through_structures_and_leaves_the_rest():
    values = {"a": torch.zeros(2), "b": [torch.ones(1), ("text", torch.ones(1), 5)]}
    moved = move(values, "meta")
    assert moved["a"].device.type == moved["b"][0].device.type == "meta"
    assert moved["b"][1][0::2] == ("text", 5)
    assert moved["b"][1][1].device.type == "meta"
