"""`stream-xp plan`: what an experiment's tests take and give, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.table import Table

from stream_xp.cli.common import examples, with_settings
from stream_xp.cli.consoles import table_console, words
from stream_xp.errors import ConfigError
from stream_xp.services.plan import (
    Aim,
    Known,
    load_baselines,
    parse_effects,
    parse_given,
    plan_experiment,
    read_baselines,
)
from stream_xp.services.plan.plots import require_plot, write_plot
from stream_xp.services.plan.words import aim, chart, count, size
from stream_xp.services.spec_file import load_spec

if TYPE_CHECKING:
    from stream_xp.domain.experiment import ExperimentSpec
    from stream_xp.services.plan import ExperimentPlan, PlannedTest
    from stream_xp.services.plan.report import Samples
    from stream_xp.settings import Settings


@click.command(
    epilog=examples(
        "stream-xp plan examples/canary/spec.yaml --given errors:rate=0.01 --traffic 40000",
        "stream-xp plan spec.yaml --baseline baseline.yaml --effect order=5% --plot plan.svg",
        "stream-xp plan spec.yaml --from-topic --from-experiment last-year --json - | jq '.tests[].units'",
    ),
)
@with_settings("bootstrap", "broker", "prefix")
@click.argument("spec_file", metavar="SPEC", type=click.Path(path_type=Path))
@click.option(
    "--baseline",
    "baseline_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="YAML or JSON: metric key to its numbers without the treatment.",
)
@click.option(
    "--given",
    metavar="METRIC:FIELD=NUMBER,...",
    multiple=True,
    help="The numbers of one metric, such as order:rate=0.1; repeatable, goes before the others.",
)
@click.option("--from-topic", is_flag=True, help="Read baselines from the statistics of the control arm.")
@click.option(
    "--from-experiment",
    metavar="KEY",
    help="Read them from this experiment.  [default: this one, else the largest with the metric]",
)
@click.option(
    "--traffic", metavar="UNITS_PER_DAY", type=float, help="Units of all arms per day; gives the days."
)
@click.option("--power", type=float, default=0.8, show_default=True, help="Probability of a right decision.")
@click.option(
    "--effect",
    "effects",
    metavar="[METRIC=]SIZE",
    multiple=True,
    help="True effect: 0.02 in metric units, 5% of the control's mean; of a guardrail its true harm.  "
    "[default: minimum_effect]",
)
@click.option(
    "--plot",
    "plot_file",
    metavar="FILE.svg|png",
    type=click.Path(path_type=Path),
    help="Draw power and half width over units (extra `plot`).",
)
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Write everything as JSON; - is standard output, and then nothing else is printed.",
)
def plan(
    settings: Settings,
    spec_file: Path,
    *,
    baseline_file: Path | None,
    given: tuple[str, ...],
    from_topic: bool,
    from_experiment: str | None,
    traffic: float | None,
    power: float,
    effects: tuple[str, ...],
    plot_file: Path | None,
    json_file: Path | None,
) -> None:
    """Show what each primary metric and guardrail of an experiment file can find, and when it will.

    Levels and tunings are the engine's own. A baseline is a metric's rate, mean and sd, ... without the
    treatment; docs/planning.md has the fields of each kind and explains the table.
    """
    if plot_file is not None:
        require_plot(plot_file)
    spec = load_spec(spec_file)
    known = parse_given(given, spec)
    if baseline_file is not None:
        known = _below(known, load_baselines(baseline_file, spec))
    if from_topic or from_experiment is not None:
        known = _below(known, read_baselines(settings, spec, experiment=from_experiment))
    found = plan_experiment(
        spec,
        known,
        Aim(
            power=power,
            effects=parse_effects(effects),
            units_per_day=traffic,
            allowed_lateness_ms=settings.allowed_lateness_ms,
        ),
    )
    if plot_file is not None:
        write_plot(found, plot_file)
    to_stdout = json_file is not None and str(json_file) == "-"
    if json_file is not None:
        _write_json(found, json_file, to_stdout=to_stdout)
    if not to_stdout:
        _print(spec, found)


def _below(known: dict[str, Known], other: dict[str, Known]) -> dict[str, Known]:
    """Baselines, and those of `other` where fields are missing."""
    keys = [*known, *(key for key in other if key not in known)]
    return {key: known[key].over(other.get(key)) if key in known else other[key] for key in keys}


def _write_json(found: ExperimentPlan, file: Path, *, to_stdout: bool) -> None:
    text = msgspec.json.format(msgspec.json.encode(found), indent=2)
    if to_stdout:
        click.echo(text.decode())
        return
    try:
        file.write_bytes(text + b"\n")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror}") from error


def _print(spec: ExperimentSpec, found: ExperimentPlan) -> None:
    console = table_console()
    console.print(words(_head(spec, found)))
    if found.tests:
        console.print(_table(found))
    for at, test in enumerate(found.tests, start=1):
        console.print(*(words(line) for line in _details(at, test)), sep="\n")
    for left_out in found.not_planned:
        console.print(
            words(f"not planned: {left_out.metric} ({', '.join(left_out.arms)}): {left_out.reason}")
        )


def _head(spec: ExperimentSpec, found: ExperimentPlan) -> str:
    shares = ", ".join(f"{arm.key} {arm.weight:g}" for arm in spec.arms)
    traffic = "" if found.units_per_day is None else f", {found.units_per_day:,.0f} units a day"
    planned = f"{found.planned_sample:,} units planned"
    return f"{found.experiment} version {found.version}: {planned}{traffic}; {shares}; power {found.power:g}"


def _table(found: ExperimentPlan) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", "metric", "to show"):
        table.add_column(name)
    sample = f"{found.power:.0%} by"
    for name in ("detectable", "power", "group", "fixed", sample, "price", "expected", "no effect"):
        table.add_column(name, justify="right")
    for at, test in enumerate(found.tests, start=1):
        table.add_row(*(words(cell) for cell in (str(at), *_cells(test))))
    return table


def _cells(test: PlannedTest) -> list[str]:
    quantile = "" if test.quantile is None else f" {test.quantile:g}"
    power, units = test.power, test.units
    return [
        f"{test.metric}{quantile}",
        aim(test),
        "-" if test.detectable is None else size(test.detectable, signed=test.test != "safety"),
        *(f"{value:.2f}" for value in (power.sequential, power.group_sequential, power.fixed)),
        count(units.for_power),
        "-" if test.price is None else f"{test.price:.2f}",
        count(units.expected),
        count(units.expected_without_effect),
    ]


def _details(at: int, test: PlannedTest) -> list[str]:
    sides = "two-sided" if test.sides == 2 else "one-sided"
    where = f"{at}. {test.metric} in {', '.join(test.arms)}"
    lines = [
        f"{where}: {test.method}, alpha {test.alpha:.4g} {sides}; {test.effect_source}",
        f"   baseline: {_baseline(test)} ({test.baseline_source})",
    ]
    if test.days is not None:
        lines.append(f"   days: {_days(test.days)}")
    lines += [f"   note: {note}" for note in test.notes]
    return [*lines, *chart(test)]


def _baseline(test: PlannedTest) -> str:
    parts = []
    for name, value in test.baseline.items():
        if isinstance(value, dict):
            parts += [f"q{float(q):.3g}={x:.4g}" for q, x in value.items()]
        else:
            parts.append(f"{name}={value:.4g}")
    return ", ".join(parts)


def _days(days: Samples) -> str:
    shown = (
        ("for the power", days.for_power),
        ("half have decided", days.median),
        ("expected", days.expected),
        ("fixed", days.fixed),
    )
    return ", ".join(f"{name} {value:.1f}" for name, value in shown if value is not None)
