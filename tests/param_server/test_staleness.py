"""The histogram of staleness."""

import json

import pytest

from distbelief.param_server.staleness import Staleness


def seen(*values, is_steady=False):
    staleness = Staleness()
    for value in values:
        staleness.add(value, is_steady=is_steady)
    return staleness


def test_nothing_seen_has_no_mean_quantile_or_maximum():
    empty = Staleness()
    assert (empty.steady_mean, empty.quantile(0.5), empty.maximum) == (None, None, None)


@pytest.mark.parametrize(
    ("q", "value"), [(0.0, 0), (0.1, 0), (0.25, 0), (0.26, 1), (0.5, 1), (0.75, 2), (1.0, 9)]
)
def test_a_quantile_is_the_smallest_value_that_share_did_not_exceed(q, value):
    assert seen(9, 0, 2, 1).quantile(q) == value


def test_only_steady_pushes_enter_the_mean():
    staleness = seen(4, 2, is_steady=True)
    staleness.add(100)
    assert staleness.steady_mean == 3
    assert staleness.maximum == 100


def test_a_histogram_survives_json():
    staleness = seen(1, 1, 5, is_steady=True)
    assert Staleness.from_dict(json.loads(json.dumps(staleness.as_dict()))) == staleness


def test_several_histograms_are_added_and_not_changed():
    one, two = seen(1, is_steady=True), seen(1, 3)
    merged = Staleness.merged([one, two])
    assert merged.counts == {1: 2, 3: 1}
    assert (merged.steady_pushes, merged.steady_sum) == (1, 1)
    merged.add(7)
    assert one == seen(1, is_steady=True)
