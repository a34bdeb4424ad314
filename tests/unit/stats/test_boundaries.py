from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from stream_xp.stats import radius_multiplier_two_sided
from stream_xp.stats._boundaries import (
    band_constant,
    beta_binomial_boundary,
    beta_binomial_log_e,
    gamma_exponential_boundary,
    gamma_exponential_log_e,
    is_above,
    log_band_error,
    log_threshold,
    normal_boundary,
    tuned_concentration,
    tuned_rho,
)


def array(x):
    return np.asarray(float(x))


def gamma_exponential_by_definition(s, v, rho):
    """E exp(lambda s - (-log(1 - lambda) - lambda) v) over the truncated gamma of 1 - lambda, exactly."""
    with mpmath.workdps(40):
        s, v, rho = (mpmath.mpf(i) for i in (s, v, rho))
        x, y = v + rho, s + v + rho
        prior = rho * mpmath.log(rho) - rho - mpmath.log(mpmath.gammainc(rho, 0, rho))
        return float(prior + mpmath.log(mpmath.hyp1f1(1, x + 1, y)) - mpmath.log(x))


def beta_below(a, b, x):
    """The incomplete beta function as a series of positive terms."""
    if x == 1:
        return mpmath.beta(a, b)
    total, term, i = mpmath.mpf(0), mpmath.mpf(1), 0
    while term > total * mpmath.eps:
        total, term, i = total + term, term * x * (a + b + i) / (a + 1 + i), i + 1
    return x**a * (1 - x) ** b / a * total


def beta_binomial_by_definition(k, n, p, concentration, side):
    """The mixture of likelihood ratios over the beta distribution, or over its part beyond p."""
    a, b = concentration * p, concentration * (1 - p)
    with mpmath.workdps(40):
        k, n, p, a, b = (mpmath.mpf(i) for i in (k, n, p, a, b))
        rest = k * mpmath.log(p) + (n - k) * mpmath.log(1 - p)
        if side == "above":  # mirrored, as the integral up to 1 - p does not cancel
            k, p, a, b = n - k, 1 - p, b, a
        high = 1 if side == "both" else p
        top, bottom = beta_below(a + k, b + n - k, high), beta_below(a, b, high)
        return float(mpmath.log(top / bottom) - rest)


# Values of the reference tests of the confseq package (0.0.11), from its R prototype: v = v_opt = 100, alpha = 0.05.
def test_published_values_of_the_normal_mixture():
    assert float(tuned_rho(100, 0.05)) == pytest.approx(12.60056, abs=1e-5)
    two = normal_boundary(array(100), rho=tuned_rho(100, 0.05), alpha=array(0.05), side="both")
    one = normal_boundary(array(100), rho=tuned_rho(100, 0.1), alpha=array(0.05), side="above")
    assert (float(two), float(one)) == pytest.approx((30.35209, 27.66071), abs=1e-5)


def test_published_values_of_the_gamma_exponential_mixture():
    rho = tuned_rho(100, 0.1)
    log_e = gamma_exponential_log_e(array(10), array(100), rho=rho, c=2.0)
    bound = 2 * gamma_exponential_boundary(array(25), rho=rho / 4, alpha=array(0.05))
    assert float(log_e) == pytest.approx(-0.2490165, abs=1e-5)
    assert float(bound) == pytest.approx(33.02017, abs=1e-5)


def test_published_values_of_the_beta_binomial_mixture():
    n, p = array(625), array(0.2)
    two, one = tuned_concentration(625, 0.05), tuned_concentration(625, 0.1)
    log_e = beta_binomial_log_e(array(135), n, p=p, concentration=two)
    above = beta_binomial_log_e(array(135), n, p=p, concentration=one, side="above")
    bound = beta_binomial_boundary(n, p=p, concentration=two, alpha=array(0.05))
    assert (float(log_e), float(above)) == pytest.approx((-0.6941012, -0.07134019), abs=1e-5)
    assert float(bound) == pytest.approx(31.4308, abs=1e-4)


def test_published_value_of_the_band():
    radius = 0.85 * math.sqrt((math.log(1 + math.log(10)) + band_constant(0.05)) / 1000)
    assert radius == pytest.approx(0.08204769, abs=1e-5)


