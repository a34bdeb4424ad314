"""From what stands on the topics to the verdict that every gate shows (docs/gates.md has the table).

Nothing is remembered here: whoever has read the same records comes to the same verdict, so replicas agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from stream_xp.domain.decision import Action, ConfigRecord, MetricResult, Result, RolloutStatus
from stream_xp.domain.experiment import ExperimentRecord, Role, Status
from stream_xp.domain.fields import duration_ms
from stream_xp.domain.gate import Cause, GateMetric, GateVerdict, Verdict
from stream_xp.engine.conclusion import Says, said_of
from stream_xp.engine.standing import NOTHING_SAID, Standing


class Limits(NamedTuple):
    """How old what is known may be.

    Attributes:
        data_ms: wall clock minus watermark, beyond which data are stale.
        silence_ms: time since the topics were last read to their end, beyond which nobody knows what came after.
    """

    data_ms: int = 60_000
    silence_ms: int = 15_000


class Moment(NamedTuple):
    """When somebody asks, wall clock in epoch milliseconds.

    Attributes:
        started_ms: when the process began to read.
        read_ms: when the topics were last known to be read to their end; None before the first time.
    """

    now_ms: int
    started_ms: int
    read_ms: int | None


class Known(NamedTuple):
    """What the topics say of one experiment.

    Attributes:
        standing: of the record's version.
        result: the newest one; of whatever version.
        valid_ms: evaluation time of the newest result of the version whose data were valid; None without one.
    """

    record: ExperimentRecord | None = None
    standing: Standing = NOTHING_SAID
    config: ConfigRecord | None = None
    result: Result | None = None
    valid_ms: int | None = None


class _Asked(NamedTuple):
    """One question, with the record of an experiment that is known."""

    record: ExperimentRecord
    arms: tuple[str, ...]
    known: Known
    result: Result | None
    data_age_ms: int
    moment: Moment
    limits: Limits


class _Found(NamedTuple):
    verdict: Verdict
    cause: Cause
    reason: str
    decision_id: str = ""


def gate_verdict(
    experiment: str, arm: str | None, known: Known, *, moment: Moment, limits: Limits
) -> GateVerdict:
    """The verdict on an arm of an experiment, or on all its treatments.

    The first line that applies:

    1. invalid, before the topics were read to their end once, for an unknown experiment, and for no treatment arm;
    2. stop, while a stop is in force, another arm has shipped, or a policy has closed the arm: however old the data;
    3. invalid, where the topics were not read lately: a stop may have come;
    4. pass, once the arm has shipped;
    5. invalid: archived, without data, with stale or invalid data;
    6. continue, while a person holds it, has been asked, or their reset is on its way;
    7. pass, if every guardrail is proven non-inferior in the arm, no primary is proven worse, and the minimum runtime
       is over; else continue.

    Args:
        experiment: its key, as asked for.
        arm: a treatment arm; None for all of them.
        known: what the topics say of it.
        moment: when it is asked.
        limits: how old that may be.
    """
    record, waiting_ms = known.record, moment.now_ms - moment.started_ms
    if moment.read_ms is None or record is None:
        found = _Found(Verdict.INVALID, Cause.STARTING, "the topics are not read to their end yet")
        if moment.read_ms is not None:
            found = _Found(Verdict.INVALID, Cause.UNKNOWN_EXPERIMENT, "there is no such experiment")
        return _told(experiment, 0, (), found, age_ms=waiting_ms, invalid_ms=waiting_ms)
    treatments = tuple(one.key for one in record.spec.treatments)
    asked = _asked(record, treatments if arm is None else (arm,), known, moment, limits)
    if arm is not None and arm not in treatments:
        listed = ", ".join(treatments)
        found = _Found(
            Verdict.INVALID, Cause.UNKNOWN_ARM, f"no treatment arm of that name; there is {listed}"
        )
    else:
        found = next(one for rule in _RULES if (one := rule(asked)) is not None)
    return _of_asked(asked, found)


def _asked(
    record: ExperimentRecord, arms: tuple[str, ...], known: Known, moment: Moment, limits: Limits
) -> _Asked:
    result = known.result
    if result is not None and result.version != record.spec.version:
        result = None
    watermarks = [] if result is None else [one.watermark_ms for one in result.offsets.values()]
    begun = [mark for mark in watermarks if mark is not None]
    # The evidence is only as complete as its slowest partition; before any, data could have come since the begin.
    since_ms = min(begun) if begun else record.epochs[0].effective_ms
    # A broker's clock may be ahead of this one.
    age_ms = max(0, moment.now_ms - since_ms)
    return _Asked(record, arms, known, result, age_ms, moment, limits)


# --- the rules, in their order ---------------------------------------------------------------------------------


def _stopped(asked: _Asked) -> _Found | None:
    latched = _latched(asked)
    if latched is None or latched.action is not Action.STOP:
        return None
    return _Found(Verdict.STOP, Cause.STOPPED, latched.reason, latched.decision_id)


def _another_shipped(asked: _Asked) -> _Found | None:
    latched = _latched(asked)
    if latched is None or latched.arm in asked.arms:
        return None
    reason = f"{latched.arm} has shipped: {latched.reason}"
    return _Found(Verdict.STOP, Cause.ANOTHER_ARM, reason, latched.decision_id)


def _closed(asked: _Asked) -> _Found | None:
    """An arm that had units and gets none any more: a policy has closed it, or somebody did by hand."""
    epochs = asked.record.epochs
    if epochs[-1].final:
        return None
    for arm in asked.arms:
        had = any(epoch.weights.get(arm, 0.0) > 0.0 for epoch in epochs)
        tables = (epochs[-1].weights, *epochs[-1].contexts.values())
        if not had or any(table.get(arm, 0.0) > 0.0 for table in tables):
            return None
    listed = ", ".join(asked.arms)
    return _Found(Verdict.STOP, Cause.CLOSED, f"no more units for {listed}", epochs[-1].signal_id or "")


def _disconnected(asked: _Asked) -> _Found | None:
    read_ms = asked.moment.read_ms
    silence_ms = 0 if read_ms is None else asked.moment.now_ms - read_ms
    if silence_ms <= asked.limits.silence_ms:
        return None
    reason = f"the topics were not read to their end for {silence_ms / 1000:.0f} s"
    return _Found(Verdict.INVALID, Cause.DISCONNECTED, reason)


def _shipped(asked: _Asked) -> _Found | None:
    latched = _latched(asked)
    if latched is None:
        return None
    return _Found(Verdict.PASS, Cause.SHIPPED, latched.reason, latched.decision_id)


def _archived(asked: _Asked) -> _Found | None:
    if asked.record.status is not Status.ARCHIVED:
        return None
    return _Found(Verdict.INVALID, Cause.ARCHIVED, "it is archived, and takes no more data")


def _no_data(asked: _Asked) -> _Found | None:
    if asked.result is not None and any(arm.units for arm in asked.result.arms):
        return None
    reason = f"no unit of version {asked.record.spec.version} has been exposed yet"
    return _Found(Verdict.INVALID, Cause.NO_DATA, reason)


def _stale(asked: _Asked) -> _Found | None:
    if asked.data_age_ms <= asked.limits.data_ms:
        return None
    limit_s, age_s = asked.limits.data_ms / 1000, asked.data_age_ms / 1000
    reason = f"the data are {age_s:.0f} s old, more than {limit_s:.0f} s"
    return _Found(Verdict.INVALID, Cause.STALE_DATA, reason)


def _invalid(asked: _Asked) -> _Found | None:
    reasons = () if asked.result is None else invalid_reasons(asked.result)
    return _Found(Verdict.INVALID, Cause.INVALID_DATA, "; ".join(reasons)) if reasons else None


def invalid_reasons(result: Result) -> tuple[str, ...]:
    """Why the data of a result are not valid; empty when they are."""
    if result.sample_ratio is None and not result.invalid:
        return ("the sample ratio is not tested",)
    mismatch = result.sample_ratio is not None and result.sample_ratio.mismatch
    return (*result.invalid, *(("sample-ratio mismatch",) if mismatch and not result.invalid else ()))


def _held(asked: _Asked) -> _Found | None:
    now = asked.known.standing
    if _config_concluded(asked) is not None:
        return _Found(Verdict.CONTINUE, Cause.HELD, "a reset is on its way to applications", now.since or "")
    if now.proposed is not None:
        decision, signal_id = now.proposed
        reason = f"waits for approval: {decision.action}, {decision.reason}"
        return _Found(Verdict.CONTINUE, Cause.HELD, reason, signal_id)
    if now.paused is not None:
        return _Found(Verdict.CONTINUE, Cause.HELD, f"paused by {now.paused.actor}: {now.paused.reason}")
    return None


def _judged(asked: _Asked) -> _Found:
    """Whether the evidence lets the arms go on."""
    spec, result = asked.record.spec, asked.result
    if not spec.guardrails:
        return _Found(Verdict.CONTINUE, Cause.INCONCLUSIVE, "without a guardrail only a ship lets it pass")
    against = _against(asked)
    if against:
        return _Found(Verdict.CONTINUE, Cause.INCONCLUSIVE, "; ".join(against))
    if result is not None and result.runtime_ms < duration_ms(spec.minimum_runtime):
        reason = f"the minimum runtime of {spec.minimum_runtime} is not over"
        return _Found(Verdict.CONTINUE, Cause.INCONCLUSIVE, reason)
    return _Found(Verdict.PASS, Cause.SAFE, "every guardrail is proven non-inferior")


def _against(asked: _Asked) -> list[str]:
    """What holds an arm back, in the words of the decision table; a guardrail without a line holds it too."""
    metrics = {} if asked.result is None else {(one.metric, one.arm): one for one in asked.result.metrics}
    looks = () if asked.result is None else asked.result.looks
    against = []
    for arm in asked.arms:
        for metric in asked.record.spec.metrics:
            found = metrics.get((metric.key, arm))
            if found is None and metric.role is Role.GUARDRAIL:
                against.append(f"{metric.key} says nothing of {arm}")
            elif found is not None and said_of(found, looks)[0] is Says.NO:
                against.append(said_of(found, looks)[1])
    return against


_RULES: Sequence[Callable[[_Asked], _Found | None]] = (
    _stopped,
    _another_shipped,
    _closed,
    _disconnected,
    _shipped,
    _archived,
    _no_data,
    _stale,
    _invalid,
    _held,
    _judged,
)


class _Latched(NamedTuple):
    action: Action
    arm: str | None
    reason: str
    decision_id: str


def _latched(asked: _Asked) -> _Latched | None:
    """The stop or ship in force: of the signals, else of what applications follow, if no reset took it back."""
    held = asked.known.standing.latched
    if held is not None:
        decision = held.decision
        return _Latched(decision.action, decision.arm, decision.reason, held.signal_id)
    config = _config_concluded(asked)
    if config is None or asked.known.standing.since is not None:
        return None
    winner = next((arm for arm, weight in config.weights.items() if weight == 1.0), None)
    action = Action.STOP if config.status is RolloutStatus.STOPPED else Action.SHIP
    return _Latched(
        action, winner, f"applications follow a config that is {config.status}", config.signal_id or ""
    )


def _config_concluded(asked: _Asked) -> ConfigRecord | None:
    """The config of this version, if it says that the experiment is over."""
    config = asked.known.config
    if config is None or config.version != asked.record.spec.version:
        return None
    return None if config.status is RolloutStatus.RUNNING else config


# --- what is told ------------------------------------------------------------------------------------------------


def _of_asked(asked: _Asked, found: _Found) -> GateVerdict:
    record, now_ms = asked.record, asked.moment.now_ms
    valid_ms = asked.known.valid_ms or record.epochs[0].effective_ms
    invalid_ms = max(0, now_ms - valid_ms) if found.verdict is Verdict.INVALID else 0
    return _told(
        record.spec.experiment,
        record.spec.version,
        asked.arms,
        found,
        age_ms=asked.data_age_ms,
        invalid_ms=invalid_ms,
        asked=asked,
    )


def _told(
    experiment: str,
    version: int,
    arms: tuple[str, ...],
    found: _Found,
    *,
    age_ms: int,
    invalid_ms: int,
    asked: _Asked | None = None,
) -> GateVerdict:
    result = None if asked is None else asked.result
    units = {} if result is None else {one.arm: one.units for one in result.arms}
    return GateVerdict(
        experiment=experiment,
        version=version,
        arms=arms,
        verdict=found.verdict,
        cause=found.cause,
        reason=found.reason,
        decision_id=found.decision_id,
        data_age_ms=age_ms,
        invalid_ms=invalid_ms,
        control_units=0 if asked is None else units.get(asked.record.spec.control.key, 0),
        arm_units=min((units.get(arm, 0) for arm in arms), default=0),
        look=0 if result is None else result.look,
        metrics=() if asked is None or result is None else _metrics(asked, result),
    )


def _metrics(asked: _Asked, result: Result) -> tuple[GateMetric, ...]:
    return tuple(_metric(asked, one) for one in result.metrics if one.arm in asked.arms)


def _metric(asked: _Asked, one: MetricResult) -> GateMetric:
    margins = [metric.margin for metric in asked.record.spec.metrics if metric.key == one.metric]
    margin = margins[0] if margins else None
    test = one.harm if one.role == Role.GUARDRAIL else one.effect
    return GateMetric(
        name=one.metric,
        role=Role(one.role),
        arm=one.arm,
        state=one.state,
        control_units=one.control_units,
        arm_units=one.arm_units,
        estimate=_there(None if one.effect is None else one.effect.estimate),
        lower=_there(None if one.effect is None else one.effect.lower),
        upper=_there(None if one.effect is None else one.effect.upper),
        log_e=_there(None if test is None else test.log_e),
        threshold_log_e=_there(None if test is None else test.threshold_log_e),
        margin=_there(None if margin is None else margin.absolute),
        relative_margin=_there(None if margin is None else margin.relative),
    )


def _there(number: float | None) -> float | msgspec.UnsetType:
    """A number, or nothing: neither null nor what JSON has no word for."""
    return msgspec.UNSET if number is None or not math.isfinite(number) else number
