"""`stream-xp oracle`: whether the published statistics are what the raw topics say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stream_xp.cli.common import (
    EXIT_FAILED,
    EXIT_UNKNOWN,
    OneLineError,
    json_option,
    print_json,
    with_settings,
)
from stream_xp.cli.consoles import plain, reading_shown
from stream_xp.errors import ConfigError, DependencyError
from stream_xp.services.oracle.service import OracleReport, examine

if TYPE_CHECKING:
    from stream_xp.settings import Settings


@click.command()
@with_settings(
    "bootstrap", "broker", "prefix", "activation_delay_ms", "future_tolerance_ms", "max_record_bytes"
)
@json_option
def oracle(settings: Settings, *, as_json: bool) -> None:
    r"""Recompute all statistics from the raw topics and compare them byte for byte.

    Reads the topics without a consumer group and changes nothing. On a difference it names the first experiment,
    metric, arm and offset that differ, and what would explain it. Exits 0 if every statistics record equals the
    raw topics, 1 if one differs, 2 if it cannot say: no answer, a topic is missing, or the log no longer reaches
    back.

    Statistics name the settings that they were computed under; the options for them are only used where a record
    names none.

    \b
    Examples:
      stream-xp oracle
      stream-xp oracle --bootstrap kafka-1:9092 --prefix staging.xp. --json
    """
    try:
        with reading_shown() as show:
            report = examine(settings, progress=show)
    except (DependencyError, ConfigError) as error:
        if as_json:
            print_json({"equal": None, "reason": str(error)})
        raise OneLineError(error, exit_code=EXIT_UNKNOWN) from error
    if as_json:
        print_json(report)
    else:
        _print(report, settings.prefix)
    if code := exit_code(report):
        raise click.exceptions.Exit(code)


def exit_code(report: OracleReport) -> int:
    """Return 0 if all is equal, 1 if something surely differs, else 2."""
    if any(not difference.unsure for difference in report.differences):
        return EXIT_FAILED
    return 0 if report.equal else EXIT_UNKNOWN


def _print(report: OracleReport, prefix: str) -> None:
    for difference in report.differences:
        _say(f"{'cannot say' if difference.unsure else 'different'}: {difference}")
        for line in difference.details(prefix):
            _say(f"  {line}")
    for gap in report.unchecked:
        _say(f"not checked: {gap}")
    for note in report.notes:
        _say(f"note: {note}")
    verdict = {0: "equal", EXIT_FAILED: "different", EXIT_UNKNOWN: "cannot say"}[exit_code(report)]
    click.echo(
        f"{verdict}: {report.checked} statistics records of {len(report.experiments)} experiments, "
        f"recomputed from {report.exposures} exposures and {report.rewards} rewards"
    )


def _say(line: str) -> None:
    click.echo(plain(line))
