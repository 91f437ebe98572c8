"""What is held for right, and what is not: the verdict over a crew, from the board alone."""

import pytest
import torch

from distbelief.bench.board import Board
from distbelief.bench.floor import FLOORS, chunks, ends, look, slices
from distbelief.bench.gloo import GLOO
from distbelief.bench.ours import TOLERANCE, ours
from distbelief.bench.race import judge
from distbelief.bench.work import (
    GOOGLENET_SIZE,
    GOOGLENET_TENSORS,
    LR,
    MOMENTUM,
    Course,
    Work,
    apply_,
)
from distbelief.commands.bench import FORMS
from distbelief.param_server.update import make_rule

OURS, FLOOR = ours("tcp"), FLOORS["zmq simple"]


@pytest.fixture
def board():
    made = Board.create()
    yield made
    made.close()


@pytest.fixture(scope="module")
def course():
    return Course()


def verdict(board, course, system, rounds, low, high=None, looked=(16, 0, 0), refused=0):
    """Of workers that did these rounds; the first has fetched values from low to high."""
    seats = [board.seat(index) for index in range(len(rounds))]
    for seat, count in zip(seats, rounds, strict=True):
        for _ in range(count):
            seat.tick()
        seat.publish(low, low if high is None else high)
        seat.look(*looked)
        seat.refuse(refused)
    return judge(system, seats, course)


def test_the_course_is_that_of_torchs_optimizer_to_the_bit(course):
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.SGD([parameter], lr=LR, momentum=MOMENTUM, fused=True)
    for pushes in range(1, 200):
        optimizer.step()
        assert torch.equal(parameter.detach(), torch.full((3,), course.after(pushes)))


def test_the_course_is_what_momentum_says(course):
    buffer, value = 0.0, 0.0
    for pushes in range(1, 50):
        buffer = MOMENTUM * buffer + 1
        value -= LR * buffer
        assert course.after(pushes) == pytest.approx(value, rel=1e-5)
    assert course.after(0) == 0.0


@pytest.mark.parametrize("numel", [1, 63, 64, 67, 1000, 436_952])
def test_every_element_of_a_vector_of_any_length_takes_the_course(course, numel):
    values, grad, momentum = torch.zeros(numel), torch.ones(numel), torch.zeros(numel)
    rule, ruled, buffer = make_rule("momentum"), torch.zeros(numel), torch.zeros(numel)
    for step in range(12):
        apply_(values, grad, momentum)
        rule.apply_([ruled], [grad], {"momentum": [buffer]}, lr=LR, weight_decay=0.0, step=step)
    want = torch.full((numel,), course.after(12))
    assert torch.equal(values, want)
    assert torch.equal(ruled, want)


def test_all_pushes_and_nothing_else_is_right(board, course):
    found = verdict(board, course, OURS, [3, 4], course.after(7))
    assert (found.is_right, found.text, found.pushes, found.looked) == (True, "", 7, 32)


@pytest.mark.parametrize("system", [OURS, FLOOR], ids=lambda system: system.name)
@pytest.mark.parametrize("seen", [0, 6, 8])
def test_one_push_lost_or_applied_twice_is_wrong(board, course, system, seen):
    found = verdict(board, course, system, [3, 4], course.after(seen))
    assert not found.is_right
    assert "after 7 pushes" in found.text


@pytest.mark.parametrize("system", [OURS, FLOOR], ids=lambda system: system.name)
def test_one_element_that_saw_another_push_is_wrong(board, course, system):
    assert not verdict(board, course, system, [7], course.after(7), course.after(6)).is_right


def test_one_push_more_or_less_is_seen_after_ten_thousands(course):
    pushes = 20_000
    assert abs(course.after(pushes) - course.after(pushes - 1)) > course.slack(pushes) > 0


def test_rounding_is_allowed_to_others_and_not_to_ours(board, course):
    assert verdict(board, course, FLOOR, [7], course.after(7) * (1 + 1e-5)).is_right
    assert not judge(OURS, [board.seat(0)], course).is_right


@pytest.mark.parametrize(
    ("factor", "tolerance", "agrees"),
    [
        (1.0, None, True),
        (1.0 + 1e-6, None, False),
        (1.0 + 1e-6, 0.0, True),
        (1.01, 0.0, False),
        (1.01, 0.02, True),
        (1.03, 0.02, False),
        (0.97, 0.02, False),
    ],
)
def test_forms_that_lose_something_are_allowed_a_share(course, factor, tolerance, agrees):
    low = course.after(5000) * factor
    assert course.agrees(low, low, 5000, tolerance) is agrees


def test_every_form_on_the_wire_has_its_tolerance():
    assert {form: ours("tcp", compress=form).tolerance for form in TOLERANCE} == TOLERANCE
    assert [form for form in TOLERANCE if ours("tcp", compress=form).is_whole] == ["float32"]
    assert set(TOLERANCE) == set(FORMS)


def test_nan_is_wrong(board, course):
    assert not verdict(board, course, FLOOR, [7], float("nan")).is_right


def test_a_torn_part_is_wrong_for_ours_and_counted_for_floors(board, course):
    found = verdict(board, course, OURS, [7], course.after(7), looked=(16, 1, 0))
    assert (found.is_right, found.torn) == (False, 1)
    assert "1 of 16 parts were torn" in found.text
    assert judge(FLOOR, [board.seat(0)], course).is_right


@pytest.mark.parametrize(
    ("told", "text"),
    [
        ({"looked": (16, 0, 2)}, "2 of 16 parts had values of another version"),
        ({"refused": 1}, "1 parts were refused"),
        ({"looked": (0, 0, 0)}, "nobody looked"),
    ],
)
def test_other_versions_refusals_and_not_looking_are_wrong(board, course, told, text):
    found = verdict(board, course, OURS, [7], course.after(7), **told)
    assert not found.is_right
    assert text in found.text


def test_workers_in_lock_step_make_one_push_of_a_round(board, course):
    assert verdict(board, course, GLOO, [5, 5], course.after(5)).is_right


def test_workers_that_are_not_in_lock_step_are_wrong(board, course):
    found = verdict(board, course, GLOO, [5, 4], course.after(5))
    assert "[5, 4]" in found.text


def test_the_work_is_googlenets_main_network():
    work = Work.of()
    assert len(work.layout.entries) == GOOGLENET_TENSORS == 116
    assert work.size == GOOGLENET_SIZE == 6_998_552
    assert work.round_bytes == 55_988_416
    assert Work.from_dict(work.as_dict()) == work


def test_a_size_gives_one_tensor():
    work = Work.of(1000)
    assert [entry.shape for entry in work.layout.entries] == [(1000,)]


def test_ranges_of_servers_and_chunks_cover_the_vector():
    assert slices(10, 3) == [(0, 3), (3, 6), (6, 10)]
    assert chunks(2**18 * 2 + 5) == [(0, 2**18), (2**18, 2**19), (2**19, 2**19 + 5)]


def test_a_floor_counts_chunks_of_several_moments(board):
    values = torch.zeros(2**18 + 10).numpy()
    look(board.seat(0), values)
    assert board.seat(0).looked == (2, 0, 0, 0)
    values[-1] = -1
    look(board.seat(0), values)
    assert board.seat(0).looked == (4, 1, 0, 0)
    assert ends(values) == (-1.0, 0.0)
