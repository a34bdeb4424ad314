"""Exact, mergeable counts of units and successes per arm and weight epoch.

The sufficient statistic of the sample ratio, of conversions and of first events. Merging is addition, so the
order of units and of partitions never matters. A weight epoch without any unit is not kept: equal counts are
equal objects and have equal bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import add, sub
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from stream_xp.stats._codec import decimal, integer, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

Row: TypeAlias = tuple[int, ...]

_TAG = "ACNT"
_VERSION = 1
_COUNT_LIMIT = 2**53


@dataclass(frozen=True, slots=True)
class ArmCounts:
    """Counts per weight epoch and arm; a commutative monoid under `merge` with `empty` as identity.

    Attributes:
        arms: number of arms, >= 1.
        epochs: the numbers of the weight epochs, >= 0, increasing.
        units: for each epoch the units per arm, >= 0, at least one of them above 0.
        successes: for each epoch the units per arm that succeeded, 0 to `units`; None where only units are
            counted.

    Raises:
        ValueError: an attribute breaks a rule above, or is no Python int.

    """

    arms: int
    epochs: Row
    units: tuple[Row, ...]
    successes: tuple[Row, ...] | None = None

    def __post_init__(self) -> None:
        _check_int("arms", self.arms, least=1)
        for epoch in self.epochs:
            _check_int("epochs", epoch, least=0)
        if any(a >= b for a, b in zip(self.epochs, self.epochs[1:], strict=False)):
            raise ValueError("epochs must be increasing")
        self._check_rows("units", self.units)
        if not all(any(row) for row in self.units):
            raise ValueError("units must have a unit in every epoch")
        if self.successes is not None:
            self._check_rows("successes", self.successes)
            for units, successes in zip(self.units, self.successes, strict=True):
                if any(s > n for n, s in zip(units, successes, strict=True)):
                    raise ValueError("successes must not exceed units")

    @classmethod
    def empty(cls, arms: int, *, with_successes: bool = False) -> ArmCounts:
        """Return no counts: the identity of `merge` among counts of `arms` arms of the same kind."""
        return cls(arms, (), (), () if with_successes else None)

    @classmethod
    def from_epochs(
        cls,
        arms: int,
        units: Mapping[int, Sequence[int]],
        *,
        successes: Mapping[int, Sequence[int]] | None = None,
    ) -> ArmCounts:
        """Return the counts of a mapping from weight epoch to counts per arm; epochs without units are dropped.

        Args:
            arms: number of arms, >= 1.
            units: weight epoch to units per arm.
            successes: weight epoch to successes per arm; an epoch that is missing has none.

        Raises:
            ValueError: a count breaks a rule of `ArmCounts`.

        """
        if successes is not None and not set(successes) <= set(units):
            raise ValueError("successes must not have epochs that units do not have")
        none = (0,) * arms
        kept = sorted(epoch for epoch, row in units.items() if any(row) or len(row) != arms)
        for epoch, row in (successes or {}).items():
            if any(row) and epoch not in kept:
                raise ValueError("successes must not exceed units")
        rows = None if successes is None else tuple(tuple(successes.get(epoch, none)) for epoch in kept)
        return cls(arms, tuple(kept), tuple(tuple(units[epoch]) for epoch in kept), rows)

    def merge(self, other: ArmCounts) -> ArmCounts:
        """Return the counts of both sets of units together; exact, commutative and associative.

        Raises:
            ValueError: the numbers of arms differ, or only one of the two counts successes.

        """
        return self._combined(other, add)

    def __add__(self, other: ArmCounts) -> ArmCounts:
        """Return `merge(other)`."""
        return self.merge(other) if isinstance(other, ArmCounts) else NotImplemented

    def __sub__(self, other: ArmCounts) -> ArmCounts:
        """Return the counts without the units of `other`; ValueError if they cannot be part of these."""
        return self._combined(other, sub) if isinstance(other, ArmCounts) else NotImplemented

    def unit_table(self, epochs: Sequence[int] | None = None) -> NDArray[np.int64]:
        """Return units as an array (E, arms), the rows in the order of `epochs`, or of the epochs kept.

        Args:
            epochs: weight epochs to list; one without units is a row of zeros.

        Raises:
            ValueError: `epochs` misses an epoch that has units, or a count reaches 2**53.

        """
        return self._table(self.units, epochs)

    def success_table(self, epochs: Sequence[int] | None = None) -> NDArray[np.int64]:
        """Return successes as an array (E, arms), laid out like `unit_table`.

        Raises:
            ValueError: successes are not counted here, or as for `unit_table`.

        """
        if self.successes is None:
            raise ValueError("successes must be counted to be listed")
        return self._table(self.successes, epochs)

    def to_bytes(self) -> bytes:
        """Return the canonical binary form."""
        values = [self.arms, int(self.successes is not None), *self.epochs]
        for row in (*self.units, *(self.successes or ())):
            values += row
        return pack(_TAG, _VERSION, [len(self.epochs), *values])

    @classmethod
    def from_bytes(cls, data: bytes) -> ArmCounts:
        """Return the counts of a binary form.

        Raises:
            ValueError: the bytes are damaged, of another kind or version, or break a rule of `ArmCounts`.

        """
        values = unpack(data, _TAG, _VERSION)
        if len(values) < 3:
            raise ValueError("data must hold the numbers of epochs and arms")
        size, arms, kinds = values[0], values[1], values[2] + 1
        if size < 0 or arms < 1 or kinds not in {1, 2} or len(values) != 3 + size * (1 + kinds * arms):
            raise ValueError("data must hold as many counts as its epochs and arms need")
        epochs, counts = tuple(values[3 : 3 + size]), values[3 + size :]
        rows = tuple(tuple(counts[at : at + arms]) for at in range(0, len(counts), arms))
        return cls(arms, epochs, rows[:size], rows[size:] if kinds == 2 else None)

    def to_json(self) -> dict[str, Any]:
        """Return the canonical JSON form; counts are decimal strings."""
        fields: dict[str, Any] = {"version": _VERSION, "arms": decimal(self.arms)}
        fields["epochs"] = [decimal(epoch) for epoch in self.epochs]
        fields["units"] = [[decimal(n) for n in row] for row in self.units]
        if self.successes is not None:
            fields["successes"] = [[decimal(n) for n in row] for row in self.successes]
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ArmCounts:
        """Return the counts of a JSON form.

        Raises:
            ValueError: a field is missing or of the wrong kind, or breaks a rule of `ArmCounts`.

        """
        if integer(fields, "version") != _VERSION:
            raise ValueError(f"version must be {_VERSION}, got {fields['version']!r}")
        epochs = _integers("epochs", fields.get("epochs"))
        units = _rows("units", fields.get("units"))
        successes = _rows("successes", fields["successes"]) if "successes" in fields else None
        return cls(integer(fields, "arms"), epochs, units, successes)

    def _check_rows(self, name: str, rows: tuple[Row, ...]) -> None:
        if len(rows) != len(self.epochs) or any(len(row) != self.arms for row in rows):
            raise ValueError(f"{name} must have a row per epoch and a count per arm")
        for row in rows:
            for count in row:
                _check_int(name, count, least=0)

    def _combined(self, other: ArmCounts, operation: Callable[[int, int], int]) -> ArmCounts:
        if self.arms != other.arms:
            raise ValueError(f"arms must be equal to merge, got {self.arms} and {other.arms}")
        if (self.successes is None) != (other.successes is None):
            raise ValueError("successes must be counted in both or in neither to merge")
        units = _merged(self.epochs, self.units, other.epochs, other.units, operation)
        successes = None
        if self.successes is not None and other.successes is not None:
            successes = _merged(self.epochs, self.successes, other.epochs, other.successes, operation)
        return ArmCounts.from_epochs(self.arms, units, successes=successes)

    def _table(self, rows: tuple[Row, ...], epochs: Sequence[int] | None) -> NDArray[np.int64]:
        order = self.epochs if epochs is None else tuple(epochs)
        if not set(self.epochs) <= set(order):
            raise ValueError("epochs must list every epoch that has units")
        if any(count >= _COUNT_LIMIT for row in rows for count in row):
            raise ValueError("units must be below 2**53 to be listed as an array")
        kept, none = dict(zip(self.epochs, rows, strict=True)), (0,) * self.arms
        table = [kept.get(epoch, none) for epoch in order]
        return np.array(table, dtype=np.int64).reshape(len(order), self.arms)


def _merged(
    epochs: Row,
    rows: tuple[Row, ...],
    others: Row,
    more: tuple[Row, ...],
    operation: Callable[[int, int], int],
) -> dict[int, Row]:
    out = dict(zip(epochs, rows, strict=True))
    for epoch, row in zip(others, more, strict=True):
        before = out.get(epoch, (0,) * len(row))
        out[epoch] = tuple(operation(a, b) for a, b in zip(before, row, strict=True))
    return out


def _check_int(name: str, value: object, *, least: int) -> None:
    if type(value) is not int:
        raise ValueError(f"{name} must be Python ints")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _integers(name: str, values: object) -> Row:
    return tuple(integer({name: value}, name) for value in _items(name, values))


def _rows(name: str, values: object) -> tuple[Row, ...]:
    return tuple(_integers(name, row) for row in _items(name, values))


def _items(name: str, values: object) -> Sequence[object]:
    if isinstance(values, list | tuple):
        return values
    raise ValueError(f"{name} must be lists of counts")
