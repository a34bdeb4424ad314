"""Experiment files: the spec, and where its fields stand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from msgspec import inspect

from stream_xp.domain.experiment import ExperimentSpec
from stream_xp.services.spec_file.faults import FieldPath, SpecFault, SpecFaults, dotted, nearest, refusal
from stream_xp.services.spec_file.nodes import MAX_FILE_BYTES, compose, text_of
from stream_xp.services.spec_file.walk import Walk


class LocatedSpec(NamedTuple):
    """A spec, and where in its file each field stands.

    Attributes:
        file: name of the file, as given.
        positions: path of a field to its line and column, from 1.
    """

    spec: ExperimentSpec
    file: str
    positions: Mapping[FieldPath, tuple[int, int]]

    def fault(self, path: FieldPath, message: str) -> SpecFault:
        """A fault of a field, at the field or the nearest one around it that the file has."""
        return SpecFault(*nearest(self.positions, path), dotted(path), message)

    def line(self, path: FieldPath) -> int:
        """The line of a field, or of the nearest one around it that the file has."""
        return nearest(self.positions, path)[0]


def load_spec(path: Path | str) -> ExperimentSpec:
    """Return the spec in the YAML file at `path`; raises SpecFaults with every fault it has."""
    return load_located(path).spec


def load_located(path: Path | str) -> LocatedSpec:
    """Return the spec in the YAML file at `path` and where its fields stand; raises SpecFaults."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise refusal(str(path), f"cannot be read: {error.strerror}") from error
    return _located(raw, str(path))


def parse_spec(raw: bytes, file: str) -> ExperimentSpec:
    """Return the spec in the bytes of a YAML file; raises SpecFaults under the name `file`."""
    return _located(raw, file).spec


def _located(raw: bytes, file: str) -> LocatedSpec:
    text = text_of(raw, file)
    root, faults = compose(text, file)
    walk = Walk(faults)
    value = walk.value(root, inspect.type_info(ExperimentSpec), ())
    walk.check_rules(value)
    if walk.faults or not isinstance(value, ExperimentSpec):
        raise SpecFaults(file, walk.faults or [SpecFault(1, 1, "", "is no experiment")])
    return LocatedSpec(value, file, walk.positions)
