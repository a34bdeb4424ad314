from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import lambertw

from stream_xp.stats import (
    Evidence,
    log_e_one_sided,
    log_e_two_sided,
    one_sided_rho2,
    p_always_valid,
    radius_multiplier_one_sided,
    radius_multiplier_two_sided,
    tuned_rho2,
)
from stream_xp.stats.normal_mixture import radius_multiplier_at

K = st.floats(1e-6, 1e12)
ALPHA = st.floats(1e-12, 0.999)
Z = st.floats(-50, 50)


def mixture_by_quadrature(z, k, *, one_sided):
    """The defining integral of exp(theta*z - theta^2/2) over N(0, k), folded onto theta > 0 if one-sided."""
    lowest = 0 if one_sided else -mpmath.inf
    centre, width = z * k / (1 + k), math.sqrt(k / (1 + k))
    points = [centre + j * width for j in (-12, -6, -3, 0, 3, 6, 12)]
    points = [lowest, *(p for p in points if not one_sided or p > 0), mpmath.inf]
    density = (2 if one_sided else 1) / mpmath.sqrt(2 * mpmath.pi * k)
    return mpmath.log(
        density * mpmath.quad(lambda t: mpmath.exp(t * z - t * t / 2 - t * t / (2 * k)), points)
    )


# Width relative to a fixed 95 % interval's 1.96, published for N/N* and two-sided alpha 0.05.
@pytest.mark.parametrize(
    ("ratio", "multiplier"),
    [(0.01, 8.94), (0.1, 3.82), (0.3, 3.19), (1, 3.035), (3, 3.10), (10, 3.25), (100, 3.57)],
)
def test_golden_multipliers(ratio, multiplier):
    k = 10_000 * ratio * tuned_rho2(10_000, 0.05)
    assert radius_multiplier_two_sided(k, 0.05) == pytest.approx(multiplier, abs=0.006)


def test_golden_multiplier_at_one_percent():
    assert radius_multiplier_two_sided(tuned_rho2(1, 0.01), 0.01) == pytest.approx(3.572, abs=5e-4)


@pytest.mark.parametrize("alpha", [1e-6, 0.001, 0.01, 0.05, 0.1, 0.5, 0.9])
def test_tuning_is_the_lower_lambert_branch(alpha):
    expected = (-lambertw(-(alpha**2) / math.e, -1).real - 1) / 5000
    assert tuned_rho2(5000, alpha) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [1e-300, 0.05, 0.9999])
def test_tuning_is_exact_where_floats_are_short(alpha):
    with mpmath.workdps(700):
        expected = -mpmath.lambertw(-(mpmath.mpf(alpha) ** 2) / mpmath.e, -1) - 1
    assert tuned_rho2(1, alpha) == pytest.approx(float(expected), rel=1e-10)


def test_tuning_makes_the_sequence_tightest_at_the_planned_sample():
    k = 7 * tuned_rho2(7, 0.05)
    widths = radius_multiplier_two_sided(k * np.array([0.9, 1.0, 1.1]), 0.05)
    assert widths[1] < min(widths[0], widths[2])


def test_one_sided_tuning_doubles_alpha():
    assert one_sided_rho2(500, 0.025) == tuned_rho2(500, 0.05)


