"""From what stands on the topics to a memo; nothing here reads or writes."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from stream_xp.domain.decision import Action, Decision, Method, MetricResult, Result, Signal
from stream_xp.domain.experiment import ExperimentRecord
from stream_xp.domain.operator import OperatorAction, Order, OrderSignal
from stream_xp.domain.rollout import ShipRule
from stream_xp.engine.segments import shrunk_segments
from stream_xp.engine.standing import Standing, said, standing
from stream_xp.services.memo.record import Decided, Force, Memo, MetricMemo, Point, PriorSource, Seen, Span
from stream_xp.services.memo.record import Said as Line
from stream_xp.services.memo.worth import Past, shrunk
from stream_xp.services.signal_records import SignalRecord

SERVICE: Final = "the service"
_BY_HAND = (OperatorAction.STOP, OperatorAction.SHIP)
_ASYMPTOTIC = (Method.ASYMPTOTIC, Method.CUPED, Method.ANCOVA, Method.RATIO)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the topics say of one experiment version.

    Attributes:
        records: signals and orders of the version, in the order of their partition.
        results: those of the version that are known, from its signals too; by look.
        past: effects of other experiments.
    """

    record: ExperimentRecord
    records: tuple[SignalRecord, ...]
    results: tuple[Result, ...]
    past: tuple[Past, ...] = ()


def conclusions(facts: Facts) -> list[SignalRecord]:
    """Every stop and ship, decided, proposed or ordered, that counted when it came; oldest first."""
    ignored = {(one.source, one.id) for one in _standing(facts).ignored}
    found: dict[tuple[str, str], SignalRecord] = {}
    for record in facts.records:
        identity = (record.source, record.id)
        if _concludes(record) and identity not in ignored:
            found.setdefault(identity, record)
    return list(found.values())


def memo(facts: Facts, conclusion: SignalRecord) -> Memo:
    """The memo of one of the conclusions.

    Raises:
        ValueError: it was ordered, and no result of the version is known.
    """
    result = _result(facts, conclusion)
    now = _standing(facts)
    spec = facts.record.spec
    known = [one for one in facts.results if one.look <= result.look]
    metrics = tuple(_metric(facts, metric, known) for metric in result.metrics)
    spans = tuple(_spans([*known, *([] if result in known else [result])]))
    decided = _decided(facts, conclusion, now)
    return Memo(
        experiment=spec.experiment,
        version=spec.version,
        decided=decided,
        spec=spec,
        design_hash=facts.record.design_hash,
        seen=_seen(result, len(known)),
        metrics=metrics,
        segments=result.segments,
        shrunk_segments=shrunk_segments(result.segments),
        ages=result.ages,
        uniform_slice=result.uniform_slice,
        epochs=facts.record.epochs,
        invalid=spans,
        caveats=tuple(_caveats(facts, decided, result, metrics, spans)),
        audit=tuple(_audit(facts, now)),
        guarantee=result.guarantee,
        statistics_hash=result.statistics_hash,
        offsets=result.offsets,
        code_version=result.code_version,
    )


def _standing(facts: Facts) -> Standing:
    return standing(facts.record.spec, [said(record) for record in facts.records])


def _concludes(record: SignalRecord) -> bool:
    if isinstance(record, OrderSignal):
        return record.data.action in _BY_HAND
    return record.data.decision.action in (Action.STOP, Action.SHIP)


def _result(facts: Facts, conclusion: SignalRecord) -> Result:
    """The evidence by the decision; of an order, the newest one of before it, else the first of after it."""
    if isinstance(conclusion, Signal):
        return conclusion.data.result
    if not facts.results:
        raise ValueError("no result is known")
    before = [one for one in facts.results if _rfc3339(one.evaluated_ms) <= conclusion.time]
    return before[-1] if before else facts.results[0]


def _rfc3339(time_ms: int) -> str:
    """As orders write their time, so that the two compare as text to the second."""
    return dt.datetime.fromtimestamp(time_ms / 1000, dt.UTC).isoformat()


# --- who decided what ---------------------------------------------------------------------------------------


