"""From evidence to a decision: stop, hold or ship, latched."""

from __future__ import annotations

from stream_xp.domain.decision import (
    Action,
    ConfigRecord,
    Decision,
    Evidence,
    MetricResult,
    MetricState,
    RolloutStatus,
)
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Role, duration_ms
from stream_xp.engine.evaluate import Evaluation


def decide(
    spec: ExperimentSpec, evaluation: Evaluation, *, runtime_ms: int, latched: Decision | None = None
) -> Decision:
    """The decision in force after this look.

    Stop outranks hold, hold outranks ship. A latched decision stays whatever the evidence says. A sample-ratio
    mismatch or a proven harm stops at any time; shipping needs a primary metric proven better in an arm, every
    guardrail proven non-inferior in that arm, no primary proven worse in it, valid data, and the minimum runtime.

    Args:
        spec: the plan.
        evaluation: the evidence at this look.
        runtime_ms: watermark minus first exposure, in the time of the data.
        latched: an earlier stop or ship.
    """
    if latched is not None and latched.action is not Action.HOLD:
        return latched
    return _stop(evaluation) or _ship(spec, evaluation, runtime_ms) or _hold(spec, evaluation, runtime_ms)


def _stop(evaluation: Evaluation) -> Decision | None:
    for result in evaluation.metrics:
        if result.state is MetricState.HARMED and result.harm is not None:
            reason = f"{result.arm} harms {result.metric}: {_beyond(result.harm)}"
            return Decision(action=Action.STOP, reason=reason, arm=result.arm, metric=result.metric)
    ratio = evaluation.sample_ratio
    if ratio is not None and ratio.mismatch:
        reason = f"sample-ratio mismatch: log_e {ratio.log_e:.2f}, threshold {ratio.threshold_log_e:.2f}"
        return Decision(action=Action.STOP, reason=reason)
    return None


def _beyond(evidence: Evidence) -> str:
    return f"log_e {evidence.log_e:.2f} >= {evidence.threshold_log_e:.2f}"


def _ship(spec: ExperimentSpec, evaluation: Evaluation, runtime_ms: int) -> Decision | None:
    if evaluation.invalid or runtime_ms < duration_ms(spec.minimum_runtime):
        return None
    winners = [r for r in evaluation.metrics if _wins(r) and _may_ship(evaluation, r.arm)]
    if not winners:
        return None
    best = max(winners, key=lambda r: (_evidence_for(r), r.arm))
    assert best.effect is not None  # noqa: S101 (a metric that is better has an effect)
    reason = f"{best.arm} is better in {best.metric}: {_beyond(best.effect)}"
    return Decision(action=Action.SHIP, reason=reason, arm=best.arm, metric=best.metric)


def _wins(result: MetricResult) -> bool:
    return result.role == Role.PRIMARY and result.state is MetricState.BETTER


def _may_ship(evaluation: Evaluation, arm: str) -> bool:
    mine = [result for result in evaluation.metrics if result.arm == arm]
    guarded = all(result.state is MetricState.SAFE for result in mine if result.role == Role.GUARDRAIL)
    return guarded and not any(r.state is MetricState.WORSE for r in mine if r.role == Role.PRIMARY)


def _evidence_for(result: MetricResult) -> float:
    return result.effect.log_e if result.effect is not None else 0.0


def _hold(spec: ExperimentSpec, evaluation: Evaluation, runtime_ms: int) -> Decision:
    if evaluation.invalid:
        return Decision(action=Action.HOLD, reason="invalid: " + "; ".join(evaluation.invalid))
    if any(map(_wins, evaluation.metrics)) and runtime_ms < duration_ms(spec.minimum_runtime):
        return Decision(
            action=Action.HOLD, reason=f"the minimum runtime of {spec.minimum_runtime} is not over"
        )
    if spec.maximum_runtime is not None and runtime_ms >= duration_ms(spec.maximum_runtime):
        return Decision(action=Action.HOLD, reason="inconclusive at the maximum runtime")
    unsafe = [r for r in evaluation.metrics if r.role == Role.GUARDRAIL and r.state is not MetricState.SAFE]
    if any(map(_wins, evaluation.metrics)) and unsafe:
        return Decision(action=Action.HOLD, reason=f"{unsafe[0].metric} is not yet proven non-inferior")
    return Decision(action=Action.HOLD, reason="inconclusive")


def config_after(
    record: ExperimentRecord, decision: Decision, *, config_version: int, effective_ms: int, signal_id: str
) -> ConfigRecord:
    """What applications follow after a stop (all traffic to the control) or a ship (all to the winner)."""
    spec = record.spec
    stopped = decision.action is Action.STOP
    target = spec.control.key if stopped else decision.arm
    return ConfigRecord(
        experiment=spec.experiment,
        version=spec.version,
        status=RolloutStatus.STOPPED if stopped else RolloutStatus.SHIPPED,
        weights={arm.key: 1.0 if arm.key == target else 0.0 for arm in spec.arms},
        weight_epoch=record.epochs[-1].epoch + 1,
        effective_ms=effective_ms,
        config_version=config_version,
        signal_id=signal_id,
    )
