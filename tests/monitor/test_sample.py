import numpy as np
import pytest

from distbelief.monitor.sample import (
    FEW,
    MeterBook,
    PushSample,
    StaleWindow,
    histogram,
    mean,
    medians,
    quantiles,
    spearman,
)


def test_the_window_counts_what_was_applied_and_forgets():
    window = StaleWindow()
    window.add(100, (0, 3, 5000), (2, 5, 1))
    window.add(130, (3,), (2,))
    counts = window.counts(130.0)
    assert counts.sum() == 10
    assert quantiles(counts, (0.1, 0.5, 0.9)) == [0, 3, 3]
    assert quantiles(counts, (1.0,))[0] == pytest.approx(5000, rel=0.01)
    assert mean(window.counts(170.0)) == 3.0
    assert quantiles(window.counts(400.0), (0.5,)) == [None]
    assert mean(window.counts(400.0)) is None


def test_bins_of_the_histogram_grow_by_quarter_octaves_and_hold_everything():
    window = StaleWindow()
    window.add(1, tuple(range(200)), (1,) * 200)
    edges, counts = histogram(window.counts(1.0))
    assert edges[:4] == [0.0, 1.0, 2.0, 3.0]
    assert edges == sorted(set(edges))
    assert counts[0] == 1  # zeros have a bin of their own
    assert sum(counts) == 200


def test_hot_pushes_are_kept_and_of_the_others_a_fair_sample():
    sample = PushSample()
    for part in range(10):
        lag = np.arange(part * 1000, part * 1000 + 1000, dtype=np.float64)
        rows = np.zeros(1000, np.int64)
        sample.add(5, rows, lag, lag, lag, lag == 2222)
    items = sample.window(5.0, 10.0, 60)
    assert 2222 in items[:, 1]
    items = sample.window(5.0, 10.0, 1000)
    assert len(items) == 101
    assert 3000 < items[:, 1].mean() < 7000
    assert len(sample.window(400.0, 10.0, 1000)) == 0


def test_spearman_knows_order_and_ties():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(x, x**3) == pytest.approx(1.0)
    assert spearman(x, -x) == pytest.approx(-1.0)
    assert spearman(x, np.ones(4)) is None
    assert spearman(x[:2], x[:2]) is None
    assert spearman(x, np.array([1.0, 1.0, 2.0, 2.0])) == pytest.approx(0.894, abs=1e-3)


def test_medians_are_by_bin_of_lag():
    lag, value = medians(np.array([0.0, 0.0, 100.0, 101.0]), np.array([1.0, 3.0, 8.0, 10.0]))
    assert lag == [0.0, 100.5]
    assert value == [2.0, 9.0]
    assert medians(np.zeros(0), np.zeros(0)) == ([], [])


@pytest.mark.parametrize(("cosine", "verdict"), [(0.95, "fine"), (0.5, "some"), (0.1, "hurts")])
def test_the_meter_says_whether_staleness_hurts(cosine, verdict):
    book = MeterBook()
    assert book.verdict()[0] == "few"
    for i in range(FEW):
        book.add(float(i), float(i), cosine, 0.0, cosine)
    assert book.verdict()[0] == verdict
    bins = book.bins()
    assert bins["staleness"] == sorted(bins["staleness"])
    assert sum(bins["n"]) == FEW
