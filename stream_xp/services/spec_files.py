"""Several experiment files at once: each by itself, then each beside those before it."""

from __future__ import annotations

from collections.abc import Sequence

from stream_xp.domain.layer_rules import Collision, collisions
from stream_xp.services.spec_file import LocatedSpec, SpecFault, SpecFaults


def collision_faults(files: Sequence[LocatedSpec]) -> list[list[SpecFault]]:
    """The faults of each file beside the others, in the order given.

    A pair is named once, in the file that comes later, with the place in the other one. Files of one experiment are its
    versions, which never run at once; of them the newest counts.
    """
    return [_beside(file, _newest(files[:at], file)) for at, file in enumerate(files)]


def _newest(before: Sequence[LocatedSpec], file: LocatedSpec) -> dict[str, LocatedSpec]:
    newest: dict[str, LocatedSpec] = {}
    for other in (*before, file):
        held = newest.get(other.spec.experiment)
        if held is None or other.spec.version >= held.spec.version:
            newest[other.spec.experiment] = other
    return newest


def _beside(file: LocatedSpec, newest: dict[str, LocatedSpec]) -> list[SpecFault]:
    others = [other.spec for key, other in newest.items() if key != file.spec.experiment]
    return [
        file.fault(one.path, f"{one.message}{_place(one, newest)}")
        for one in collisions(file.spec, others, complete=False)
    ]


def _place(one: Collision, files: dict[str, LocatedSpec]) -> str:
    other = None if one.other is None else files[one.other]
    return "" if other is None else f" ({other.file}:{other.line(one.other_path)})"


def refused(file: LocatedSpec, found: Sequence[Collision], where: str) -> SpecFaults:
    """The error of a file that collides with what stands on a topic."""
    return SpecFaults(file.file, [file.fault(one.path, f"{one.message} ({where})") for one in found])
