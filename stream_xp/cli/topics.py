"""`stream-xp topics`: create, check and show the topics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stream_xp.adapters.kafka_admin import (
    Topic,
    check_topics,
    connect,
    create_topics,
    declared_topics,
)
from stream_xp.cli.common import (
    EXIT_FAILED,
    CommandGroup,
    examples,
    json_option,
    print_json,
    with_settings,
)

if TYPE_CHECKING:
    from stream_xp.settings import Settings

topic_settings = with_settings("bootstrap", "prefix", "partitions", "replication", "min_insync_replicas")


@click.group(
    cls=CommandGroup,
    epilog=examples(
        "stream-xp topics create --bootstrap kafka-1:9092 --replication 3 --min-insync-replicas 2",
        "stream-xp topics check --json",
        "stream-xp topics show",
    ),
)
def topics() -> None:
    """Create, check and show the topics that stream_xp needs."""


@topics.command(
    epilog=examples(
        "stream-xp topics create",
        "stream-xp topics create --prefix staging.xp. --partitions 12 --replication 3",
    )
)
@topic_settings
@json_option
def create(settings: Settings, *, as_json: bool) -> None:
    """Create the topics that are missing; leave the others as they are.

    A topic that exists with other settings is not touched: `stream-xp topics check` names what differs.
    """
    with connect(settings) as client:
        creation = create_topics(client, declared_topics(settings))
    if as_json:
        print_json(creation)
        return
    for name in creation.created:
        click.echo(f"created  {name}")
    for name in creation.existing:
        click.echo(f"exists   {name}")


@topics.command(epilog=examples("stream-xp topics check", "stream-xp topics check --json | jq '.[].topic'"))
@topic_settings
@json_option
def check(settings: Settings, *, as_json: bool) -> None:
    """Compare the broker's topics with the declaration; exit 1 and name every difference."""
    declared = declared_topics(settings)
    with connect(settings) as client:
        drifts = check_topics(client, declared)
    if as_json:
        print_json(drifts)
    elif drifts:
        for drift in drifts:
            click.echo(str(drift))
    else:
        click.echo(f"{len(declared)} topics are as declared")
    if drifts:
        raise click.exceptions.Exit(EXIT_FAILED)


@topics.command(epilog=examples("stream-xp topics show", "stream-xp topics show --partitions 12 --json"))
@topic_settings
@json_option
def show(settings: Settings, *, as_json: bool) -> None:
    """Print the declared topics; asks no broker."""
    declared = declared_topics(settings)
    if as_json:
        print_json(declared)
        return
    click.echo("\n\n".join(_describe(topic) for topic in declared))


def _describe(topic: Topic) -> str:
    lines = [
        topic.name,
        f"  {topic.description}",
        f"  key: {topic.key}",
        f"  partitions: {topic.partitions}, replication: {topic.replication}",
        *(f"  {name}: {value}" for name, value in sorted(topic.config.items())),
    ]
    return "\n".join(lines)
