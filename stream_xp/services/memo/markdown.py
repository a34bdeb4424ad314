"""A memo as Markdown."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence

from stream_xp.domain.decision import Evidence
from stream_xp.domain.experiment import ExperimentSpec, Metric, Role, WeightEpoch
from stream_xp.domain.statistics import Outcomes
from stream_xp.services.memo.build import SERVICE
from stream_xp.services.memo.record import Force, Memo, MetricMemo, Shrunk
from stream_xp.stats.selection import MIN_EXPERIMENTS

_FORCE = {
    Force.IN_FORCE: "in force",
    Force.WAITS: "proposed, waits for a person",
    Force.REJECTED: "rejected",
    Force.TAKEN_BACK: "taken back",
}


_WORTH = (
    "A stopped experiment exaggerates on average. The shrunk effect is drawn towards 0 by a prior; type S is the "
    "risk of a wrong sign, type M the expected exaggeration. The prior is learned from past effects on the metric, "
    f"where {MIN_EXPERIMENTS} are known; until then it is a default that is wide on purpose. "
    "None of this controls an error level."
)
_AGES = (
    "By the time since first exposure, of units whose bucket is over, 0 where a unit did not come back. The change "
    "between the first and the last bucket holds at every look, and decides nothing."
)


def markdown(memo: Memo) -> str:
    """The memo as a page; names and reasons are people's, and cannot become markup."""
    sections = (
        _head(memo),
        _plan(memo),
        _seen(memo),
        _evidence(memo),
        _worth(memo),
        _epochs(memo),
        _caveats(memo),
        _audit(memo),
        _origin(memo),
    )
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def _head(memo: Memo) -> list[str]:
    decided, spec = memo.decided, memo.spec
    about = ", ".join(_text(part) for part in (decided.arm, decided.metric) if part)
    return [
        f"# {_text(memo.experiment)}, version {memo.version}: {decided.action}{f' ({about})' if about else ''}",
        "",
        _verdict(memo),
        "",
        f"- Hypothesis: {_text(spec.hypothesis)}",
        f"- Owner: {_text(spec.owner)}",
    ]


def _verdict(memo: Memo) -> str:
    decided = memo.decided
    approved = f", approved by {_text(decided.approved_by)}" if decided.approved_by else ""
    who = f"decided by {_text(decided.by)}{approved} at {_text(decided.time)}"
    return f"**{_FORCE[decided.force]}**, {who}. Reason: {_text(decided.reason)}."


def _plan(memo: Memo) -> list[str]:
    spec = memo.spec
    conclusion, ramp, allocation = spec.conclusion, spec.ramp, spec.allocation
    lines = [
        "## Plan",
        "",
        f"- Planned sample: {spec.planned_sample:,} units ({_text(spec.unit)}) of all arms",
        f"- Error budget: ship {spec.alpha:g}, harm {spec.guardrail_alpha:g}, sample ratio {spec.sample_ratio_alpha:g}",
        f"- Runtime: at least {spec.minimum_runtime}"
        + (f", at most {spec.maximum_runtime}" if spec.maximum_runtime else ""),
    ]
    if conclusion is not None:
        futility = ", futility" if conclusion.futility else ""
        lines.append(f"- Conclusion: mode {conclusion.mode}, rule {conclusion.rule}{futility}")
    if memo.guarantee is not None:
        lines.append(f"- Guarantee: {_text(memo.guarantee)}")
    if ramp is not None:
        lines.append(f"- Ramp: {', '.join(f'{stage.coverage:.4g}' for stage in ramp.stages)} of all units")
    if allocation is not None:
        policy = f"{allocation.policy} on {_text(allocation.metric)}"
        lines.append(f"- Weights: {policy}, floor {allocation.floor:g}, every {allocation.interval}")
    rows = [
        (metric.key, metric.kind, metric.role, metric.direction, _size(metric)) for metric in spec.metrics
    ]
    lines += _beside(spec)
    return [*lines, "", *_table(("metric", "kind", "role", "good", "size"), rows)]


