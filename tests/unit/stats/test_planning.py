from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from stream_xp.stats.group_sequential import stopping
from stream_xp.stats.normal_mixture import (
    Undetermined,
    one_sided_rho2,
    radius_multiplier_one_sided,
    radius_multiplier_two_sided,
    tuned_rho2,
)
from stream_xp.stats.planning import (
    NOT_REACHED,
    absolute_effect,
    conversion_variance,
    effect_variance,
    first_look,
    fixed_detectable_effect,
    fixed_power,
    fixed_sample,
    group_sequential_sample,
    plan_difference,
    plan_guardrail,
    relative_effect,
    runtime_days,
    sequential_detectable_effect,
    sequential_power,
    sequential_sample,
    stopping_curve,
)

ALPHA = 0.05


def boundary(n, n_star, sides):
    if sides == 2:
        return radius_multiplier_two_sided(tuned_rho2(n_star, ALPHA) * n, ALPHA)
    return radius_multiplier_one_sided(one_sided_rho2(n_star, ALPHA) * n, ALPHA)


@pytest.mark.parametrize(("effect", "sides"), [(0.4, 2), (0.3, 1), (0.0, 2), (-0.05, 1)])
def test_the_curve_is_the_recursion_over_every_look(effect, sides):
    n = np.arange(50, 301)
    exact = stopping(n / 300, boundary(n, 200, sides), drift=effect / 2 * math.sqrt(300), sides=sides)
    curve = stopping_curve(effect, 4.0, alpha=ALPHA, n_star=200, sides=sides, n_last=300)
    assert curve.right[-1] == pytest.approx(sum(exact.upper), abs=1e-3)
    assert curve.wrong[-1] == pytest.approx(sum(exact.lower), abs=1e-4)
    assert curve.expected() == pytest.approx(exact.expected_information * 300, rel=3e-3)
    for by in (60, 100, 200):
        decided = sum(exact.upper[: by - 49]) + sum(exact.lower[: by - 49])
        assert curve.decided(by) == pytest.approx(decided, abs=2e-3)


def test_looking_rarely_decides_later():
    n = np.arange(50, 1001, 25)
    exact = stopping(n / 1000, boundary(n, 500, 2), drift=0.1 * math.sqrt(1000))
    curve = stopping_curve(0.2, 4.0, alpha=ALPHA, n_star=500, n_last=1000, look_every=25)
    often = stopping_curve(0.2, 4.0, alpha=ALPHA, n_star=500, n_last=1000)
    assert curve.right[-1] == pytest.approx(exact.power, abs=5e-3)
    assert curve.right[-1] < often.right[-1]


@pytest.mark.parametrize("sides", [1, 2])
def test_the_curve_against_simulation(sides):
    rng = np.random.default_rng(11)
    n = np.arange(50, 1001)
    steps = rng.standard_normal((3000, 1000), dtype=np.float32) + np.float32(0.1)
    walk = np.cumsum(steps, axis=1)[:, 49:]
    edge = boundary(n, 1000, sides) * np.sqrt(n)
    hit = np.abs(walk) >= edge if sides == 2 else walk >= edge
    stop = np.where(hit.any(axis=1), n[hit.argmax(axis=1)], 1000)
    curve = stopping_curve(0.2, 4.0, alpha=ALPHA, n_star=1000, sides=sides, n_last=1000)
    assert curve.decided(1000) == pytest.approx(hit.any(axis=1).mean(), abs=0.03)
    assert curve.expected() == pytest.approx(stop.mean(), rel=0.03)


def test_the_error_without_effect_is_below_alpha():
    curve = stopping_curve(0.0, 1.0, alpha=ALPHA, n_star=1000, n_last=10**7)
    assert 0.01 < curve.decided(10**7) < ALPHA
    assert curve.right == pytest.approx(curve.wrong)
    assert curve.quantile(0.5) == Undetermined(NOT_REACHED)


def test_curve_is_a_distribution():
    curve = stopping_curve(0.1, 1.0, alpha=ALPHA, n_star=2000)
    assert (np.diff(curve.right) >= 0).all()
    assert (np.diff(curve.wrong) >= 0).all()
    assert curve.decided(curve.n[-1]) == pytest.approx(1.0, abs=1e-5)
    assert curve.power(10) == 0.0
    quantiles = [curve.quantile(p) for p in (0.1, 0.5, 0.9)]
    assert quantiles == sorted(quantiles)
    for p, n in zip((0.1, 0.5, 0.9), quantiles, strict=True):
        assert curve.decided(n) == pytest.approx(p, abs=1e-9)
    assert curve.power(curve.sample_for_power(0.8)) == pytest.approx(0.8, abs=1e-9)
    assert curve.expected(40) == 40
    assert curve.expected(500) < curve.expected(5000) <= curve.expected()


