"""Checksums of record batches, fast enough for tests that read topics again and again."""

from aiokafka.record._crecords import crc32c_cython
from kafka.record import default_records


def use_fast_checksums() -> None:
    """Have kafka-python check its batches with aiokafka's compiled CRC: its own takes most of reading a topic."""
    default_records.calc_crc32c = crc32c_cython
