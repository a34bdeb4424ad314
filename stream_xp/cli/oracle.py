"""`stream-xp oracle`: whether the published statistics are what the raw topics say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from stream_xp.cli.common import EXIT_FAILED, OneLineError, json_option, print_json, with_settings
from stream_xp.errors import DependencyError
from stream_xp.services.oracle.service import OracleReport, check

if TYPE_CHECKING:
    from stream_xp.services.oracle.reading import ReadStep
    from stream_xp.settings import Settings

EXIT_BROKER = 2


@click.command()
@with_settings("bootstrap", "broker", "prefix")
@json_option
def oracle(settings: Settings, *, as_json: bool) -> None:
    r"""Recompute all statistics from the raw topics and compare them byte for byte.

    Reads the topics without a consumer group and changes nothing. Exits 0 if every statistics record equals
    the raw topics, 1 if one differs, 2 if the topics cannot be read.

    \b
    Examples:
      stream-xp oracle
      stream-xp oracle --bootstrap kafka-1:9092 --prefix staging.xp. --json
    """
    try:
        report = _check_with_progress(settings)
    except DependencyError as error:
        refusal = OneLineError(error)
        refusal.exit_code = EXIT_BROKER
        raise refusal from error
    if as_json:
        print_json(report)
    else:
        _print(report)
    if not report.equal:
        raise click.exceptions.Exit(EXIT_FAILED)


def _check_with_progress(settings: Settings) -> OracleReport:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task("reading", total=None)

        def show(step: ReadStep) -> None:
            name = f"{step.topic}[{step.partition}]"
            display.update(task, description=name, completed=step.done, total=step.total)

        return check(settings, progress=show)


def _print(report: OracleReport) -> None:
    for difference in report.differences:
        click.echo(f"different: {difference}")
    click.echo(
        f"{'equal' if report.equal else 'different'}: {report.checked} statistics records of "
        f"{len(report.experiments)} experiments, recomputed from {report.exposures} exposures and "
        f"{report.rewards} rewards"
    )