@pytest.mark.parametrize("k", [0.01, 1.0, 8.2, 1000.0])
@pytest.mark.parametrize("z", [-6.0, -1.0, 0.0, 0.7, 3.0, 9.0])
def test_log_e_is_the_mixture_integral(z, k):
    two = mixture_by_quadrature(z, k, one_sided=False)
    one = mixture_by_quadrature(z, k, one_sided=True)
    assert log_e_two_sided(z, k) == pytest.approx(float(two), rel=1e-9, abs=1e-9)
    assert log_e_one_sided(z, k) == pytest.approx(float(one), rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(k=K, alpha=ALPHA)
def test_multipliers_are_the_roots_of_the_log_e(k, alpha):
    target = math.log(1 / alpha)
    two, one = radius_multiplier_two_sided(k, alpha), radius_multiplier_one_sided(k, alpha)
    assert log_e_two_sided(two, k) == pytest.approx(target, rel=1e-10, abs=1e-10)
    assert log_e_one_sided(one, k) == pytest.approx(target, rel=1e-10, abs=1e-10)


@settings(deadline=None)
@given(k=K, alpha=ALPHA)
def test_one_sided_root_lies_below_its_closed_bound_and_the_two_sided_radius(k, alpha):
    closed = math.sqrt(2 * (1 + 1 / k) * math.log1p(math.sqrt(1 + k) / (2 * alpha)))
    root = radius_multiplier_one_sided(k, alpha)
    assert 0 < root <= closed * (1 + 1e-12)
    assert root <= radius_multiplier_two_sided(k, alpha) * (1 + 1e-12)


@settings(deadline=None)
@given(z=Z, k=K, alpha=ALPHA)
def test_rejecting_is_leaving_the_sequence(z, k, alpha):
    for log_e, radius, distance in (
        (log_e_two_sided(z, k), radius_multiplier_two_sided(k, alpha), abs(z)),
        (log_e_one_sided(z, k), radius_multiplier_one_sided(k, alpha), z),
    ):
        if abs(distance - radius) > 1e-9 * radius:
            assert (log_e >= math.log(1 / alpha)) == (distance > radius)
            if log_e > 0:
                assert (p_always_valid(log_e) <= alpha) == (distance > radius)


@settings(deadline=None)
@given(z=Z, step=st.floats(1e-3, 10), k=K)
def test_one_sided_log_e_increases_in_z(z, step, k):
    assert log_e_one_sided(z + step, k) > log_e_one_sided(z, k)


@settings(deadline=None)
@given(z=Z, k=K)
def test_two_sided_is_the_average_of_both_one_sided(z, k):
    both = np.logaddexp(log_e_one_sided(z, k), log_e_one_sided(-z, k)) - math.log(2)
    assert log_e_two_sided(z, k) == pytest.approx(both, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("z", [0.0, 1e-300, 1.0, 1e4, 1e150, 1e308])
@pytest.mark.parametrize("k", [5e-324, 1e-300, 1e-12, 1.0, 1e12, 1e308])
def test_extremes_stay_finite(z, k):
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        values = [f(s * z, k) for f in (log_e_two_sided, log_e_one_sided) for s in (1, -1)]
        values += [
            f(k, a)
            for f in (radius_multiplier_two_sided, radius_multiplier_one_sided)
            for a in (1e-300, 0.999)
        ]
    assert np.isfinite(values).all()


def test_k_of_zero_is_no_evidence():
    assert log_e_two_sided(3.0, 0.0) == 0.0
    assert log_e_one_sided(3.0, 0.0) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("k", [1e-3, 8.2, 1e9])
def test_far_negative_one_sided_evidence_keeps_its_digits(k):
    with mpmath.workdps(60):
        x = -1e4 * mpmath.sqrt(mpmath.mpf(k) / (1 + mpmath.mpf(k)))
        log_ndtr = mpmath.log(mpmath.erfc(-x / mpmath.sqrt(2)) / 2)
        expected = mpmath.log(2) - mpmath.log1p(k) / 2 + x * x / 2 + log_ndtr
    assert log_e_one_sided(-1e4, k) == pytest.approx(float(expected), rel=1e-12)


def test_arrays_broadcast_and_scalars_are_floats():
    z, k = np.linspace(-3, 3, 4)[:, None], np.array([0.5, 2.0, 8.0])
    for function in (log_e_two_sided, log_e_one_sided):
        table = function(z, k)
        assert table.shape == (4, 3)
        assert table[1, 2] == pytest.approx(function(float(z[1, 0]), 8.0), rel=1e-14)
        assert type(function(1.0, 2.0)) is float
    for function in (radius_multiplier_two_sided, radius_multiplier_one_sided):
        assert function(k, np.array([[0.01], [0.05]])).shape == (2, 3)
        assert function(k, 0.05)[1] == pytest.approx(function(2.0, 0.05), rel=1e-14)
        assert type(function(2.0, 0.05)) is float


def test_always_valid_p():
    assert p_always_valid(-3.0) == 1.0
    assert p_always_valid(math.log(20)) == pytest.approx(0.05, rel=1e-15)
    assert p_always_valid(1e300) == 0.0
    assert p_always_valid(np.array([-1.0, 2.0])).shape == (2,)
    assert Evidence(0.0, -1.0, 1.0, math.log(20), 10).p_always_valid == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tuned_rho2(0, 0.05), "n_star must be greater than 0"),
        (lambda: tuned_rho2(10, 1.0), "alpha must lie strictly between 0 and 1"),
        (lambda: tuned_rho2(10, math.nan), "alpha must be finite"),
        (lambda: one_sided_rho2(10, 0.5), "alpha must lie strictly between 0 and 0.5"),
        (lambda: log_e_two_sided(math.nan, 1.0), "z must be finite"),
        (lambda: log_e_two_sided(1.0, -1.0), "k must not be negative"),
        (lambda: log_e_one_sided(math.inf, 1.0), "z must be finite"),
        (lambda: log_e_one_sided("one", 1.0), "z must be numeric"),
        (lambda: radius_multiplier_two_sided(0.0, 0.05), "k must be greater than 0"),
        (lambda: radius_multiplier_two_sided(np.array([1.0, math.inf]), 0.05), "k must be finite"),
        (lambda: radius_multiplier_one_sided(1.0, 0.0), "alpha must lie strictly between 0 and 1"),
        (lambda: p_always_valid(math.nan), "log_e must be finite"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- arrays of tuning constants, remembered roots, any threshold ---------------------------------------


def test_tuning_of_arrays_is_that_of_each_element():
    n, alpha = np.array([[100.0], [5000.0]]), np.array([0.01, 0.05, 0.05])
    table, one = tuned_rho2(n, alpha), one_sided_rho2(n, alpha)
    assert table.shape == one.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert table[i, j] == tuned_rho2(float(n[i, 0]), float(alpha[j]))
            assert one[i, j] == one_sided_rho2(float(n[i, 0]), float(alpha[j]))
    assert tuned_rho2(np.array([]), 0.05).shape == (0,)
    assert type(tuned_rho2(100, 0.05)) is type(tuned_rho2(np.float64(100), 0.05)) is float
    assert tuned_rho2(100, 0.05) == tuned_rho2(100.0, 0.05) == tuned_rho2(np.float64(100), np.float64(0.05))


def test_remembered_roots_still_refuse_bad_input_every_time():
    for _ in range(2):
        with pytest.raises(ValueError, match="alpha must lie strictly between 0 and 1"):
            tuned_rho2(10.0, 1.5)
        with pytest.raises(ValueError, match="n_star must be finite"):
            tuned_rho2(math.nan, 0.05)
        with pytest.raises(ValueError, match="n_star must be finite"):
            tuned_rho2(10**400, 0.05)
    with pytest.raises(ValueError, match=r"alpha must lie strictly between 0 and 0.5"):
        one_sided_rho2(10.0, np.array([0.05, 0.6]))
    with pytest.raises(ValueError, match="alpha must be numeric"):
        one_sided_rho2(10.0, "x")
    with pytest.raises(ValueError, match="n_star must be greater than 0"):
        tuned_rho2(np.array([1.0, 0.0]), 0.05)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(K, ALPHA), min_size=1, max_size=20))
