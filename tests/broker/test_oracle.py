"""The oracle against statistics that stand on a broker."""

from __future__ import annotations

import gc
import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from click.testing import CliRunner
from oracle_world import published_part, with_one_more
from oracle_world import run as run_command

from stream_xp.adapters.kafka_admin import connect, declared_topics, ensure_topics
from stream_xp.cli import main
from stream_xp.domain.experiment import Arm, Direction, ExperimentSpec, Metric, MetricKind, Role
from stream_xp.domain.publication import next_record
from stream_xp.domain.statistics import ExperimentStatistics, PartitionStatistics, Progress
from stream_xp.errors import ConfigError, DependencyError
from stream_xp.services.oracle.explain import Effect, Suspect
from stream_xp.services.oracle.prefixes import rules_of
from stream_xp.services.oracle.reading import LogTruncatedError, open_reader
from stream_xp.services.oracle.recompute import LoggedRecord
from stream_xp.services.oracle.service import check, examine, read_specs
from stream_xp.services.replay.feed import Event, Feed, events_of
from stream_xp.services.replay.rows import Row
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stream_xp.adapters.embedded_broker import EmbeddedBroker
    from stream_xp.services.oracle.report import Difference

pytestmark = pytest.mark.broker

T = 1_750_000_000_000
SPEC = ExperimentSpec(
    experiment="exp",
    owner="team",
    hypothesis="better",
    unit="member",
    arms=(Arm(key="a", weight=0.5, control=True), Arm(key="b", weight=0.5)),
    metrics=(
        Metric(
            key="click",
            kind=MetricKind.CONVERSION,
            role=Role.PRIMARY,
            direction=Direction.INCREASE,
            attribution_window="1m",
        ),
    ),
    planned_sample=1000,
)


@pytest.fixture
def settings(embedded_broker: EmbeddedBroker) -> Settings:
    """Settings of an embedded broker with raw topics of 400 units in 4 partitions."""
    settings = Settings(bootstrap=embedded_broker.bootstrap, broker="embedded")
    with Feed(settings) as feed:
        for topic in ("experiments", "exposures", "rewards", "stats"):
            feed.partitions(settings.topic(topic))
        record = next_record(None, SPEC, effective_ms=T)
        feed.send(Event("experiments", T - 10_000, b"exp", msgspec.json.encode(record)))
        for n in range(400):
            rewards = (("click", 1.0),) if n % 7 == 0 else ()
            for event in events_of(Row(T + n, f"u{n}", "ab"[n % 2], rewards, ()), "exp"):
                feed.send(event)
    return settings


def true_statistics(settings: Settings, watermark_ms: int = T + 10**6) -> list[PartitionStatistics]:
    """What an engine without a fault would have published."""
    parts = []
    with open_reader(settings) as reader:
        specs = read_specs(reader, settings)
        for partition in reader.partitions(settings.topic("exposures")):
            logs = [reader.read_all(settings.topic(name), partition) for name in ("exposures", "rewards")]
            parts.append(
                published_part(
                    SPEC, *logs, specs, settings=settings, partition=partition, watermark_ms=watermark_ms
                )
            )
    return parts


def publish(settings: Settings, parts: list[PartitionStatistics]) -> None:
    with Feed(settings) as feed:
        for part in parts:
            key = f"exp/{part.partition}".encode()
            feed.send(Event("stats", T, key, msgspec.json.encode(part)))


def run(settings: Settings, *options: str) -> Any:
    return run_command("oracle", settings, *options)


