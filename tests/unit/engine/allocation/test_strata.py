"""Adjusted sums: nothing changes in one epoch, drift and moving weights cancel over several."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stream_xp.engine.allocation.evidence import Conversions, Evidence, Values
from stream_xp.engine.allocation.strata import APART, added, adjusted, layout, tabled
from stream_xp.stats import Undetermined

NOTHING = Conversions(0, 0)


def rows(cells):
    """{(arm, epoch): (units, conversions)}."""
    return tabled(Evidence(arm, Conversions(*sums), epoch) for (arm, epoch), sums in cells.items())


def test_one_epoch_is_left_alone():
    got = adjusted(rows({("a", 3): (100, 7), ("b", 3): (50, 6)}), ["a", "b", "c"], nothing=NOTHING)
    assert got == {"a": Conversions(100, 7), "b": Conversions(50, 6), "c": NOTHING}


def test_drift_with_moving_weights_is_no_difference():
    # The rate doubles as the weights turn; pooled, b looks 1.5 times as good as a.
    cells = {
        ("a", 0): (900, 45),
        ("b", 0): (100, 5),
        ("a", 1): (100, 10),
        ("b", 1): (900, 90),
    }
    got = adjusted(rows(cells), ["a", "b"], nothing=NOTHING)
    assert got["a"].mean == pytest.approx(got["b"].mean)
    assert got["a"].mean == pytest.approx(0.075)
    # Two epochs with 90 units' worth of a comparison each: 1 / (1/900 + 1/100) twice.
    assert 1 / got["a"].units + 1 / got["b"].units == pytest.approx(1 / 180)


def test_it_is_the_least_squares_fit_over_units():
    """Against ordinary least squares with dummies, the way a textbook writes it."""
    rng = np.random.default_rng(5)
    n = rng.integers(1, 400, (4, 5)).astype(float)
    n[2, 1] = n[3, 0] = 0
    y = rng.random((4, 5))
    arms, epochs = np.indices(n.shape)
    design = np.column_stack(
        [(arms.ravel() == a) * 1.0 for a in range(4)] + [(epochs.ravel() == e) * 1.0 for e in range(1, 5)]
    )
    root = np.sqrt(n.ravel())
    beta = np.linalg.lstsq(design * root[:, None], y.ravel() * root, rcond=None)[0]
    covariance = np.linalg.pinv(design.T @ (design * n.ravel()[:, None]))[:4, :4]
    got = layout(n, y)
    assert np.diff(got.effects) == pytest.approx(np.diff(beta[:4]))
    contrast = np.array([1.0, -1.0, 0.0, 0.0])
    assert contrast @ got.covariance @ contrast == pytest.approx(contrast @ covariance @ contrast)


def test_effective_units_give_the_differences_their_variance():
    rng = np.random.default_rng(6)
    for arms in (2, 3, 5):
        n = rng.integers(20, 900, (arms, 4)).astype(float)
        cells = {(str(a), e): (n[a, e], 0.1 * n[a, e]) for a in range(arms) for e in range(4)}
        names = [str(a) for a in range(arms)]
        got = adjusted(rows(cells), names, nothing=NOTHING)
        fit = layout(n, np.zeros_like(n))
        for a in range(arms):
            assert got[str(a)].units <= n[a].sum() * (1 + 1e-12)
            for b in range(a):
                contrast = np.zeros(arms)
                contrast[[a, b]] = 1.0, -1.0
                exact = contrast @ fit.covariance @ contrast
                independent = 1 / got[str(a)].units + 1 / got[str(b)].units
                assert independent == pytest.approx(exact, rel=1e-9 if arms == 2 else 0.25)


def test_an_epoch_of_one_arm_says_nothing():
    cells = {("a", 0): (100, 10), ("b", 0): (100, 12), ("a", 1): (5000, 4000)}
    got = adjusted(rows(cells), ["a", "b"], nothing=NOTHING)
    assert got == {"a": Conversions(100, 10), "b": Conversions(100, 12)}


def test_alone_an_arm_keeps_its_sums():
    got = adjusted(rows({("a", 0): (10, 1), ("a", 1): (20, 3)}), ["a"], nothing=NOTHING)
    assert got == {"a": Conversions(30, 4)}


def test_arms_that_never_met_are_not_compared():
    cells = dict.fromkeys([("a", 0), ("b", 0), ("c", 1), ("d", 1)], (10, 1))
    assert adjusted(rows(cells), list("abcd"), nothing=NOTHING) == Undetermined(APART)


def test_arms_of_one_and_of_a_billion_units():
    cells = {("a", 0): (10**9, 10**8), ("b", 0): (2, 1), ("a", 1): (10**9, 2 * 10**8), ("b", 1): (1, 0)}
    got = adjusted(rows(cells), ["a", "b"], nothing=NOTHING)
    assert got["b"].units == pytest.approx(3.0, rel=1e-6)
    assert got["b"].mean - got["a"].mean == pytest.approx((2 * 0.5 + 0.0 - 2 * 0.1 - 0.2) / 3, rel=1e-6)


def test_values_keep_the_variance_inside_their_cells():
    def cell(arm, epoch, *numbers):
        return Evidence(arm, Values(len(numbers), sum(numbers), sum(v * v for v in numbers), 0.5), epoch)

    table = tabled([cell("a", 0, 1, 3), cell("b", 0, 2, 4), cell("a", 1, 101, 103), cell("b", 1, 102, 104)])
    got = adjusted(table, ["a", "b"], nothing=Values(0, 0, 0, 0.5))
    assert got["b"].mean - got["a"].mean == pytest.approx(0.5)
    # Two units with a sum of squares of 2 steps in each cell: variance 2 steps, 0.5 in metric units.
    assert got["a"].spread / (got["a"].units - 1) == pytest.approx(0.5)


def test_rows_of_one_cell_add_up():
    table = tabled([Evidence("a", Conversions(1, 1)), Evidence("a", Conversions(4, 2))])
    assert table == {"a": {0: Conversions(5, 3)}}
    assert added(Values(1, 2, 4), Values(1, 3, 9)) == Values(2, 5, 13)
    for other in (Conversions(1, 0), Values(1, 2, 4, 0.5)):
        with pytest.raises(ValueError, match="one kind and step"):
            added(Values(1, 2, 4), other)


@pytest.mark.parametrize("drift", [0.0, 2.0], ids=["level", "drifting"])
def test_adjusted_means_are_unbiased_where_pooled_ones_err(drift):
    """Two equal arms, weights 0.9/0.1 that turn to 0.1/0.9; the baseline grows by `drift` standard deviations."""
    rng = np.random.default_rng(8)
    gaps, pooled, variances = [], [], []
    for _ in range(400):
        evidence = []
        for epoch in range(5):
            share = 0.9 - 0.2 * epoch
            for arm, n in (("a", round(100 * share)), ("b", round(100 * (1 - share)))):
                y = rng.normal(drift * epoch / 4, 1.0, n)
                evidence.append(Evidence(arm, Values(n, float(y.sum()), float(y @ y)), epoch))
        table = tabled(evidence)
        got = adjusted(table, ["a", "b"], nothing=Values(0, 0, 0))
        gaps.append(got["b"].mean - got["a"].mean)
        variances.append(1 / got["a"].units + 1 / got["b"].units)
        raw = [np.array([(s.total, s.units) for s in table[arm].values()]).sum(axis=0) for arm in "ab"]
        pooled.append(raw[1][0] / raw[1][1] - raw[0][0] / raw[0][1])
    error = np.std(gaps) / math.sqrt(400)
    assert abs(np.mean(gaps)) <= 4 * error
    assert np.var(gaps) == pytest.approx(np.mean(variances), rel=0.3)
    assert (abs(np.mean(pooled)) > 10 * error) == (drift > 0)
