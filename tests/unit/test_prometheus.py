"""The series of workers and notifiers: what definitions promise, from the first scrape on, and never more than that."""

from __future__ import annotations

import re
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from stream_xp.adapters.prometheus import Deliveries, Metrics, MetricsServer
from stream_xp.domain.decision import (
    Action,
    ArmResult,
    Evidence,
    Method,
    MetricResult,
    MetricState,
    MonitorName,
    MonitorResult,
    MonitorState,
    PartitionOffsets,
    Result,
    RolloutState,
    SampleRatio,
)
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Role, WeightEpoch
from stream_xp.domain.metric_defs import (
    BY_NAME,
    DEFINITIONS,
    LABELS,
    NOTIFY,
    OF_NOTIFIERS,
    OF_WORKERS,
    OTHER,
    DecisionState,
    Kind,
    Overflow,
    series_of,
)
from stream_xp.domain.statistics import Outcomes
from stream_xp.domain.telemetry import BlockReport, ExperimentReport, PartitionReport
from stream_xp.errors import DependencyError, Reason
from stream_xp.settings import ROLES

GOLDEN = Path(__file__).parents[2] / "topics" / "golden"
SPEC = msgspec.convert(
    {
        "experiment": "exp",
        "owner": "o",
        "hypothesis": "h",
        "unit": "u",
        "planned_sample": 1000,
        "arms": [
            {"key": "a", "weight": 0.5, "control": True},
            {"key": "b", "weight": 0.3},
            {"key": "c", "weight": 0.2},
        ],
        "metrics": [
            {
                "key": key,
                "kind": "conversion",
                "role": role,
                "direction": "decrease",
                "attribution_window": "1s",
                **({"margin": {"absolute": 0.01}} if role == "guardrail" else {}),
            }
            for key, role in (("gain", "primary"), ("errors", "guardrail"), ("calls", "guardrail"))
        ],
    },
    ExperimentSpec,
)
EVIDENCE = Evidence(0.01, -0.02, 0.04, 1.5, 0.2, 3.0)
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def record(experiment: str = "exp") -> ExperimentRecord:
    spec = msgspec.structs.replace(SPEC, experiment=experiment)
    epoch = WeightEpoch(epoch=0, weights=spec.weights, effective_ms=0)
    return ExperimentRecord(spec=spec, epochs=(epoch,), design_hash=spec.design_hash())


def result(experiment: str = "exp", **changed: Any) -> Result:
    """A result with everything that a result of SPEC can have."""
    golden = msgspec.json.decode((GOLDEN / "result.advance.v1.json").read_bytes(), type=Result)
    metrics = [
        MetricResult(
            metric.key,
            metric.role,
            arm.key,
            MetricState.INCONCLUSIVE,
            Method.EXACT_THEN_ASYMPTOTIC,
            10,
            10,
            effect=EVIDENCE,
            harm=EVIDENCE if metric.role is Role.GUARDRAIL else None,
        )
        for metric in SPEC.metrics
        for arm in SPEC.treatments
    ]
    whole = (MonitorName.CROSSOVERS, MonitorName.DATA_AGE, MonitorName.DUPLICATES)
    monitors = [MonitorResult(monitor=name) for name in whole]
    monitors += [
        MonitorResult(monitor=MonitorName.REWARD_LOSS, arm=arm.key, state=MonitorState.WARNING)
        for arm in SPEC.treatments
    ]
    monitors += [MonitorResult(monitor=MonitorName.EXPOSURE_STALL, arm=arm.key) for arm in SPEC.arms]
    rollout = RolloutState(
        stage=None, coverage=1.0, weights=SPEC.weights, paused=False, proposed=None, epochs_left=9
    )
    full = {
        "experiment": experiment,
        "arms": tuple(ArmResult(arm=arm.key, units=7, expected_units=7.0) for arm in SPEC.arms),
        "metrics": tuple(metrics),
        "monitors": tuple(monitors),
        "offsets": {"0": PartitionOffsets(exposures=1, rewards=1, watermark_ms=5_000)},
        "rollout": rollout,
        "sample_ratio": SampleRatio(log_e=0.5, p_always_valid=0.6, threshold_log_e=7.0, mismatch=False),
    }
    return msgspec.structs.replace(golden, **{**full, **changed})


