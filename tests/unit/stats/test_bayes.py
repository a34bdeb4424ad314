from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from stream_xp.stats.bayes import (
    NO_EFFECT,
    TOO_FEW_EXPERIMENTS,
    best_arm,
    decision_errors,
    expected_losses,
    learned_prior,
    posterior,
    prob_better,
    shrunk_effect,
)
from stream_xp.stats.normal_mixture import Undetermined

FINITE = st.floats(-1e3, 1e3)


def test_posterior_by_hand():
    got = posterior(2.0, 1.0, prior_mean=0.0, prior_variance=3.0)
    assert got.mean == pytest.approx(1.5)
    assert got.sd == pytest.approx(math.sqrt(0.75))
    z = 1.5 / math.sqrt(0.75)
    assert got.prob_better == pytest.approx(float(mpmath.ncdf(z)))
    density, cdf = float(mpmath.npdf(z)), float(mpmath.ncdf(-z))
    assert got.loss_ship == pytest.approx(got.sd * density - got.mean * cdf)
    assert got.loss_keep == pytest.approx(got.sd * density + got.mean * (1 - cdf))


@settings(deadline=None)
@given(FINITE, st.floats(1e-6, 1e6), FINITE, st.floats(1e-6, 1e6))
def test_precisions_add_and_losses_differ_by_the_mean(estimate, variance, mean, tau2):
    got = posterior(estimate, variance, prior_mean=mean, prior_variance=tau2)
    precision = 1 / variance + 1 / tau2
    size = (abs(estimate) / variance + abs(mean) / tau2) / precision
    assert got.sd**2 == pytest.approx(1 / precision)
    expected = (estimate / variance + mean / tau2) / precision
    assert got.mean == pytest.approx(expected, abs=1e-12 * size + 1e-300)
    assert got.loss_keep - got.loss_ship == pytest.approx(got.mean, abs=1e-12 * (abs(got.mean) + got.sd))
    assert min(got.loss_keep, got.loss_ship) >= 0


def test_flat_and_point_priors():
    flat = posterior(1.0, 4.0, prior_variance=math.inf)
    assert (flat.mean, flat.sd) == (1.0, 2.0)
    point = posterior(1.0, 4.0, prior_mean=-2.0, prior_variance=0.0)
    assert (point.mean, point.sd, point.prob_better, point.loss_ship, point.loss_keep) == (-2, 0, 0, 2, 0)
    assert posterior(1.0, 4.0, prior_variance=0.0).prob_better == 0.5
    tiny = posterior(1.0, 4.0, prior_mean=3.0, prior_variance=1e-320)
    assert tiny.mean == pytest.approx(3.0)


@pytest.mark.parametrize("z", [0.0, 1e-8, 0.7, 4.999, 5.001, 12.0, 37.0])
def test_losses_keep_their_digits(z):
    with mpmath.workdps(80):
        x = mpmath.mpf(z)
        expected = mpmath.npdf(x) - x * mpmath.erfc(x / mpmath.sqrt(2)) / 2
    ship, keep = expected_losses(2.0 * z, 2.0)
    assert ship == pytest.approx(2 * float(expected), rel=3e-13)
    assert keep == pytest.approx(2 * z + 2 * float(expected), rel=1e-14)
    assert expected_losses(-2.0 * z, 2.0) == (keep, ship)


def test_extremes_stay_finite():
    for z in (1e4, 1e150, 1e308):
        assert expected_losses(z, 1.0) == (0.0, z)
        assert prob_better(-z, 1.0) == 0.0
    assert prob_better(1e308, 1e-308) == 1.0
    grid = posterior(np.linspace(-1e4, 1e4, 5), np.array([[1e-12], [1.0]]), prior_variance=1.0)
    assert grid.mean.shape == grid.loss_ship.shape == grid.prob_better.shape == (2, 5)
    assert np.isfinite(grid.loss_keep).all()


