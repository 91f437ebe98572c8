import numpy as np
import pytest

from distbelief.monitor.history import DOWN, METRICS, Curves, Rows, Tier, decode, encode, extremes

T0 = 1_800_000_000


def values(num, **known):
    none = {m: np.full(num, np.nan) for m in METRICS}
    return none | {m: np.asarray(v, np.float64) for m, v in known.items()}


def test_codes_are_exact_to_a_thousandth():
    numbers = np.concatenate([[0.0], np.logspace(-6, 9, 500)])
    assert decode(encode(numbers)) == pytest.approx(numbers, rel=1e-3)
    assert np.isnan(decode(encode(np.array([np.nan, -1.0])))).all()
    assert (np.diff(encode(numbers).astype(int)) > 0).all()  # so the largest code is the largest


def test_tiers_keep_the_largest_the_sum_and_the_last():
    rows = Rows(2, (Tier(1, 10), Tier(5, 10), Tier(60, 10)))
    for i in range(10):
        lag = [float(i % 5), np.inf if i == 7 else 1.0]
        rows.add(T0 + i, values(2, lag=lag, steps=[2.0, np.nan], loss=[10.0 - i, np.nan]))
    five = rows.row(0, T0 - 30, T0 + 10, T0 + 10)
    assert five["lag"][-2:] == pytest.approx([4.0, 4.0], rel=1e-3)
    assert five["steps"][-2:] == pytest.approx([10.0, 10.0], rel=1e-3)
    assert five["loss"][-2:].tolist() == [6.0, 1.0]
    assert np.isposinf(rows.row(1, T0 - 30, T0 + 10, T0 + 10)["lag"][-1])  # down is never hidden
    assert np.isnan(rows.row(1, T0 - 30, T0 + 10, T0 + 10)["steps"][-1])


def test_a_ring_forgets_and_a_hole_is_no_value():
    rows = Rows(1, (Tier(1, 10),))
    rows.add(T0, values(1, lag=[1.0]))
    rows.add(T0 + 5, values(1, lag=[2.0]))
    lag = rows.row(0, T0, T0 + 6, T0 + 6)["lag"]
    assert np.isnan(lag[1:5]).all()
    rows.add(T0 + 12, values(1, lag=[3.0]))
    lag = rows.row(0, T0 + 3, T0 + 13, T0 + 13)["lag"]
    assert lag[[2, 9]] == pytest.approx([2.0, 3.0], rel=1e-3)
    assert np.isnan(np.delete(lag, [2, 9])).all()


def test_rows_grow_and_keep_what_was():
    rows = Rows(2)
    rows.add(T0, values(2, lag=[1.0, 2.0]))
    rows.grow(5)
    rows.add(T0 + 1, values(5, lag=[1.0, 2.0, 3.0, 4.0, 5.0], loss=[1.0] * 5))
    assert rows.row(1, T0, T0 + 2, T0 + 2)["lag"] == pytest.approx([2.0, 2.0], rel=1e-3)
    assert np.isnan(rows.row(4, T0, T0 + 2, T0 + 2)["lag"][0])
    assert np.isnan(rows.row(4, T0, T0 + 2, T0 + 2)["loss"][0])


def test_a_block_is_reduced_to_the_largest_on_a_grid_of_time():
    rows = Rows(2)
    for i in range(100):
        rows.add(T0 + i, values(2, lag=[np.inf if i == 50 else 1.0, 64.0 if i == 33 else 1.0]))
    for shift in (0, 3):
        block = rows.block("lag", T0 + shift, T0 + 100, T0 + 100).columns(10)
        assert len(block.cells) <= 10
        assert block.t0 % block.bin_s == 0
        assert (block.cells[:, 0] == DOWN).sum() == 1
        assert decode(block.cells[:, 1]).max() == pytest.approx(64, rel=1e-3)


def test_curves_keep_the_extremes_of_a_day():
    curves = Curves(["a", "b"], near_s=600, far=100)
    for i in range(1200):
        spike = 1000.0 if i == 130 else -5.0 if i == 140 else 1.0
        curves.add(T0 + i, {"a": spike, "b": None})
    now = T0 + 1200
    times, step, told = curves.read(["a", "b"], T0, now, now, 600)
    assert np.nanmax(told["a"]) == 1000
    assert np.nanmin(told["a"]) == -5
    assert step == 30
    assert (np.diff(times) > 0).all()
    assert np.isnan(told["b"]).all()
    times, _, told = curves.read(["a"], now - 500, now, now, 50)
    assert len(times) <= 50


def test_thinning_tells_both_extremes_in_order_and_a_rare_value_once():
    column = np.array([1.0, 5.0, 0.0, 2.0, np.nan, np.nan, 7.0, np.nan])[:, None]
    thin = extremes(column, 4).reshape(-1)
    assert thin[:3].tolist() == [5.0, 0.0, 7.0]
    assert np.isnan(thin[3])
