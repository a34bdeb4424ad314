"""Changes a good record into a hostile one: by bytes, and by meaning. Seeded, so that every record comes again."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# As they stand in JSON text, whether JSON knows them or not.
NUMBERS = [
    b"0",
    b"-0",
    b"-0.0",
    b"1e999",
    b"-1e999",
    b"1e-999",
    b"5e-324",
    b"2.2250738585072011e-308",
    b"1.7976931348623157e308",
    b"0.1",
    b"1E2",
    b"01",
    b"1.",
    b".5",
    b"+1",
    b"0x10",
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"9007199254740993",
    b"9223372036854775807",
    b"9223372036854775808",
    b"-9223372036854775809",
    b"18446744073709551616",
    b"4611686018427387904",
    b"253402300799999",
    b"253402300800000",
    b"1" * 400,
    b"1" * 5000,
    b"0." + b"0" * 400 + b"1",
]
TEXTS = [
    b'""',
    b'" "',
    b'"\\u0000"',
    b'"\\ud800"',
    b'"\\udc00\\ud800"',
    b'"\xff"',
    b'"\xc0\xaf"',
    b'"\xed\xa0\x80"',
    b'"a\nb"',
    b'"\\q"',
    b'"\xe2\x80\xae"',
    b'"' + b"x" * 300 + b'"',
    b'"' + b"\\u00e9" * 3000 + b'"',
    b'"1969-12-31T23:59:59Z"',
    b'"9999-12-31T23:59:59.999999+14:00"',
    b'"0001-01-01T00:00:00-14:00"',
    b'"2026-02-30T00:00:00Z"',
    b'"2026-11-02T09:30:60Z"',
    b'"<script>alert(1)</script>"',
    b'"999999999w"',
    b"'x'",
]
OTHERS = [b"null", b"true", b"false", b"[]", b"{}", b"[null]", b'{"":0}', b"[[[[1]]]]", b"nul", b""]
VALUES = NUMBERS + TEXTS + OTHERS
DEEP = [b"[" * 3000, b'{"a":' * 3000, b"[" * 900 + b"]" * 900, b'{"a":' * 900 + b"1" + b"}" * 900]
WHOLE = [
    None,
    b"",
    b" ",
    b"\x00",
    b"null",
    b"[]",
    b"{}",
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{\x00}\x00",
    b"//",
    *DEEP,
    b"x" * 70_000,
    b'{"a":"' + b"x" * 70_000 + b'"}',
]


class Mutator:
    """Gives hostile variants of good JSON records."""

    def __init__(self, seed: int, corpus: Sequence[bytes]) -> None:
        self.random = random.Random(seed)
        self._corpus = corpus
        self._parsed = [json.loads(value) for value in corpus]
        self._by_bytes: list[Callable[[bytes], bytes | None]] = [
            self._flip,
            self._flip,
            self._cut,
            self._splice,
            self._repeat,
            self._insert,
            self._whole,
        ]

    def record(self) -> bytes | None:
        """One variant; one in eight or so is a good record as it is."""
        draw = self.random.random()
        if draw < 0.12:
            return self.random.choice(self._corpus)
        if draw < 0.60:
            return self.by_meaning()
        return self.random.choice(self._by_bytes)(self.random.choice(self._corpus))

    def by_meaning(self) -> bytes:
        """A record whose JSON is changed in one place or a few: a value, a field more, a field less, one twice."""
        made = _Writer(self.random, self.random.choice(self._parsed), self.random.choice([1, 1, 1, 2, 4]))
        return made.text()

    def _flip(self, value: bytes) -> bytes:
        changed = bytearray(value)
        for _ in range(self.random.choice([1, 1, 2, 8])):
            changed[self.random.randrange(len(changed))] ^= 1 << self.random.randrange(8)
        return bytes(changed)

    def _cut(self, value: bytes) -> bytes:
        return value[: self.random.randrange(len(value))]

    def _splice(self, value: bytes) -> bytes:
        other = self.random.choice(self._corpus)
        return value[: self.random.randrange(len(value))] + other[self.random.randrange(len(other)) :]

    def _repeat(self, value: bytes) -> bytes:
        start = self.random.randrange(len(value))
        part = value[start : start + self.random.randrange(1, 40)]
        return value[:start] + part * self.random.choice([2, 3, 50]) + value[start:]

    def _insert(self, value: bytes) -> bytes:
        at = self.random.randrange(len(value))
        return value[:at] + self.random.choice([*VALUES, *DEEP]) + value[at:]

    def _whole(self, value: bytes) -> bytes | None:
        return self.random.choice(WHOLE)


class _Writer:
    """Writes JSON by hand, so that it can write what no encoder would."""

    def __init__(self, rng: random.Random, parsed: Any, changes: int) -> None:
        self._random = rng
        self._parsed = parsed
        places = _count(parsed)
        self._changed = {rng.randrange(places) for _ in range(changes)}
        self._at = -1

    def text(self) -> bytes:
        return self._write(self._parsed)

    def _write(self, value: Any) -> bytes:
        self._at += 1
        if self._at in self._changed:
            self._at += _count(value) - 1
            return self._other(value)
        if isinstance(value, dict):
            return b"{" + b",".join(part for item in value.items() for part in self._field(*item)) + b"}"
        if isinstance(value, list):
            return b"[" + b",".join(map(self._write, value)) + b"]"
        return json.dumps(value).encode()

    def _field(self, name: str, value: Any) -> list[bytes]:
        key = json.dumps(name).encode()
        draw = self._random.random()
        written = key + b":" + self._write(value)
        if draw < 0.004:
            return []
        if draw < 0.008:
            return [written, key + b":" + self._random.choice(VALUES)]
        if draw < 0.012:
            return [written, b'"extra":' + self._random.choice([*VALUES, *DEEP])]
        if draw < 0.014:
            return [self._random.choice(TEXTS) + b":1", written]
        return [written]

    def _other(self, value: Any) -> bytes:
        draw = self._random.random()
        if draw < 0.35 and isinstance(value, int | float) and not isinstance(value, bool):
            near = [value - 1, value + 1, -value, value * 1000, value + 2**62, value * 1e300]
            return str(self._random.choice(near)).encode()
        if draw < 0.45 and isinstance(value, list | dict):
            one = json.dumps(value).encode()
            return b"[" + b",".join([one] * self._random.choice([2, 70])) + b"]"
        return self._random.choice(VALUES)


def _count(value: Any) -> int:
    """Places of a JSON value that can be changed."""
    if isinstance(value, dict):
        return 1 + sum(map(_count, value.values()))
    if isinstance(value, list):
        return 1 + sum(map(_count, value))
    return 1