def _beside(spec: ExperimentSpec) -> list[str]:
    """What the experiment has to do with others."""
    layer = spec.layer
    slots = "" if layer is None else f"slots {', '.join(layer.slots)} of {layer.of:,}"
    lines = (
        []
        if layer is None
        else [f"- Layer: {_text(layer.name)}, {slots}, {100 * layer.share:.4g} % of all units"]
    )
    if spec.holdout:
        lines.append("- A holdout: units in these slots are held out of the program, which is the other arm")
    if spec.program is not None:
        lines.append(f"- Program: keeps away from the units that {_text(spec.program)} holds out")
    if spec.champion is not None:
        lines.append(f"- Champion, the control here: {_text(str(spec.champion))}")
    return lines


def _size(metric: Metric) -> str:
    name = "margin" if metric.role is Role.GUARDRAIL else "minimum effect"
    size = metric.margin if metric.role is Role.GUARDRAIL else metric.minimum_effect
    if size is None:
        return "-"
    return (
        f"{name} {size.absolute:g}"
        if size.absolute is not None
        else f"{name} {100 * (size.relative or 0.0):.4g} % of the control"
    )


def _seen(memo: Memo) -> list[str]:
    seen = memo.seen
    watermark = "no watermark yet" if seen.watermark_ms is None else _time(seen.watermark_ms)
    lines = [
        "## What was seen",
        "",
        f"- Look {seen.look:,}, runtime {_duration(seen.runtime_ms)}, data complete up to {watermark}",
        f"- Sample ratio: {_ratio(memo)}",
        f"- Units in more than one arm: {seen.crossover_units:,}",
        f"- Exposures: {_outcomes(seen.exposure_outcomes)}; rewards: {_outcomes(seen.reward_outcomes)}",
        *[
            f"- Declared look at {one.look:g} of the sample, taken at {one.information:.4g}"
            for one in seen.looks
        ],
        "",
        *_table(
            ("arm", "units", "expected"),
            [(arm.arm, f"{arm.units:,}", f"{arm.expected_units:,.1f}") for arm in seen.arms],
        ),
    ]
    if memo.invalid:
        rows = [
            (one.reason, f"{one.first_look:,} to {one.last_look:,}", _time(one.from_ms), _time(one.until_ms))
            for one in memo.invalid
        ]
        lines += ["", "Nothing could ship at these looks:", ""]
        lines += _table(("reason", "looks", "from", "until"), rows)
    return lines


def _outcomes(outcomes: Outcomes) -> str:
    counts = ((name, getattr(outcomes, name)) for name in outcomes.__struct_fields__ if name != "read")
    found = "".join(f", {count:,} {_text(name.replace('_', ' '))}" for name, count in counts if count)
    return f"{outcomes.read:,} read{found}"


def _ratio(memo: Memo) -> str:
    ratio = memo.seen.sample_ratio
    if ratio is None:
        return "not tested"
    verdict = "mismatch" if ratio.mismatch else "suspected" if ratio.suspected else "no mismatch"
    return f"{verdict} (log_e {ratio.log_e:.2f} of {ratio.threshold_log_e:.2f})"


def _evidence(memo: Memo) -> list[str]:
    rows = [
        (
            metric.metric,
            metric.role,
            metric.arm,
            metric.state,
            f"{metric.control_units:,} / {metric.arm_units:,}",
            _number(metric.control_mean),
            _number(metric.arm_mean),
            _interval(metric.effect),
            _log_e(metric.effect),
            _guard(metric),
            metric.method,
        )
        for metric in memo.metrics
    ]
    names = (
        "metric",
        "role",
        "arm",
        "state",
        "units",
        "control",
        "treated",
        "effect [lower, upper]",
        "log_e",
    )
    lines = [
        "## Evidence",
        "",
        "Effects are arm minus control, with confidence sequences that hold at every look.",
        "",
        *_table((*names, "guardrail", "method"), rows),
    ]
    lines += _quantiles(memo) + _segments(memo) + _ages(memo) + _uniform_slice(memo)
    for metric in memo.metrics:
        if metric.plot is not None:
            lines += ["", f"![{_text(metric.metric)} in {_text(metric.arm)}]({metric.plot})"]
    return lines


