"""The oracle: late, duplicate, refused, and what a spec governs."""

from __future__ import annotations

import json

import pytest

from stream_xp.domain.experiment import Status
from stream_xp.domain.statistics import ExperimentStatistics
from stream_xp.errors import Reason
from stream_xp.services.oracle.recompute import EXPOSURES, REWARDS, Fate, LoggedSpec
from tests.unit.oracle.recompute_world import Case, D, L, T, moments, published, spec


# Nothing at all
def test_empty_prefix_gives_empty_statistics_of_every_version() -> None:
    done = Case(published(spec()), published(spec(version=2), at_ms=10)).run(None)
    assert done.statistics == {("exp", 1): ExperimentStatistics(), ("exp", 2): ExperimentStatistics()}
    assert done.exposure_outcomes.read == done.reward_outcomes.read == 0


# Lateness
@pytest.mark.parametrize(("behind_ms", "fate"), [(L - 1, "counted"), (L, "counted"), (L + 1, "late")])
def test_late_is_more_than_the_allowed_lateness(behind_ms: int, fate: str) -> None:
    case = Case()
    case.exposures.add(T, at=T + behind_ms)
    case.exposures.add(T, unit="v")
    case.rewards.add(T, at=T + behind_ms, unit="v")
    done = case.run()
    assert done.exposure_fates[0] == fate
    assert done.reward_fates[0] == fate


def test_lateness_is_measured_on_log_time_which_never_goes_back() -> None:
    case = Case()
    case.exposures.add(T + L + 1, unit="v")
    late = case.exposures.add(T, at=T)
    assert case.run().exposure_fates[late] is Fate.LATE


def test_event_time_ahead_of_log_time_is_measured_on_log_time_too() -> None:
    case = Case()
    case.exposures.add(T + 200_000, unit="v")
    ahead = case.exposures.add(T + 400_000, at=T)
    assert case.run().exposure_fates[ahead] is Fate.COUNTED


def test_a_bad_record_is_dead_lettered_even_if_late() -> None:
    case = Case()
    case.exposures.add(T, at=T + L + 1, arm="nobody")
    done = case.run()
    assert done.exposure_fates[0] is Fate.DEAD_LETTERED
    assert done.dead_letters == {(EXPOSURES, 0): Reason.UNKNOWN_ARM}


def test_behind_watermark_is_late_where_the_watermark_bears_it_out() -> None:
    case = Case()
    case.exposures.add(T)
    case.exposures.add(T, unit="v")
    case.rewards.add(T, unit="v")
    assert case.run(T + L + 1, exposures=[0]).exposure_fates == {0: Fate.LATE, 1: Fate.COUNTED}
    assert case.run(T + L, exposures=[0]).exposure_fates == {0: Fate.COUNTED, 1: Fate.COUNTED}
    assert case.run(T + L + 1, rewards=[0]).reward_fates == {0: Fate.LATE}


# Decoding
@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", Reason.EMPTY_VALUE),
        (b"{", Reason.INVALID_JSON),
        (b'{"a":' * 10_000, Reason.INVALID_JSON),
        (b'{"id":"i"}', Reason.INVALID_FIELD),
        (b" " * 70_000, Reason.TOO_LARGE),
        (json.dumps({"id": "i", "time": T, "unit": "w", "metric": "click"}).encode(), Reason.KEY_MISMATCH),
        (
            json.dumps({"id": "i", "time": 32503680000000, "unit": "u", "metric": "click"}).encode(),
            Reason.TIME_OUT_OF_RANGE,
        ),
        (b'{"id":"i","time":1000000,"unit":"u","metric":"click","value":1e999}', Reason.INVALID_FIELD),
        (b'{"id":"i","time":1000000,"unit":"u","metric":"click","value":NaN}', Reason.INVALID_JSON),
    ],
)
def test_bad_rewards_are_dead_lettered_with_their_reason(raw: bytes, reason: Reason) -> None:
    case = Case()
    case.rewards.add(T, raw=raw)
    done = case.run()
    assert done.reward_outcomes.dead_lettered == 1
    assert done.dead_letters == {(REWARDS, 0): reason}


def test_future_tolerance_is_measured_from_log_time() -> None:
    case = Case()
    case.exposures.add(T + 300_000, at=T)
    case.exposures.add(T + 300_001, at=T, unit="v")
    assert case.run().exposure_fates == {0: Fate.COUNTED, 1: Fate.DEAD_LETTERED}


