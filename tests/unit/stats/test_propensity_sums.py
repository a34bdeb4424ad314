from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_xp.stats.moments import Moments
from stream_xp.stats.propensity_sums import GRID, PropensitySums, RunningAipw, inverse_weight

PROPENSITY = st.floats(1e-6, 1.0)
UNITS = st.lists(st.tuples(st.integers(-(10**9), 10**9), PROPENSITY), max_size=8)
BATCH = st.lists(st.tuples(st.booleans(), st.integers(-1000, 1000), st.floats(0.01, 0.99)), max_size=8)


def sums_of(units, elsewhere=()):
    return PropensitySums.from_units([y for y, _ in units], [p for _, p in units], elsewhere=elsewhere)


SUMS = st.builds(sums_of, UNITS, st.lists(PROPENSITY, max_size=4))
RUNNING = st.builds(lambda a, b: RunningAipw.empty().observed(a).observed(b), BATCH, BATCH)


@given(UNITS, st.lists(PROPENSITY, max_size=4))
def test_sums_by_definition(units, elsewhere):
    got = sums_of(units, elsewhere)
    weights = [round(2**24 / p) for _, p in units]
    values = [y for y, _ in units]
    assert got.units == len(units) + len(elsewhere)
    assert got.inverse == sum(weights) + sum(round(2**24 / p) for p in elsewhere)
    assert got.moments == Moments.from_values(values)
    for name, i, j in (("w", 1, 0), ("ww", 2, 0), ("wy", 1, 1), ("wwy", 2, 1), ("wyy", 1, 2), ("wwyy", 2, 2)):
        assert getattr(got, name) == sum(w**i * y**j for w, y in zip(weights, values, strict=True))


@given(SUMS, SUMS, SUMS)
def test_sums_are_a_commutative_monoid(a, b, c):
    assert a + b == b + a == a.merge(b)
    assert (a + b) + c == a + (b + c)
    assert a + PropensitySums.empty() == a
    assert (a + b) - b == a


@given(RUNNING, RUNNING, RUNNING)
def test_running_sums_merge_commutatively(a, b, c):
    assert a + b == b + a == a.merge(b)
    assert (a + b) + c == a + (b + c)
    assert a + RunningAipw.empty() == a


@given(st.one_of(SUMS, RUNNING))
def test_round_trips(statistic):
    kind = type(statistic)
    assert kind.from_bytes(statistic.to_bytes()) == statistic
    assert kind.from_json(statistic.to_json()) == statistic
    assert kind.from_bytes(statistic.to_bytes()).to_bytes() == statistic.to_bytes()


@given(st.lists(st.integers(-(10**9), 10**9), max_size=8), PROPENSITY, st.integers(0, 5))
def test_an_epoch_is_its_units(values, propensity, others):
    epoch = PropensitySums.from_epoch(
        Moments.from_values(values), propensity=propensity, units=len(values) + others
    )
    assert epoch == sums_of([(y, propensity) for y in values], [propensity] * others)


def test_weights_are_nearly_unbiased():
    for propensity in (1e-9, 0.001, 1 / 3, 0.7, 1.0):
        assert abs(propensity * inverse_weight(propensity) / GRID - 1) <= 3e-8
    assert inverse_weight(1.0) == GRID


@given(BATCH, st.randoms(use_true_random=False))
def test_order_inside_a_batch_does_not_matter(batch, rng):
    start = RunningAipw.empty().observed([(True, 3, 0.5), (False, 1, 0.4)])
    shuffled = list(batch)
    rng.shuffle(shuffled)
    assert start.observed(batch) == start.observed(shuffled)