def _quantiles(memo: Memo) -> list[str]:
    rows = [
        (
            metric.metric,
            metric.arm,
            f"{one.quantile:g}",
            _number(one.control_value),
            _number(one.arm_value),
            _interval(one.effect),
            _log_e(one.effect),
        )
        for metric in memo.metrics
        for one in metric.quantiles
    ]
    if not rows:
        return []
    names = ("metric", "arm", "quantile", "control", "treated", "effect [lower, upper]", "log_e")
    return ["", *_table(names, rows)]


def _segments(memo: Memo) -> list[str]:
    drawn = {
        (one.metric, one.arm, one.segment): f"{_number(one.effect)} ± {_number(one.sd)}"
        for one in memo.shrunk_segments
    }
    rows = [
        (
            one.segment,
            one.metric,
            one.arm,
            f"{one.control_units:,} / {one.arm_units:,}",
            _interval(one.effect),
            _log_e(one.effect),
            drawn.get((one.metric, one.arm, one.segment), "-"),
        )
        for one in memo.segments
    ]
    if not rows:
        return []
    names = ("segment", "metric", "arm", "units", "raw effect [lower, upper]", "log_e", "shrunk effect")
    return ["", _SEGMENTS, "", *_table(names, rows)]


_SEGMENTS = (
    "Segments registered before the first look; they inform and never decide. The raw sequences of all values hold "
    "together; the shrunk effect is drawn towards the mean of its segment and has no error level:"
)


def _ages(memo: Memo) -> list[str]:
    if not memo.ages:
        return []
    points = [
        (
            one.metric,
            one.arm,
            f"{_duration(bucket.from_ms)} to {_duration(bucket.until_ms)}",
            f"{bucket.control_units:,} / {bucket.arm_units:,}",
            _interval(bucket.effect),
        )
        for one in memo.ages
        for bucket in one.buckets
    ]
    changes = [
        (
            one.metric,
            one.arm,
            f"{one.control_units:,} / {one.arm_units:,}",
            _duration(one.per_ms),
            _number(one.early.estimate if one.early else None),
            _number(one.late.estimate if one.late else None),
            _interval(one.change),
            _log_e(one.change),
            str(one.kind) if one.kind else one.note or "not proven",
        )
        for one in memo.ages
    ]
    shared = ("metric", "arm")
    curve = _table((*shared, "age", "units", "effect [lower, upper]"), points)
    names = (*shared, "units", "per", "early", "late", "change [lower, upper]", "log_e", "it is")
    return ["", _AGES, "", *curve, "", *_table(names, changes)]


def _uniform_slice(memo: Memo) -> list[str]:
    found = memo.uniform_slice
    if found is None:
        return []
    rows = [
        (
            one.metric,
            one.arm,
            f"{one.control_units:,} / {one.arm_units:,}",
            _number(one.control_mean),
            _number(one.arm_mean),
            _interval(one.effect),
            _log_e(one.effect),
            one.note or "",
        )
        for one in found.effects
    ]
    names = ("metric", "arm", "units", "control", "treated", "effect [lower, upper]", "log_e", "note")
    units = ", ".join(f"{one.arm} {one.units:,} of {one.expected_units:,.0f}" for one in found.arms)
    mismatch = found.sample_ratio is not None and found.sample_ratio.mismatch
    about = (
        f"The uniform slice alone, {100 * found.share:.3g} % of the units, drawn evenly whatever the evidence said; "
        f"it informs and never decides. Units: {units}{', a sample-ratio mismatch' if mismatch else ''}."
    )
    return ["", about, "", *_table(names, rows)]


def _guard(metric: MetricMemo) -> str:
    tests = (("harm", metric.harm), ("safety", metric.safety))
    shown = [f"{name} {_log_e(test)}" for name, test in tests if test is not None]
    return "; ".join(shown) or "-"


def _worth(memo: Memo) -> list[str]:
    rows = [(metric.metric, metric.arm, *_shrunk(metric, metric.shrunk)) for metric in memo.metrics]
    names = (
        "metric",
        "arm",
        "raw effect",
        "standard error",
        "past effects",
        "prior",
        "shrunk effect",
        "type S",
        "type M",
    )
    return [
        "## What the effects are worth",
        "",
        _WORTH,
        "",
        *_table(names, rows),
    ]


