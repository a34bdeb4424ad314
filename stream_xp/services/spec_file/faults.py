"""Faults of a file, their places, and words for them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from stream_xp.errors import ConfigError

FieldPath: TypeAlias = tuple[str | int, ...]


class SpecFault(NamedTuple):
    """One fault of a spec file.

    Attributes:
        line, column: where in the file, from 1.
        path: the field, such as ``metrics[1].margin``; empty for the file as a whole.
        message: what is wrong, and what would be right where that is known.
    """

    line: int
    column: int
    path: str
    message: str


class SpecFaults(ConfigError):
    """A spec file breaks at least one rule.

    Attributes:
        file: name of the file, as given.
        faults: all of them, in the order of the file.
    """

    def __init__(self, file: str, faults: Sequence[SpecFault]) -> None:
        self.file = file
        self.faults = tuple(sorted(faults))
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        """One line per fault: ``FILE:LINE:COLUMN: FIELD: MESSAGE``."""
        return [
            f"{self.file}:{f.line}:{f.column}: {f.path}{': ' if f.path else ''}{f.message}"
            for f in self.faults
        ]


def refusal(file: str, message: str, *, line: int = 1, column: int = 1) -> SpecFaults:
    """A fault of the file as a whole."""
    return SpecFaults(file, [SpecFault(line, column, "", message)])


def nearest(positions: Mapping[FieldPath, tuple[int, int]], path: FieldPath) -> tuple[int, int]:
    """The position of a field, or of the nearest one around it that has one."""
    return positions[next(p for p in (path[:n] for n in range(len(path), -1, -1)) if p in positions)]


def dotted(path: FieldPath) -> str:
    """A path as people write it: ``metrics[1].margin``."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{shown(step)}" for step in path)
    return "".join(steps).removeprefix(".")


def shown(text: str) -> str:
    """`text` as one short printable line."""
    escaped = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return escaped if len(escaped) <= 60 else f"{escaped[:57]}..."


def did_you_mean(name: str, known: Mapping[str, object]) -> str:
    """The known name that looks most like a name, as a question; empty where none does."""
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]}?" if close else ""
