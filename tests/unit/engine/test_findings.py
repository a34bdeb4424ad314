"""Counts, ratios, adjusted means, latencies and segments, from statistics to results."""

from __future__ import annotations

import gc
import math

import msgspec
import numpy as np
import pytest

from stream_xp import stats
from stream_xp.domain.decision import Method, MetricResult, MetricState
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.statistics import build
from stream_xp.engine.comparison import Finding, comparisons
from stream_xp.engine.evaluate import evaluate
from stream_xp.stats.adjusted_difference import ancova, cuped
from stream_xp.stats.cross_moments import CrossStratum
from stream_xp.stats.log_histogram import bin_of
from stream_xp.stats.ratio_difference import ratio_means

METRIC = {"role": "primary", "direction": "increase", "attribution_window": "1s"}
RATIO = METRIC | {
    "key": "ctr",
    "kind": "ratio",
    "event": "click",
    "bound": 100.0,
    "denominator": {"event": "view", "bound": 1000.0},
}
COUNT = METRIC | {"key": "errors", "kind": "count", "direction": "decrease"}
LATENCY = METRIC | {
    "key": "ttfb",
    "kind": "latency",
    "scale": 1.0,
    "bound": 100_000.0,
    "direction": "decrease",
}
GUARD = {"role": "guardrail", "margin": {"relative": 0.1}}
ADJUSTED = METRIC | {"key": "spend", "kind": "mean", "scale": 0.01, "bound": 1000.0, "adjustment": "cuped"}
EVEN = {"a": 0.5, "b": 0.5}


def record(*metrics, epochs=(EVEN,), **fields):
    spec = {
        "experiment": "e",
        "owner": "o",
        "hypothesis": "h",
        "unit": "u",
        "planned_sample": 10_000,
        "arms": [{"key": key, "weight": w, "control": key == "a"} for key, w in epochs[0].items()],
        "metrics": metrics,
    } | fields
    spec = msgspec.convert(spec, ExperimentSpec)
    listed = [WeightEpoch(epoch=e, weights=w, effective_ms=e) for e, w in enumerate(epochs)]
    return ExperimentRecord(spec=spec, epochs=tuple(listed), design_hash=spec.design_hash())


def statistics(*, moments=None, products=None, events=None, histograms=None, n=1000):
    return build(
        units={("a", 0, ""): n, ("b", 0, ""): n},
        moments=moments or {},
        products=products or {},
        events=events or {},
        histograms=histograms or {},
        crossover_units=0,
        first_exposure_ms=0,
        out_of_range={},
    )


def only(*look):
    (result,) = evaluate(*look).metrics
    return result


