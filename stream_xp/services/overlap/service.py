"""Reads the raw topics, counts, and says what was found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Metric
from stream_xp.domain.layer_rules import Relation, collisions, decisive, relation
from stream_xp.domain.statistics import PartitionStatistics
from stream_xp.engine.interactions import Interaction, PairEvidence, Table, interactions
from stream_xp.services.oracle.prefixes import (
    Logs,
    Prefix,
    earliest_watermark,
    prefix_of,
    rules_of,
    screened,
    unsaid_rules,
    within,
)
from stream_xp.services.oracle.reading import LogReader, ReadStep, open_reader
from stream_xp.services.oracle.recompute import EXPOSURES, REWARDS, LoggedSpec, Timeline
from stream_xp.services.oracle.service import Published, read_published, read_specs
from stream_xp.services.overlap.count import Counts, pairs, tested, untested
from stream_xp.services.overlap.report import (
    ArmsInteraction,
    ExperimentUnits,
    OverlapReport,
    Pair,
    PairInteraction,
)
from stream_xp.services.passed_over import PassedOver

if TYPE_CHECKING:
    from collections.abc import Callable

    from stream_xp.settings import Settings

ALPHA = 0.05
"""Chance that any pair is wrongly said to interact."""
_FOREVER_MS = 2**62


def overlaps(
    settings: Settings, *, alpha: float = ALPHA, progress: Callable[[ReadStep], None] | None = None
) -> OverlapReport:
    """Count which units the running experiments share, and test whether they interact.

    Running is what is neither archived nor concluded, whatever its activation delay. Where the worker has published
    statistics, exactly the records that they count are read, under its rules; else all that the log holds. Memory grows
    with the raw records of one source partition.

    Args:
        settings: brokers, prefix, and the rules of a worker that names none.
        alpha: family-wise error level of the interactions, in (0, 1).
        progress: told how far the reading has come.

    Raises:
        DependencyError: a broker did not answer, or a topic is missing.
    """
    with open_reader(settings, progress=progress) as reader, PassedOver() as passed_over:
        specs = read_specs(reader, settings, passed_over)
        running = _running(specs, settings)
        newest = _newest(read_published(reader, settings, passed_over))
        counts, read, notes = Counts(), dict.fromkeys((EXPOSURES, REWARDS), 0), []
        for partition in reader.partitions(settings.topic(EXPOSURES)):
            prefix, logs, note = _logs(reader, settings, partition=partition, counted=newest.get(partition))
            notes += note
            for topic, records in logs.items():
                read[topic] += len(records)
            counts.add(screened(prefix, logs, specs), running)
    return _report(running, counts, read=read, notes=notes, alpha=alpha)


def decisive_interactions(settings: Settings, spec: ExperimentSpec) -> list[str]:
    """The experiments whose proven interaction keeps a ship of this one from being approved; reads the raw topics.

    Raises:
        DependencyError: a broker did not answer, or a topic is missing.
    """
    if spec.overlap is None or not spec.overlap.decisive:
        return []
    mine = spec.experiment
    found = [
        pair
        for pair in overlaps(settings).pairs
        if mine in (pair.first, pair.second)
        and pair.interaction is not None
        and pair.interaction.found
        and mine in pair.interaction.decisive
    ]
    return [pair.second if pair.first == mine else pair.first for pair in found]


# --- reading ----------------------------------------------------------------------------------------------


def _running(specs: Sequence[LoggedSpec], settings: Settings) -> list[ExperimentRecord]:
    records = Timeline(specs, settings.activation_delay_ms).at(_FOREVER_MS).records
    return [one for _, one in sorted(records.items()) if one is not None and not one.epochs[-1].final]


def _newest(published: Sequence[Published]) -> dict[int, PartitionStatistics]:
    """The statistics record of each source partition that counts most of it."""
    newest: dict[int, PartitionStatistics] = {}
    for one in published:
        record = one.record
        held = newest.get(record.partition)
        if held is None or record.position()[1:] > held.position()[1:]:
            newest[record.partition] = record
    return newest


def _logs(
    reader: LogReader, settings: Settings, *, partition: int, counted: PartitionStatistics | None
) -> tuple[Prefix, Logs, list[str]]:
    """The records of a source partition that are counted, and what limits them."""
    logs: Logs = {topic: reader.read_all(settings.topic(topic), partition) for topic in (EXPOSURES, REWARDS)}
    notes = [
        f"{settings.topic(topic)}[{partition}] begins at offset {records[0].offset}: what came before is not counted"
        for topic, records in logs.items()
        if records and records[0].offset > 0
    ]
    if counted is not None:
        prefix = prefix_of(counted, unsaid_rules(settings))
        return prefix, within(prefix, logs), notes
    spans = {
        topic: (records[0].offset, records[-1].offset) if records else (None, None)
        for topic, records in logs.items()
    }
    whole = Prefix(
        partition=partition,
        exposures=spans[EXPOSURES],
        rewards=spans[REWARDS],
        watermark_ms=earliest_watermark(logs),
        allowed_lateness_ms=settings.allowed_lateness_ms,
        rules=rules_of(settings),
    )
    return whole, logs, notes


# --- saying -----------------------------------------------------------------------------------------------


def _report(
    running: Sequence[ExperimentRecord],
    counts: Counts,
    *,
    read: dict[str, int],
    notes: list[str],
    alpha: float,
) -> OverlapReport:
    specs = [record.spec for record in running]
    shares = {record.spec.experiment: _share(record) for record in running}
    free = [pair for pair in pairs(specs) if relation(*pair) is Relation.FREE]
    evidence = interactions([_tables(*pair, counts=counts) for pair in free], alpha=alpha)
    found = {
        (first.experiment, second.experiment): _interaction(first, second, evidence=one, alpha=alpha)
        for (first, second), one in zip(free, evidence, strict=True)
    }
    return OverlapReport(
        experiments=tuple(_experiment(spec, counts) for spec in specs),
        pairs=tuple(_pair(*pair, counts=counts, shares=shares, found=found) for pair in pairs(specs)),
        collisions=tuple(_collisions(specs)),
        exposures=read[EXPOSURES],
        rewards=read[REWARDS],
        notes=tuple(notes),
    )


def _share(record: ExperimentRecord) -> float:
    """Share of all units that can have come in: its slots, at the largest coverage it ever had."""
    layer = record.spec.layer
    slots = 1.0 if layer is None or record.spec.holdout else layer.share
    return slots * max(epoch.coverage for epoch in record.epochs)


def _experiment(spec: ExperimentSpec, counts: Counts) -> ExperimentUnits:
    layer, name = spec.layer, spec.experiment
    return ExperimentUnits(
        experiment=name,
        version=spec.version,
        layer=None if layer is None else layer.name,
        slots=() if layer is None else layer.slots,
        share=1.0 if layer is None else layer.share,
        units=counts.units[name],
        outside=counts.outside[name],
        held_out=counts.held_out[name],
    )


def _pair(
    first: ExperimentSpec,
    second: ExperimentSpec,
    *,
    counts: Counts,
    shares: dict[str, float],
    found: dict[tuple[str, str], PairInteraction],
) -> Pair:
    one, two = first.experiment, second.experiment
    between, shared = relation(first, second), counts.shared[one, two]
    apart = between in (Relation.DISJOINT, Relation.FORBIDDEN)
    expected = min(counts.units[one] * shares[two], counts.units[two] * shares[one])
    return Pair(
        first=one,
        second=two,
        relation=between,
        shared=shared,
        expected=0.0 if apart else expected,
        # Units that are held out are counted with the experiment: whether they are is not up to the pair.
        violations=shared if apart else 0,
        interaction=found.get((one, two)),
    )


def _tables(first: ExperimentSpec, second: ExperimentSpec, *, counts: Counts) -> list[Table]:
    pair = (first.experiment, second.experiment)
    return [
        Table(first, second, metric, counts.cells.get((pair, spec.experiment, metric.key), {}))
        for spec in (first, second)
        for metric in tested(spec)
    ]


def _interaction(
    first: ExperimentSpec, second: ExperimentSpec, *, evidence: PairEvidence, alpha: float
) -> PairInteraction:
    metrics = [(spec.experiment, metric) for spec in (first, second) for metric in tested(spec)]
    return PairInteraction(
        log_e=evidence.log_e,
        adjusted_log_e=evidence.log_adjusted,
        threshold_log_e=-math.log(alpha),
        found=evidence.found,
        decisive=tuple(
            one.experiment for one, other in ((first, second), (second, first)) if decisive(one, other)
        ),
        arms=tuple(
            _arms(experiment, metric, one)
            for (experiment, metric), table in zip(metrics, evidence.tables, strict=True)
            for one in table
        ),
        untested=tuple(
            f"{spec.experiment}: {metric.key}" for spec in (first, second) for metric in untested(spec)
        ),
    )


def _arms(experiment: str, metric: Metric, one: Interaction) -> ArmsInteraction:
    return ArmsInteraction(experiment=experiment, metric=metric.key, role=metric.role, **one._asdict())


def _collisions(specs: Sequence[ExperimentSpec]) -> list[str]:
    found = []
    for at, spec in enumerate(specs):
        beside = collisions(spec, specs[:at], complete=False)
        missing = [one for one in collisions(spec, specs, complete=True) if one.other is None]
        found += [f"{spec.experiment}: {one.message}" for one in (*beside, *missing)]
    return found
