"""`stream-xp overlap`: which experiments share units, whether they may, and whether they interact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import click
from rich.console import Console
from rich.table import Table

from stream_xp.cli.common import (
    EXIT_FAILED,
    EXIT_UNKNOWN,
    OneLineError,
    examples,
    json_option,
    print_json,
    with_settings,
)
from stream_xp.cli.consoles import reading_shown, table_console, words
from stream_xp.domain.layers import listed, slot_range
from stream_xp.errors import ConfigError, DependencyError
from stream_xp.services.overlap import OverlapReport, overlaps
from stream_xp.services.overlap.service import ALPHA

if TYPE_CHECKING:
    from stream_xp.services.overlap.report import ArmsInteraction, ExperimentUnits, Pair
    from stream_xp.settings import Settings

PIPE_WIDTH: Final = 160


@click.command(
    epilog=examples(
        "stream-xp overlap",
        "stream-xp overlap --bootstrap kafka-1:9092 --json | jq '.pairs[] | select(.violations > 0)'",
    ),
)
@with_settings(
    "bootstrap",
    "broker",
    "prefix",
    "allowed_lateness_ms",
    "activation_delay_ms",
    "future_tolerance_ms",
    "max_record_bytes",
)
@click.option(
    "--alpha",
    metavar="LEVEL",
    type=click.FloatRange(0.0, 1.0, min_open=True, max_open=True),
    default=ALPHA,
    show_default=True,
    help="Chance that any pair is wrongly said to interact.",
)
@json_option
def overlap(settings: Settings, *, alpha: float, as_json: bool) -> None:
    """Count the units that running experiments share, and test whether the experiments interact.

    Reads all raw topics without a consumer group and changes nothing. The test holds its level however often it is
    looked at. Exits 0 if all is as the files say, 1 if units are where they may not be, experiments stand beside each
    other that may not, or an interaction is proven that one of the files calls decisive; 2 if nobody can say.
    """
    try:
        with reading_shown() as show:
            report = overlaps(settings, alpha=alpha, progress=show)
    except (DependencyError, ConfigError) as error:
        raise OneLineError(error, exit_code=EXIT_UNKNOWN) from error
    if as_json:
        print_json(report)
    else:
        write(report, table_console(PIPE_WIDTH))
    if not report.clean:
        raise click.exceptions.Exit(EXIT_FAILED)


def write(report: OverlapReport, console: Console) -> None:
    """Write a report for people."""
    if not report.experiments:
        console.print("no experiment runs")
        return
    console.print(_experiments(report))
    if report.pairs:
        console.print(_pairs(report))
    interactions = _interactions(report)
    if interactions.row_count:
        console.print(interactions)
    for line in _lines(report):
        # Text, never markup: names come from files and events.
        console.print(words(line), soft_wrap=True)


def _experiments(report: OverlapReport) -> Table:
    table = Table("experiment", "version", "layer", "slots", box=None)
    for name in ("share", "units", "outside its slots", "held out"):
        table.add_column(name, justify="right")
    for one in report.experiments:
        table.add_row(*(words(cell) for cell in _experiment(one)))
    return table


def _experiment(one: ExperimentUnits) -> list[str]:
    layer = "-" if one.layer is None else one.layer
    slots = listed(tuple(map(slot_range, one.slots))) if one.slots else "all"
    counts = [f"{count:,}" for count in (one.units, one.outside, one.held_out)]
    return [
        one.experiment,
        f"{one.version}",
        layer,
        slots,
        f"{one.share:.4g}",
        *counts,
    ]


def _pairs(report: OverlapReport) -> Table:
    table = Table("first", "second", "relation", box=None)
    for name in ("shared", "expected at most", "violations", "interaction log_e"):
        table.add_column(name, justify="right")
    for one in report.pairs:
        table.add_row(*(words(cell) for cell in _pair(one)))
    return table


def _pair(one: Pair) -> list[str]:
    found = one.interaction
    shown = "-" if found is None else f"{found.adjusted_log_e:.2f} of {found.threshold_log_e:.2f}"
    proven = " PROVEN" if found is not None and found.found else ""
    counts = [f"{one.shared:,}", f"{one.expected:,.1f}", f"{one.violations:,}"]
    return [one.first, one.second, one.relation.replace("_", " "), *counts, f"{shown}{proven}"]


def _interactions(report: OverlapReport) -> Table:
    table = Table("pair", "metric of", "metric", "arms", box=None)
    for name in ("units", "interaction [lower, upper]", "log_e"):
        table.add_column(name, justify="right")
    for pair in report.pairs:
        for one in () if pair.interaction is None else pair.interaction.arms:
            cells = [f"{pair.first} x {pair.second}", one.experiment, one.metric, *_arms(one)]
            table.add_row(*(words(cell) for cell in cells))
    return table


def _arms(one: ArmsInteraction) -> list[str]:
    arms = f"{one.first_arm} x {one.second_arm}"
    if one.estimate is None or one.lower is None or one.upper is None:
        return [arms, f"{one.units:,}", one.note or "-", "-"]
    interval = f"{one.estimate:.4g} [{one.lower:.4g}, {one.upper:.4g}]"
    return [arms, f"{one.units:,}", interval, f"{one.log_e:.2f}"]


def _lines(report: OverlapReport) -> Iterator[str]:
    for collision in report.collisions:
        yield f"collision: {collision}"
    for pair in report.pairs:
        found = pair.interaction
        if found is not None and found.found and found.decisive:
            kept = ", ".join(found.decisive)
            yield f"decisive: {pair.first} and {pair.second} interact; no ship is approved of {kept}"
        if found is not None and found.untested:
            yield f"not tested for interaction, neither conversion nor mean: {', '.join(found.untested)}"
    for note in report.notes:
        yield f"note: {note}"
    verdict = "as the files say" if report.clean else "not as the files say"
    yield f"{verdict}: {report.exposures:,} exposures and {report.rewards:,} rewards were read"
