"""Factors against values worked out by hand."""

import pytest

from distbelief.param_server.schedule import Schedule
from tests.param_server.jobs import make_contract


@pytest.mark.parametrize(
    ("schedule", "samples", "factor"),
    [
        (Schedule(), 0, 1.0),
        (Schedule(), 10**9, 1.0),
        (Schedule(kind="step", every=10, gamma=0.5), 0, 1.0),
        (Schedule(kind="step", every=10, gamma=0.5), 9, 1.0),
        (Schedule(kind="step", every=10, gamma=0.5), 10, 0.5),
        (Schedule(kind="step", every=10, gamma=0.5), 35, 0.125),
        (Schedule(kind="poly", total=100), 0, 1.0),
        (Schedule(kind="poly", total=100), 25, 0.75),
        (Schedule(kind="poly", total=100, power=0.5), 75, 0.5),
        (Schedule(kind="poly", total=100, power=2.0), 50, 0.25),
        (Schedule(kind="poly", total=100), 100, 0.0),
        (Schedule(kind="poly", total=100), 1000, 0.0),
        (Schedule(kind="cosine", total=100), 0, 1.0),
        (Schedule(kind="cosine", total=100), 50, 0.5),
        (Schedule(kind="cosine", total=90), 30, 0.75),
        (Schedule(kind="cosine", total=100), 100, 0.0),
        (Schedule(kind="cosine", total=100), 1000, 0.0),
        (Schedule(warmup=4), 0, 0.2),
        (Schedule(warmup=4), 3, 0.8),
        (Schedule(warmup=4), 4, 1.0),
        (Schedule(kind="step", every=2, gamma=0.5, warmup=3), 2, 0.375),
    ],
)
def test_factor(schedule, samples, factor):
    assert schedule.factor(samples) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "exponential"}, "exponential.* is none of constant, step"),
        ({"kind": "step"}, "every=0"),
        ({"kind": "step", "every": 10, "gamma": 0.0}, "gamma=0.0"),
        ({"kind": "step", "every": 10, "gamma": 1.5}, "gamma=1.5"),
        ({"kind": "step", "every": float("nan"), "gamma": 0.5}, "every=nan"),
        ({"kind": "cosine", "total": -1}, "total must be at least 0, got -1"),
        ({"kind": "cosine", "total": float("nan")}, "total .* got nan"),
        ({"power": -1.0}, "power .* got -1.0"),
        ({"power": float("nan")}, "power .* got nan"),
        ({"warmup": -1}, "warmup .* got -1"),
        ({"warmup": float("nan")}, "warmup .* got nan"),
    ],
    ids=str,
)
def test_an_impossible_schedule_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        Schedule(**fields)


@pytest.mark.parametrize("kind", ["poly", "cosine"])
def test_a_contract_needs_the_length_of_the_run_that_a_schedule_may_leave_open(kind):
    with pytest.raises(ValueError, match="needs its total"):
        make_contract(schedule=Schedule(kind=kind))
