"""A header whose name is not UTF-8: the broker takes it, so the worker must read past it."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from aiokafka.consumer import fetcher
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c
from faust.types.tuples import TP

from stream_xp.adapters import faust_transport
from stream_xp.adapters.faust_transport import BlockRecords, ForgivingRecords, as_blocks
from stream_xp.domain.codec import RawRecord, decode_reward

VALUE = b'{"id":"1","time":1,"unit":"u","metric":"click"}'
AT = TP("xp.rewards", 0)


def batch(base_offset: int, *headers: list[tuple[str, bytes]]) -> bytes:
    """One record for each list of headers; `ab` becomes bytes that are no UTF-8."""
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=0,
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=100_000,
    )
    for offset, one in enumerate(headers):
        builder.append(offset, timestamp=5, key=b"u", value=VALUE, headers=one)
    raw = bytearray(builder.build().replace(b"\x04ab", b"\x04\xff\xfe"))
    struct.pack_into(">q", raw, 0, base_offset)
    struct.pack_into(">I", raw, 17, calc_crc32c(bytes(raw[21:])))
    return bytes(raw)


def blocks(raw: bytes, records: type = ForgivingRecords) -> list[Any]:
    found = BlockRecords(AT, records(raw), [], 0, None, as_blocks, True, 0)
    return [block._replace(fetched_ns=None) for block in found]


GOOD, POISON = [("x", b"1")], [("ab", b"2"), ("content-type", b"application/json")]


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