def test_learned_prior_by_hand():
    y, v = np.array([0.1, -0.05, 0.02, 0.2]), np.array([0.001, 0.002, 0.004, 0.001])
    w = 1 / v
    mean = (w * y).sum() / w.sum()
    q = (w * (y - mean) ** 2).sum()
    tau2 = (q - 3) / (w.sum() - (w**2).sum() / w.sum())
    got = learned_prior(y, v)
    random = 1 / (v + tau2)
    assert got.variance == pytest.approx(tau2)
    assert got.heterogeneity == pytest.approx(q)
    assert got.mean == pytest.approx((random * y).sum() / random.sum())
    assert got.mean_variance == pytest.approx(1 / random.sum())
    assert got.experiments == 4
    assert got.shrinkage(tau2) == pytest.approx(0.5)
    assert got.shrinkage(np.array([tau2, 3 * tau2])) == pytest.approx([0.5, 0.25])


def test_no_spread_beyond_the_errors_is_a_point_prior():
    got = learned_prior([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    assert got.variance == 0
    assert shrunk_effect(5.0, 1.0, prior=got).mean == 1.0
    assert learned_prior([1.0], [1.0]) == Undetermined(TOO_FEW_EXPERIMENTS)


def test_prior_is_recovered_and_covers():
    rng = np.random.default_rng(5)
    effects = rng.normal(0.01, 0.03, 4000)
    variances = rng.uniform(2e-4, 2e-3, 4000)
    estimates = effects + rng.standard_normal(4000) * np.sqrt(variances)
    prior = learned_prior(estimates, variances)
    assert math.sqrt(prior.variance) == pytest.approx(0.03, abs=0.002)
    assert prior.mean == pytest.approx(0.01, abs=0.002)
    covered = [
        (s := shrunk_effect(y, v, prior=prior)).lower <= m <= s.upper
        for y, v, m in zip(estimates[:800], variances[:800], effects[:800], strict=True)
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.03)


def brute_errors(variance, z, mean, tau2, sides):
    """Everything from the two-dimensional integral, over the true effect."""
    edge, sd = z * math.sqrt(variance), math.sqrt(variance)
    with mpmath.workdps(15):
        points = sorted({0.0, mean, *(mean + k * math.sqrt(tau2) for k in (-14, -5, -1, 1, 5, 14))})

        def integral(f):
            return mpmath.quad(lambda m: f(m) * mpmath.npdf(m, mean, math.sqrt(tau2)), points)

        def up(m):
            return mpmath.ncdf((m - edge) / sd)

        def down(m):
            return mpmath.ncdf((-m - edge) / sd) if sides == 2 else 0

        def size(m):
            high, low = (edge - m) / sd, (-edge - m) / sd
            total = m * up(m) + sd * mpmath.npdf(high)
            return total + (-m * down(m) + sd * mpmath.npdf(low) if sides == 2 else 0)

        fires = integral(lambda m: up(m) + down(m))
        wrong = integral(lambda m: up(m) if m < 0 else down(m)) / fires
        estimate = integral(size) / fires
        truth = integral(lambda m: abs(m) * (up(m) + down(m))) / fires
        effect = integral(lambda m: m * (up(m) - down(m))) / fires
    return [float(v) for v in (mpmath.log(fires), wrong, estimate / truth, estimate, effect)]


@pytest.mark.parametrize(
    ("variance", "z", "mean", "tau2", "sides"),
    [
        (1.0, 1.96, 0.0, 0.25, 2),
        (1.0, 3.0, 0.5, 4.0, 1),
        (1.0, 2.0, -1.0, 1.0, 2),
        (1e-4, 2.0, -0.3, 1.0, 1),
        (0.5, 0.0, 2.0, 0.5, 1),
    ],
)
def test_decision_errors_are_the_integrals(variance, z, mean, tau2, sides):
    got = decision_errors(variance, z=z, prior_mean=mean, prior_variance=tau2, sides=sides)
    expected = brute_errors(variance, z, mean, tau2, sides)
    values = [got.log_fires, got.type_s, got.type_m, got.mean_estimate, got.mean_effect]
    assert values == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_decision_errors_of_known_and_extreme_priors():
    point = decision_errors(1.0, z=2.0, prior_mean=0.3, prior_variance=0.0)
    up, down = (float(mpmath.ncdf(v)) for v in (0.3 - 2, -0.3 - 2))
    assert point.type_s == pytest.approx(down / (up + down))
    assert point.mean_effect == pytest.approx(0.3 * (up - down) / (up + down))
    assert decision_errors(1.0, z=2.0, prior_variance=0.0) == Undetermined(NO_EFFECT)
    far = decision_errors(1.0, z=1e4, prior_variance=1e-6)
    assert math.isfinite(far.log_fires)
    assert far.type_s == pytest.approx(float(mpmath.ncdf(-1e4 * 1e-3)), rel=1e-3)


def test_best_of_two_is_the_difference():
    got = best_arm([0.3, 0.0], [1.0, 0.5])
    sd = math.sqrt(1.25)
    assert got.prob_best == pytest.approx([prob_better(0.3, sd), prob_better(-0.3, sd)], abs=1e-12)
    ship, keep = expected_losses(0.3, sd)
    assert got.expected_loss == pytest.approx([ship, keep], abs=1e-12)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(0.01, 10)), min_size=1, max_size=6))
