"""What an experiment says of the others: its slots of a layer, whom it may not meet, its holdout, its champion."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec

from stream_xp.domain.fields import Key

SLOTS = 1000
"""Slots of a layer whose file does not say how many."""
HOLDOUT_ARM = "holdout"
PROGRAM_ARM = "program"
"""The two arms of a holdout."""

Slots = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[0-9]{1,7}(-[0-9]{1,7})?(?!\n)$",
        description="a slot or the first and last of some, such as 17 or 0-499",
    ),
]


class SlotRange(NamedTuple):
    """Slots from `first` to `last`, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"


class Layer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The part of all units that an experiment takes, so that others of the layer can take the rest.

    Attributes:
        name: of the layer.
        slots: those that the experiment takes, growing; no other experiment of the layer may take them.
        of: how many slots the layer has, 0 to `of` - 1; the same in all its experiments.
        salt: what units are hashed with; absent: the name. The same in all its experiments, and in no other layer.
    """

    name: Key
    slots: Annotated[tuple[Slots, ...], msgspec.Meta(min_length=1, max_length=1000)]
    of: Annotated[int, msgspec.Meta(ge=2, le=1_000_000)] = SLOTS
    salt: Key | None = None

    @property
    def seed(self) -> str:
        """The salt in force."""
        return self.salt or self.name

    @property
    def ranges(self) -> tuple[SlotRange, ...]:
        """The slots as numbers, in the order of the file."""
        return tuple(slot_range(text) for text in self.slots)

    @property
    def size(self) -> int:
        """How many slots the experiment takes."""
        return sum(last - first + 1 for first, last in self.ranges)

    @property
    def share(self) -> float:
        """Share of all units that is in its slots."""
        return self.size / self.of


class Overlap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A row of the overlap matrix.

    A pair is forbidden if either of the two says so, so the matrix is symmetric.

    Attributes:
        forbidden: experiments that may not share a unit with this one.
        forbidden_layers: layers none of whose experiments may.
        decisive: experiments whose proven interaction with this one keeps a ship of this one from being approved.
    """

    forbidden: Annotated[tuple[Key, ...], msgspec.Meta(max_length=1000)] = ()
    forbidden_layers: Annotated[tuple[Key, ...], msgspec.Meta(max_length=1000)] = ()
    decisive: Annotated[tuple[Key, ...], msgspec.Meta(max_length=1000)] = ()


class Champion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The arm that shipped before, which is the control now.

    Attributes:
        experiment, version: the one that it shipped from.
        arm: its key there.
    """

    experiment: Key
    version: Annotated[int, msgspec.Meta(ge=1, le=10**6)]
    arm: Key

    def __str__(self) -> str:
        return f"{self.arm} of {self.experiment} version {self.version}"


def slot_range(text: str) -> SlotRange:
    """The slots of a text such as ``17`` or ``0-499``."""
    first, _, last = text.partition("-")
    return SlotRange(int(first), int(last or first))


def shared_slots(one: Layer, other: Layer) -> tuple[SlotRange, ...]:
    """The slots that both take, in growing order."""
    found = [SlotRange(max(a.first, b.first), min(a.last, b.last)) for a in one.ranges for b in other.ranges]
    return tuple(sorted(both for both in found if both.first <= both.last))


def free_slots(layers: list[Layer], of: int) -> tuple[SlotRange, ...]:
    """The slots of 0 to `of` - 1 that none of the layers takes, in growing order."""
    free, begin = [], 0
    for first, last in sorted(taken for layer in layers for taken in layer.ranges):
        if first > begin:
            free.append(SlotRange(begin, first - 1))
        begin = max(begin, last + 1)
    return (*free, SlotRange(begin, of - 1)) if begin < of else tuple(free)


def listed(ranges: tuple[SlotRange, ...], most: int = 5) -> str:
    """Ranges in words; `most` of them."""
    shown = ", ".join(map(str, ranges[:most]))
    return f"{shown} and more" if len(ranges) > most else shown or "none"
