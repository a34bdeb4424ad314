"""`stream-xp health`: whether the worker beside it goes on."""

from __future__ import annotations

import os
from pathlib import Path

import click

from stream_xp.adapters import health_file
from stream_xp.cli.common import EXIT_FAILED, examples, json_option, print_json
from stream_xp.errors import ConfigError
from stream_xp.settings import Settings, variable_of


@click.command(epilog=examples("stream-xp health", "stream-xp health --max-age 60"))
@click.option(
    "--max-age",
    "max_age_s",
    metavar="S",
    type=click.FloatRange(min=1),
    default=30.0,
    show_default=True,
    help="Oldest sign of progress that counts, seconds.",
)
@json_option
def health(*, max_age_s: float, as_json: bool) -> None:
    """Exit 0 if the worker that writes STREAM_XP_HEALTH_FILE goes on, 1 if not.

    A worker touches the file while it evaluates, and while no partition that has more to read has applied nothing
    for half a minute. Asks no broker.
    """
    path = Settings.load(os.environ).health_file
    if path is None:
        raise ConfigError(f"{variable_of('health_file')} is not set, so no worker writes it")
    age_s = health_file.age_s(Path(path))
    healthy = age_s <= max_age_s
    if as_json:
        print_json({"healthy": healthy, "age_s": round(age_s, 3), "max_age_s": max_age_s})
    else:
        click.echo(f"the worker went on {age_s:.0f} s ago{'' if healthy else f', over {max_age_s:g}'}")
    if not healthy:
        raise click.exceptions.Exit(EXIT_FAILED)