def test_best_arm_is_the_integral(arms):
    means, sds = zip(*arms, strict=True)
    got = best_arm(means, sds)
    assert got.prob_best.sum() == pytest.approx(1.0)
    x = np.linspace(-100, 100, 100_001)
    below = np.array([ndtr((x - m) / s) for m, s in arms])
    for a, (m, s) in enumerate(arms):
        others = np.prod(np.delete(below, a, axis=0), axis=0)
        density = np.exp(-0.5 * ((x - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
        assert got.prob_best[a] == pytest.approx(np.trapezoid(density * others, x), abs=2e-6)
        assert got.expected_loss[a] == pytest.approx(np.trapezoid(below[a] * (1 - others), x), abs=1e-6)


def test_best_arm_batches_and_extremes():
    means = np.array([[0.0, 1e4, 0.0], [1.0, 1.0, 1.0]])
    got = best_arm(means, np.array([[1e-3, 1.0, 1e3], [1.0, 1.0, 1.0]]))
    assert got.prob_best.shape == (2, 3)
    assert got.prob_best[0] == pytest.approx([0, 1, 0], abs=1e-9)
    assert got.prob_best[1] == pytest.approx([1 / 3] * 3, abs=1e-12)
    assert best_arm([3.0], [2.0]).prob_best.tolist() == [1.0]
    assert best_arm([3.0], [2.0]).expected_loss[0] == pytest.approx(0.0, abs=1e-15)


PRIOR = learned_prior([0.0, 1.0], [0.1, 0.1])


def test_best_arm_far_apart_is_finite():
    got = best_arm([0.0, 1e300], [1e-5, 1e-5])
    assert got.prob_best.tolist() == [0.0, 1.0]
    assert np.isfinite(got.expected_loss).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: posterior(1.0, 0.0, prior_variance=1.0), "variance must be greater than 0"),
        (lambda: posterior(math.nan, 1.0, prior_variance=1.0), "estimate must be finite"),
        (lambda: posterior(1.0, 1.0, prior_variance=-1.0), "prior_variance must not be negative"),
        (lambda: posterior(1.0, 1.0, prior_variance=math.nan), "prior_variance must not be negative"),
        (lambda: posterior(1.0, 1.0, prior_mean=math.inf, prior_variance=1.0), "prior_mean must be finite"),
        (lambda: prob_better(1.0, -1.0), "sd must not be negative"),
        (lambda: expected_losses(math.inf, 1.0), "mean must be finite"),
        (lambda: learned_prior([1.0, 2.0], [1.0]), "variances must have the shape"),
        (lambda: learned_prior([1.0, 2.0], [1.0, 0.0]), "variances must be greater than 0"),
        (lambda: learned_prior([1e200, 2.0], [1.0, 1.0]), "estimates and variances must lie within"),
        (lambda: shrunk_effect(1.0, 1.0, prior=PRIOR, mass=1.0), "mass must lie strictly between 0 and 1"),
        (lambda: decision_errors(1.0, z=-1.0, prior_variance=1.0), "z must not be negative"),
        (lambda: decision_errors(1.0, z=1.0, prior_variance=-1.0), "prior_variance must not be negative"),
        (lambda: decision_errors(1.0, z=1.0, prior_variance=1.0, sides=3), "sides must be 1 or 2"),
        (lambda: best_arm([], []), "sds must have the shape"),
        (lambda: best_arm([1.0, 2.0], [1.0]), "sds must have the shape"),
        (lambda: best_arm([1.0], [0.0]), "sds must be greater than 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
