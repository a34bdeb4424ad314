"""Every series given to Prometheus: the one list that code, docs, rules and dashboards are held against.

Label values come from closed sets, are ids of registered experiments and what their specs name, or names of targets in
a file of its own. What does not fit into the bound of series is added up under `OTHER`, as its definition says.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Final

import msgspec

from stream_xp.domain.decision import Action, MonitorName, MonitorState
from stream_xp.domain.experiment import ExperimentSpec, Role
from stream_xp.domain.statistics import Outcomes
from stream_xp.domain.tracing import Delivery
from stream_xp.errors import Reason

PREFIX: Final = "streamxp_"
OTHER: Final = "_other"
"""Stands for all experiments beyond the bound, their arms and metrics; no id can begin with an underscore."""
TOPICS: Final = ("exposures", "rewards")
NOTIFY: Final = "notify"
"""In place of a role: what `stream-xp notify` has."""
RESULTS: Final = tuple(name for name in Outcomes.__struct_fields__ if name not in ("read", "waiting"))
"""Outcomes that a record keeps; one that waits will get another."""


class DecisionState(StrEnum):
    """Where an experiment stands, in one word; the first that applies, from the end to the start."""

    NO_DATA = "no_data"
    RUNNING = "running"
    PAUSED = "paused"
    INVALID = "invalid"
    PROPOSED = "proposed"
    STOPPED = "stopped"
    SHIPPED = "shipped"


class Kind(StrEnum):
    """What a series is to Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Overflow(StrEnum):
    """What `OTHER` shows of the experiments beyond the bound."""

    SUM = "sum"
    MAX = "max"
    MIN = "min"
    LEFT_OUT = "left out"


