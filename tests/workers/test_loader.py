"""DataLoader: a shuffled loader's samples are shared out; every other loader is torch's own."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, SequentialSampler, TensorDataset

import distbelief.script  # noqa: F401 - sets the session of a script that is alone
from distbelief.workers import session
from distbelief.workers.loader import DataLoader
from distbelief.workers.order import epoch_order
from tests.helpers.solo import Numbers, Script


@pytest.fixture(autouse=True)
def _no_session() -> Iterator[None]:
    """A session is process-wide."""
    session.set_current(None)
    yield
    session.set_current(None)


class Reader:
    """A worker that trains on what its loader gives it."""

    def __init__(self, script: Script, index: int, num_samples: int, batch_size: int, **options):
        self.script, self.index = script, index
        self.here = script.be(index)
        self.loader = DataLoader(Numbers(num_samples), batch_size, shuffle=True, **options)
        self.batches: list[list[int]] = []
        self._batches: Iterator[torch.Tensor] | None = None

    def read(self, num_batches: int) -> int:
        """Go on with an iteration, or begin one; how many batches there were."""
        self.script.be(self.index)
        if self._batches is None:
            self._batches = iter(self.loader)
        for number in range(num_batches):
            batch = next(self._batches, None)
            if batch is None:
                self._batches = None
                return number
            self.batches.append(batch.tolist())
            # As a backward pass and an answered push do.
            self.script.queue.advance(f"w{self.index}", self.here.take_count())
        return num_batches

    def give_up(self) -> None:
        """Leave the loop, as `break` does."""
        self._batches = None

    @property
    def samples(self) -> list[int]:
        return [sample for batch in self.batches for sample in batch]


def epoch(readers: list[Reader], speeds: tuple[int, ...]) -> Counter[int]:
    """One iteration of each, side by side; the samples of all."""
    before = [len(reader.samples) for reader in readers]
    reading = list(zip(readers, speeds, strict=True))
    while reading:
        reading = [(reader, speed) for reader, speed in reading if reader.read(speed) == speed]
    return Counter(
        sample
        for reader, start in zip(readers, before, strict=True)
        for sample in reader.samples[start:]
    )


@pytest.mark.parametrize("num_samples", [1, 2, 3, 7, 96, 97, 100, 250])
@pytest.mark.parametrize("batch_size", [1, 4, 10])
@pytest.mark.parametrize("speeds", [(1, 1, 1), (5, 1, 2)])
def test_three_workers_visit_each_sample_once_an_epoch(num_samples, batch_size, speeds):
    with Script(3) as script:
        readers = [Reader(script, i, num_samples, batch_size) for i in range(3)]
        for _ in range(3):
            assert epoch(readers, speeds) == Counter(range(num_samples))
        sizes = [len(batch) for reader in readers for batch in reader.batches]
        assert max(sizes) <= batch_size
        assert [r.here.num_counted for r in readers] == [len(r.samples) for r in readers]


def test_a_fast_worker_gets_more():
    with Script(2) as script:
        readers = [Reader(script, i, 1000, 5) for i in range(2)]
        epoch(readers, (4, 1))
        assert len(readers[0].samples) > 2 * len(readers[1].samples) > 0


def test_alone_in_a_run_the_samples_come_in_the_order_of_the_epoch():
    with Script(seed=7) as script:
        reader = Reader(script, 0, 30, 4)
        epoch([reader], (1,))
        epoch([reader], (1,))
        orders = [epoch_order(7, number, 30).tolist() for number in (0, 1)]
        assert reader.samples == orders[0] + orders[1]
        assert [len(batch) for batch in reader.batches[:8]] == [4] * 7 + [2]


def test_drop_last_drops_what_fills_no_batch_and_says_so():
    with Script(2) as script:
        readers = [Reader(script, i, 103, 10, drop_last=True) for i in range(2)]
        visited = epoch(readers, (1, 2))
        assert {len(batch) for reader in readers for batch in reader.batches} == {10}
        assert set(visited.values()) == {1}
        assert len(visited) == 100
        assert sum(reader.here._dropped for reader in readers) == 3


@pytest.mark.parametrize("num_processes", [0, 1])
def test_what_is_left_by_an_early_break_comes_in_a_later_iteration(num_processes):
    with Script() as script:
        options = {"num_workers": num_processes} if num_processes else {}
        reader = Reader(script, 0, 40, 5, **options)
        reader.read(2)
        reader.give_up()
        assert script.queue.done_samples == 10
        reader.read(1000)
        assert Counter(reader.samples[:40]) == Counter(range(40))  # the rest of epoch 0
        assert Counter(reader.samples[40:]) == Counter(range(40))


def test_loader_processes_read_ahead_and_lose_nothing():
    with Script(2) as script:
        readers = [
            Reader(script, i, 61, 4, num_workers=1, persistent_workers=i == 0) for i in range(2)
        ]
        for _ in range(2):
            assert epoch(readers, (1, 3)) == Counter(range(61))
        assert sum(reader.here.num_counted for reader in readers) == 2 * 61
        del readers[0].loader, readers[0]._batches  # ends the persistent process


def test_samples_without_batches_are_counted_one_by_one():
    with Script() as script:
        here = script.be()
        loader = DataLoader(Numbers(7), None, shuffle=True)
        assert sorted(loader) == list(range(7))
        assert here.num_counted == 7


def test_a_loader_that_is_made_anew_for_each_epoch_goes_on():
    with Script(seed=3) as script:
        samples = []
        for _ in range(3):
            reader = Reader(script, 0, 10, 4)
            epoch([reader], (1,))
            samples.append(reader.samples)
        assert samples == [epoch_order(3, number, 10).tolist() for number in range(3)]


def test_samples_that_were_only_looked_at_come_again():
    """As where a script peeks at a first batch for its shape."""
    with Script(seed=3) as script:
        here = script.be()
        loader = DataLoader(Numbers(10), 4, shuffle=True)
        assert len(next(iter(loader))) == 4
        assert sorted(i for batch in loader for i in batch.tolist()) == list(range(10))
        assert here.take_count() == 10
        # The first real iteration is epoch 0, not 0 and 1.
        assert script.queue.position.epoch == 1


def test_a_look_at_the_data_before_the_model_is_made_brings_no_parameters():
    with Script() as script:
        script.be()
        next(iter(DataLoader(Numbers(10), 4, shuffle=True)))
        assert not script.controller.is_initialised
        assert script.controller.pace.began_at is None


def test_two_iterations_at_a_time_are_refused():
    with Script() as script:
        script.be()
        loaders = [DataLoader(Numbers(64), 4, shuffle=True) for _ in range(2)]
        with pytest.raises(ValueError, match=r"two iterations over shuffled data .* shuffle=True"):
            for _ in zip(*loaders, strict=True):
                pass


def test_data_of_another_length_is_refused_on_the_worker_that_came_later():
    with Script(2) as script:
        Reader(script, 0, 100, 10).read(1)
        with pytest.raises(
            ValueError, match=r"w1: the data has 99 samples here, 100 there\. All loaders .* test"
        ):
            Reader(script, 1, 99, 10).read(1)


def test_empty_data_is_refused_at_once():
    with Script() as script:
        script.be()
        with pytest.raises(ValueError, match="shuffle=True is empty"):
            DataLoader(Numbers(0), 4, shuffle=True)


class Stream(IterableDataset[int]):
    def __iter__(self):
        return iter(range(5))


class Endless:
    def __getitem__(self, index):
        return index


@pytest.mark.parametrize("data", [Stream(), Endless()])
def test_data_without_a_length_cannot_be_shared(data):
    with Script() as script:
        script.be()
        with pytest.raises(ValueError, match=rf"{type(data).__name__} has no length.*worker\(\)"):
            DataLoader(data, 4, shuffle=True)


def test_a_sampler_beside_shuffle_is_refused():
    with Script() as script:
        script.be()
        with pytest.raises(ValueError, match="shuffle=True excludes a sampler"):
            DataLoader(Numbers(5), 4, shuffle=True, sampler=SequentialSampler(range(5)))


def test_a_stream_without_shuffle_is_torchs_own():
    with Script(2) as script:
        here = script.be(1)
        assert [batch.tolist() for batch in DataLoader(Stream(), 3)] == [[0, 1, 2], [3, 4]]
        assert here.num_counted == 0
        assert not here.asked_for_leases


def test_a_loader_that_does_not_shuffle_reads_all_on_each_worker():
    with Script(2) as script:
        for index in range(2):
            here = script.be(index)
            loader = DataLoader(Numbers(5), 2)
            assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4]]
            assert here.take_count() == 0


def test_len_is_that_of_the_whole_epoch():
    with Script(4) as script:
        script.be()
        assert len(DataLoader(Numbers(103), 10, shuffle=True)) == 11
        assert len(DataLoader(Numbers(103), 10, shuffle=True, drop_last=True)) == 10
        with pytest.raises(TypeError, match="is not known before"):
            len(DataLoader(Numbers(103), 10, shuffle=True, sized=False))
        assert len(DataLoader(Numbers(103), 10, sized=False)) == 11


@pytest.mark.parametrize("options", [{}, {"drop_last": True}, {"batch_size": 1}])
def test_alone_it_gives_the_same_batches_as_torchs_own(options):
    data = TensorDataset(torch.arange(23), torch.randn(23, 2))
    options = {"batch_size": 4, "shuffle": True, **options}
    expected, found = [], []
    torch.manual_seed(11)
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(data, **options)
    for _ in range(2):
        expected += [[x.tolist(), y.tolist()] for x, y in loader]
    torch.manual_seed(11)
    ours = DataLoader(data, **options)
    for _ in range(2):
        found += [[x.tolist(), y.tolist()] for x, y in ours]
    assert found == expected
    assert len(ours) == len(loader)


def test_alone_the_samples_of_each_batch_are_counted():
    here = session.current()
    loader = DataLoader(Numbers(10), 4, shuffle=True)
    assert [here.take_count() for _ in loader] == [4, 4, 2]


def test_alone_an_iteration_without_training_counts_nothing():
    here = session.current()
    loader = DataLoader(Numbers(10), 4, shuffle=True)
    assert len(list(loader)) == 3  # as where the accuracy on the training data is measured
    next(iter(loader))
    assert here.take_count() == 4


def test_a_resumed_run_passes_over_the_epochs_that_are_done():
    with Script() as script:
        reader = Reader(script, 0, 20, 5)
        epoch([reader], (1,))
        position = script.queue.position
    with Script(position=position) as script:
        reader = Reader(script, 0, 20, 5)
        assert reader.read(100) == 0
        assert reader.read(100) == 4
        assert reader.samples == epoch_order(0, 1, 20).tolist()
