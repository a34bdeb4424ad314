"""Open units: the bias against waiting and against taking them for failures, measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_xp.engine.allocation.evidence import Conversions, Values
from stream_xp.engine.allocation.maturity import (
    MaturityCurve,
    OpenUnits,
    learned_curve,
    mature_conversions,
    mature_values,
)

WINDOW = 24.0
AGES = tuple(np.arange(1.0, 25.0))
LINEAR = MaturityCurve((10.0, 20.0), (0.5, 1.0))


def exponential(scale):
    """The curve of exponential delays that are cut at the window."""
    shares = -np.expm1(-np.array(AGES) / scale)
    return MaturityCurve(AGES, (*(shares[:-1] / shares[-1]).tolist(), 1.0))


def test_the_curve_is_linear_between_its_points():
    curve = MaturityCurve((1.0, 3.0, 4.0), (0.5, 0.5, 1.0))
    assert [curve.share_at(age) for age in (0.0, 0.5, 1.0, 2.0, 3.5, 4.0, 9.0)] == [
        0.0,
        0.25,
        0.5,
        0.5,
        0.75,
        1.0,
        1.0,
    ]
    assert curve.window_ms == 4.0


def test_mature_units_alone_are_themselves():
    assert mature_conversions(Conversions(200, 30), [], LINEAR) == Conversions(200, 30)
    assert mature_values(Values(3, 6, 14), [], LINEAR) == Values(3, 6, 14)


def test_units_at_the_end_of_their_window_count_in_full():
    got = mature_conversions(Conversions(200, 30), [OpenUnits(20.0, Conversions(100, 10))], LINEAR)
    assert (got.units, got.conversions) == pytest.approx((300, 40))


def test_half_way_by_hand():
    # No mature unit, 1,000 at half of the window with 50 conversions, half of what will come: p = 0.1.
    got = mature_conversions(Conversions(0, 0), [OpenUnits(10.0, Conversions(1000, 50))], LINEAR)
    assert got.mean == pytest.approx(0.1)
    assert got.units == pytest.approx(0.5 * 1000 * 0.5 * 0.9 / 0.95)


def test_new_units_say_nothing():
    got = mature_conversions(Conversions(50, 5), [OpenUnits(0.0, Conversions(1000, 0))], LINEAR)
    assert (got.units, got.conversions) == pytest.approx((50, 5))
    values = mature_values(Values(2, 4, 10), [OpenUnits(0.0, Values(1000, 0, 0))], LINEAR)
    assert values.mean == 2.0
    assert values.units == 2.0


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 10**9),
    st.floats(0, 1),
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 10**9), st.floats(0, 1)), max_size=6),
)
def test_pseudo_sums_are_always_sums(units, rate, buckets):
    cells = [OpenUnits(age, Conversions(n, math.floor(n * share))) for age, n, share in buckets]
    got = mature_conversions(Conversions(units, math.floor(units * rate)), cells, LINEAR)
    assert 0 <= got.conversions <= got.units <= (units + sum(n for _, n, _ in buckets)) * (1 + 1e-9)
    assert got.units >= units * (1 - 1e-9)


def simulated(rng, *, rate, delay, units=4000):
    """Units that arrive evenly over two windows, seen at its end: (mature, open by hour, all that will be)."""
    ages = rng.uniform(0, 2 * WINDOW, units)
    converts = rng.random(units) < rate
    shares = -math.expm1(-WINDOW / delay)
    delays = -delay * np.log1p(-rng.random(units) * shares)
    seen = converts & (delays <= ages)
    old = ages >= WINDOW
    mature = Conversions(int(old.sum()), int((old & seen).sum()))
    hours = np.floor(ages).astype(int)
    buckets = [
        OpenUnits(h + 0.5, Conversions(int((hours == h).sum()), int(((hours == h) & seen).sum())))
        for h in range(int(WINDOW))
    ]
    return mature, buckets, int(seen.sum()) / units


def test_bias_and_error_against_waiting():
    """Rate 10 %, mean delay 8 of 24 hours, half of the units open."""
    rng = np.random.default_rng(31)
    curve, rate = exponential(8.0), 0.1
    ours, waiting, failures, units = [], [], [], []
    for _ in range(400):
        mature, buckets, as_failures = simulated(rng, rate=rate, delay=8.0)
        got = mature_conversions(mature, buckets, curve)
        ours.append(got.mean)
        units.append(got.units)
        waiting.append(mature.mean)
        failures.append(as_failures)
    error = np.std(ours) / math.sqrt(400)
    assert abs(np.mean(ours) - rate) <= 4 * error
    # Open units as failures: low by a seventh of the rate.
    assert np.mean(failures) < 0.9 * rate
    # Less error than by waiting, and as much as the pseudo-sums claim: the effective n is honest.
    assert np.var(ours) < 0.85 * np.var(waiting)
    assert np.var(ours) == pytest.approx(rate * (1 - rate) / np.mean(units), rel=0.25)


def test_an_arm_that_is_only_faster_needs_its_own_curve():
    """Equal rates, delays of 4 and 12 hours: the gap by one curve, by each arm's own, and by waiting."""
    rng = np.random.default_rng(32)
    fast, slow = exponential(4.0), exponential(12.0)
    common = MaturityCurve(AGES, tuple((np.array(fast.shares) + np.array(slow.shares)) / 2))
    gaps = {"one": [], "own": [], "waiting": []}
    for _ in range(200):
        a = simulated(rng, rate=0.1, delay=4.0)
        b = simulated(rng, rate=0.1, delay=12.0)
        for name, curves in (("one", (common, common)), ("own", (fast, slow))):
            means = [
                mature_conversions(m, cells, curve).mean
                for (m, cells, _), curve in zip((a, b), curves, strict=True)
            ]
            gaps[name].append(means[0] - means[1])
        gaps["waiting"].append(a[0].mean - b[0].mean)
    error = {name: np.std(gap) / math.sqrt(200) for name, gap in gaps.items()}
    assert np.mean(gaps["one"]) > 4 * error["one"]
    assert np.mean(gaps["one"]) < 0.02
    assert abs(np.mean(gaps["own"])) <= 4 * error["own"]
    assert abs(np.mean(gaps["waiting"])) <= 4 * error["waiting"]


