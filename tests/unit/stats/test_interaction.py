from __future__ import annotations

import math

import numpy as np
import pytest

from stream_xp.stats import Moments, Stratum, mean_difference, summarise, tuned_rho2
from stream_xp.stats.batch import CODES, MomentArrays
from stream_xp.stats.interaction import any_interaction_log_e, interaction, interaction_means
from stream_xp.stats.mean_difference import NO_VARIANCE, TOO_FEW_UNITS

ALPHA, PLANNED = 0.05, 4000
RHO2 = tuned_rho2(float(PLANNED), ALPHA)


def table(y, first, second, arms=(2, 2), strata=None):
    """The exact sums of units by arm of either experiment and stratum."""
    strata = np.zeros(len(y), dtype=int) if strata is None else strata
    shape = (*arms, strata.max() + 1)
    n, s, q = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    for column, value in ((n, 1), (s, y), (q, y * y)):
        np.add.at(column, (first, second, strata), value)
    return MomentArrays(n, s, q)


def drawn(units=400, seed=7):
    rng = np.random.default_rng(seed)
    a, b = rng.random(units) < 0.3, rng.random(units) < 0.5
    return rng.integers(0, 9, units) + 2 * a + b * 3 + a * b * 1, a.astype(int), b.astype(int)


def test_a_regression_with_interaction():
    # statsmodels 0.15.0 on numpy 2.4: OLS(y, [1, a, b, a*b]).fit() and .fit(cov_type="HC2"), coefficient of a*b.
    y, a, b = drawn()
    got = interaction_means(table(y, a, b), scale=1.0, guard=False)
    assert float(got.estimate[0, 0]) == pytest.approx(2.262373006674795, rel=1e-9)
    assert math.sqrt(got.variance[0, 0]) == pytest.approx(0.5418561847496769, rel=1e-9)
    # The classic standard error has one variance for all cells.
    cells = [y[(a == i) & (b == j)] for i in (0, 1) for j in (0, 1)]
    common = sum(((c - c.mean()) ** 2).sum() for c in cells) / (len(y) - 4)
    assert math.sqrt(common * sum(1 / len(c) for c in cells)) == pytest.approx(0.56372048479816, rel=1e-9)


def test_it_is_the_difference_of_two_differences():
    y, a, b = drawn()
    got = interaction_means(table(y, a, b), scale=0.5, guard=False)
    parts = []
    for arm in (0, 1):
        moments = [Moments.from_values(y[(a == arm) & (b == j)].tolist()) for j in (0, 1)]
        parts.append(summarise([Stratum(*moments)], scale=0.5, guard=False))
    effects = [part.treatment_mean - part.control_mean for part in parts]
    assert float(got.estimate[0, 0]) == pytest.approx(effects[1] - effects[0], rel=1e-12)
    total = sum(part.control_variance + part.treatment_variance for part in parts)
    assert float(got.variance[0, 0]) == pytest.approx(total, rel=1e-12)
    assert got.n.tolist() == [[400.0]]


def test_roles_and_order_do_not_matter():
    rng = np.random.default_rng(3)
    a, b, e = rng.integers(0, 3, 3000), rng.integers(0, 2, 3000), rng.integers(0, 2, 3000)
    y = rng.integers(0, 20, 3000) + a * b
    cells = table(y, a, b, (3, 2), e)
    got = interaction_means(cells, scale=1.0)
    turned = MomentArrays(*(np.swapaxes(c, 0, 1) for c in (cells.n, cells.s, cells.q)))
    assert got.estimate.shape == (2, 1)
    other = interaction_means(turned, scale=1.0)
    assert other.estimate == pytest.approx(got.estimate.T, rel=1e-12)
    assert other.variance == pytest.approx(got.variance.T, rel=1e-12)
    backward = MomentArrays(*(c[..., ::-1] for c in (cells.n, cells.s, cells.q)))
    assert interaction_means(backward, scale=1.0).estimate == pytest.approx(got.estimate, rel=1e-14)
    batch = MomentArrays(*(np.stack([c, c]) for c in (cells.n, cells.s, cells.q)))
    assert (interaction_means(batch, scale=[1.0, 2.0]).estimate[1] == 2 * got.estimate).all()


