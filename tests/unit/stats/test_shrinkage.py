from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from stream_xp.stats.bayes import learned_prior
from stream_xp.stats.shrinkage import between_variance, shrink_groups

# Gelman et al. (2013), table 5.2: coaching in eight schools.
SCHOOLS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]), np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
# BCG vaccine trials, log relative risks and their variances (metafor dat.bcg through escalc, four digits).
BCG = np.array(
    [(-0.8893, 0.3256), (-1.5854, 0.1946), (-1.3481, 0.4154), (-1.4416, 0.0200), (-0.2175, 0.0512),
     (-0.7861, 0.0069), (-1.6209, 0.2230), (0.0120, 0.0040), (-0.4694, 0.0564), (-1.3713, 0.0730),
     (-0.3394, 0.0124), (0.4459, 0.5325), (-0.0173, 0.0714)]
).T  # fmt: skip


def restricted(y, v, tau2):
    """Restricted log likelihood, as the likelihood with the mean integrated out."""
    w = 1 / (v + tau2)
    mu = (w * y).sum() / w.sum()
    return -0.5 * (np.log(v + tau2).sum() + math.log(w.sum()) + (w * (y - mu) ** 2).sum())


def test_reml_of_the_documented_trials():
    # metafor 4, rma(yi, vi, data=dat, method="REML"): tau^2 0.3132, estimate -0.7145, se 0.1798.
    got = between_variance(BCG[0], np.sqrt(BCG[1]))
    assert float(got.tau2) == pytest.approx(0.3132, abs=1e-4)
    assert float(got.mean) == pytest.approx(-0.7145, abs=1e-4)
    assert float(got.mean_sd) == pytest.approx(0.1798, abs=1e-4)
    assert got.groups == 13


def test_equal_errors_give_the_moment_estimates():
    # statsmodels 0.15.0, combine_effects([.12, -.05, .2, .04, .31], [.01] * 5, method_re="chi2").
    y, s = [0.12, -0.05, 0.2, 0.04, 0.31], [0.1] * 5
    got = between_variance(y, s)
    assert float(got.tau2) == pytest.approx(0.009430000000000008, rel=1e-12)
    assert float(got.mean) == pytest.approx(0.124, rel=1e-12)
    assert float(got.mean_sd) == pytest.approx(0.062337789502034814, rel=1e-12)
    assert float(got.tau2) == pytest.approx(learned_prior(y, np.square(s)).variance, rel=1e-12)