def test_values_are_unbiased():
    """A unit brings its sum evenly over the window, or nothing: the curve of the sum is linear."""
    rng = np.random.default_rng(33)
    curve = MaturityCurve((WINDOW,), (1.0,))
    found, units = [], []
    for _ in range(300):
        ages = rng.uniform(0, 2 * WINDOW, 2000)
        final = rng.exponential(5.0, 2000) * (rng.random(2000) < 0.4)
        old = ages >= WINDOW
        y = final[old]
        hours = np.floor(ages).astype(int)
        # Exactly at the bucket's middle, so that the curve at it is the share that has come.
        now = final * (hours + 0.5) / WINDOW
        cells = [
            OpenUnits(
                h + 0.5,
                Values(
                    int((hours == h).sum()), float(now[hours == h].sum()), float((now[hours == h] ** 2).sum())
                ),
            )
            for h in range(int(WINDOW))
        ]
        got = mature_values(Values(len(y), float(y.sum()), float(y @ y)), cells, curve)
        found.append(got.mean)
        units.append(got.units)
    assert abs(np.mean(found) - 2.0) <= 4 * np.std(found) / math.sqrt(300)
    # A unit of such a metric varies by 0.4 * 50 - 4 = 16; what open units bring is steadier than their count.
    assert np.var(found) <= 1.2 * 16.0 / np.mean(units)


def test_a_curve_is_learned_from_delays():
    got = learned_curve((1.0, 2.0, 4.0), (6, 3, 1))
    assert got.shares == (0.6, pytest.approx(0.9), 1.0)
    assert learned_curve((1.0, 2.0), (0, 0)) is None
    drawn = learned_curve((1.0, 2.0, 4.0), (0, 0, 0), pooled=got)
    assert drawn.shares == pytest.approx(got.shares)
    half = learned_curve((1.0, 2.0, 4.0), (100, 0, 0), pooled=got, worth=100.0)
    assert half.shares == pytest.approx((0.8, 0.95, 1.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MaturityCurve((), ()), "at least one age"),
        (lambda: MaturityCurve((1.0,), (0.5, 1.0)), "one share for each age"),
        (lambda: MaturityCurve((2.0, 1.0), (0.5, 1.0)), "ascending"),
        (lambda: MaturityCurve((0.0,), (1.0,)), "ascending"),
        (lambda: MaturityCurve((1.0, 2.0), (0.5, 0.9)), "from 0 to 1"),
        (lambda: MaturityCurve((1.0, 2.0), (1.5, 1.0)), "from 0 to 1"),
        (lambda: learned_curve((1.0,), (-1.0,)), "not negative"),
    ],
)
def test_bad_curves_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_sums_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="must be conversions"):
        mature_conversions(Conversions(1, 0), [OpenUnits(1.0, Values(1, 1, 1))], LINEAR)
    with pytest.raises(TypeError, match="step of the mature ones"):
        mature_values(Values(1, 1, 1), [OpenUnits(1.0, Values(1, 1, 1, 0.5))], LINEAR)