@settings(deadline=None, max_examples=10)
@given(st.floats(1e-3, 1e3), st.floats(0.05, 0.5))
def test_only_the_drift_matters(unit, drift):
    here = sequential_power(drift, 1.0, n=400, alpha=ALPHA, n_star=400)
    there = sequential_power(drift * unit, unit**2, n=400, alpha=ALPHA, n_star=400)
    assert here == pytest.approx(there, rel=1e-9)


def test_sample_and_detectable_effect_are_inverse():
    for sides in (1, 2):
        n = sequential_sample(0.1, 1.0, alpha=ALPHA, power=0.8, sides=sides)
        assert sequential_power(0.1, 1.0, n=n, alpha=ALPHA, n_star=n, sides=sides) == pytest.approx(
            0.8, abs=1e-3
        )
        effect = sequential_detectable_effect(1.0, n=n, alpha=ALPHA, power=0.8, sides=sides)
        assert effect == pytest.approx(0.1, rel=1e-3)
        assert n > fixed_sample(0.1, 1.0, alpha=ALPHA, power=0.8, sides=sides)
    assert sequential_sample(10.0, 1.0, alpha=ALPHA, power=0.8) == 50


def test_fixed_test():
    n = fixed_sample(0.2, 4.0, alpha=ALPHA, power=0.8)
    assert n == pytest.approx(4.0 * ((norm.isf(0.025) + norm.ppf(0.8)) / 0.2) ** 2)
    assert fixed_power(0.2, 4.0, n=n, alpha=ALPHA) == pytest.approx(0.8)
    assert fixed_power(-0.2, 4.0, n=n, alpha=ALPHA) == pytest.approx(0.8)
    assert fixed_detectable_effect(4.0, n=n, alpha=ALPHA, power=0.8) == pytest.approx(0.2)
    assert fixed_sample(0.2, 4.0, alpha=0.025, power=0.8, sides=1) == pytest.approx(n)
    grid = fixed_sample(np.array([0.1, 0.2]), 4.0, alpha=np.array([[0.05], [0.01]]), power=0.8)
    assert grid.shape == (2, 2)
    assert grid[0, 0] == pytest.approx(4 * grid[0, 1])


def test_group_sequential_lies_between():
    largest, expected = group_sequential_sample(0.2, 4.0, alpha=ALPHA, power=0.8)
    fixed = fixed_sample(0.2, 4.0, alpha=ALPHA, power=0.8)
    assert expected < fixed < largest < sequential_sample(0.2, 4.0, alpha=ALPHA, power=0.8)
    single = group_sequential_sample(0.2, 4.0, alpha=ALPHA, power=0.8, information=(1.0,))
    assert single == pytest.approx((fixed, fixed))


def test_plan():
    plan = plan_difference(-0.1, 4.0, alpha=ALPHA)
    assert plan.effect == 0.1
    assert plan.power_at_n_star == pytest.approx(0.8, abs=1e-3)
    assert plan.detectable_effect == pytest.approx(0.1, rel=1e-3)
    assert plan.median_n < plan.expected_n < plan.n_star
    assert plan.n_star * 0.95 < plan.expected_n_null < plan.n_star
    assert plan.n_for_power == pytest.approx(plan.n_star, rel=2e-3)
    assert plan.fixed_power_at_n_star > 0.9
    assert plan.group_sequential_expected_n < plan.fixed_n < plan.group_sequential_n < plan.n_star
    given_sample = plan_difference(0.1, 4.0, alpha=ALPHA, n_star=3000)
    assert given_sample.n_star == 3000
    assert given_sample.power_at_n_star < 0.8
    assert given_sample.detectable_effect > 0.1
    assert given_sample.n_for_power > 3000
    assert plan_difference(9.0, 4.0, alpha=ALPHA).n_star == 51


GUARDRAIL = {
    "control_mean": 10.0, "control_variance": 4.0, "treatment_variance": 4.0, "margin": -0.02,
    "margin_kind": "relative", "side": "above", "alpha": 0.05, "n_star": 30_000,
}  # fmt: skip


def test_guardrail():
    plan = plan_guardrail(**GUARDRAIL, treatment_share=0.1)
    assert plan.effect == pytest.approx(0.2)
    assert plan.variance == pytest.approx(4.0 / 0.1 + 0.98**2 * 4.0 / 0.9)
    assert plan.curve.n[0] == pytest.approx(250)
    assert plan.sides == 1
    absolute = plan_guardrail(**(GUARDRAIL | {"margin": 0.2, "margin_kind": "absolute", "side": "below"}))
    assert absolute.effect == pytest.approx(0.2)
    assert absolute.variance == pytest.approx(16.0)
    negative = plan_guardrail(**(GUARDRAIL | {"control_mean": -10.0}))
    assert negative.variance == pytest.approx(8.0 + 1.02**2 * 8.0)
    better = plan_guardrail(**(GUARDRAIL | {"effect": 0.1}))
    assert better.effect == pytest.approx(0.3)


