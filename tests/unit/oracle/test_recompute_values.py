"""The oracle: values in steps, and what is refused of them."""

from __future__ import annotations

import math

import pytest

from stream_xp.domain.experiment import Aggregation, Metric
from stream_xp.errors import Reason
from stream_xp.services.oracle.recompute import REWARDS, Fate
from tests.unit.oracle.recompute_world import Case, T, mean, metric, moments, published, spec


# Values
def value_of(design: Metric, *rewards: tuple[int, float]) -> tuple[int, int, int]:
    case = Case(published(spec(design)))
    case.exposures.add(T)
    for after_ms, value in rewards:
        case.rewards.add(T + after_ms, metric=design.listens_to, value=value)
    return moments(case.run(), design.key)["a", 0, ""]


@pytest.mark.parametrize(
    ("value", "steps"),
    [(0.25, 0), (0.75, 2), (1.25, 2), (-0.25, 0), (-0.75, -2), (0.26, 1), (10.0, 20), (10.25, 20), (0.0, 0)],
)
def test_values_are_rounded_to_steps_with_ties_to_even(value: float, steps: int) -> None:
    assert value_of(mean(), (0, value)) == (1, steps, steps * steps)


def test_division_is_binary64_and_happens_before_rounding() -> None:
    # 0.15 / 0.1 is 1.4999999999999998 in binary64, no tie.
    assert value_of(mean(scale=0.1), (0, 0.15))[1] == round(0.15 / 0.1) == 1
    assert value_of(mean(scale=0.1), (0, 0.35))[1] == round(0.35 / 0.1) == 3


def test_sum_is_exact_beyond_binary64() -> None:
    big = 2.0**40
    steps = 2**40
    assert value_of(mean(scale=1.0, bound=big), *((n, big) for n in range(3)), (3, 1.0)) == (
        1,
        3 * steps + 1,
        (3 * steps + 1) ** 2,
    )


@pytest.mark.parametrize(
    ("aggregation", "steps"),
    [(Aggregation.SUM, 6), (Aggregation.MAX, 8), (Aggregation.LAST, -4), (Aggregation.ANY, 1)],
)
def test_aggregations(aggregation: Aggregation, steps: int) -> None:
    design = mean(aggregation=aggregation)
    assert value_of(design, (0, 1.0), (2, -2.0), (1, 4.0))[1] == steps


@pytest.mark.parametrize("aggregation", [one for one in Aggregation if one is not Aggregation.FIRST])
def test_no_reward_is_worth_0(aggregation: Aggregation) -> None:
    assert value_of(mean(aggregation=aggregation)) == (1, 0, 0)


def test_last_takes_the_larger_offset_among_equal_times_and_max_may_be_negative() -> None:
    assert value_of(mean(aggregation=Aggregation.LAST), (5, 1.0), (5, 2.0), (4, 3.0))[1] == 4
    assert value_of(mean(aggregation=Aggregation.MAX), (0, -1.0), (1, -2.0))[1] == -2


@pytest.mark.parametrize(
    ("value", "steps"), [(0.0, 0), (-0.0, 0), (0.3, 1), (-1.0, 1), (1e300, 1), (5e-324, 1)]
)
def test_a_conversion_is_any_value_but_0_and_has_no_bound(value: float, steps: int) -> None:
    assert value_of(metric(), (0, value)) == (1, steps, steps)


# Out of range
def two_metrics(first: Metric, second: Metric, value: float) -> Case:
    case = Case(published(spec(first, second)))
    case.exposures.add(T)
    case.rewards.add(T, metric="spend", value=value)
    return case


@pytest.mark.parametrize(
    ("value", "steps", "refused"), [(10.25, 20, 0), (10.3, 0, 1), (-10.3, 0, 1), (1e308, 0, 1)]
)
def test_a_value_beyond_the_bound_is_refused_by_that_metric_alone(
    value: float, steps: int, refused: int
) -> None:
    case = two_metrics(mean(), metric("bought", event="spend"), value)
    done = case.run()
    assert done.reward_fates == {0: Fate.COUNTED}
    assert moments(done, "spend")["a", 0, ""][1] == steps
    assert moments(done, "bought") == {("a", 0, ""): (1, 1, 1)}
    assert done.statistics["exp", 1].out_of_range == ({"spend": refused} if refused else {})


def test_a_value_that_every_metric_refuses_is_dead_lettered() -> None:
    done = two_metrics(mean(), mean("more", event="spend", bound=20.0), 20.3).run()
    assert done.dead_letters == {(REWARDS, 0): Reason.VALUE_OUT_OF_RANGE}
    assert done.statistics["exp", 1].out_of_range == {}


def test_a_quotient_beyond_binary64_is_refused() -> None:
    tiny = mean(scale=1e-99, bound=1e-90)
    other = mean("other", event="spend", scale=1e-99, bound=1e-90)
    assert two_metrics(tiny, other, math.ldexp(1.0, 1000)).run().reward_outcomes.dead_lettered == 1


def test_refused_rewards_count_only_in_the_window_of_a_unit_crossover_or_not() -> None:
    case = two_metrics(mean(), metric("bought", event="spend"), 99.0)
    case.exposures.add(T, unit="v")
    case.exposures.add(T + 1, unit="v", arm="b")
    case.rewards.add(T, unit="v", metric="spend", value=99.0)
    case.rewards.add(T - 1, unit="v", metric="spend", value=99.0)
    case.rewards.add(T, unit="w", metric="spend", value=99.0)
    done = case.run()
    assert done.statistics["exp", 1].out_of_range == {"spend": 2}
    assert list(done.reward_fates.values()) == ["counted", "counted", "unattributed", "unattributed"]
    assert case.run(None).statistics["exp", 1].out_of_range == {}
