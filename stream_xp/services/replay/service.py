"""Replays a file of impressions through a broker and the service, as if it happened now.

The records carry the times of the file, and the service runs on a clock that stands at the newest of them.
The clock moves only when the service has applied everything that was sent before: moved any earlier, it
would let the watermark of a partition pass records that are still on their way.
"""

from __future__ import annotations

import random
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from stream_xp.adapters.clock import ManualClock
from stream_xp.adapters.embedded_broker import EmbeddedBroker
from stream_xp.adapters.kafka_admin import connect, create_topics, declared_topics
from stream_xp.domain.publication import next_record
from stream_xp.errors import ConfigError
from stream_xp.services.oracle.reading import LogTruncatedError
from stream_xp.services.oracle.service import check
from stream_xp.services.replay.feed import Event, Feed, Watch, batches, events_of
from stream_xp.services.replay.report import build_report
from stream_xp.services.worker import WorkerThread
from stream_xp.settings import KafkaSecurity, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from stream_xp.adapters.kafka_admin import Topic
    from stream_xp.domain.decision import Result
    from stream_xp.domain.experiment import ExperimentSpec
    from stream_xp.domain.statistics import PartitionStatistics
    from stream_xp.services.oracle.service import OracleReport
    from stream_xp.services.replay.rows import Row

BATCH_ROWS = (1_000, 3_000)
"""Bounds of a batch; the largest is far below what the embedded broker keeps of a partition."""
FLUSH_INTERVAL_MS = 50
"""How often the service publishes here; the replay waits for it after each batch."""
SPARE_MS = 1_000


class _Outcome(NamedTuple):
    parts: list[PartitionStatistics]
    result: Result


@contextmanager
def embedded(settings: Settings) -> Iterator[Settings]:
    """Start an embedded broker with all topics; gives the settings that lead to it."""
    with EmbeddedBroker() as broker:
        here = msgspec.structs.replace(
            settings,
            bootstrap=broker.bootstrap,
            broker="embedded",
            replication=1,
            min_insync_replicas=1,
            security=KafkaSecurity(),
        )
        for topic in _topics(here):
            broker.create_topic(topic.name, topic.partitions)
        yield here


def own_run(settings: Settings) -> Settings:
    """Return settings with topics and a consumer group that no other run has."""
    run = f"replay-{uuid.uuid4().hex[:8]}"
    return msgspec.structs.replace(
        settings,
        prefix=f"{run}.",
        group_id=run,
        flush_interval_ms=FLUSH_INTERVAL_MS,
        roles=("ingest", "decide"),
    )


def replay(
    spec: ExperimentSpec,
    rows: Sequence[Row],
    settings: Settings,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Send the rows, in the order of time, through the broker and the service; return the report.

    `settings` must have a prefix of its own (`own_run`). `seed` decides where the rows are cut into batches,
    on which no statistic depends. `progress` gets rows applied and rows in all.

    Raises:
        ConfigError: there are no rows.
        DependencyError: the broker or the service did not go on in time.

    """
    if not rows:
        raise ConfigError("there are no rows to replay")
    if settings.broker != "embedded":
        with connect(settings) as client:
            create_topics(client, _topics(settings))
    outcome = _run(spec, rows, settings, seed=seed, progress=progress or (lambda _done, _total: None))
    report = build_report(spec, outcome.parts, outcome.result)
    return {**report, "broker": settings.broker, "prefix": settings.prefix, **_oracle(settings)}


def _run(
    spec: ExperimentSpec,
    rows: Sequence[Row],
    settings: Settings,
    *,
    seed: int,
    progress: Callable[[int, int], None],
) -> _Outcome:
    clock = ManualClock(rows[0].time_ms)
    with Feed(settings) as feed:
        for topic in _topics(settings):
            # On an embedded broker this makes the topic, which has to be there before anybody reads it.
            if feed.partitions(topic.name) != topic.partitions:
                raise ConfigError(f"{topic.name} must have {topic.partitions} partitions")
        feed.send(_spec_record(spec, settings, first_ms=rows[0].time_ms))
        feed.flush()
        feed.newest.clear()
        with (
            WorkerThread(settings, clock=clock, topics=_topics(settings)) as worker,
            Watch(settings, spec.experiment, still_running=worker.check) as watch,
        ):
            done = 0
            for batch in batches(rows, _sizes(seed)):
                for row in batch:
                    for event in events_of(row, spec.experiment):
                        feed.send(event)
                feed.flush()
                watch.until_applied(feed.newest)
                clock.advance_to(batch[-1].time_ms)
                done += len(batch)
                progress(done, len(rows))
            complete_ms = _complete_ms(spec, settings, rows[-1].time_ms)
            clock.advance_to(complete_ms + settings.idle_grace_ms + SPARE_MS)
            result = watch.until_settled(feed.newest, complete_ms)
            return _Outcome(watch.parts, result)


def _topics(settings: Settings) -> tuple[Topic, ...]:
    """Return the topics of a replay: they keep the producer's timestamps, and their records for ever."""
    return declared_topics(settings, timestamp_type="CreateTime")


def _sizes(seed: int) -> Iterator[int]:
    dice = random.Random(seed)  # noqa: S311 (no secret)
    while True:
        yield dice.randint(*BATCH_ROWS)


def _complete_ms(spec: ExperimentSpec, settings: Settings, last_ms: int) -> int:
    """Return the watermark at which every unit is mature."""
    return last_ms + spec.longest_window_ms + settings.allowed_lateness_ms


def _spec_record(spec: ExperimentSpec, settings: Settings, *, first_ms: int) -> Event:
    """Return the record that puts the experiment in force just before the first row."""
    published_ms = first_ms - settings.activation_delay_ms - SPARE_MS
    record = next_record(None, spec, effective_ms=published_ms)
    return Event("experiments", published_ms, spec.experiment.encode(), msgspec.json.encode(record))


def _oracle(settings: Settings) -> dict[str, Any]:
    try:
        found: OracleReport = check(settings)
    except LogTruncatedError as error:
        # The embedded broker keeps about 5 MB of a partition.
        return {"oracle": "impossible", "oracle_differences": [str(error)]}
    differences = [str(difference) for difference in found.differences]
    return {"oracle": "equal" if found.equal else "different", "oracle_differences": differences}
