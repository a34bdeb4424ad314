"""The oracle: versions of a spec that take over, and records of specs that are refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from stream_xp.domain.experiment import Arm, ExperimentSpec, Role
from stream_xp.services.oracle.recompute import Fate, LoggedSpec
from tests.unit.oracle.recompute_world import Case, D, T, metric, moments, published, spec, units

OTHER_ARMS = (Arm(key="x", weight=0.5, control=True), Arm(key="y", weight=0.5))


def test_a_new_version_takes_over_and_the_old_one_keeps_its_units() -> None:
    case = Case(published(spec()), published(spec(version=2), at_ms=T))
    case.exposures.add(T, arm="a")
    case.exposures.add(T + D, arm="b")
    case.exposures.add(T + D, unit="v")
    case.rewards.add(T)
    case.rewards.add(T + D)
    done = case.run()
    # No crossover: each version has the unit in one arm only.
    assert set(done.exposure_fates.values()) == {Fate.COUNTED}
    assert set(done.reward_fates.values()) == {Fate.COUNTED}
    assert units(done, 1) == {("a", 0, ""): 1}
    assert units(done, 2) == {("a", 0, ""): 1, ("b", 0, ""): 1}
    assert moments(done, version=1) == {("a", 0, ""): (1, 1, 1)}
    assert moments(done, version=2) == {("a", 0, ""): (1, 0, 0), ("b", 0, ""): (1, 1, 1)}


def test_a_reward_in_the_window_of_an_old_version_only_is_unattributed() -> None:
    case = Case(published(spec()), published(spec(version=2), at_ms=T))
    case.exposures.add(T)
    case.rewards.add(T + D)
    done = case.run()
    assert done.reward_fates == {0: Fate.UNATTRIBUTED}
    assert moments(done) == {("a", 0, ""): (1, 0, 0)}


def spoilt(design: ExperimentSpec, **changes: Any) -> LoggedSpec:
    logged = published(design, at_ms=T)
    assert logged.record is not None
    return logged._replace(record=msgspec.structs.replace(logged.record, **changes))


@pytest.mark.parametrize(
    "bad",
    [
        published(spec(), at_ms=T),
        published(spec(version=2, arms=OTHER_ARMS), at_ms=T),
        spoilt(spec(version=3), design_hash="0" * 64),
        published(spec(metric(role=Role.GUARDRAIL), version=3), at_ms=T),
        published(spec(version=3), at_ms=T)._replace(
            experiment="exp", record=published(spec(key="two", version=3)).record
        ),
    ],
    ids=["older version", "another design", "wrong hash", "broken rule", "another key"],
)
def test_a_refused_record_leaves_the_last_good_one_in_force(bad: LoggedSpec) -> None:
    case = Case(published(spec(version=2)), bad)
    case.exposures.add(T + D)
    done = case.run()
    assert units(done, 2) == {("a", 0, ""): 1}
    assert set(done.statistics) == {("exp", 2)}


def test_a_known_version_that_comes_again_after_a_newer_one_is_refused() -> None:
    case = Case(published(spec()), published(spec(version=2)), published(spec(), at_ms=T))
    case.exposures.add(T + D)
    assert units(case.run(), 2) == {("a", 0, ""): 1}


def test_a_refused_record_still_moves_the_log_time_on() -> None:
    case = Case(published(spec(metric(role=Role.GUARDRAIL)), at_ms=T), published(spec(), at_ms=0))
    case.exposures.add(T + D - 1)
    case.exposures.add(T + D)
    assert case.run().exposure_fates == {0: Fate.UNKNOWN_EXPERIMENT, 1: Fate.COUNTED}


def test_versions_do_not_go_back_after_the_end_of_an_experiment() -> None:
    case = Case(published(spec(version=2)), LoggedSpec(T, "exp", None), published(spec(), at_ms=T))
    case.exposures.add(T + D)
    assert case.run().exposure_fates == {0: Fate.INACTIVE_EXPERIMENT}