def test_true_statistics_are_equal(settings: Settings) -> None:
    parts = true_statistics(settings)
    publish(settings, parts)
    report = check(settings)
    assert report.equal
    assert (report.checked, report.exposures, report.rewards) == (4, 400, 58)
    done = run(settings, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["equal"] is True


def test_only_the_newest_record_of_a_key_is_checked(settings: Settings) -> None:
    parts = true_statistics(settings)
    stale = [with_one_more(part) for part in true_statistics(settings, watermark_ms=T + 10**6 - 1)]
    publish(settings, [*parts, *stale])
    assert check(settings).equal


def test_one_click_too_many_is_named(settings: Settings) -> None:
    first, *rest = true_statistics(settings)
    publish(settings, [with_one_more(first), *rest])
    report = check(settings)
    assert not report.equal
    (found,) = report.differences
    assert (found.experiment, found.partition, found.what, found.metric, found.arm) == (
        "exp",
        0,
        "moments",
        "click",
        "a",
    )
    assert found.exposures.first == 0
    done = run(settings)
    assert done.exit_code == 1
    assert (
        "different: exp version 1, partition 0, metric click, arm a, epoch 0: moments: engine n="
        in done.stdout
    )


def test_a_record_left_out_is_named(settings: Settings) -> None:
    first, *rest = true_statistics(settings)
    fewer = msgspec.structs.replace(first.exposure_outcomes, counted=first.exposure_outcomes.counted - 1)
    publish(settings, [msgspec.structs.replace(first, exposure_outcomes=fewer), *rest])
    assert [one.what for one in check(settings).differences] == ["exposures counted"]


def test_a_watermark_behind_the_log_is_named(settings: Settings) -> None:
    first, *rest = true_statistics(settings)
    publish(settings, [msgspec.structs.replace(first, watermark_ms=T), *rest])
    assert [one.what for one in check(settings).differences] == ["watermark_ms"]


def test_offsets_beyond_the_log_are_an_error(settings: Settings) -> None:
    first, *rest = true_statistics(settings)
    ahead = msgspec.structs.replace(first, exposures=Progress(first_offset=0, applied_offset=5_000))
    publish(settings, [ahead, *rest])
    with pytest.raises(DependencyError, match=r"exposures\[0\] ends before"):
        check(settings)


def test_a_log_that_no_longer_reaches_back_is_an_error(settings: Settings) -> None:
    publish(settings, true_statistics(settings))
    with Feed(settings) as feed:
        for _ in range(300):
            # The embedded broker keeps about 5 MB of a partition and removes what is older.
            feed.send(Event("exposures", T, b"u0", b"x" * 100_000))
    with pytest.raises(LogTruncatedError, match="removed"):
        check(settings)
    assert run(settings).exit_code == 2


def test_no_statistics_are_no_success(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="nothing to check"):
        check(settings)


# What the oracle says of a difference: a worker that has published several times, and then lost or doubled one


SPEND = msgspec.structs.replace(
    SPEC,
    experiment="shop",
    metrics=(
        Metric(
            key="spend",
            kind=MetricKind.MEAN,
            role=Role.PRIMARY,
            direction=Direction.INCREASE,
            attribution_window="1m",
            scale=0.01,
            bound=1_000.0,
        ),
    ),
)


class Shop:
    """A source partition with a reward of its own value for each unit, and what a worker would say of it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        with open_reader(settings) as reader:
            self._specs = read_specs(reader, settings)
            self.exposures, self.rewards = (
                reader.read_all(settings.topic(topic), 0) for topic in ("exposures", "rewards")
            )

    def part(
        self,
        share: float = 1.0,
        *,
        lost: int | None = None,
        doubled: int | None = None,
        watermark_ms: int = T + 10**6,
        **changes: Any,
    ) -> PartitionStatistics:
        """The statistics of the first share of the records, one of which may be lost or counted twice."""
        exposures, rewards = (log[: int(len(log) * share)] for log in (self.exposures, self.rewards))
        whole = published_part(
            SPEND,
            exposures,
            rewards,
            self._specs,
            settings=self.settings,
            partition=0,
            watermark_ms=watermark_ms,
            counted=list(_with_fault(rewards, lost, doubled)),
            rules=rules_of(self.settings),
        )
        return msgspec.structs.replace(whole, **changes)

    def publish(self, *parts: PartitionStatistics) -> None:
        with Feed(self.settings) as feed:
            for part in parts:
                feed.send(Event("stats", T, f"{part.experiment}/0".encode(), msgspec.json.encode(part)))


def _with_fault(rewards: list[LoggedRecord], lost: int | None, doubled: int | None) -> Iterator[LoggedRecord]:
    for record in rewards:
        if record.offset != lost:
            yield record
        if record.offset == doubled:
            # What an engine sees that forgets it has applied a record: the same again, with no id in common.
            copy = {**json.loads(record.value or b"{}"), "id": "again"}
            yield record._replace(offset=10**6, value=json.dumps(copy).encode())


@pytest.fixture(params=["embedded", pytest.param("apache", marks=[pytest.mark.kafka, pytest.mark.slow])])
def shop(request: pytest.FixtureRequest, topic_prefix: str) -> Shop:
    """240 units in one source partition, on each kind of broker."""
    embedded = request.param == "embedded"
    bootstrap = (
        request.getfixturevalue("embedded_broker").bootstrap
        if embedded
        else request.getfixturevalue("apache_kafka")
    )
    settings = Settings(bootstrap=bootstrap, broker=request.param, prefix=topic_prefix, partitions=4)
    if not embedded:
        with connect(settings) as client:
            ensure_topics(client, declared_topics(settings, timestamp_type="CreateTime"))
    with Feed(settings) as feed:
        for topic in ("experiments", "exposures", "rewards", "stats"):
            feed.partitions(settings.topic(topic))
        record = next_record(None, SPEND, effective_ms=T)
        feed.send(Event("experiments", T - 10_000, b"shop", msgspec.json.encode(record)))
        for n in range(960):
            for event in events_of(Row(T + n, f"u{n}", "ab"[n % 2], (("spend", n / 100),), ()), "shop"):
                feed.send(event)
    return Shop(settings)


def difference_of(shop: Shop) -> Difference:
    (found,) = examine(shop.settings).differences
    return found


@pytest.mark.parametrize("effect", [Effect.LOST, Effect.DOUBLED])
def test_a_lost_or_doubled_reward_is_named_by_its_offset(shop: Shop, effect: Effect) -> None:
    offset = len(shop.rewards) // 2 + 3
    fault = {effect.value: offset}
    parts = [shop.part(share, **(fault if share > 0.5 else {})) for share in (0.1, 0.2, 0.5, 0.6, 0.8, 1.0)]
    # A worker that forgets a record it has read still counts it as read.
    right = [shop.part(share) for share in (0.1, 0.2, 0.5, 0.6, 0.8, 1.0)]
    shop.publish(
        *(
            msgspec.structs.replace(part, reward_outcomes=other.reward_outcomes)
            for part, other in zip(parts, right, strict=True)
        )
    )
    found = difference_of(shop)
    assert (found.experiment, found.what, found.metric, found.epoch) == ("shop", "moments", "spend", 0)
    assert found.arm in ("a", "b")
    assert found.narrowed is not None
    assert found.narrowed.records == 6
    assert found.narrowed.right is not None
    assert found.narrowed.right_until is not None
    assert found.narrowed.right_until.rewards == parts[2].rewards.applied_offset
    assert found.narrowed.wrong_until.rewards == parts[3].rewards.applied_offset
    assert found.narrowed.first.startswith(f"metric spend, arm {found.arm}, epoch 0: moments: engine n=")
    assert found.explanation is not None
    named = Suspect(effect=effect, topic="rewards", offset=offset, fate="counted")
    assert (found.explanation.suspects, found.explanation.more_suspects) == ((named,), 0)
    done = run(shop.settings)
    assert done.exit_code == 1
    text = {Effect.LOST: "is not counted", Effect.DOUBLED: "is counted twice"}[effect]
    assert f"rewards[0] offset {offset} {text}" in done.stdout
    shown = json.loads(run(shop.settings, "--json").stdout)
    assert shown["differences"][0]["explanation"]["suspects"][0]["offset"] == offset


def test_a_tampered_record_that_nothing_explains_is_named_by_the_offsets_of_its_cell(shop: Shop) -> None:
    shop.publish(shop.part(0.5), with_one_more(shop.part()))
    found = difference_of(shop)
    assert (found.what, found.metric, found.arm) == ("moments", "spend", "a")
    assert found.explanation is not None
    assert (found.explanation.suspects, found.explanation.prefix) == ((), None)
    assert found.explanation.exhaustive
    since = shop.part(0.5).rewards.applied_offset
    assert since is not None
    assert min(found.explanation.contributors.rewards) > since
    assert "no single record explains it" in run(shop.settings).stdout


def test_statistics_that_claim_more_than_was_counted_are_found_at_their_true_prefix(shop: Shop) -> None:
    part = shop.part()
    stale = shop.part(0.9)
    shop.publish(msgspec.structs.replace(part, statistics=stale.statistics))
    found = difference_of(shop)
    assert found.explanation is not None
    assert found.explanation.prefix is not None
    assert found.explanation.prefix.exposures == stale.exposures.applied_offset
    assert "explained to the byte by another prefix" in run(shop.settings).stdout


def test_the_workers_settings_count_and_are_said(shop: Shop) -> None:
    rules = msgspec.structs.replace(rules_of(shop.settings), activation_delay_ms=10_500)
    other = Shop(msgspec.structs.replace(shop.settings, activation_delay_ms=10_500))
    part = other.part(rules=rules)
    assert part.statistics != shop.part().statistics
    shop.publish(part)
    report = examine(shop.settings)
    assert report.equal
    assert "activation_delay_ms 10500 (here 5000)" in report.notes[0]
    assert "note: a worker's settings" in run(shop.settings).stdout


def test_a_record_that_names_no_settings_says_so_on_a_difference(shop: Shop) -> None:
    other = Shop(msgspec.structs.replace(shop.settings, activation_delay_ms=10_500))
    shop.publish(other.part(rules=None))
    found = difference_of(shop)
    assert "a worker with other settings looks like this" in found.notes[0]
    assert run(shop.settings, "--activation-delay-ms", "10500").exit_code == 0


def test_settings_that_changed_in_between_are_no_difference_that_anybody_can_judge(shop: Shop) -> None:
    other = Shop(msgspec.structs.replace(shop.settings, activation_delay_ms=10_500))
    rules = msgspec.structs.replace(rules_of(shop.settings), activation_delay_ms=10_500)
    shop.publish(shop.part(0.5), other.part(rules=rules, statistics=shop.part().statistics))
    (found,) = examine(shop.settings).differences
    assert found.unsure
    done = run(shop.settings)
    assert done.exit_code == 2
    assert done.stdout.splitlines()[-1].startswith("cannot say: 1 statistics records")


def test_an_experiment_without_statistics_is_named(shop: Shop) -> None:
    with Feed(shop.settings) as feed:
        spec = msgspec.structs.replace(SPEC, experiment="other")
        record = next_record(None, spec, effective_ms=T)
        feed.send(Event("experiments", T - 10_000, b"other", msgspec.json.encode(record)))
    mine = Shop(shop.settings)
    shop.publish(msgspec.structs.replace(mine.part(), experiment="other", statistics=ExperimentStatistics()))
    (found,) = examine(shop.settings).differences
    assert (found.experiment, found.what, found.engine, found.oracle) == (
        "shop",
        "statistics",
        "none",
        f"{len(shop.exposures)} units",
    )


def test_one_partition_that_cannot_be_checked_does_not_hide_the_others(shop: Shop) -> None:
    part = shop.part()
    beyond = msgspec.structs.replace(
        part, partition=1, rewards=Progress(first_offset=0, applied_offset=10**6)
    )
    with Feed(shop.settings) as feed:
        feed.send(Event("stats", T, b"shop/1", msgspec.json.encode(beyond)))
    shop.publish(part)
    report = examine(shop.settings)
    assert (report.equal, report.checked, report.differences) == (False, 1, ())
    assert [(one.partition, one.experiments) for one in report.unchecked] == [(1, ("shop",))]
    done = run(shop.settings)
    assert done.exit_code == 2
    assert "not checked: partition 1 (shop): " in done.stdout
    shop.publish(with_one_more(shop.part(watermark_ms=T + 10**6 + 1)))
    assert run(shop.settings).exit_code == 1


@pytest.mark.kafka
@pytest.mark.slow
def test_missing_topics_are_said_in_json_too(apache_kafka: str, topic_prefix: str) -> None:
    where = ["--bootstrap", apache_kafka, "--prefix", topic_prefix, "--json"]
    done = CliRunner().invoke(main, ["oracle", *where])
    assert done.exit_code == 2
    assert json.loads(done.stdout)["equal"] is None
    assert "has no topic" in json.loads(done.stdout)["reason"]


# kafka-python leaves the sockets of a connection that never came about to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_no_broker_is_one_line_and_exit_2() -> None:
    done = CliRunner().invoke(main, ["oracle", "--bootstrap", "127.0.0.1:1"])
    assert done.exit_code == 2
    assert len(done.stderr.strip().splitlines()) == 1
    gc.collect()
