"""Leases: together the workers visit every sample once an epoch, whatever happens to them."""

import json
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given

from distbelief.workers.lease import Lease, LeaseQueue, Position, batches
from distbelief.workers.order import epoch_order

WORKERS = ("w0", "w1", "w2")


class Diary:
    """Plays workers that train on their leases in order; notes which samples were answered."""

    def __init__(self, queue: LeaseQueue) -> None:
        self.queue = queue
        self.visits: Counter[tuple[int, int]] = Counter()
        self._todo: dict[str, list[tuple[int, int]]] = {w: [] for w in WORKERS}

    def take(self, worker: str) -> Lease | None:
        lease = self.queue.take(worker)
        if lease is not None:
            self._todo[worker] += [(lease.epoch, i) for i in range(lease.start, lease.stop)]
        return lease

    def advance(self, worker: str, num_samples: int) -> int:
        done, self._todo[worker] = (
            self._todo[worker][:num_samples],
            self._todo[worker][num_samples:],
        )
        self.visits.update(done)
        self.queue.advance(worker, len(done))
        return len(done)

    def lose(self, worker: str, unheard: int) -> int:
        """The worker dies; the last samples it trained on were answered but never reported."""
        self.visits.update(self._todo[worker][:unheard])
        self._todo[worker].clear()
        return self.queue.give_back(worker)

    def iterate(self, worker: str, kept: int) -> int:
        """Begin a new iteration; the first of what is open is trained on already."""
        del self._todo[worker][kept:]
        return self.queue.give_back(worker, kept)

    def restart(self, queue: LeaseQueue) -> None:
        """All workers are gone, and others go on."""
        self.queue = queue
        self._todo = {w: [] for w in WORKERS}

    def finish(self, workers=WORKERS) -> None:
        while not self.queue.is_finished:
            for worker in workers:
                self.take(worker)
                self.advance(worker, 1000)


ACTION = st.tuples(
    st.sampled_from(("take", "advance", "lose")), st.sampled_from(WORKERS), st.integers(0, 9)
)


@given(
    num_samples=st.integers(1, 40),
    lease=st.integers(1, 12),
    epochs=st.integers(1, 3),
    warm_start=st.integers(0, 50),
    actions=st.lists(ACTION, max_size=60),
)
def test_every_sample_is_visited_once_an_epoch_unless_a_worker_dies_unheard(
    num_samples, lease, epochs, warm_start, actions
):
    diary = Diary(LeaseQueue(num_samples, lease, epochs, warm_start))
    unheard = 0
    for what, worker, number in actions:
        if what == "take":
            diary.take(worker)
        elif what == "advance":
            diary.advance(worker, number)
        else:
            before = sum(diary.visits.values())
            diary.lose(worker, number)
            unheard += sum(diary.visits.values()) - before
    diary.finish()
    assert set(diary.visits) == {(e, i) for e in range(epochs) for i in range(num_samples)}
    assert sum(diary.visits.values()) == epochs * num_samples + unheard
    assert diary.queue.done_samples == epochs * num_samples


def test_a_lost_worker_gives_back_only_what_it_had_not_finished():
    queue = LeaseQueue(10, 6, 1)
    assert queue.take("w0") == Lease(0, 0, 6)
    queue.advance("w0", 4)
    assert queue.give_back("w0") == 2
    assert queue.take("w1") == Lease(0, 4, 6)
    assert queue.done_samples == 4


def test_samples_of_one_answer_may_span_two_leases():
    queue = LeaseQueue(10, 4, 1)
    queue.take("w0")
    queue.take("w0")
    queue.advance("w0", 5)
    assert queue.give_back("w0") == 3
    assert queue.take("w1") == Lease(0, 5, 8)


def test_a_worker_that_holds_nothing_gives_back_nothing():
    queue = LeaseQueue(10, 4, 1)
    assert queue.give_back("w0") == 0
    queue.advance("w0", 3)
    assert queue.done_samples == 0


def test_warm_start_hands_work_to_one_worker_until_its_samples_are_done():
    queue = LeaseQueue(100, 5, 1, warm_start_samples=10)
    assert queue.take("w1") == Lease(0, 0, 5)
    assert queue.take("w0") is None
    queue.advance("w1", 5)
    assert queue.take("w0") is None
    assert queue.take("w1") == Lease(0, 5, 10)
    assert queue.take("w0") is None
    queue.advance("w1", 5)
    assert queue.take("w0") == Lease(0, 10, 15)
    assert not queue.is_finished


def test_warm_start_moves_on_to_another_worker_when_the_first_is_lost():
    queue = LeaseQueue(100, 5, 1, warm_start_samples=10)
    queue.take("w0")
    queue.advance("w0", 2)
    assert queue.take("w1") is None
    queue.give_back("w0")
    assert queue.take("w1") == Lease(0, 2, 5)
    assert queue.take("w2") is None


