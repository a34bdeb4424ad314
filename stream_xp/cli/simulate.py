"""`stream-xp simulate`: whole experiments through the engine, thousands of times, without a broker."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stream_xp import __version__
from stream_xp.cli.common import examples, json_option, print_json
from stream_xp.services.scenarios.harness import simulate as simulate_all
from stream_xp.services.scenarios.measures import check_claims
from stream_xp.services.scenarios.report import Results, complaints, lines, write_page
from stream_xp.services.scenarios.scenario import load_scenario

if TYPE_CHECKING:
    from stream_xp.services.scenarios.measures import Summary
    from stream_xp.services.scenarios.scenario import World


@click.command(
    epilog=examples(
        "stream-xp simulate examples/scenarios/healthy-canary.yaml",
        "stream-xp simulate --runs 2000 --processes 8 examples/scenarios/*.yaml",
    )
)
@click.argument(
    "files",
    metavar="SCENARIO...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "--runs", type=click.IntRange(2, 1_000_000), default=100, show_default=True, help="Runs of each scenario."
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=1, show_default=True, help="Of every number.")
@click.option(
    "--processes",
    type=click.IntRange(1, 256),
    default=os.cpu_count() or 1,
    show_default="processors",
    help="Processes; the result does not depend on it.",
)
@click.option(
    "--write",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="PAGE",
    help="Page of Markdown to write, with its results in a file .json beside it.",
)
@json_option
def simulate(
    files: tuple[Path, ...], *, runs: int, seed: int, processes: int, write: Path | None, as_json: bool
) -> None:
    """Run scenarios through the engine without a broker, and show what its decisions are worth.

    A scenario is a YAML file: an experiment, the truth about its arms, traffic, and what is claimed. Exits 1 if a claim
    does not hold, 2 if a file is not right.
    """
    worlds = [load_scenario(path) for path in files]
    for world in worlds:
        check_claims(world)
    summaries = _simulate(worlds, runs=runs, seed=seed, processes=processes)
    results = Results(
        runs=runs, seed=seed, version=__version__, numpy_version=np.__version__, scenarios=tuple(summaries)
    )
    if as_json:
        print_json(results)
    else:
        click.echo("\n".join(text for one in summaries for text in lines(one)))
    for file in write_page(results, write) if write is not None else []:
        click.echo(f"wrote {file}", err=True)
    faults = complaints(summaries)
    if faults:
        raise click.ClickException("\n".join(faults))


def _simulate(worlds: list[World], *, runs: int, seed: int, processes: int) -> list[Summary]:
    columns = (TextColumn("chunks"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with Progress(*columns, console=console, transient=True) as display:
        task = display.add_task("chunks", total=None)

        def show(done: int, total: int) -> None:
            display.update(task, completed=done, total=total)

        return simulate_all(worlds, runs=runs, seed=seed, processes=processes, progress=show)