def report(experiment: str = "exp", **changed: Any) -> ExperimentReport:
    plain = ExperimentReport(result(experiment), DecisionState.RUNNING, frozenset(), mismatch=False)
    return plain._replace(**changed)


def partition(number: int = 0, *, counted: int = 0, **changed: Any) -> PartitionReport:
    outcomes = Outcomes(read=counted, counted=counted)
    plain = PartitionReport(
        number,
        applied={"exposures": counted - 1, "rewards": -1},
        lags={"exposures": 4},
        watermark_ms=2_500,
        covered_ms=3_000,
        units=5,
        outcomes={"exposures": outcomes, "rewards": Outcomes(read=1, waiting=1)},
    )
    return plain._replace(**changed)


def worker(roles: tuple[str, ...] = ROLES, *, max_series: int = 10_000) -> Metrics:
    return Metrics(roles, source_partitions=4, max_series=max_series)


def scraped(metrics: Metrics | Deliveries) -> Series:
    """Every series of ours that a scrape shows, once; those of the process itself left out."""
    found: Series = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"twice: {key}"
            if sample.name.startswith("streamxp_"):
                found[key] = sample.value
    return found


def at(found: Series, name: str, **labels: str) -> float:
    return found["streamxp_" + name, tuple(sorted(labels.items()))]


def named(found: Series, name: str) -> Series:
    return {key: value for key, value in found.items() if key[0] == "streamxp_" + name}


# --- the definitions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", DEFINITIONS, ids=lambda one: one.name)
def test_a_definition_keeps_the_conventions(one: Any) -> None:
    assert re.fullmatch(r"streamxp_[a-z][a-z0-9_]*", one.name)
    assert one.name.endswith("_total") == (one.kind is Kind.COUNTER)
    assert (one.unit == "seconds") == one.name.endswith("_seconds")
    assert (one.unit == "ratio") == one.name.endswith("_ratio")
    assert one.help.endswith(".")
    assert set(one.labels) <= set(LABELS)
    assert (one.overflow is not None) == ("experiment" in one.labels)
    assert bool(one.buckets) == (one.kind is Kind.HISTOGRAM)
    assert list(one.buckets) == sorted(set(one.buckets))


def test_names_are_unique() -> None:
    assert len(BY_NAME) == len(DEFINITIONS)
    samples = [sample for one in DEFINITIONS for sample in one.samples]
    assert len(set(samples)) == len(samples)


# --- what is there from the start ---------------------------------------------------------------------------------


def test_what_is_known_beforehand_is_there_before_anything_happens() -> None:
    found = scraped(worker())
    for reason in Reason:
        assert at(found, "dead_letter_total", topic="rewards", reason=reason) == 0
    assert at(found, "events_total", topic="exposures", result="late") == 0
    assert at(found, "decisions_total", action="stop") == 0
    assert at(found, "event_lag_seconds_count", topic="rewards") == 0
    assert at(found, "detection_delay_seconds_count", action="stop") == 0
    assert at(found, "holes_total", topic="rewards") == 0
    assert at(found, "overflow_experiments") == 0
    assert at(found, "source_partitions") == 4


def test_a_worker_has_only_what_its_roles_have() -> None:
    ingest, decide = scraped(worker(("ingest",))), scraped(worker(("decide",)))
    assert named(ingest, "holes_total")
    assert not named(ingest, "decisions_total")
    assert named(decide, "decisions_total")
    assert not named(decide, "holes_total")


