from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.stats.multiplicity import (
    e_bh,
    e_bonferroni,
    e_holm,
    equal_levels,
    log_e_values,
    sequential_bonferroni,
)

PROCEDURES = [e_bonferroni, e_holm, e_bh]
E_VALUES = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=8)


def closure(e):
    """Closed testing with averages: the smallest average over the subsets that hold each hypothesis."""
    subsets = [s for r in range(1, len(e) + 1) for s in itertools.combinations(range(len(e)), r)]
    return [min(sum(e[j] for j in s) / len(s) for s in subsets if i in s) for i in range(len(e))]


@settings(deadline=None, max_examples=150)
@given(E_VALUES)
def test_e_holm_is_the_closed_test(e):
    adjusted = e_holm(log_e_values(e), alpha=0.05).adjusted
    assert adjusted == pytest.approx(closure(e), rel=1e-12, abs=1e-300)


@settings(deadline=None)
@given(E_VALUES, st.floats(0.001, 0.5))
def test_e_bh_is_the_step_up_rule(e, alpha):
    got = e_bh(log_e_values(e), alpha=alpha)
    ordered, m = sorted(e, reverse=True), len(e)
    k = max((k for k in range(1, m + 1) if ordered[k - 1] * k * alpha >= m * (1 + 1e-9)), default=0)
    loose = max((k for k in range(1, m + 1) if ordered[k - 1] * k * alpha >= m * (1 - 1e-9)), default=0)
    assert k <= got.rejected.sum() <= max(k, sum(v >= ordered[loose - 1] for v in e) if loose else 0)
    if k:
        assert all(r == (v >= ordered[k - 1]) for r, v in zip(got.rejected, e, strict=True)) or k != loose


@settings(deadline=None)
@given(E_VALUES, st.floats(0.001, 0.5), st.randoms(use_true_random=False))
def test_order_given_and_consistency(e, alpha, rng):
    shuffled = list(range(len(e)))
    rng.shuffle(shuffled)
    for procedure in PROCEDURES:
        got = procedure(log_e_values(e), alpha=alpha)
        other = procedure(log_e_values([e[i] for i in shuffled]), alpha=alpha)
        assert other.log_adjusted.tolist() == pytest.approx(got.log_adjusted[shuffled].tolist(), rel=1e-12)
        clear = np.abs(got.log_adjusted + math.log(alpha)) > 1e-9
        assert (got.rejected == (got.adjusted >= 1 / alpha))[clear].all()
        # A larger e-value is never adjusted to a smaller one.
        order = np.argsort(e, kind="stable")
        assert (np.diff(got.adjusted[order]) >= -1e-9 * got.adjusted[order][1:]).all()


@settings(deadline=None)
@given(E_VALUES, st.floats(0.001, 0.5))
def test_e_holm_rejects_at_least_what_bonferroni_rejects(e, alpha):
    bonferroni, holm, bh = (p(log_e_values(e), alpha=alpha).log_adjusted for p in PROCEDURES)
    assert (holm >= bonferroni - 1e-12).all()
    assert (bh >= bonferroni - 1e-12).all()


def test_the_largest_e_value_may_be_averaged_with_all_others_but_itself():
    # 0.5 and 65 stand in one subset: (0.5 + 65) / 2. Stopping one prefix too early would give 65 / 1.
    assert e_holm(log_e_values([65.0, 0.5]), alpha=0.05).adjusted == pytest.approx([32.75, 0.5])
    four = [80.0, 2.0, 40.0, 9.0]
    assert e_holm(log_e_values(four), alpha=0.05).adjusted == pytest.approx(closure(four))


def test_an_exact_tie_rejects():
    for m in (1, 2, 3, 5, 7, 15):
        for alpha in (0.01, 0.05, 0.1, 0.2):
            tied = log_e_values([m / alpha, *([0.0] * (m - 1))])
            assert e_bonferroni(tied, alpha=alpha).rejected[0]
            assert e_holm(tied, alpha=alpha).rejected[0]
            assert e_bh(tied, alpha=alpha).rejected[0]


def test_families_are_the_leading_axes():
    rng = np.random.default_rng(1)
    log_e = rng.normal(0, 5, (3, 4, 6))
    alpha = np.array([[0.05], [0.1], [0.2]])
    for procedure in PROCEDURES:
        got = procedure(log_e, alpha=np.broadcast_to(alpha, (3, 4)))
        one = procedure(log_e[1, 2], alpha=0.1)
        assert got.log_adjusted[1, 2].tolist() == one.log_adjusted.tolist()
        assert got.rejected[1, 2].tolist() == one.rejected.tolist()


def test_large_families_and_huge_evidence():
    log_e = np.linspace(-1e8, 1e8, 3000)
    for procedure in PROCEDURES:
        got = procedure(log_e, alpha=0.05)
        assert np.isfinite(got.log_adjusted).all()
        assert np.isfinite(got.adjusted).all()
        assert got.rejected[-1]
        assert not got.rejected[0]


def test_levels():
    assert sequential_bonferroni(0.05, [0.5, 0.3, 0.2]) == pytest.approx([0.025, 0.015, 0.01])
    assert equal_levels(0.05, 4).tolist() == [0.0125] * 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: e_holm([], alpha=0.05), "log_e must have one element per hypothesis"),
        (lambda: e_holm(1.0, alpha=0.05), "log_e must have one element per hypothesis"),
        (lambda: e_bh([math.nan], alpha=0.05), "log_e must be finite"),
        (lambda: e_bh([math.inf], alpha=0.05), "log_e must be finite"),
        (lambda: e_bh(["a"], alpha=0.05), "log_e must be numeric"),
        (lambda: e_bonferroni([1.0], alpha=0.0), "alpha must lie strictly between 0 and 1"),
        (lambda: e_bonferroni([1.0, 2.0], alpha=[0.1, 0.2]), "alpha must be one level"),
        (lambda: e_bonferroni([[1.0, 2.0]], alpha=[0.1, 0.2]), "alpha must be one level"),
        (lambda: log_e_values([-1.0]), "e_values must not be negative"),
        (lambda: log_e_values([math.inf]), "e_values must be finite"),
        (lambda: sequential_bonferroni(0.05, [0.5, 0.4]), "weights must be greater than 0 and sum to 1"),
        (lambda: sequential_bonferroni(0.05, [1.0, 0.0]), "weights must be greater than 0 and sum to 1"),
        (lambda: sequential_bonferroni(0.05, 1.0), "weights must have one element"),
        (lambda: sequential_bonferroni(1.0, [1.0]), "alpha must lie strictly between 0 and 1"),
        (lambda: equal_levels(0.05, 0), "m must be a whole number"),
        (lambda: equal_levels(0.05, 2.0), "m must be a whole number"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