def test_scores_use_earlier_batches_only():
    first = [(True, 4, 0.5), (True, 6, 0.5), (False, 1, 0.5)]
    second = [(True, 9, 0.25), (False, 3, 0.25)]
    got = RunningAipw.empty().observed(first).observed(second)
    # Centres are 0 for the first batch, then 5 and 1.
    psi = [4 / 0.5, 6 / 0.5, -1 / 0.5, 5 - 1 + (9 - 5) / 0.25, 5 - 1 - (3 - 1) / 0.75]
    assert got.psi / GRID == pytest.approx(sum(psi), rel=1e-7)
    assert got.psi_squares / GRID**2 == pytest.approx(sum(v * v for v in psi), rel=1e-7)
    assert got.treatment_inverse / GRID == pytest.approx(3 / 0.5 + 2 / 0.25)
    assert got.control_inverse / GRID == pytest.approx(3 / 0.5 + 2 / 0.75)
    assert (got.n, got.control, got.treatment) == (5, Moments(2, 4, 10), Moments(3, 19, 133))
    assert RunningAipw.empty().observed(second).observed(first) != got
    started = RunningAipw.empty().observed([(True, 4, 0.5)], start=4)
    assert started.psi == 0


def test_sizes_beyond_any_float():
    n, big = 10**12, 10**15
    epoch = PropensitySums.from_epoch(Moments(n, n * big, n * big * big), propensity=1e-9, units=n)
    assert (epoch + epoch).wwyy == 2 * n * big * big * inverse_weight(1e-9) ** 2
    assert PropensitySums.from_bytes(epoch.to_bytes()) == epoch


GOOD = sums_of([(3, 0.5), (4, 0.25)], [0.5])
SCORES = RunningAipw.empty().observed([(True, 4, 0.5), (False, 1, 0.5)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inverse_weight(0.0), "propensity must lie in"),
        (lambda: inverse_weight(1.5), "propensity must lie in"),
        (lambda: inverse_weight(math.nan), "propensity must lie in"),
        (lambda: inverse_weight(True), "propensity must lie in"),
        (lambda: PropensitySums.from_units([1], []), "propensities must be as many as values"),
        (lambda: replace(GOOD, n=2.0), "n must be a Python int"),
        (lambda: replace(GOOD, n=-1), "n must not be negative"),
        (lambda: replace(GOOD, n=4), "n must not be negative and must be at most units"),
        (lambda: replace(GOOD, w=GRID), "w and inverse must come from propensities"),
        (lambda: replace(GOOD, inverse=GOOD.w), "w and inverse must come from propensities"),
        (lambda: replace(PropensitySums.empty(), units=1, inverse=GRID, s=1), "must be 0 when n is 0"),
        (lambda: replace(GOOD, q=1), "q must be possible"),
        (lambda: replace(GOOD, ww=1), "ww must be possible"),
        (lambda: replace(GOOD, wyy=1), "wyy must be possible"),
        (lambda: replace(GOOD, wwyy=1), "wwyy must be possible"),
        (lambda: GOOD - sums_of([(3, 0.9)]), "must be possible"),
        (
            lambda: PropensitySums.from_epoch(Moments(2, 2, 2), propensity=0.5, units=1),
            "n must not be negative",
        ),
        (lambda: PropensitySums.from_bytes(SCORES.to_bytes()), "data must be a statistic of kind 'IPSM'"),
        (lambda: PropensitySums.from_bytes(b""), "data must be a whole binary statistic"),
        (lambda: PropensitySums.from_json({"version": 2}), "version must be 1"),
        (lambda: PropensitySums.from_json({"version": 1}), "units must be an integer"),
        (lambda: replace(SCORES, psi="1"), "psi must be a Python int"),
        (lambda: replace(SCORES, control_n=-1), "control_n, control_s and control_q must be moments"),
        (lambda: replace(SCORES, control_inverse=0), "control_inverse and treatment_inverse must come"),
        (lambda: replace(SCORES, psi_squares=0), "psi_squares must be possible"),
        (lambda: SCORES.observed([(True, 1, 1.0)]), "propensity must lie in"),
        (lambda: RunningAipw.from_json({"version": 1}), "control_n must be an integer"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_other_kinds_do_not_add():
    with pytest.raises(TypeError):
        GOOD + SCORES
    with pytest.raises(TypeError):
        GOOD - SCORES
    with pytest.raises(TypeError):
        SCORES + GOOD