def test_conversions_of_units():
    assert effect_variance(4.0, 1.0) == pytest.approx(10.0)
    assert effect_variance(4.0, 1.0, treatment_share=np.array([0.1, 0.5])) == pytest.approx(
        [10 + 4 / 0.9, 10]
    )
    assert conversion_variance(0.2) == pytest.approx(0.16)
    assert absolute_effect(0.1, baseline=-5.0) == pytest.approx(0.5)
    assert relative_effect(0.5, baseline=-5.0) == pytest.approx(0.1)
    assert runtime_days(np.array([100.0, 50.0]), units_per_day=25).tolist() == [4.0, 2.0]
    assert (first_look(0.5), first_look(0.1), first_look(0.9)) == (50, 250, 250)


def test_large_samples_are_planned():
    plan = plan_difference(1e-5, 1.0, alpha=ALPHA, n_first=5000)
    assert 1e11 < plan.n_star < 1e12
    assert plan.power_at_n_star == pytest.approx(0.8, abs=2e-3)


CURVE = stopping_curve(0.1, 1.0, alpha=ALPHA, n_star=100, n_last=200)


def curve(**changes):
    return stopping_curve(**({"effect": 0.1, "variance": 1.0, "alpha": 0.05, "n_star": 100} | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: effect_variance(-1.0, 1.0), "control_variance must not be negative"),
        (lambda: effect_variance(1.0, 1.0, treatment_share=1.0), "treatment_share must lie strictly"),
        (lambda: conversion_variance(0.0), "rate must lie strictly"),
        (lambda: absolute_effect(0.1, baseline=0.0), "baseline must not be 0"),
        (lambda: relative_effect(math.nan, baseline=1.0), "absolute must be finite"),
        (lambda: runtime_days(1.0, units_per_day=0.0), "units_per_day must be greater than 0"),
        (lambda: first_look(1.0), "treatment_share must lie strictly"),
        (lambda: fixed_sample(0.0, 1.0, alpha=0.05, power=0.8), "effect must not be 0"),
        (lambda: fixed_sample(1.0, 1.0, alpha=0.05, power=0.02), "power must be greater than alpha / sides"),
        (lambda: fixed_sample(1.0, 1.0, alpha=0.05, power=0.8, sides=3), "sides must be 1 or 2"),
        (lambda: fixed_sample(1e-200, 1.0, alpha=0.05, power=0.8), "effect must be large enough"),
        (lambda: fixed_power(1.0, 1.0, n=0, alpha=0.05), "n must be greater than 0"),
        (lambda: group_sequential_sample(0.0, 1.0, alpha=0.05, power=0.8), "effect must not be 0"),
        (lambda: curve(effect=0.0), "n_last must be given"),
        (lambda: curve(effect=-1.0, sides=1), "n_last must be given"),
        (lambda: curve(effect=1e-12), "n_last must be given where a decision takes more"),
        (lambda: curve(effect=math.nan), "effect must be finite"),
        (lambda: curve(variance=0.0), "variance must be greater than 0"),
        (lambda: curve(alpha=1.0), "alpha must lie strictly"),
        (lambda: curve(alpha=0.6, sides=1), "alpha must lie strictly between 0 and 0.5"),
        (lambda: curve(n_star=0), "n_star must be greater than 0"),
        (lambda: curve(sides=0), "sides must be 1 or 2"),
        (lambda: curve(n_first=0), "n_first must be greater than 0"),
        (lambda: curve(n_last=50), "n_last must be greater than n_first"),
        (lambda: curve(n_last=1e250), "n_last must be within a factor"),
        (lambda: curve(look_every=0), "look_every must be greater than 0"),
        (lambda: curve(look_every=51), "look_every must be at most n_first"),
        (lambda: CURVE.power(201), "n must be at most the end of the curve"),
        (lambda: CURVE.quantile(1.0), "probability must lie strictly"),
        (lambda: CURVE.sample_for_power(0.0), "power must lie strictly"),
        (lambda: sequential_sample(1e-9, 1.0, alpha=0.05, power=0.8), "effect must be large enough"),
        (
            lambda: sequential_sample(-1.0, 1.0, alpha=0.05, power=0.8, sides=1),
            "effect must be greater than 0",
        ),
        (
            lambda: sequential_detectable_effect(1.0, n=100, alpha=0.05, power=1 - 1e-9),
            "power must be at most",
        ),
        (lambda: plan_difference(0.1, 1.0, alpha=0.05, n_star=50), "n_star must be greater than n_first"),
        (lambda: plan_guardrail(**(GUARDRAIL | {"margin_kind": "percent"})), "margin_kind must be"),
        (lambda: plan_guardrail(**(GUARDRAIL | {"side": "up"})), "side must be"),
        (lambda: plan_guardrail(**(GUARDRAIL | {"margin": -1.0})), "margin must be greater than -1"),
        (lambda: plan_guardrail(**(GUARDRAIL | {"effect": -0.2})), "effect must lie beyond the margin"),
        (lambda: plan_guardrail(**(GUARDRAIL | {"control_variance": -1.0})), "control_variance must not be"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