# Specs in force
@pytest.mark.parametrize(
    ("at_ms", "fate"), [(T + D - 1, "unknown_experiment"), (T + D, "counted"), (T + D + 1, "counted")]
)
def test_a_spec_governs_from_its_log_time_plus_the_delay(at_ms: int, fate: str) -> None:
    case = Case(published(spec(), at_ms=T))
    case.exposures.add(at_ms)
    assert case.run().exposure_fates[0] == fate


def test_log_time_of_a_spec_never_goes_back() -> None:
    case = Case(published(spec(key="other"), at_ms=T), published(spec(), at_ms=0))
    case.exposures.add(T + D - 1)
    case.exposures.add(T + D)
    assert case.run().exposure_fates == {0: Fate.UNKNOWN_EXPERIMENT, 1: Fate.COUNTED}


@pytest.mark.parametrize(
    "end",
    [published(spec(), at_ms=T, status=Status.ARCHIVED), LoggedSpec(T, "exp", None)],
    ids=["archived", "tombstone"],
)
def test_a_version_that_has_ended_does_not_come_back(end: LoggedSpec) -> None:
    case = Case(
        published(spec()), end, published(spec(), at_ms=T + 10), published(spec(version=2), at_ms=T + 20)
    )
    for at_ms in (T + D - 1, T + D, T + D + 10, T + D + 20):
        case.exposures.add(at_ms, unit=f"u{at_ms}")
    assert list(case.run().exposure_fates.values()) == [
        "counted",
        "inactive_experiment",
        "inactive_experiment",
        "counted",
    ]


def test_units_past_the_bound_are_kept_out_with_all_that_is_theirs() -> None:
    case = Case(published(spec()), published(spec(key="other")))
    for at, (unit, arm) in enumerate(
        [("u", "a"), ("v", "a"), ("w", "b"), ("u", "b"), ("w", "b"), ("v", "a")]
    ):
        case.exposures.add(T + at, unit=unit, arm=arm)
    case.exposures.add(T, at=T + 6, unit="w", experiment="other")
    case.rewards.add(T + 10, unit="w")
    case.rewards.add(T + 10, unit="v")
    found = case.run(max_units=2)
    assert [fate.value for fate in found.exposure_fates.values()] == [
        "crossover",
        "counted",
        "over_limit",
        "crossover",
        "over_limit",
        "counted",
        "counted",
    ]
    mine = found.statistics["exp", 1]
    assert (mine.over_limit, mine.crossover_units, [row.units for row in mine.units]) == (2, 1, [1])
    assert found.statistics["other", 1].over_limit == 0
    assert found.exposure_outcomes.over_limit == 2
    assert found.exposure_outcomes.conserved()
    assert case.run(max_units=3) == case.run()


def test_log_time_of_a_spec_is_that_of_its_own_partition() -> None:
    own = published(spec(), at_ms=0)._replace(partition=1)
    case = Case(published(spec(key="other"), at_ms=T), own)
    case.exposures.add(D)
    assert case.run().exposure_fates == {0: Fate.COUNTED}


@pytest.mark.parametrize(
    "end",
    [published(spec(), at_ms=T, status=Status.ARCHIVED), LoggedSpec(T, "exp", None)],
    ids=["archived", "tombstone"],
)
def test_an_ended_experiment_takes_no_records_from_its_end_on(end: LoggedSpec) -> None:
    case = Case(published(spec()), end)
    case.exposures.add(T + D - 1)
    case.exposures.add(T + D, unit="v")
    case.exposures.add(T + D, unit="v", arm="nobody")
    case.exposures.add(T + D, unit="v", experiment="never")
    case.rewards.add(T + D - 1)
    case.rewards.add(T + D)
    case.rewards.add(T + D, experiment="exp")
    case.rewards.add(T + D, experiment="never")
    done = case.run()
    assert list(done.exposure_fates.values()) == [
        "counted",
        "inactive_experiment",
        "inactive_experiment",
        "unknown_experiment",
    ]
    assert list(done.reward_fates.values()) == [
        "counted",
        "unattributed",
        "inactive_experiment",
        "unknown_experiment",
    ]
    # Its units go on maturing.
    assert moments(done) == {("a", 0, ""): (1, 1, 1)}


def test_inactive_comes_before_late_and_late_before_duplicate() -> None:
    case = Case(published(spec()), LoggedSpec(T, "exp", None))
    case.exposures.add(T - 2 * L, id="same")
    case.exposures.add(T - 2 * L, id="same", at=T)
    case.exposures.add(T - 2 * L, id="same", at=T + D)
    assert case.run().exposure_fates == {0: Fate.COUNTED, 1: Fate.LATE, 2: Fate.INACTIVE_EXPERIMENT}
