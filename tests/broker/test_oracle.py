"""The oracle against statistics that stand on a broker."""

from __future__ import annotations

import gc
import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from click.testing import CliRunner

from stream_xp.cli import main
from stream_xp.domain.codec import Limits
from stream_xp.domain.experiment import Arm, Direction, ExperimentSpec, Metric, MetricKind, Role
from stream_xp.domain.publication import next_record
from stream_xp.domain.statistics import PartitionStatistics, Progress
from stream_xp.errors import ConfigError, DependencyError
from stream_xp.services.oracle.reading import LogTruncatedError, open_reader
from stream_xp.services.oracle.recompute import recompute
from stream_xp.services.oracle.service import check, read_specs
from stream_xp.services.replay.feed import Event, Feed, events_of
from stream_xp.services.replay.rows import Row
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from stream_xp.adapters.embedded_broker import EmbeddedBroker

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
            done = recompute(
                *logs,
                specs,
                partition=partition,
                watermark_ms=watermark_ms,
                allowed_lateness_ms=settings.allowed_lateness_ms,
                activation_delay_ms=settings.activation_delay_ms,
                limits=Limits(),
                behind_watermark={},
            )
            progress = [Progress(first_offset=0, applied_offset=len(log) - 1) for log in logs]
            parts.append(
                PartitionStatistics(
                    experiment="exp",
                    version=1,
                    design_hash=SPEC.design_hash(),
                    partition=partition,
                    exposures=progress[0],
                    rewards=progress[1],
                    watermark_ms=watermark_ms,
                    allowed_lateness_ms=settings.allowed_lateness_ms,
                    statistics=done.statistics["exp", 1],
                    exposure_outcomes=done.exposure_outcomes,
                    reward_outcomes=done.reward_outcomes,
                )
            )
    return parts


def publish(settings: Settings, parts: list[PartitionStatistics]) -> None:
    with Feed(settings) as feed:
        for part in parts:
            key = f"exp/{part.partition}".encode()
            feed.send(Event("stats", T, key, msgspec.json.encode(part)))


def with_one_more_click(part: PartitionStatistics) -> PartitionStatistics:
    cell = part.statistics.moments[0]
    wrong = msgspec.structs.replace(cell, s=str(int(cell.s) + 1))
    moments = (wrong, *part.statistics.moments[1:])
    return msgspec.structs.replace(part, statistics=msgspec.structs.replace(part.statistics, moments=moments))


def run(settings: Settings, *options: str) -> Any:
    where = ["--bootstrap", settings.bootstrap, "--broker", "embedded", "--prefix", settings.prefix]
    return CliRunner().invoke(main, ["oracle", *where, *options])


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
    stale = [with_one_more_click(part) for part in true_statistics(settings, watermark_ms=T + 10**6 - 1)]
    publish(settings, [*parts, *stale])
    assert check(settings).equal


def test_one_click_too_many_is_named(settings: Settings) -> None:
    first, *rest = true_statistics(settings)
    publish(settings, [with_one_more_click(first), *rest])
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


# kafka-python leaves the sockets of a connection that never came about to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_no_broker_is_one_line_and_exit_2() -> None:
    done = CliRunner().invoke(main, ["oracle", "--bootstrap", "127.0.0.1:1"])
    assert done.exit_code == 2
    assert len(done.stderr.strip().splitlines()) == 1
    gc.collect()
