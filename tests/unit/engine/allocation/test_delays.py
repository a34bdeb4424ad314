"""From sums by age to evidence: who is open, how many of the conversions have come, and whose delays are whose."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.domain.statistics import ExperimentStatistics, build
from stream_xp.engine.allocation import Conversions, Evidence, delayed_evidence
from stream_xp.engine.allocation.delays import COMMON_WORTH, REGISTERED_WORTH
from stream_xp.engine.allocation.maturity import MaturityCurve, OpenUnits, mature_conversions

HOUR = 3_600_000.0


def spec_of(shares: tuple[float, ...] | None = None, **allocation: Any) -> ExperimentSpec:
    return msgspec.convert(
        {
            "experiment": "e",
            "owner": "o",
            "hypothesis": "h",
            "unit": "u",
            "planned_sample": 1000,
            "arms": [{"key": "a", "weight": 0.5, "control": True}, {"key": "b", "weight": 0.5}],
            "metrics": [
                {
                    "key": "order",
                    "kind": "conversion",
                    "role": "primary",
                    "direction": "increase",
                    "attribution_window": "10h",
                }
            ],
            "segments": {"os": ["tv"]},
            "allocation": {
                "policy": "thompson",
                "metric": "order",
                "delay": {"ages": ["2h", "5h"], **({} if shares is None else {"shares": shares})},
                **allocation,
            },
        },
        ExperimentSpec,
    )


Sums = tuple[int, int, int]
"""Units that reached an age, converted by it, and converted by the age before."""


def statistics(cells: dict[tuple[str, int, str], tuple[Sums, Sums, Sums]]) -> ExperimentStatistics:
    moments, products = {}, {}
    for (arm, epoch, segment), reached in cells.items():
        for at, (n, s, before) in enumerate(reached, start=1):
            key = (f"order@by{at}", arm, epoch, segment)
            moments[key] = (n, s, s)
            if at > 1:
                products[key] = (before, before, before)
    return build(
        units={}, moments=moments, products=products, crossover_units=0, first_exposure_ms=0, out_of_range={}
    )


def evidence(
    spec: ExperimentSpec, found: ExperimentStatistics, **how: Any
) -> dict[tuple[str, int, str], Conversions]:
    assert spec.allocation is not None
    assert spec.allocation.delay is not None
    rows = delayed_evidence(spec, spec.allocation.delay, found, **how)
    return {
        (row.arm, row.epoch, row.context): row.sums
        for row in rows
        if isinstance(row.sums, Conversions) and row.sums.units
    }


def test_one_arm_by_hand() -> None:
    """Of 100 units 60 have reached 5 h and 30 the whole window."""
    found = statistics({("a", 0, ""): ((100, 10, 0), (60, 12, 6), (30, 10, 8))})
    # Development factors of the only arm are those of all arms: drawn towards itself it does not move.
    curve = MaturityCurve((2 * HOUR, 5 * HOUR, 10 * HOUR), (6 / 12 * 8 / 10, 8 / 10, 1.0))
    still = [OpenUnits(2 * HOUR, Conversions(40, 4)), OpenUnits(5 * HOUR, Conversions(30, 4))]
    wanted = mature_conversions(Conversions(30, 10), still, curve)
    (sums,) = evidence(spec_of(), found).values()
    assert (sums.units, sums.conversions) == pytest.approx((wanted.units, wanted.conversions))
    assert 30 < sums.units < 100


def test_an_arm_has_delays_of_its_own_drawn_towards_the_common_ones() -> None:
    slow = ((200, 2, 0), (180, 10, 2), (160, 90, 9))
    fast = ((200, 70, 0), (180, 85, 68), (160, 90, 81))
    found = statistics({("a", 0, ""): slow, ("b", 0, ""): fast})
    rows = evidence(spec_of(), found)
    factor = [
        (2 + COMMON_WORTH * 70 / 95) / (10 + COMMON_WORTH),
        (9 + COMMON_WORTH * 90 / 180) / (90 + COMMON_WORTH),
    ]
    curve = MaturityCurve((2 * HOUR, 5 * HOUR, 10 * HOUR), (factor[0] * factor[1], factor[1], 1.0))
    still = [OpenUnits(2 * HOUR, Conversions(20, 0)), OpenUnits(5 * HOUR, Conversions(20, 1))]
    wanted = mature_conversions(Conversions(160, 90), still, curve)
    assert rows["a", 0, ""].units == pytest.approx(wanted.units)


def test_the_shares_are_of_all_epochs_and_the_rate_is_of_its_own() -> None:
    old, new = ((50, 5, 0), (50, 6, 5), (50, 10, 6)), ((50, 10, 0), (0, 0, 0), (0, 0, 0))
    rows = evidence(spec_of(), statistics({("a", 0, ""): old, ("a", 1, ""): new}))
    assert rows["a", 0, ""] == Conversions(50, 10)
    share = 5 / 6 * 6 / 10
    assert rows["a", 1, ""].conversions / rows["a", 1, ""].units == pytest.approx(10 / 50 / share)


def test_nothing_is_made_of_ages_after_which_nothing_is_known() -> None:
    young = {
        ("a", 0, ""): ((50, 5, 0), (20, 4, 3), (0, 0, 0)),
        ("b", 0, ""): ((50, 5, 0), (0, 0, 0), (0, 0, 0)),
    }
    assert evidence(spec_of(), statistics(young)) == {}


def test_registered_shares_speak_from_the_first_age_on() -> None:
    found = statistics({("a", 0, ""): ((50, 5, 0), (0, 0, 0), (0, 0, 0))})
    rows = evidence(spec_of(shares=(0.25, 0.5)), found)
    assert rows["a", 0, ""].conversions / rows["a", 0, ""].units == pytest.approx(5 / 50 / 0.25)
    # What is seen overrules them in time.
    many = 10**6
    found = statistics({("a", 0, ""): ((20 * many, 2 * many, 0), *2 * [(10 * many, many, many)])})
    rows = evidence(spec_of(shares=(0.25, 0.5)), found)
    assert rows["a", 0, ""].conversions / rows["a", 0, ""].units == pytest.approx(0.1, abs=1e-4)
    assert REGISTERED_WORTH > COMMON_WORTH


def test_contexts_are_the_values_of_the_segment_alone() -> None:
    whole = ((9, 3, 0), (9, 3, 3), (9, 3, 3))
    cells = {("a", 0, segment): whole for segment in ("", "os=tv", "os=other", "osx=tv")}
    rows = evidence(spec_of(policy="contextual", context="os"), statistics(cells), feature="os")
    assert rows == {("a", 0, "tv"): Conversions(9, 3), ("a", 0, "other"): Conversions(9, 3)}


def test_every_arm_has_a_row_before_the_first_unit() -> None:
    spec = spec_of()
    assert spec.allocation is not None
    assert spec.allocation.delay is not None
    rows = delayed_evidence(spec, spec.allocation.delay, ExperimentStatistics())
    assert rows == [Evidence("a", Conversions(0, 0)), Evidence("b", Conversions(0, 0))]
