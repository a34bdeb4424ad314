"""`stream-xp calibrate`: measure the error rate of every method."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stream_xp.cli.common import examples, json_option, print_json
from stream_xp.services.calibrate.harness import measure
from stream_xp.services.calibrate.plots import require_matplotlib
from stream_xp.services.calibrate.report import complaints, line
from stream_xp.services.calibrate.service import (
    FULL_PATHS,
    QUICK_PATHS,
    QUICK_UNITS,
    choose,
    rows,
    write_page,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stream_xp.services.calibrate.case import Case, Measurement

PAGE: Final = Path("docs/calibration.md")


@click.command(
    epilog=examples(
        "stream-xp calibrate",
        "stream-xp calibrate --quick",
        "stream-xp calibrate --only a2 --only fieller --paths 500",
    )
)
@click.option(
    "--paths",
    type=click.IntRange(20, 1_000_000),
    help=f"Simulated experiments per row.  [default: {FULL_PATHS}; with --quick {QUICK_PATHS}]",
)
@click.option("--quick", is_flag=True, help=f"Few rows, short paths ({QUICK_UNITS} units); under a minute.")
@click.option(
    "--only", multiple=True, metavar="METHOD", help="A row (a2) or a part of a method's name; repeatable."
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 256),
    default=os.cpu_count() or 1,
    show_default="processors",
    help="Processes; the result does not depend on it.",
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=1, show_default=True, help="Of every number.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"Page to write, with plots in images/ beside it.  [default: {PAGE}; none with --quick or --only]",
)
@json_option
def calibrate(
    paths: int | None,
    *,
    quick: bool,
    only: tuple[str, ...],
    jobs: int,
    seed: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure how often every method errs when it is looked at without pause, and write docs/calibration.md.

    Exits 1 if a method errs more often than it promises, by more than 3 standard errors, or if a check that
    must fail does not. A full run takes about half an hour on two processors.
    """
    page = output or (None if quick or only else PAGE)
    if page is not None:
        require_matplotlib()  # before half an hour of work
    count = paths or (QUICK_PATHS if quick else FULL_PATHS)
    cases = choose(quick=quick, only=only)
    measured = _measure(cases, paths=count, seed=seed, jobs=jobs, max_units=QUICK_UNITS if quick else None)
    if as_json:
        print_json(rows(measured))
    if page is not None:
        for file in write_page(measured, page, seed=seed, paths=count):
            click.echo(f"wrote {file}", err=True)
    _judge(measured)


def _measure(
    cases: Sequence[Case], *, paths: int, seed: int, jobs: int, max_units: int | None
) -> list[Measurement]:
    columns = (TextColumn("paths"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with Progress(*columns, console=console, transient=True) as display:
        task = display.add_task("chunks", total=None)

        def show(done: int, total: int, finished: Measurement | None) -> None:
            display.update(task, completed=done, total=total)
            if finished is not None:
                display.console.print(line(finished), markup=False)

        return measure(cases, paths=paths, seed=seed, jobs=jobs, max_units=max_units, progress=show)


def _judge(measured: Sequence[Measurement]) -> None:
    faults = complaints(measured)
    if faults:
        raise click.ClickException(
            "\n".join([f"{len(faults)} of {len(measured)} rows are not right", *faults])
        )
    click.echo(f"{len(measured)} rows are as they must be", err=True)
