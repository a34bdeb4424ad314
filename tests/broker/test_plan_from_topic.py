"""`stream-xp plan` with baselines from the topic."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from click.testing import CliRunner, Result

from stream_xp.adapters.topic_writer import TopicWriter
from stream_xp.cli import main
from stream_xp.domain.experiment import ExperimentRecord, WeightEpoch
from stream_xp.domain.statistics import Outcomes, PartitionStatistics, Progress, build
from stream_xp.services.spec_file import load_spec
from stream_xp.settings import Settings

if TYPE_CHECKING:
    from stream_xp.adapters.embedded_broker import EmbeddedBroker

pytestmark = pytest.mark.broker

CANARY = str(Path(__file__).parents[2] / "examples" / "canary" / "spec.yaml")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments])


def test_baselines_from_the_topic(embedded_broker: EmbeddedBroker) -> None:
    settings = Settings(bootstrap=embedded_broker.bootstrap, broker="embedded")
    spec = load_spec(CANARY)
    epoch = WeightEpoch(epoch=0, weights=spec.weights, effective_ms=0)
    record = ExperimentRecord(spec=spec, epochs=(epoch,), design_hash=spec.design_hash())
    with TopicWriter(settings) as writer:
        send(writer, settings, "experiments", spec.experiment, record)
        for number, units in ((0, 500), (1, 1_000), (0, 3_000)):
            part = part_of(record, number, units)
            send(writer, settings, "stats", f"{spec.experiment}/{number}", part)
    arguments = ("--from-topic", "--bootstrap", settings.bootstrap, "--broker", "embedded")
    result = run(CANARY, *arguments)
    assert result.exit_code == 0, result.output
    # The newest of each partition, merged: 3,000 and 1,000 units.
    assert "baseline: rate=0.02 (checkout-canary version 1, 4,000 units of stable)" in result.stdout
    missing = run(CANARY, *arguments, "--from-experiment", "other")
    assert missing.exit_code == 2
    assert "other: no statistics on xp.stats" in missing.stderr


def test_what_is_no_record_is_passed_over_and_said_once(
    embedded_broker: EmbeddedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(bootstrap=embedded_broker.bootstrap, broker="embedded")
    spec = load_spec(CANARY)
    epoch = WeightEpoch(epoch=0, weights=spec.weights, effective_ms=0)
    record = ExperimentRecord(spec=spec, epochs=(epoch,), design_hash=spec.design_hash())
    with TopicWriter(settings) as writer:
        send(writer, settings, "experiments", spec.experiment, record)
        send(writer, settings, "stats", f"{spec.experiment}/0", part_of(record, 0, 3_000))
        for topic, key in (("experiments", spec.experiment), ("stats", f"{spec.experiment}/0")):
            for value in (b"{", b"\xff", b"[" * 5_000):
                writer.send(settings.topic(topic), key=key.encode(), value=value)
    result = run(CANARY, "--from-topic", "--bootstrap", settings.bootstrap, "--broker", "embedded")
    assert result.exit_code == 0, result.output
    assert "baseline: rate=0.02 (checkout-canary version 1, 3,000 units of stable)" in result.stdout
    said = [line for line in caplog.messages if line.startswith("passed over: ")]
    assert [re.search(r"xp.\w+", line).group() for line in said] == ["xp.experiments", "xp.stats"] * 2
    assert ["3 records of" in line for line in said] == [False, False, True, True]


def send(writer: TopicWriter, settings: Settings, topic: str, key: str, record: msgspec.Struct) -> None:
    writer.send(settings.topic(topic), key=key.encode(), value=msgspec.json.encode(record))


def part_of(record: ExperimentRecord, number: int, units: int) -> PartitionStatistics:
    errors = units // 50
    return PartitionStatistics(
        experiment=record.spec.experiment,
        version=1,
        design_hash=record.design_hash,
        partition=number,
        exposures=Progress(first_offset=0, applied_offset=units),
        rewards=Progress(first_offset=0, applied_offset=errors),
        watermark_ms=units,
        allowed_lateness_ms=0,
        statistics=build(
            units={("stable", 0, ""): units},
            moments={("errors", "stable", 0, ""): (units, errors, errors)},
            crossover_units=0,
            first_exposure_ms=0,
            out_of_range={},
        ),
        exposure_outcomes=Outcomes(),
        reward_outcomes=Outcomes(),
    )
