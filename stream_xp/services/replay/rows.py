"""Reads a CSV file of impressions as rows of (time, unit, arm, rewards)."""

from __future__ import annotations

import csv
import gzip
import math
from contextlib import contextmanager
from datetime import datetime
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, TextIO

import msgspec

from stream_xp.domain.events import epoch_ms
from stream_xp.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MAX_UNIT = 256
"""Longest unit, in characters, as in `domain.events`."""
JOINER = "-"
"""Stands between the parts of a unit that is made of several columns."""


class Columns(msgspec.Struct, frozen=True, kw_only=True):
    """Which columns of the file hold what; the defaults are those of the Open Bandit file.

    Attributes:
        arm: the arm that the unit met.
        unit: columns whose values, joined by `-`, name the unit.
        time: when the unit met the arm: RFC 3339 with an offset; a space may stand for the `T`.
        metrics: columns that hold a number; each value that is not 0 is a reward of that name.

    """

    arm: str = "policy"
    unit: tuple[str, ...] = ("policy", "row")
    time: str = "timestamp"
    metrics: tuple[str, ...] = ("click",)

    def names(self) -> tuple[str, ...]:
        """Return every column that is read."""
        return (self.arm, *self.unit, self.time, *self.metrics)


class Row(NamedTuple):
    """One impression; `rewards` holds the metric columns that are not 0."""

    time_ms: int
    unit: str
    arm: str
    rewards: tuple[tuple[str, float], ...]
    segments: tuple[tuple[str, str], ...]


def read_rows(path: Path, columns: Columns, *, segments: Sequence[str] = ()) -> list[Row]:
    """Return the rows of a `.csv` or `.csv.gz` file in the order of their time, equal times as in the file.

    A segment gets its value from the column of its name, where the file has one.

    Raises:
        ConfigError: names the file, the line and the column.

    """
    with _opened(path) as file:
        reader = csv.reader(file, strict=True)
        header = _header(path, reader, columns)
        found = tuple(name for name in segments if name in header)
        rows = [
            _row(_Line(path, reader.line_num, header, cells), columns, found) for cells in reader if cells
        ]
    if not rows:
        raise ConfigError(f"{path}: has no row below its header")
    rows.sort(key=attrgetter("time_ms"))
    return rows


def time_of(text: str) -> int:
    """Return epoch milliseconds of a time such as ``2019-11-24 00:01:03.979311+00:00``.

    Raises:
        ValueError: says what a time must be.

    """
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("must be a time such as 2019-11-24T00:01:03.979Z") from None
    if time.tzinfo is None:
        raise ValueError("must have an offset from UTC, such as +00:00 or Z")
    return epoch_ms(time)


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        # A file from a spreadsheet may begin with a byte order mark.
        with (
            gzip.open(path, "rt", encoding="utf-8-sig", newline="")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8-sig", newline="")
        ) as file:
            yield file
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text: {error}") from error
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except csv.Error as error:
        raise ConfigError(f"{path}: is not a CSV file: {error}") from error


def _header(path: Path, reader: Iterator[list[str]], columns: Columns) -> dict[str, int]:
    names = next(reader, [])
    for name in columns.names():
        if name not in names:
            raise ConfigError(
                f"{path}:1: has no column {name!r}; its columns are {', '.join(names) or 'none'}"
            )
        if names.count(name) > 1:
            raise ConfigError(f"{path}:1: has {names.count(name)} columns {name!r}")
    return {name: index for index, name in enumerate(names)}


class _Line(NamedTuple):
    """One line of the file; the methods name the place of a fault."""

    path: Path
    number: int
    header: dict[str, int]
    cells: Sequence[str]

    def cell(self, name: str) -> str:
        """Return the text of a column, which must not be empty."""
        text = self.cells[self.header[name]].strip()
        if not text:
            raise self.fault(name, "is empty")
        return text

    def fault(self, column: str, message: str) -> ConfigError:
        """Return the error for a column of this line."""
        return ConfigError(f"{self.path}:{self.number}: column {column}: {message}")


def _row(line: _Line, columns: Columns, segments: Sequence[str]) -> Row:
    if len(line.cells) != len(line.header):
        wanted = len(line.header)
        raise ConfigError(f"{line.path}:{line.number}: has {len(line.cells)} cells, the header has {wanted}")
    unit = JOINER.join(line.cell(name) for name in columns.unit)
    if len(unit) > MAX_UNIT:
        raise line.fault(", ".join(columns.unit), f"a unit has at most {MAX_UNIT} characters")
    rewards = ((name, _value(line, name)) for name in columns.metrics)
    return Row(
        time_ms=_time(line, columns.time),
        unit=unit,
        arm=line.cell(columns.arm),
        rewards=tuple((name, value) for name, value in rewards if value != 0.0),
        segments=tuple((name, line.cells[line.header[name]].strip()) for name in segments),
    )


def _time(line: _Line, column: str) -> int:
    text = line.cell(column)
    try:
        return time_of(text)
    except ValueError as error:
        raise line.fault(column, f"{error}, found {text!r}") from None


def _value(line: _Line, column: str) -> float:
    text = line.cell(column)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise line.fault(column, f"must be a finite number, found {text!r}")
    return value
