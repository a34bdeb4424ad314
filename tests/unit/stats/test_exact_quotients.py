from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.stats import _exact_quotients as exact

COUNT = st.integers(1, 2**52 - 1)
VALUE = st.integers(-(2**61) + 1, 2**61 - 1)
SMALL = st.integers(-1000, 1000)


def column(*values, dtype=np.int64):
    return np.array(values, dtype=dtype)


def nearest(numerator, denominator):
    return float(Fraction(numerator, denominator))


@settings(deadline=None, max_examples=300)
@given(n=COUNT, q=VALUE, s=VALUE, t=VALUE, lowered=COUNT)
def test_spread_quotients_are_correctly_rounded(n, q, s, t, lowered):
    for dtype in (np.int64, object):
        columns = (column(v, dtype=dtype) for v in (n, q, s))
        found = exact.spread_quotient(
            *columns, t=column(t, dtype=dtype), lowered=column(lowered, dtype=dtype)
        )
        assert found.tolist() == [nearest(n * q - s * t, n * lowered)]


@settings(deadline=None, max_examples=300)
@given(n=st.integers(2, 2**30), mean=st.integers(-(2**15), 2**15), above=SMALL, lowered=st.integers(1, 2**20))
def test_near_cancellation_keeps_every_digit(n, mean, above, lowered):
    s, q = n * mean, n * mean * mean + above
    found = exact.spread_quotient(column(n), column(q), column(s), t=column(s), lowered=column(lowered))
    assert found.tolist() == [nearest(n * q - s * s, n * lowered)]
    assert exact.any_negative_spread(column(n), column(q), column(s)) == (above < 0)


@settings(deadline=None, max_examples=300)
@given(n=COUNT, s=VALUE)
def test_quotients_are_correctly_rounded(n, s):
    for dtype in (np.int64, object):
        assert exact.quotient(column(s, dtype=dtype), column(n, dtype=dtype)).tolist() == [nearest(s, n)]


def test_a_pair_of_floats_stays_within_its_bound():
    rng = np.random.default_rng(1)
    n = rng.integers(1, 2**52, 3000)
    q, s, t = rng.integers(-(2**61), 2**61, (3, 3000))
    high, low, size = exact._spread_pair(n, q, s, t=t)
    for i in range(0, 3000, 30):
        true = int(n[i]) * int(q[i]) - int(s[i]) * int(t[i])
        error = abs(Fraction(high[i]) + Fraction(low[i]) - true)
        assert error < Fraction(2) ** -100 * Fraction(size[i])


def test_where_floats_leave_a_doubt_python_decides():
    # Half way between two floats: the rounding test cannot settle it.
    n, q = column(1), column(2**53 + 1)
    high, low = exact._pair(q)
    _, certain = exact._pair_quotient(high, low, d=(np.ones(1), np.zeros(1)), size=high)
    assert not certain.any()
    assert exact.quotient(q, n).tolist() == [2.0**53]


def test_integers_are_read_from_anything_whole():
    for value in ([1, 2], np.array([1, 2], dtype=np.uint16), np.array([1, 2], dtype=object)):
        assert exact.integers("n", value).dtype == np.int64
    assert exact.integers("n", [2**70, 1]).dtype == object
    assert exact.integers("n", [2**63, -1]).tolist() == [2**63, -1]
    assert exact.integers("n", np.array([2**63], dtype=np.uint64)).tolist() == [2**63]
    assert exact.integers("n", []).shape == (0,)


@pytest.mark.parametrize("value", [[1.0], ["1"], [None], [[1], [1, 2]], [1, 2.5], [True, 2.0], 2**70 + 0.0])
def test_anything_else_is_refused(value):
    with pytest.raises(ValueError, match="n must hold Python ints only"):
        exact.integers("n", value)
    with pytest.raises(ValueError, match="n must hold whole numbers, its type is float64"):
        exact.integers("n", np.array([1.0]))


def test_columns_that_do_not_fit_become_python_ints():
    small = {"n": column(5), "s": column(7)}
    assert exact.common_kind(small)["s"].dtype == np.int64
    assert exact.common_kind(small | {"s": column(2**61)})["n"].dtype == object
    assert exact.common_kind(small | {"n": column(2**52)})["s"].dtype == object


def test_a_quotient_beyond_floats_is_refused():
    with pytest.raises(ValueError, match="fit a float"):
        exact.quotient(column(10**400, dtype=object), column(1, dtype=object))
