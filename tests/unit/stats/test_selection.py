from __future__ import annotations

import math
from functools import cache

import mpmath
import numpy as np
import pytest

from stream_xp.stats import radius_multiplier_two_sided, tuned_rho2
from stream_xp.stats.bayes import decision_errors, learned_prior, shrunk_effect
from stream_xp.stats.selection import (
    FLOOR_SHARE,
    design_errors,
    prior_from_past,
    selected_effect,
    stopped_design_errors,
)


def test_posterior_by_hand():
    got = selected_effect(1.0, 1.0, prior_sd=1.0)
    sd = math.sqrt(0.5)
    size = 2 * sd * float(mpmath.npdf(0.5 / sd)) + 0.5 * (1 - 2 * float(mpmath.ncdf(-0.5 / sd)))
    assert (got.effect, got.sd, got.shrinkage) == pytest.approx((0.5, sd, 0.5))
    assert got.type_s == pytest.approx(float(mpmath.ncdf(-0.5 / sd)))
    assert got.type_m == pytest.approx(1 / size)


def test_signs_and_extreme_priors():
    mirrored = selected_effect([2.0, -2.0, 0.0], 1.0, prior_sd=0.7)
    assert mirrored.type_s == pytest.approx([mirrored.type_s[0], mirrored.type_s[0], 0.5])
    assert mirrored.effect == pytest.approx([mirrored.effect[0], -mirrored.effect[0], 0.0])
    flat = selected_effect(2.0, 1.0, prior_sd=math.inf)
    assert (flat.effect, flat.sd, flat.shrinkage) == (2, 1, 1)
    assert flat.type_s == pytest.approx(float(mpmath.ncdf(-2)))
    none = selected_effect(2.0, 1.0, prior_sd=0.0)
    assert (none.effect, none.sd, none.shrinkage, none.type_s, none.type_m) == (0, 0, 0, 0.5, math.inf)
    far = selected_effect(30.0, 1.0, prior_sd=100.0)
    assert far.type_s == pytest.approx(float(mpmath.ncdf(-far.effect / far.sd)), rel=1e-9)
    against = selected_effect(0.1, 1.0, prior_mean=-5.0, prior_sd=1.0)
    assert against.type_s > 0.99


def test_it_is_the_shrunk_effect_of_a_learned_prior():
    rng = np.random.default_rng(1)
    past = learned_prior(rng.normal(0.1, 0.3, 30), np.full(30, 0.01))
    old = shrunk_effect(0.4, 0.02, prior=past)
    new = selected_effect(0.4, math.sqrt(0.02), prior_mean=past.mean, prior_sd=math.sqrt(past.variance))
    assert (new.effect, new.sd, new.shrinkage) == pytest.approx((old.mean, old.sd, old.shrinkage))


@pytest.mark.parametrize(
    ("effect", "se", "power", "type_s", "type_m"),
    [
        # Gelman and Carlin (2014), beauty and sex ratio, and the second example of their R function retrodesign;
        # both rounded, their exaggeration is from 10,000 draws.
        (0.1, 3.28, 0.05, 0.46, 77.0),
        (2.0, 8.1, 0.06, 0.24, 9.5),
    ],
)
def test_published_design_calculations(effect, se, power, type_s, type_m):
    got = design_errors(effect, se)
    assert got.power == pytest.approx(power, abs=0.005)
    assert got.type_s == pytest.approx(type_s, abs=0.005)
    assert got.type_m == pytest.approx(type_m, rel=0.02)


@pytest.mark.parametrize(("size", "c"), [(0.2, 1.96), (1.0, 1.96), (2.8, 3.035), (8.0, 3.0), (1.0, 12.0)])
def test_design_errors_are_the_integrals(size, c):
    with mpmath.workdps(40):
        up, down = mpmath.ncdf(mpmath.mpf(size) - c), mpmath.ncdf(-mpmath.mpf(size) - c)
        tail = mpmath.quad(lambda x: x * mpmath.npdf(x, size), [c, c + 1, c + 5, c + 40])
        tail += mpmath.quad(lambda x: x * mpmath.npdf(x, -size), [c, c + 1, c + 5, c + 40])
        expected = [float(v) for v in (up + down, down / (up + down), tail / (up + down) / size)]
    got = design_errors(-3.0 * size, 3.0, critical=c)
    assert [got.power, got.type_s, got.type_m] == pytest.approx(expected, rel=1e-10)