@pytest.mark.parametrize("role", ROLES)
def test_a_worker_may_be_told_what_is_not_of_its_role(role: str) -> None:
    metrics = worker((role,))
    names = {name for name, _ in scraped(metrics)}
    metrics.evaluated(took_s=0.1, at_ms=1, experiments=0)
    metrics.flushed(took_s=0.1, at_ms=1)
    metrics.snapshot_written(took_s=0.1)
    metrics.hole_found("rewards")
    metrics.decided(Action.STOP, at_ms=1, first_exposure_ms=0)
    metrics.partition_flushed(partition())
    metrics.partitions_left()
    metrics.experiments_left()
    shown = {name for name, _ in scraped(metrics)}
    assert {BY_NAME[name].role for name in shown if name in BY_NAME} == {None, role}
    assert names <= shown


def test_a_registered_experiment_has_series_before_its_first_unit_where_it_is_decided_on() -> None:
    metrics = worker()
    metrics.registered([record("mine"), record("anothers")], owned=["mine"])
    found = scraped(metrics)
    assert at(found, "guardrail_breached", experiment="mine", metric="errors", arm="b") == 0
    assert at(found, "decision_state", experiment="mine", state="no_data") == 1
    assert at(found, "arm_weight_ratio", experiment="mine", arm="a") == 0.5
    # Every worker can be sent its exposures, one decides.
    assert at(found, "exposures_total", experiment="anothers", arm="a") == 0
    assert not [key for key in named(found, "decision_state") if ("experiment", "anothers") in key[1]]


def test_workers_of_one_process_do_not_meet() -> None:
    one, other = worker(), worker()
    one.hole_found("rewards")
    assert at(scraped(one), "holes_total", topic="rewards") == 1
    assert at(scraped(other), "holes_total", topic="rewards") == 0


# --- values ---------------------------------------------------------------------------------------------------------


def test_a_partition_shows_where_it_stands_until_it_leaves() -> None:
    metrics = worker()
    metrics.partition_flushed(partition(3, counted=6))
    found = scraped(metrics)
    assert at(found, "applied_offset", topic="exposures", partition="3") == 5
    assert at(found, "lag_records", topic="exposures", partition="3") == 4
    assert ("streamxp_lag_records", (("partition", "3"), ("topic", "rewards"))) not in found
    assert at(found, "watermark_timestamp_seconds", partition="3") == 2.5
    assert at(found, "snapshot_timestamp_seconds", partition="3") == 3.0
    assert at(found, "units", partition="3") == 5
    assert at(found, "rewards_waiting", partition="3") == 1
    metrics.partition_flushed(partition(3, counted=6, watermark_ms=None, lags={}))
    found = scraped(metrics)
    assert not named(found, "watermark_timestamp_seconds")
    assert not named(found, "lag_records")
    metrics.partitions_left()
    assert not [key for key in scraped(metrics) if "partition" in dict(key[1])]


def test_events_count_from_what_a_partition_came_with_and_never_fall() -> None:
    metrics = worker()

    def counted() -> float:
        return at(scraped(metrics), "events_total", topic="exposures", result="counted")

    metrics.partition_flushed(partition(counted=100))
    assert counted() == 0
    metrics.partition_flushed(partition(counted=110))
    assert counted() == 10
    # Exposures that had been counted turned out to be of crossovers.
    metrics.partition_flushed(partition(counted=108))
    metrics.partition_flushed(partition(counted=111))
    assert counted() == 11
    metrics.partitions_left()
    metrics.partition_flushed(partition(counted=500))
    assert counted() == 11


def test_a_block_counts_its_letters_exposures_and_lags() -> None:
    metrics = worker()
    metrics.registered([record()], owned=[])
    block = BlockReport("exposures", [40, 400, 10**9], {"invalid_json": 2}, {("exp", "b"): 5})
    metrics.block_applied(block)
    metrics.block_applied(block)
    found = scraped(metrics)
    assert at(found, "dead_letter_total", topic="exposures", reason="invalid_json") == 4
    assert at(found, "exposures_total", experiment="exp", arm="b") == 10
    assert at(found, "event_lag_seconds_bucket", topic="exposures", le="0.05") == 2
    assert at(found, "event_lag_seconds_bucket", topic="exposures", le="0.5") == 4
    assert at(found, "event_lag_seconds_bucket", topic="exposures", le="+Inf") == 6
    assert at(found, "event_lag_seconds_sum", topic="exposures") == pytest.approx(2 * (0.44 + 10**6))


