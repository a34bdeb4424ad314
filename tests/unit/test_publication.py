"""What `apply` publishes: versions, weight epochs, and what it refuses."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from stream_xp.domain.codec import decode_experiment
from stream_xp.domain.decision import ConfigRecord, RolloutStatus
from stream_xp.domain.experiment import (
    Adjustment,
    Arm,
    Covariate,
    Denominator,
    ExperimentRecord,
    ExperimentSpec,
    MetricKind,
    Status,
    Threshold,
    WeightEpoch,
)
from stream_xp.domain.experiment_rules import rules
from stream_xp.domain.publication import archived_record, changed_design, next_config, next_record
from stream_xp.domain.rollout import Allocation, Conclusion, Policy, Ramp, Stage
from stream_xp.domain.statistics import build
from stream_xp.domain.statistics_size import MAX_STATISTICS_BYTES, MAX_WEIGHT_EPOCHS, most_epochs
from stream_xp.errors import ConfigError
from stream_xp.services.publish import Publication

SPEC = msgspec.convert(
    {
        "experiment": "canary",
        "owner": "a",
        "hypothesis": "b",
        "unit": "member",
        "arms": [{"key": "old", "weight": 0.9, "control": True}, {"key": "new", "weight": 0.1}],
        "metrics": [
            {
                "key": "errors",
                "kind": "conversion",
                "role": "guardrail",
                "direction": "decrease",
                "attribution_window": "10m",
                "margin": {"absolute": 0.005},
            }
        ],
        "planned_sample": 1000,
        "segments": {"device": ["tv", "web"]},
    },
    ExperimentSpec,
)
FIRST = next_record(None, SPEC, effective_ms=1_000)


def with_weights(spec: ExperimentSpec, *weights: float) -> ExperimentSpec:
    arms = tuple(
        msgspec.structs.replace(arm, weight=weight) for arm, weight in zip(spec.arms, weights, strict=True)
    )
    return msgspec.structs.replace(spec, arms=arms)


def with_version(spec: ExperimentSpec, version: int) -> ExperimentSpec:
    return msgspec.structs.replace(spec, version=version)


def test_the_first_publication_is_epoch_0() -> None:
    (epoch,) = FIRST.epochs
    assert (epoch.epoch, epoch.weights, epoch.effective_ms) == (0, {"old": 0.9, "new": 0.1}, 1_000)
    assert FIRST.spec == SPEC
    assert FIRST.design_hash == SPEC.design_hash()
    assert FIRST.status is Status.ACTIVE


def test_the_same_again_changes_nothing() -> None:
    assert next_record(FIRST, SPEC, effective_ms=9_000) == FIRST


def test_new_weights_are_a_new_epoch() -> None:
    second = next_record(FIRST, with_weights(SPEC, 0.5, 0.5), effective_ms=2_000)
    assert second.epochs[0] == FIRST.epochs[0]
    assert (second.epochs[1].epoch, second.epochs[1].effective_ms) == (1, 2_000)
    assert second.epochs[1].weights == second.spec.weights == {"old": 0.5, "new": 0.5}
    assert second.design_hash == FIRST.design_hash
    third = next_record(second, SPEC, effective_ms=3_000)
    assert [epoch.epoch for epoch in third.epochs] == [0, 1, 2]


def test_epochs_do_not_go_back_in_time() -> None:
    with pytest.raises(ConfigError, match=r"take effect at 999 .* before those of epoch 0 at 1000"):
        next_record(FIRST, with_weights(SPEC, 0.5, 0.5), effective_ms=999)
    same_time = next_record(FIRST, with_weights(SPEC, 0.5, 0.5), effective_ms=1_000)
    assert len(same_time.epochs) == 2
    assert next_record(FIRST, SPEC, effective_ms=0) == FIRST


def test_prose_may_change() -> None:
    spec = msgspec.structs.replace(SPEC, owner="c", hypothesis="d")
    record = next_record(FIRST, spec, effective_ms=2_000)
    assert record.spec == spec
    assert (record.epochs, record.design_hash) == (FIRST.epochs, FIRST.design_hash)


METRIC = SPEC.metrics[0]
DESIGNS = {
    "alpha": (msgspec.structs.replace(SPEC, alpha=0.01), "alpha"),
    "unit": (msgspec.structs.replace(SPEC, unit="session"), "unit"),
    "margin": (
        msgspec.structs.replace(
            SPEC, metrics=(msgspec.structs.replace(METRIC, margin=Threshold(absolute=0.01)),)
        ),
        "metrics[0].margin.absolute",
    ),
    "margin kind": (
        msgspec.structs.replace(
            SPEC, metrics=(msgspec.structs.replace(METRIC, margin=Threshold(relative=0.005)),)
        ),
        "metrics[0].margin.absolute, metrics[0].margin.relative",
    ),
    "window": (
        msgspec.structs.replace(SPEC, metrics=(msgspec.structs.replace(METRIC, attribution_window="1h"),)),
        "metrics[0].attribution_window",
    ),
    "a metric more": (
        msgspec.structs.replace(SPEC, metrics=(METRIC, msgspec.structs.replace(METRIC, key="x"))),
        "metrics",
    ),
    "an arm more": (
        msgspec.structs.replace(SPEC, arms=(*SPEC.arms, Arm(key="x", weight=0.0))),
        "arms",
    ),
    "another arm": (
        msgspec.structs.replace(SPEC, arms=(SPEC.arms[0], Arm(key="x", weight=0.1))),
        "arms[1].key",
    ),
    "another control": (
        msgspec.structs.replace(
            SPEC, arms=tuple(msgspec.structs.replace(arm, control=not arm.control) for arm in SPEC.arms)
        ),
        "arms[0].control, arms[1].control",
    ),
    "a segment value": (
        msgspec.structs.replace(SPEC, segments={"device": ("tv", "phone")}),
        "segments.device[1]",
    ),
    "a segment": (
        msgspec.structs.replace(SPEC, segments={**SPEC.segments, "country": ("se",)}),
        "segments.country",
    ),
    "a covariate": (
        msgspec.structs.replace(SPEC, covariate=Covariate(scale=1, bound=2)),
        "covariate",
    ),
    "an adjustment": (
        msgspec.structs.replace(
            SPEC, metrics=(msgspec.structs.replace(METRIC, adjustment=Adjustment.CUPED),)
        ),
        "metrics[0].adjustment",
    ),
    "a denominator": (
        msgspec.structs.replace(
            SPEC, metrics=(msgspec.structs.replace(METRIC, denominator=Denominator(event="x")),)
        ),
        "metrics[0].denominator",
    ),
    "quantiles": (
        msgspec.structs.replace(SPEC, metrics=(msgspec.structs.replace(METRIC, quantiles=(0.5,)),)),
        "metrics[0].quantiles",
    ),
    "a ramp": (msgspec.structs.replace(SPEC, ramp=Ramp()), "ramp"),
    "a conclusion": (msgspec.structs.replace(SPEC, conclusion=Conclusion()), "conclusion"),
    "no segment": (msgspec.structs.replace(SPEC, segments={}), "segments.device"),
    "two fields": (msgspec.structs.replace(SPEC, alpha=0.01, planned_sample=5_000), "planned_sample, alpha"),
}


@pytest.mark.parametrize("case", DESIGNS)
def test_a_frozen_field_needs_a_new_version(case: str) -> None:
    spec, fields = DESIGNS[case]
    assert ", ".join(changed_design(SPEC, spec)) == fields
    with pytest.raises(ConfigError) as caught:
        next_record(FIRST, spec, effective_ms=2_000)
    assert f"these fields changed: {fields}; raise `version` to 2" in str(caught.value)
    fresh = next_record(FIRST, with_version(spec, 2), effective_ms=2_000)
    assert fresh == next_record(None, with_version(spec, 2), effective_ms=2_000)


def test_weights_and_prose_are_no_design() -> None:
    assert changed_design(SPEC, with_weights(SPEC, 0.0, 1.0)) == ()
    assert changed_design(SPEC, msgspec.structs.replace(SPEC, owner="x", hypothesis="y")) == ()


def test_a_higher_version_starts_again() -> None:
    second = next_record(FIRST, with_weights(SPEC, 0.5, 0.5), effective_ms=2_000)
    fresh = next_record(second, with_version(SPEC, 5), effective_ms=500)
    assert [epoch.epoch for epoch in fresh.epochs] == [0]
    assert fresh.design_hash != FIRST.design_hash


def test_a_lower_version_is_refused() -> None:
    record = next_record(None, with_version(SPEC, 3), effective_ms=0)
    with pytest.raises(ConfigError, match=r"version 1 is older .* version 3; raise `version` to at least 4"):
        next_record(record, SPEC, effective_ms=1)


def test_another_experiment_is_refused() -> None:
    other = msgspec.structs.replace(SPEC, experiment="other", version=9)
    with pytest.raises(ConfigError, match="other cannot follow the record of canary"):
        next_record(FIRST, other, effective_ms=1)


def test_archived_stays_archived_until_the_version_rises() -> None:
    archived = archived_record(FIRST)
    assert archived.status is Status.ARCHIVED
    assert archived_record(archived) == archived
    assert next_record(archived, SPEC, effective_ms=2_000) == archived
    assert next_record(archived, with_weights(SPEC, 0.5, 0.5), effective_ms=2_000).status is Status.ARCHIVED
    assert next_record(archived, with_version(SPEC, 2), effective_ms=2_000).status is Status.ACTIVE


def test_a_record_survives_the_wire() -> None:
    assert msgspec.json.decode(msgspec.json.encode(FIRST), type=ExperimentRecord) == FIRST


RUNNING = next_config(None, FIRST)
STOPPED = msgspec.structs.replace(
    RUNNING, status=RolloutStatus.STOPPED, weights={"old": 1.0, "new": 0.0}, config_version=2, signal_id="s-1"
)


def test_the_first_config_says_running() -> None:
    assert (
        ConfigRecord(
            experiment="canary",
            version=1,
            status=RolloutStatus.RUNNING,
            weights={"old": 0.9, "new": 0.1},
            weight_epoch=0,
            effective_ms=1_000,
            config_version=1,
        )
        == RUNNING
    )


def test_config_changes_with_the_weights_and_not_else() -> None:
    assert next_config(RUNNING, FIRST) == RUNNING
    second = next_record(FIRST, with_weights(SPEC, 0.5, 0.5), effective_ms=2_000)
    config = next_config(RUNNING, second)
    assert (config.weights, config.weight_epoch) == ({"old": 0.5, "new": 0.5}, 1)
    assert (config.effective_ms, config.config_version) == (2_000, 2)


def test_new_weights_do_not_undo_a_decision() -> None:
    assert next_config(STOPPED, FIRST) == STOPPED
    second = next_record(FIRST, with_weights(SPEC, 0.5, 0.5), effective_ms=2_000)
    with pytest.raises(ConfigError, match="version 1 was stopped by signal s-1"):
        next_config(STOPPED, second)


def test_a_new_version_runs_again_and_the_config_version_grows() -> None:
    config = next_config(STOPPED, next_record(FIRST, with_version(SPEC, 2), effective_ms=5_000))
    assert (config.status, config.version, config.weight_epoch) == (RolloutStatus.RUNNING, 2, 0)
    assert (config.config_version, config.signal_id) == (3, None)


def test_config_ahead_of_the_experiments_is_refused() -> None:
    ahead = msgspec.structs.replace(RUNNING, version=4)
    with pytest.raises(ConfigError, match="already follow version 4; raise `version` to at least 5"):
        next_config(ahead, FIRST)


def bandit(
    *metrics: dict[str, Any], arms: int = 2, segments: dict[str, list[str]] | None = None
) -> ExperimentSpec:
    return msgspec.convert(
        {
            "experiment": "bandit",
            "owner": "a",
            "hypothesis": "b",
            "unit": "member",
            "arms": [{"key": f"arm{at}", "weight": 1 / arms, "control": at == 0} for at in range(arms)],
            "metrics": [
                {
                    "key": f"metric{at}",
                    "role": "secondary" if at else "primary",
                    "direction": "increase",
                    "attribution_window": "10m",
                    **metric,
                }
                for at, metric in enumerate(metrics)
            ],
            "planned_sample": 1000,
            "segments": segments or {},
        },
        ExperimentSpec,
    )


CONVERSION = {"kind": "conversion"}
MEAN = {"kind": "mean", "bound": 1_000.0, "scale": 0.01}
DEVICES = {"device": ["tv", "web", "phone"]}
SPECS = {
    "two arms": bandit(CONVERSION),
    "six arms": bandit(CONVERSION, arms=6),
    "three means": bandit(MEAN, MEAN, MEAN, arms=3),
    "a ratio": bandit(
        {**MEAN, "kind": "ratio", "denominator": {"event": "visit", "scale": 1.0, "bound": 50.0}}
    ),
    "adjusted": msgspec.structs.replace(
        bandit({**MEAN, "adjustment": "cuped"}), covariate=Covariate(scale=0.01, bound=1_000.0)
    ),
    "a count": bandit({"kind": "count"}),
    "a latency": bandit({"kind": "latency", "bound": 10_000.0, "scale": 1.0}),
    "segments": bandit(CONVERSION, MEAN, segments=DEVICES),
}


def filled(spec: ExperimentSpec, epochs: int) -> int:
    """Bytes of a partition's statistics where every row is there, and a full partition's units are shared evenly."""
    labels = ["", *(f"{name}={value}" for name, of in spec.segments.items() for value in (*of, "other"))]
    places = [(arm.key, at, label) for arm in spec.arms for at in range(epochs) for label in labels]
    n = 20_000_000 // (epochs * len(spec.arms))
    tables: dict[str, dict[Any, Any]] = {"moments": {}, "products": {}, "events": {}, "histograms": {}}
    for metric in spec.metrics:
        value = {MetricKind.CONVERSION: 1, MetricKind.COUNT: 100}.get(metric.kind, metric.max_steps)
        for place in places:
            key = (metric.key, *place)
            if metric.kind is MetricKind.LATENCY:
                tables["histograms"][key] = dict.fromkeys(range(metric.bins), n // metric.bins + 1)
                continue
            tables["moments"][key] = (n, n * value, n * value**2)
            if metric.kind is MetricKind.RATIO or metric.adjustment is not Adjustment.NONE:
                tables["products"][key] = (n * value, n * value**2, n * value**2)
    found = build(
        units=dict.fromkeys(places, n), crossover_units=0, first_exposure_ms=0, out_of_range={}, **tables
    )
    return len(msgspec.json.encode(found))


@pytest.mark.parametrize("name", sorted(SPECS))
def test_the_statistics_of_as_many_epochs_as_may_be_fit_one_record(name: str) -> None:
    spec = SPECS[name]
    assert rules(spec) == []
    assert filled(spec, most_epochs(spec)) <= MAX_STATISTICS_BYTES
    # And the bound is no more than three times too careful where the rows are what it is about.
    if most_epochs(spec) < MAX_WEIGHT_EPOCHS:
        assert filled(spec, most_epochs(spec) * 3) > MAX_STATISTICS_BYTES


def test_weights_of_few_arms_may_change_every_five_minutes_for_two_weeks() -> None:
    assert most_epochs(SPECS["two arms"]) >= 14 * 24 * 12


def with_epochs(spec: ExperimentSpec, count: int) -> ExperimentRecord:
    first = next_record(None, spec, effective_ms=0)
    epochs = tuple(msgspec.structs.replace(first.epochs[0], epoch=at) for at in range(count))
    return msgspec.structs.replace(first, epochs=epochs)


def test_weights_past_the_last_epoch_are_refused_with_what_to_do() -> None:
    spec = SPECS["three means"]
    most = most_epochs(spec)
    changed = with_weights(spec, 0.2, 0.2, 0.6)
    assert len(next_record(with_epochs(spec, most - 1), changed, effective_ms=1).epochs) == most
    full = with_epochs(spec, most)
    with pytest.raises(ConfigError, match=f"bandit: version 1 has {most} weight epochs, .* raise `version`"):
        next_record(full, changed, effective_ms=1)
    # Other changes go on, and a new version begins anew.
    assert next_record(full, msgspec.structs.replace(spec, owner="c"), effective_ms=1).epochs == full.epochs
    assert len(next_record(full, with_version(changed, 2), effective_ms=1).epochs) == 1


def test_the_engine_refuses_a_record_with_more_epochs() -> None:
    spec = SPECS["three means"]
    most = most_epochs(spec)
    decode_experiment("bandit", msgspec.json.encode(with_epochs(spec, most)))
    with pytest.raises(
        ConfigError, match=f"{most + 1} weight epochs are more than the {most} .* raise `version`"
    ):
        decode_experiment("bandit", msgspec.json.encode(with_epochs(spec, most + 1)))


def test_a_spec_whose_first_epoch_fits_no_record_is_refused() -> None:
    segments = {f"dimension{at}": [f"value{n}" for n in range(64)] for at in range(4)}
    (fault,) = rules(bandit(*[CONVERSION] * 20, arms=20, segments=segments))
    assert fault.path == ("metrics",)
    assert "the rows of one weight epoch may have 1000000 bytes" in fault.message


RAMP = msgspec.structs.replace(
    SPEC, ramp=Ramp(stages=(Stage(coverage=0.05), Stage(coverage=0.5), Stage(coverage=1.0)))
)
BANDIT = msgspec.structs.replace(
    SPEC, allocation=Allocation(policy=Policy.CONTEXTUAL, metric="errors", context="device")
)


def moved(record: ExperimentRecord, **fields: object) -> ExperimentRecord:
    """The record with one more epoch, as the decide stage adds it."""
    last = record.epochs[-1]
    epoch = msgspec.structs.replace(
        last,
        **{"epoch": last.epoch + 1, "effective_ms": last.effective_ms + 500, "signal_id": "s-9", **fields},
    )
    return msgspec.structs.replace(record, epochs=(*record.epochs, epoch))


def concluded(record: ExperimentRecord) -> ExperimentRecord:
    return moved(record, weights={"old": 1.0, "new": 0.0}, coverage=0.0, contexts={}, final=True)


def test_a_ramp_begins_with_its_first_stage_and_without_one_all_take_part() -> None:
    record = next_record(None, RAMP, effective_ms=1_000)
    assert [epoch.coverage for epoch in record.epochs] == [0.05]
    assert next_config(None, record).coverage == 0.05
    assert (FIRST.epochs[0].coverage, next_config(None, FIRST).coverage) == (1.0, 1.0)
    default = next_record(None, msgspec.structs.replace(SPEC, ramp=Ramp()), effective_ms=1_000)
    assert default.epochs[0].coverage == 0.01


def test_a_new_version_goes_back_to_the_first_stage() -> None:
    record = moved(next_record(None, RAMP, effective_ms=1_000), coverage=1.0)
    fresh = next_record(record, with_version(RAMP, 2), effective_ms=9_000)
    assert [epoch.coverage for epoch in fresh.epochs] == [0.05]
    assert next_config(next_config(None, record), fresh).coverage == 0.05


@pytest.mark.parametrize("spec", [RAMP, BANDIT], ids=["ramp", "bandit"])
def test_the_same_file_does_not_take_back_what_moved(spec: ExperimentSpec) -> None:
    contexts = {"tv": {"old": 0.4, "new": 0.6}}
    record = next_record(None, spec, effective_ms=1_000)
    record = moved(record, weights={"old": 0.2, "new": 0.8}, coverage=0.5, contexts=contexts)
    assert next_record(record, spec, effective_ms=9_000) == record
    prose = msgspec.structs.replace(spec, owner="c")
    assert next_record(record, prose, effective_ms=9_000).epochs == record.epochs
    config = next_config(None, record)
    assert next_config(config, next_record(record, spec, effective_ms=9_000)) == config


def test_weights_that_a_policy_reached_and_a_person_writes_down_are_an_epoch() -> None:
    record = moved(next_record(None, BANDIT, effective_ms=1_000), weights={"old": 0.5, "new": 0.5})
    again = next_record(record, with_weights(BANDIT, 0.5, 0.5), effective_ms=9_000)
    assert [epoch.epoch for epoch in again.epochs] == [0, 1, 2]
    assert (again.epochs[2].weights, again.epochs[2].signal_id) == ({"old": 0.5, "new": 0.5}, None)


def test_new_weights_of_the_file_win_over_those_of_the_policy_and_keep_the_coverage() -> None:
    contexts = {"tv": {"old": 0.4, "new": 0.6}}
    record = next_record(None, BANDIT, effective_ms=1_000)
    record = moved(record, weights={"old": 0.2, "new": 0.8}, coverage=0.5, contexts=contexts)
    paused = msgspec.structs.replace(next_config(None, record), paused=True)
    assert (paused.contexts, paused.context, paused.coverage) == (contexts, "device", 0.5)
    after = next_record(record, with_weights(BANDIT, 0.7, 0.3), effective_ms=9_000)
    assert after.epochs[:2] == record.epochs
    assert after.epochs[2] == WeightEpoch(
        epoch=2, weights={"old": 0.7, "new": 0.3}, effective_ms=9_000, coverage=0.5
    )
    config = next_config(paused, after)
    assert (config.weights, config.contexts, config.coverage) == ({"old": 0.7, "new": 0.3}, {}, 0.5)
    assert (config.paused, config.config_version) == (True, 2)
    assert not next_config(paused, next_record(after, with_version(BANDIT, 2), effective_ms=0)).paused


def test_new_weights_do_not_undo_a_conclusion() -> None:
    record = concluded(FIRST)
    with pytest.raises(ConfigError, match=r"version 1 was concluded by signal s-9, .* raise `version` to 2"):
        next_record(record, with_weights(SPEC, 0.5, 0.5), effective_ms=9_000)
    assert next_record(record, SPEC, effective_ms=9_000) == record
    assert archived_record(record).epochs == record.epochs
    fresh = next_record(record, with_version(SPEC, 2), effective_ms=9_000)
    assert [epoch.final for epoch in fresh.epochs] == [False]


def test_a_conclusion_that_applications_do_not_know_of_yet_is_not_called_running() -> None:
    record = concluded(FIRST)
    assert next_config(RUNNING, record) == RUNNING
    with pytest.raises(ConfigError, match=r"version 1 was concluded by signal s-9; raise `version` to 2"):
        next_config(None, record)


def test_after_a_reset_new_weights_are_taken_again() -> None:
    record = moved(concluded(FIRST), weights=SPEC.weights, coverage=1.0, final=False)
    after = next_record(record, with_weights(SPEC, 0.5, 0.5), effective_ms=9_000)
    assert [epoch.final for epoch in after.epochs] == [False, True, False, False]
    assert next_config(RUNNING, after).weight_epoch == 3


def changes(before: ExperimentRecord | None, after: ExperimentRecord) -> tuple[str, ...]:
    return Publication(before=before, after=after, config_before=None, config_after=None).changes()


def test_what_changes_is_said_with_the_coverage() -> None:
    record = next_record(None, RAMP, effective_ms=1_000)
    assert changes(None, record) == ("new experiment, version 1, for 0.05 of all units at first",)
    assert changes(None, FIRST) == ("new experiment, version 1",)
    fresh = next_record(record, with_version(RAMP, 2), effective_ms=1_000)
    assert changes(record, fresh) == ("new version 2, in place of 1, for 0.05 of all units at first",)
    after = next_record(record, with_weights(RAMP, 0.5, 0.5), effective_ms=9_000)
    assert changes(record, after) == ("weight epoch 1: old 0.5, new 0.5, for 0.05 of all units",)
    assert changes(record, record) == ()
