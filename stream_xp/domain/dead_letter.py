"""A record that could not be used, kept with its reason."""

from __future__ import annotations

import hashlib

import msgspec

from stream_xp.errors import Reason

RAW_LIMIT_BYTES = 65_536
"""Bytes of the raw value that a dead letter keeps; the source offset leads to the rest."""


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A record of ``xp.deadletter``; key = topic/partition/offset, so that a repeat replaces itself.

    Attributes:
        key, value: the raw bytes (base64 in JSON), at most `RAW_LIMIT_BYTES` of each; None where Kafka had null.
        value_bytes: length of the whole value.
        value_sha256: hash of the whole value.
    """

    topic: str
    partition: int
    offset: int
    log_time_ms: int
    reason: Reason
    detail: str
    key: bytes | None
    value: bytes | None
    value_bytes: int
    value_sha256: str
    schema: int = 1


def dead_letter(
    *,
    topic: str,
    partition: int,
    offset: int,
    log_time_ms: int,
    reason: Reason,
    detail: str,
    key: bytes | None,
    value: bytes | None,
) -> DeadLetter:
    """The dead letter of one raw record."""
    return DeadLetter(
        topic=topic,
        partition=partition,
        offset=offset,
        log_time_ms=log_time_ms,
        reason=reason,
        detail=detail,
        key=None if key is None else key[:RAW_LIMIT_BYTES],
        value=None if value is None else value[:RAW_LIMIT_BYTES],
        value_bytes=len(value or b""),
        value_sha256=hashlib.sha256(value or b"").hexdigest(),
    )


def dead_letter_key(letter: DeadLetter) -> bytes:
    """Kafka key: topic/partition/offset of the source record."""
    return f"{letter.topic}/{letter.partition}/{letter.offset}".encode()
