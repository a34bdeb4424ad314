"""Epochs whose weights depend on a context: arms are compared inside each of its values, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from stream_xp import stats
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, WeightEpoch
from stream_xp.domain.experiment_rules import rules
from stream_xp.domain.statistics import ExperimentStatistics, build
from stream_xp.engine.comparison import Cell, cells, comparisons
from stream_xp.engine.evaluate import Evaluation, evaluate, evaluate_all, proven
from stream_xp.engine.quantile_findings import epoch_share

ARMS = ("a", "b")
VALUES = ("tv", "web", "other")
HALVES = {"a": 0.5, "b": 0.5}
TV = {"a": 0.1, "b": 0.9}
WEB = {"a": 0.9, "b": 0.1}


def metric(key: str, **fields: Any) -> dict[str, Any]:
    plain = {"key": key, "kind": "conversion", "role": "primary", "direction": "increase"}
    return {**plain, "attribution_window": "1s", **fields}


METRICS = [
    metric("play"),
    metric("spend", kind="mean", bound=100.0, role="secondary"),
    metric("fitted", adjustment="cuped", role="secondary"),
    metric("share", kind="ratio", bound=10, denominator={"event": "x", "bound": 10}, role="secondary"),
    metric("visits", kind="count", role="secondary"),
    metric("crash", role="guardrail", direction="decrease", margin={"relative": 0.1}),
]
LATENCY = metric("wait", kind="latency", scale=1, bound=60, role="secondary")


def spec(*metrics: dict[str, Any], **fields: Any) -> ExperimentSpec:
    made = msgspec.convert(
        {
            "experiment": "e",
            "owner": "o",
            "hypothesis": "h",
            "unit": "u",
            "planned_sample": 10_000,
            "arms": [{"key": key, "weight": 0.5, "control": key == "a"} for key in ARMS],
            "metrics": metrics or METRICS,
            "segments": {"device": VALUES[:-1], "plan": ["free"]},
            "covariate": {"scale": 1, "bound": 100},
            "allocation": {"policy": "contextual", "metric": "play", "context": "device"},
            **fields,
        },
        ExperimentSpec,
    )
    assert rules(made) == [] or metrics
    return made


def record(design: ExperimentSpec, *epochs: dict[str, Any]) -> ExperimentRecord:
    made = tuple(
        WeightEpoch(**{"epoch": at, "weights": HALVES, "effective_ms": at, **fields})
        for at, fields in enumerate(epochs)
    )
    return ExperimentRecord(spec=design, epochs=made, design_hash=design.design_hash())


MOVED = {"contexts": {"tv": TV, "web": WEB}}

# Units and successes of each arm in each value of the context.
COUNTS = {
    "tv": {"a": (210, 66), "b": (1_790, 531)},
    "web": {"a": (1_830, 188), "b": (170, 14)},
    "other": {"a": (300, 60), "b": (310, 64)},
}


def rows_of(design: ExperimentSpec, places: dict[str, tuple[int, tuple[str, ...]]]) -> ExperimentStatistics:
    """Statistics of COUNTS; `places` says in which epoch and segments the units of each value stand."""
    tables: dict[str, dict[Any, Any]] = {
        name: {} for name in ("units", "moments", "products", "events", "bins")
    }

    def add(table: str, key: tuple[Any, ...], *numbers: int) -> None:
        held = tables[table].get(key, (0,) * len(numbers))
        tables[table][key] = tuple(map(sum, zip(held, numbers, strict=True)))

    for value, (epoch, segments) in places.items():
        for arm, (n, s) in COUNTS[value].items():
            for segment in segments:
                add("units", (arm, epoch, segment), n)
                for one in design.metrics:
                    key = (one.key, arm, epoch, segment)
                    if one.kind == "count":
                        add("events", key, s, 2 * s)
                    elif one.kind == "latency":
                        tables["bins"].setdefault(key, {}).update({3: n - s, 9: s})
                    else:
                        add("moments", key, n, s, s)
                    if one.key in ("fitted", "share"):
                        add("products", key, n // 2 + s, n + s, s)
    return build(
        units={key: n for key, (n,) in tables["units"].items()},
        moments=tables["moments"],
        products=tables["products"],
        events=tables["events"],
        histograms=tables["bins"],
        crossover_units=0,
        first_exposure_ms=0,
        out_of_range={},
    )


IN_ONE_EPOCH = {value: (0, ("", f"device={value}", "plan=other")) for value in VALUES}
IN_THREE_EPOCHS = {value: (at, ("", f"device={value}", "plan=other")) for at, value in enumerate(VALUES)}
THREE_EPOCHS = ({"weights": TV}, {"weights": WEB}, {})


def in_context(design: ExperimentSpec) -> Evaluation:
    return evaluate(record(design, MOVED), rows_of(design, IN_ONE_EPOCH))


def test_a_value_of_the_context_is_as_an_epoch_of_its_own() -> None:
    """The same units with the same weights, once told apart by their context and once by their epoch."""
    design = spec()
    found = in_context(design)
    apart = evaluate(record(design, *THREE_EPOCHS), rows_of(design, IN_THREE_EPOCHS))
    assert found.metrics == apart.metrics
    assert found.arms == apart.arms
    assert found.invalid == apart.invalid == ()
    assert all(result.effect is not None for result in found.metrics)


def test_the_effect_is_that_of_the_hand() -> None:
    (shown,) = in_context(spec(METRICS[1])).metrics
    total = sum(n for of_value in COUNTS.values() for n, _ in of_value.values())
    by_hand = sum(
        (b[0] + a[0]) / total * (b[1] / b[0] - a[1] / a[0])
        for a, b in (of_value.values() for of_value in COUNTS.values())
    )
    assert shown.effect is not None
    assert shown.effect.estimate == pytest.approx(by_hand, rel=1e-12)
    strata = [
        stats.Stratum(*(stats.Moments(n, s, s) for n, s in of_value.values())) for of_value in COUNTS.values()
    ]
    wanted = stats.mean_difference(
        stats.summarise(strata, scale=1), alpha=0.05, rho2=stats.tuned_rho2(10_000, 0.05)
    )
    assert (shown.effect.lower, shown.effect.upper) == pytest.approx((wanted.lower, wanted.upper), rel=1e-12)
    # Pooled, the arm that got the better half of the units looks 15 points better; it is not.
    (pooled,) = evaluate(record(spec(METRICS[1]), {}), rows_of(spec(METRICS[1]), IN_ONE_EPOCH)).metrics
    assert pooled.effect is not None
    assert abs(by_hand) < 0.02
    assert pooled.effect.estimate > 0.13


def test_units_are_expected_as_they_were_drawn() -> None:
    arms = {arm.arm: arm for arm in in_context(spec(METRICS[0])).arms}
    assert (arms["a"].units, arms["b"].units) == (2_340, 2_270)
    assert arms["a"].expected_units == pytest.approx(0.1 * 2_000 + 0.9 * 2_000 + 0.5 * 610)
    assert math.fsum(arm.expected_units for arm in arms.values()) == pytest.approx(4_610)


def test_a_mismatch_inside_contexts_is_found_where_all_together_they_are_half_and_half() -> None:
    design = spec(METRICS[0])
    wrong = {"contexts": {"tv": {"a": 0.15, "b": 0.85}, "web": {"a": 0.95, "b": 0.05}}}
    for epoch, mismatch in ((wrong, True), (MOVED, False), ({}, False)):
        found = evaluate(record(design, epoch), rows_of(design, IN_ONE_EPOCH))
        assert found.sample_ratio is not None
        assert found.sample_ratio.mismatch == mismatch


def test_the_sample_ratio_is_half_that_of_all_cells_and_half_that_of_each_value() -> None:
    design = spec(METRICS[0])
    weights = {"tv": TV, "web": WEB, "other": HALVES}
    counts = [[COUNTS[value][arm][0] for arm in ARMS] for value in VALUES]
    shares = [[weights[value][arm] for arm in ARMS] for value in VALUES]
    each = [float(stats.sample_ratio_log_e([n], [w])) for n, w in zip(counts, shares, strict=True)]
    whole = float(stats.sample_ratio_log_e(counts, shares))
    found = in_context(design).sample_ratio
    assert found is not None
    assert math.exp(found.log_e) == pytest.approx(0.5 * math.exp(whole) + sum(map(math.exp, each)) / 6)
    # Before any epoch depends on the context each value has the e-value 1: the mixture is the same from the start.
    plain = evaluate(record(design, {}), rows_of(design, IN_ONE_EPOCH)).sample_ratio
    pooled = stats.sample_ratio_log_e([[2_340, 2_270]], [[0.5, 0.5]])
    assert plain is not None
    assert math.exp(plain.log_e) == pytest.approx(0.5 * math.exp(float(pooled)) + 0.5)


def test_who_draws_with_the_same_weights_in_every_context_is_found() -> None:
    """Too many in one arm here, too few there: all together they are as many as they should be."""
    design = spec(METRICS[0])
    swapped = {"contexts": {"tv": WEB, "web": TV}}
    found = evaluate(record(design, swapped), rows_of(design, IN_ONE_EPOCH))
    assert found.sample_ratio is not None
    assert found.sample_ratio.mismatch


def test_an_arm_of_weight_0_in_one_context_may_have_units_in_the_others() -> None:
    design = spec(METRICS[0])
    closed = {"contexts": {"tv": {"a": 1.0, "b": 0.0}, "web": WEB}}
    found = evaluate(record(design, closed), rows_of(design, IN_ONE_EPOCH))
    assert found.sample_ratio is not None
    assert found.sample_ratio.mismatch
    none_there = rows_of(design, IN_ONE_EPOCH)
    units = tuple(
        msgspec.structs.replace(row, units=0, settled=0)
        if (row.arm, row.segment) == ("b", "device=tv")
        else row
        for row in none_there.units
    )
    found = evaluate(record(design, closed), msgspec.structs.replace(none_there, units=units))
    assert found.sample_ratio is not None
    assert not found.sample_ratio.mismatch


@pytest.mark.parametrize("share", [0.01, 0.25, 1.0])
def test_coverage_has_no_part_in_the_sample_ratio(share: float) -> None:
    design = spec(METRICS[0])
    found = evaluate(record(design, {**MOVED, "coverage": share}), rows_of(design, IN_ONE_EPOCH))
    assert found.sample_ratio == in_context(design).sample_ratio
    assert found.arms == in_context(design).arms


def test_cells_hold_every_unit_once() -> None:
    found = cells(record(spec(), {}, MOVED, {"contexts": {"other": TV}, "weights": WEB}))
    third = 1 / 3
    assert found == [
        Cell(0, "", HALVES),
        Cell(1, "device=tv", TV, third),
        Cell(1, "device=web", WEB, third),
        Cell(1, "device=other", HALVES, third),
        Cell(2, "device=tv", WEB, third),
        Cell(2, "device=web", WEB, third),
        Cell(2, "device=other", TV, third),
    ]


def test_segments_of_the_context_have_its_weights_and_others_only_plain_epochs() -> None:
    design = spec(METRICS[0])
    places = {"tv": IN_ONE_EPOCH["tv"], "web": (1, ("", "device=web", "plan=other"))}
    strata = {
        one.segment: [(stratum.epoch, stratum.share) for stratum in one.strata]
        for one in comparisons(record(design, {}, MOVED), rows_of(design, places))
    }
    assert strata[""] == [(0, 0.5), (1, pytest.approx(0.1))]
    assert strata["device=tv"] == [(0, 0.5)]
    assert strata["device=web"] == [(1, pytest.approx(0.1))]
    assert strata["plan=other"] == [(0, 0.5)]


def test_an_epoch_that_the_record_does_not_know_yet_is_taken_apart_too() -> None:
    """Harm may stop while the record is behind: it must not be that of another context."""
    design = spec(METRICS[1])
    ahead = {value: (1, segments) for value, (_, segments) in IN_ONE_EPOCH.items()}
    found = evaluate(record(design, {}), rows_of(design, ahead))
    (shown,) = found.metrics
    (known,) = in_context(design).metrics
    assert shown.effect is not None
    assert known.effect is not None
    assert shown.effect.estimate == known.effect.estimate
    assert found.invalid == ("units of an unknown weight epoch: 1",)


def test_contexts_share_the_level_of_their_epoch_where_each_is_tested_alone() -> None:
    design = spec(LATENCY)
    (one,) = (c for c in comparisons(record(design, MOVED), rows_of(design, IN_ONE_EPOCH)) if c.segment == "")
    assert [stratum.part for stratum in one.strata] == [1 / 3] * 3
    assert math.fsum(epoch_share(stratum.epoch) * stratum.part for stratum in one.strata) == pytest.approx(
        epoch_share(0)
    )
    (shown,) = in_context(design).metrics
    assert shown.distribution is not None
    (alone,) = evaluate(record(design, {}), rows_of(design, {"other": IN_ONE_EPOCH["other"]})).metrics
    assert alone.distribution is not None


# --- Simpson's paradox, drawn --------------------------------------------------------------------------------

LOOKS = 8
RUNS = 150


def drawn(rng: np.random.Generator, design: ExperimentSpec, look_units: int) -> list[ExperimentStatistics]:
    """Statistics at each look: no effect on either device, other rates there, and weights that follow the device."""
    rates, shares = {"tv": 0.3, "web": 0.1}, {"tv": 0.9, "web": 0.1}
    units: dict[tuple[str, int, str], int] = {}
    moments: dict[tuple[str, str, int, str], tuple[int, int, int]] = {}
    found = []
    for _ in range(LOOKS):
        for value, rate in rates.items():
            n = int(rng.poisson(look_units / 2))
            treated = int(rng.binomial(n, shares[value]))
            for arm, of_arm in (("a", n - treated), ("b", treated)):
                s = int(rng.binomial(of_arm, rate))
                for segment in ("", f"device={value}", "plan=other"):
                    units[arm, 0, segment] = units.get((arm, 0, segment), 0) + of_arm
                    key = (design.metrics[0].key, arm, 0, segment)
                    before = moments.get(key, (0, 0, 0))
                    moments[key] = (before[0] + of_arm, before[1] + s, before[2] + s)
        found.append(
            build(units=units, moments=moments, crossover_units=0, first_exposure_ms=0, out_of_range={})
        )
    return found


@pytest.mark.parametrize("kind", ["conversion", "mean"])
def test_pooling_over_contexts_errs_and_comparing_inside_them_does_not(kind: str) -> None:
    fields = {"kind": "mean", "bound": 1.0} if kind == "mean" else {}
    design = spec(metric("play", **fields))
    apart, pooled = record(design, MOVED), record(design, {})
    rng = np.random.default_rng(20_261_122)
    looks = [one for _ in range(RUNS) for one in drawn(rng, design, 400)]
    ours, naive = (evaluate_all([(known, one) for one in looks]) for known in (apart, pooled))
    erring, pooled_erring = (runs_with(shown, found) for found in (ours, naive))
    assert pooled_erring > 0.9 * RUNS
    # 0.05, and three standard errors of so many runs.
    assert erring <= RUNS * 0.05 + 3 * math.sqrt(RUNS * 0.05 * 0.95)
    assert runs_with(mismatched, ours) == 0
    # No row tells devices apart inside a plan, so nothing is said about it.
    assert not any(part.effect for one in ours for part in one.segments if part.segment.startswith("plan"))


def runs_with(event: Callable[[Evaluation], bool], looks: Sequence[Evaluation]) -> int:
    """Runs at any of whose looks it happened."""
    return sum(any(map(event, looks[at : at + LOOKS])) for at in range(0, len(looks), LOOKS))


def mismatched(evaluation: Evaluation) -> bool:
    return evaluation.sample_ratio is not None and evaluation.sample_ratio.mismatch


def shown(evaluation: Evaluation) -> bool:
    (result,) = evaluation.metrics
    return result.effect is not None and proven(result.effect)