def test_design_errors_agree_with_a_point_prior_and_broadcast():
    old = decision_errors(4.0, z=2.5, prior_mean=1.5, prior_variance=0.0)
    new = design_errors(1.5, 2.0, critical=2.5)
    assert (math.log(new.power), new.type_s, new.type_m) == pytest.approx(
        (old.log_fires, old.type_s, old.type_m), rel=1e-9
    )
    none = design_errors([0.0, 1.0], [[1.0], [2.0]])
    assert none.power.shape == (2, 2)
    assert none.type_m[0, 0] == math.inf
    assert none.type_s[:, 0] == pytest.approx([0.5, 0.5])
    assert none.power[0, 0] == pytest.approx(0.05)
    assert (np.diff(none.type_m[:, 1]) > 0).all()  # a larger error exaggerates more
    rare = design_errors(1.0, 1.0, critical=30.0)
    assert rare.type_m == pytest.approx(30.0, rel=0.01)


def test_a_stop_at_one_look_is_the_fixed_sample():
    got, fixed = stopped_design_errors(1.5, [2.0], [2.5]), design_errors(1.5, 2.0, critical=2.5)
    assert (got.power, got.type_s, got.type_m) == pytest.approx(
        (fixed.power, fixed.type_s, fixed.type_m), rel=1e-7
    )
    one = stopped_design_errors(-1.5, [2.0], [2.5], sides=1)
    assert one.type_s == 1
    assert one.power == pytest.approx(float(mpmath.ncdf(-0.75 - 2.5)))


def test_a_sequential_stop_is_the_simulated_one():
    se, z = 1 / np.sqrt(np.arange(1, 6) / 5 * 4), np.array([3.2, 3.0, 2.68, 2.29, 2.03])
    got = stopped_design_errors(0.4, se.tolist(), z.tolist())
    paths, steps = 200_000, np.diff(1 / se**2, prepend=0)
    rng = np.random.default_rng(1)
    b = np.cumsum(rng.standard_normal((paths, 5)) * np.sqrt(steps) + 0.4 * steps, axis=1)
    hit = np.abs(b * se) >= z
    stops = hit.any(axis=1)
    at = (b * se**2)[np.arange(paths), hit.argmax(axis=1)][stops]
    assert got.power == pytest.approx(stops.mean(), abs=0.004)
    assert got.type_s == pytest.approx((at < 0).mean(), abs=0.004)
    error = np.abs(at).std() / 0.4 / math.sqrt(len(at))
    assert got.type_m == pytest.approx(np.abs(at).mean() / 0.4, abs=4 * error)
    assert got.type_m > design_errors(0.4, se[-1], critical=2.03).type_m  # early stops exaggerate more


# ---- a program of experiments that stop sequentially --------------------------------------------------


@cache
def program(tau, seed=1, experiments=4000):
    """True effects, estimates at their stop, standard errors there, and whether the sequence excluded 0."""
    rng = np.random.default_rng(seed)
    n = np.unique(np.geomspace(200, 20_000, 40).astype(int))
    se = np.sqrt(16.0 / n)
    effects = rng.normal(0.0, tau, experiments)
    steps = np.diff(1 / se**2, prepend=0)
    noise = rng.standard_normal((experiments, len(n))) * np.sqrt(steps)
    estimates = np.cumsum(noise + effects[:, np.newaxis] * steps, axis=1) * se**2
    hit = np.abs(estimates) > se * radius_multiplier_two_sided(n * tuned_rho2(10_000, 0.05), 0.05)
    decided = hit.any(axis=1)
    at = np.where(decided, hit.argmax(axis=1), len(n) - 1)
    return effects, estimates[np.arange(experiments), at], se[at], decided


def mean_and_error(values):
    return values.mean(), values.std() / math.sqrt(len(values))