def _shrunk(metric: MetricMemo, shrunk: Shrunk) -> tuple[str, ...]:
    raw = _number(None if metric.effect is None else metric.effect.estimate)
    found = (raw, _number(shrunk.standard_error), f"{shrunk.experiments:,}")
    if shrunk.effect is None or shrunk.type_s is None or shrunk.type_m is None:
        return (*found, "-", shrunk.note or "-", "-", "-")
    return (
        *found,
        f"{shrunk.prior}, sd {_number(shrunk.prior_sd)}",
        f"{_number(shrunk.effect)} ± {_number(shrunk.sd)}",
        f"{shrunk.type_s:.2g}",
        f"{shrunk.type_m:.3g}",
    )


def _epochs(memo: Memo) -> list[str]:
    rows = [
        (
            f"{one.epoch}",
            _time(one.effective_ms),
            f"{one.coverage:.4g}",
            _weights(one),
            one.signal_id or "apply",
        )
        for one in memo.epochs
    ]
    plot = ["", f"![weights and coverage]({memo.weights_plot})"] if memo.weights_plot is not None else []
    names = ("epoch", "effective", "coverage", "weights", "by")
    return ["## Weights and coverage", "", *_table(names, rows), *plot]


def _weights(epoch: WeightEpoch) -> str:
    text = ", ".join(f"{arm} {weight:.4g}" for arm, weight in epoch.weights.items())
    return text + (
        " (final)" if epoch.final else f" ({len(epoch.contexts)} contexts)" if epoch.contexts else ""
    )


def _caveats(memo: Memo) -> list[str]:
    return ["## Caveats", "", *([f"- {_text(one)}" for one in memo.caveats] or ["- none known"])]


def _audit(memo: Memo) -> list[str]:
    rows = [
        (one.time, one.by, one.what, one.about, one.reason, one.nothing or "yes", one.id[:8])
        for one in memo.audit
    ]
    return ["## Who said what", "", *_table(("time", "by", "what", "about", "reason", "counts", "id"), rows)]


def _origin(memo: Memo) -> list[str]:
    rows = [
        (partition, _offset(one.exposures), _offset(one.rewards), _offset(one.watermark_ms))
        for partition, one in memo.offsets.items()
    ]
    verify = f"`stream-xp verify {_code(memo.decided.signal_id[:8])}` derives it again"
    again = f"; {verify}" if memo.decided.by == SERVICE else ""
    names = ("partition", "exposures up to", "rewards up to", "watermark (ms)")
    return [
        "## Where it comes from",
        "",
        f"- Signal: `{_code(memo.decided.signal_id)}`{again}",
        f"- Design hash: `{_code(memo.design_hash)}`",
        f"- Statistics hash: `{_code(memo.statistics_hash)}`",
        f"- Code version: {_text(memo.code_version)}",
        "",
        *_table(names, rows),
    ]


# --- words --------------------------------------------------------------------------------------------------


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [names, ["---"] * len(names), *([_text(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _text(text: str) -> str:
    """Text on one line that Markdown shows as it is."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in plain)


def _code(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable() and letter not in "`|")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _interval(evidence: Evidence | None) -> str:
    if evidence is None:
        return "-"
    return f"{_number(evidence.estimate)} [{_number(evidence.lower)}, {_number(evidence.upper)}]"


def _log_e(evidence: Evidence | None) -> str:
    return "-" if evidence is None else f"{evidence.log_e:.2f} of {evidence.threshold_log_e:.2f}"


def _offset(number: int | None) -> str:
    return "-" if number is None else str(number)


def _time(time_ms: int) -> str:
    return dt.datetime.fromtimestamp(time_ms / 1000, dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _duration(duration_ms: int) -> str:
    for unit_ms, unit in ((86_400_000, "d"), (3_600_000, "h"), (60_000, "min")):
        if duration_ms >= unit_ms:
            return f"{duration_ms / unit_ms:.3g} {unit}"
    return f"{duration_ms / 1000:.3g} s"