def test_a_run_shorter_than_its_warm_start_ends():
    queue = LeaseQueue(4, 4, 1, warm_start_samples=1000)
    queue.take("w0")
    assert queue.take("w1") is None
    queue.advance("w0", 4)
    assert queue.take("w0") is None
    assert queue.is_finished


def test_the_last_lease_of_an_epoch_ends_with_the_epoch():
    queue = LeaseQueue(5, 3, 2)
    leases = [queue.take("w0") for _ in range(5)]
    assert leases == [Lease(0, 0, 3), Lease(0, 3, 5), Lease(1, 0, 3), Lease(1, 3, 5), None]


def test_without_a_number_of_epochs_the_work_never_ends():
    queue = LeaseQueue(2, 2)
    assert [lease.epoch for _ in range(50) if (lease := queue.take("w0"))] == list(range(50))


def test_a_stopped_queue_is_finished_once_everything_on_the_way_has_come_in():
    queue = LeaseQueue(100, 5)
    queue.take("w0")
    queue.stop()
    assert queue.take("w1") is None
    assert not queue.is_finished
    queue.advance("w0", 5)
    assert queue.is_finished


def test_a_stopped_queue_does_not_wait_for_the_work_of_a_lost_worker():
    queue = LeaseQueue(100, 5)
    queue.take("w0")
    queue.stop()
    queue.give_back("w0")
    assert queue.take("w1") is None
    assert queue.is_finished


def test_work_that_came_back_keeps_the_queue_unfinished():
    queue = LeaseQueue(5, 5, 1)
    queue.take("w0")
    assert queue.take("w1") is None
    queue.give_back("w0")
    assert not queue.is_finished
    assert queue.take("w1") == Lease(0, 0, 5)


@pytest.mark.parametrize(("samples", "lease"), [(0, 5), (5, 0)])
def test_a_queue_without_samples_is_refused(samples, lease):
    with pytest.raises(ValueError, match=f"{samples} samples in leases of {lease}"):
        LeaseQueue(samples, lease)


@given(st.integers(0, 2**32 - 1), st.integers(0, 10_000), st.integers(1, 200))
def test_the_order_of_an_epoch_is_a_permutation(seed, epoch, num_samples):
    order = epoch_order(seed, epoch, num_samples)
    assert sorted(order.tolist()) == list(range(num_samples))


def test_the_order_depends_on_seed_and_epoch_only():
    first = epoch_order(3, 1, 50)
    assert epoch_order(3, 1, 50).equal(first)
    assert not epoch_order(3, 2, 50).equal(first)
    assert not epoch_order(4, 1, 50).equal(first)


@pytest.mark.parametrize(
    ("stop", "ranges"),
    [
        (0, []),
        (1, [(0, 1)]),
        (4, [(0, 4)]),
        (5, [(0, 5)]),
        (6, [(0, 4), (4, 6)]),
        (9, [(0, 4), (4, 9)]),
    ],
)
def test_a_last_batch_of_one_sample_joins_the_one_before(stop, ranges):
    assert list(batches(0, stop, 4)) == ranges


def test_batches_of_one_are_what_was_asked_for():
    assert list(batches(3, 6, 1)) == [(3, 4), (4, 5), (5, 6)]


# Scripts: epochs that a worker goes through, and data whose length only a worker knows


def test_a_lease_is_of_no_later_epoch_than_was_named():
    queue = LeaseQueue(6, 4)
    assert [queue.take("w0", 0) for _ in range(3)] == [Lease(0, 0, 4), Lease(0, 4, 6), None]
    assert queue.take("w1", 1) == Lease(1, 0, 4)
    assert queue.take("w0", 0) is None


def test_an_epoch_is_over_when_all_of_it_has_been_handed_out_and_nothing_came_back():
    queue = LeaseQueue(6, 4)
    queue.take("w0", 0)
    assert not queue.is_over(0)
    queue.take("w1", 0)
    assert queue.is_over(0)
    assert not queue.is_over(1)
    queue.give_back("w1")
    assert not queue.is_over(0)
    assert queue.take("w0", 0) == Lease(0, 4, 6)
    assert queue.is_over(0)


def test_what_came_back_goes_out_in_a_later_epoch_too():
    queue = LeaseQueue(4, 4)
    queue.take("w0", 0)
    queue.give_back("w0")
    assert queue.take("w1", 1) == Lease(0, 0, 4)
    assert queue.take("w1", 1) == Lease(1, 0, 4)


