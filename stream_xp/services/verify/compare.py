"""Compares what a signal says with what was derived, value by value."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stream_xp.domain.decision import Result

TOLERANCE: Final = 1e-9
"""Relative; two processors differ in the last digits of a logarithm, and statistics are compared by their hash."""
TELEMETRY: Final = frozenset(
    {"look", "evaluated_ms", "code_version", "offsets", "schema", "weight_epochs", "spread_ms", "rollout"}
)
"""Fields of a result that do not follow from the raw topics, or that the derivation starts from."""
_FIRST: Final = (
    "design_hash",
    "statistics_hash",
    "decision",
    "runtime_ms",
    "invalid",
    "sample_ratio",
    "metrics",
)
_NAMED: Final = ("monitor", "metric", "arm", "segment", "quantile", "look", "until_ms")


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One value.

    Attributes:
        what: its name, such as `errors canary harm log_e`.
        recorded: what the signal says.
        derived: what the raw topics come to.
        equal: None where the two are only shown.

    """

    what: str
    recorded: str
    derived: str
    equal: bool | None


def line(what: str, recorded: object, derived: object) -> Line:
    """Return the comparison of one value; numbers that are not whole are equal within `TOLERANCE`."""
    return Line(what=what, recorded=_text(recorded), derived=_text(derived), equal=same(recorded, derived))


def same(recorded: object, derived: object) -> bool:
    """Whether two values are the same but for rounding."""
    if isinstance(recorded, float) and isinstance(derived, float):
        return math.isclose(recorded, derived, rel_tol=TOLERANCE, abs_tol=TOLERANCE**2)
    return type(recorded) is type(derived) and recorded == derived


def result_lines(recorded: Result, derived: Result) -> list[Line]:
    """Return every value of a result, the decisive ones first."""
    theirs, ours = _values(recorded), _values(derived)
    names = sorted({**theirs, **ours}, key=lambda name: _rank(name[0]))
    return [line(" ".join(name), theirs.get(name), ours.get(name)) for name in names]


def _rank(field: str) -> int:
    return _FIRST.index(field) if field in _FIRST else len(_FIRST)


def _values(result: Result) -> dict[tuple[str, ...], object]:
    fields = {name: value for name, value in msgspec.to_builtins(result).items() if name not in TELEMETRY}
    return {path: value for name in fields for path, value in _leaves((name,), fields[name])}


def _leaves(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], object]]:
    if isinstance(value, dict):
        for name, below in value.items():
            yield from _leaves((*path, name), below)
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        for below in value:
            names = [str(below[name]) for name in _NAMED if below.get(name) is not None]
            yield from _leaves((*path, *names), below)
    else:
        yield path, value


def _text(value: object) -> str:
    return "-" if value is None else str(value)
