from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, norm

from stream_xp.stats.group_sequential import (
    drift_for_power,
    group_sequential,
    repeated_bounds,
    sample_inflation,
    spent_alpha,
    stopping,
)

FIVE = (0.2, 0.4, 0.6, 0.8, 1.0)
SPENDING = ["obrien_fleming", "pocock", "power", "classic_obrien_fleming", "classic_pocock"]


def design(spending, information=FIVE, *, alpha=0.05, sides=2, **more):
    phi = {"phi": 2.0} if spending == "power" else {}
    return group_sequential(information, alpha=alpha, sides=sides, spending=spending, **phi, **more)


@pytest.mark.parametrize(
    ("spending", "expected"),
    [
        ("classic_obrien_fleming", [4.5617, 3.2256, 2.6337, 2.2809, 2.0401]),
        ("classic_pocock", [2.4132] * 5),
        ("obrien_fleming", [4.8769, 3.3570, 2.6803, 2.2898, 2.0310]),
        ("pocock", [2.4380, 2.4268, 2.4102, 2.3966, 2.3860]),
        ("power", [3.0902, 2.7141, 2.4728, 2.2799, 2.1140]),
    ],
)
def test_published_critical_values(spending, expected):
    assert design(spending).z == pytest.approx(expected, abs=6e-5)


def test_published_values_at_unequal_looks():
    expected = [6.9914, 3.6128, 2.9729, 2.2665, 2.0279]
    assert design("obrien_fleming", (0.1, 0.35, 0.5, 0.8, 1.0)).z == pytest.approx(expected, abs=6e-5)


# Jennison and Turnbull (2000), tables 2.1 and 2.3: constants for two-sided alpha 0.05.
@pytest.mark.parametrize(
    ("looks", "pocock", "obrien_fleming"),
    [(1, 1.960, 1.960), (2, 2.178, 1.977), (3, 2.289, 2.004), (4, 2.361, 2.024), (8, 2.512, 2.072),
     (10, 2.555, 2.087), (20, 2.672, 2.126)],
)  # fmt: skip
def test_published_constants(looks, pocock, obrien_fleming):
    information = [k / looks for k in range(1, looks + 1)]
    assert design("classic_pocock", information).z[-1] == pytest.approx(pocock, abs=6e-4)
    assert design("classic_obrien_fleming", information).z[-1] == pytest.approx(obrien_fleming, abs=6e-4)


# The same book, tables 2.2 and 2.4, power 0.8 and 0.9.
def test_published_inflation():
    assert sample_inflation(design("classic_pocock"), power=0.9) == pytest.approx(1.207, abs=6e-4)
    assert sample_inflation(design("classic_pocock"), power=0.8) == pytest.approx(1.229, abs=6e-4)
    assert sample_inflation(design("classic_obrien_fleming"), power=0.9) == pytest.approx(1.026, abs=6e-4)
    assert sample_inflation(design("classic_obrien_fleming"), power=0.8) == pytest.approx(1.028, abs=6e-4)


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("drift", [0.0, 2.5, -1.0])
def test_stopping_is_the_multivariate_normal_probability(sides, drift):
    t, z = np.array([0.3, 0.45, 1.0]), np.array([2.3, 2.1, 1.9])
    got = stopping(t, z, drift=drift, sides=sides)
    cov = np.sqrt(np.minimum.outer(t, t) / np.maximum.outer(t, t))
    mean = drift * np.sqrt(t)
    for k in (1, 2, 3):
        # Integrated over random points: seeded, and enough of them for the tolerance below.
        joint = multivariate_normal(mean[:k], cov[:k, :k], abseps=1e-7, releps=1e-7, maxpts=2_000_000, seed=1)
        low = -z[:k] if sides == 2 else np.full(k, -np.inf)
        inside = joint.cdf(z[:k], lower_limit=low)
        stopped = sum(got.upper[:k]) + sum(got.lower[:k])
        assert 1 - inside == pytest.approx(stopped, abs=2e-6)
    assert sum(got.lower) == 0 or sides == 2


