from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_xp.stats.early_evidence import EXACT_SHARE, early_one_sided, early_two_sided
from stream_xp.stats.normal_mixture import (
    log_e_one_sided,
    log_e_two_sided,
    radius_multiplier_one_sided,
    radius_multiplier_two_sided,
)

NONE = -math.inf
ALPHA = 0.05
LOG_E = st.floats(-50, 50) | st.just(NONE)


def two(estimate, se, k, *, above=NONE, below=NONE, alpha=ALPHA):
    found = early_two_sided(estimate, se, k, alpha=alpha, log_e_above=above, log_e_below=below)
    return float(found.lower), float(found.upper), float(found.log_e)


def one(excess, se, k, *, exact=NONE, alpha=ALPHA, above=True):
    found = early_one_sided(excess, se, k, alpha=alpha, above=above, log_e_exact=exact)
    return float(found.lower), float(found.upper), float(found.log_e)


def test_without_exact_evidence_it_is_the_asymptotic_sequence_at_its_share_of_alpha():
    lower, upper, log_e = two(1.3, 0.5, 2.0)
    half = 0.5 * radius_multiplier_two_sided(2.0, (1 - EXACT_SHARE) * ALPHA)
    assert (lower, upper) == pytest.approx((1.3 - half, 1.3 + half), rel=1e-12)
    assert log_e == pytest.approx(math.log(1 - EXACT_SHARE) + log_e_two_sided(2.6, 2.0), rel=1e-12)
    lower, upper, log_e = one(1.3, 0.5, 2.0)
    assert lower == pytest.approx(
        1.3 - 0.5 * radius_multiplier_one_sided(2.0, (1 - EXACT_SHARE) * ALPHA), rel=1e-12
    )
    assert upper == math.inf
    assert log_e == pytest.approx(math.log(1 - EXACT_SHARE) + log_e_one_sided(2.6, 2.0), rel=1e-12)


def test_before_the_asymptotic_sequence_the_exact_test_speaks_alone():
    enough = math.log(2 / EXACT_SHARE / ALPHA)
    assert two(0.2, 0.0, 1.0, above=enough + 1e-9)[:2] == (0.0, math.inf)
    assert two(-0.2, 0.0, 1.0, below=enough + 1e-9)[:2] == (-math.inf, 0.0)
    assert two(0.2, 0.0, 1.0, above=enough - 1e-9)[:2] == (-math.inf, math.inf)
    assert one(0.2, 0.0, 1.0, exact=enough - math.log(2) + 1e-9)[:2] == (0.0, math.inf)
    assert two(0.2, 0.0, 1.0) == (-math.inf, math.inf, 0.0)


def test_exact_evidence_only_narrows_its_own_side():
    plain = two(0.8, 0.5, 2.0)
    helped = two(0.8, 0.5, 2.0, above=4.0)
    assert plain[0] < helped[0] <= 0
    assert helped[1] == plain[1]


def test_exact_evidence_alone_moves_the_bound_to_0_and_no_further():
    lower, upper, log_e = two(0.8, 0.5, 2.0, above=100.0)
    assert lower == 0.0
    assert upper > 0.8
    assert log_e == pytest.approx(100 + math.log(EXACT_SHARE / 2))


@given(st.floats(-6, 6), st.floats(0.01, 100), LOG_E, LOG_E, st.floats(0.001, 0.5))
def test_two_sided_duality(z, k, above, below, alpha):
    lower, upper, log_e = two(z, 1.0, k, above=above, below=below, alpha=alpha)
    assert (log_e >= -math.log(alpha)) == (not lower < 0 < upper)


@given(st.floats(-6, 6), st.floats(0.01, 100), LOG_E, st.floats(0.001, 0.5), st.booleans())
def test_one_sided_duality(z, k, exact, alpha, above):
    lower, upper, log_e = one(z, 1.0, k, exact=exact, alpha=alpha, above=above)
    assert (log_e >= -math.log(alpha)) == (not lower < 0 < upper)


@given(st.floats(-4, 4), st.floats(0.1, 10), st.floats(-5, 8), st.floats(-5, 8))
def test_bounds_are_those_of_the_averaged_e_value(z, k, above, below):
    lower, upper, _ = two(z, 1.0, k, above=above, below=below)

    def e(d):
        exact = above if d <= 0 else below
        mixed = EXACT_SHARE / 2 * math.exp(exact)
        return mixed + (1 - EXACT_SHARE) * math.exp(float(log_e_two_sided(z - d, k)))

    if math.isfinite(lower) and lower not in (0.0, -5e-324):
        assert e(lower) == pytest.approx(1 / ALPHA, rel=1e-9)
    if math.isfinite(upper) and upper not in (0.0, 5e-324):
        assert e(upper) == pytest.approx(1 / ALPHA, rel=1e-9)


def test_arrays_are_taken_element_by_element():
    z = np.array([-1.0, 0.0, 3.0])
    found = early_two_sided(z, [1.0, 0.0, 1.0], 2.0, alpha=ALPHA, log_e_above=3.0, log_e_below=NONE)
    for i, se in enumerate([1.0, 0.0, 1.0]):
        assert (found.lower[i], found.upper[i], found.log_e[i]) == two(z[i], se, 2.0, above=3.0)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"estimate": math.nan}, "estimate"),
        ({"standard_error": -1.0}, "standard_error"),
        ({"k": 0.0}, "k"),
        ({"alpha": 1.0}, "alpha"),
        ({"log_e_above": math.nan}, "log_e_exact"),
        ({"log_e_below": math.inf}, "log_e_exact"),
    ],
)
def test_bad_arguments_are_named(changes, name):
    arguments = {
        "estimate": 1.0,
        "standard_error": 1.0,
        "k": 1.0,
        "alpha": ALPHA,
        "log_e_above": 0.0,
        "log_e_below": 0.0,
    } | changes
    with pytest.raises(ValueError, match=f"^{name}"):
        early_two_sided(
            arguments.pop("estimate"), arguments.pop("standard_error"), arguments.pop("k"), **arguments
        )
