"""Posteriors by hand, priors as sums they are worth, and priors recovered from past arms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_xp.engine.allocation.evidence import Conversions, Values
from stream_xp.engine.allocation.posterior import (
    FLAT,
    LARGEST_WORTH,
    NO_SPREAD,
    NO_UNITS,
    NO_VARIETY,
    TOO_FEW_ARMS,
    UNIFORM,
    VARIANCE_WORTH,
    BetaPosterior,
    Prior,
    StudentPosterior,
    conversion_posterior,
    learned_prior,
    mean_posterior,
    score_line,
    score_priors,
)
from stream_xp.stats import Undetermined


def values(*numbers, step=1.0):
    return Values(len(numbers), sum(numbers), sum(n * n for n in numbers), step)


def test_rates_by_hand():
    got = conversion_posterior([Conversions(10, 3), Conversions(0, 0)], [UNIFORM, Prior(0.1, 50)])
    assert got.a.tolist() == [4.0, 5.0]
    assert got.b.tolist() == [8.0, 45.0]


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 500), st.integers(1, 500))
def test_a_prior_is_worth_so_many_units(c, f, prior_c, prior_f):
    worth = prior_c + prior_f
    informed = conversion_posterior([Conversions(c + f, c)], [Prior(prior_c / worth, worth)])
    assert informed.a == pytest.approx([c + prior_c])
    assert informed.b == pytest.approx([f + prior_f])


def test_means_by_hand():
    sums = [values(1, 2, 3, 6), values(4, 4, 7)]
    got = mean_posterior(sums, [Prior(2.0, 5.0), FLAT])
    common = (14.0 + 6.0) / (3 + 2)
    assert got.location == pytest.approx([(10 + 12) / 9, 5.0])
    assert got.degrees.tolist() == [VARIANCE_WORTH + 4, VARIANCE_WORTH + 2]
    first = (VARIANCE_WORTH * common + 14.0 + 5 * 4 / 9 * 1.0) / got.degrees[0] / 9
    second = (VARIANCE_WORTH * common + 6.0) / got.degrees[1] / 3
    assert got.scale == pytest.approx([math.sqrt(first), math.sqrt(second)])


def test_an_arm_of_zeros_is_not_certain():
    rng = np.random.default_rng(3)
    sparse = [int(v) for v in rng.binomial(1, 0.02, 2000) * rng.integers(1, 100, 2000)]
    got = mean_posterior([values(*sparse), Values(40, 0, 0)], [FLAT, FLAT])
    # The arm's own variance is 0; it is judged with the variance of all.
    assert got.scale[1] > 0.8 * np.std(sparse) / math.sqrt(40)


def test_sums_beyond_a_float_are_subtracted_exactly():
    shift = 10**17
    far = Values(3, 3 * shift + 6, sum((shift + k) ** 2 for k in (1, 2, 3)), step=0.5)
    assert far.spread == 2.0 * 0.25
    assert far.mean == pytest.approx((shift + 2) * 0.5)


def test_what_is_not_known_is_said():
    assert mean_posterior([values(1, 1), values(1, 1)], [FLAT, FLAT]) == Undetermined(NO_SPREAD)
    assert mean_posterior([values(1, 2), Values(0, 0, 0)], [FLAT, FLAT]) == Undetermined(NO_UNITS)
    cold = mean_posterior([Values(0, 0, 0)], [Prior(3.0, 10.0, sd=2.0)])
    assert isinstance(cold, StudentPosterior)
    assert cold.location.tolist() == [3.0]
    assert cold.scale == pytest.approx([2.0 / math.sqrt(10.0)])


def test_a_prior_of_rates_is_recovered():
    rng = np.random.default_rng(11)
    a, b, means, worths = 6.0, 114.0, [], []
    for _ in range(40):
        n = rng.integers(200, 20_000, 150)
        past = [
            Conversions(int(k), int(c)) for k, c in zip(n, rng.binomial(n, rng.beta(a, b, 150)), strict=True)
        ]
        prior = learned_prior(past)
        means.append(prior.mean)
        worths.append(prior.worth)
    assert np.mean(means) == pytest.approx(0.05, abs=4 * np.std(means) / math.sqrt(40))
    # Moments of a ratio are a little biased: 5 % beside the Monte Carlo error.
    assert np.mean(worths) == pytest.approx(120.0, rel=0.05, abs=4 * np.std(worths) / math.sqrt(40))


def test_a_prior_of_means_is_recovered():
    rng = np.random.default_rng(12)
    means, worths = [], []
    for _ in range(40):
        truth = rng.normal(10.0, 0.5, 100)
        past = []
        for mu in truth:
            y = rng.normal(mu, 4.0, 400)
            past.append(Values(400, float(y.sum()), float(y @ y)))
        prior = learned_prior(past)
        means.append(prior.mean)
        worths.append(prior.worth)
        assert prior.sd == pytest.approx(4.0, rel=0.05)
    assert np.mean(means) == pytest.approx(10.0, abs=4 * np.std(means) / math.sqrt(40))
    assert np.mean(worths) == pytest.approx(64.0, rel=0.1)


def test_arms_that_differ_by_chance_alone_give_a_bounded_worth():
    same = learned_prior([Conversions(100, 10)] * 20)
    assert (same.mean, same.worth) == (pytest.approx(0.1), LARGEST_WORTH)
    assert learned_prior([values(1, 3)] * 5, largest_worth=50.0).worth == 50.0


def test_too_little_past_is_said():
    assert learned_prior([Conversions(5, 1), Conversions(0, 0)]) == Undetermined(TOO_FEW_ARMS)
    assert learned_prior([values(1, 3)]) == Undetermined(TOO_FEW_ARMS)
    assert learned_prior([Conversions(5, 0), Conversions(9, 0)]) == Undetermined(NO_VARIETY)
    assert learned_prior([Conversions(5, 5), Conversions(9, 9)]) == Undetermined(NO_VARIETY)
    assert learned_prior([values(2, 2), values(3, 3)]) == Undetermined(NO_SPREAD)


def test_arms_of_certainties_are_worth_one_unit():
    assert learned_prior([Conversions(50, 0), Conversions(50, 50)]).worth == 1.0


def test_scores_are_a_line_of_means():
    priors = score_priors({"b": 1.0, "a": 0.5}, intercept=0.02, slope=0.04, worth=200)
    assert priors == {"a": Prior(0.04, 200), "b": Prior(0.06, 200)}
    past = [Conversions(1000, 1000 * 0.04), Conversions(10, 0.6), Conversions(0, 0)]
    assert score_line([0.5, 1.0, 7.0], past) == pytest.approx((0.02, 0.04))


@pytest.mark.parametrize("scores", [[1.0, 1.0], [1.0]], ids=["one-score", "one-arm"])
def test_no_line_without_two_scores(scores):
    with pytest.raises(ValueError, match="at least 2 past arms"):
        score_line(scores, [Conversions(10, 1)] * len(scores))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Conversions(3, 4), "between 0 and units"),
        (lambda: Conversions(3, -1), "between 0 and units"),
        (lambda: Conversions(math.nan, 0), "between 0 and units"),
        (lambda: Values(-1, 0, 0), "not be negative"),
        (lambda: Values(0, 3, 0), "no units have no sums"),
        (lambda: Values(1, math.inf, 0), "finite"),
        (lambda: Values(1, 0, 0, step=0.0), "step"),
        (lambda: Prior(math.nan, 1), "prior's mean"),
        (lambda: Prior(0, -1), "prior's mean"),
        (lambda: Prior(0, 1, sd=0.0), "sd"),
        (lambda: conversion_posterior([Conversions(1, 0)], [FLAT]), "mean between 0 and 1"),
        (lambda: conversion_posterior([Conversions(1, 0)], []), "argument"),
        (lambda: BetaPosterior(np.array([0.0]), np.array([1.0])), "greater than 0"),
        (lambda: BetaPosterior(np.array([]), np.array([])), "at least one arm"),
        (lambda: StudentPosterior(np.zeros(1), np.zeros(1), np.ones(1)), "scale and degrees"),
        (lambda: StudentPosterior(np.zeros(1), np.ones(2), np.ones(1)), "one shape"),
        (lambda: StudentPosterior(np.array([math.inf]), np.ones(1), np.ones(1)), "finite"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
