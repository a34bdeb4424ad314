from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.stats import log_e_two_sided, radius_multiplier_two_sided
from stream_xp.stats.always_valid import (
    msprt,
    msprt_log_e,
    msprt_radius,
    running_intersection,
    running_log_e,
    running_p,
)

LOOKS = st.lists(st.floats(-50, 50), min_size=1, max_size=30)


# ---- running quantities ------------------------------------------------------------------------------


@settings(deadline=None)
@given(LOOKS)
def test_running_p_is_the_smallest_so_far(log_e):
    found = running_p(log_e)
    for i in range(len(log_e)):
        assert found[i] == pytest.approx(min(1.0, *(math.exp(-v) for v in log_e[: i + 1])), rel=1e-12)
    assert (np.diff(found) <= 0).all()
    assert running_log_e(log_e).tolist() == [max(log_e[: i + 1]) for i in range(len(log_e))]


@settings(deadline=None)
@given(LOOKS, st.floats(1e-9, 0.5))
def test_running_p_is_dual_to_the_running_log_e(log_e, alpha):
    largest = running_log_e(log_e)
    if (np.abs(largest - math.log(1 / alpha)) > 1e-9).all():
        assert ((running_p(log_e) <= alpha) == (largest >= math.log(1 / alpha))).all()


def test_looks_lie_along_any_axis():
    looks = np.random.default_rng(1).normal(size=(3, 4, 5))
    assert (running_p(looks, axis=1)[2, :, 3] == running_p(looks[2, :, 3])).all()
    assert running_p(looks, axis=0).shape == (3, 4, 5)


def test_intersection_shrinks_and_says_when_it_is_empty():
    found = running_intersection([-math.inf, -1.0, -2.0, 0.5, 3.0], [math.inf, 2.0, 1.0, 4.0, 5.0])
    assert found.lower.tolist() == [-math.inf, -1.0, -1.0, 0.5, 3.0]
    assert found.upper.tolist() == [math.inf, 2.0, 1.0, 1.0, 1.0]
    assert found.empty.tolist() == [False, False, False, False, True]


def test_intersection_lies_along_any_axis():
    low = np.random.default_rng(2).normal(size=(4, 6))
    found = running_intersection(low, low + 1.0, axis=0)
    assert (found.lower[:, 2] == running_intersection(low[:, 2], low[:, 2] + 1.0).lower).all()


def test_an_effect_that_wears_off_empties_the_intersection():
    # The warning of the docstring, as a fact.
    n = np.arange(50, 20_001, 50)
    effect = 0.6 * np.exp(-n / 1000)
    radius = msprt_radius(variance=2.0, n=n, tau2=0.1, alpha=0.05)
    found = running_intersection(effect - radius, effect + radius)
    assert found.empty[-1]


# ---- mSPRT -------------------------------------------------------------------------------------------

V, N, TAU2 = st.floats(1e-6, 1e6), st.integers(1, 10**12), st.floats(1e-6, 1e3)


@settings(deadline=None)
@given(d=st.floats(-100, 100), v=V, n=N, tau2=TAU2)
def test_msprt_is_its_published_form(d, v, n, tau2):
    with mpmath.workdps(50):
        d_, v_, n_, t_ = (mpmath.mpf(x) for x in (d, v, n, tau2))
        wide = v_ + n_ * t_
        expected = mpmath.log(mpmath.sqrt(v_ / wide)) + n_**2 * t_ * d_**2 / (2 * v_ * wide)
    assert msprt_log_e(d, variance=v, n=n, tau2=tau2) == pytest.approx(float(expected), rel=1e-11, abs=1e-11)


@settings(deadline=None)
@given(d=st.floats(-5, 5), v=V, n=N, tau2=TAU2)
def test_msprt_is_the_kernel_with_its_own_k(d, v, n, tau2):
    k = n * tau2 / v
    expected = log_e_two_sided(d * math.sqrt(n / v), k)
    assert msprt_log_e(d, variance=v, n=n, tau2=tau2) == pytest.approx(expected, rel=1e-11, abs=1e-11)
    radius = math.sqrt(v / n) * radius_multiplier_two_sided(k, 0.05)
    assert msprt_radius(variance=v, n=n, tau2=tau2, alpha=0.05) == pytest.approx(radius, rel=1e-12)


