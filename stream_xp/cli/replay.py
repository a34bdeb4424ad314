"""`stream-xp replay`: a recorded file through a broker and the whole service."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
import structlog
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from stream_xp.cli.common import EXIT_FAILED, print_json
from stream_xp.errors import ConfigError
from stream_xp.services.replay.rows import Columns, Row, read_rows
from stream_xp.services.replay.service import embedded, own_run
from stream_xp.services.replay.service import replay as run_replay
from stream_xp.services.spec_file import load_spec
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from stream_xp.domain.experiment import ExperimentSpec

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("spec_file", metavar="SPEC.yaml", type=_FILE)
@click.argument("data_file", metavar="FILE.csv[.gz]", type=_FILE)
@click.option(
    "--json",
    "out",
    metavar="OUT",
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    help="Write the report to this file as JSON; - is standard output.",
)
@click.option("--bootstrap", metavar="HOST:PORT,...", help="A real Kafka instead of the embedded broker.")
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Where the rows are cut into batches; no statistic depends on it.",
)
@click.option("--arm-column", default="policy", show_default=True, help="Column with the arm.")
@click.option(
    "--unit-columns", default="policy,row", show_default=True, help="Columns that name the unit, joined by -."
)
@click.option(
    "--time-column",
    default="timestamp",
    show_default=True,
    help="Column with the time: RFC 3339 with an offset.",
)
@click.option(
    "--metric-columns",
    metavar="NAME,...",
    help="Columns with rewards; 0 is none.  [default: the events that the spec's metrics listen to]",
)
def replay(
    spec_file: Path,
    data_file: Path,
    *,
    out: Path | None,
    bootstrap: str | None,
    seed: int,
    arm_column: str,
    unit_columns: str,
    time_column: str,
    metric_columns: str | None,
) -> None:
    r"""Send a file of impressions through a broker and the service and report what it decided.

    Each row is an exposure of a unit to an arm, and a reward for each metric column that is not 0, at the
    time of the row. Segments of the spec are read from the columns of the same name, where there are any.
    The run has topics of its own. At the end the statistics are computed again from the raw topics; the exit
    code is 1 if they differ.

    \b
    Examples:
      stream-xp replay spec.yaml open-bandit-men.csv.gz --json out.json
      stream-xp replay spec.yaml log.csv --arm-column cell --unit-columns member --time-column served_at
      stream-xp replay spec.yaml log.csv --bootstrap kafka-1:9092
    """
    _log_warnings_only()
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"--json: there is no directory {out.parent}")
    spec = load_spec(spec_file)
    columns = Columns(
        arm=arm_column,
        unit=_listed("--unit-columns", unit_columns),
        time=time_column,
        metrics=_metric_columns(spec, metric_columns),
    )
    rows = read_rows(data_file, columns, segments=tuple(spec.segments))
    report = _run(spec, rows, bootstrap=bootstrap, seed=seed)
    if out is not None and str(out) != "-":
        _write(out, report)
    if out is not None and str(out) == "-":
        print_json(report)
    else:
        _print(report)
    if report["oracle"] == "different":
        raise click.exceptions.Exit(EXIT_FAILED)


def _write(out: Path, report: dict[str, Any]) -> None:
    try:
        out.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    except OSError as error:
        raise ConfigError(f"--json: {out} cannot be written: {error.strerror}") from error


def _log_warnings_only() -> None:
    """Keep the worker's log out of the report; what is wrong goes to standard error."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _listed(option: str, text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ConfigError(f"{option}: must be names separated by commas, found {text!r}")
    return names


def _metric_columns(spec: ExperimentSpec, text: str | None) -> tuple[str, ...]:
    if text is not None:
        return _listed("--metric-columns", text)
    return tuple(dict.fromkeys(metric.listens_to for metric in spec.metrics))


def _run(spec: ExperimentSpec, rows: list[Row], *, bootstrap: str | None, seed: int) -> dict[str, Any]:
    # Only the option chooses a real broker: a variable that is set for the workers must not make this write.
    settings = own_run(Settings.load(os.environ, bootstrap=bootstrap))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        nullcontext(settings) if bootstrap else embedded(settings) as here,
        Progress(*columns, console=Console(stderr=True), transient=True) as display,
    ):
        task = display.add_task("rows", total=len(rows))

        def show(done: int, total: int) -> None:
            display.update(task, completed=done, total=total)

        return run_replay(spec, rows, here, seed=seed, progress=show)


def _print(report: dict[str, Any]) -> None:
    console = Console()
    console.print(_arms(report), _metrics(report))
    ratio = report["srm"]
    mismatch = "MISMATCH" if ratio["mismatch"] else "no mismatch"
    console.print(f"sample ratio: {mismatch} (always-valid p {_number(ratio['p'])})")
    counts = ", ".join(f"{count} {name}" for name, count in report["records"].items() if count)
    console.print(f"records: {counts}")
    console.print(f"decision: [bold]{report['decision']}[/bold]: {escape(report['decision_reason'])}")
    console.print(f"oracle: {report['oracle']} (statistics {report['statistics_hash'][:16]})")
    for difference in report["oracle_differences"]:
        console.print(f"  {difference}", markup=False)
    if report["broker"] != "embedded":
        console.print(f"topics: {report['prefix']}* stay on the broker")


def _arms(report: dict[str, Any]) -> Table:
    table = Table("arm", "exposures", "mature", "successes", title=report["experiment"])
    for name, arm in report["arms"].items():
        table.add_row(name, str(arm["exposures"]), str(arm["mature"]), str(arm["successes"]))
    return table


def _metrics(report: dict[str, Any]) -> Table:
    table = Table(
        "metric",
        "arm",
        "difference",
        "confidence sequence",
        "always-valid p",
        "p of one look",
    )
    for metric, evidence in report["metrics"].items():
        for arm, one in evidence["comparisons"].items():
            fixed = report["fixed_sample"][metric]["comparisons"][arm]
            table.add_row(
                metric,
                arm,
                _number(one["estimate"]),
                f"{_number(one['lower'])} to {_number(one['upper'])}",
                _number(one["p"]),
                _number(fixed["p"]),
            )
    return table


def _number(value: float | None) -> str:
    return "undetermined" if value is None else f"{value:.4g}"