def test_an_arm_that_does_nothing_gives_the_plain_difference():
    """With the outcome constant in the first experiment's control, the contrast is that of its treatment alone."""
    rng = np.random.default_rng(5)
    y, b = rng.integers(0, 9, 400), rng.integers(0, 2, 400)
    moments = [Moments.from_values(y[b == j].tolist()) for j in (0, 1)]
    cells = [[Moments.from_values([4] * 200)] * 2, moments]
    columns = [[[[getattr(m, name)] for m in row] for row in cells] for name in ("n", "s", "q")]
    got = interaction_means(MomentArrays(*columns), scale=1.0, guard=False)
    evidence = interaction(got, alpha=ALPHA, rho2=RHO2)
    plain = mean_difference(summarise([Stratum(*moments)], scale=1.0, guard=False), alpha=ALPHA, rho2=RHO2)
    assert float(evidence.estimate[0, 0]) == pytest.approx(plain.estimate, rel=1e-12)
    assert float(got.variance[0, 0]) == pytest.approx(sum(m.variance(1.0) / m.n for m in moments), rel=1e-12)


def test_strata_are_not_pooled():
    """A metric that drifts while both experiments ramp up looks like an interaction once strata are added."""
    rng = np.random.default_rng(1)
    shares = [(0.9, 0.9), (0.5, 0.1)]
    first, second, stratum, y = [], [], [], []
    for e, (one, two) in enumerate(shares):
        first.append((rng.random(20_000) > one).astype(int))
        second.append((rng.random(20_000) > two).astype(int))
        stratum.append(np.full(20_000, e))
        y.append((rng.random(20_000) < (0.1, 0.4)[e]).astype(int))
    columns = [np.concatenate(c) for c in (y, first, second, stratum)]
    right = interaction(
        interaction_means(table(*columns[:3], strata=columns[3]), scale=1.0), alpha=ALPHA, rho2=RHO2
    )
    wrong = interaction(interaction_means(table(*columns[:3]), scale=1.0), alpha=ALPHA, rho2=RHO2)
    assert right.log_e[0, 0] < 1
    assert wrong.log_e[0, 0] > 4


@pytest.mark.parametrize("guard", [True, False])
def test_variances_over_strata_are_those_of_stratified_means(variance_of_mean, guard):
    rng = np.random.default_rng(9)
    e = rng.choice(3, 3000, p=[0.6, 0.3, 0.1])
    a, b = (rng.random(3000) < 0.1 + 0.2 * e).astype(int), (rng.random(3000) < 0.5).astype(int)
    y = rng.poisson(3.0 * (1 + e) * (1 + a))
    got = interaction_means(table(y, a, b, strata=e), scale=1.0, guard=guard)
    squares = [((y[e == k] - y[e == k].mean()) ** 2).sum() for k in range(3)]
    sizes, total, estimate = np.bincount(e), 0.0, 0.0
    for i, j, sign in ((0, 0, 1), (0, 1, -1), (1, 0, -1), (1, 1, 1)):
        parts = [y[(a == i) & (b == j) & (e == k)] for k in range(3)]
        n, own = [len(p) for p in parts], [((p - p.mean()) ** 2).sum() for p in parts]
        degrees = sum(n) - 3
        unit = sum(own) / degrees
        if guard:
            unit = max(unit, (degrees * unit + 200 * sum(squares) / (3000 - 3)) / (degrees + 200))
        total += variance_of_mean(n, sizes, own=own, both=squares, unit=unit, guard=guard)
        estimate += sign * sizes @ [p.mean() for p in parts] / 3000
    assert float(got.variance[0, 0]) == pytest.approx(total, rel=1e-10)
    assert float(got.estimate[0, 0]) == pytest.approx(estimate, rel=1e-10)


