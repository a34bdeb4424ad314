"""`stream-xp demo`: watch the service decide three simulated experiments."""

from __future__ import annotations

import itertools
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import click
import msgspec
import structlog
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stream_xp.cli.common import EXIT_FAILED
from stream_xp.errors import ConfigError
from stream_xp.services.demo import DemoReport, Moment, run_demo
from stream_xp.services.demo.world import DURATION_S, LONGEST_S, SHORTEST_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from rich.console import RenderableType

    from stream_xp.domain.decision import Evidence, MetricResult, Result
    from stream_xp.domain.statistics import Outcomes
    from stream_xp.services.demo.report import ExperimentReport, Latency

STYLES: Final = {"stop": "bold red", "ship": "bold green", "hold": "yellow"}
REFRESHES_PER_S: Final = 4
LINE_EVERY_S: Final = 5.0


@click.command()
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Seed of the traffic.")
@click.option(
    "--duration",
    metavar="S",
    type=click.FloatRange(SHORTEST_S, LONGEST_S),
    default=float(DURATION_S),
    show_default=True,
    help="Seconds of traffic; a shorter demo sends as many units, faster.",
)
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the report as JSON.",
)
def demo(*, seed: int, duration: float, json_file: Path | None) -> None:
    r"""Watch the service decide three simulated experiments, on a broker inside this process.

    A checkout canary whose error rate rises from 1 % to 3 % must be stopped, the better of three pictures must
    be shipped, and an A/A test must get no decision. It ends by itself after the whole planned duration,
    and exits 0 only if all three are right and every record is accounted for.

    \b
    Examples:
      stream-xp demo
      stream-xp demo --seed 7 --json report.json
    """
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"--json: {json_file.parent} is no folder")
    _log_warnings_only()
    console = Console(highlight=False)
    with _LiveTable(console) if console.is_terminal else _Lines() as watcher:
        report = run_demo(seed, duration_s=duration, watch=watcher.show)
    _print_report(console, report)
    if json_file is not None:
        _write(json_file, report)
    if not report.right:
        raise SystemExit(EXIT_FAILED)


def _write(file: Path, report: DemoReport) -> None:
    try:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    except OSError as error:
        raise ConfigError(f"--json: cannot write {file}: {error.strerror}") from error


def _log_warnings_only() -> None:
    # What the worker says of its normal work would break up the table.
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


# While it runs ------------------------------------------------------------------------------------


class _LiveTable:
    """One table that is drawn anew a few times a second."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._next_s = 0.0

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def show(self, moment: Moment) -> None:
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + 1 / REFRESHES_PER_S
            self._live.update(Group(_headline(moment), *_experiments(moment)), refresh=True)


class _Lines:
    """One line now and then, for a log."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, moment: Moment) -> None:
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + LINE_EVERY_S
        states = [
            f"{experiment} {_said(moment, experiment)}"
            for experiment in moment.world.expected
            if experiment in moment.board.results
        ]
        click.echo("; ".join([_headline(moment).plain, *states]))


def _headline(moment: Moment) -> Text:
    clock = f"{min(moment.elapsed_s, moment.duration_s):.0f} of {moment.duration_s:.0f} s"
    return Text(f"{moment.phase}, {clock}, {moment.sent:,} events")


def _said(moment: Moment, experiment: str) -> str:
    """Give the decision in force and what it stands on, in a few words."""
    result = moment.board.results[experiment]
    units = sum(arm.units for arm in result.arms)
    return f"{' '.join(filter(None, (result.decision.action.value, result.decision.arm)))} ({units:,} units)"


def _experiments(moment: Moment) -> Iterator[RenderableType]:
    for experiment in moment.world.expected:
        title = Text(f"\n{experiment}  ", style="bold")
        result = moment.board.results.get(experiment)
        if result is None:
            yield title.append("waiting for the first result", style="not bold dim")
        else:
            title.append(result.decision.action.upper(), STYLES[result.decision.action])
            yield title.append(f" {result.decision.reason}", "not bold")
            yield _tests(result)


def _tests(result: Result) -> Table:
    """Show each metric and arm, in columns as wide as those of the other experiments."""
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("test", width=21, no_wrap=True)
    for name, width in (("units", 7), ("effect", 7), ("confidence sequence", 19), ("log_e", 6), ("needs", 5)):
        table.add_column(name, width=width, justify="right", no_wrap=True)
    units = {arm.arm: arm.units for arm in result.arms}
    for metric in result.metrics:
        test = _deciding_test(metric)
        evidence = ("", "") if test is None else (f"{test.log_e:.2f}", f"{test.threshold_log_e:.2f}")
        table.add_row(
            Text(f"{metric.metric} {metric.arm}"), f"{units[metric.arm]:,}", *_effect(metric), *evidence
        )
    return table


