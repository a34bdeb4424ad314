"""Field types that specs are made of, and how a broken rule is said."""

from __future__ import annotations

from typing import Annotated

import msgspec

# `$` alone also matches before a newline at the end; `(?!\n)$` does not, in Python and in JSON Schema alike.
Key = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}(?!\n)$",
        description="1 to 100 letters, digits, dots, underscores and hyphens, a letter or digit first",
    ),
]
EventName = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
Duration = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[0-9]{1,9}(ms|s|m|h|d|w)(?!\n)$",
        description="a whole number and a unit, such as 250ms, 2s, 30m, 24h, 7d, 2w",
    ),
]
Probability = Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]
Weight = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, msgspec.Meta(gt=0.0)]
Share = Annotated[float, msgspec.Meta(gt=0.0, le=1.0)]

_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}


def duration_ms(duration: str) -> int:
    """Milliseconds of a duration such as ``250ms``, ``2s``, ``30m``, ``24h``, ``7d``, ``2w``."""
    digits = duration.rstrip("smhdw")
    return int(digits) * _MS[duration[len(digits) :]]


class Fault(msgspec.Struct, frozen=True):
    """One broken rule of a spec: where (path of field names and list positions) and what."""

    path: tuple[str | int, ...]
    message: str


def broken(*checks: tuple[bool, str, str]) -> list[tuple[str, str]]:
    """Field and message of every check that is broken."""
    return [(field, message) for broken, field, message in checks if broken]
