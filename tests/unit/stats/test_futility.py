from __future__ import annotations

import math

import numpy as np
import pytest

from stream_xp.stats import Moments, Stratum, one_sided_rho2, one_sided_test, summarise, tuned_rho2
from stream_xp.stats.batch import (
    ArmSummary,
    MomentArrays,
    means_of_summaries,
    relative_lift_arrays,
    summarise_arrays,
)
from stream_xp.stats.futility import futility, inside

ALPHA, UNITS = 0.05, 20_000
RHO2 = one_sided_rho2(float(UNITS), ALPHA)


def one(control, treatment, n=5000, variance=1.0):
    return means_of_summaries(ArmSummary(n, control, variance), ArmSummary(n, treatment, variance))


@pytest.mark.parametrize("kind", ["absolute", "relative"])
@pytest.mark.parametrize("mean", [2.0, -2.0])
def test_it_is_two_one_sided_tests(kind, mean):
    rng = np.random.default_rng(1)
    arms = [Moments.from_values(rng.integers(-9 + 2 * mean, 9 + 2 * mean, 900).tolist()) for _ in range(2)]
    means = summarise([Stratum(*arms)], scale=0.5)
    arrays = summarise_arrays(*(MomentArrays([[m.n]], [[m.s]], [[m.q]]) for m in arms), scale=0.5)
    got = futility(arrays, minimum_effect=0.3, kind=kind, alpha=ALPHA, rho2=RHO2)
    tests = [
        one_sided_test(means, margin=sign * 0.3, margin_kind=kind, side=side, alpha=ALPHA, rho2=RHO2)
        for sign, side in ((1, "below"), (-1, "above"))
    ]
    assert (got.log_e_small[0], got.log_e_not_bad[0]) == pytest.approx([t.log_e for t in tests], rel=1e-12)
    assert got.log_e[0] == min(got.log_e_small[0], got.log_e_not_bad[0])
    both = tests[0].upper < 0 < tests[1].lower
    assert got.proven(ALPHA)[0] == both


def test_what_counts_as_worth_having():
    bad = one(1.0, 0.5)
    kinds = {w: futility(bad, minimum_effect=0.2, kind="absolute", alpha=ALPHA, rho2=RHO2, wanted=w) for w in
             ("both", "above", "below")}  # fmt: skip
    assert {w: bool(f.proven(ALPHA)) for w, f in kinds.items()} == {
        "both": False,
        "above": True,
        "below": False,
    }
    none = one(1.0, 1.0)
    assert futility(none, minimum_effect=0.2, kind="absolute", alpha=ALPHA, rho2=RHO2).proven(ALPHA)


def test_trivial_effects_are_futile_although_they_are_there():
    means = one(1.0, 1.1, n=10_000)
    got = futility(means, minimum_effect=0.2, kind="absolute", alpha=ALPHA, rho2=RHO2)
    assert got.proven(ALPHA)
    above = futility(means, minimum_effect=1e-9, kind="absolute", alpha=ALPHA, rho2=RHO2).log_e_not_bad
    assert above > 3


def test_undetermined_means_are_not_futile():
    got = futility(one(1.0, 1.0, n=10), minimum_effect=5.0, kind="absolute", alpha=ALPHA, rho2=RHO2)
    assert got.reason != 0
    assert not got.proven(ALPHA)
    assert not inside(-np.inf, np.inf, 1.0)
    assert inside([-0.1, -1.0, -0.1], [0.1, 0.5, np.inf], 1.0).tolist() == [True, False, False]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_lift_by_fieller_is_never_sooner(sign):
    rng = np.random.default_rng(3)
    n, shifts = 4000, rng.normal(0, 0.06, 200)
    means = means_of_summaries(ArmSummary(n, sign * 1.0, 1.0), ArmSummary(n, sign * (1.0 + shifts), 1.5))
    lift = relative_lift_arrays(means, alpha=ALPHA, rho2=tuned_rho2(float(UNITS), ALPHA))
    by_lift = inside(lift.lower, lift.upper, 0.15)
    tests = futility(means, minimum_effect=0.15, kind="relative", alpha=ALPHA, rho2=RHO2).proven(ALPHA)
    assert 10 < by_lift.sum() < tests.sum() < 200
    assert (tests | ~by_lift).all()


# ---- error rate and power -----------------------------------------------------------------------------


def ever_futile(effect, *, kind="absolute", minimum=0.02, share=0.5, paths=1000, looks=50, seed=1):
    """Share of paths that are ever called futile: conversions at 10 % in control."""
    rng = np.random.default_rng(seed)
    treated = rng.binomial(UNITS // looks, share, (paths, looks))
    drawn_units = np.stack([UNITS // looks - treated, treated])
    rates = np.array([0.1, 0.1 + effect]).reshape(2, 1, 1)
    n, s = drawn_units.cumsum(axis=-1), rng.binomial(drawn_units, rates).cumsum(axis=-1)
    arms = [MomentArrays(*(c[..., np.newaxis] for c in (n[i], s[i], s[i]))) for i in (0, 1)]
    means = summarise_arrays(*arms, scale=1.0)
    return (
        futility(means, minimum_effect=minimum, kind=kind, alpha=ALPHA, rho2=RHO2)
        .proven(ALPHA)
        .any(axis=1)
        .mean()
    )


@pytest.mark.parametrize(
    ("effect", "kind", "minimum", "share"),
    [(0.02, "absolute", 0.02, 0.5), (-0.02, "absolute", 0.02, 0.1), (0.03, "relative", 0.3, 0.5)],
)
def test_an_effect_of_the_minimum_size_is_seldom_called_futile(effect, kind, minimum, share):
    assert (
        ever_futile(effect, kind=kind, minimum=minimum, share=share) <= 0.05
    )  # 0.002 to 0.016 in 2,000 paths


def test_no_effect_is_found_futile():
    assert ever_futile(0.0) > 0.9  # 0.97 in 2,000 paths
    assert ever_futile(0.03, kind="relative", minimum=0.2) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minimum_effect": 0.0}, "minimum_effect must be greater than 0"),
        ({"minimum_effect": 1.0, "kind": "relative"}, "minimum_effect must be below 1 when relative"),
        ({"kind": "log"}, "margin_kind must be"),
        ({"wanted": "up"}, "wanted must be"),
        ({"alpha": 1.0}, "alpha must lie"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"minimum_effect": 0.1, "kind": "absolute", "alpha": ALPHA, "rho2": RHO2} | change
    with pytest.raises(ValueError, match=message):
        futility(one(1.0, 1.0), **arguments)


def test_bad_ends_are_named():
    with pytest.raises(ValueError, match="lower and upper must be numbers"):
        inside(np.nan, 1.0, 1.0)
    with pytest.raises(ValueError, match="minimum_effect must be greater than 0"):
        inside(0.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="alpha must lie"):
        futility(one(1.0, 1.0), minimum_effect=0.1, kind="absolute", alpha=ALPHA, rho2=RHO2).proven(0.0)


def test_it_says_what_the_pair_is():
    assert math.isfinite(
        float(futility(one(1.0, 1.0), minimum_effect=0.1, kind="absolute", alpha=ALPHA, rho2=RHO2).log_e)
    )