def _effect(metric: MetricResult) -> tuple[str, str]:
    """Return the effect and its confidence sequence, the one-sided one where that one decides."""
    effect, harm = metric.effect, metric.harm
    if effect is None or effect.estimate is None:
        return "", metric.note or ""
    # Harm is about the excess over a margin; for a critical guardrail the margin is 0.
    shown = harm if harm is not None and harm.estimate == effect.estimate else effect
    lower = "(-inf" if shown.lower is None else f"[{shown.lower:+.4f}"
    upper = "inf)" if shown.upper is None else f"{shown.upper:+.4f}]"
    return f"{effect.estimate:+.4f}", f"{lower}, {upper}"


def _deciding_test(metric: MetricResult) -> Evidence | None:
    """Return the test that can decide: of harm for a guardrail, of the difference otherwise."""
    return metric.harm or metric.effect


# At the end ---------------------------------------------------------------------------------------


def _print_report(console: Console, report: DemoReport) -> None:
    for line in (*itertools.chain(*map(_experiment_lines, report.experiments)), *_record_lines(report)):
        # Text, never markup; and a line is as long as it is, so that a log can be searched.
        console.print(line, soft_wrap=True)
    style = "bold green" if report.right else "bold red"
    console.print(Text("the demo came out right" if report.right else "the demo came out WRONG", style=style))


def _record_lines(report: DemoReport) -> list[Text]:
    latency = report.latency
    pace = (
        f"{report.events:,} events in {report.duration_ms / 1000:.0f} s, {report.events_per_s:,.0f} events/s"
    )
    lines = [
        f"{pace} (the simulator's pace, not the service's limit); the worker ran {report.engine_s:.0f} s",
        f"event to verdict: {_quantiles(latency)} ({latency.samples:,} measured, {latency.open:,} open)",
        f"exposures: {_outcomes(report.exposures)}",
        f"rewards: {_outcomes(report.rewards)}",
        f"conservation, every record has one outcome: {'holds' if report.conserved else 'BROKEN'}",
    ]
    if not report.differences:
        lines.append("all counts, statistics and dead letters equal those of the simulator")
    different = [f"differs from the simulator: {difference}" for difference in report.differences]
    return [*map(Text, lines), *(Text(line, style="bold red") for line in different)]


def _quantiles(latency: Latency) -> str:
    found = (("p99", latency.p99_ms), ("median", latency.p50_ms), ("longest", latency.longest_ms))
    return (
        ", ".join(f"{name} {value:,.0f} ms" for name, value in found if value is not None) or "not measured"
    )


def _experiment_lines(report: ExperimentReport) -> list[Text]:
    decision = report.decision
    title = Text(f"{report.experiment}: ").append(decision.action.upper(), STYLES[decision.action])
    title.append(f" {decision.arm}  " if decision.arm else "  ")
    verdict = "right" if report.right else f"WRONG, expected {report.expected}"
    title.append(verdict, "green" if report.right else "bold red")
    if report.signals > 1:
        title.append(f", {report.signals} signals instead of one", "bold red")
    units = ", ".join(f"{arm} {count:,}" for arm, count in report.units.items())
    used = f"{sum(report.units.values()):,} units used ({units}), look {report.look:,}"
    return [
        title,
        Text(f"  {decision.reason}"),
        Text(f"  {_evidence_line(report.evidence)}"),
        Text(f"  {_timing(report)}; {used}"),
    ]


def _evidence_line(metric: MetricResult) -> str:
    if metric.control_mean is None or metric.arm_mean is None:
        return metric.note or "no evidence"
    estimate, bounds = _effect(metric)
    test = _deciding_test(metric)
    shown = "" if test is None else f", log_e {test.log_e:.2f} (threshold {test.threshold_log_e:.2f})"
    means = f"{metric.metric}: {metric.arm} {metric.arm_mean:.4f}, control {metric.control_mean:.4f}"
    return f"{means}, effect {estimate}, confidence sequence {bounds}{shown}"


def _timing(report: ExperimentReport) -> str:
    if report.decided_ms is None:
        return "no decision"
    at = f"decided {report.decided_ms / 1000:.1f} s after the start"
    if not report.onset_ms or report.detection_delay_ms is None:
        return at
    return f"{at}, {report.detection_delay_ms / 1000:.1f} s after the harm began"


def _outcomes(outcomes: Outcomes) -> str:
    counts = ((name, getattr(outcomes, name)) for name in outcomes.__struct_fields__ if name != "read")
    return f"{outcomes.read:,} in" + "".join(f", {count:,} {name}" for name, count in counts if count)
