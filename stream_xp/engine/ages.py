"""Effects by age: the curve over the time since first exposure, and whether the late effect left the early one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from stream_xp import stats
from stream_xp.domain.ages import Bucket, age_buckets, lengths
from stream_xp.domain.decision import AgeChange, AgeEffect, AgeResult, Evidence, Method
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Metric
from stream_xp.domain.statistics import ExperimentStatistics
from stream_xp.engine.comparison import (
    UNTESTABLE,
    Comparison,
    Finding,
    evidence,
    found_all,
    grouped,
    planned_comparisons,
)
from stream_xp.engine.design import Plan, Test, pair_sample
from stream_xp.engine.mean_findings import cross_sums, mean_findings
from stream_xp.stats import novelty
from stream_xp.stats.batch import REASONS, EvidenceArrays

DAY_MS = 86_400_000
_KINDS = (None, AgeChange.NOVELTY, AgeChange.HABITUATION)
"""By the code of `stats.novelty.CHANGES`."""


class AgePlan(NamedTuple):
    """What is tested of one metric by age; fixed by the spec alone.

    Attributes:
        buckets: a plan for each bucket, under the name of its rows.
        change: two-sided test that the late effect is not the early one; reads the rows of the last bucket.
        early, late: lengths of the first and the last bucket, in the largest unit that divides both.
        per_ms: the effects of both are per this time.
        fault: why the spec is beyond what the methods take, if it is; nothing is tested then.
    """

    metric: Metric
    spans: tuple[Bucket, ...]
    buckets: tuple[Plan, ...]
    change: Plan
    early: int
    late: int
    per_ms: int
    scale: float
    fault: str | None = None


def age_plans(record: ExperimentRecord) -> tuple[AgePlan, ...]:
    """The plans of every metric in `ages`, in its order.

    `alpha` is split evenly over (metrics in `ages` x treatment arms) for the changes, and as much once more for the
    curves, each over its buckets. Nothing of it decides, so that nothing is taken from the budget of shipping.
    """
    found = _MEMO.get(record.design_hash)
    if found is None:
        if len(_MEMO) >= _MEMO_SIZE:
            _MEMO.clear()
        found = _MEMO[record.design_hash] = _plans(record.spec)
    return found


_MEMO: dict[str, tuple[AgePlan, ...]] = {}
_MEMO_SIZE = 10_000


def _plans(spec: ExperimentSpec) -> tuple[AgePlan, ...]:
    spans: dict[str, list[Bucket]] = {}
    metrics = {}
    for metric, bucket in age_buckets(spec):
        metrics[metric.key] = metric
        spans.setdefault(metric.key, []).append(bucket)
    return tuple(_plan(spec, metric, tuple(spans[key])) for key, metric in metrics.items())


def _plan(spec: ExperimentSpec, metric: Metric, spans: tuple[Bucket, ...]) -> AgePlan:
    tests, fault = _tests(spec, len(spans))
    early, late, unit_ms = lengths(spans[0], spans[-1])
    # The share of units with a reward is no rate: it is that of a bucket, and both are equally long.
    per_ms = unit_ms if metric.zero_or_one else DAY_MS
    rows = [_under_the_name(spec, metric, bucket)._replace(fault=fault) for bucket in spans]
    curve = [one._replace(effect=tests[0]) for one in rows]
    change = rows[-1]._replace(method=Method.RATIO, effect=tests[1])
    scale = metric.step * per_ms / unit_ms
    return AgePlan(metric, spans, tuple(curve), change, early, late, per_ms, scale, fault)


def _tests(spec: ExperimentSpec, buckets: int) -> tuple[tuple[Test, Test], str | None]:
    """The tests of one bucket and of the change."""
    alpha = spec.alpha / max(1, len(spec.ages.metrics if spec.ages else ()) * len(spec.treatments))
    try:
        curve, change = (_two_sided(spec, level) for level in (alpha / buckets, alpha))
    except ValueError as error:
        return (_NO_TEST, _NO_TEST), str(error)
    return (curve, change), None


_NO_TEST = Test(0.5, 1.0, 0.0)


def _two_sided(spec: ExperimentSpec, alpha: float) -> Test:
    return Test(alpha, stats.tuned_rho2(pair_sample(spec), alpha), -math.log(alpha))


def _under_the_name(spec: ExperimentSpec, metric: Metric, bucket: Bucket) -> Plan:
    """A plan that reads the rows of the bucket; what is tested is still to come."""
    rows = msgspec.structs.replace(metric, key=bucket.name(metric.key))
    sample = pair_sample(spec)
    return Plan(rows, Method.ASYMPTOTIC, _NO_TEST, _NO_TEST, pair_sample=sample, step=metric.step)


def age_results(
    looks: Sequence[tuple[ExperimentRecord, ExperimentStatistics]],
) -> list[tuple[AgeResult, ...]]:
    """Effects by age of every metric in `ages` and treatment arm, of many experiments.

    Comparisons are tested together as arrays; what is found of one experiment does not depend on the others.
    """
    batches = [_asked(*look) if look[0].spec.ages is not None else [] for look in looks]
    asked = [one for batch in batches for one in batch]
    points = _points(asked)
    changes = _changes([one for one in asked if one.plan.fault is None])
    tested = iter([None if one.plan.fault is not None else next(changes) for one in asked])
    return [tuple(_result(one, next(points), next(tested)) for one in batch) for batch in batches]


class _Asked(NamedTuple):
    """What is asked of one metric in one arm: a comparison for each bucket, and that of the change."""

    plan: AgePlan
    curve: list[Comparison]
    change: Comparison


class _Change(NamedTuple):
    """What was found of one change; None while undetermined."""

    early: Evidence | None = None
    late: Evidence | None = None
    change: Evidence | None = None
    kind: AgeChange | None = None
    note: str | None = None


def _asked(record: ExperimentRecord, statistics: ExperimentStatistics) -> list[_Asked]:
    designed = age_plans(record)
    arms = len(record.spec.treatments)
    wanted = [plan for one in designed for plan in (*one.buckets, one.change)]
    batch = planned_comparisons(record, statistics, wanted)
    found = []
    for plan in designed:
        size = arms * (len(plan.buckets) + 1)
        mine, batch = batch[:size], batch[size:]
        # By bucket, and inside it by arm; the change comes last.
        found += [_Asked(plan, mine[at:-arms:arms], mine[size - arms + at]) for at in range(arms)]
    return found


def _points(asked: Sequence[_Asked]) -> Iterator[list[Finding]]:
    """What is found in the buckets of each."""
    curve = [one for each in asked for one in each.curve]
    findings = [Finding(*one.units) for one in curve]
    testable = [at for at, one in enumerate(curve) if one.plan.fault is None]
    for members in grouped([curve[at] for at in testable], lambda one: len(one.strata)).values():
        places = [testable[at] for at in members]
        of_group = found_all([curve[at] for at in places], mean_findings)
        for at, finding in zip(places, of_group, strict=True):
            findings[at] = finding
    rest = iter(findings)
    for each in asked:
        yield [next(rest) for _ in each.curve]


def _changes(asked: Sequence[_Asked]) -> Iterator[_Change]:
    found = [_Change()] * len(asked)
    groups: dict[tuple[int, int, int], list[int]] = {}
    for at, one in enumerate(asked):
        groups.setdefault((one.plan.early, one.plan.late, len(one.change.strata)), []).append(at)
    for members in groups.values():
        of_group = _tested([asked[at] for at in members])
        for at, change in zip(members, of_group, strict=True):
            found[at] = change
    return iter(found)


def _tested(group: Sequence[_Asked]) -> list[_Change]:
    """Changes with the same lengths and equally many strata; one at fault is found by halving, as in `found_all`."""
    try:
        return _together(group)
    except ValueError as error:
        if len(group) == 1:
            return [_Change(note=f"{UNTESTABLE}: {error}")]
    middle = len(group) // 2
    return [*_tested(group[:middle]), *_tested(group[middle:])]


def _together(group: Sequence[_Asked]) -> list[_Change]:
    tests = [one.change.plan.effect for one in group]
    control, arm = cross_sums([one.change for one in group])
    found = novelty.effect_change(
        control,
        arm,
        early_days=group[0].plan.early,
        late_days=group[0].plan.late,
        scale=[one.plan.scale for one in group],
        alpha=[test.alpha for test in tests],
        rho2=[test.rho2 for test in tests],
    )
    thresholds = [test.threshold_log_e for test in tests]
    columns = (_shown(one, thresholds) for one in (found.early, found.late, found.change))
    kinds = (_KINDS[code] for code in found.kind.tolist())
    notes = (REASONS[code] or None for code in found.change.reason.tolist())
    return [_Change(*row) for row in zip(*columns, kinds, notes, strict=True)]


def _shown(found: EvidenceArrays, thresholds: Sequence[float]) -> list[Evidence | None]:
    shown = evidence(found.estimate, (found.lower, found.upper), found.log_e, thresholds)
    return [None if code else one for one, code in zip(shown, found.reason.tolist(), strict=True)]


def _result(asked: _Asked, points: Sequence[Finding], change: _Change | None) -> AgeResult:
    plan = asked.plan
    control_units, arm_units = asked.change.units
    found = change or _Change(note=f"{UNTESTABLE}: {plan.fault}")
    return AgeResult(
        metric=plan.metric.key,
        arm=asked.change.arm,
        control_units=control_units,
        arm_units=arm_units,
        per_ms=plan.per_ms,
        buckets=tuple(
            AgeEffect(
                from_ms=bucket.from_ms,
                until_ms=bucket.until_ms,
                control_units=point.control_units,
                arm_units=point.arm_units,
                effect=point.effect,
            )
            for bucket, point in zip(plan.spans, points, strict=True)
        ),
        early=found.early,
        late=found.late,
        change=found.change,
        kind=found.kind,
        note=found.note,
    )
