"""Nodes against types: each field is checked by itself, whatever is wrong with its neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import yaml
from msgspec import inspect

from stream_xp.domain.experiment_rules import rules
from stream_xp.services.spec_file.faults import FieldPath, SpecFault, did_you_mean, dotted, nearest
from stream_xp.services.spec_file.nodes import REFUSED, TAG, mismatch, position
from stream_xp.services.spec_file.partial import UNREADABLE, Partial, Unreadable, readable
from stream_xp.services.spec_file.scalars import scalar_of, wrong_length
from stream_xp.services.spec_file.stand_ins import stand_ins


class Walk:
    """Walks nodes and types together; gathers the faults, and the positions that rules point to."""

    def __init__(self, faults: list[SpecFault]) -> None:
        self.faults = faults
        self.positions: dict[FieldPath, tuple[int, int]] = {}

    def fault(self, node: yaml.Node, path: FieldPath, message: str) -> Unreadable:
        """Note a fault at `node`."""
        self.faults.append(SpecFault(*position(node.start_mark), dotted(path), message))
        return UNREADABLE

    def value(self, node: yaml.Node, kind: inspect.Type, path: FieldPath) -> Any:
        """Return the value of `node` as `kind`, or `UNREADABLE` with its fault noted."""
        self.positions.setdefault(path, position(node.start_mark))
        kind, hint = without_metadata(kind)
        if isinstance(kind, inspect.UnionType):
            return self._optional(node, kind, path)
        if node.tag == REFUSED:
            return UNREADABLE
        try:
            return self._read(node, kind, path, hint)
        except ValueError as error:
            return self.fault(node, path, str(error))

    def _read(self, node: yaml.Node, kind: inspect.Type, path: FieldPath, hint: str) -> Any:
        match kind:
            case inspect.StructType():
                return self._struct(node, kind, path)
            case inspect.VarTupleType():
                return self._list(node, kind, path)
            case inspect.DictType():
                return self._dict(node, kind, path)
        return scalar_of(node, kind, hint)

    def check_rules(self, value: object) -> None:
        """Note every rule across fields that `value` breaks, whatever its unreadable fields may be."""
        found = [{(fault.path, fault.message): None for fault in rules(spec)} for spec in stand_ins(value)]
        for path, message in found[0] if found else ():
            if all((path, message) in faults for faults in found):
                self.faults.append(SpecFault(*nearest(self.positions, path), dotted(path), message))

    def _optional(self, node: yaml.Node, kind: inspect.UnionType, path: FieldPath) -> Any:
        inner = next(part for part in kind.types if not isinstance(part, inspect.NoneType))
        if node.tag != f"{TAG}null":
            return self.value(node, inner, path)
        if node.value == "" and isinstance(inner, inspect.StructType):
            # `ramp:` alone could mean the usual ramp or none, and with none everybody gets the treatment at once.
            return self.fault(
                node, path, "is empty: write its fields, {} for the defaults of all, or null for none"
            )
        return None

    def _struct(self, node: yaml.Node, kind: inspect.StructType, path: FieldPath) -> Any:
        if not isinstance(node, yaml.MappingNode):
            raise mismatch("fields", node)
        fields = {field.encode_name: field for field in kind.fields}
        values: dict[str, Any] = {}
        for name, key, child in self._entries(node, path):
            if name not in fields:
                self.fault(key, (*path, name), f"unknown field{did_you_mean(name, fields)}")
                continue
            # A list starts on the line after its name, and the name is where the eye looks.
            self.positions[*path, name] = position(
                (child if isinstance(child, yaml.ScalarNode) else key).start_mark
            )
            values[name] = self.value(child, fields[name].type, (*path, name))
        missing = [name for name, field in fields.items() if field.required and name not in values]
        for name in missing:
            values[name] = self.fault(node, (*path, name), "required field is missing")
        return self._built(node, kind, values, path)

    def _built(
        self, node: yaml.Node, kind: inspect.StructType, values: dict[str, Any], path: FieldPath
    ) -> Any:
        if not readable(values):
            return Partial(kind.cls, values)
        try:
            return msgspec.convert(values, kind.cls)
        except msgspec.ValidationError as error:
            return self.fault(node, path, str(error).split(" - at `$")[0])

    def _list(self, node: yaml.Node, kind: inspect.VarTupleType, path: FieldPath) -> Any:
        if not isinstance(node, yaml.SequenceNode):
            raise mismatch("a list", node)
        values = tuple(self.value(child, kind.item_type, (*path, n)) for n, child in enumerate(node.value))
        wrong = wrong_length(len(values), kind, "entries")
        return self.fault(node, path, wrong) if wrong else values

    def _dict(self, node: yaml.Node, kind: inspect.DictType, path: FieldPath) -> Any:
        if not isinstance(node, yaml.MappingNode):
            raise mismatch("names with values", node)
        values = {}
        for name, key, child in self._entries(node, path):
            wanted = self.value(key, kind.key_type, (*path, name))
            values[name if isinstance(wanted, str) else UNREADABLE] = self.value(
                child, kind.value_type, (*path, name)
            )
        return values

    def _entries(self, node: yaml.MappingNode, path: FieldPath) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        first: dict[str, int] = {}
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == REFUSED:
                self.fault(key, path, "a field name must be text")
            elif key.value in first:
                self.fault(key, (*path, key.value), f"given twice, first on line {first[key.value]}")
            else:
                first[key.value] = key.start_mark.line + 1
                yield key.value, key, child


def without_metadata(kind: inspect.Type) -> tuple[inspect.Type, str]:
    """The bare type, and the words of its pattern."""
    if not isinstance(kind, inspect.Metadata):
        return kind, ""
    return kind.type, (kind.extra_json_schema or {}).get("description", "")