def test_a_bucket_holds_what_is_at_its_bound() -> None:
    metrics = worker()
    metrics.flushed(took_s=0.25, at_ms=1_000)
    assert at(scraped(metrics), "flush_seconds_bucket", le="0.25") == 1
    assert at(scraped(metrics), "flush_seconds_bucket", le="0.1") == 0


def test_a_result_is_shown_until_the_experiment_leaves_or_is_archived() -> None:
    metrics = worker()
    metrics.registered([record()], owned=["exp"])
    breached = frozenset({("errors", "c")})
    shown = report(state=DecisionState.STOPPED, breached=breached, mismatch=True)
    metrics.experiments_evaluated([shown])
    found = scraped(metrics)
    assert at(found, "guardrail_breached", experiment="exp", metric="errors", arm="c") == 1
    assert at(found, "guardrail_breached", experiment="exp", metric="errors", arm="b") == 0
    assert at(found, "guardrail_log_evidence", experiment="exp", metric="calls", arm="b") == 1.5
    assert at(found, "guardrail_log_evidence_threshold", experiment="exp", metric="calls", arm="b") == 3.0
    assert at(found, "effect", experiment="exp", metric="gain", arm="b") == 0.01
    assert at(found, "effect_lower", experiment="exp", metric="gain", arm="b") == -0.02
    assert at(found, "effect_upper", experiment="exp", metric="gain", arm="b") == 0.04
    assert at(found, "srm_mismatch", experiment="exp") == 1
    assert at(found, "srm_log_evidence", experiment="exp") == 0.5
    assert at(found, "decision_state", experiment="exp", state="stopped") == 1
    assert at(found, "decision_state", experiment="exp", state="running") == 0
    state = {"experiment": "exp", "monitor": "reward_loss", "arm": "b"}
    assert at(found, "monitor_state", **state, state="warning") == 1
    assert at(found, "monitor_state", **state, state="quiet") == 0
    assert not named(found, "guardrail_breached").keys() & {("gain", "b")}
    assert at(found, "experiment_watermark_timestamp_seconds", experiment="exp") == 5
    metrics.experiments_left()
    assert not named(scraped(metrics), "guardrail_breached")
    metrics.registered([record()], owned=["exp"])
    metrics.experiments_evaluated([shown])
    metrics.registered([], owned=[])
    assert not [key for key in scraped(metrics) if "experiment" in dict(key[1])]


def test_what_is_undetermined_or_not_finite_has_no_series() -> None:
    metrics = worker()
    metrics.registered([record()], owned=["exp"])
    odd = Evidence(None, float("-inf"), float("nan"), float("inf"), 0.0, 3.0)
    metric = msgspec.structs.replace(result().metrics[0], effect=odd)
    bare = result(metrics=(metric,), sample_ratio=None, rollout=None, monitors=None)
    metrics.experiments_evaluated([report(result=bare)])
    found = scraped(metrics)
    assert not [key for key in found if "effect" in key[0]]
    assert at(found, "srm_log_evidence", experiment="exp") == 0
    assert b"nan" not in generate_latest(metrics.registry).lower()


def test_a_decision_is_counted_with_its_delay() -> None:
    metrics = worker()
    metrics.decided(Action.STOP, at_ms=70_000, first_exposure_ms=10_000)
    metrics.decided(Action.ADVANCE, at_ms=80_000, first_exposure_ms=10_000)
    found = scraped(metrics)
    assert at(found, "decisions_total", action="stop") == 1
    assert at(found, "decisions_total", action="advance") == 1
    assert at(found, "last_decision_timestamp_seconds") == 80
    assert at(found, "detection_delay_seconds_sum", action="stop") == 60
    assert at(found, "detection_delay_seconds_count", action="ship") == 0


# --- a notifier ---------------------------------------------------------------------------------------------------


