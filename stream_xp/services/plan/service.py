"""Plans an experiment: every test of every primary metric and guardrail, at the levels that the engine will use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from stream_xp.domain.decision import Method
from stream_xp.domain.experiment import (
    Direction,
    ExperimentRecord,
    ExperimentSpec,
    MetricKind,
    Role,
    WeightEpoch,
)
from stream_xp.domain.fields import duration_ms
from stream_xp.engine.design import NO_MARGIN, Plan, pair_sample, plans
from stream_xp.errors import ConfigError
from stream_xp.services.plan.baselines import Baseline, Known, complaint, lacking
from stream_xp.services.plan.outcomes import Outcome, bounded_below, outcome_of
from stream_xp.services.plan.quantiles import FIRST_EPOCH, quantile_detectable, quantile_numbers, quantile_of
from stream_xp.services.plan.questions import Pair, Question
from stream_xp.services.plan.report import Effect, ExperimentPlan, NotPlanned, PlannedTest, Samples
from stream_xp.services.plan.sequential import Numbers, Sequence, numbers, sequence_of, signal_found

FEW = 100
"""Fewer units of the rarer kind than this in the smaller arm by the planned sample make a plan rough."""

_DAY_MS = 86_400_000


class Size(NamedTuple):
    """A size of effect: metric units, or a share of the control's mean."""

    value: float
    relative: bool

    def absolute(self, base: float) -> float:
        """In metric units."""
        return self.value * abs(base) if self.relative else self.value


