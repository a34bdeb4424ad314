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
    SampleRatio,
)
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Role
from stream_xp.domain.fields import duration_ms
from stream_xp.engine.evaluate import Evaluation


def decide(
    spec: ExperimentSpec, evaluation: Evaluation, *, runtime_ms: int, latched: Decision | None = None
) -> Decision:
    """The decision in force after this look.

    Stop outranks hold, hold outranks ship. A latched decision stays whatever the evidence says.

    - Stop, at any time and however invalid the data are otherwise: a guardrail is proven harmed, or the sample
      ratio is proven wrong. The strongest harm is named.
    - Ship: a primary metric is proven better in an arm, every guardrail is proven non-inferior in that arm, no
      primary is proven worse in it, the data are valid, and the minimum runtime is over. Of several such arms
      the one with the strongest evidence, which need not be the largest effect if the arms' shares differ.
    - Hold: all else. Without a primary metric (a canary) nothing ever ships.

    The sample ratio must have been tested before anything ships. That it is not proven wrong is all a test can
    say, and is enough: mismatch and effect are then judged on the same units, each at its own error level.

    The maximum runtime ends the wait, not the validity: what is proven later may still ship.

    Args:
        spec: the plan.
        evaluation: the evidence at this look.
        runtime_ms: watermark minus first exposure, in the time of the data.
        latched: an earlier stop or ship.
    """
    if latched is not None and latched.action is not Action.HOLD:
        return latched
    return _stop(evaluation) or _ship(spec, evaluation, runtime_ms) or _hold(spec, evaluation, runtime_ms)


Proof = tuple[MetricResult, Evidence]


def _strongest(proofs: list[Proof]) -> Proof:
    """The proof furthest beyond its threshold; among equals by name, so that no order of a file decides."""
    return max(proofs, key=lambda p: (p[1].log_e - p[1].threshold_log_e, p[0].arm, p[0].metric))


def _beyond(evidence: Evidence) -> str:
    return f"log_e {evidence.log_e:.2f} >= {evidence.threshold_log_e:.2f}"


def _stop(evaluation: Evaluation) -> Decision | None:
    ratio = evaluation.sample_ratio
    mismatch = [_mismatch(ratio)] if ratio is not None and ratio.mismatch else []
    harms = [(r, r.harm) for r in evaluation.metrics if r.state is MetricState.HARMED and r.harm is not None]
    if harms:
        worst, harm = _strongest(harms)
        reason = "; ".join([f"{worst.arm} harms {worst.metric}: {_beyond(harm)}", *mismatch])
        return Decision(action=Action.STOP, reason=reason, arm=worst.arm, metric=worst.metric)
    return Decision(action=Action.STOP, reason=mismatch[0]) if mismatch else None


def _mismatch(ratio: SampleRatio) -> str:
    if ratio.log_e >= ratio.threshold_log_e:
        return f"sample-ratio mismatch: log_e {ratio.log_e:.2f} >= {ratio.threshold_log_e:.2f}"
    return "sample-ratio mismatch: units in an arm of weight 0"


def _ship(spec: ExperimentSpec, evaluation: Evaluation, runtime_ms: int) -> Decision | None:
    if _invalid(evaluation) or runtime_ms < duration_ms(spec.minimum_runtime):
        return None
    winners = [proof for proof in _gains(evaluation) if not _obstacles(evaluation, proof[0].arm)]
    if not winners:
        return None
    best, gain = _strongest(winners)
    reason = f"{best.arm} is better in {best.metric}: {_beyond(gain)}"
    return Decision(action=Action.SHIP, reason=reason, arm=best.arm, metric=best.metric)


def _invalid(evaluation: Evaluation) -> tuple[str, ...]:
    if evaluation.sample_ratio is None and not evaluation.invalid:
        return ("the sample ratio is not tested",)
    return evaluation.invalid


def _gains(evaluation: Evaluation) -> list[Proof]:
    """Primary metrics that are proven better."""
    return [
        (result, result.effect)
        for result in evaluation.metrics
        if result.role == Role.PRIMARY and result.state is MetricState.BETTER and result.effect is not None
    ]


def _obstacles(evaluation: Evaluation, arm: str) -> list[str]:
    """Why an arm that is better in one metric may not ship."""
    mine = [result for result in evaluation.metrics if result.arm == arm]
    losses = [_loss(r) for r in mine if _is_loss(r)]
    return losses + [
        f"{r.metric} is not yet proven non-inferior in {arm}"
        for r in mine
        if r.role == Role.GUARDRAIL and r.state is not MetricState.SAFE
    ]


def _is_loss(result: MetricResult) -> bool:
    return result.role == Role.PRIMARY and result.state is MetricState.WORSE


def _loss(result: MetricResult) -> str:
    return f"{result.arm} is worse in {result.metric}"


def _hold(spec: ExperimentSpec, evaluation: Evaluation, runtime_ms: int) -> Decision:
    return Decision(action=Action.HOLD, reason=_hold_reason(spec, evaluation, runtime_ms))


def _hold_reason(spec: ExperimentSpec, evaluation: Evaluation, runtime_ms: int) -> str:
    invalid, gains = _invalid(evaluation), _gains(evaluation)
    if invalid:
        return "invalid: " + "; ".join(invalid)
    if gains and runtime_ms < duration_ms(spec.minimum_runtime):
        return f"the minimum runtime of {spec.minimum_runtime} is not over"
    concluded = _conclusion(spec, evaluation)
    if concluded is not None:
        return concluded
    over = spec.maximum_runtime is not None and runtime_ms >= duration_ms(spec.maximum_runtime)
    reason = "inconclusive at the maximum runtime" if over else "inconclusive"
    if gains:
        best, _ = _strongest(gains)
        return f"{reason}: {best.arm} is better in {best.metric}, but {_obstacles(evaluation, best.arm)[0]}"
    return reason


def _conclusion(spec: ExperimentSpec, evaluation: Evaluation) -> str | None:
    """What is proven although nothing ships: all guardrails where there is no primary, or losses in every arm."""
    if not spec.with_role(Role.PRIMARY):
        guards = [result for result in evaluation.metrics if result.role == Role.GUARDRAIL]
        safe = all(result.state is MetricState.SAFE for result in guards)
        return "every guardrail is proven non-inferior; without a primary nothing ships" if safe else None
    losses = [result for result in evaluation.metrics if _is_loss(result)]
    everywhere = {result.arm for result in losses} == {arm.key for arm in spec.treatments}
    return "; ".join(map(_loss, losses)) if everywhere else None


def config_after(
    record: ExperimentRecord, decision: Decision, *, config_version: int, effective_ms: int, signal_id: str
) -> ConfigRecord:
    """What applications follow after a stop (all traffic to the control) or a ship (all to the winner).

    Raises:
        ValueError: a hold changes nothing, or the winner is no arm: there is no distribution to follow.
    """
    spec = record.spec
    stopped = decision.action is Action.STOP
    target = spec.control.key if stopped else decision.arm
    if decision.action is Action.HOLD or target not in spec.weights:
        raise ValueError(f"no config follows from {decision.action} of {decision.arm!r}")
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
