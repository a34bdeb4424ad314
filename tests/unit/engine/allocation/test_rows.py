"""The statistics of an experiment as evidence: the right rows, the right kind, a row for every arm."""

from __future__ import annotations

import msgspec
import pytest

from stream_xp.domain.experiment import Metric
from stream_xp.domain.statistics import build
from stream_xp.engine.allocation import Conversions, Evidence, Values, evidence_of


def metric(key, kind, **fields):
    base = {"key": key, "kind": kind, "role": "primary", "direction": "increase", "attribution_window": "1d"}
    return msgspec.convert(base | fields, Metric)


ORDER = metric("order", "conversion")
SPENT = metric("spent", "mean", aggregation="sum", scale=0.01, bound=100.0)
STATISTICS = build(
    units={},
    moments={
        ("order", "a", 0, ""): (10, 3, 3),
        ("order", "a", 1, ""): (20, 5, 5),
        ("order", "b", 1, ""): (30, 6, 6),
        ("order", "a", 1, "os=ios"): (8, 2, 2),
        ("order", "b", 1, "os=other"): (12, 1, 1),
        ("order", "b", 1, "oslo=other"): (12, 1, 1),
        ("spent", "a", 0, ""): (2, 700, 10**18),
    },
    crossover_units=0,
    first_exposure_ms=None,
    out_of_range={},
)


def test_every_arm_and_epoch_has_its_row():
    assert evidence_of(STATISTICS, ORDER, arms=("a", "b")) == [
        Evidence("a", Conversions(0, 0)),
        Evidence("b", Conversions(0, 0)),
        Evidence("a", Conversions(10, 3), 0),
        Evidence("a", Conversions(20, 5), 1),
        Evidence("b", Conversions(30, 6), 1),
    ]


def test_values_stay_exact_and_keep_their_step():
    got = evidence_of(STATISTICS, SPENT, arms=("a", "b"))
    assert got[1] == Evidence("b", Values(0, 0, 0, 0.01))
    assert got[2] == Evidence("a", Values(2, 700, 10**18, 0.01))


def test_contexts_are_the_values_of_one_feature():
    assert evidence_of(STATISTICS, ORDER, arms=("a", "b"), feature="os") == [
        Evidence("a", Conversions(8, 2), 1, "ios"),
        Evidence("b", Conversions(12, 1), 1, "other"),
    ]


@pytest.mark.parametrize(
    "refused",
    [
        metric("errors", "count", aggregation="first"),
        metric(
            "ratio",
            "ratio",
            aggregation="sum",
            scale=1.0,
            bound=9.0,
            denominator={"event": "session", "aggregation": "any"},
        ),
    ],
    ids=["first-events", "ratio"],
)
def test_metrics_without_a_mean_are_refused(refused):
    with pytest.raises(ValueError, match=f"weights cannot follow {refused.key}"):
        evidence_of(STATISTICS, refused, arms=("a",))
