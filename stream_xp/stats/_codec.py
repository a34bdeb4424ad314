"""The two written forms that every exact statistic has: versioned bytes, and a JSON object.

Both are canonical: equal statistics have equal bytes. In bytes, a statistic is its tag, its version and its
integers, each as a zigzag varint of any size, closed by a CRC-32. In JSON, integers are decimal strings,
because sums may exceed what a JSON number holds.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

_CRC_BYTES = 4


def pack(tag: str, version: int, integers: Sequence[int]) -> bytes:
    """Return the binary form of a statistic.

    Args:
        tag: four ASCII letters that name the kind of statistic.
        version: of this kind's layout, 1 to 255.
        integers: any number of Python ints of any size and sign.

    """
    body = tag.encode("ascii") + bytes([version]) + _varint(len(integers))
    body += b"".join(_varint(_zigzag(value)) for value in integers)
    return body + zlib.crc32(body).to_bytes(_CRC_BYTES, "big")


def unpack(data: bytes, tag: str, version: int) -> list[int]:
    """Return the integers of a binary form.

    Raises:
        ValueError: the bytes are damaged, of another kind of statistic, or of a version this code cannot read.

    """
    body, crc = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
    if len(data) < len(tag) + 2 + _CRC_BYTES or zlib.crc32(body).to_bytes(_CRC_BYTES, "big") != crc:
        raise ValueError("data must be a whole binary statistic; its checksum does not match")
    if body[: len(tag)] != tag.encode("ascii"):
        raise ValueError(f"data must be a statistic of kind {tag!r}, it is {body[: len(tag)]!r}")
    if body[len(tag)] != version:
        raise ValueError(f"data must be of version {version}, it is of version {body[len(tag)]}")
    count, at = _read_varint(body, len(tag) + 1)
    integers = []
    for _ in range(count):
        value, at = _read_varint(body, at)
        integers.append((value >> 1) ^ -(value & 1))
    if at != len(body):
        raise ValueError("data must end with its last integer")
    return integers


def decimal(value: int) -> str:
    """Return the JSON form of an integer."""
    return str(value)


def integer(fields: Mapping[str, Any], name: str) -> int:
    """Return the integer that a JSON object holds under `name`, as a decimal string or a JSON integer.

    Raises:
        ValueError: it is missing, or no integer.

    """
    value = fields.get(name)
    if type(value) is int:
        return value
    if isinstance(value, str) and value.removeprefix("-").isdecimal() and value.isascii():
        return int(value)
    raise ValueError(f"{name} must be an integer or a decimal string, got {value!r}")


def _zigzag(value: int) -> int:
    return value << 1 if value >= 0 else ((-value) << 1) - 1


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(body: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(body):
            raise ValueError("data must not end inside an integer")
        byte = body[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