def test_no_spread_gives_the_pooled_effect():
    # statsmodels 0.15.0, combine_effects of the eight schools: mean_effect_fe, sd_eff_w_fe; tau^2 is truncated at 0.
    got = between_variance(*SCHOOLS)
    assert got.tau2 == 0
    assert float(got.mean) == pytest.approx(7.685616724956035, rel=1e-12)
    assert float(got.mean_sd) == pytest.approx(4.071919158402296, rel=1e-12)
    pooled = shrink_groups(*SCHOOLS, tau2=got.tau2)
    assert pooled.effect == pytest.approx([7.685616724956035] * 8, rel=1e-12)
    assert pooled.sd == pytest.approx([4.071919158402296] * 8, rel=1e-12)
    assert (pooled.weight == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_estimate_and_limits_are_those_of_the_likelihood(seed):
    rng = np.random.default_rng(seed)
    s = rng.uniform(0.2, 2.0, 6)
    y = rng.normal(1.0, 1.0, 6) + s * rng.standard_normal(6)
    got = between_variance(y, s)
    found = minimize_scalar(
        lambda u: -restricted(y, s**2, math.exp(u)), bounds=(-30, 8), options={"xatol": 1e-10}
    )
    assert restricted(y, s**2, float(got.tau2)) >= -found.fun - 1e-9
    for limit in (float(got.lower), float(got.upper)):
        drop = restricted(y, s**2, float(got.tau2)) - restricted(y, s**2, limit)
        assert drop == pytest.approx(3.841458820694124 / 2, abs=1e-6) or (limit == 0 and drop < 1.93)


def test_a_known_mean():
    y, s = np.array([0.3, -0.2, 0.9, 0.1]), np.array([0.2, 0.2, 0.2, 0.2])
    got = between_variance(y, s, mean=0.0)
    assert float(got.tau2) == pytest.approx((y**2).mean() - 0.04, rel=1e-12)
    assert (got.mean, got.mean_sd) == (0, 0)
    one = between_variance([1.0], [0.5], mean=0.0)
    assert float(one.tau2) == pytest.approx(0.75, rel=1e-12)
    assert shrink_groups([1.0], [1.0], mean=0.0, tau2=1.0).effect == pytest.approx([0.5])


def brute(y, s, i):
    """Mean and variance of one effect by quadrature over tau^2, at 30 digits."""
    with mpmath.workdps(30):
        v = [mpmath.mpf(x) ** 2 for x in s]
        s0 = len(v) / mpmath.fsum(1 / x for x in v)

        def parts(u):
            tau2 = s0 * (1 - u) / u
            w = [1 / (x + tau2) for x in v]
            mu = mpmath.fsum(a * mpmath.mpf(b) for a, b in zip(w, y, strict=True)) / mpmath.fsum(w)
            log = -mpmath.log(mpmath.fsum(w)) + mpmath.fsum(
                mpmath.log(a) - a * (b - mu) ** 2 for a, b in zip(w, y, strict=True)
            )
            keep = tau2 / (tau2 + v[i])
            return (
                mpmath.exp(log / 2),
                keep * y[i] + (1 - keep) * mu,
                keep * v[i] + (1 - keep) ** 2 / mpmath.fsum(w),
            )

        def integral(f):
            return mpmath.quad(lambda u: f(*parts(u)), [0, 0.01, 0.1, 0.5, 1])

        total = integral(lambda p, m, v: p)
        mean = integral(lambda p, m, v: p * m) / total
        second = integral(lambda p, m, v: p * (v + m * m)) / total
        return float(mean), float(mpmath.sqrt(second - mean**2))


def test_averaged_effects_are_the_integrals():
    got = shrink_groups(*SCHOOLS)
    for i in (0, 2, 7):
        mean, sd = brute(*(x.tolist() for x in SCHOOLS), i)
        assert (got.effect[i], got.sd[i]) == pytest.approx((mean, sd), rel=1e-9)
    # Gelman et al. (2013), table 5.3: school A has a posterior median of 10, the others 5 to 10.
    assert got.effect.argmax() == 0
    assert 10 < got.effect[0] < 13


def test_one_group_keeps_its_own_and_none_has_nothing():
    one = shrink_groups([1.5, 9.0], [2.0, math.inf])
    assert (one.effect[0], one.sd[0]) == pytest.approx((1.5, 2.0), rel=1e-9)
    assert one.sd[1] == one.mean_sd == math.inf
    assert one.weight[1] == 0
    unknown = between_variance([1.5, 9.0], [2.0, math.inf])
    assert (unknown.tau2, unknown.lower, unknown.upper, unknown.groups) == (math.inf, 0, math.inf, 1)
    none = shrink_groups([0.0], [math.inf])
    assert (none.effect[0], none.sd[0], none.weight[0]) == (0, math.inf, 0)


def test_two_groups_move_towards_one_another():
    got = shrink_groups([1.0, 5.0], [2.0, 1.0])
    assert 1 < got.effect[0] < got.effect[1] < 5
    assert (got.sd < [2.0, 1.0]).all()
    assert (got.sd > [1.5, 0.9]).all()
    assert got.weight[0] < got.weight[1]


def test_a_group_without_data_gets_the_mean():
    with_it = shrink_groups([1.0, 5.0, 77.0], [2.0, 1.0, math.inf])
    alone = shrink_groups([1.0, 5.0], [2.0, 1.0])
    assert with_it.effect[:2] == pytest.approx(alone.effect, rel=1e-12)
    assert with_it.effect[2] == pytest.approx(float(alone.mean), rel=1e-12)
    assert with_it.sd[2] > with_it.sd[:2].max()


def test_families_do_not_depend_on_one_another_and_units_do_not_matter():
    rng = np.random.default_rng(2)
    y, s = rng.normal(size=(3, 4, 5)), rng.uniform(0.1, 1, (3, 4, 5))
    all_, one = shrink_groups(y, s), shrink_groups(y[1, 2], s[1, 2])
    assert all_.effect[1, 2] == pytest.approx(one.effect, rel=1e-13)
    single = between_variance(y[1, 2], s[1, 2])
    assert float(between_variance(y, s).tau2[1, 2]) == pytest.approx(float(single.tau2), rel=1e-12)
    far = shrink_groups(1e-9 * y + 3e-7, 1e-9 * s)
    assert far.effect == pytest.approx(1e-9 * all_.effect + 3e-7, rel=1e-6)
    assert far.sd == pytest.approx(1e-9 * all_.sd, rel=1e-6)


@pytest.mark.parametrize(("groups", "tau"), [(2, 1.0), (3, 0.3), (5, 1.0), (10, 1.0)])
def test_averaging_covers_where_the_plug_in_does_not(groups, tau):
    rng = np.random.default_rng(groups)
    effects = rng.normal(0.5, tau, (600, groups))
    s = np.broadcast_to(np.geomspace(0.5, 1.5, groups), effects.shape)
    y = effects + s * rng.standard_normal(effects.shape)
    averaged, plugged = shrink_groups(y, s), shrink_groups(y, s, tau2=between_variance(y, s).tau2)
    covers, plug_covers = (
        (np.abs(found.effect - effects) < 1.96 * found.sd).mean() for found in (averaged, plugged)
    )
    error, raw = (np.sqrt(((e - effects) ** 2).mean()) for e in (averaged.effect, y))
    assert covers > 0.90  # measured 0.915 to 0.987, Monte Carlo error 0.01
    assert plug_covers < covers - 0.03
    assert error < 0.9 * raw


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shrink_groups(1.0, 1.0), "estimates must end in an axis of groups"),
        (lambda: shrink_groups([], []), "estimates must have at least one group"),
        (lambda: shrink_groups([math.nan], [1.0]), "estimates must be finite"),
        (lambda: shrink_groups([1e60], [1.0]), "estimates must be at most 1e\\+50"),
        (lambda: shrink_groups([1.0], [0.0]), "standard_errors must lie between"),
        (lambda: shrink_groups([1.0], [math.nan]), "standard_errors must lie between"),
        (lambda: shrink_groups([1.0], [1.0], tau2=-1.0), "tau2 must not be negative"),
        (lambda: shrink_groups([1.0], [1.0], mean=math.nan), "mean must be finite"),
        (lambda: between_variance([1.0], [1.0], alpha=1.0), "alpha must lie strictly between 0 and 1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