@pytest.mark.parametrize("rho", [0.3, 1.0, 12.0, 4000.0])
@pytest.mark.parametrize("v", [0.0, 0.25, 300.0, 1e4])
def test_the_gamma_exponential_mixture_is_its_integral(v, rho):
    for s in (-1e5, -300, -50, -5, -0.3, 0, 5, 400):
        expected = gamma_exponential_by_definition(s, v, rho)
        found = float(gamma_exponential_log_e(array(s), array(v), rho=array(rho)))
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9])
@pytest.mark.parametrize("n", [0, 1, 30, 400])
def test_the_beta_binomial_mixture_is_its_integral(n, p):
    for k in {0, min(1, n), int(n * p), n // 2, n}:
        for concentration in (1.0, 40.0):
            for side in ("both", "above", "below"):
                expected = beta_binomial_by_definition(k, n, p, concentration, side)
                found = beta_binomial_log_e(
                    array(k), array(n), p=array(p), concentration=array(concentration), side=side
                )
                assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_far_one_sided_evidence_keeps_its_digits():
    # All 3000 below where half are expected: the share of the beta distribution underflows.
    n, p, concentration = 3000, 0.5, 20.0
    found = beta_binomial_log_e(
        array(n), array(n), p=array(p), concentration=array(concentration), side="below"
    )
    a, b = concentration * p, concentration * (1 - p)

    def mixed(theta):
        log = n * math.log(theta / p) + (a - 1) * math.log(theta) + (b - 1) * math.log1p(-theta)
        return math.exp(log)

    top, _ = quad(mixed, 0.4, 0.5, epsabs=0, epsrel=1e-12)
    bottom, _ = quad(lambda t: t ** (a - 1) * (1 - t) ** (b - 1), 0, p, epsabs=0, epsrel=1e-12)
    assert float(found) == pytest.approx(math.log(top / bottom), abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.floats(0.0, 1e12), st.floats(1e-3, 1e9), st.floats(1e-9, 0.9))
def test_the_gamma_boundary_is_the_root(v, rho, alpha):
    bound = gamma_exponential_boundary(array(v), rho=array(rho), alpha=array(alpha))
    log_e = gamma_exponential_log_e(bound, array(v), rho=array(rho))
    assert float(log_e) == pytest.approx(-math.log(alpha), rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 10**12), st.floats(0.01, 0.99), st.floats(1e-6, 0.9))
def test_the_beta_boundary_is_the_root_or_infinite(n, p, alpha):
    concentration = tuned_concentration(1000, 0.05)
    bound = beta_binomial_boundary(array(n), p=array(p), concentration=concentration, alpha=array(alpha))
    best = beta_binomial_log_e(array(n), array(n), p=array(p), concentration=concentration)
    if best < -math.log(alpha):
        assert bound == math.inf
    else:
        at = beta_binomial_log_e(n * array(p) + bound, array(n), p=array(p), concentration=concentration)
        assert float(at) == pytest.approx(-math.log(alpha), rel=1e-6, abs=1e-6)


def test_extremes_stay_finite_and_accurate():
    with mpmath.workdps(60):
        k, n = mpmath.mpf(5 * 10**11 + 5 * 10**6), mpmath.mpf(10**12)
        a = mpmath.mpf(5000)
        expected = (
            mpmath.loggamma(a + k)
            + mpmath.loggamma(a + n - k)
            - mpmath.loggamma(2 * a + n)
            - 2 * mpmath.loggamma(a)
            + mpmath.loggamma(2 * a)
            + n * mpmath.log(2)
        )
    for side, shift in (("both", 0.0), ("above", math.log(2))):
        found = beta_binomial_log_e(
            array(5e11 + 5e6), array(1e12), p=array(0.5), concentration=array(1e4), side=side
        )
        assert float(found) == pytest.approx(float(expected) + shift, abs=1e-8)
    s = np.array([-1e12, -5e7, 0.0, 5e6, 1e10, 1e12])
    assert np.isfinite(gamma_exponential_log_e(s, np.full(6, 1e12), rho=np.full(6, 1e3))).all()


@pytest.mark.parametrize("alpha", [1e-9, 0.001, 0.05, 0.5, 0.99])
def test_the_band_constant_is_the_root_and_cannot_be_beaten(alpha):
    c = band_constant(alpha)
    eta = np.linspace(1 + 1e-7, 1.4, 200_001)
    root = 0.85 - np.sqrt(2 * (eta - 1) / c)
    g = 2 / eta * root**2
    good = (root > 0) & (g > 1)
    bounds = 4 * np.exp(-g[good] * c) * (1 + 1 / ((g[good] - 1) * np.log(eta[good])))
    assert math.exp(log_band_error(c)) == pytest.approx(alpha, rel=1e-9)
    assert bounds.min() == pytest.approx(alpha, rel=1e-6)


def test_broadcasting():
    s = gamma_exponential_log_e(np.zeros((3, 1)), np.arange(4.0), rho=array(2))
    k = beta_binomial_log_e(np.zeros((3, 1)), np.arange(4.0), p=array(0.3), concentration=array(2))
    assert s.shape == k.shape == (3, 4)
    multiplier = radius_multiplier_two_sided(4.0, 0.05)
    found = normal_boundary(np.array([4.0, 8.0]), rho=array(1), alpha=array(0.05), side="both")
    assert found[0] == pytest.approx(2 * multiplier)


def test_thresholds():
    assert log_threshold(0.05, side="both") == pytest.approx(math.log(40))
    assert log_threshold(0.05, side="below") == pytest.approx(math.log(20))
    assert is_above("above")
    with pytest.raises(ValueError, match="side must be 'both', 'above' or 'below'"):
        is_above("left")
    with pytest.raises(ValueError, match="v_opt must be greater than 0"):
        tuned_rho(0.0, 0.05)
    with pytest.raises(ValueError, match="alpha must lie strictly"):
        tuned_rho(1.0, 1.0)