def test_a_worker_may_keep_the_first_of_what_it_holds():
    queue = LeaseQueue(12, 4, 1)
    for _ in range(3):
        queue.take("w0")
    assert queue.give_back("w0", kept=6) == 6
    assert [queue.take("w1") for _ in range(3)] == [Lease(0, 6, 8), Lease(0, 8, 12), None]
    queue.advance("w0", 6)
    queue.advance("w1", 6)
    assert queue.is_finished
    assert queue.done_samples == 12


@pytest.mark.parametrize(("kept", "back"), [(0, 8), (3, 5), (4, 4), (8, 0), (99, 0)])
def test_the_rest_goes_back_however_much_is_kept(kept, back):
    queue = LeaseQueue(8, 4)
    queue.take("w0")
    queue.take("w0")
    assert queue.give_back("w0", kept) == back
    assert queue.unfinished_samples == 8


def test_the_first_worker_says_how_long_the_data_is():
    queue = LeaseQueue(0, 0)
    assert queue.take("w0") is None
    assert not queue.is_finished
    queue.size(5, 3)
    queue.size(5, 100)  # the first one's leases stay
    assert [queue.take("w0", 0) for _ in range(3)] == [Lease(0, 0, 3), Lease(0, 3, 5), None]


def test_data_of_another_length_is_refused():
    queue = LeaseQueue(0, 0)
    queue.size(5, 3)
    with pytest.raises(ValueError, match="the data has 6 samples here, 5 there"):
        queue.size(6, 3)
    with pytest.raises(ValueError, match="the data is empty"):
        queue.size(0, 3)


def test_a_position_goes_on_with_what_was_not_finished():
    queue = LeaseQueue(10, 4, 2)
    for worker in ("w0", "w1", "w0"):
        queue.take(worker)
    queue.take("w2")  # of epoch 1
    queue.advance("w0", 5)
    position = queue.position
    assert position.done_samples == 5
    again = LeaseQueue(
        10, 4, 2, position=Position.from_dict(json.loads(json.dumps(position.as_dict())))
    )
    leases = iter(lambda: again.take("w0"), None)
    visited = Counter((le.epoch, i) for le in leases for i in range(le.start, le.stop))
    done = {(0, 0), (0, 1), (0, 2), (0, 3), (0, 8)}
    assert visited == Counter({(e, i) for e in range(2) for i in range(10)} - done)
    again.advance("w0", 1000)
    assert again.done_samples == 20


def test_a_position_of_other_data_is_refused():
    queue = LeaseQueue(10, 4)
    with pytest.raises(ValueError, match="the data has 11 samples and had 10 when the run was"):
        LeaseQueue(11, 4, position=queue.position)
    unknown = LeaseQueue(0, 0, position=queue.position)
    with pytest.raises(ValueError, match="the data has 11 samples here, 10 there"):
        unknown.size(11, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epoch": -1},
        {"start": 0.5},
        {"done_samples": True},
        {"returned": [[0, 0, -4]]},
        {"returned": [["0", 0, 4]]},
        {"returned": [[0, 4]]},
        {"returned": [5]},
        {"colour": 3},
    ],
)
def test_a_position_that_is_none_is_refused(wrong):
    with pytest.raises((ValueError, TypeError)):
        Position.from_dict({**LeaseQueue(10, 4).position.as_dict(), **wrong})


MOVE = st.tuples(
    st.sampled_from(("take", "advance", "lose", "iterate", "restart", "stop")),
    st.sampled_from(WORKERS),
    st.integers(0, 9),
)


@given(
    num_samples=st.integers(1, 30),
    lease=st.integers(1, 10),
    moves=st.lists(MOVE, max_size=80),
)
def test_each_sample_is_visited_once_an_epoch_whatever_happens_in_between(
    num_samples, lease, moves
):
    """iterate: a worker begins an iteration anew and keeps some of what it has. restart: the run
    is stopped or killed, and goes on from its position with leases of another length."""
    epochs = 3
    diary = Diary(LeaseQueue(num_samples, lease, epochs))
    for what, worker, number in moves:
        if what == "take":
            diary.take(worker)
        elif what == "advance":
            diary.advance(worker, number)
        elif what == "lose":
            diary.lose(worker, 0)
        elif what == "iterate":
            diary.iterate(worker, number)
        elif what == "stop":
            diary.queue.stop()
            assert diary.take(worker) is None
        if what in ("restart", "stop"):
            position = Position.from_dict(diary.queue.position.as_dict())
            diary.restart(LeaseQueue(num_samples, number + 1, epochs, position=position))
    diary.finish()
    assert diary.visits == {(e, i): 1 for e in range(epochs) for i in range(num_samples)}
    assert diary.queue.done_samples == epochs * num_samples
    assert diary.queue.unfinished_samples == 0
