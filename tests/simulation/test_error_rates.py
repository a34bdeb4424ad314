"""Error rates under continuous peeking.

Each test draws whole paths from a fixed seed, looks all along them (means: at every unit, later at every
fifth; sample ratio: 28 times), and compares the share of paths that
ever reject with the nominal level plus three Monte Carlo standard errors. The must-fail tests run the
same paths through the shortcuts that these methods replace: they show that the simulation has teeth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from stream_xp.stats import (
    ArmMeans,
    Moments,
    Stratum,
    Undetermined,
    fieller_bounds,
    guarded_variance,
    log_e_one_sided,
    log_e_two_sided,
    mean_difference,
    one_sided_rho2,
    one_sided_test,
    radius_multiplier_two_sided,
    relative_lift,
    sample_ratio_log_e,
    summarise,
    tuned_rho2,
)

ALPHA = 0.05
PATHS = 1000
UNITS = 3000
PLANNED = 1000
# Every unit while the variances are young, then every fifth; the index of the last unit seen. The last
# unit of every epoch is among them.
GRID = np.r_[0:600, 604:UNITS:5]
THRESHOLD = math.log(1 / ALPHA)
LIMIT = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / PATHS)
RHO2 = tuned_rho2(PLANNED, ALPHA)
RHO2_ONE_SIDED = one_sided_rho2(PLANNED, ALPHA)


def bernoulli(p):
    return lambda rng, shape: (rng.random(shape) < p).astype(float)


def lognormal(rng, shape):
    return rng.lognormal(0.0, 1.5, shape)


def zero_inflated(rng, shape):
    return np.where(rng.random(shape) < 0.05, rng.exponential(20.0, shape), 0.0)


@dataclass
class Looks:
    """The fields of ArmMeans, for every path and look: arrays (paths, looks); `ready` says when to look."""

    m0: np.ndarray
    m1: np.ndarray
    v0: np.ndarray
    v1: np.ndarray
    n: np.ndarray
    ready: np.ndarray

    @property
    def se(self):
        return np.sqrt(np.where(self.ready, self.v0 + self.v1, 1.0))

    @property
    def difference(self):
        return np.where(self.ready, self.m1 - self.m0, 0.0)


def looks_of(y, treated, *, epochs=((0, UNITS),), guard=True):
    """Vectorised counterpart of `summarise` at every look; checked against it below.

    Ten sums per arm run over the epochs: units of both arms, weighted mean, leverage N_e^2 / n_ea,
    squares within the arm, squares within both arms, degrees of freedom, epochs used; and of the variance by
    epoch what the arm shows itself, what both arms lend it, and the arm's degrees times the variance of both.
    """
    before, columns = np.zeros((10, 2, len(y), 1)), []
    for start, stop in epochs:
        shown = GRID[(start <= GRID) & (stop > GRID)] - start
        between = np.r_[0, shown[:-1] + 1]
        yes, values = treated[:, start:stop], y[:, start:stop]
        inside = np.stack([~yes, yes])
        batches = (np.add.reduceat(inside * term, between, axis=-1) for term in (1.0, values, values**2))
        n, s, q = (np.cumsum(batch, axis=-1) for batch in batches)
        total, safe = np.broadcast_to(n.sum(0), n.shape), np.maximum(n, 1)
        apart, together = q - s * s / safe, q.sum(0) - s.sum(0) ** 2 / total[0]
        together = np.broadcast_to(together, n.shape)
        leverage, both = total**2 / safe, np.maximum(together, 0.0) / np.maximum(total - 1, 1)
        shown_alone, lent = (
            leverage * np.maximum(apart, 0.0) / (safe + 24),
            25 * leverage * both / (safe + 24),
        )
        terms = [total, total * s / safe, leverage, apart, together, n - 1, np.ones(n.shape)]
        terms = np.stack([*terms, shown_alone, lent, (n - 1) * both])
        now = before + np.where(n.min(0) > 0, terms, 0.0)
        columns.append(now)
        before = now[..., -1:]
    sums = np.concatenate(columns, axis=-1)
    total, mean, leverage, apart, together, degrees, used, shown_alone, lent, base = sums
    own = np.maximum(apart, 0.0) / np.maximum(degrees, 1)
    pooled = np.maximum(together, 0.0) / np.maximum(total - used, 1)
    unit = guarded_variance(own, pooled, degrees=degrees) if guard else own
    n = np.maximum(total, 1)
    ratio = np.where(base > 0, own / np.where(base > 0, base / np.maximum(degrees, 1), 1), 1.0)
    if guard:
        ratio = guarded_variance(ratio, 1.0, degrees=degrees)
    by_epoch = np.where(used > 1, shown_alone + ratio * lent, 0.0)
    variance = np.maximum(unit * leverage, by_epoch) / n**2
    ready = (degrees.min(0) >= np.where(used[0] > 1, 25, 24)) & (variance.sum(0) > 0)
    return Looks(mean[0] / n[0], mean[1] / n[0], variance[0], variance[1], n[0], ready)


def ever(rejected):
    return float(rejected.any(axis=-1).mean())


def two_sided(looks, *, truth=0.0):
    return (log_e_two_sided((looks.difference - truth) / looks.se, looks.n * RHO2) >= THRESHOLD) & looks.ready


def one_sided(looks, *, margin, kind, sign):
    relative = kind == "relative"
    edge = margin * np.abs(looks.m0) if relative else margin
    factor = 1 + margin if relative else 1.0
    se = np.sqrt(np.where(looks.ready, looks.v1 + factor**2 * looks.v0, 1.0))
    log_e = log_e_one_sided(sign * (looks.difference - edge) / se, looks.n * RHO2_ONE_SIDED)
    return (log_e >= THRESHOLD) & looks.ready


def fieller_misses(looks, lift):
    lower, upper, bounded = fieller_bounds(
        control_mean=looks.m0,
        control_variance=looks.v0,
        treatment_mean=looks.m1,
        treatment_variance=looks.v1,
        multiplier=radius_multiplier_two_sided(looks.n * RHO2, ALPHA),
    )
    return bounded & looks.ready & ((lift < lower) | (lift > upper))


RAMP = ((0, 1000), (1000, 2000), (2000, 3000))
RAMP_SHARES = (0.1, 0.3, 0.5)


def ramp_with_drift(rng):
    """A treatment share that climbs while the conversion rate of both arms climbs from 0.1 to 0.5."""
    share = np.repeat(RAMP_SHARES, 1000)
    rate = np.linspace(0.1, 0.5, UNITS)
    treated = rng.random((PATHS, UNITS)) < share
    return (rng.random((PATHS, UNITS)) < rate).astype(float), treated


def report(record_property, rate):
    record_property("error_rate", rate)
    print(f"error rate {rate:.4f} +- {math.sqrt(max(rate, 0.001) * (1 - rate) / PATHS):.4f}")
    return rate


@pytest.mark.parametrize(("share", "seed"), [(0.02, 1), (0.1, 2), (0.5, 3)])
@pytest.mark.parametrize(
    "draw", [bernoulli(0.02), lognormal, zero_inflated], ids=["bernoulli", "lognormal", "zeros"]
)
def test_guarded_mean_difference(draw, share, seed, record_property):
    rng = np.random.default_rng(seed)
    y, treated = draw(rng, (PATHS, UNITS)), rng.random((PATHS, UNITS)) < share
    assert report(record_property, ever(two_sided(looks_of(y, treated)))) <= LIMIT


def test_stratified_difference_on_a_ramp_with_drift(record_property):
    y, treated = ramp_with_drift(np.random.default_rng(4))
    assert report(record_property, ever(two_sided(looks_of(y, treated, epochs=RAMP)))) <= LIMIT


@pytest.mark.parametrize(
    ("draw", "share"), [(bernoulli(0.05), 0.5), (zero_inflated, 0.1)], ids=["bernoulli", "zeros"]
)
def test_guarded_fieller_lift(draw, share, record_property):
    rng = np.random.default_rng(5)
    treated = rng.random((PATHS, UNITS)) < share
    y = draw(rng, (PATHS, UNITS)) * np.where(treated, 1.2, 1.0)
    assert report(record_property, ever(fieller_misses(looks_of(y, treated), 0.2))) <= LIMIT


def test_guarded_fieller_lift_of_a_negative_mean(record_property):
    rng = np.random.default_rng(6)
    treated = rng.random((PATHS, UNITS)) < 0.5
    y = -rng.exponential(1.0, (PATHS, UNITS)) * np.where(treated, 1.2, 1.0)
    assert report(record_property, ever(fieller_misses(looks_of(y, treated), -0.2))) <= LIMIT


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_harm_at_the_margin(share, record_property):
    rng = np.random.default_rng(7)
    treated = rng.random((PATHS, UNITS)) < share
    y = (rng.random((PATHS, UNITS)) < np.where(treated, 0.08, 0.1)).astype(float)
    rejected = one_sided(looks_of(y, treated), margin=-0.02, kind="absolute", sign=-1)
    assert report(record_property, ever(rejected)) <= LIMIT


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_non_inferiority_at_the_margin(share, record_property):
    rng = np.random.default_rng(8)
    treated = rng.random((PATHS, UNITS)) < share
    y = (rng.random((PATHS, UNITS)) < np.where(treated, 0.08, 0.1)).astype(float)
    rejected = one_sided(looks_of(y, treated), margin=-0.2, kind="relative", sign=1)
    assert report(record_property, ever(rejected)) <= LIMIT


def epoch_counts(rng, shares):
    """Counts (paths, looks, epochs, arms) of a path that runs 1,000 units in each epoch."""
    looks = np.r_[10:500:70, 500 : UNITS + 1 : 125]
    arms = np.arange(np.array(shares).shape[1])
    cuts = np.repeat(np.cumsum(shares, axis=1)[:, :-1], 1000, axis=0)
    arm = (rng.random((PATHS, UNITS, 1)) > cuts).sum(axis=-1)
    seen = np.stack([np.cumsum(arm == a, axis=1) for a in arms], axis=-1)
    seen = np.concatenate([np.zeros_like(seen[:, :1]), seen], axis=1)
    starts = [1000 * e for e in range(len(shares))]
    return np.stack([seen[:, np.clip(looks, e, e + 1000)] - seen[:, [e]] for e in starts], axis=2)


@pytest.mark.parametrize(
    "weights",
    [[[0.9, 0.1], [0.7, 0.3], [0.5, 0.5]], [[0.8, 0.1, 0.1], [0.4, 0.3, 0.3], [0.2, 0.4, 0.4]]],
    ids=["two arms", "three arms"],
)
def test_sample_ratio_with_changing_weights(weights, record_property):
    counts = epoch_counts(np.random.default_rng(9), weights)
    assert report(record_property, ever(sample_ratio_log_e(counts, weights) >= THRESHOLD)) <= LIMIT


def test_sample_ratio_finds_a_mismatch(record_property):
    weights = np.array([[0.9, 0.1], [0.7, 0.3], [0.5, 0.5]])
    odds = weights * [1.0, math.exp(-0.25)]
    counts = epoch_counts(np.random.default_rng(10), odds / odds.sum(axis=1, keepdims=True))
    assert report(record_property, ever(sample_ratio_log_e(counts, weights) >= THRESHOLD)) > 0.8


# ---- must fail: the shortcuts ------------------------------------------------------------------------


def test_must_fail_unguarded_small_share(record_property):
    rng = np.random.default_rng(2)
    y, treated = bernoulli(0.02)(rng, (PATHS, UNITS)), rng.random((PATHS, UNITS)) < 0.1
    assert report(record_property, ever(two_sided(looks_of(y, treated, guard=False)))) > 0.13


def test_must_fail_naive_z(record_property):
    rng = np.random.default_rng(11)
    looks = looks_of(rng.normal(size=(PATHS, UNITS)), rng.random((PATHS, UNITS)) < 0.5)
    rejected = (np.abs(looks.difference / looks.se) > 1.96) & looks.ready
    assert report(record_property, ever(rejected)) > 0.3


def test_must_fail_pooling_over_a_ramp(record_property):
    y, treated = ramp_with_drift(np.random.default_rng(4))
    assert report(record_property, ever(two_sided(looks_of(y, treated)))) > 0.5


def test_must_fail_totals_against_the_final_weights(record_property):
    weights = [[0.9, 0.1], [0.7, 0.3], [0.5, 0.5]]
    totals = epoch_counts(np.random.default_rng(9), weights).sum(axis=2, keepdims=True)
    rejected = sample_ratio_log_e(totals, weights[-1:]) >= THRESHOLD
    assert report(record_property, ever(rejected)) > 0.5


# ---- the vectorised looks are the real functions -----------------------------------------------------


def moments_at(y, treated, *, unit, epoch):
    inside = slice(epoch[0], min(unit + 1, epoch[1]))
    arms = [y[inside][treated[inside] == arm].astype(int).tolist() for arm in (False, True)]
    return Stratum(*(Moments.from_values(values) for values in arms))


@pytest.mark.parametrize("epochs", [((0, UNITS),), RAMP], ids=["one epoch", "three epochs"])
def test_looks_are_those_of_the_scalar_functions(epochs):
    rng = np.random.default_rng(12)
    y = rng.geometric(0.3, (2, UNITS)).astype(float)
    treated = rng.random((2, UNITS)) < 0.05
    looks = looks_of(y, treated, epochs=epochs)
    for path in range(2):
        for look in (100, 400, 590, 679, 680, 681, 690, 900, len(GRID) - 1):
            strata = [moments_at(y[path], treated[path], unit=GRID[look], epoch=e) for e in epochs]
            means = summarise(strata, scale=1.0)
            assert isinstance(means, ArmMeans) == looks.ready[path, look]
            if isinstance(means, Undetermined):
                continue
            z = looks.difference[path, look] / looks.se[path, look]
            evidence = mean_difference(means, alpha=ALPHA, rho2=RHO2)
            assert evidence.log_e == pytest.approx(log_e_two_sided(z, means.n * RHO2), rel=1e-9, abs=1e-9)
            lift = relative_lift(means, alpha=ALPHA, rho2=RHO2)
            assert lift.estimate == pytest.approx(looks.m1[path, look] / looks.m0[path, look] - 1, rel=1e-9)
            test = one_sided_test(
                means, margin=-0.2, margin_kind="relative", side="above", alpha=ALPHA, rho2=RHO2_ONE_SIDED
            )
            rejected = one_sided(looks, margin=-0.2, kind="relative", sign=1)[path, look]
            assert rejected == (test.lower > 0)