def parse_size(text: str) -> Size:
    """Return the size in ``0.02`` or ``5%``.

    Raises:
        ConfigError: it is none, or not above 0.
    """
    stripped = text.strip()
    relative = stripped.endswith("%")
    try:
        value = float(stripped.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(
            f"{text!r}: an effect is a number above 0, in metric units or with % of the control's mean"
        )
    return Size(value / 100 if relative else value, relative)


def parse_effects(texts: Iterable[str]) -> dict[str, Size]:
    """Return the effects of options ``METRIC=SIZE``, and of ``SIZE`` alone under "".

    Raises:
        ConfigError: a size is none, or is given twice.
    """
    effects: dict[str, Size] = {}
    for text in texts:
        key, separator, size = text.rpartition("=")
        if separator and not key:
            raise ConfigError(f"{text!r}: an effect is METRIC=SIZE, or SIZE for all")
        if key in effects:
            raise ConfigError(f"{text!r}: this effect is given twice")
        effects[key] = parse_size(size)
    return effects


class Aim(NamedTuple):
    """What a plan is made for.

    Attributes:
        power: aimed at.
        effects: true effect by metric, of a guardrail its true harm; "" for every other primary and secondary.
        units_per_day: of all arms, if known.
        allowed_lateness_ms: how long the watermark stays behind.
    """

    power: float = 0.8
    effects: Mapping[str, Size] = {}
    units_per_day: float | None = None
    allowed_lateness_ms: int = 0


def plan_experiment(spec: ExperimentSpec, known: Mapping[str, Known], aim: Aim = Aim()) -> ExperimentPlan:  # noqa: B008 (immutable)
    """Return the plan of every test, and the metrics and arms that have none with the reason.

    Args:
        spec: the experiment.
        known: baselines by metric key; every primary metric and guardrail needs one.
        aim: power, effects and traffic.

    Raises:
        ConfigError: a baseline is missing or says nothing, or an effect is impossible.
    """
    _check(spec, known, aim)
    pairs, idle = _pairs(spec)
    everyone = tuple(arm.key for arm in spec.treatments)
    tests: list[PlannedTest] = []
    left_out = (
        [NotPlanned(metric="every metric", role="", arms=idle, reason="weight 0, or that of the control is")]
        if idle
        else []
    )
    for plan in plans(_record(spec)):
        metric, there = plan.metric, known.get(plan.metric.key)
        if plan.fault is not None or there is None or lacking(metric, there):
            reason = plan.fault or "secondary, and without a baseline"
            left_out.append(NotPlanned(metric=metric.key, role=metric.role, arms=everyone, reason=reason))
            continue
        for pair in pairs:
            for found in _of_metric(spec, plan, there, pair, aim):
                if isinstance(found, PlannedTest):
                    tests.append(found)
                else:
                    left_out.append(found)
    return ExperimentPlan(
        experiment=spec.experiment,
        version=spec.version,
        design_hash=spec.design_hash(),
        planned_sample=spec.planned_sample,
        power=aim.power,
        units_per_day=aim.units_per_day,
        tests=tuple(tests),
        not_planned=tuple(left_out),
    )


def _check(spec: ExperimentSpec, known: Mapping[str, Known], aim: Aim) -> None:
    if not 0.05 < aim.power < 0.9999:
        raise ConfigError(f"power must lie between 0.05 and 0.9999, got {aim.power}")
    if aim.units_per_day is not None and not 0 < aim.units_per_day < math.inf:
        raise ConfigError(f"traffic must be above 0 units per day, got {aim.units_per_day}")
    keys = [metric.key for metric in spec.metrics]
    strange = [key for key in aim.effects if key and key not in keys]
    if strange:
        raise ConfigError(
            f"an effect is given for {', '.join(strange)}, the experiment has {', '.join(keys)}"
        )
    complaints = [
        complaint(metric, missing)
        for metric in spec.metrics
        if metric.role is not Role.SECONDARY and (missing := lacking(metric, known.get(metric.key)))
    ]
    if complaints:
        raise ConfigError("\n".join(complaints))


def _record(spec: ExperimentSpec) -> ExperimentRecord:
    """The record that applying the file would make."""
    first = WeightEpoch(epoch=0, weights=spec.weights, effective_ms=0)
    return ExperimentRecord(spec=spec, epochs=(first,), design_hash=spec.design_hash())


def _pairs(spec: ExperimentSpec) -> tuple[list[Pair], tuple[str, ...]]:
    """Pairs of treatment and control, arms of one weight together; and the arms that get no comparison."""
    control = spec.control.weight
    by_weight: dict[float, list[str]] = {}
    for arm in spec.treatments:
        by_weight.setdefault(arm.weight if control > 0 else 0.0, []).append(arm.key)
    idle = tuple(by_weight.pop(0.0, ()))
    pairs = [
        Pair(tuple(arms), share=weight / (control + weight), traffic_share=min(1.0, control + weight))
        for weight, arms in by_weight.items()
    ]
    return pairs, idle


# The questions of a metric -----------------------------------------------------------------------


def _of_metric(
    spec: ExperimentSpec, plan: Plan, known: Known, pair: Pair, aim: Aim
) -> Iterator[PlannedTest | NotPlanned]:
    for outcome, quantile in _outcomes(plan, known):
        for question in _questions(plan, outcome, pair, aim):
            try:
                yield _planned(spec, question, known, aim, quantile=quantile)
            except ValueError as error:
                what = question.name if quantile is None else f"{question.name} at {quantile:g}"
                reason = f"{what}: {error}"
                yield NotPlanned(metric=plan.metric.key, role=plan.metric.role, arms=pair.arms, reason=reason)


def _outcomes(plan: Plan, known: Known) -> Iterator[tuple[Outcome, float | None]]:
    if plan.metric.kind is not MetricKind.LATENCY:
        yield outcome_of(plan, known.baseline), None
        return
    for p in plan.metric.tested_quantiles:
        yield quantile_of(p, known.baseline.quantiles or {}), p


def _questions(plan: Plan, outcome: Outcome, pair: Pair, aim: Aim) -> Iterator[Question]:
    """The effect of a primary or secondary metric; harm and safety of a guardrail."""
    good = 1.0 if plan.metric.direction is Direction.INCREASE else -1.0
    size = aim.effects.get(plan.metric.key)
    if plan.harm is None or plan.safety is None:
        size = size or aim.effects.get("")
        effect, source = _effect(plan, outcome, size, good)
        yield Question(
            plan,
            outcome,
            pair,
            "effect",
            plan.effect,
            2,
            good,
            NO_MARGIN,
            effect=effect,
            effect_source=source,
        )
        return
    harm, source = _harm(plan, outcome, size, -good)
    yield Question(
        plan, outcome, pair, "harm", plan.harm, 1, -good, plan.harm_margin, effect=harm, effect_source=source
    )
    yield Question(
        plan, outcome, pair, "safety", plan.safety, 1, good, plan.margin, effect=0.0, effect_source="no harm"
    )


def _effect(plan: Plan, outcome: Outcome, size: Size | None, good: float) -> tuple[float, str]:
    """The true effect, NaN for the one that the planned sample can find."""
    minimum = plan.metric.minimum_effect
    if size is not None:
        return good * size.absolute(outcome.base), "given"
    if minimum is None:
        return math.nan, "the smallest that the planned sample finds"
    if minimum.relative is not None:
        return good * minimum.relative * abs(outcome.base), "minimum_effect"
    return good * (minimum.absolute or 0.0), "minimum_effect"


def _harm(plan: Plan, outcome: Outcome, size: Size | None, bad: float) -> tuple[float, str]:
    edge = abs(outcome.edge(plan.margin))
    if size is not None:
        return bad * size.absolute(outcome.base), "given"
    if plan.metric.critical:
        return bad * edge, "harm as large as the margin"
    harm = 2.0 * edge
    if bad < 0 and bounded_below(plan.metric) and harm >= outcome.base:
        return bad * 0.5 * (edge + outcome.base), "harm halfway from the margin to nothing left"
    return bad * harm, "harm of twice the margin"


# One question --------------------------------------------------------------------------------------


def _planned(
    spec: ExperimentSpec, question: Question, known: Known, aim: Aim, *, quantile: float | None
) -> PlannedTest:
    planned, tuned = spec.planned_sample * question.pair.traffic_share, pair_sample(spec)
    if quantile is not None:
        detectable = quantile_detectable(question, tuned=tuned, planned=planned, power=aim.power)
        question = _settled(question, detectable)
        found = quantile_numbers(question, tuned=tuned, planned=planned, power=aim.power)
        alpha, first = question.test.alpha * FIRST_EPOCH, question.outcome.first_units(question.pair.share)
        sequence = Sequence(alpha, None, tuned, 2, first)
    else:
        sequence = sequence_of(question.at(0.0) if math.isnan(question.effect) else question)
        signal = signal_found(sequence, n=planned, power=aim.power)
        detectable = None if signal is None else question.detectable(signal)
        question = _settled(question, detectable)
        sequence = sequence_of(question)
        found = numbers(question, sequence, planned=planned, power=aim.power)
    return _report(spec, question, detectable, sequence, found, known=known, aim=aim, quantile=quantile)


def _settled(question: Question, detectable: Question | None) -> Question:
    """The question with its true effect known to be possible, and on the far side of the null."""
    if math.isnan(question.effect):
        if detectable is None:
            raise ValueError("the planned sample finds no effect, and none is given to plan for (--effect)")
        question = question.at(detectable.effect)
    metric, outcome = question.plan.metric, question.outcome
    if not outcome.possible(question.effect):
        raise ConfigError(f"{metric.key}: no metric of {outcome.base:g} can change by {question.effect:g}")
    if question.distance() <= 0:
        if question.effect_source == "given":
            raise ConfigError(f"{metric.key}: harm of {abs(question.effect):g} is not beyond its margin")
        raise ValueError("the baseline is 0, and so is every share of it")
    if question.variance() <= 0:
        raise ConfigError(f"{metric.key}: its baseline has no variance, there is nothing to plan")
    return question


def _report(
    spec: ExperimentSpec,
    question: Question,
    detectable: Question | None,
    sequence: Sequence,
    found: Numbers,
    *,
    known: Known,
    aim: Aim,
    quantile: float | None,
) -> PlannedTest:
    plan, pair, outcome = question.plan, question.pair, question.outcome
    samples = _scaled(found.units, pair.traffic_share)
    days = _days(spec, question, samples, aim)
    return PlannedTest(
        metric=plan.metric.key,
        kind=plan.metric.kind,
        role=plan.metric.role,
        arms=pair.arms,
        test=question.name,
        quantile=quantile,
        method=plan.method,
        sides=question.sides,
        alpha=question.test.alpha,
        sequence_alpha=sequence.alpha,
        rho2=sequence.rho2,
        tuned_units=sequence.tuned / pair.traffic_share,
        share=pair.share,
        traffic_share=pair.traffic_share,
        first_units=sequence.first / pair.traffic_share,
        planned_units=spec.planned_sample,
        baseline=_shown(known.baseline),
        baseline_source=known.source,
        null=question.size(outcome.edge(question.null)),
        effect=question.size(question.effect),
        effect_source=question.effect_source,
        variance=question.variance(),
        power=found.power,
        detectable=_found(question, detectable),
        units=samples,
        days=days,
        price=samples.for_power / samples.fixed if samples.for_power and samples.fixed else None,
        half_width=found.half_width,
        notes=(
            *known.notes,
            *_notes(
                spec,
                question,
                sequence,
                days=days,
                reached=detectable is not None,
                unreachable=samples.for_power is None,
            ),
        ),
        curve=msgspec.structs.replace(
            found.curve, units=tuple(n / pair.traffic_share for n in found.curve.units)
        ),
    )


def _scaled(samples: Samples, traffic_share: float) -> Samples:
    """Units of all arms for units of the pair."""
    fields = msgspec.structs.asdict(samples)
    return Samples(**{name: None if n is None else n / traffic_share for name, n in fields.items()})


def _days(spec: ExperimentSpec, question: Question, samples: Samples, aim: Aim) -> Samples | None:
    """Days in which so many units come and mature; what can only ship does not end before the minimum runtime."""
    if aim.units_per_day is None:
        return None
    metric = question.plan.metric
    wait_ms = aim.allowed_lateness_ms + (0 if metric.at_once else metric.window_ms)
    least = 0.0 if question.name == "harm" else duration_ms(spec.minimum_runtime) / _DAY_MS
    rate = aim.units_per_day

    def days(n: float | None) -> float | None:
        return None if n is None else max(least, n / rate + wait_ms / _DAY_MS)

    return Samples(**{name: days(n) for name, n in msgspec.structs.asdict(samples).items()})


def _found(question: Question, detectable: Question | None) -> Effect | None:
    if detectable is None:
        return None
    safety = question.name == "safety"
    return question.size(question.outcome.edge(detectable.null) if safety else detectable.effect)


_QUANTILES_SHOWN = 9


def _shown(baseline: Baseline) -> dict[str, Any]:
    """The baseline's fields; of a whole distribution some quantiles."""
    fields = baseline.given()
    if "quantiles" in fields:
        pairs = sorted(fields["quantiles"].items())
        step = max(1, (len(pairs) - 1) // (_QUANTILES_SHOWN - 1))
        fields["quantiles"] = dict(pairs[::step])
    return fields


def _notes(
    spec: ExperimentSpec,
    question: Question,
    sequence: Sequence,
    *,
    days: Samples | None,
    reached: bool,
    unreachable: bool,
) -> Iterator[str]:
    planned = spec.planned_sample * question.pair.traffic_share
    if planned <= sequence.first:
        yield "the planned sample ends before the first look"
    elif not reached:
        yield "the planned sample finds nothing that is possible"
    rare = planned * question.outcome.rarest(question.pair.share)
    if rare < FEW:
        yield f"rough: only {rare:,.0f} units of the rarer kind are expected in the smaller arm"
    if question.plan.method is Method.EXACT_THEN_ASYMPTOTIC:
        yield "what the exact test adds while events are few is not counted as power"
    if question.plan.method is Method.RATE_RATIO:
        yield "tuned by its prior on the rate ratio, not to the planned sample"
    if unreachable:
        yield "the power is never reached: the effect is no wider than the histogram's bins"
    if question.plan.method is Method.QUANTILE:
        yield "units are those with a value; power is simulated, of one look; expected samples are not planned"
    needed, longest = None if days is None else days.for_power, spec.maximum_runtime
    if needed is not None and longest is not None and needed > duration_ms(longest) / _DAY_MS:
        yield f"the maximum runtime of {longest} is over before"
