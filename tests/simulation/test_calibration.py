"""The quick calibration: some cases of every method and every check that must fail, on short paths.

The full one is `make calibrate`, which writes docs/calibration.md. Below are the checks that what is measured
are the real methods: the looks, which are computed for all paths at once, hold what the functions for single
units make of the same path.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from stream_xp.services.calibrate import adapting, bounded, conversions, quantiles, traps
from stream_xp.services.calibrate.data import (
    DRIFTING,
    EXPONENTIAL,
    SKEWED_COVARIATE,
    SPARSE_RATIO,
    ZERO_INFLATED,
    OneArm,
    Ramp,
    Share,
    Thompson,
    bernoulli,
    beta,
    sample,
)
from stream_xp.services.calibrate.harness import measure
from stream_xp.services.calibrate.means import Means
from stream_xp.services.calibrate.running import EVERY_UNIT, Looks
from stream_xp.services.calibrate.service import QUICK_PATHS, QUICK_UNITS, choose
from stream_xp.stats.adaptive import aipw, aipw_running, delayed_effect
from stream_xp.stats.adjusted_difference import ancova, cuped
from stream_xp.stats.cross_moments import CrossMoments, CrossStratum
from stream_xp.stats.empirical_bernstein import EmpiricalBernstein
from stream_xp.stats.log_histogram import LogHistogram
from stream_xp.stats.mean_difference import ArmMeans, Stratum, summarise
from stream_xp.stats.moments import Moments
from stream_xp.stats.propensity_sums import PropensitySums, RunningAipw
from stream_xp.stats.quantile import Sample as QuantileSample
from stream_xp.stats.quantile import quantile_log_e
from stream_xp.stats.ratio_difference import ratio_means


@pytest.mark.parametrize("case", choose(quick=True), ids=lambda case: case.name)
def test_quick(case, record_property):
    (found,) = measure([case], paths=QUICK_PATHS, seed=1, max_units=QUICK_UNITS)
    record_property("measured", found.rate)
    print(f"{found.rate:.4f} +- {found.error:.4f}, nominal {case.nominal}")
    assert found.as_it_must_be, (
        f"{found.status}: {found.rate:.4f} +- {found.error:.4f}, nominal {case.nominal}"
    )


# ---- what is measured are the real methods -----------------------------------------------------------


def epochs_at(drawn, path, at):
    """(epoch's units up to `at`, as slices) of one path."""
    starts = (0, *drawn.arms.ends[:-1])
    return [slice(min(s, at), min(e, at)) for s, e in zip(starts, drawn.arms.ends, strict=True)]


def same_means(found, look, expected):
    if not isinstance(expected, ArmMeans):
        return bool(found.undetermined[look])
    names = ("control_mean", "treatment_mean", "control_variance", "treatment_variance", "n")
    return [getattr(found, name)[look] for name in names] == pytest.approx(
        [getattr(expected, name) for name in names], rel=1e-9, abs=1e-12
    )


@pytest.mark.parametrize("design", [Share(0.1), Ramp()], ids=lambda design: design.name)
@pytest.mark.parametrize("guard", [True, False])
def test_means_are_those_of_summarise(design, guard):
    drawn = sample(np.random.default_rng(1), ZERO_INFLATED, design, paths=2, n=900)
    found = Means(guard=guard).along(drawn)
    for path in (0, 1):
        for at in (100, 300, 340, 500, 900):
            arms = [drawn.arms.treated[path] == arm for arm in (False, True)]
            strata = [
                Stratum(*(Moments.from_values(drawn.ticks[path, part][mask[part]].tolist()) for mask in arms))
                for part in epochs_at(drawn, path, at)
            ]
            expected = summarise(strata, scale=drawn.step, guard=guard)
            assert same_means(found, (path, at - 1), expected), (path, at)


@pytest.mark.parametrize(
    ("of", "scalar", "data"),
    [
        ("cuped", cuped, SKEWED_COVARIATE),
        ("ancova", ancova, SKEWED_COVARIATE),
        ("ratio", ratio_means, SPARSE_RATIO),
    ],
)
def test_adjusted_means_and_ratios_are_those_of_the_scalar_functions(of, scalar, data):
    drawn = sample(np.random.default_rng(2), data, Ramp(), paths=2, n=900)
    found = Means(of).along(drawn)
    for at in (200, 500, 900):
        strata = []
        for part in epochs_at(drawn, 1, at):
            pairs = np.stack([drawn.second_ticks[1, part], drawn.ticks[1, part]], axis=-1)
            arms = [pairs[drawn.arms.treated[1, part] == arm] for arm in (False, True)]
            strata.append(
                CrossStratum(*(CrossMoments.from_pairs([tuple(p) for p in a.tolist()]) for a in arms))
            )
        expected = scalar(strata, scale_x=drawn.step, scale_y=drawn.step)
        assert same_means(found, (1, at - 1), expected), at


def test_pooled_means_forget_the_epochs():
    drawn = sample(np.random.default_rng(3), DRIFTING, Ramp(), paths=2, n=600)
    found = Means(pooled=True).along(drawn)
    assert found.treatment_mean[1, -1] == pytest.approx(drawn.y[1][drawn.arms.treated[1]].mean())


def test_scores_are_those_of_the_running_sums():
    drawn = sample(np.random.default_rng(4), DRIFTING, Thompson(), paths=2, n=700)
    estimate, variance, determined = adapting.Scores().effect(drawn, np.array([300, 700]))
    sums = RunningAipw.empty()
    for part in epochs_at(drawn, 1, 700):
        units = zip(
            drawn.arms.treated[1, part].tolist(),
            drawn.ticks[1, part].tolist(),
            drawn.arms.weight[1, part].tolist(),
            strict=True,
        )
        sums = sums.observed(units)
        if part.stop in (300, 700):
            look, effect = (300, 700).index(part.stop), aipw_running(sums, scale=drawn.step)
            assert determined[1, look]
            assert estimate[1, look] == pytest.approx(effect.estimate, rel=1e-5)
            assert variance[1, look] == pytest.approx(effect.variance, rel=1e-5)


def test_scores_with_a_frozen_centre_are_those_of_the_exact_sums():
    drawn = sample(np.random.default_rng(5), bernoulli(0.3), Thompson(), paths=1, n=500)
    estimate, variance, _ = adapting.Scores(running=False).effect(drawn, np.array([500]))
    treated, y, weight = drawn.arms.treated[0], drawn.ticks[0], drawn.arms.weight[0]
    arms = [
        PropensitySums.from_units(y[mask].tolist(), p[mask].tolist(), elsewhere=p[~mask].tolist())
        for mask, p in ((~treated, 1.0 - weight), (treated, weight))
    ]
    effect = aipw(*arms, scale=1.0)
    assert estimate[0, 0] == pytest.approx(effect.estimate, rel=1e-5)
    assert variance[0, 0] == pytest.approx(effect.variance, rel=1e-5)


def test_nothing_is_claimed_before_there_are_enough_units():
    drawn = sample(np.random.default_rng(6), DRIFTING, Thompson(), paths=20, n=200)
    _, _, determined = adapting.Scores().effect(drawn, np.array([20, 99, 150]))
    assert not determined[:, :2].any()
    assert determined[:, 2].any()


def test_delayed_rewards_come_in_as_single_units_do():
    study = adapting.DelayedRewards(Looks("each", step=40))
    value, come, n = np.array([3, 0, 2, 5]), np.array([0, 1, 90, 41]), 80
    value, come = np.resize(value, n), np.arange(n) + np.resize(come, n)
    epoch, mask = np.arange(n) * 3 // n, np.arange(n) % 2 == 0
    looks = study._arm(value, come, np.array([40, 80]), mask=mask, epoch=epoch, arm=True)
    weight = np.array(study.weights)[epoch]
    for sums, at in zip(looks, (40, 80), strict=True):
        so_far = np.where(come[:at] <= at, value[:at], 0)
        ours = mask[:at]
        assert sums == PropensitySums.from_units(
            so_far[ours].tolist(), weight[:at][ours].tolist(), elsewhere=weight[:at][~ours].tolist()
        )
    control = study._arm(value, come, np.array([40, 80]), mask=~mask, epoch=epoch, arm=False)
    assert not math.isnan(delayed_effect(control[1], looks[1], scale=1.0, alpha=0.05, eta=0.1).estimate)


def test_weights_and_counts_of_a_bandit_are_those_of_its_epochs():
    drawn = sample(np.random.default_rng(7), bernoulli(0.3), Thompson(), paths=3, n=350)
    at = np.array([150, 350])
    weights = conversions.logged_weights(drawn)
    successes = conversions.both_arms(drawn, drawn.ticks, at)
    assert weights.shape == (3, 1, 4, 2)
    assert successes.shape == (3, 2, 4, 2)
    for epoch, part in enumerate(epochs_at(drawn, 2, 350)):
        assert set(drawn.arms.weight[2, part]) == {weights[2, 0, epoch, 1]}
        treated = drawn.arms.treated[2, part]
        expected = [drawn.y[2, part][treated == arm].sum() for arm in (False, True)]
        assert successes[2, 1, epoch].tolist() == expected


def test_partitions_are_merged_from_their_own_streams():
    drawn = sample(np.random.default_rng(8), beta(1, 9), OneArm(), paths=1, n=60)
    n, total, time = bounded.Bernstein(Looks("each", step=10), partitions=2)._sums(drawn.y[0])[:, -1]
    blocks = drawn.y[0].reshape(6, 10)
    parts = [EmpiricalBernstein.empty().update(np.concatenate(blocks[i::2])) for i in (0, 1)]
    merged = parts[0] + parts[1]
    assert (n, total, time) == (60, merged.total, merged.intrinsic_time)


def test_binned_values_are_those_of_the_histogram():
    drawn = sample(np.random.default_rng(9), EXPONENTIAL, Share(0.5), paths=2, n=300)
    control, treatment = quantiles.both_binned(drawn, np.array([120, 300]))
    steps = np.floor(drawn.y[1] * quantiles.STEPS).astype(int)
    for arm, found in ((False, control), (True, treatment)):
        inside = steps[:120][drawn.arms.treated[1, :120] == arm]
        expected = QuantileSample.from_histogram(LogHistogram.from_values(inside.tolist()), 1.0)
        got = quantile_log_e(found, 0.9, null=460.5, concentration=10.0)
        assert got[1, 0] == pytest.approx(quantile_log_e(expected, 0.9, null=460.5, concentration=10.0))


def test_delayed_conversions_by_hand():
    shown = {}

    def keep(units, successes):
        shown["units"], shown["successes"] = units, successes
        return np.zeros(units.shape[1:], np.bool_)

    for matured in (False, True):
        rng = np.random.default_rng(10)
        traps.DelayedConversions(EVERY_UNIT, keep, matured=matured)(rng, 2, 800)
        units, successes = shown["units"].sum(axis=0), shown["successes"]
        entered = np.maximum(np.arange(1, 801) - (traps._WINDOW if matured else 0), 0)
        assert (units == entered).all()
        assert (successes <= shown["units"]).all()
    # Once all windows are over, both arms have converted equally often.
    rates = successes[:, :, -1].sum(axis=1) / shown["units"][:, :, -1].sum(axis=1)
    assert rates == pytest.approx([traps._RATE] * 2, abs=0.08)


def test_clustered_events_by_hand():
    kept = {}

    def keep(counts):
        kept["counts"] = counts
        return np.zeros(counts.shape[:-1], np.bool_)

    traps.ClusteredEvents(EVERY_UNIT, keep)(np.random.default_rng(11), 3, 400)
    assert (kept["counts"].sum(axis=-1) == np.arange(1, 401)).all()
    traps.ClusteredEvents(EVERY_UNIT, keep, first_only=True)(np.random.default_rng(11), 3, 400)
    total = kept["counts"].sum(axis=-1)
    assert (np.diff(total, axis=1) >= 0).all()
    assert 25 < total[:, -1].mean() <= 40
