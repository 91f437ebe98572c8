"""Windows, spreads and ratios: figures from looks, without any process."""

import pytest

from distbelief.bench.machine import Busy, Use
from distbelief.bench.window import Look, Spread, between, ratios

S = 10**9
"""Nanoseconds of a second."""


def look(at_s=0.0, progress=((0, 0),), cpu_s=0.0, faults=0, busy_s=0.0, stolen_s=0.0):
    return Look(at_s, tuple(progress), Use(cpu_s, faults), Busy(busy_s, stolen_s))


def test_a_rate_is_by_the_ends_of_rounds_and_not_by_the_window():
    # 3 rounds in 1.5 s of the worker's, in a window of 2 s.
    window = between(look(0.0, [(10, S)]), look(2.0, [(13, 5 * S // 2)]), 2)
    assert window.seconds == 2.0
    assert window.rounds_per_s == pytest.approx(2.0)


def test_rates_of_workers_add_up_and_one_that_stood_still_adds_nothing():
    window = between(
        look(progress=[(0, 0), (4, S), (7, 2 * S)]),
        look(1.0, progress=[(5, S), (14, 2 * S), (7, 2 * S)]),
        2,
    )
    assert window.rates == (5.0, 10.0, 0.0)
    assert window.rounds_per_s == 15.0


def test_costs_are_by_what_was_moved():
    first, last = look(progress=[(0, 0)]), look(2.0, [(20, 2 * S)], cpu_s=1.0, faults=400)
    window = between(first, last, 2)
    round_bytes = 5 * 10**7
    assert window.gb_per_s(round_bytes) == pytest.approx(0.5)
    assert window.cpu_s_per_gb(round_bytes) == pytest.approx(1.0)
    assert window.faults_per_round == pytest.approx(20)


def test_a_window_without_a_round_costs_nothing_a_gb():
    window = between(look(), look(1.0, cpu_s=0.5), 2)
    assert (window.rounds_per_s, window.cpu_s_per_gb(8), window.faults_per_round) == (0, 0, 0)


def test_others_are_who_used_the_machine_besides_the_crew_and_the_hypervisor_is_one():
    window = between(look(), look(1.0, cpu_s=0.5, busy_s=0.9, stolen_s=0.2), 2)
    assert window.other_cpu == pytest.approx((0.4 + 0.2) / 2)
    # The two counts are taken at slightly different times: never below nothing.
    assert between(look(), look(1.0, cpu_s=0.5, busy_s=0.4), 2).other_cpu == 0


def test_a_spread_is_the_median_with_its_range():
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0, 3)
    assert Spread.of([1.0, 2.0]).median == 1.5


def test_ratios_are_those_of_neighbours():
    # Both doubled their speed in the second window: the ratio of medians would be the same, but
    # not its range.
    assert ratios([10.0, 20.0, 30.0], [20.0, 40.0, 30.0]) == Spread(0.5, 0.5, 1.0, 3)


def test_what_stood_still_is_compared_with_nothing():
    assert ratios([1.0], [0.0]) is None
    assert ratios([1.0, 4.0], [0.0, 2.0]) == Spread(2.0, 2.0, 2.0, 1)


def test_ratios_of_unequal_numbers_of_windows_are_refused():
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0, 2.0], [1.0])
