from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.stats import Moments
from stream_xp.stats._codec import pack
from stream_xp.stats.cross_moments import CrossMoments

VALUE = st.integers(-(10**20), 10**20)
PAIRS = st.lists(st.tuples(VALUE, VALUE), max_size=20)


@settings(deadline=None)
@given(PAIRS, PAIRS, PAIRS)
def test_merging_is_associative_commutative_and_exact(a, b, c):
    x, y, z = (CrossMoments.from_pairs(v) for v in (a, b, c))
    assert (x + y) + z == x + (y + z) == z.merge(y).merge(x) == CrossMoments.from_pairs(a + b + c)
    assert x + CrossMoments.empty() == CrossMoments.empty() + x == x


@settings(deadline=None)
@given(PAIRS, PAIRS)
def test_subtraction_undoes_a_merge(a, b):
    x, y = CrossMoments.from_pairs(a), CrossMoments.from_pairs(b)
    assert (x + y) - y == x


@settings(deadline=None)
@given(PAIRS)
def test_both_written_forms_round_trip_and_are_canonical(pairs):
    moments, again = CrossMoments.from_pairs(pairs), CrossMoments.from_pairs(pairs[::-1])
    assert CrossMoments.from_bytes(moments.to_bytes()) == moments
    assert CrossMoments.from_json(json.loads(json.dumps(moments.to_json()))) == moments
    assert again.to_bytes() == moments.to_bytes()


def test_the_written_forms_are_these():
    moments = CrossMoments.from_pairs([(1, -2), (3, 4)])
    assert moments.to_bytes()[:5] == b"CRSM\x01"
    fields = {"n": "2", "sx": "4", "sy": "2", "sxx": "10", "syy": "20", "sxy": "10"}
    assert moments.to_json() == {"version": 1} | fields


@settings(deadline=None)
@given(st.lists(st.tuples(VALUE, VALUE), min_size=2, max_size=20))
def test_means_variances_and_covariance_are_the_rounded_exact_ones(pairs):
    n = len(pairs)
    mx, my = (Fraction(sum(p[i] for p in pairs), n) for i in (0, 1))
    moments = CrossMoments.from_pairs(pairs)
    assert (moments.mean_x(1.0), moments.mean_y(1.0)) == (float(mx), float(my))
    assert moments.variance_x(1.0) == float(sum((x - mx) ** 2 for x, _ in pairs) / (n - 1))
    assert moments.variance_y(1.0) == float(sum((y - my) ** 2 for _, y in pairs) / (n - 1))
    covariance = float(sum((x - mx) * (y - my) for x, y in pairs) / (n - 1))
    assert moments.covariance(scale_x=1.0, scale_y=1.0) == covariance


def test_covariance_is_the_usual_one_in_metric_units():
    rng = np.random.default_rng(1)
    x, y = rng.integers(-500, 500, (2, 60))
    moments = CrossMoments.from_pairs(zip(x.tolist(), y.tolist(), strict=True))
    expected = np.cov(x * 0.1, y * 0.01)
    assert moments.covariance(scale_x=0.1, scale_y=0.01) == pytest.approx(expected[0, 1], rel=1e-12)
    assert moments.variance_x(0.1) == pytest.approx(expected[0, 0], rel=1e-12)


def test_the_covariance_does_not_cancel():
    big = 10**15
    moments = CrossMoments.from_pairs([(big, big), (big + 1, big + 2), (big + 2, big + 4)])
    assert moments.covariance(scale_x=1.0, scale_y=1.0) == 2.0


def test_views_are_the_moments_of_each_side():
    pairs = [(1, 10), (2, 20), (5, -3)]
    moments = CrossMoments.from_pairs(pairs)
    assert moments.moments_x == Moments.from_values([1, 2, 5])
    assert moments.moments_y == Moments.from_values([10, 20, -3])
    assert moments.integers == (3, 8, 27, 30, 509, 35)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((-1, 0, 0, 0, 0, 0), "n must not be negative"),
        ((0, 0, 0, 0, 1, 0), "sx, sy, sxx, syy and sxy must be 0 when n is 0"),
        ((2, 3, 0, 4, 0, 0), r"sxx must satisfy n\*sxx >= sx\*sx"),
        ((2, 0, 3, 0, 4, 0), r"syy must satisfy n\*syy >= sy\*sy"),
        ((2, 0, 0, 2, 2, 3), "sxy must satisfy"),
        ((2, 0, 0, 0, 2, 1), "sxy must satisfy"),
        ((2.0, 0, 0, 0, 0, 0), "n must be a Python int"),
        ((2, 0, 0, 0, 0, np.int64(0)), "sxy must be a Python int"),
    ],
)
def test_impossible_moments_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CrossMoments(*fields)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CrossMoments.from_bytes(pack("CRSM", 1, (1, 2))), "data must hold the 6 integers n, sx"),
        (lambda: CrossMoments.from_bytes(pack("CRSM", 2, (0,) * 6)), "data must be of version 1"),
        (
            lambda: CrossMoments.from_bytes(pack("MOMT", 1, (0,) * 6)),
            "data must be a statistic of kind 'CRSM'",
        ),
        (lambda: CrossMoments.from_json({"version": 2}), "version must be 1, got 2"),
        (lambda: CrossMoments.from_json({"version": 1, "n": "x"}), "n must be an integer"),
        (lambda: CrossMoments.from_pairs([(1, 1)]) - CrossMoments.from_pairs([(1, 1)] * 2), "n must not"),
        (lambda: CrossMoments.empty().mean_x(1.0), "n must be at least 1 for mean"),
        (lambda: CrossMoments.from_pairs([(1, 1)]).variance_y(1.0), "n must be at least 2 for variance"),
        (
            lambda: CrossMoments.from_pairs([(1, 1)]).covariance(scale_x=1.0, scale_y=1.0),
            "n must be at least 2 for covariance",
        ),
        (
            lambda: CrossMoments.from_pairs([(1, 1), (2, 2)]).covariance(scale_x=0.0, scale_y=1.0),
            "scale_x must lie between",
        ),
        (
            lambda: CrossMoments.from_pairs([(1, 1), (2, 2)]).covariance(scale_x=1.0, scale_y=1e101),
            "scale_y must lie between",
        ),
        (
            lambda: CrossMoments.from_pairs([(0, 0), (10**200, 10**200)]).covariance(
                scale_x=1.0, scale_y=1.0
            ),
            "sxy must give a covariance that fits a float",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_adding_anything_else_is_a_type_error():
    with pytest.raises(TypeError):
        _ = CrossMoments.empty() + 1
    with pytest.raises(TypeError):
        _ = CrossMoments.empty() - 1
