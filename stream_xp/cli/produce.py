"""`stream-xp produce`: send exposures and rewards."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, BinaryIO

import click
import msgspec
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.cli.common import EXIT_FAILED, examples, json_option, print_json, with_settings
from stream_xp.domain.codec import Limits
from stream_xp.errors import ConfigError
from stream_xp.services.event_lines import BadLine, EventLine, read_events

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stream_xp.settings import Settings

REPORT_EVERY = 100
_TOPICS = {"exposure": "exposures", "reward": "rewards"}


class Produced(msgspec.Struct, kw_only=True):
    """How many lines became records, and how many did not."""

    exposures: int = 0
    rewards: int = 0
    bad_lines: int = 0


@click.command(
    epilog=examples(
        "stream-xp produce events.ndjson",
        "head -1 events.ndjson | stream-xp produce --now",
        "zcat events.ndjson.gz | stream-xp produce - --strict --json",
    ),
)
@with_settings("bootstrap", "broker", "prefix")
@click.argument("file", default="-", type=click.File("rb"))
@click.option("--now", "fill_time", is_flag=True, help="Give events without `time` the present time.")
@click.option("--strict", is_flag=True, help="Stop at the first bad line.")
@json_option
def produce(settings: Settings, *, file: BinaryIO, fill_time: bool, strict: bool, as_json: bool) -> None:
    """Send exposures and rewards: one JSON object a line, from FILE or standard input (-).

    `type` says exposure or reward; without it, `arm` makes an exposure and `metric` a reward. Each line is
    checked as the worker would; a bad one is named on standard error and passed over, and the exit code
    is 1.
    """
    produced = Produced()
    limits = Limits(settings.max_record_bytes, settings.future_tolerance_ms)
    # An event may be new as long as the file is read, so the clock is asked for each.
    events = read_events(file, limits, now_ms=_now_ms, fill_time=fill_time)
    with TopicWriter(settings) as writer:
        _check_partitions(settings, writer)
        for event in _with_progress(events):
            if isinstance(event, EventLine):
                _send(settings, writer, event, produced)
                continue
            produced.bad_lines += 1
            _report(file, event)
            if strict:
                break
    _summarise(produced, as_json=as_json)
    if produced.bad_lines:
        raise click.exceptions.Exit(EXIT_FAILED)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _check_partitions(settings: Settings, writer: TopicWriter) -> None:
    """Refuse two topics that cannot be joined: a unit must have one partition number in both."""
    exposures, rewards = (writer.partitions(settings.topic(name)) for name in ("exposures", "rewards"))
    if exposures != rewards:
        raise ConfigError(
            f"{settings.topic('exposures')} has {exposures} partitions and {settings.topic('rewards')} "
            f"{rewards}; they must have the same number to be joined"
        )


def _send(settings: Settings, writer: TopicWriter, event: EventLine, produced: Produced) -> None:
    writer.send(settings.topic(_TOPICS[event.kind]), key=event.key, value=event.value)
    if event.kind == "exposure":
        produced.exposures += 1
    else:
        produced.rewards += 1


def _with_progress(events: Iterator[EventLine | BadLine]) -> Iterator[EventLine | BadLine]:
    """Give the events, with a running count on standard error where a person looks at it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.completed:,.0f} lines"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("produce")
        for count, event in enumerate(events, start=1):
            yield event
            if count % REPORT_EVERY == 0:
                progress.update(task, completed=count)


def _report(file: BinaryIO, bad: BadLine) -> None:
    name = "-" if file is sys.stdin.buffer else getattr(file, "name", "-")
    click.echo(f"{name}:{bad.number}: {bad.message}", err=True)


def _summarise(produced: Produced, *, as_json: bool) -> None:
    if as_json:
        print_json(produced)
        return
    click.echo(
        f"sent {produced.exposures} exposures and {produced.rewards} rewards; {produced.bad_lines} bad lines"
    )
