"""The oracle: duplicates, crossovers and windows."""

from __future__ import annotations

import pytest

from stream_xp.services.oracle.recompute import Fate
from tests.unit.oracle.recompute_world import WINDOW, Case, L, T, metric, moments, published, spec, units


# Duplicates
@pytest.mark.parametrize(("at_ms", "fate"), [(T + L, "duplicate"), (T + L + 1, "counted")])
def test_a_copy_is_a_duplicate_until_the_first_ones_horizon(at_ms: int, fate: str) -> None:
    case = Case()
    case.exposures.add(T, id="same")
    case.exposures.add(T + 1, id="same", at=at_ms, unit="v")
    assert case.run().exposure_fates[1] == fate


def test_a_duplicate_does_not_lengthen_the_horizon_but_an_admitted_copy_does() -> None:
    case = Case()
    case.exposures.add(T, id="same")
    case.exposures.add(T + L, id="same")
    case.exposures.add(T + L + 1, id="same")
    case.exposures.add(T + L + 2, id="same")
    fates = case.run().exposure_fates
    assert list(fates.values()) == ["counted", "duplicate", "counted", "duplicate"]


def test_any_earlier_admitted_copy_makes_a_duplicate_not_only_the_last() -> None:
    case = Case()
    case.exposures.add(T + 10_000, at=T, id="same")
    case.exposures.add(T, at=T + L, id="same")
    assert list(case.run().exposure_fates.values()) == ["counted", "duplicate"]


def test_source_is_part_of_the_identity_and_topics_do_not_share_it() -> None:
    case = Case()
    case.exposures.add(T, id="same")
    case.exposures.add(T, id="same", source="other")
    case.rewards.add(T, id="same")
    done = case.run()
    assert done.exposure_outcomes.counted == 2
    assert done.reward_outcomes.counted == 1


def test_records_that_did_not_pass_are_no_originals() -> None:
    case = Case()
    case.exposures.add(T, id="same", experiment="never")
    case.exposures.add(T, id="same", arm="nobody")
    case.exposures.add(T - L - 1, at=T, id="same")
    case.exposures.add(T, id="same")
    fates = list(case.run().exposure_fates.values())
    assert fates == ["unknown_experiment", "dead_lettered", "late", "counted"]


# Crossovers
def test_a_crossover_takes_the_first_exposure_back() -> None:
    case = Case()
    case.exposures.add(T)
    case.rewards.add(T)
    case.exposures.add(T + 1, unit="v")
    before = case.run()
    assert units(before) == {("a", 0, ""): 2}
    assert before.exposure_outcomes.counted == 2
    case.exposures.add(T + 20_000, arm="b")
    after = case.run()
    assert units(after) == {("a", 0, ""): 1}
    assert moments(after) == {("a", 0, ""): (1, 0, 0)}
    assert after.statistics["exp", 1].crossover_units == 1
    assert after.statistics["exp", 1].first_exposure_ms == T
    assert list(after.exposure_fates.values()) == ["crossover", "counted", "crossover"]
    # The reward fell in the window of an exposed unit, so it was not without effect for want of one.
    assert after.reward_fates == {0: Fate.COUNTED}


def test_a_late_or_duplicate_exposure_makes_no_crossover() -> None:
    case = Case()
    case.exposures.add(T, id="same")
    case.exposures.add(T, id="same", arm="b")
    case.exposures.add(T, at=T + L + 1, arm="b")
    assert list(case.run().exposure_fates.values()) == ["counted", "duplicate", "late"]


def test_exposures_in_one_arm_are_no_crossover_and_the_earliest_counts() -> None:
    case = Case()
    case.exposures.add(T + 10)
    case.exposures.add(T)
    done = case.run()
    assert units(done) == {("a", 0, ""): 1}
    assert done.exposure_outcomes.counted == 2
    assert done.statistics["exp", 1].first_exposure_ms == T


# Windows, waiting and maturity
@pytest.mark.parametrize(
    ("after_ms", "fate", "value"),
    [(-1, "unattributed", 0), (0, "counted", 1), (WINDOW - 1, "counted", 1), (WINDOW, "unattributed", 0)],
)
def test_the_window_is_closed_at_t0_and_open_at_its_end(after_ms: int, fate: str, value: int) -> None:
    case = Case()
    case.exposures.add(T)
    case.rewards.add(T + after_ms)
    done = case.run()
    assert done.reward_fates[0] == fate
    assert moments(done) == {("a", 0, ""): (1, value, value)}


@pytest.mark.parametrize(("watermark_ms", "mature"), [(-1, False), (0, True), (1, True)])
def test_a_unit_matures_when_the_watermark_reaches_its_end(watermark_ms: int, *, mature: bool) -> None:
    case = Case()
    case.exposures.add(T)
    done = case.run(T + WINDOW + L + watermark_ms)
    assert units(done) == {("a", 0, ""): 1}
    assert moments(done) == ({("a", 0, ""): (1, 0, 0)} if mature else {})


@pytest.mark.parametrize(
    ("watermark_ms", "exposed", "fate"),
    [
        (None, True, "waiting"),
        (T + L, True, "waiting"),
        (T + L + 1, True, "counted"),
        (T + L, False, "waiting"),
        (T + L + 1, False, "unattributed"),
    ],
)
def test_a_reward_waits_until_the_watermark_has_passed_it(
    watermark_ms: int | None, fate: str, *, exposed: bool
) -> None:
    case = Case()
    case.exposures.add(T, unit="u" if exposed else "v")
    case.rewards.add(T)
    assert case.run(watermark_ms).reward_fates == {0: Fate(fate)}


def test_each_metric_matures_by_its_own_window() -> None:
    case = Case(published(spec(metric(), metric("long", event="click", attribution_window="10s"))))
    case.exposures.add(T)
    case.rewards.add(T + WINDOW)
    done = case.run(T + WINDOW + L + 1)
    assert done.reward_fates == {0: Fate.COUNTED}
    assert moments(done) == {("a", 0, ""): (1, 0, 0)}
    assert moments(done, "long") == {}
    assert moments(case.run(T + 10_000 + L), "long") == {("a", 0, ""): (1, 1, 1)}


# Rewards and who listens
def test_a_reward_reaches_every_experiment_unless_it_names_one() -> None:
    case = Case(published(spec()), published(spec(key="two")))
    case.exposures.add(T)
    case.exposures.add(T, experiment="two", arm="b")
    case.rewards.add(T)
    case.rewards.add(T, experiment="two")
    case.rewards.add(T, unit="v", experiment="two")
    done = case.run()
    assert list(done.reward_fates.values()) == ["counted", "counted", "unattributed"]
    assert moments(done)["a", 0, ""] == (1, 1, 1)
    assert done.statistics["two", 1].moments[0].s == "1"


def test_a_reward_for_one_experiment_does_not_reach_another() -> None:
    case = Case(published(spec()), published(spec(key="two")))
    case.exposures.add(T)
    case.rewards.add(T, experiment="two")
    done = case.run()
    assert done.reward_fates == {0: Fate.UNATTRIBUTED}
    assert moments(done) == {("a", 0, ""): (1, 0, 0)}


def test_a_reward_nobody_listens_to_is_unattributed_at_once() -> None:
    case = Case()
    case.rewards.add(T, metric="noise", at=T + L + 1)
    case.rewards.add(T + L + 1, metric="noise")
    case.rewards.add(T + L + 1, metric="noise", experiment="exp")
    assert set(case.run(None).reward_fates.values()) == {Fate.UNATTRIBUTED}