def _decided(facts: Facts, conclusion: SignalRecord, now: Standing) -> Decided:
    decision, by, proposed = _what(facts, conclusion)
    answers = [
        record.data
        for record in facts.records
        if isinstance(record, OrderSignal) and record.data.signal_id == conclusion.id
    ]
    approved = next((one.actor for one in answers if one.action is OperatorAction.APPROVE), None)
    return Decided(
        action=decision.action,
        reason=decision.reason,
        by=by,
        signal_id=conclusion.id,
        source=conclusion.source,
        time=conclusion.time,
        force=_force(now, conclusion.id, answers),
        arm=decision.arm,
        metric=decision.metric,
        proposed=proposed,
        approved_by=approved if proposed else None,
    )


def _what(facts: Facts, conclusion: SignalRecord) -> tuple[Decision, str, bool]:
    """The decision, who made it, and whether it was only proposed."""
    if isinstance(conclusion, Signal):
        return conclusion.data.decision, SERVICE, conclusion.data.proposed
    order = conclusion.data
    stopped = order.action is OperatorAction.STOP
    arm = facts.record.spec.control.key if stopped else order.arm
    action = Action.STOP if stopped else Action.SHIP
    return Decision(action=action, reason=order.reason, arm=arm), order.actor, False


def _force(now: Standing, identity: str, answers: Sequence[Order]) -> Force:
    if now.latched is not None and now.latched.signal_id == identity:
        return Force.IN_FORCE
    if now.proposed is not None and now.proposed.signal_id == identity:
        return Force.WAITS
    rejected = any(one.action is OperatorAction.REJECT for one in answers)
    return Force.REJECTED if rejected else Force.TAKEN_BACK


def _audit(facts: Facts, now: Standing) -> list[Line]:
    rules = {(one.source, one.id): one.rule for one in now.ignored}
    found: dict[tuple[str, str], Line] = {}
    for record in facts.records:
        identity = (record.source, record.id)
        found.setdefault(identity, _line(record, rules.get(identity)))
    return list(found.values())


def _line(record: SignalRecord, nothing: str | None) -> Line:
    if isinstance(record, OrderSignal):
        order = record.data
        by, what, reason = order.actor, order.action.replace("_", "-"), order.reason
        parts = (order.arm, None if order.stage is None else f"stage {order.stage}", order.signal_id)
    else:
        decision = record.data.decision
        by, reason = SERVICE, decision.reason
        what = f"proposed {decision.action}" if record.data.proposed else str(decision.action)
        stage = None if decision.stage is None else f"stage {decision.stage}"
        parts = (decision.arm, decision.metric, stage)
    about = ", ".join(part for part in parts if part)
    return Line(time=record.time, by=by, what=what, about=about, reason=reason, id=record.id, nothing=nothing)


# --- what was seen ------------------------------------------------------------------------------------------


def _seen(result: Result, known_looks: int) -> Seen:
    marks = [one.watermark_ms for one in result.offsets.values()]
    known = [mark for mark in marks if mark is not None]
    return Seen(
        look=result.look,
        known_looks=known_looks,
        runtime_ms=result.runtime_ms,
        watermark_ms=min(known) if known and len(known) == len(marks) else None,
        arms=result.arms,
        crossover_units=result.crossover_units,
        sample_ratio=result.sample_ratio,
        exposure_outcomes=result.exposure_outcomes,
        reward_outcomes=result.reward_outcomes,
        invalid=result.invalid,
        looks=result.looks,
        evaluated_ms=result.evaluated_ms,
    )


def _metric(facts: Facts, result: MetricResult, known: Iterable[Result]) -> MetricMemo:
    history = tuple(_points(result, known))
    shared = {
        name: getattr(result, name)
        for name in MetricMemo.__struct_fields__
        if name in MetricResult.__struct_fields__
    }
    return MetricMemo(
        **shared,
        shrunk=shrunk(facts.record, result, facts.past),
        history=history,
        since_units=history[0].units if history else None,
    )