def test_a_notifier_has_every_series_of_every_target_from_the_start_and_never_another() -> None:
    deliveries = Deliveries(["ci", "chat"])
    start = scraped(deliveries)
    assert set(start) == {
        (one.name, (("target", target),)) for one in OF_NOTIFIERS for target in ("ci", "chat")
    }
    assert set(start.values()) == {0}
    deliveries.delivered("ci")
    deliveries.failed("ci")
    deliveries.failed("ci")
    deliveries.given_up("chat")
    deliveries.waiting("chat", waits=True)
    found = scraped(deliveries)
    assert {key: value for key, value in found.items() if value} == {
        ("streamxp_notify_delivered_total", (("target", "ci"),)): 1,
        ("streamxp_notify_failed_total", (("target", "ci"),)): 2,
        ("streamxp_notify_given_up_total", (("target", "chat"),)): 1,
        ("streamxp_notify_waiting", (("target", "chat"),)): 1,
    }
    deliveries.waiting("chat", waits=False)
    assert at(scraped(deliveries), "notify_waiting", target="chat") == 0
    for tell in (deliveries.delivered, deliveries.failed, deliveries.given_up):
        with pytest.raises(KeyError):
            tell("nobody")
    with pytest.raises(KeyError):
        deliveries.waiting("nobody", waits=True)
    assert set(scraped(deliveries)) == set(start)


def test_definitions_are_of_workers_or_of_notifiers() -> None:
    assert {one.role for one in OF_NOTIFIERS} == {NOTIFY}
    assert {one.role for one in OF_WORKERS} == {None, *ROLES}
    assert (*OF_WORKERS, *OF_NOTIFIERS) == DEFINITIONS
    assert not [name for name, _ in scraped(worker()) if "notify" in name]


# --- the bound --------------------------------------------------------------------------------------------------


def full(metrics: Metrics, *experiments: str, **changed: Any) -> None:
    metrics.registered([record(one) for one in experiments], owned=experiments)
    metrics.experiments_evaluated([report(one, **changed) for one in experiments])


def test_an_experiment_has_exactly_as_many_series_as_it_can_have() -> None:
    metrics = worker()
    before = len(scraped(metrics))
    full(metrics, "exp")
    assert len(scraped(metrics)) - before == series_of(SPEC, ROLES)


def test_every_series_is_one_of_a_definition_and_every_definition_has_series() -> None:
    metrics = worker()
    full(metrics, "exp")
    metrics.partition_flushed(partition())
    metrics.evaluated(took_s=0.1, at_ms=1, experiments=1)
    metrics.flushed(took_s=0.1, at_ms=1)
    metrics.decided(Action.STOP, at_ms=1, first_exposure_ms=1)
    found = scraped(metrics)
    by_sample = {sample: one for one in OF_WORKERS for sample in one.samples}
    assert {name for name, _ in found} == set(by_sample)
    for name, labels in found:
        given = dict(labels)
        given.pop("le", None)
        # The parser leaves out an empty value as Prometheus does.
        assert set(given) | {"arm"} == set(by_sample[name].labels) | {"arm"}
        for label, value in given.items():
            closed = LABELS[label].values
            assert closed is None or value in closed


def test_beyond_the_bound_experiments_are_added_up_and_a_breach_still_shows() -> None:
    size = series_of(SPEC, ROLES)
    metrics = worker(max_series=2 * size)
    names = [f"e{n}" for n in range(5)]
    full(metrics, *names)
    metrics.experiments_evaluated([report("e4", breached=frozenset({("errors", "b")}), mismatch=True)])
    metrics.block_applied(BlockReport("exposures", [], {}, {("e3", "a"): 2, ("e4", "b"): 3, ("e0", "a"): 1}))
    found = scraped(metrics)
    assert at(found, "overflow_experiments") == 3
    own = {dict(labels)["experiment"] for _, labels in found if "experiment" in dict(labels)}
    assert own == {"e0", "e1", OTHER}
    assert at(found, "guardrail_breached", experiment=OTHER, metric=OTHER, arm=OTHER) == 1
    assert at(found, "guardrail_breached", experiment="e0", metric="errors", arm="b") == 0
    assert at(found, "srm_mismatch", experiment=OTHER) == 1
    assert at(found, "decision_state", experiment=OTHER, state="running") == 3
    assert at(found, "exposures_total", experiment=OTHER, arm=OTHER) == 5
    assert at(found, "exposures_total", experiment="e0", arm="a") == 1
    for one in DEFINITIONS:
        if one.overflow is Overflow.LEFT_OUT:
            of_others = [
                labels for name, labels in found if name == one.name and ("experiment", OTHER) in labels
            ]
            assert not of_others
    oldest = min(result().evaluated_ms / 1000, 10**12)
    assert at(found, "evaluated_timestamp_seconds", experiment=OTHER) == oldest