def test_one_sided_roots_do_not_depend_on_their_neighbours(rows):
    k, alpha = (np.array(column) for column in zip(*rows, strict=True))
    table = radius_multiplier_one_sided(k, alpha)
    assert table.tolist() == [radius_multiplier_one_sided(*row) for row in rows]


@settings(deadline=None)
@given(k=K, alpha=ALPHA)
def test_the_radius_at_one_over_alpha_is_the_usual_one(k, alpha):
    usual = radius_multiplier_two_sided(k, alpha)
    assert radius_multiplier_at(k, math.log(1 / alpha)) == pytest.approx(usual, rel=1e-12)


@settings(deadline=None)
@given(k=K, threshold=st.floats(-30, 1e4))
def test_the_radius_at_any_threshold_is_dual_to_the_log_e(k, threshold):
    radius = radius_multiplier_at(k, threshold)
    if radius > 0:
        assert log_e_two_sided(radius, k) == pytest.approx(threshold, rel=1e-9, abs=1e-9)
    else:
        assert log_e_two_sided(0.0, k) >= threshold


def test_the_radius_at_a_threshold_is_finite_and_broadcasts():
    for k in (5e-324, 1.0, 1e308):
        for threshold in (-1e280, 0.0, 1e280):
            assert math.isfinite(radius_multiplier_at(k, threshold))
    assert radius_multiplier_at(np.ones((2, 1)), np.zeros(3)).shape == (2, 3)
    with pytest.raises(ValueError, match="log_threshold must be at most"):
        radius_multiplier_at(1.0, 1e300)
    with pytest.raises(ValueError, match="k must be greater than 0"):
        radius_multiplier_at(0.0, 1.0)


@pytest.mark.parametrize("k", [1e-6, 1.0, 1e12])
@pytest.mark.parametrize("z", [1e-8, 3.0, 1e4])
def test_extremes_are_accurate(z, k):
    with mpmath.workdps(60):
        shrink = mpmath.mpf(k) / (1 + mpmath.mpf(k))
        x = z * mpmath.sqrt(shrink)
        two = -mpmath.log1p(k) / 2 + x * x / 2
        one = mpmath.log(2) - mpmath.log1p(k) / 2 + x * x / 2 + mpmath.log(mpmath.ncdf(x))
    assert log_e_two_sided(z, k) == pytest.approx(float(two), rel=1e-14, abs=1e-15)
    assert log_e_one_sided(z, k) == pytest.approx(float(one), rel=1e-13, abs=1e-15)
