"""What could be read of a file, and what stands where something could not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Unreadable:
    """Stands where a value could not be read; its fault is noted already."""


class Partial(NamedTuple):
    """A struct of which some fields are `UNREADABLE`."""

    cls: type
    fields: dict[str, Any]


UNREADABLE = Unreadable()


def readable(value: Any) -> bool:
    """Whether all of a value could be read."""
    if isinstance(value, Mapping):
        return all(readable(key) and readable(item) for key, item in value.items())
    if isinstance(value, tuple) and not isinstance(value, Partial):
        return all(readable(item) for item in value)
    return not isinstance(value, (Unreadable, Partial))