def test_a_place_that_becomes_free_is_given_to_the_next_experiment() -> None:
    metrics = worker(max_series=series_of(SPEC, ROLES))
    full(metrics, "first", "second")
    full(metrics, "second")
    found = scraped(metrics)
    assert at(found, "overflow_experiments") == 0
    assert at(found, "decision_state", experiment="second", state="running") == 1


def test_a_hundred_thousand_experiments_change_no_series_count() -> None:
    metrics = worker(max_series=3 * series_of(SPEC, ROLES))
    full(metrics, *(f"e{n}" for n in range(5)))
    few = set(scraped(metrics))
    records = [record("e0")]
    spec, epochs = records[0].spec, records[0].epochs
    for n in range(100_000):
        named_otherwise = msgspec.structs.replace(spec, experiment=f"e{n}")
        records.append(ExperimentRecord(spec=named_otherwise, epochs=epochs, design_hash="h"))
    metrics.registered(records[1:], owned=[f"e{n}" for n in range(5)])
    metrics.block_applied(BlockReport("exposures", [], {}, {(f"e{n}", "a"): 1 for n in range(100_000)}))
    found = scraped(metrics)
    assert set(found) == few
    assert at(found, "exposures_total", experiment=OTHER, arm=OTHER) == 100_000 - 3


def test_what_results_name_without_being_registered_has_no_series() -> None:
    metrics = worker()
    metrics.registered([record()], owned=["exp"])
    before = set(scraped(metrics))
    metrics.experiments_evaluated([report(f"r{n}") for n in range(1_000)])
    assert set(scraped(metrics)) == before


# --- the endpoint -------------------------------------------------------------------------------------------------


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_metrics_are_served_under_one_path_and_only_read() -> None:
    metrics = worker()
    server = MetricsServer(metrics.registry, host="127.0.0.1", port=0)
    try:
        status, text = get(server.port, "/metrics")
        assert (status, "streamxp_build_info{version=" in text) == (200, True)
        assert "process_resident_memory_bytes" in text
        assert get(server.port, "/")[0] == 404
        assert get(server.port, "/metrics/../etc")[0] == 404
        with pytest.raises(urllib.error.HTTPError, match="404") as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", data=b"x", timeout=30)
        refused.value.close()
        with pytest.raises(DependencyError, match="STREAM_XP_METRICS_PORT") as taken:
            MetricsServer(metrics.registry, host="127.0.0.1", port=server.port)
        assert f"127.0.0.1:{server.port}" in str(taken.value)
    finally:
        server.stop()
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", server.port))


def test_what_has_gone_begins_anew_when_it_comes_back() -> None:
    metrics = worker()
    full(metrics, "exp")
    metrics.block_applied(BlockReport("exposures", [], {}, {("exp", "a"): 4}))
    metrics.registered([record()], owned=[])
    metrics.registered([record()], owned=["exp"])
    assert at(scraped(metrics), "decision_state", experiment="exp", state="no_data") == 1
    assert at(scraped(metrics), "exposures_total", experiment="exp", arm="a") == 4
    metrics.registered([], owned=[])
    metrics.registered([record()], owned=["exp"])
    assert at(scraped(metrics), "exposures_total", experiment="exp", arm="a") == 0
