"""The uniform slice alone: whose units are in it, what is compared with what, and the rules of its spec."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.publication import next_config
from stream_xp.domain.statistics import ExperimentStatistics, build
from stream_xp.engine.evaluate import evaluate
from stream_xp.engine.uniform import uniform_look, uniform_plans
from stream_xp.services.spec_file import SpecFaults, parse_spec

FILE = """\
experiment: e
owner: o
hypothesis: h
unit: u
planned_sample: 10000
arms:
  - {key: a, weight: 0.4, control: true}
  - {key: b, weight: 0.3}
  - {key: c, weight: 0.3}
metrics:
  - {key: order, kind: conversion, role: primary, direction: increase, attribution_window: 1d}
  - {key: spend, kind: mean, role: secondary, direction: increase, attribution_window: 1d, bound: 100}
segments: {os: [tv, web], draw: [uniform]}
allocation:
  policy: thompson
  metric: order
  uniform_slice: 0.3
  uniform_segment: draw
"""


def spec(text: str = FILE) -> ExperimentSpec:
    return parse_spec(text.encode(), "f")


def record(*epochs: dict[str, Any], of: ExperimentSpec | None = None) -> ExperimentRecord:
    made = of or spec()
    listed = tuple(
        WeightEpoch(**{"epoch": at, "weights": made.weights, "effective_ms": at, **one})
        for at, one in enumerate(epochs or ({},))
    )
    return ExperimentRecord(spec=made, epochs=listed, design_hash=made.design_hash())


def statistics(cells: dict[tuple[str, int, str], tuple[int, int]]) -> ExperimentStatistics:
    """Units and orders, all mature, by arm, epoch and segment."""
    return build(
        units={key: n for key, (n, _) in cells.items()},
        moments={("order", *key): (n, s, s) for key, (n, s) in cells.items()},
        crossover_units=0,
        first_exposure_ms=0,
        out_of_range={},
    )


IN = "draw=uniform"


def of_arms(segment: str, epoch: int, **sums: tuple[int, int]) -> dict[tuple[str, int, str], tuple[int, int]]:
    return {(arm, epoch, segment): one for arm, one in sums.items()}


def test_epochs_with_the_same_open_arms_are_one_and_others_are_not() -> None:
    shut = {"weights": {"a": 0.5, "b": 0.5, "c": 0.0}}
    one = record({}, {"weights": {"a": 0.1, "b": 0.8, "c": 0.1}}, shut, {}, {"final": True})
    found = uniform_look(
        one,
        statistics(
            {
                **of_arms(IN, 0, a=(10, 1), b=(11, 2), c=(12, 3)),
                **of_arms(IN, 1, a=(20, 4), b=(21, 5), c=(22, 6)),
                **of_arms(IN, 2, a=(30, 7), b=(31, 8)),
                **of_arms(IN, 3, a=(40, 9)),
                **of_arms(IN, 5, a=(50, 9)),  # of an epoch that the record does not know
                **of_arms("draw=other", 0, a=(99, 9)),
                **of_arms("", 0, a=(99, 9)),
            }
        ),
    )
    assert found is not None
    alone, rows = found
    even = {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}
    assert [(epoch.epoch, epoch.weights) for epoch in alone.epochs] == [
        (0, even),
        (2, {"a": 0.5, "b": 0.5, "c": 0.0}),
    ]
    assert {(row.arm, row.epoch, row.segment): row.units for row in rows.units} == {
        ("a", 0, ""): 70,
        ("b", 0, ""): 32,
        ("c", 0, ""): 34,
        ("a", 2, ""): 30,
        ("b", 2, ""): 31,
    }
    assert {(row.arm, row.epoch): (row.n, row.s) for row in rows.moments}["a", 0] == (70, "14")


def test_the_effect_is_that_of_the_slice_and_of_nobody_else() -> None:
    """Outside of it c is far better; inside all arms are equal, in two epochs of different rates."""
    cells = {
        **of_arms("", 0, a=(5000, 500), b=(4000, 400), c=(4000, 1600)),
        **of_arms("", 1, a=(2000, 800), b=(2000, 800), c=(9000, 4500)),
        **of_arms(IN, 0, a=(1000, 100), b=(1000, 100), c=(1000, 100)),
        **of_arms(IN, 1, a=(1000, 400), b=(1000, 400), c=(1000, 400)),
    }
    found = evaluate(record({}, {"weights": {"a": 0.15, "b": 0.15, "c": 0.7}}), statistics(cells))
    alone = found.uniform_slice
    assert alone is not None
    assert alone.share == 0.3
    assert [(one.metric, one.arm) for one in alone.effects] == [
        ("order", "b"),
        ("order", "c"),
        ("spend", "b"),
        ("spend", "c"),
    ]
    for one in alone.effects[:2]:
        assert (one.control_units, one.arm_units, one.control_mean) == (2000, 2000, pytest.approx(0.25))
        assert one.effect is not None
        assert one.effect.estimate == pytest.approx(0.0)
        assert one.effect.lower is not None
        assert one.effect.upper is not None
        assert one.effect.lower < 0 < one.effect.upper
        assert one.effect.threshold_log_e == pytest.approx(4.382, abs=1e-3)  # ln(4 / 0.05)
    assert alone.effects[2].effect is None
    assert [(one.arm, one.units, one.expected_units) for one in alone.arms] == [
        (arm, 2000, pytest.approx(2000.0)) for arm in "abc"
    ]
    assert alone.sample_ratio is not None
    assert not alone.sample_ratio.mismatch
    c_of_all = next(one for one in found.metrics if (one.metric, one.arm) == ("order", "c"))
    assert c_of_all.effect is not None
    assert c_of_all.effect.estimate is not None
    assert c_of_all.effect.estimate > 0.1


def test_units_that_were_not_drawn_evenly_are_seen() -> None:
    cells = {
        **of_arms("", 0, a=(4000, 1), b=(3000, 1), c=(3000, 1)),
        **of_arms(IN, 0, a=(900, 1), b=(1500, 1), c=(900, 1)),
    }
    found = evaluate(record(), statistics(cells)).uniform_slice
    assert found is not None
    assert found.sample_ratio is not None
    assert found.sample_ratio.mismatch
    assert found.sample_ratio.diagnosis == ()


def test_the_slice_is_no_segment_of_people() -> None:
    cells = {
        key: sums
        for segment in ("", "os=tv", IN)
        for key, sums in of_arms(segment, 0, a=(4000, 1), b=(9000, 1), c=(3000, 1)).items()
    }
    found = evaluate(record(), statistics(cells))
    assert {one.segment for one in found.segments} == {"os=tv", "os=web", "os=other"}
    assert found.sample_ratio is not None
    assert {one.segment for one in found.sample_ratio.diagnosis} == {"os=tv"}


def test_in_epochs_with_contexts_the_slice_is_still_even() -> None:
    text = FILE.replace("thompson", "contextual\n  context: os")
    contexts = {"tv": {"a": 0.1, "b": 0.8, "c": 0.1}, "web": {"a": 0.8, "b": 0.1, "c": 0.1}}
    one = record({}, {"contexts": contexts}, of=spec(text))
    found = uniform_look(one, statistics(of_arms(IN, 1, a=(20, 4), b=(21, 5), c=(22, 6))))
    assert found is not None
    alone, rows = found
    assert [(epoch.epoch, epoch.contexts) for epoch in alone.epochs] == [(0, {})]
    assert [row.epoch for row in rows.units] == [0, 0, 0]


def test_nobody_who_does_not_tell_the_slice_has_one() -> None:
    told = record()
    plain = FILE.replace("  uniform_segment: draw\n", "")
    silent = record(of=spec(plain))
    assert evaluate(silent, ExperimentStatistics()).uniform_slice is None
    empty = evaluate(told, ExperimentStatistics()).uniform_slice
    assert empty is not None
    assert empty.sample_ratio is None
    assert [one.effect for one in empty.effects] == [None] * 4
    assert len({told.design_hash, silent.design_hash}) == 2


def test_the_config_tells_applications_until_the_end() -> None:
    config = next_config(None, record())
    assert (config.uniform_slice, config.uniform_segment) == (0.3, "draw")
    plain = next_config(None, record(of=spec(FILE.replace("  uniform_segment: draw\n", ""))))
    assert (plain.uniform_slice, plain.uniform_segment) == (0.0, None)


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        (
            "uniform_segment: draw",
            "uniform_segment: os",
            "must be a registered segment with the value uniform",
        ),
        (
            "uniform_segment: draw",
            "uniform_segment: none",
            "must be a registered segment with the value uniform",
        ),
        (
            "uniform_slice: 0.3",
            "uniform_slice: 0",
            "needs a uniform_slice over 0 of weights that follow the evidence",
        ),
        ("thompson", "fixed", "needs a uniform_slice over 0 of weights that follow the evidence"),
    ],
)
def test_each_fault_is_named_with_its_line(old: str, new: str, rule: str) -> None:
    with pytest.raises(SpecFaults) as caught:
        spec(FILE.replace(old, new))
    assert [(one.line, one.path, one.message) for one in caught.value.faults] == [
        (18, "allocation.uniform_segment", rule)
    ]


def test_the_context_is_not_the_slice() -> None:
    text = FILE.replace("thompson", "contextual\n  context: draw")
    with pytest.raises(SpecFaults, match="must not be the context"):
        spec(text)


def test_a_level_beyond_the_method_is_a_fault_of_the_slice_alone() -> None:
    one = record()
    broken = msgspec.structs.replace(one.spec, alpha=5e-324)
    plans = uniform_plans(msgspec.structs.replace(one, spec=broken, design_hash="x"))
    assert all(plan.fault for plan in plans)
