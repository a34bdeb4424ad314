"""Boundary tables of docs/semantics.md, one section for each of its rules."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import msgspec
import pytest

from stream_xp.domain.codec import Limits
from stream_xp.domain.experiment import (
    Adjustment,
    Aggregation,
    Arm,
    Covariate,
    Denominator,
    Direction,
    ExperimentRecord,
    ExperimentSpec,
    Metric,
    MetricKind,
    Role,
    Status,
    WeightEpoch,
)
from stream_xp.domain.statistics import ExperimentStatistics, merge
from stream_xp.errors import Reason
from stream_xp.services.oracle.recompute import (
    EXPOSURES,
    REWARDS,
    Fate,
    LoggedRecord,
    LoggedSpec,
    Recomputed,
    histogram_bin,
    recompute,
)

L = 1_000
D = 500
T = 1_000_000
"""Log time at which the events of the tests begin; the specs are in force long before."""
WINDOW = 5_000
FAR = 10**9


def metric(key: str = "click", **changes: Any) -> Metric:
    plain = {
        "kind": MetricKind.CONVERSION,
        "role": Role.PRIMARY,
        "direction": Direction.INCREASE,
        "attribution_window": f"{WINDOW}ms",
    }
    return Metric(key=key, **{**plain, **changes})


def mean(key: str = "spend", **changes: Any) -> Metric:
    return metric(key, **{"kind": MetricKind.MEAN, "bound": 10.0, "scale": 0.5, **changes})


OTHER_ARMS = (Arm(key="x", weight=0.5, control=True), Arm(key="y", weight=0.5))


def spec(*metrics: Metric, key: str = "exp", version: int = 1, **changes: Any) -> ExperimentSpec:
    plain = {"arms": (Arm(key="a", weight=0.5, control=True), Arm(key="b", weight=0.5))}
    return ExperimentSpec(
        experiment=key,
        owner="team",
        hypothesis="better",
        unit="member",
        metrics=metrics or (metric(),),
        planned_sample=1000,
        version=version,
        **{**plain, **changes},
    )


def published(
    design: ExperimentSpec,
    *,
    at_ms: int = 0,
    status: Status = Status.ACTIVE,
    effective: tuple[int, ...] = (0,),
) -> LoggedSpec:
    epochs = tuple(
        WeightEpoch(epoch=index, weights=design.weights, effective_ms=ms)
        for index, ms in enumerate(effective)
    )
    record = ExperimentRecord(spec=design, epochs=epochs, design_hash=design.design_hash(), status=status)
    return LoggedSpec(at_ms, design.experiment, record)


class Log:
    """A raw topic partition that is written record by record."""

    def __init__(self, defaults: dict[str, Any]) -> None:
        self.records: list[LoggedRecord] = []
        self._defaults = defaults

    def add(
        self, time_ms: int, *, at: int | None = None, unit: str = "u", raw: bytes | None = None, **fields: Any
    ) -> int:
        offset = len(self.records)
        event = {"id": f"i{offset}", "time": time_ms, "unit": unit, **self._defaults, **fields}
        value = json.dumps(event).encode() if raw is None else raw
        self.records.append(LoggedRecord(offset, time_ms if at is None else at, unit.encode(), value))
        return offset


class Case:
    """Exposures, rewards and specs, and what they come to."""

    def __init__(self, *specs: LoggedSpec) -> None:
        self.specs = list(specs) or [published(spec())]
        self.exposures = Log({"experiment": "exp", "arm": "a"})
        self.rewards = Log({"metric": "click", "value": 1})

    def run(
        self, watermark_ms: int | None = FAR, *, max_units: int | None = None, **behind: Any
    ) -> Recomputed:
        done = recompute(
            self.exposures.records,
            self.rewards.records,
            self.specs,
            partition=0,
            watermark_ms=watermark_ms,
            allowed_lateness_ms=L,
            activation_delay_ms=D,
            limits=Limits(),
            behind_watermark=behind,
            max_units=max_units,
        )
        assert done.exposure_outcomes.conserved()
        assert done.reward_outcomes.conserved()
        assert done.exposure_outcomes.read == len(self.exposures.records)
        assert done.reward_outcomes.read == len(self.rewards.records)
        return done


def moments(
    done: Recomputed, key: str = "click", version: int = 1
) -> dict[tuple[str, int, str], tuple[int, int, int]]:
    return {
        (row.arm, row.epoch, row.segment): (row.n, int(row.s), int(row.q))
        for row in done.statistics["exp", version].moments
        if row.metric == key
    }


def units(done: Recomputed, version: int = 1) -> dict[tuple[str, int, str], int]:
    return {(row.arm, row.epoch, row.segment): row.units for row in done.statistics["exp", version].units}


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


# Epochs and segments


@pytest.mark.parametrize(
    ("time_ms", "named", "epoch"),
    [(T - 1, None, 0), (T, None, 1), (T + 9, None, 1), (T + 10, None, 2), (T + 10, 0, 0), (T - 1, 2, 2)],
)
def test_weight_epoch_by_event_time_unless_named(time_ms: int, named: int | None, epoch: int) -> None:
    case = Case(published(spec(), effective=(T - 5, T, T + 10)))
    case.exposures.add(time_ms, weight_epoch=named)
    assert units(case.run()) == {("a", epoch, ""): 1}


def test_before_every_epoch_the_oldest_counts_and_an_unknown_one_is_refused() -> None:
    case = Case(published(spec(), effective=(T, T + 1)))
    case.exposures.add(T - 1)
    case.exposures.add(T, unit="v", weight_epoch=2)
    done = case.run()
    assert units(done) == {("a", 0, ""): 1}
    assert done.dead_letters == {(EXPOSURES, 1): Reason.UNKNOWN_WEIGHT_EPOCH}


def test_an_epoch_is_known_only_once_its_record_is_in_force() -> None:
    case = Case(published(spec()), published(spec(), at_ms=T, effective=(0, T)))
    case.exposures.add(T + D - 1)
    case.exposures.add(T + D, unit="v")
    case.exposures.add(T + D - 1, unit="w", at=T + D, weight_epoch=1)
    assert units(case.run()) == {("a", 0, ""): 1, ("a", 1, ""): 2}


def with_final(logged: LoggedSpec, final: int) -> LoggedSpec:
    """The record with one of its epochs final."""
    assert logged.record is not None
    epochs = tuple(
        msgspec.structs.replace(one, final=True, weights={"a": 1.0, "b": 0.0}) if one.epoch == final else one
        for one in logged.record.epochs
    )
    return logged._replace(record=msgspec.structs.replace(logged.record, epochs=epochs))


@pytest.mark.parametrize(
    ("time_ms", "named", "epoch"),
    [
        *[(T - 1, None, 0), (T, None, None), (T + 9, None, None), (T + 10, None, 2)],
        *[(T + 1, 0, 0), (T - 1, 1, None), (T + 20, 1, None), (T - 1, 2, 2)],
    ],
)
def test_an_exposure_of_a_final_epoch_is_inactive(time_ms: int, named: int | None, epoch: int | None) -> None:
    case = Case(with_final(published(spec(), effective=(T - 5, T, T + 10)), 1))
    case.exposures.add(time_ms, weight_epoch=named)
    case.rewards.add(time_ms)
    done = case.run()
    assert units(done) == ({} if epoch is None else {("a", epoch, ""): 1})
    assert done.exposure_fates[0] == ("counted" if epoch is not None else "inactive_experiment")
    assert done.reward_fates[0] == ("counted" if epoch is not None else "unattributed")


def test_a_final_epoch_makes_no_crossover_and_leaves_units_their_rewards() -> None:
    case = Case(published(spec()), with_final(published(spec(), at_ms=T, effective=(0, T + D)), 1))
    case.exposures.add(T, arm="b")
    case.exposures.add(T + D + 1, arm="a")
    case.rewards.add(T + D + 2)
    done = case.run()
    assert moments(done) == {("b", 0, ""): (1, 1, 1)}
    assert [done.exposure_fates[at] for at in (0, 1)] == ["counted", "inactive_experiment"]


def test_an_unknown_arm_or_epoch_is_refused_before_it_is_inactive() -> None:
    case = Case(with_final(published(spec(), effective=(0,)), 0))
    case.exposures.add(T, arm="zz")
    case.exposures.add(T, weight_epoch=1)
    assert set(case.run().dead_letters.values()) == {Reason.UNKNOWN_ARM, Reason.UNKNOWN_WEIGHT_EPOCH}


@pytest.mark.parametrize(
    ("effective", "status", "taken"),
    [
        ((0, T, T + 1), Status.ACTIVE, True),
        ((0, T), Status.ACTIVE, True),
        ((0,), Status.ACTIVE, False),
        ((0, T + 1), Status.ACTIVE, False),
        ((0, T + 1, T + 2), Status.ACTIVE, False),
        ((0,), Status.ARCHIVED, True),
        ((0, T, T + 1), Status.ARCHIVED, True),
        ((1,), Status.ARCHIVED, False),
    ],
)
def test_epochs_are_only_ever_added(effective: tuple[int, ...], status: Status, *, taken: bool) -> None:
    second = published(spec(), at_ms=T, status=status, effective=effective)
    third = published(spec(), at_ms=T + 3, effective=(0, T, T + 1))
    case = Case(published(spec(), effective=(0, T)), second, third)
    case.exposures.add(T + D + 2, weight_epoch=len(effective) - 1)
    case.exposures.add(T + D + 4, unit="v", weight_epoch=2)
    done = case.run()
    if taken and status is Status.ARCHIVED:
        assert set(done.exposure_fates.values()) == {"inactive_experiment"}
        return
    known = taken or len(effective) <= 2
    assert done.exposure_fates[0] == ("counted" if known else "dead_lettered")
    assert done.exposure_fates[1] == "counted"


def test_first_exposure_fixes_epoch_and_segments_smallest_offset_among_equals() -> None:
    case = Case(published(spec(segments={"device": ("tv", "phone")}), effective=(0, T)))
    case.exposures.add(T + 1, segments={"device": "tv"})
    case.exposures.add(T - 1, segments={"device": "phone"})
    case.exposures.add(T - 1, segments={"device": "tv"})
    assert units(case.run()) == {("a", 0, ""): 1, ("a", 0, "device=phone"): 1}


def test_segments_that_are_missing_or_not_registered_are_other() -> None:
    case = Case(published(spec(segments={"device": ("tv",), "land": ("de",)})))
    case.exposures.add(T, unit="1", segments={"device": "tv", "land": "de", "colour": "red"})
    case.exposures.add(T, unit="2", segments={"device": "TV"})
    case.exposures.add(T, unit="3", segments={"land": "other", "device": ""})
    done = case.run()
    assert units(done) == {
        ("a", 0, ""): 3,
        ("a", 0, "device=tv"): 1,
        ("a", 0, "device=other"): 2,
        ("a", 0, "land=de"): 1,
        ("a", 0, "land=other"): 2,
    }
    assert {key: n for key, (n, _, _) in moments(done).items()} == units(done)


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


# Ratios and covariates


def table(done: Recomputed, name: str, version: int = 1) -> dict[tuple[str, str, str], tuple[Any, ...]]:
    """Rows of a table by metric, arm and segment."""
    rows = getattr(done.statistics["exp", version], name)
    return {(row.metric, row.arm, row.segment): msgspec.structs.astuple(row)[4:] for row in rows}


def ratio(denominator: Denominator, **changes: Any) -> Metric:
    return metric(
        "r", **{"kind": MetricKind.RATIO, "event": "spend", "bound": 10.0, **changes}, denominator=denominator
    )


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


# Counts and latencies


def count(**changes: Any) -> Metric:
    return metric(**{"kind": MetricKind.COUNT, **changes})


def latency(**changes: Any) -> Metric:
    return metric("wait", **{"kind": MetricKind.LATENCY, "scale": 0.5, "bound": 100.0, **changes})


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


# Laws


def random_case(seed: int, *, records: int) -> tuple[Case, list[str]]:
    dice = random.Random(seed)
    case = Case(
        published(
            spec(
                metric(),
                mean(aggregation=Aggregation.LAST, adjustment=Adjustment.CUPED),
                count(key="clicks", event="click"),
                latency(event="spend"),
                ratio(Denominator(event="click", bound=2)),
                covariate=Covariate(scale=0.1, bound=5),
            ),
            effective=(0, T + records // 2),
        )
    )
    names = [f"unit-{n}" for n in range(max(2, records // 4))]
    for n in range(records):
        unit = dice.choice(names)
        time_ms = T + n - dice.randrange(3)
        if dice.random() < 0.5:
            case.exposures.add(time_ms, at=T + n, unit=unit, arm="ab"[hash_of(unit) % 2], covariate=n % 7)
        else:
            name = dice.choice(["click", "spend", "noise"])
            case.rewards.add(time_ms, at=T + n, unit=unit, metric=name, value=dice.choice([0, 1, 0.25, 3.5]))
    return case, names


def hash_of(unit: str) -> int:
    return sum(unit.encode())


def part(case: Case, chosen: set[str]) -> Case:
    """The records of some units, as another partition would hold them."""
    other = Case(*case.specs)
    for log, mine in ((case.exposures, other.exposures), (case.rewards, other.rewards)):
        mine.records += [one for one in log.records if (one.key or b"").decode() in chosen]
    return other


@pytest.mark.parametrize("seed", range(5))
def test_partitions_add_up(seed: int) -> None:
    case, names = random_case(seed, records=300)
    whole = case.run().statistics["exp", 1]
    half = set(names[::2])
    parts = [part(case, chosen).run().statistics["exp", 1] for chosen in (half, set(names) - half)]
    assert merge(parts).canonical() == whole.canonical()


@pytest.mark.slow
def test_two_hundred_thousand_records() -> None:
    case, _ = random_case(1, records=200_000)
    case.run(T + 100_000)