@pytest.mark.parametrize("tau", [0.05, 0.1])
def test_shipped_experiments_exaggerate_and_their_shrunk_effects_do_not(tau):
    effects, estimates, se, decided = program(tau)
    prior = prior_from_past(estimates, se)
    shipped = decided & (estimates > 0)
    shrunk = selected_effect(estimates, se, prior_sd=prior.sd)
    raw, raw_error = mean_and_error((estimates - effects)[shipped])
    left, left_error = mean_and_error((shrunk.effect - effects)[shipped])
    assert raw > 10 * raw_error  # 0.068 on top of a true 0.078 at tau 0.05, 0.045 on top of 0.130 at 0.1
    assert abs(left) < 3 * left_error
    z = (shrunk.type_s[shipped].sum() - (effects[shipped] < 0).sum()) / math.sqrt(
        (shrunk.type_s * (1 - shrunk.type_s))[shipped].sum()
    )
    assert abs(z) < 3
    sizes, size_error = mean_and_error((estimates / shrunk.type_m - np.abs(effects))[shipped])
    assert abs(sizes) < 3 * size_error


def test_the_prior_is_found_although_experiments_stopped():
    _, estimates, se, _ = program(0.1)
    for mean in (0.0, None):
        prior = prior_from_past(estimates, se, mean=mean)
        assert prior.lower < 0.1 < prior.upper
        assert float(prior.sd) == pytest.approx(0.1, rel=0.03)
    # Moments do not know of the stop.
    assert math.sqrt(learned_prior(estimates, se**2).variance) < 0.08


def test_limits_of_the_prior_hold():
    rng = np.random.default_rng(4)
    se = rng.uniform(0.05, 0.3, (500, 40))
    estimates = rng.normal(0.0, 0.2, se.shape) + se * rng.standard_normal(se.shape)
    prior = prior_from_past(estimates, se)
    assert prior.sd.shape == (500,)
    holds = ((prior.lower <= 0.2) & (prior.upper >= 0.2)).mean()
    assert holds == pytest.approx(0.95, abs=0.03)


def test_too_few_experiments_a_floor_and_padding():
    inf = math.inf
    effects = [[0.1, 0.2, 0.0], [0.1, -0.1, 0.05], [0.1, 0.1, 0.1]]
    se = [[0.1, 0.1, inf], [0.1, 0.2, 0.3], [0.2, 0.2, 0.4]]
    got = prior_from_past(effects, se, min_experiments=3)
    assert got.known.tolist() == [False, True, True]
    assert got.experiments.tolist() == [2, 3, 3]
    assert (got.sd[0], got.lower[0], got.upper[0], got.mean_sd[0]) == (inf, 0, inf, inf)
    assert got.sd[1:] == pytest.approx([FLOOR_SHARE * 0.2, FLOOR_SHARE * 0.2])
    assert prior_from_past(effects, se, min_experiments=3, floor_share=0.0).sd[2] == 0
    assert selected_effect(0.3, 0.1, prior_sd=got.sd[0]).effect == 0.3
    learned = prior_from_past(effects[2], se[2], min_experiments=3, mean=None)
    assert float(learned.mean) == pytest.approx(0.1)
    assert learned.mean_sd > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: selected_effect(1.0, 0.0, prior_sd=1.0), "standard_error must be greater than 0"),
        (lambda: selected_effect(1.0, 1.0, prior_sd=-1.0), "prior_sd must not be negative"),
        (lambda: design_errors(math.nan, 1.0), "effect must be finite"),
        (lambda: design_errors(1.0, 1.0, critical=0.0), "critical must be greater than 0"),
        (lambda: design_errors(1.0, 1.0, alpha=0.0), "alpha must lie strictly between 0 and 1"),
        (lambda: stopped_design_errors(1.0, [1.0, 1.0], [2.0, 2.0]), "standard_errors must be a sequence"),
        (lambda: stopped_design_errors(1.0, [2.0, 1.0], [2.0]), "z must have 2 looks"),
        (lambda: prior_from_past([1.0], [1.0], min_experiments=1), "min_experiments must be at least 2"),
        (lambda: prior_from_past([1.0], [1.0], floor_share=-1.0), "floor_share must not be negative"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
