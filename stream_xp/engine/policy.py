"""From evidence to a decision: stop, hold or ship, latched."""

from __future__ import annotations

from collections.abc import Sequence

from stream_xp.domain.decision import (
    Action,
    Decision,
    LookTaken,
    MetricResult,
    MetricState,
    SampleRatio,
)
from stream_xp.domain.experiment import ExperimentSpec, Role
from stream_xp.domain.fields import duration_ms
from stream_xp.engine.conclusion import (
    all_safe,
    beyond,
    claims,
    futility,
    invalid,
    obstacles,
    said_of,
    ship,
    strongest,
)
from stream_xp.engine.evaluate import Evaluation


def decide(
    spec: ExperimentSpec,
    evaluation: Evaluation,
    *,
    runtime_ms: int,
    latched: Decision | None = None,
    looks: Sequence[LookTaken] = (),
    ramp_over: bool = True,
) -> Decision:
    """The decision in force after this look, of the evidence alone; `steering.steer` adds ramp, weights and people.

    Stop outranks hold, hold outranks ship. A latched decision stays whatever the evidence says.

    - Stop, at any time and however invalid the data are otherwise: a guardrail is proven harmed, or the sample
      ratio is proven wrong. The strongest harm is named.
    - Ship: a primary metric is better in an arm by the rule of the spec, every guardrail is proven non-inferior in
      that arm, no primary is proven worse in it, the data are valid, and the minimum runtime is over. Of several
      such arms the one with the strongest evidence, which need not be the largest effect if the arms' shares differ.
    - Stop for futility, if the spec asks for it: no primary of any arm can be as good as its minimum effect.
    - Hold: all else. Without a primary metric nothing ships but the one treatment of a ramp at its end.

    The sample ratio must have been tested before anything ships. That it is not proven wrong is all a test can
    say, and is enough: mismatch and effect are then judged on the same units, each at its own error level.

    The maximum runtime ends the wait, not the validity: what is proven later may still ship.

    Args:
        spec: the plan.
        evaluation: the evidence at this look.
        runtime_ms: watermark minus first exposure, in the time of the data.
        latched: an earlier stop or ship.
        looks: of a group sequential rule, those taken, this one included.
        ramp_over: whether the last stage of the ramp has had its minimums; True without a ramp.
    """
    if latched is not None and latched.action is not Action.HOLD:
        return latched
    return (
        stop(evaluation)
        or ship(spec, evaluation, runtime_ms=runtime_ms, looks=looks, ramp_over=ramp_over)
        or futility(spec, evaluation, runtime_ms=runtime_ms)
        or hold(spec, evaluation, runtime_ms, looks=looks)
    )


def stop(evaluation: Evaluation) -> Decision | None:
    """The stop that protects, if one is due: for proven harm, or a sample ratio that is proven wrong."""
    ratio = evaluation.sample_ratio
    mismatch = [_mismatch(ratio)] if ratio is not None and ratio.mismatch else []
    harms = [(r, r.harm) for r in evaluation.metrics if r.state is MetricState.HARMED and r.harm is not None]
    if harms:
        # The harm furthest beyond its threshold; among equals by name, so that no order of a file decides.
        worst, harm = max(harms, key=lambda p: (p[1].log_e - p[1].threshold_log_e, p[0].arm, p[0].metric))
        reason = "; ".join([f"{worst.arm} harms {worst.metric}: {beyond(harm)}", *mismatch])
        return Decision(action=Action.STOP, reason=reason, arm=worst.arm, metric=worst.metric)
    return Decision(action=Action.STOP, reason=mismatch[0]) if mismatch else None


def _mismatch(ratio: SampleRatio) -> str:
    if ratio.log_e >= ratio.threshold_log_e:
        return f"sample-ratio mismatch: log_e {ratio.log_e:.2f} >= {ratio.threshold_log_e:.2f}"
    return "sample-ratio mismatch: units in an arm of weight 0"


def hold(
    spec: ExperimentSpec, evaluation: Evaluation, runtime_ms: int, *, looks: Sequence[LookTaken] = ()
) -> Decision:
    """A hold, and why nothing ships."""
    return Decision(action=Action.HOLD, reason=_hold_reason(spec, evaluation, runtime_ms, looks))


def _hold_reason(
    spec: ExperimentSpec, evaluation: Evaluation, runtime_ms: int, looks: Sequence[LookTaken]
) -> str:
    wrong, gains = invalid(evaluation), claims(spec, evaluation, looks)
    if wrong:
        return "invalid: " + "; ".join(wrong)
    if gains and runtime_ms < duration_ms(spec.minimum_runtime):
        return f"the minimum runtime of {spec.minimum_runtime} is not over"
    concluded = _conclusion(spec, evaluation)
    if concluded is not None:
        return concluded
    over = spec.maximum_runtime is not None and runtime_ms >= duration_ms(spec.maximum_runtime)
    reason = "inconclusive at the maximum runtime" if over else "inconclusive"
    if gains:
        best = strongest(gains).result
        against = obstacles(evaluation, best.arm, looks)
        if against:
            return f"{reason}: {best.arm} is better in {best.metric}, but {against[0]}"
        return f"{best.arm} is better in {best.metric}"
    return reason


def _conclusion(spec: ExperimentSpec, evaluation: Evaluation) -> str | None:
    """What is proven although nothing ships: all guardrails where there is no primary, or losses in every arm."""
    if not spec.with_role(Role.PRIMARY):
        if not all_safe(evaluation):
            return None
        by_ramp = spec.ramp is not None and len(spec.treatments) == 1
        return "every guardrail is proven non-inferior" + (
            "" if by_ramp else "; without a primary nothing ships"
        )
    losses = [result for result in evaluation.metrics if _is_loss(result)]
    everywhere = {result.arm for result in losses} == {arm.key for arm in spec.treatments}
    return "; ".join(said_of(loss)[1] for loss in losses) if everywhere else None


def _is_loss(result: MetricResult) -> bool:
    return result.role == Role.PRIMARY and result.state is MetricState.WORSE
