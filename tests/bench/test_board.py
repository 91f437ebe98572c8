"""The board: orders, progress and results between a driver and the processes of a crew."""

import threading
import time

import pytest

from distbelief.bench.board import SEATS, Board, Order


@pytest.fixture
def board():
    made = Board.create()
    yield made
    made.close()


def test_everybody_is_on_hold_at_first_and_follows_that(board):
    assert board.seat(0).order is Order.HOLD
    assert not board.seat(0).is_stopped
    assert board.is_followed(range(SEATS))


def test_an_order_reaches_the_seats_that_it_is_for(board):
    board.tell(Order.RUN, range(1, 3))
    assert [board.seat(i).order for i in range(4)] == [
        Order.HOLD,
        Order.RUN,
        Order.RUN,
        Order.HOLD,
    ]
    assert not board.is_followed(range(1, 3))
    for index in (1, 2):
        board.seat(index).follow(board.seat(index).word)
    assert board.is_followed(range(1, 3))


def test_the_same_order_twice_is_two_orders(board):
    board.tell(Order.STEP, range(1))
    first = board.seat(0).word
    board.tell(Order.STEP, range(1))
    assert board.seat(0).word != first
    assert board.seat(0).order is Order.STEP


def test_another_process_finds_it_by_its_path(board):
    other = Board.open(board.path)
    try:
        other.seat(5).tick()
        other.seat(5).publish(-1.5, 2.25)
        other.seat(5).look(4, 1, 2)
        other.seat(5).refuse(3)
        other.seat(5).take_samples(7)
    finally:
        other.close()
    seat = board.seat(5)
    assert (seat.progress[0], seat.fetched, seat.looked) == (1, (-1.5, 2.25), (4, 1, 2, 3))
    assert seat.samples == 7
    assert board.seat(4).progress == (0, 0)


def test_a_round_comes_with_the_time_of_its_own_end(board):
    seat = board.seat(0)
    ends = []
    for rounds in range(1, 5):
        before = time.monotonic_ns()
        seat.tick()
        assert seat.progress[0] == rounds
        assert before <= seat.progress[1] <= time.monotonic_ns()
        ends.append(seat.progress[1])
    assert ends == sorted(ends)


def test_progress_that_is_read_meanwhile_never_goes_back(board):
    seat, halt = board.seat(0), threading.Event()

    def tick() -> None:
        while not halt.is_set():
            seat.tick()

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        seen = [seat.progress for _ in range(5000)]
    finally:
        halt.set()
        thread.join()
    assert seen == sorted(seen)
    by_round: dict[int, set[int]] = {}
    for rounds, ended in seen:
        by_round.setdefault(rounds, set()).add(ended)
    assert all(len(ends) == 1 for ends in by_round.values())


class Life:
    """A worker in a thread, on a seat."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.log: list[str] = []
        self.thread = threading.Thread(
            target=board.seat(0).do_rounds,
            args=(self._round, lambda: self.log.append("look"), self._publish),
        )

    def _round(self) -> None:
        self.log.append("round")
        time.sleep(0.001)

    def _publish(self) -> tuple[float, float]:
        self.log.append("publish")
        return 1.0, 2.0

    def told(self, order: Order) -> None:
        self.board.tell(order, range(1))
        self.until(lambda: self.board.is_followed(range(1)))

    def until(self, is_so) -> None:
        deadline = time.monotonic() + 30
        while not is_so():
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture
def life(board):
    made = Life(board)
    made.thread.start()
    yield made
    board.tell(Order.STOP, range(1))
    made.thread.join(30)
    assert not made.thread.is_alive()


def test_a_worker_on_hold_does_no_rounds(life):
    life.told(Order.RUN)
    life.until(lambda: life.board.seat(0).progress[0] >= 3)
    life.told(Order.HOLD)
    done = len(life.log)
    time.sleep(0.02)
    assert len(life.log) == done == life.board.seat(0).progress[0]


def test_a_step_is_one_round_that_is_published(life):
    life.told(Order.STEP)
    life.told(Order.HOLD)
    assert life.log == ["round", "publish"]
    assert life.board.seat(0).fetched == (1.0, 2.0)
    life.told(Order.STEP)
    life.told(Order.HOLD)
    assert life.log == ["round", "publish"] * 2


def test_a_check_looks_at_every_round(life):
    life.told(Order.CHECK)
    life.until(lambda: life.board.seat(0).progress[0] >= 3)
    life.told(Order.HOLD)
    assert life.log[:4] == ["round", "look"] * 2
