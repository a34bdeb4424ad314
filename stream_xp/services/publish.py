"""Puts an experiment spec on Kafka: the record the engine follows, and the one applications follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from stream_xp.adapters.topic_reader import TopicReader, TopicRecord
from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.domain.codec import decode_own
from stream_xp.domain.decision import ConfigRecord
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec, Status
from stream_xp.domain.experiment_rules import record_rules
from stream_xp.domain.layer_rules import Collision, collisions, no_champion
from stream_xp.domain.publication import archived_record, next_config, next_record
from stream_xp.engine.registry import Entry, Registry
from stream_xp.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stream_xp.settings import Settings

Record = TypeVar("Record", ExperimentRecord, ConfigRecord)


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """What stands on the topics for one experiment, and what should.

    Attributes:
        before, after: the experiment record.
        config_before, config_after: the config record; None where an archived experiment never had one.
    """

    before: ExperimentRecord | None
    after: ExperimentRecord
    config_before: ConfigRecord | None
    config_after: ConfigRecord | None

    def changes(self) -> tuple[str, ...]:
        """Return one sentence for each thing that changes; none if all stands already."""
        return tuple(_changes(self))


def plan_application(settings: Settings, spec: ExperimentSpec, *, now_ms: int) -> Publication:
    """Return what applying `spec` now would publish.

    New weights take effect when the engine knows of them, by whatever clock: after the activation delay, and as long
    again as clocks may be apart.

    Raises:
        Collides: it cannot run beside the experiments that stand there.
        ConfigError: see `domain.publication`; or a topic is missing.
        DependencyError: a broker did not answer.
    """
    known = known_records(settings)
    before, config_before = published(settings, spec.experiment)
    # What stands there already stands beside the others, and what is archived stays so until its version rises.
    if before is None or before.design_hash != spec.design_hash():
        _refuse_collisions(settings, spec, known)
    after = next_record(before, spec, effective_ms=now_ms + settings.lead_ms)
    config_after = next_config(config_before, after)
    return Publication(before=before, after=after, config_before=config_before, config_after=config_after)


class Collides(ConfigError):
    """An experiment cannot run beside others, or its champion is none.

    Attributes:
        found: all that keeps it from it.
        where: the topic that the others stand on; and what became of a version that was already written.
    """

    def __init__(
        self, experiment: str, found: Sequence[Collision], where: str, *, withdrawn: int | None = None
    ) -> None:
        self.found = tuple(found)
        self.where = where
        if withdrawn is not None:
            self.where += (
                f", applied at the same time; version {withdrawn} is archived and was shown to nobody, "
                f"raise `version` to {withdrawn + 1} to apply again"
            )
        super().__init__(f"{experiment}: {'; '.join(one.message for one in found)} ({self.where})")


class Known(NamedTuple):
    """What stands on the topic of experiments.

    Attributes:
        newest: of each experiment the record that the engine goes by.
        versions: of each version the record with most weight epochs, as far as the topic still holds it.
    """

    newest: dict[str, ExperimentRecord]
    versions: dict[tuple[str, int], ExperimentRecord]

    @property
    def running(self) -> list[ExperimentSpec]:
        """The experiments that are not archived; one that was stopped or shipped keeps its slots, it can be reset."""
        return [record.spec for record in self.newest.values() if record.status is Status.ACTIVE]


def known_records(settings: Settings) -> Known:
    """Return the experiments that the engine goes by; a record that it refuses is passed over.

    Raises:
        ConfigError: the topic is missing.
        DependencyError: a broker did not answer.
    """
    registry, topic = Registry(), settings.topic("experiments")
    newest: dict[str, ExperimentRecord] = {}
    versions: dict[tuple[str, int], ExperimentRecord] = {}
    with TopicReader(settings, topic) as reader:
        for one in reader.backlog():
            experiment, found = (one.key or b"").decode(errors="replace"), _decoded(one, ExperimentRecord)
            if isinstance(found, ConfigError) or (found is not None and record_rules(found, experiment)):
                continue
            if registry.add([_entry(settings, one, experiment, found)]):
                continue
            if found is None:
                newest.pop(experiment, None)
                continue
            newest[experiment] = found
            version = (experiment, found.spec.version)
            held = versions.get(version)
            if held is None or len(found.epochs) >= len(held.epochs):
                versions[version] = found
    return Known(newest, versions)


def _refuse_collisions(settings: Settings, spec: ExperimentSpec, known: Known) -> None:
    found = collisions(spec, known.running, complete=True) + _champion_collisions(spec, known)
    if found:
        raise Collides(spec.experiment, found, settings.topic("experiments"))


def _champion_collisions(spec: ExperimentSpec, known: Known) -> list[Collision]:
    champion = spec.champion
    if champion is None:
        return []
    record = known.versions.get((champion.experiment, champion.version))
    message = no_champion(champion, record)
    return [] if message is None else [Collision(path=("champion",), message=message)]


def plan_archiving(settings: Settings, experiment: str) -> Publication:
    """Return what archiving `experiment` would publish; its weights stay as they are.

    Raises:
        ConfigError: there is no such experiment; or a topic is missing.
        DependencyError: a broker did not answer.
    """
    before, config = published(settings, experiment)
    if before is None:
        raise ConfigError(f"{experiment}: no such experiment on {settings.topic('experiments')}")
    after = archived_record(before)
    return Publication(before=before, after=after, config_before=config, config_after=config)


def publish(settings: Settings, publication: Publication) -> None:
    """Write what differs; the experiment first, so that the engine knows an epoch before it is drawn from.

    Two people who apply at the same time pass each other's checks, so a new design is held against the topic again
    once it stands there, before any application hears of it. Whoever writes second finds the other one.

    Raises:
        Collides: another experiment came to the topic meanwhile; this one is archived, and was shown to nobody.
        ConfigError: another design of the experiment came to the topic first.
        DependencyError: a record was not acknowledged.
    """
    before, after = publication.before, publication.after
    config = publication.config_after
    with TopicWriter(settings) as writer:
        if after != before:
            _write(settings, writer, "experiments", after)
            if before is None or before.design_hash != after.design_hash:
                _stand_by(settings, writer, after)
        if config is not None and config != publication.config_before:
            _write(settings, writer, "config", config)


def _write(
    settings: Settings, writer: TopicWriter, topic: str, record: ExperimentRecord | ConfigRecord
) -> None:
    spec = record.spec if isinstance(record, ExperimentRecord) else record
    writer.send(settings.topic(topic), key=spec.experiment.encode(), value=msgspec.json.encode(record))
    writer.flush()


def _stand_by(settings: Settings, writer: TopicWriter, after: ExperimentRecord) -> None:
    """Hold a design that was written against all that stands there now; take it back if it may not be there."""
    spec, known = after.spec, known_records(settings)
    there = known.newest.get(spec.experiment)
    if there is None or there.design_hash != after.design_hash:
        held = "none" if there is None else f"another design, version {there.spec.version}"
        raise ConfigError(
            f"{spec.experiment}: {settings.topic('experiments')} was written by somebody else at the same time, and "
            f"{held}, is in force; version {spec.version} was not published to applications"
        )
    try:
        _refuse_collisions(settings, spec, known)
    except Collides as error:
        _write(settings, writer, "experiments", archived_record(after))
        raise Collides(spec.experiment, error.found, error.where, withdrawn=spec.version) from error


def published(settings: Settings, experiment: str) -> tuple[ExperimentRecord | None, ConfigRecord | None]:
    """Return the experiment record that the engine goes by, and the config that applications follow.

    Raises:
        ConfigError: a topic is missing, or the newest record cannot be read.
        DependencyError: a broker did not answer.
    """
    return _experiment(settings, experiment), _config(settings, experiment)


def _experiment(settings: Settings, experiment: str) -> ExperimentRecord | None:
    """The record that the engine goes by: the last one that it does not refuse."""
    registry = Registry()
    believed: ExperimentRecord | None = None
    unread: ConfigError | None = None
    for record in _records(settings, "experiments", experiment):
        found = _decoded(record, ExperimentRecord)
        if isinstance(found, ConfigError):
            unread = found
            continue
        if not registry.add([_entry(settings, record, experiment, found)]):
            believed, unread = found, None
    return _believed(believed, unread)


def _entry(settings: Settings, record: TopicRecord, experiment: str, found: ExperimentRecord | None) -> Entry:
    return Entry(
        offset=record.offset,
        experiment=experiment,
        in_force_ms=record.log_time_ms + settings.activation_delay_ms,
        record=found,
    )


def _config(settings: Settings, experiment: str) -> ConfigRecord | None:
    """The config of the highest version: a worker that has lost its partitions can still write an older one last."""
    believed: ConfigRecord | None = None
    unread: ConfigError | None = None
    for record in _records(settings, "config", experiment):
        found = _decoded(record, ConfigRecord)
        if isinstance(found, ConfigError):
            unread = found
        elif found is None or believed is None or found.config_version >= believed.config_version:
            believed, unread = found, None
    return _believed(believed, unread)


def _believed(record: Record | None, unread: ConfigError | None) -> Record | None:
    """The record, if none came after it that cannot be read.

    One that was written by a newer release must not be replaced unread: that could undo what it says.
    """
    if unread is not None:
        raise unread
    return record


def _records(settings: Settings, topic: str, experiment: str) -> Iterator[TopicRecord]:
    key = experiment.encode()
    with TopicReader(settings, settings.topic(topic)) as reader:
        for record in reader.backlog():
            if record.key == key:
                yield record


def _decoded(record: TopicRecord, kind: type[Record]) -> Record | ConfigError | None:
    """What a record says: None for a tombstone, the error of one that cannot be read."""
    if record.value is None:
        return None
    try:
        return decode_own(record.value, kind)
    except ConfigError as error:
        return ConfigError(f"{record.place} is {error}")


def _changes(publication: Publication) -> list[str]:
    before, after = publication.before, publication.after
    config = publication.config_after
    if before is None:
        changes = [f"new experiment, version {after.spec.version}{_begun_with(after)}"]
    elif after.spec.version > before.spec.version:
        changes = [f"new version {after.spec.version}, in place of {before.spec.version}{_begun_with(after)}"]
    else:
        changes = _changes_of_version(before, after)
    if config is not None and config != publication.config_before:
        changes.append(f"applications follow config version {config.config_version}, {config.status}")
    return changes


def _begun_with(after: ExperimentRecord) -> str:
    coverage = after.epochs[-1].coverage
    return "" if coverage == 1.0 else f", for {coverage:.4g} of all units at first"


def _changes_of_version(before: ExperimentRecord, after: ExperimentRecord) -> list[str]:
    changes = []
    if after.epochs != before.epochs:
        epoch = after.epochs[-1]
        weights = ", ".join(f"{arm} {weight:g}" for arm, weight in epoch.weights.items())
        part = "" if epoch.coverage == 1.0 else f", for {epoch.coverage:.4g} of all units"
        changes.append(f"weight epoch {epoch.epoch}: {weights}{part}")
    if after.spec != before.spec and after.epochs == before.epochs:
        changes.append("owner or hypothesis")
    if after.status is Status.ARCHIVED and before.status is not Status.ARCHIVED:
        changes.append("archived: the engine takes no more events for it")
    return changes