def cross(seed, n, *, effect=0):
    rng = np.random.default_rng(seed)
    x = rng.poisson(20, n)
    y = np.maximum(x // 2 + rng.poisson(3, n) + effect, 0)
    pairs = list(zip(x.tolist(), y.tolist(), strict=True))
    return stats.CrossMoments.from_pairs(pairs)


def crossed(metric, arms, epoch=0, segment=""):
    moments = {(metric, arm, epoch, segment): (c.n, c.sy, c.syy) for arm, c in arms.items()}
    products = {(metric, arm, epoch, segment): (c.sx, c.sxx, c.sxy) for arm, c in arms.items()}
    return {"moments": moments, "products": products}


def strata_of(control, treatment):
    return [CrossStratum(control, treatment)]


@pytest.mark.parametrize("adjustment", ["cuped", "ancova"])
def test_an_adjusted_mean_is_that_of_the_statistical_function(adjustment):
    arms = {"a": cross(1, 900), "b": cross(2, 800, effect=1)}
    covariate = {"scale": 0.1, "bound": 100.0}
    result = only(
        record(ADJUSTED | {"adjustment": adjustment}, covariate=covariate),
        statistics(**crossed("spend", arms)),
    )
    function = {"cuped": cuped, "ancova": ancova}[adjustment]
    means = function(strata_of(*arms.values()), scale_x=0.1, scale_y=0.01)
    found = stats.mean_difference(means, alpha=0.05, rho2=stats.tuned_rho2(10_000, 0.05))
    assert result.method is Method(adjustment)
    assert result.effect.estimate == pytest.approx(found.estimate, rel=1e-12)
    assert result.effect.log_e == pytest.approx(found.log_e, rel=1e-12)
    assert result.effect.lower == pytest.approx(found.lower, rel=1e-12)
    plain = only(record(ADJUSTED | {"adjustment": "none"}), statistics(**crossed("spend", arms)))
    assert result.effect.upper - result.effect.lower < 0.9 * (plain.effect.upper - plain.effect.lower)


def test_a_ratio_is_that_of_the_statistical_function():
    arms = {"a": cross(1, 900), "b": cross(2, 800, effect=1)}
    result = only(record(RATIO), statistics(**crossed("ctr", arms)))
    means = ratio_means(strata_of(*arms.values()), scale_x=1.0, scale_y=1.0)
    found = stats.mean_difference(means, alpha=0.05, rho2=stats.tuned_rho2(10_000, 0.05))
    assert result.method is Method.RATIO
    assert result.control_mean == pytest.approx(arms["a"].sy / arms["a"].sx)
    assert (result.effect.estimate, result.effect.log_e) == pytest.approx((found.estimate, found.log_e))
    assert result.state is MetricState.BETTER
    assert result.lift.lower > 0


def test_a_count_compares_first_events():
    events = {("errors", "a", 0, ""): (40, 90), ("errors", "b", 0, ""): (95, 300)}
    result = only(record(COUNT | GUARD), statistics(events=events))
    found = stats.success_ratio([[40, 95]], [[0.5, 0.5]], alpha=0.05)
    assert result.method is Method.RATE_RATIO
    assert result.effect.estimate == pytest.approx(math.log(95 / 40))
    assert result.effect.log_e == pytest.approx(found.log_e)
    assert result.lift.estimate == pytest.approx(95 / 40 - 1)
    assert result.lift.lower == pytest.approx(math.expm1(found.lower))
    assert (result.control_units, result.arm_units) == (40, 95)
    assert result.state is MetricState.HARMED
    assert result.harm.lower > 0


def test_a_count_with_events_in_one_arm_has_a_bound_and_no_estimate():
    result = only(record(COUNT | GUARD), statistics(events={("errors", "b", 0, ""): (30, 40)}))
    assert result.effect.estimate is None
    assert result.effect.lower > 0
    assert result.effect.upper is None
    assert result.state is MetricState.HARMED


def test_a_count_without_events_is_undetermined():
    result = only(record(COUNT | GUARD), statistics())
    assert result.state is MetricState.UNDETERMINED
    assert result.effect is result.harm is None


def test_counts_of_epochs_with_different_weights_are_not_pooled():
    epochs = [{"a": 0.9, "b": 0.1}, EVEN]
    events = {
        ("errors", "a", 0, ""): (450, 450),
        ("errors", "b", 0, ""): (50, 50),
        ("errors", "a", 1, ""): (50, 50),
        ("errors", "b", 1, ""): (50, 50),
    }
    result = only(record(COUNT, epochs=epochs), statistics(events=events))
    assert result.effect.estimate == pytest.approx(0.0, abs=1e-9)


def histogram(seed, n, *, factor=1.0):
    values = np.round(factor * np.random.default_rng(seed).lognormal(5, 0.5, n)).astype(np.int64)
    bins, counts = np.unique(bin_of(values), return_counts=True)
    return dict(zip(bins.tolist(), counts.tolist(), strict=True))


def test_a_latency_compares_quantiles():
    histograms = {
        ("ttfb", "a", 0, ""): histogram(1, 4000),
        ("ttfb", "b", 0, ""): histogram(2, 4000, factor=1.6),
    }
    result = only(record(LATENCY | GUARD), statistics(histograms=histograms))
    assert result.method is Method.QUANTILE
    assert [q.quantile for q in result.quantiles] == [0.5, 0.9, 0.99]
    median = result.quantiles[0]
    assert median.control_value == pytest.approx(math.exp(5), rel=0.05)
    assert median.effect.lower > 0
    assert median.harm.log_e > median.harm.threshold_log_e
    assert result.state is MetricState.HARMED
    assert result.effect in [q.effect for q in result.quantiles]
    assert result.distribution.log_e > 10
    assert (result.control_units, result.arm_units) == (4000, 4000)


def test_a_latency_without_change_is_safe_in_the_end():
    histograms = {("ttfb", arm, 0, ""): histogram(seed, 60_000) for seed, arm in enumerate("ab")}
    metric = LATENCY | GUARD | {"quantiles": [0.5, 0.9]}
    result = only(record(metric, planned_sample=100_000), statistics(histograms=histograms))
    assert result.state is MetricState.SAFE
    assert result.safety == min((q.safety for q in result.quantiles), key=lambda e: e.log_e)


def test_a_latency_better_at_one_quantile_and_worse_at_another_is_worse():
    slow_tail = {0: {bin_of(100): 9000, bin_of(1000): 1000}, 1: {bin_of(50): 7000, bin_of(9000): 3000}}
    histograms = {("ttfb", arm, 0, ""): slow_tail[at] for at, arm in enumerate("ab")}
    result = only(record(LATENCY), statistics(histograms=histograms))
    assert result.state is MetricState.WORSE


def test_histograms_of_epochs_are_never_added():
    # Slow traffic while the arm was small: pooled, the arm looks fast.
    epochs = [{"a": 0.9, "b": 0.1}, EVEN]
    histograms = {
        ("ttfb", "a", 0, ""): histogram(1, 9000, factor=3.0),
        ("ttfb", "b", 0, ""): histogram(2, 1000, factor=3.0),
        ("ttfb", "a", 1, ""): histogram(3, 5000),
        ("ttfb", "b", 1, ""): histogram(4, 5000),
    }
    result = only(record(LATENCY, epochs=epochs), statistics(histograms=histograms))
    assert result.state is MetricState.INCONCLUSIVE
    assert result.quantiles[0].control_value > 1.5 * result.quantiles[0].arm_value


def test_epochs_that_contradict_each_other_leave_no_effect():
    epochs = [EVEN, EVEN]
    histograms = {
        ("ttfb", "a", 0, ""): histogram(1, 9000),
        ("ttfb", "b", 0, ""): histogram(2, 9000, factor=2.0),
        ("ttfb", "a", 1, ""): histogram(3, 9000),
        ("ttfb", "b", 1, ""): histogram(4, 9000, factor=0.5),
    }
    result = only(record(LATENCY, epochs=epochs), statistics(histograms=histograms))
    assert result.state is MetricState.UNDETERMINED
    assert result.note == "the weight epochs contradict each other"


def test_segments_are_tested_at_their_share_of_the_level():
    metric = METRIC | {"key": "play", "kind": "conversion"}
    segments = {"os": ["ios", "android"]}
    cells = {
        ("play", "a", 0, ""): (900, 90, 90),
        ("play", "b", 0, ""): (900, 130, 130),
        ("play", "a", 0, "os=ios"): (500, 40, 40),
        ("play", "b", 0, "os=ios"): (500, 90, 90),
        ("play", "a", 0, "os=other"): (400, 50, 50),
    }
    evaluation = evaluate(record(metric, segments=segments), statistics(moments=cells))
    assert [s.segment for s in evaluation.segments] == ["os=ios", "os=android", "os=other"]
    ios, android, other = evaluation.segments
    assert ios.effect.threshold_log_e == pytest.approx(math.log(3 / 0.05))
    assert ios.effect.estimate == pytest.approx(0.1)
    assert (ios.control_units, other.control_units, other.arm_units) == (500, 400, 0)
    assert android.effect is other.effect is None
    assert len(evaluation.metrics) == 1


def test_a_result_ends_with_the_fields_of_a_finding():
    # Results are made of them in this order, without a name.
    assert MetricResult.__struct_fields__[-len(Finding.__struct_fields__) :] == Finding.__struct_fields__


def test_rows_of_another_kind_are_not_read():
    """Statistics on a topic may be anybody's: a method reads the rows of its own kind alone."""
    cells = {("spend", arm, 0, ""): (1000, 100 * s, 40_000 * s) for arm, s in (("a", 300), ("b", 400))}
    events = dict.fromkeys(cells, (9, 9))
    metric = METRIC | {"key": "spend", "kind": "mean", "scale": 0.01, "bound": 1000.0}
    clean = only(record(metric), statistics(moments=cells))
    assert clean.effect is not None
    assert only(record(metric), statistics(moments=cells, events=events)) == clean
    assert only(record(metric), statistics(events=events)).effect is None


def test_results_are_nothing_for_the_garbage_collector():
    # It would take a third of the time of an evaluation to walk through them.
    cells = {("spend", arm, 0, ""): (1000, 100 * s, 40_000 * s) for arm, s in (("a", 300), ("b", 400))}
    metric = METRIC | {"key": "spend", "kind": "mean", "scale": 0.01, "bound": 1000.0}
    one, seen = record(metric), statistics(moments=cells)
    (comparison,) = comparisons(one, seen)
    evaluation = evaluate(one, seen)
    (result,) = evaluation.metrics
    made = (comparison, *comparison.strata, result, result.effect, result.lift, *evaluation.arms)
    assert not any(gc.is_tracked(thing) for thing in (*made, evaluation.sample_ratio))
