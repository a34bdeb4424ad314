"""What is frozen before the first look: methods, levels, tunings and constants."""

from __future__ import annotations

import hashlib

import msgspec
import pytest

from stream_xp import stats
from stream_xp.domain import experiment
from stream_xp.domain.decision import Method
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.engine import quantile_findings
from stream_xp.engine.design import plans
from stream_xp.stats.batch import REASONS
from stream_xp.stats.conversion_difference import DEFAULT_GRID, RATIO_SD
from stream_xp.stats.distribution import BAND_FACTOR, LEVELS
from stream_xp.stats.mean_difference import EPOCH_UNITS, GUARD_UNITS, MIN_UNITS_PER_ARM
from stream_xp.stats.ratio_difference import SEPARATION
from stream_xp.stats.sample_ratio import TILT_SD

BASE = {"key": "m", "role": "primary", "direction": "increase", "attribution_window": "1h"}
MEAN = BASE | {"kind": "mean", "bound": 10.0}
RATIO = MEAN | {"kind": "ratio", "denominator": {"event": "view", "aggregation": "any"}}
LATENCY = MEAN | {"kind": "latency", "scale": 0.1}
GUARD = {"role": "guardrail", "margin": {"relative": 0.1}}


def record(*metrics, arms="ab", **fields):
    spec = {
        "experiment": "e",
        "owner": "o",
        "hypothesis": "h",
        "unit": "u",
        "planned_sample": 10_000,
        "arms": [{"key": key, "weight": 1 / len(arms), "control": key == "a"} for key in arms],
        "metrics": metrics,
        "covariate": {"scale": 1.0, "bound": 10.0},
    } | fields
    spec = msgspec.convert(spec, ExperimentSpec)
    epoch = WeightEpoch(epoch=0, weights=spec.weights, effective_ms=0)
    return ExperimentRecord(spec=spec, epochs=(epoch,), design_hash=spec.design_hash())


@pytest.mark.parametrize(
    ("metric", "method"),
    [
        (BASE | {"kind": "conversion"}, Method.EXACT_THEN_ASYMPTOTIC),
        (MEAN | {"aggregation": "any"}, Method.EXACT_THEN_ASYMPTOTIC),
        (BASE | {"kind": "conversion", "adjustment": "cuped"}, Method.CUPED),
        (MEAN, Method.ASYMPTOTIC),
        (MEAN | {"adjustment": "ancova"}, Method.ANCOVA),
        (RATIO, Method.RATIO),
        (BASE | {"kind": "count"}, Method.RATE_RATIO),
        (BASE | {"kind": "count", "aggregation": "sum"}, Method.ASYMPTOTIC),
        (LATENCY, Method.QUANTILE),
    ],
)
def test_the_kind_of_a_metric_chooses_its_method(metric, method):
    (plan,) = plans(record(metric))
    assert plan.method is method


def test_levels_are_divided_over_metrics_arms_quantiles_and_segments():
    metrics = [
        MEAN,
        LATENCY | {"key": "slow", "quantiles": [0.5, 0.99]},
        LATENCY | GUARD | {"key": "lag", "quantiles": [0.5, 0.9, 0.99]},
        MEAN | {"key": "seen", "role": "secondary"},
    ]
    r = record(*metrics, arms="abc", alpha=0.04, guardrail_alpha=0.06, segments={"os": ["x", "y"]})
    mean, slow, lag, seen = plans(r)
    assert mean.effect.alpha == pytest.approx(0.04 / 4)
    assert mean.segment.alpha == pytest.approx(0.04 / 4 / 3)
    assert slow.effect.alpha == pytest.approx(0.04 / 4 / 2)
    assert lag.harm.alpha == pytest.approx(0.06 / 2 / 3)
    assert lag.safety.alpha == pytest.approx(0.04 / 3)
    assert seen.effect.alpha == pytest.approx(0.04)


def test_a_critical_guardrail_is_harmed_without_a_margin_and_safe_with_one():
    (plan,) = plans(record(MEAN | GUARD | {"critical": True, "direction": "decrease"}))
    assert plan.harm_margin.value == 0
    assert (plan.margin.value, plan.margin.relative) == (0.1, True)
    assert plan.harm_above


CONSTANTS = {
    "exact share": stats.EXACT_SHARE,
    "guard": (GUARD_UNITS, MIN_UNITS_PER_ARM, EPOCH_UNITS),
    "label grid": DEFAULT_GRID,
    "ratio sd": RATIO_SD,
    "tilt sd": TILT_SD,
    "separation": SEPARATION,
    "levels": tuple(map(float, LEVELS)),
    "band": (BAND_FACTOR, quantile_findings.BAND_FROM),
    "reasons": len(REASONS),
}


def test_a_changed_constant_asks_for_a_new_version_of_the_methods():
    """Raise `METHODS` with any change here, and write the new digest down."""
    digest = hashlib.sha256(repr(sorted(CONSTANTS.items())).encode()).hexdigest()[:16]
    assert (experiment.METHODS, digest) == (3, "0076a5cb57a99919")


def test_the_version_of_the_methods_is_part_of_the_design(monkeypatch):
    before = record(MEAN).spec.design_hash()
    monkeypatch.setattr(experiment, "METHODS", experiment.METHODS + 1)
    assert record(MEAN).spec.design_hash() != before