@settings(deadline=None, max_examples=25)
@given(
    steps=st.lists(st.floats(0.02, 1), min_size=1, max_size=6),
    alpha=st.floats(1e-4, 0.4),
    sides=st.sampled_from([1, 2]),
    spending=st.sampled_from(SPENDING),
)
def test_the_error_spent_is_exactly_alpha(steps, alpha, sides, spending):
    information = np.cumsum(steps) / np.sum(steps)
    information[-1] = 1.0
    got = design(spending, information, alpha=alpha, sides=sides)
    check = stopping(got.information, got.z, sides=sides) if min(got.z) > 0 else None
    assert got.alpha_spent[-1] == pytest.approx(alpha, rel=1e-9)
    assert (np.diff(got.alpha_spent) > 0).all()
    if check:
        spent = np.cumsum(check.upper) + np.cumsum(check.lower)
        assert spent == pytest.approx(got.alpha_spent, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("spending", ["obrien_fleming", "pocock", "power"])
def test_earlier_values_do_not_depend_on_later_looks(spending):
    assert design(spending, (0.2, 0.4, 0.6)).z == pytest.approx(design(spending).z[:3], rel=1e-12)
    assert design(spending, (0.2, 0.4, 0.61, 0.99)).z[:2] == pytest.approx(design(spending).z[:2], rel=1e-12)


def test_a_single_look_is_the_fixed_test():
    for spending in SPENDING:
        assert design(spending, (1.0,)).z[0] == pytest.approx(norm.isf(0.025), rel=1e-12)
        assert design(spending, (1.0,), sides=1).z[0] == pytest.approx(norm.isf(0.05), rel=1e-12)


def test_only_ratios_of_information_matter_to_classic_designs():
    for spending in ("classic_pocock", "classic_obrien_fleming"):
        assert design(spending, (0.1, 0.2, 0.5)).z == pytest.approx(design(spending, (0.2, 0.4, 1.0)).z)


def test_running_over_spends_the_rest_at_the_last_look():
    actual = np.array([0.2, 0.4, 1.15])
    got = design("obrien_fleming", actual / 1.15, spending_time=(0.2, 0.4, 1.0))
    assert got.alpha_spent[-1] == pytest.approx(0.05)
    assert got.z[:2] == pytest.approx(design("obrien_fleming", (0.2, 0.4)).z)
    assert stopping(got.information, got.z).error == pytest.approx(0.05, rel=1e-9)


def test_overlooking_the_same_bounds_errs():
    t = np.arange(1, 101) / 100
    bounds = np.full(100, design("classic_pocock").z[0])
    assert stopping(t, bounds).error > 0.12


def test_rare_first_looks_stay_finite_and_exact():
    got = design("obrien_fleming", (1e-6, 1e-3, 0.05, 0.5, 1.0))
    assert np.isfinite(got.z).all()
    with mpmath.workdps(60):
        edge = mpmath.erfinv(1 - mpmath.mpf("0.0125") * 2) * mpmath.sqrt(2)
        spent = mpmath.erfc(edge / mpmath.sqrt(mpmath.mpf("0.05")) / mpmath.sqrt(2))
        expected = mpmath.findroot(lambda z: mpmath.log(mpmath.erfc(z / mpmath.sqrt(2)) / 2 / spent), 9.9)
    assert got.z[2] == pytest.approx(float(expected), abs=1e-9)


def test_looks_next_to_each_other():
    got = design("pocock", (0.1, 0.2, 0.200001, 0.2001, 1.0))
    assert stopping(got.information, got.z).error == pytest.approx(0.05, rel=1e-8)


def test_spending_functions():
    assert spent_alpha(1.0, alpha=0.05) == pytest.approx(0.05)
    half = 2 * (2 - 2 * norm.cdf(norm.isf(0.0125) / math.sqrt(0.5)))
    assert spent_alpha(0.5, alpha=0.05) == pytest.approx(half, rel=1e-12)
    pocock = 0.05 * math.log(1 + (math.e - 1) * 0.5)
    assert spent_alpha(0.5, alpha=0.05, spending="pocock") == pytest.approx(pocock, rel=1e-12)
    power = spent_alpha(np.array([[0.5], [0.1]]), alpha=0.05, sides=1, spending="power", phi=3)
    assert power == pytest.approx(np.array([[0.05 / 8], [0.05e-3]]))


def test_power_and_expected_information():
    got = design("obrien_fleming")
    drift = drift_for_power(got, power=0.9)
    under = stopping(got.information, got.z, drift=drift)
    assert under.power == pytest.approx(0.9, abs=1e-9)
    none = 1 - under.error
    expected = np.dot(np.add(under.upper, under.lower), FIVE) + none
    assert under.expected_information == pytest.approx(expected)
    certain = stopping(FIVE, got.z, drift=1e4)
    assert certain.upper[0] == pytest.approx(1.0)
    mirrored = stopping(FIVE, got.z, drift=-drift)
    assert mirrored.lower == pytest.approx(under.upper, abs=1e-12)


def test_repeated_bounds_are_dual():
    z = design("pocock").z[2]
    lower, upper = repeated_bounds(1.0, 0.25, z=z)
    assert (lower, upper) == (1.0 - 0.25 * z, 1.0 + 0.25 * z)
    assert repeated_bounds(1.0, 0.25, z=z, sides=1) == (lower, math.inf)
    table = repeated_bounds(np.array([[1.0], [2.0]]), 0.25, z=np.array(design("pocock").z))
    assert table[0].shape == (2, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: design("pocock", ()), "information must be a list of at least one look"),
        (lambda: design("pocock", (0.5, 0.5)), "information must be strictly increasing in"),
        (lambda: design("pocock", (0.0, 0.5)), "information must be strictly increasing in"),
        (lambda: design("pocock", (0.5, 1.01)), "information must be strictly increasing in"),
        (lambda: design("pocock", (0.5, math.nan)), "information must be finite"),
        (lambda: design("pocock", (0.5, 0.5 + 1e-10)), "information must grow by at least"),
        (lambda: design("pocock", alpha=1.0), "alpha must lie strictly between 0 and 1"),
        (lambda: design("pocock", alpha=0.5, sides=1), "alpha must lie strictly between 0 and 0.5"),
        (lambda: design("pocock", sides=3), "sides must be 1 or 2"),
        (lambda: design("haybittle"), "spending must be one of"),
        (lambda: design("pocock", spending_time=(0.5, 1.0)), "spending_time must have 5 looks"),
        (lambda: design("classic_pocock", spending_time=FIVE), "spending_time must not be given"),
        (
            lambda: group_sequential(FIVE, alpha=0.05, spending="power", phi=1e-20),
            "spending_time must step far enough",
        ),
        (lambda: group_sequential(FIVE, alpha=0.05, spending="power"), "phi must be given"),
        (lambda: group_sequential(FIVE, alpha=0.05, spending="pocock", phi=2), "phi must be given"),
        (lambda: group_sequential(FIVE, alpha=0.05, spending="power", phi=0), "phi must be greater than 0"),
        (lambda: spent_alpha(1.5, alpha=0.05), "information must lie in"),
        (lambda: spent_alpha(0.5, alpha=0.05, spending="classic_pocock"), "spending must be one of"),
        (lambda: stopping(FIVE, (2.0,)), "z must have 5 looks"),
        (lambda: stopping((1.0,), (-1.0,)), "z must be greater than 0"),
        (lambda: stopping((1.0,), (2.0,), drift=math.inf), "drift must be finite"),
        (lambda: stopping((1.0,), (2.0,), sides=0), "sides must be 1 or 2"),
        (lambda: drift_for_power(design("pocock"), power=0.02), "power must be greater than alpha / sides"),
        (lambda: repeated_bounds(1.0, 0.0, z=2.0), "standard_error must be greater than 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
