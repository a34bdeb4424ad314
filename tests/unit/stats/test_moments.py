from __future__ import annotations

import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.stats import EMPTY, Moments
from stream_xp.stats._codec import pack

VALUES = st.lists(st.integers(-(10**20), 10**20), max_size=30)


@settings(deadline=None)
@given(VALUES, VALUES, VALUES)
def test_merging_is_associative_commutative_and_exact(a, b, c):
    x, y, z = (Moments.from_values(v) for v in (a, b, c))
    assert (x + y) + z == x + (y + z) == z + y + x == Moments.from_values(a + b + c)
    assert x + EMPTY == x


@settings(deadline=None)
@given(VALUES, VALUES)
def test_subtraction_undoes_a_merge(a, b):
    x, y = Moments.from_values(a), Moments.from_values(b)
    assert (x + y) - y == x


@settings(deadline=None)
@given(st.lists(st.integers(-(10**20), 10**20), min_size=2, max_size=30))
def test_mean_and_variance_are_the_rounded_exact_ones(values):
    n = len(values)
    mean = Fraction(sum(values), n)
    squares = sum((v - mean) ** 2 for v in values)
    moments = Moments.from_values(values)
    assert moments.mean(1.0) == float(mean)
    assert moments.variance(1.0) == float(squares / (n - 1))
    assert moments.sum_of_squared_deviations(1.0) == float(squares)


def test_the_scale_is_applied_after_the_division():
    moments = Moments.from_values([1, 2, 4])
    assert moments.mean(0.01) == 7 / 3 * 0.01
    assert moments.variance(0.01) == 7 / 3 * 0.01**2
    assert moments.sum_of_squared_deviations(0.01) == 14 / 3 * 0.01**2


def test_the_variance_does_not_cancel():
    big = 10**15
    assert Moments.from_values([big, big + 1, big + 2]).variance(1.0) == 1.0


def test_a_trillion_units():
    n = 10**12
    half = Moments(n, n // 2, n // 2)
    assert half.mean(1.0) == 0.5
    assert half.variance(1.0) == pytest.approx(0.25, rel=1e-11)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((-1, 0, 0), "n must not be negative"),
        ((0, 1, 1), "s and q must be 0 when n is 0"),
        ((2, 3, 4), r"q must satisfy n\*q >= s\*s"),
        ((1.0, 1, 1), "n must be a Python int"),
        ((1, True, 1), "s must be a Python int"),
        ((1, 1, None), "q must be a Python int"),
    ],
)
def test_impossible_moments_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Moments(*fields)


def test_units_that_were_never_there_cannot_be_taken_out():
    with pytest.raises(ValueError, match="n must not be negative"):
        _ = Moments(1, 1, 1) - Moments(2, 2, 2)


def test_too_few_units_are_refused():
    with pytest.raises(ValueError, match="n must be at least 1 for mean, got 0"):
        EMPTY.mean(1.0)
    with pytest.raises(ValueError, match="n must be at least 2 for variance, got 1"):
        Moments(1, 3, 9).variance(1.0)
    with pytest.raises(ValueError, match="n must be at least 1 for sum_of_squared_deviations"):
        EMPTY.sum_of_squared_deviations(1.0)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-101, 1e101])
def test_a_bad_scale_is_refused(scale):
    with pytest.raises(ValueError, match="scale must lie between"):
        Moments(2, 1, 1).mean(scale)


def test_a_value_beyond_floats_is_refused():
    huge = 10**400
    with pytest.raises(ValueError, match="fit a float"):
        Moments(1, huge, huge**2).mean(1.0)


def test_adding_anything_else_is_a_type_error():
    with pytest.raises(TypeError):
        _ = EMPTY + 1
    with pytest.raises(TypeError):
        _ = EMPTY - 1


# ---- monoid and written forms ------------------------------------------------------------------------


@settings(deadline=None)
@given(VALUES, VALUES)
def test_merge_is_addition_and_empty_its_identity(a, b):
    x, y = Moments.from_values(a), Moments.from_values(b)
    assert x.merge(y) == x + y == y.merge(x)
    assert x.merge(Moments.empty()) == Moments.empty().merge(x) == x
    assert Moments.empty() == EMPTY


@settings(deadline=None)
@given(VALUES)
def test_both_written_forms_round_trip_and_are_canonical(values):
    moments = Moments.from_values(values)
    again = Moments.from_values(values[::-1])
    assert Moments.from_bytes(moments.to_bytes()) == moments
    assert Moments.from_json(json.loads(json.dumps(moments.to_json()))) == moments
    assert again.to_bytes() == moments.to_bytes()
    assert again.to_json() == moments.to_json()


def test_the_written_forms_are_these():
    moments = Moments.from_values([3, -5])
    assert moments.to_bytes()[:5] == b"MOMT\x01"
    assert moments.to_json() == {"version": 1, "n": "2", "s": "-2", "q": "34"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Moments.from_bytes(pack("MOMT", 1, (1, 2))), "data must hold the 3 integers n, s and q"),
        (lambda: Moments.from_bytes(pack("MOMT", 1, (2, 3, 4))), r"q must satisfy n\*q >= s\*s"),
        (lambda: Moments.from_bytes(pack("MOMT", 2, (1, 2, 4))), "data must be of version 1"),
        (lambda: Moments.from_bytes(pack("CRSM", 1, (1, 2, 4))), "data must be a statistic of kind 'MOMT'"),
        (lambda: Moments.from_bytes(b"MOMT"), "data must be a whole binary statistic"),
        (lambda: Moments.from_json({"n": 1, "s": 2, "q": 4}), "version must be 1, got None"),
        (lambda: Moments.from_json({"version": 1, "n": 1, "s": 2}), "q must be an integer"),
        (lambda: Moments.from_json({"version": 1, "n": -1, "s": 0, "q": 0}), "n must not be negative"),
    ],
)
def test_bad_written_forms_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
