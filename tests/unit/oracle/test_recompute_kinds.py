"""The oracle: ratios, covariates, counts and latencies."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from stream_xp.domain.experiment import Adjustment, Aggregation, Covariate, Denominator
from stream_xp.errors import Reason
from stream_xp.services.oracle.recompute import REWARDS, Recomputed, histogram_bin
from tests.unit.oracle.recompute_world import (
    WINDOW,
    Case,
    L,
    T,
    count,
    latency,
    mean,
    metric,
    published,
    ratio,
    spec,
)


# Ratios and covariates
def table(done: Recomputed, name: str, version: int = 1) -> dict[tuple[str, str, str], tuple[Any, ...]]:
    """Rows of a table by metric, arm and segment."""
    rows = getattr(done.statistics["exp", version], name)
    return {(row.metric, row.arm, row.segment): msgspec.structs.astuple(row)[4:] for row in rows}


def test_a_ratio_has_both_values_of_each_mature_unit() -> None:
    case = Case(published(spec(ratio(Denominator(event="visit", bound=4, scale=0.5)))))
    for unit in "uv":
        case.exposures.add(T, unit=unit)
    case.rewards.add(T, metric="spend", value=3)
    case.rewards.add(T, metric="spend", value=-4)
    case.rewards.add(T, unit="v", metric="visit", value=1)
    case.rewards.add(T + WINDOW - 1, metric="visit", value=4)
    case.rewards.add(T + WINDOW, metric="visit", value=4)
    assert table(case.run(T + WINDOW + L - 1), "products") == {}
    done = case.run(T + WINDOW + L)
    assert table(done, "moments") == {("r", "a", ""): (2, "-1", "1")}
    assert table(done, "products") == {("r", "a", ""): ("10", "68", "-8")}
    assert done.reward_outcomes.counted == 4


@pytest.mark.parametrize(
    ("aggregation", "x"),
    [(Aggregation.SUM, 4), (Aggregation.LAST, -3), (Aggregation.MAX, 5), (Aggregation.ANY, 1)],
)
def test_both_streams_of_a_ratio_may_take_the_same_reward(aggregation: Aggregation, x: int) -> None:
    bound = None if aggregation is Aggregation.ANY else 6
    case = Case(published(spec(ratio(Denominator(event="spend", aggregation=aggregation, bound=bound)))))
    case.exposures.add(T)
    for at, value in ((1, 5), (3, -3), (2, 2)):
        case.rewards.add(T + at, metric="spend", value=value)
    assert table(case.run(), "products") == {("r", "a", ""): (str(x), str(x * x), str(4 * x))}


def test_each_stream_of_a_ratio_refuses_by_itself_under_the_metrics_key() -> None:
    case = Case(published(spec(ratio(Denominator(event="spend", bound=4)))))
    case.exposures.add(T)
    case.rewards.add(T, metric="spend", value=7)
    case.rewards.add(T, metric="spend", value=11)
    done = case.run()
    assert done.dead_letters == {(REWARDS, 1): Reason.VALUE_OUT_OF_RANGE}
    assert done.statistics["exp", 1].out_of_range == {"r": 1}
    assert table(done, "moments") == {("r", "a", ""): (1, "7", "49")}
    assert table(done, "products") == {("r", "a", ""): ("0", "0", "0")}


def test_a_value_that_both_streams_refuse_beside_another_listener_counts_twice() -> None:
    both = ratio(Denominator(event="spend", bound=4))
    case = Case(published(spec(both, metric("bought", event="spend"))))
    case.exposures.add(T)
    case.rewards.add(T, metric="spend", value=11)
    assert case.run().statistics["exp", 1].out_of_range == {"r": 2}


@pytest.mark.parametrize(
    ("given", "steps"),
    [(1.25, 2), (0.75, 2), (None, -6), (25.0, 40), (-1e300, -40), (1e308, 40), (20.1, 40), (-0.0, 0)],
)
def test_a_covariate_is_quantised_and_cut_off_at_the_bound(given: float | None, steps: int) -> None:
    covariate = Covariate(scale=0.5, bound=20, missing=-3.1)
    design = spec(
        metric(adjustment=Adjustment.CUPED), mean(adjustment=Adjustment.ANCOVA), covariate=covariate
    )
    case = Case(published(design))
    case.exposures.add(T, **({} if given is None else {"covariate": given}))
    case.rewards.add(T, metric="spend", value=1)
    found = table(case.run(), "products")
    assert found["click", "a", ""] == (str(steps), str(steps**2), "0")
    assert found["spend", "a", ""] == (str(steps), str(steps**2), str(2 * steps))


def test_a_covariate_has_no_products_where_no_metric_is_adjusted() -> None:
    case = Case(published(spec(metric(), covariate=Covariate(scale=1, bound=1))))
    case.exposures.add(T, covariate=1)
    assert table(case.run(), "products") == {}


def test_the_first_exposure_fixes_the_covariate() -> None:
    design = spec(metric(adjustment=Adjustment.CUPED), covariate=Covariate(scale=1, bound=99))
    case = Case(published(design))
    case.exposures.add(T + 5, covariate=7)
    case.exposures.add(T, covariate=8)
    case.exposures.add(T, covariate=9)
    assert table(case.run(), "products") == {("click", "a", ""): ("8", "64", "0")}


def test_a_count_by_first_has_units_and_events_as_soon_as_they_are_settled() -> None:
    case = Case(published(spec(count())))
    for unit in "uvw":
        case.exposures.add(T, unit=unit)
    for at, unit, value in ((1, "u", 1), (3, "u", -2.5), (2, "v", 0), (3, "v", 1e300), (4, "nobody", 1)):
        case.rewards.add(T + at, unit=unit, value=value)
    case.rewards.add(T - 1, unit="w")
    case.rewards.add(T + WINDOW, unit="w")
    wanted = {T + 1: {}, T + 2: {("click", "a", ""): (1, 1)}, T + 4: {("click", "a", ""): (2, 3)}}
    for watermark_ms, rows in wanted.items():
        done = case.run(watermark_ms + L)
        assert table(done, "events") == rows
        assert table(done, "moments") == {}
    done = case.run()
    assert table(done, "events") == wanted[T + 4]
    assert done.reward_outcomes.counted == 4


def test_a_count_by_sum_has_moments_once_mature() -> None:
    case = Case(published(spec(count(aggregation=Aggregation.SUM))))
    case.exposures.add(T)
    case.exposures.add(T, unit="v")
    for value in (1, 0, -7, 1e300):
        case.rewards.add(T, value=value)
    assert table(case.run(T + WINDOW + L - 1), "moments") == {}
    done = case.run(T + WINDOW + L)
    assert table(done, "moments") == {("click", "a", ""): (2, "3", "9")}
    assert (table(done, "events"), done.statistics["exp", 1].out_of_range) == ({}, {})


@pytest.mark.parametrize(
    ("aggregation", "steps"),
    [(None, 8), (Aggregation.FIRST, 8), (Aggregation.MAX, 120), (Aggregation.LAST, 6)],
)
def test_a_latency_has_one_value_of_each_unit_with_a_reward(
    aggregation: Aggregation | None, steps: int
) -> None:
    case = Case(published(spec(latency(aggregation=aggregation))))
    case.exposures.add(T)
    case.exposures.add(T, unit="v")
    for at, value in ((2, 60), (1, 4), (3, 2), (3, 3), (1, 5)):
        case.rewards.add(T + at, metric="wait", value=value)
    at_once = aggregation in (None, Aggregation.FIRST)
    rows = {("wait", "a", ""): (((histogram_bin(steps), 1),),)}
    assert table(case.run(T + 2 + L), "histograms") == (rows if at_once else {})
    assert table(case.run(T + WINDOW + L), "histograms") == rows


def test_a_latency_refuses_what_is_negative_or_beyond_its_bound() -> None:
    case = Case(published(spec(latency(), metric("waited", event="wait"))))
    case.exposures.add(T)
    for at, value in enumerate((-1e-9, 100.3, 1e308, -0.0, 7)):
        case.rewards.add(T + at, metric="wait", value=value)
    done = case.run()
    assert done.statistics["exp", 1].out_of_range == {"wait": 3}
    assert table(done, "histograms") == {("wait", "a", ""): (((0, 1),),)}


def test_a_negative_latency_that_nothing_else_listens_to_is_a_dead_letter() -> None:
    case = Case(published(spec(latency())))
    case.exposures.add(T)
    case.rewards.add(T, metric="wait", value=-1)
    assert case.run().dead_letters == {(REWARDS, 0): Reason.VALUE_OUT_OF_RANGE}


def test_a_crossover_takes_back_what_counted_at_once() -> None:
    case = Case(published(spec(count(), latency())))
    for unit in "uv":
        case.exposures.add(T, unit=unit)
        case.rewards.add(T + 1, unit=unit)
        case.rewards.add(T + 1, unit=unit, metric="wait", value=2)
    case.rewards.add(T + 2)
    assert table(case.run(T + 100 + L), "events") == {("click", "a", ""): (2, 3)}
    case.exposures.add(T + 200, arm="b")
    done = case.run(T + 100 + L)
    assert table(done, "events") == {("click", "a", ""): (1, 1)}
    assert table(done, "histograms") == {("wait", "a", ""): (((4, 1),),)}
    assert done.statistics["exp", 1].crossover_units == 1


def test_events_stand_in_the_rows_of_their_units_epoch_and_segments() -> None:
    design = spec(count(), segments={"device": ("tv",)})
    case = Case(published(design, effective=(0, T)))
    case.exposures.add(T - 1, segments={"device": "tv"})
    case.exposures.add(T, unit="v", arm="b")
    for unit in "uv":
        case.rewards.add(T + 1, unit=unit)
    rows = case.run().statistics["exp", 1].events
    assert [msgspec.structs.astuple(row)[1:4] for row in rows] == [
        ("a", 0, ""),
        ("a", 0, "device=tv"),
        ("b", 1, ""),
        ("b", 1, "device=other"),
    ]


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (0, 0),
        (31, 31),
        (32, 32),
        (63, 63),
        (64, 64),
        (65, 64),
        (66, 65),
        (127, 95),
        (128, 96),
        (131, 96),
        (132, 97),
    ],
)
def test_bins_are_one_wide_below_64_and_32_to_each_doubling(value: int, place: int) -> None:
    assert histogram_bin(value) == place
