"""What the read routes of the API answer with, beside the records of the topics themselves."""

from __future__ import annotations

from typing import Literal

import msgspec

from stream_xp.domain.decision import ConfigRecord, RolloutStatus
from stream_xp.domain.experiment import ExperimentRecord, Status
from stream_xp.domain.gate import Cause, GateVerdict, Verdict
from stream_xp.domain.operator import OrderSignal
from stream_xp.services.api.history import HistoryPoint
from stream_xp.services.signal_records import SignalRecord


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """Every answer of 4xx and 5xx."""

    error: str


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One experiment in the list.

    Attributes:
        rollout: what applications do with it; running where nothing else is known.
        verdict, cause, reason, decision_id, data_age_ms: of the gate on all its treatments.
        look, evaluated_ms: of the newest result; 0 and null without one.
    """

    experiment: str
    version: int
    owner: str
    status: Status
    rollout: RolloutStatus
    verdict: Verdict
    cause: Cause
    reason: str
    decision_id: str
    data_age_ms: int
    look: int
    evaluated_ms: int | None


class Experiments(msgspec.Struct, frozen=True, kw_only=True):
    """A page of experiments in alphabetical order.

    Attributes:
        next: what `after` must be for the next page; null at the last.
    """

    items: tuple[Summary, ...]
    next: str | None


class ExperimentDetail(msgspec.Struct, frozen=True, kw_only=True):
    """One experiment.

    Attributes:
        record: its plan and weight epochs, as the engine believes them.
        config: what applications follow; null before there is one.
        gate: the verdict on all its treatments.
        latched, proposed: id of the stop or ship in force, and of the one that waits for a person.
        paused_by: who holds it.
    """

    record: ExperimentRecord
    config: ConfigRecord | None
    gate: GateVerdict
    latched: str | None
    proposed: str | None
    paused_by: str | None


class Looks(msgspec.Struct, frozen=True, kw_only=True):
    """Looks of an experiment that this process remembers, oldest first; older ones are thinned out."""

    experiment: str
    items: tuple[HistoryPoint, ...]


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """A signal of the service or an order of a person, without the evidence that it was decided on.

    Attributes:
        id: what `stream-xp verify` takes of a decision.
        by: who ordered it; null for the service.
        answers: of an approve, reject or reset, the signal it is about.
        look: of a decision, the look it was made at.
    """

    id: str
    source: str
    time: str
    version: int
    action: str
    reason: str
    by: str | None = None
    arm: str | None = None
    metric: str | None = None
    stage: int | None = None
    weights: dict[str, float] | None = None
    proposed: bool = False
    answers: str | None = None
    look: int | None = None


def said_by(record: SignalRecord) -> Said:
    """What is shown of a record of `xp.signals`."""
    if isinstance(record, OrderSignal):
        order = record.data
        return Said(
            id=record.id,
            source=record.source,
            time=record.time,
            version=order.version,
            action=order.action.value,
            reason=order.reason,
            by=order.actor,
            arm=order.arm,
            stage=order.stage,
            answers=order.signal_id,
        )
    decision, result = record.data.decision, record.data.result
    return Said(
        id=record.id,
        source=record.source,
        time=record.time,
        version=result.version,
        action=decision.action.value,
        reason=decision.reason,
        arm=decision.arm,
        metric=decision.metric,
        stage=decision.stage,
        weights=decision.weights,
        proposed=record.data.proposed,
        look=result.look,
    )


class Signals(msgspec.Struct, frozen=True, kw_only=True):
    """The newest signals and orders of an experiment, oldest first, in the order in which they count."""

    experiment: str
    items: tuple[Said, ...]


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the process lives and gets on.

    Attributes:
        progress_age_ms: since the reader last got on.
        read_age_ms: since the topics were last at their end; null before the first time.
    """

    status: Literal["ok", "failing"]
    reason: str
    progress_age_ms: int
    read_age_ms: int | None


class ServiceState(msgspec.Struct, frozen=True, kw_only=True):
    """The process itself, for operators.

    Attributes:
        records: how many it has read.
        passed_over: topic to the number of records that could not be read.
        refused: reason to the number of requests refused for it.
        answered: route to the number of requests answered.
        gates: verdict to the number of times that a gate said so.
        writes: whether there are write routes.
    """

    code_version: str
    started_ms: int
    read_age_ms: int | None
    experiments: int
    records: int
    passed_over: dict[str, int]
    refused: dict[str, int]
    answered: dict[str, int]
    gates: dict[str, int]
    writes: bool