@pytest.mark.parametrize(("tau2", "n"), [(0.01, 1), (0.5, 30), (2.0, 4)])
def test_msprt_is_the_mixture_of_likelihood_ratios(tau2, n):
    v, d = 1.7, 0.4
    expected = mpmath.quad(
        lambda m: (
            mpmath.exp((n * d * m - n * m * m / 2) / v)
            * mpmath.exp(-m * m / (2 * tau2))
            / mpmath.sqrt(2 * mpmath.pi * tau2)
        ),
        [-8, -1, 0, 1, 8],
    )
    assert msprt_log_e(d, variance=v, n=n, tau2=tau2) == pytest.approx(float(mpmath.log(expected)), rel=1e-8)


@settings(deadline=None)
@given(d=st.floats(-5, 5), v=V, n=N, tau2=TAU2, alpha=st.floats(1e-9, 0.99))
def test_msprt_rejects_exactly_outside_its_sequence(d, v, n, tau2, alpha):
    found = msprt(d, variance=v, n=n, tau2=tau2, alpha=alpha)
    half = found.upper - found.estimate
    edge = msprt_log_e(msprt_radius(variance=v, n=n, tau2=tau2, alpha=alpha), variance=v, n=n, tau2=tau2)
    assert edge == pytest.approx(math.log(1 / alpha), rel=1e-9, abs=1e-9)
    if abs(abs(d) - half) > 1e-9 * half:
        assert (found.log_e >= math.log(1 / alpha)) == (abs(d) > half)
    assert found.n == 2 * n


def test_msprt_broadcasts_and_saturates():
    table = msprt_log_e(np.zeros((3, 1)), variance=1.0, n=np.array([1, 10]), tau2=0.1)
    assert table.shape == (3, 2)
    assert math.isfinite(msprt_log_e(1e300, variance=1e-300, n=1, tau2=1e-300))
    assert msprt_radius(variance=1.0, n=10, tau2=0.1, alpha=np.array([0.1, 0.2])).shape == (2,)


# ---- arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: running_p([0.0, math.nan]), "log_e must be finite"),
        (lambda: running_log_e([0.0, math.inf]), "log_e must be finite"),
        (lambda: running_p(1.0), "axis must be one of the 0 axes"),
        (lambda: running_p([1.0], axis=1), "axis must be one of the 1 axes"),
        (lambda: running_intersection([math.nan], [1.0]), "lower must not be NaN"),
        (lambda: running_intersection([0.0], ["x"]), "upper must be numeric"),
        (lambda: running_intersection([0.0], [1.0, 2.0]), r"upper must have the shape of lower \(1,\)"),
        (lambda: running_intersection([2.0], [1.0]), "upper must not be below lower"),
        (lambda: running_intersection([1.0], [2.0], axis=2), "axis must be one of"),
        (lambda: msprt_log_e(math.nan, variance=1.0, n=1, tau2=1.0), "difference must be finite"),
        (lambda: msprt_log_e(0.0, variance=0.0, n=1, tau2=1.0), "variance must be greater than 0"),
        (lambda: msprt_log_e(0.0, variance=1.0, n=0, tau2=1.0), "n must be greater than 0"),
        (lambda: msprt_log_e(0.0, variance=1.0, n=1, tau2=-1.0), "tau2 must be greater than 0"),
        (lambda: msprt_log_e(0.0, variance=1e-300, n=1, tau2=1e300), r"n \* tau2 / variance must be finite"),
        (lambda: msprt_radius(variance=1.0, n=1, tau2=1.0, alpha=1.0), "alpha must lie strictly"),
        (lambda: msprt(0.0, variance=1.0, n=1, tau2=1.0, alpha=0.0), "alpha must lie strictly"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
