"""A header whose name is not UTF-8: the broker takes it, so workers and commands must read past it, and alike."""

from __future__ import annotations

import inspect
import struct
from types import SimpleNamespace
from typing import Any

import kafka
import pytest
from aiokafka.consumer import fetcher
from aiokafka.record.util import calc_crc32c
from faust.types.tuples import TP
from kafka.consumer.fetcher import Fetcher
from kafka.errors import CorruptRecordError
from kafka.record import MemoryRecords
from kafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder

from stream_xp.adapters import faust_transport, topic_reader
from stream_xp.adapters.faust_transport import BlockRecords, ForgivingRecords, as_blocks
from stream_xp.adapters.topic_reader import open_consumer
from stream_xp.domain.codec import RawRecord, decode_reward
from stream_xp.settings import Settings

VALUE = b'{"id":"1","time":1,"unit":"u","metric":"click"}'
AT = TP("xp.rewards", 0)


class BadName(str):
    """The name of a header that is written as bytes that are no UTF-8."""

    __slots__ = ()

    def encode(self, *_: object, **__: object) -> bytes:
        return b"\xff\xfe"


def batch(base_offset: int, *headers: list[tuple[str, bytes]], compression: int = 0) -> bytes:
    """One record for each list of headers."""
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=compression,
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=100_000,
    )
    for offset, one in enumerate(headers):
        builder.append(offset, timestamp=5, key=b"u", value=VALUE, headers=one)
    raw = bytearray(builder.build())
    struct.pack_into(">q", raw, 0, base_offset)
    struct.pack_into(">I", raw, 17, calc_crc32c(bytes(raw[21:])))
    return bytes(raw)


def blocks(raw: bytes, records: type = ForgivingRecords) -> list[Any]:
    found = BlockRecords(AT, records(raw), [], 0, None, as_blocks, True, 0)
    return [block._replace(fetched_ns=None) for block in found]


GOOD, POISON = [("x", b"1")], [(BadName("ab"), b"2"), ("content-type", b"application/json")]


def test_aiokafka_itself_stops_at_it() -> None:
    # Should a later aiokafka read past it, all of this can go.
    with pytest.raises(UnicodeDecodeError):
        blocks(batch(0, GOOD, POISON), faust_transport._STOCK_MEMORY_RECORDS)


def test_every_record_around_it_is_read() -> None:
    (block,) = blocks(batch(0, GOOD, POISON, GOOD) + batch(3, GOOD, []) + batch(5, POISON))
    assert block.offsets == [0, 1, 2, 3, 4, 5]
    assert block.next_offset == 6
    assert block.values == [VALUE] * 6
    assert block.timestamps_ms == [5] * 6
    names = [[name for name, _ in headers] for headers in block.headers]
    bad = ["\ufffd\ufffd", "content-type"]
    assert names == [["x"], bad, ["x"], ["x"], [], bad]
    for key, value, headers in zip(block.keys, block.values, block.headers, strict=True):
        assert decode_reward(RawRecord(key, value, headers, 5)).metric == "click"


def test_other_consumers_of_the_process_read_past_it_too() -> None:
    records = fetcher.PartitionRecords(
        AT, ForgivingRecords(batch(7, GOOD, POISON)), [], 7, None, None, True, 0
    )
    assert [record.offset for record in records] == [7, 8]


def test_what_is_sound_is_read_as_ever() -> None:
    raw = batch(0, GOOD, []) + batch(2, GOOD)
    stock, ours = blocks(raw, faust_transport._STOCK_MEMORY_RECORDS), blocks(raw)
    assert stock == ours
    assert ForgivingRecords(raw).size_in_bytes() == len(raw)
    assert blocks(raw + raw[:20]) == ours


def test_damage_is_still_damage() -> None:
    raw = bytearray(batch(0, GOOD, POISON))
    raw[-1] ^= 1
    with pytest.raises(Exception, match="CRC"):
        blocks(bytes(raw))


# kafka-python: the commands and the oracle ------------------------------------------------------------


def commands_read(raw: bytes, kind: type = topic_reader._ForgivingPartition) -> list[Any]:
    """What a consumer of ours makes of fetched bytes."""
    return list(kind(0, kafka.TopicPartition("xp.rewards", 0), MemoryRecords(raw)).take())


def test_kafka_python_itself_stops_at_it() -> None:
    with pytest.raises(CorruptRecordError, match="UnicodeDecodeError"):
        commands_read(batch(0, POISON, GOOD), Fetcher.PartitionRecords)


@pytest.mark.parametrize("compression", [0, 1], ids=["plain", "gzip"])
def test_commands_and_workers_see_the_same_records(compression: int) -> None:
    raw = (
        batch(0, GOOD, POISON, GOOD, POISON, compression=compression) + batch(4, POISON) + batch(5, GOOD, [])
    )
    (block,) = blocks(raw)
    found = commands_read(raw)
    assert [one.offset for one in found] == block.offsets == list(range(7))
    assert [one.timestamp for one in found] == list(block.timestamps_ms)
    assert [one.key for one in found] == list(block.keys)
    assert [one.value for one in found] == list(block.values)
    assert [list(one.headers) for one in found] == [list(one) for one in block.headers]
    assert found[1].headers[0] == ("\ufffd\ufffd", b"2")


def test_commands_read_what_is_sound_as_ever() -> None:
    raw = batch(0, GOOD, []) + batch(2, GOOD)
    assert commands_read(raw) == commands_read(raw, Fetcher.PartitionRecords)


def test_damage_is_still_damage_to_commands() -> None:
    raw = bytearray(batch(0, POISON, GOOD))
    raw[-1] ^= 1
    with pytest.raises(CorruptRecordError, match="crc"):
        commands_read(bytes(raw))
    # A record whose length is not that of its parts.
    raw = bytearray(batch(0, POISON))
    raw[61] += 2
    struct.pack_into(">I", raw, 17, calc_crc32c(bytes(raw[21:])))
    with pytest.raises(CorruptRecordError, match="Invalid record size"):
        commands_read(bytes(raw))


def test_only_our_own_consumers_of_kafka_python_forgive(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(_fetcher=SimpleNamespace(PartitionRecords=Fetcher.PartitionRecords))
    stock = Fetcher.PartitionRecords
    monkeypatch.setattr(topic_reader, "_PatientConsumer", lambda **_: made)
    assert open_consumer(Settings())._fetcher.PartitionRecords is topic_reader._ForgivingPartition
    assert Fetcher.PartitionRecords is stock


def test_kafka_python_reads_through_what_is_replaced() -> None:
    # The way in: an attribute of each consumer's fetcher, which every fetched partition goes through.
    assert "self.PartitionRecords(fetch_offset, tp, records," in inspect.getsource(
        Fetcher._parse_fetched_data
    )
    assert "self._fetcher = Fetcher(" in inspect.getsource(kafka.KafkaConsumer.__init__)
    # What a record is read from, and what of a batch has changed when reading one has failed: nothing.
    source = inspect.getsource(DefaultRecordBatch._read_msg)
    assert "buffer = self._buffer" in source
    assert source.count("self._pos = pos") == 1