def test_duality_and_undetermined_cells():
    y, a, b = drawn(2000)
    evidence = interaction(interaction_means(table(y, a, b), scale=1.0), alpha=ALPHA, rho2=RHO2)
    rejects = not evidence.lower[0, 0] < 0 < evidence.upper[0, 0]
    assert rejects == (evidence.log_e[0, 0] >= -math.log(ALPHA))
    few = interaction_means(table(y[:80], a[:80], b[:80]), scale=1.0)
    assert few.reason[0, 0] == CODES[TOO_FEW_UNITS]
    nothing = interaction(few, alpha=ALPHA, rho2=RHO2)
    assert (nothing.log_e[0, 0], nothing.lower[0, 0], nothing.upper[0, 0]) == (0, -math.inf, math.inf)
    same = interaction_means(table(np.ones(2000, dtype=int), a, b), scale=1.0)
    assert same.reason[0, 0] == CODES[NO_VARIANCE]
    assert any_interaction_log_e(evidence) == pytest.approx(float(evidence.log_e[0, 0]))


def test_large_sums_stay_exact():
    rng = np.random.default_rng(6)
    y, far = rng.integers(0, 9, (2, 2, 60)), 2**70
    cells = [[Moments.from_values([far + v for v in y[i, j].tolist()]) for j in (0, 1)] for i in (0, 1)]
    columns = [[[[getattr(m, name)] for m in row] for row in cells] for name in ("n", "s", "q")]
    got = interaction_means(MomentArrays(*columns), scale=1.0, guard=False)
    assert float(got.variance[0, 0]) == pytest.approx(y.var(axis=-1, ddof=1).sum() / 60, rel=1e-12)
    # The largest that int64 may hold: the sum over four cells must not overflow.
    most = MomentArrays(*(np.full((2, 2, 1), v, dtype=np.int64) for v in (40, 0, 2**61 - 1)))
    assert interaction_means(most, scale=1.0).variance[0, 0] > 0


# ---- error rate and power -----------------------------------------------------------------------------


def running(rates, share, *, paths, units, looks=40, seed=1):
    """Evidence of many paths of conversions at each look, (paths, looks): cells of two crossed experiments."""
    rng = np.random.default_rng(seed)
    chances = np.outer([1 - share, share], [0.5, 0.5])
    step = units // looks
    n = rng.multinomial(step, chances.ravel(), (paths, looks)).reshape(paths, looks, 2, 2)
    s = rng.binomial(n, rates).cumsum(axis=1)[..., np.newaxis]
    cells = MomentArrays(n.cumsum(axis=1)[..., np.newaxis], s, s)
    rho2 = tuned_rho2(float(units), ALPHA)
    return interaction(interaction_means(cells, scale=1.0), alpha=ALPHA, rho2=rho2)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_main_effects_are_no_interaction(share):
    rates = np.array([[0.02, 0.03], [0.04, 0.05]])
    found = running(rates, share, paths=1000, units=8000)
    errs = (found.log_e >= -math.log(ALPHA)).any(axis=1).mean()
    assert errs <= 0.04  # 0.007 and 0.009 in 2,000 paths, Monte Carlo error 0.002
    covers = ((found.lower <= 0) & (found.upper >= 0)).all()
    assert covers == (errs == 0)


def test_an_interaction_is_found():
    found = running(np.array([[0.2, 0.2], [0.2, 0.26]]), 0.5, paths=300, units=12_000)
    assert (found.log_e >= -math.log(ALPHA)).any(axis=1).mean() > 0.8  # 0.87 in 500 paths
    assert found.estimate[:, -1].mean() == pytest.approx(0.06, abs=0.003)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda c: interaction_means(MomentArrays(c.n[0], c.s[0], c.q[0]), scale=1.0),
            "cells must have the shape",
        ),
        (
            lambda c: interaction_means(MomentArrays(c.n[:1], c.s[:1], c.q[:1]), scale=1.0),
            "cells must have the shape",
        ),
        (lambda c: interaction_means(c, scale=0.0), "scale must"),
        (lambda c: interaction(interaction_means(c, scale=1.0), alpha=0.0, rho2=1.0), "alpha must lie"),
        (lambda c: interaction(interaction_means(c, scale=1.0), alpha=0.1, rho2=0.0), "rho2 must be"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(table(*drawn()))
