"""What is no record is passed over, but never in silence."""

from __future__ import annotations

import logging

import msgspec
import pytest

from stream_xp.adapters.kafka_admin import topics_dir
from stream_xp.domain.decision import Result
from stream_xp.domain.statistics import PartitionStatistics
from stream_xp.services.passed_over import PassedOver, log

GOLDEN = topics_dir() / "golden"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, log.name)
    return caplog


def test_the_first_of_a_topic_is_said_at_once_and_the_number_at_the_end(
    said: pytest.LogCaptureFixture,
) -> None:
    with PassedOver() as passed_over:
        for offset, value in enumerate((b"{", None, b"\xff", b"[" * 5_000)):
            found = passed_over.decoded(
                value, Result, topic="xp.results", place=f"xp.results partition 1 offset {offset}"
            )
            assert found is None
        passed_over.note("without a key", topic="xp.stats", place="xp.stats partition 0 offset 9")
        assert [line.removeprefix("passed over: ")[:36] for line in said.messages] == [
            "xp.results partition 1 offset 0 is n",
            "xp.stats partition 0 offset 9 is wit",
        ]
    assert said.messages[2:] == ["passed over: 4 records of xp.results in all"]
    assert passed_over.counts == {"xp.results": 4, "xp.stats": 1}


def test_a_record_is_a_record(said: pytest.LogCaptureFixture) -> None:
    value = min(GOLDEN.glob("statistics.v1.json")).read_bytes()
    with PassedOver() as passed_over:
        found = passed_over.decoded(value, PartitionStatistics, topic="t", place="p")
    assert found == msgspec.json.decode(value, type=PartitionStatistics)
    assert said.messages == []


@pytest.mark.parametrize("text", ["abc", "1.5", "", "9" * 5_000], ids=["word", "float", "none", "long"])
def test_sums_that_are_no_numbers_make_no_statistics(text: str, said: pytest.LogCaptureFixture) -> None:
    record = msgspec.json.decode(min(GOLDEN.glob("statistics.v1.json")).read_bytes())
    record["statistics"]["moments"][0][5] = text
    with PassedOver() as passed_over:
        value = msgspec.json.encode(record)
        assert passed_over.decoded(value, PartitionStatistics, topic="t", place="p") is None
    assert said.messages == ["passed over: p is no PartitionStatistics: a sum is no whole number"]


def test_what_is_said_cannot_steer_a_terminal(said: pytest.LogCaptureFixture) -> None:
    PassedOver().note("no spec of \x1b[2Jexp", topic="t", place="p")
    assert said.messages == ["passed over: p is no spec of ?[2Jexp"]
