"""YAML files of other kinds than an experiment's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import yaml
from msgspec import inspect

from stream_xp.services.spec_file.faults import FieldPath, SpecFault, SpecFaults, dotted, nearest
from stream_xp.services.spec_file.nodes import TAG, compose, mismatch, position, text_of
from stream_xp.services.spec_file.walk import Walk, without_metadata


class Fields(NamedTuple):
    """What a YAML file of another kind than an experiment's says.

    Attributes:
        file: name of the file, as given.
        value: of the type that was asked for.
        places: path of each field to its line and column, from 1.
        texts: path to the text of a field that its type leaves open, with blank lines before it: a fault in there has
            the line of the file.
    """

    file: str
    value: Any
    places: dict[FieldPath, tuple[int, int]]
    texts: dict[FieldPath, str]

    def fault(self, path: FieldPath, message: str) -> SpecFault:
        """A fault of a field, at its place or at that of the nearest field around it."""
        return SpecFault(*nearest(self.places, path), dotted(path), message)


def read_fields(raw: bytes, file: str, kind: type[msgspec.Struct]) -> Fields:
    """Return the fields of a YAML file; raises SpecFaults with all that is no field of `kind`."""
    text = text_of(raw, file)
    root, faults = compose(text, file)
    walk = _OpenWalk(faults, text)
    value = walk.value(root, inspect.type_info(kind), ())
    if walk.faults or not isinstance(value, kind):
        raise SpecFaults(file, walk.faults or [SpecFault(1, 1, "", f"is no {kind.__name__.lower()}")])
    return Fields(file, value, walk.places, walk.texts)


class _OpenWalk(Walk):
    """A walk over types of which some fields may be of two kinds, or fields that somebody else reads."""

    def __init__(self, faults: list[SpecFault], text: str) -> None:
        super().__init__(faults)
        self.places: dict[FieldPath, tuple[int, int]] = {}
        self.texts: dict[FieldPath, str] = {}
        self._text = text

    def value(self, node: yaml.Node, kind: inspect.Type, path: FieldPath) -> Any:
        self.places.setdefault(path, position(node.start_mark))
        bare, _ = without_metadata(kind)
        parts = bare.types if isinstance(bare, inspect.UnionType) else ()
        if sum(not isinstance(part, inspect.NoneType) for part in parts) > 1:
            return self.value(node, next((part for part in parts if _suits(node, part)), parts[0]), path)
        if isinstance(bare, inspect.DictType) and isinstance(bare.value_type, inspect.AnyType):
            return self._left_open(node, path)
        return super().value(node, kind, path)

    def _left_open(self, node: yaml.Node, path: FieldPath) -> Any:
        if not isinstance(node, yaml.MappingNode):
            return self.fault(node, path, str(mismatch("fields", node)))
        start: Any = node.start_mark
        self.texts[path] = (
            "\n" * start.line + " " * start.column + self._text[start.index : node.end_mark.index]
        )
        return {}

    def _entries(self, node: yaml.MappingNode, path: FieldPath) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        for name, key, child in super()._entries(node, path):
            shown = child if isinstance(child, yaml.ScalarNode) else key
            self.places.setdefault((*path, name), position(shown.start_mark))
            yield name, key, child


def _suits(node: yaml.Node, kind: inspect.Type) -> bool:
    """Whether a value looks like one of a kind, of the kinds that a field may have."""
    if isinstance(kind, inspect.DictType):
        return isinstance(node, yaml.MappingNode)
    if isinstance(kind, inspect.StrType):
        return node.tag == f"{TAG}str"
    if isinstance(kind, inspect.NoneType):
        return node.tag == f"{TAG}null"
    return isinstance(node, yaml.ScalarNode) and node.tag in (f"{TAG}int", f"{TAG}float")
