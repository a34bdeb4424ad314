"""`stream-xp status`: the newest evidence of each experiment."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from stream_xp.cli.common import examples, json_option, print_json, with_settings
from stream_xp.cli.consoles import table_console, words
from stream_xp.domain.decision import MonitorState
from stream_xp.services.evidence import Standing, read_standings

if TYPE_CHECKING:
    from rich.console import RenderableType

    from stream_xp.domain.decision import Action, Evidence, MetricResult, MonitorResult, Result
    from stream_xp.domain.statistics import Outcomes
    from stream_xp.settings import Settings

_MONITOR_STYLES = {MonitorState.WARNING: "yellow", MonitorState.INVALID: "bold red"}
_ACTION_STYLES = {"stop": "bold red", "ship": "bold green", "hold": "yellow"}


@click.command(
    epilog=examples(
        "stream-xp status", "stream-xp status checkout-canary --json | jq '.[0].result.decision'"
    ),
)
@with_settings("bootstrap", "broker", "prefix")
@click.argument("experiment", required=False)
@json_option
def status(settings: Settings, *, experiment: str | None, as_json: bool) -> None:
    """Show the newest evidence of each experiment, or of one.

    Effects are arm minus control with their confidence sequence; log_e is the evidence against "no effect".
    """
    standings = read_standings(settings, now_ms=time.time_ns() // 1_000_000, experiment=experiment)
    if as_json:
        print_json(standings)
    elif standings:
        console = table_console()
        for standing in standings:
            console.print(_panel(standing))
    else:
        click.echo("no experiment has a result yet")


def _panel(standing: Standing) -> Panel:
    result = standing.result
    # Text, never markup: names come from files and events.
    title = words(f"{result.experiment} version {result.version}")
    return Panel(Group(*_parts(standing)), title=title, title_align="left")


def _parts(standing: Standing) -> list[RenderableType]:
    result = standing.result
    parts: list[RenderableType] = [_decision(result)]
    if result.champion is not None:
        parts.append(words(f"champion, the control here: {result.champion}"))
    parts += [words(f"invalid: {reason}", style="bold red") for reason in result.invalid]
    parts += [_arms(result), _metrics(result), *_notes(result), *_worth(standing)]
    parts += [
        *_segments(standing),
        *_by_age(result),
        *_uniform_slice(result),
        *_sample_ratio(result),
        *_monitors(result),
    ]
    parts += [words(_outcomes("exposures", result.exposure_outcomes), style="dim")]
    parts += [
        words(_outcomes("rewards", result.reward_outcomes), style="dim"),
        words(_ages(standing), style="dim"),
    ]
    return parts


def _decision(result: Result) -> Text:
    decision = result.decision
    about = ", ".join(part for part in (decision.arm, decision.metric) if part)
    text = words(decision.action.upper(), style=_style(decision.action))
    return text.append(
        words(f" {about}: {decision.reason}" if about else f" {decision.reason}", style="default")
    )


def _style(action: Action) -> str:
    return _ACTION_STYLES.get(action, "default")


def _arms(result: Result) -> Table:
    table = Table("arm", box=None)
    for name in ("units", "expected"):
        table.add_column(name, justify="right")
    for arm in result.arms:
        table.add_row(words(arm.arm), f"{arm.units:,}", f"{arm.expected_units:,.1f}")
    table.add_row(words("crossovers", style="dim"), f"{result.crossover_units:,}", "")
    return table


def _metrics(result: Result) -> Table:
    table = Table("metric", "arm", "state", box=None)
    for name in ("control", "treated", "effect [lower, upper]", "log_e"):
        table.add_column(name, justify="right", no_wrap=True)
    for metric in result.metrics:
        table.add_row(*(words(cell) for cell in _cells(metric)))
    return table


def _cells(metric: MetricResult) -> list[str]:
    means = (_number(metric.control_mean), _number(metric.arm_mean))
    effect = metric.effect
    shown = "-" if effect is None else _interval(effect)
    log_e = "-" if effect is None else f"{effect.log_e:.2f}"
    return [metric.metric, metric.arm, str(metric.state), *means, shown, log_e]


def _interval(evidence: Evidence) -> str:
    return f"{_number(evidence.estimate)} [{_number(evidence.lower)}, {_number(evidence.upper)}]"


def _notes(result: Result) -> list[Text]:
    """Return a line for each metric whose tests of harm and safety, or whose note, say more than its row."""
    notes = ((metric, _note(metric)) for metric in result.metrics)
    return [words(f"{m.role} {m.metric} in {m.arm}: {note}", style="dim") for m, note in notes if note]


def _note(metric: MetricResult) -> str:
    tests = (("harm", metric.harm), ("safety", metric.safety))
    notes = [f"{name} log_e {test.log_e:.2f} of {test.threshold_log_e:.2f}" for name, test in tests if test]
    return "; ".join([*notes, *([metric.note] if metric.note else [])])


def _worth(standing: Standing) -> list[Text]:
    """Return a line for each effect of an experiment that is over: raw estimates of such exaggerate."""
    lines = []
    for one in standing.worth:
        found = one.shrunk
        if found.effect is not None:
            risks = f"type S {found.type_s or 0.0:.2g}, type M {found.type_m or 0.0:.3g}"
            prior = f"{found.prior} prior, {found.experiments:,} past effects"
            shrunk = f"raw {_number(one.raw)}, shrunk {_number(found.effect)} ± {_number(found.sd)}"
            lines.append(words(f"worth of {one.metric} in {one.arm}: {shrunk}, {risks} ({prior})"))
    return lines


def _segments(standing: Standing) -> list[Text]:
    """Return a line for each registered segment value whose effect could be shrunk."""
    return [
        words(
            f"segment {one.segment}, {one.metric} in {one.arm}: raw {_number(one.raw)}, "
            f"shrunk {_number(one.effect)} ± {_number(one.sd)} (registered, no test)",
            style="dim",
        )
        for one in standing.shrunk_segments
    ]


def _by_age(result: Result) -> list[Text]:
    """Return a line for each change of an effect with age that is proven, or that could be."""
    lines = []
    for one in result.ages:
        if one.early is not None and one.late is not None and one.change is not None:
            about = f"early {_number(one.early.estimate)}, late {_number(one.late.estimate)}"
            test = f"log_e {one.change.log_e:.2f} of {one.change.threshold_log_e:.2f}"
            said = str(one.kind).upper() if one.kind else "no change proven"
            text = f"by age, {one.metric} in {one.arm}: {said}, {about}, {test}"
            lines.append(words(text, style="yellow" if one.kind else "dim"))
    return lines


def _uniform_slice(result: Result) -> list[Text]:
    """Return a line for each effect in the uniform slice, and one where its arms are not even."""
    found = result.uniform_slice
    if found is None:
        return []
    lines = []
    for one in found.effects:
        effect, units = one.effect, f"{one.control_units:,} / {one.arm_units:,} units"
        shown = "undetermined"
        if effect is not None:
            bounds = f"[{_number(effect.lower)}, {_number(effect.upper)}]"
            shown = f"{_number(effect.estimate)} {bounds}, log_e {effect.log_e:.2f} of {effect.threshold_log_e:.2f}"
        lines.append(words(f"uniform slice, {one.metric} in {one.arm}: {shown}, {units}", style="dim"))
    if found.sample_ratio is not None and found.sample_ratio.mismatch:
        lines.append(words("uniform slice: MISMATCH, its units were not drawn evenly", style="bold red"))
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _sample_ratio(result: Result) -> list[Text]:
    ratio = result.sample_ratio
    if ratio is None:
        return []
    verdict = "MISMATCH" if ratio.mismatch else "SUSPECTED" if ratio.suspected else "no mismatch"
    text = f"sample ratio: {verdict}, log_e {ratio.log_e:.2f} of {ratio.threshold_log_e:.2f}"
    if ratio.suspected:
        text += f" on settled units, {ratio.counted_log_e:.2f} on all: are arms counted at different times?"
    where = [
        words(f"  {one.segment}: {one.units:,} units, log_e {one.log_e:.2f} of {one.threshold_log_e:.2f}")
        for one in ratio.diagnosis
    ]
    style = "bold red" if ratio.mismatch else "yellow" if ratio.suspected else "default"
    return [words(text, style=style), *where]


def _monitors(result: Result) -> list[Text]:
    """Return a line for each monitor that is not quiet, one that tells what opens latches, and one for all others."""
    monitors = result.monitors or ()
    loud = [one for one in monitors if one.state is not MonitorState.QUIET]
    lines = [words(_monitor(one), style=_MONITOR_STYLES[one.state]) for one in loud]
    if any(one.latched for one in loud):
        lines.append(
            words(f"  once it is mended: stream-xp reset {result.experiment} --monitors", style="dim")
        )
    quiet = ", ".join(_about(one) for one in monitors if one.state is MonitorState.QUIET)
    return [*lines, words(f"quiet: {quiet}", style="dim")] if quiet else lines


def _monitor(one: MonitorResult) -> str:
    test = "" if one.log_e is None else f", log_e {one.log_e:.2f} of {one.threshold_log_e or 0.0:.2f}"
    latched = ", latched" if one.latched else ""
    return f"monitor {_about(one)}: {one.state}{latched}{test}: {one.reason}"


def _about(one: MonitorResult) -> str:
    return one.monitor.replace("_", " ") + (f" of {one.arm}" if one.arm else "")


def _outcomes(name: str, outcomes: Outcomes) -> str:
    counts = ((field, getattr(outcomes, field)) for field in outcomes.__struct_fields__ if field != "read")
    return f"{name}: {outcomes.read:,} in" + "".join(f", {n:,} {field}" for field, n in counts if n)


def _ages(standing: Standing) -> str:
    data = "no data yet" if standing.data_age_ms is None else f"data {standing.data_age_ms / 1000:.1f} s old"
    return f"{data}, look {standing.result.look:,}, evaluated {standing.evaluated_age_ms / 1000:.1f} s ago"