def _points(result: MetricResult, known: Iterable[Result]) -> Iterable[Point]:
    for one in known:
        for metric in one.metrics:
            effect = metric.effect
            mine = (metric.metric, metric.arm) == (result.metric, result.arm)
            if mine and effect is not None and effect.estimate is not None:
                yield Point(
                    look=one.look,
                    evaluated_ms=one.evaluated_ms,
                    units=metric.control_units + metric.arm_units,
                    estimate=effect.estimate,
                    lower=effect.lower,
                    upper=effect.upper,
                )


def _spans(known: Sequence[Result]) -> Iterable[Span]:
    """Each reason over the looks that follow each other with it; numbers in a reason make it another one."""
    open_spans: dict[str, Span] = {}
    for result in known:
        for reason in [reason for reason in open_spans if reason not in result.invalid]:
            yield open_spans.pop(reason)
        for reason in result.invalid:
            began = open_spans.get(reason)
            open_spans[reason] = Span(
                reason=reason,
                first_look=result.look if began is None else began.first_look,
                last_look=result.look,
                from_ms=result.evaluated_ms if began is None else began.from_ms,
                until_ms=result.evaluated_ms,
            )
    yield from open_spans.values()


# --- caveats ------------------------------------------------------------------------------------------------


def _caveats(
    facts: Facts, decided: Decided, result: Result, metrics: Sequence[MetricMemo], spans: Sequence[Span]
) -> Iterable[str]:
    if decided.by != SERVICE:
        yield f"A person ({decided.by}) decided this, not the evidence: no error level covers it."
        yield f"The evidence shown is that of look {result.look}, the known one nearest before the order, if any is."
    yield from _of_rule(facts, result)
    for metric in metrics:
        yield from _of_metric(metric)
    if spans:
        yield "At some looks nothing could ship: see the list of invalid looks."
    if result.crossover_units:
        yield f"{result.crossover_units:,} units were seen in more than one arm and are left out."
    if result.look > len(facts.results):
        yield (
            f"Of {result.look:,} looks {sum(one.look <= result.look for one in facts.results):,} are still known: "
            "the topic of results is compacted."
        )
    if any(metric.shrunk.effect is None for metric in metrics):
        yield "Raw estimates of a stopped experiment exaggerate on average; not all of them could be shrunk."
    for note in dict.fromkeys(one.shrunk.note for one in metrics if one.shrunk.prior is PriorSource.DEFAULT):
        yield f"Effects are shrunk by a default prior: {note}."
    for one in result.ages:
        if one.kind is not None:
            yield f"{one.metric} in {one.arm}: the effect changes with age ({one.kind}); the late one is what lasts."


def _of_rule(facts: Facts, result: Result) -> Iterable[str]:
    conclusion = facts.record.spec.conclusion
    if conclusion is not None and conclusion.rule is ShipRule.EXPECTED_LOSS:
        yield "The rule that ships (expected_loss) has no error level: see the guarantee."
    if facts.record.spec.allocation is not None and len(facts.record.epochs) > 1:
        yield "Weights followed the evidence; arms are compared inside weight epochs only."
    if result.guarantee is None and conclusion is not None:
        yield "The result does not say what its rule guarantees; it is of an older release."


def _of_metric(metric: MetricMemo) -> Iterable[str]:
    where = f"{metric.metric} in {metric.arm}"
    if metric.note is not None:
        yield f"{where}: {metric.note}."
    if metric.method in _ASYMPTOTIC and metric.effect is not None:
        since = (
            "" if metric.since_units is None else f"; the first known look has {metric.since_units:,} units"
        )
        yield (
            f"{where} ({metric.method}): the level holds in the limit of many units, there were "
            f"{metric.control_units + metric.arm_units:,}{since}."
        )


def with_plots(found: Memo, plots: dict[tuple[str, str], str], weights_plot: str | None) -> Memo:
    """The memo with the names of the files that its plots are in."""
    metrics = tuple(
        msgspec.structs.replace(metric, plot=plots.get((metric.metric, metric.arm)))
        for metric in found.metrics
    )
    return msgspec.structs.replace(found, metrics=metrics, weights_plot=weights_plot)
