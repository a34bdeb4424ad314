#!/usr/bin/env python3
"""Writes what topics/topics.yaml declares as KafkaTopic resources of Strimzi: a plain file, and the chart's template.

    python deploy/strimzi/generate.py --check    exits 1 if a file is not as generated
    python deploy/strimzi/generate.py --write    writes both

A template, because a text that is pasted into one keeps its numbers, which Helm would read as floating point.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from stream_xp.adapters.kafka_admin import Topic, load_topics

DEPLOY: Final = Path(__file__).resolve().parents[1]
PLAIN: Final = DEPLOY / "strimzi" / "topics.yaml"
TEMPLATE: Final = DEPLOY / "helm" / "stream-xp" / "templates" / "kafka-topics.yaml"
NOTE: Final = "# Generated from topics/topics.yaml by deploy/strimzi/generate.py --write; do not edit.\n"

PREFIX: Final = "xp."
PARTITIONS: Final = 12
REPLICAS: Final = 3
MIN_INSYNC: Final = 2

# Numbers that are no partitions of a topic, so that they can be told from those the declaration fixes.
_EVENTS: Final = 987_654
_INSYNC: Final = "min.insync.replicas"


def plain() -> str:
    """Return the resources for `kubectl apply`, with the numbers of a cluster of three brokers."""
    intro = (
        f"{NOTE}# For a Kafka resource of Strimzi named `kafka`; {PARTITIONS} partitions of exposures, rewards and "
        f"state, so\n# STREAM_XP_PARTITIONS={PARTITIONS}, STREAM_XP_REPLICATION={REPLICAS} and "
        f"STREAM_XP_MIN_INSYNC_REPLICAS={MIN_INSYNC} belong to it.\n"
    )
    topics = load_topics(PREFIX, PARTITIONS, replication=REPLICAS, min_insync_replicas=MIN_INSYNC)
    return intro + "".join(
        _resource(
            topic,
            head=f"  name: {topic.name}\n  labels:\n    strimzi.io/cluster: kafka\n",
            name=topic.name,
            partitions=str(topic.partitions),
            replicas=str(REPLICAS),
            insync=str(MIN_INSYNC),
        )
        for topic in topics
    )


def template() -> str:
    """Return the chart's template of the same resources."""
    intro = (
        '{{- if eq .Values.topics.mode "strimzi" }}\n'
        f"{NOTE}"
        "# Helm leaves them when the release is removed, because Strimzi would delete the topics with them.\n"
    )
    topics = load_topics("", _EVENTS, replication=1)
    head = (
        '  name: {{{{ include "stream-xp.fullname" . }}}}-{name}\n'
        "  {{{{- with .Values.topics.strimziNamespace }}}}\n"
        "  namespace: {{{{ . }}}}\n"
        "  {{{{- end }}}}\n"
        "  labels:\n"
        '    {{{{- include "stream-xp.labels" . | nindent 4 }}}}\n'
        '    strimzi.io/cluster: {{{{ required "topics.strimziCluster must be set" .Values.topics.strimziCluster }}}}\n'
        "  annotations:\n"
        "    helm.sh/resource-policy: keep\n"
    )
    resources = (
        _resource(
            topic,
            head=head.format(name=topic.name),
            name="{{ .Values.kafka.prefix }}" + topic.name,
            partitions="{{ .Values.kafka.partitions }}"
            if topic.partitions == _EVENTS
            else str(topic.partitions),
            replicas="{{ .Values.kafka.replication }}",
            insync="{{ .Values.kafka.minInsyncReplicas }}",
        )
        for topic in topics
    )
    return intro + "".join(resources) + "{{- end }}\n"


def _resource(topic: Topic, *, head: str, name: str, partitions: str, replicas: str, insync: str) -> str:
    config = {**topic.config, _INSYNC: insync}
    settings = "".join(f"    {key}: {value}\n" for key, value in sorted(config.items()))
    return (
        f"---\n# {topic.description}\napiVersion: kafka.strimzi.io/v1\nkind: KafkaTopic\nmetadata:\n{head}spec:\n"
        f"  topicName: {name}\n  partitions: {partitions}\n  replicas: {replicas}\n  config:\n{settings}"
    )


def generated() -> dict[Path, str]:
    """Return the text of every generated file."""
    return {PLAIN: plain(), TEMPLATE: template()}


@click.command()
@click.option(
    "--check", "action", flag_value="check", default=True, help="Exit 1 if a file is not as generated."
)
@click.option("--write", "action", flag_value="write", help="Write every file.")
def main(action: str) -> None:
    """Check or write the topics for Strimzi."""
    wrong = 0
    for file, text in generated().items():
        if action == "write":
            file.write_text(text, encoding="utf-8")
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            click.echo(
                f"{file.name}: not as generated; run python deploy/strimzi/generate.py --write", err=True
            )
            wrong += 1
    if wrong:
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