class MetricDef(msgspec.Struct, frozen=True, kw_only=True):
    """One metric.

    Attributes:
        name: as it stands in a query; histograms without `_bucket`, `_count` and `_sum`.
        unit: of its value; `metric` is the unit of the experiment's own metric.
        role: the role of a worker that has it; None for every worker, `NOTIFY` for no worker but the notifier.
        labels: in the order in which values are given.
        buckets: upper bounds of a histogram, without infinity.
        guardrails: of a series per metric and arm, whether only guardrails have it.
        overflow: only of series of experiments.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    role: str | None = None
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    guardrails: bool = False
    overflow: Overflow | None = None

    @property
    def samples(self) -> tuple[str, ...]:
        """The names that a query can ask for."""
        if self.kind is Kind.HISTOGRAM:
            return (f"{self.name}_bucket", f"{self.name}_count", f"{self.name}_sum")
        return (self.name,)


class LabelDef(msgspec.Struct, frozen=True, kw_only=True):
    """One label; `values` is None where they are ids from specs, or partitions."""

    help: str
    values: tuple[str, ...] | None = None


LABELS: Final = {
    "action": LabelDef(help="What was decided.", values=tuple(Action)),
    "arm": LabelDef(help="Key of an arm; empty where a monitor watches the whole experiment."),
    "delivery": LabelDef(
        help="What became of a span: the collector has it, it could not be delivered, or there was no room for it.",
        values=tuple(Delivery),
    ),
    "experiment": LabelDef(help="Id of a registered experiment."),
    "metric": LabelDef(help="Key of a metric of the experiment."),
    "monitor": LabelDef(help="What is watched beside metrics.", values=tuple(MonitorName)),
    "partition": LabelDef(help="A source partition that this worker holds."),
    "reason": LabelDef(help="Why a record was dead-lettered.", values=tuple(Reason)),
    "result": LabelDef(help="What became of a record (docs/semantics.md).", values=RESULTS),
    "state": LabelDef(
        help="One series per state: 1 for the state that it is in, 0 for the others.",
        values=tuple(dict.fromkeys([*DecisionState, *MonitorState])),
    ),
    "target": LabelDef(help="Name of a target of the notifier; each is there from the start."),
    "topic": LabelDef(help="A source topic, without the prefix.", values=TOPICS),
    "version": LabelDef(help="Version of the program."),
}

_OF_ARM = ("experiment", "arm")
_OF_METRIC = ("experiment", "metric", "arm")
_QUICK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LAGS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3_600.0)
_DELAYS = (1.0, 5.0, 15.0, 60.0, 300.0, 1_800.0, 3_600.0, 21_600.0, 86_400.0, 604_800.0, 2_592_000.0)


def _of(role: str | None, kind: Kind, name: str, unit: str, text: str, **more: object) -> MetricDef:
    return msgspec.convert(
        {"name": PREFIX + name, "kind": kind, "unit": unit, "help": text, "role": role, **more}, MetricDef
    )


_WORKER = (
    _of(None, Kind.GAUGE, "build_info", "none", "1, with the version of the program.", labels=("version",)),
    _of(
        None, Kind.GAUGE, "source_partitions", "partitions", "Partitions that the source topics should have."
    ),
    _of(
        None,
        Kind.GAUGE,
        "overflow_experiments",
        "experiments",
        f"Experiments beyond STREAM_XP_METRICS_MAX_SERIES, added up as `{OTHER}`.",
    ),
    _of(
        None,
        Kind.COUNTER,
        "trace_spans_total",
        "spans",
        "Spans of traces by what became of them; 0 where STREAM_XP_TRACES_ENDPOINT is not set.",
        labels=("delivery",),
    ),
)
_INGEST = (
    _of(
        "ingest",
        Kind.COUNTER,
        "events_total",
        "records",
        "Records applied by this worker since it holds their partition, by what became of them.",
        labels=("topic", "result"),
    ),
    _of(
        "ingest",
        Kind.COUNTER,
        "dead_letter_total",
        "records",
        "Records dead-lettered by this worker.",
        labels=("topic", "reason"),
    ),
    _of(
        "ingest",
        Kind.HISTOGRAM,
        "event_lag_seconds",
        "seconds",
        "Broker append time minus event time; of each block of records a sample, evenly spread.",
        labels=("topic",),
        buckets=_LAGS,
    ),
    _of(
        "ingest",
        Kind.COUNTER,
        "exposures_total",
        "records",
        "Valid exposures applied by this worker, repeats included.",
        labels=_OF_ARM,
        overflow=Overflow.SUM,
    ),
    _of(
        "ingest",
        Kind.GAUGE,
        "applied_offset",
        "records",
        "Offset of the last record applied; before the first one, the offset before it.",
        labels=("topic", "partition"),
    ),
    _of(
        "ingest",
        Kind.GAUGE,
        "lag_records",
        "records",
        "Records between the applied offset and the end of the partition.",
        labels=("topic", "partition"),
    ),
    _of(
        "ingest",
        Kind.GAUGE,
        "watermark_timestamp_seconds",
        "seconds",
        "Watermark, as a Unix time; no series before the partition has one.",
        labels=("partition",),
    ),
    _of(
        "ingest",
        Kind.GAUGE,
        "snapshot_timestamp_seconds",
        "seconds",
        "Unix time at which the newest snapshot was last known to hold all that was applied.",
        labels=("partition",),
    ),
    _of(
        "ingest",
        Kind.GAUGE,
        "units",
        "units",
        "Units held, once per experiment version.",
        labels=("partition",),
    ),
    _of(
        "ingest",
        Kind.GAUGE,
        "rewards_waiting",
        "records",
        "Rewards that wait for their exposure.",
        labels=("partition",),
    ),
    _of(
        "ingest",
        Kind.COUNTER,
        "holes_total",
        "holes",
        "Blocks that began after the next offset.",
        labels=("topic",),
    ),
    _of(
        "ingest",
        Kind.HISTOGRAM,
        "flush_seconds",
        "seconds",
        "Time of one flush of all partitions.",
        buckets=_QUICK,
    ),
    _of(
        "ingest",
        Kind.HISTOGRAM,
        "snapshot_seconds",
        "seconds",
        "Time of one snapshot of one partition, until it was durable.",
        buckets=_QUICK,
    ),
    _of(
        "ingest",
        Kind.GAUGE,
        "last_flush_timestamp_seconds",
        "seconds",
        "Unix time at which the last flush ended.",
    ),
)
_DECIDE = (
    _of(
        "decide", Kind.GAUGE, "experiments", "experiments", "Experiments that this worker has statistics of."
    ),
    _of("decide", Kind.HISTOGRAM, "evaluation_seconds", "seconds", "Time of one evaluation.", buckets=_QUICK),
    _of(
        "decide",
        Kind.GAUGE,
        "last_evaluation_timestamp_seconds",
        "seconds",
        "Unix time at which the last evaluation ended, whether or not anything had changed.",
    ),
    _of(
        "decide",
        Kind.COUNTER,
        "decisions_total",
        "signals",
        "Decisions that this worker has signalled, proposals included.",
        labels=("action",),
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "last_decision_timestamp_seconds",
        "seconds",
        "Unix time of this worker's last decision; no series before the first.",
    ),
    _of(
        "decide",
        Kind.HISTOGRAM,
        "detection_delay_seconds",
        "seconds",
        "From the first exposure of an experiment to the decision to stop or ship it.",
        labels=("action",),
        buckets=_DELAYS,
    ),
)
_EXPERIMENT = (
    _of(
        "decide",
        Kind.GAUGE,
        "decision_state",
        "none",
        f"Where the experiment stands: {', '.join(DecisionState)}.",
        labels=("experiment", "state"),
        overflow=Overflow.SUM,
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "experiment_version",
        "none",
        "Version of the experiment.",
        labels=("experiment",),
        overflow=Overflow.LEFT_OUT,
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "experiment_watermark_timestamp_seconds",
        "seconds",
        "Least watermark of the statistics that were tested, as a Unix time.",
        labels=("experiment",),
        overflow=Overflow.MIN,
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "evaluated_timestamp_seconds",
        "seconds",
        "Unix time of the newest result.",
        labels=("experiment",),
        overflow=Overflow.MIN,
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "arm_units",
        "units",
        "Units exposed to the arm, crossovers taken out.",
        labels=_OF_ARM,
        overflow=Overflow.SUM,
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "crossover_units",
        "units",
        "Units seen in two arms.",
        labels=("experiment",),
        overflow=Overflow.SUM,
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "arm_weight_ratio",
        "ratio",
        "Weight of the arm in the newest weight epoch.",
        labels=_OF_ARM,
        overflow=Overflow.LEFT_OUT,
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "coverage_ratio",
        "ratio",
        "Share of all units that take part, in the newest weight epoch.",
        labels=("experiment",),
        overflow=Overflow.LEFT_OUT,
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "guardrail_breached",
        "none",
        "1 once harm is proven, until a person resets the experiment or a new version begins.",
        labels=_OF_METRIC,
        guardrails=True,
        overflow=Overflow.MAX,
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "guardrail_log_evidence",
        "nats",
        "log_e against the hypothesis that the arm does no harm.",
        labels=_OF_METRIC,
        guardrails=True,
        overflow=Overflow.LEFT_OUT,
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "guardrail_log_evidence_threshold",
        "nats",
        "Harm is proven at or above this.",
        labels=_OF_METRIC,
        guardrails=True,
        overflow=Overflow.LEFT_OUT,
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "effect",
        "metric",
        "Estimate, arm minus control; of a count the log rate ratio; no series while undetermined.",
        labels=_OF_METRIC,
        overflow=Overflow.LEFT_OUT,
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "effect_lower",
        "metric",
        "Lower bound of the confidence sequence of the effect.",
        labels=_OF_METRIC,
        overflow=Overflow.LEFT_OUT,
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "effect_upper",
        "metric",
        "Upper bound of the confidence sequence of the effect.",
        labels=_OF_METRIC,
        overflow=Overflow.LEFT_OUT,
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "effect_log_evidence",
        "nats",
        "log_e against the hypothesis that there is no effect.",
        labels=_OF_METRIC,
        overflow=Overflow.LEFT_OUT,
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "srm_mismatch",
        "none",
        "1 once a sample-ratio mismatch is proven, until a person resets the experiment or a new version begins.",
        labels=("experiment",),
        overflow=Overflow.MAX,
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "srm_log_evidence",
        "nats",
        "log_e of settled units against the hypothesis that units are assigned by the weights.",
        labels=("experiment",),
        overflow=Overflow.LEFT_OUT,
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "srm_log_evidence_threshold",
        "nats",
        "A mismatch is proven at or above this.",
        labels=("experiment",),
        overflow=Overflow.LEFT_OUT,
    ),
    _of(
        "decide",
        Kind.GAUGE,
        "monitor_state",
        "none",
        f"What a monitor says: {', '.join(MonitorState)}.",
        labels=("experiment", "monitor", "arm", "state"),
        overflow=Overflow.SUM,
    ),
)
_OF_TARGET = ("target",)
OF_NOTIFIERS: Final = (
    _of(
        NOTIFY,
        Kind.COUNTER,
        "notify_delivered_total",
        "messages",
        "Messages that the target has taken.",
        labels=_OF_TARGET,
    ),
    _of(
        NOTIFY,
        Kind.COUNTER,
        "notify_failed_total",
        "attempts",
        "Attempts that failed, tried again or not.",
        labels=_OF_TARGET,
    ),
    _of(
        NOTIFY,
        Kind.COUNTER,
        "notify_given_up_total",
        "messages",
        "Messages that the target will not be sent again.",
        labels=_OF_TARGET,
    ),
    _of(
        NOTIFY,
        Kind.GAUGE,
        "notify_waiting",
        "none",
        "1 while a message has failed and waits to be tried again, 0 otherwise.",
        labels=_OF_TARGET,
    ),
)
OF_WORKERS: Final = (*_WORKER, *_INGEST, *_DECIDE, *_EXPERIMENT)
DEFINITIONS: Final = (*OF_WORKERS, *OF_NOTIFIERS)
BY_NAME: Final = {definition.name: definition for definition in DEFINITIONS}


def of_roles(roles: tuple[str, ...]) -> Iterator[MetricDef]:
    """The definitions that a worker of these roles has."""
    return (one for one in DEFINITIONS if one.role is None or one.role in roles)


def series_of(spec: ExperimentSpec, roles: tuple[str, ...]) -> int:
    """How many series an experiment has at most, in a worker of these roles."""
    arms, treatments = len(spec.arms), len(spec.treatments)
    guardrails, metrics = len(spec.with_role(Role.GUARDRAIL)), len(spec.metrics)
    # Three monitors watch the whole experiment, one every treatment and one every arm.
    monitors = len(MonitorState) * (3 + treatments + arms)
    sizes = {
        ("experiment",): 1,
        ("experiment", "state"): len(DecisionState),
        _OF_ARM: arms,
        ("experiment", "monitor", "arm", "state"): monitors,
    }
    of_experiments = [one for one in of_roles(roles) if one.overflow is not None]
    return sum(
        treatments * (guardrails if one.guardrails else metrics)
        if one.labels == _OF_METRIC
        else sizes[one.labels]
        for one in of_experiments
    )
