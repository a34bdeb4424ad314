"""Reads an experiment's YAML file and reports every fault at once, each with its line.

`msgspec` stops at the first fault. So the YAML nodes, which know their lines, are walked side by side with
the types of `domain.experiment`: each field is checked by itself, whatever is wrong with its neighbours.
The rules across fields then run with stand-ins for what could not be read, and count where no stand-in
heals them.
"""

from __future__ import annotations

import difflib
import itertools
import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import msgspec
import yaml
from msgspec import inspect

from stream_xp.domain.ages import Ages
from stream_xp.domain.experiment import (
    Adjustment,
    Aggregation,
    Arm,
    Covariate,
    Denominator,
    ExperimentSpec,
    Metric,
    MetricKind,
    Role,
    Threshold,
    rules,
)
from stream_xp.domain.rollout import Allocation
from stream_xp.errors import ConfigError

MAX_FILE_BYTES = 1_048_576
"""Longest spec file that is read."""

_MAX_DEPTH = 20
_MAX_NODES = 10_000

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
        return SpecFault(*_nearest(self.positions, path), _dotted(path), message)

    def line(self, path: FieldPath) -> int:
        """The line of a field, or of the nearest one around it that the file has."""
        return _nearest(self.positions, path)[0]


def load_spec(path: Path | str) -> ExperimentSpec:
    """Return the spec in the YAML file at `path`; raises SpecFaults with every fault it has."""
    return load_located(path).spec


def load_located(path: Path | str) -> LocatedSpec:
    """Return the spec in the YAML file at `path` and where its fields stand; raises SpecFaults."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _refusal(str(path), f"cannot be read: {error.strerror}") from error
    return _located(raw, str(path))


def parse_spec(raw: bytes, file: str) -> ExperimentSpec:
    """Return the spec in the bytes of a YAML file; raises SpecFaults under the name `file`."""
    return _located(raw, file).spec


def _located(raw: bytes, file: str) -> LocatedSpec:
    text = _text(raw, file)
    root, faults = _compose(text, file)
    walk = _Walk(faults)
    value = walk.value(root, inspect.type_info(ExperimentSpec), ())
    walk.check_rules(value)
    if walk.faults or not isinstance(value, ExperimentSpec):
        raise SpecFaults(file, walk.faults or [SpecFault(1, 1, "", "is no experiment")])
    return LocatedSpec(value, file, walk.positions)


def _refusal(file: str, message: str, *, line: int = 1, column: int = 1) -> SpecFaults:
    return SpecFaults(file, [SpecFault(line, column, "", message)])


def _text(raw: bytes, file: str) -> str:
    if len(raw) > MAX_FILE_BYTES:
        raise _refusal(file, f"is longer than {MAX_FILE_BYTES} bytes, the most that is read")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise _refusal(file, "is not UTF-8 from here on", line=line, column=column) from error


# YAML text to nodes -------------------------------------------------------------------------------

_TAG = "tag:yaml.org,2002:"
_REFUSED = "!refused"


class _Composer(yaml.SafeLoader):
    """SafeLoader that refuses aliases, depth and mass, each of which can make a small file enormous."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.aliases: list[yaml.Mark] = []
        self.depth = self.nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            self.get_event()  # type: ignore[no-untyped-call]
            mark: Any = event.start_mark
            self.aliases.append(mark)
            return yaml.ScalarNode(_REFUSED, "", mark, mark)
        self.depth += 1
        self.nodes += 1
        if self.depth > _MAX_DEPTH or self.nodes > _MAX_NODES:
            limit = f"{_MAX_DEPTH} levels" if self.depth > _MAX_DEPTH else f"{_MAX_NODES} values"
            raise yaml.MarkedYAMLError(
                problem=f"more than {limit}, no spec is so large", problem_mark=event.start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _compose(text: str, file: str) -> tuple[yaml.Node, list[SpecFault]]:
    """Return the document's root, and the faults of form that do not keep the rest from being read."""
    try:
        composer = _Composer(text)
        root, faults = _documents(composer)
    except yaml.MarkedYAMLError as error:
        line, column = _position(error.problem_mark or error.context_mark)
        raise _refusal(
            file, f"is not YAML: {error.problem or error.context}", line=line, column=column
        ) from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        raise _refusal(file, "has a character that YAML does not allow", line=line, column=column) from error
    if root is None:
        raise _refusal(file, "is empty")
    aliases = (_position(mark) for mark in composer.aliases)
    return root, [
        *faults,
        *(SpecFault(*at, "", "aliases (*name) are not allowed, write it out") for at in aliases),
    ]


def _documents(composer: _Composer) -> tuple[yaml.Node | None, list[SpecFault]]:
    root = composer.get_node() if composer.check_node() else None
    if not composer.check_node():
        return root, []
    event: Any = composer.peek_event()  # type: ignore[no-untyped-call]
    at = _position(event.start_mark)
    return root, [SpecFault(*at, "", "a second document starts here, a file holds one experiment")]


def _position(mark: yaml.Mark | None) -> tuple[int, int]:
    return (1, 1) if mark is None else (mark.line + 1, mark.column + 1)


# Nodes against types ------------------------------------------------------------------------------


class _Unreadable:
    """Stands where a value could not be read; its fault is noted already."""


class _Partial(NamedTuple):
    """A struct of which some fields are `_UNREADABLE`."""

    cls: type
    fields: dict[str, Any]


_UNREADABLE = _Unreadable()


class _Walk:
    """Walks nodes and types together; gathers the faults, and the positions that rules point to."""

    def __init__(self, faults: list[SpecFault]) -> None:
        self.faults = faults
        self.positions: dict[FieldPath, tuple[int, int]] = {}

    def fault(self, node: yaml.Node, path: FieldPath, message: str) -> _Unreadable:
        """Note a fault at `node`."""
        self.faults.append(SpecFault(*_position(node.start_mark), _dotted(path), message))
        return _UNREADABLE

    def value(self, node: yaml.Node, kind: inspect.Type, path: FieldPath) -> Any:
        """Return the value of `node` as `kind`, or `_UNREADABLE` with its fault noted."""
        self.positions.setdefault(path, _position(node.start_mark))
        kind, hint = _without_metadata(kind)
        if isinstance(kind, inspect.UnionType):
            return self._optional(node, kind, path)
        if node.tag == _REFUSED:
            return _UNREADABLE
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
        return _scalar(node, kind, hint)

    def check_rules(self, value: object) -> None:
        """Note every rule across fields that `value` breaks, whatever its unreadable fields may be."""
        found = [{(fault.path, fault.message): None for fault in rules(spec)} for spec in _stand_ins(value)]
        for path, message in found[0] if found else ():
            if all((path, message) in faults for faults in found):
                self.faults.append(SpecFault(*_nearest(self.positions, path), _dotted(path), message))

    def _optional(self, node: yaml.Node, kind: inspect.UnionType, path: FieldPath) -> Any:
        inner = next(part for part in kind.types if not isinstance(part, inspect.NoneType))
        if node.tag != f"{_TAG}null":
            return self.value(node, inner, path)
        if node.value == "" and isinstance(inner, inspect.StructType):
            # `ramp:` alone could mean the usual ramp or none, and with none everybody gets the treatment at once.
            return self.fault(
                node, path, "is empty: write its fields, {} for the defaults of all, or null for none"
            )
        return None

    def _struct(self, node: yaml.Node, kind: inspect.StructType, path: FieldPath) -> Any:
        if not isinstance(node, yaml.MappingNode):
            raise _mismatch("fields", node)
        fields = {field.encode_name: field for field in kind.fields}
        values: dict[str, Any] = {}
        for name, key, child in self._entries(node, path):
            if name not in fields:
                self.fault(key, (*path, name), f"unknown field{_did_you_mean(name, fields)}")
                continue
            # A list starts on the line after its name, and the name is where the eye looks.
            self.positions[*path, name] = _position(
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
        if not _readable(values):
            return _Partial(kind.cls, values)
        try:
            return msgspec.convert(values, kind.cls)
        except msgspec.ValidationError as error:
            return self.fault(node, path, str(error).split(" - at `$")[0])

    def _list(self, node: yaml.Node, kind: inspect.VarTupleType, path: FieldPath) -> Any:
        if not isinstance(node, yaml.SequenceNode):
            raise _mismatch("a list", node)
        values = tuple(self.value(child, kind.item_type, (*path, n)) for n, child in enumerate(node.value))
        wrong = _wrong_length(len(values), kind, "entries")
        return self.fault(node, path, wrong) if wrong else values

    def _dict(self, node: yaml.Node, kind: inspect.DictType, path: FieldPath) -> Any:
        if not isinstance(node, yaml.MappingNode):
            raise _mismatch("names with values", node)
        values = {}
        for name, key, child in self._entries(node, path):
            wanted = self.value(key, kind.key_type, (*path, name))
            values[name if isinstance(wanted, str) else _UNREADABLE] = self.value(
                child, kind.value_type, (*path, name)
            )
        return values

    def _entries(self, node: yaml.MappingNode, path: FieldPath) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        first: dict[str, int] = {}
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _REFUSED:
                self.fault(key, path, "a field name must be text")
            elif key.value in first:
                self.fault(key, (*path, key.value), f"given twice, first on line {first[key.value]}")
            else:
                first[key.value] = key.start_mark.line + 1
                yield key.value, key, child


def _nearest(positions: Mapping[FieldPath, tuple[int, int]], path: FieldPath) -> tuple[int, int]:
    return positions[next(p for p in (path[:n] for n in range(len(path), -1, -1)) if p in positions)]


def _readable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_readable(key) and _readable(item) for key, item in value.items())
    if isinstance(value, tuple) and not isinstance(value, _Partial):
        return all(_readable(item) for item in value)
    return not isinstance(value, (_Unreadable, _Partial))


def _without_metadata(kind: inspect.Type) -> tuple[inspect.Type, str]:
    if not isinstance(kind, inspect.Metadata):
        return kind, ""
    return kind.type, (kind.extra_json_schema or {}).get("description", "")


def _dotted(path: FieldPath) -> str:
    steps = (f"[{step}]" if isinstance(step, int) else f".{_shown(step)}" for step in path)
    return "".join(steps).removeprefix(".")


def _shown(text: str) -> str:
    """`text` as one short printable line."""
    escaped = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return escaped if len(escaped) <= 60 else f"{escaped[:57]}..."


def _did_you_mean(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]}?" if close else ""


def _wrong_length(length: int, kind: Any, noun: str) -> str | None:
    if kind.min_length is not None and length < kind.min_length:
        return f"has {length} {noun}, needs at least {kind.min_length}"
    if kind.max_length is not None and length > kind.max_length:
        return f"has {length} {noun}, may have at most {kind.max_length}"
    return None


# Files of other kinds -------------------------------------------------------------------------------


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
        near = next(p for p in (path[:n] for n in range(len(path), -1, -1)) if p in self.places)
        return SpecFault(*self.places[near], _dotted(path), message)


def read_fields(raw: bytes, file: str, kind: type[msgspec.Struct]) -> Fields:
    """Return the fields of a YAML file; raises SpecFaults with all that is no field of `kind`."""
    text = _text(raw, file)
    root, faults = _compose(text, file)
    walk = _OpenWalk(faults, text)
    value = walk.value(root, inspect.type_info(kind), ())
    if walk.faults or not isinstance(value, kind):
        raise SpecFaults(file, walk.faults or [SpecFault(1, 1, "", f"is no {kind.__name__.lower()}")])
    return Fields(file, value, walk.places, walk.texts)


class _OpenWalk(_Walk):
    """A walk over types of which some fields may be of two kinds, or fields that somebody else reads."""

    def __init__(self, faults: list[SpecFault], text: str) -> None:
        super().__init__(faults)
        self.places: dict[FieldPath, tuple[int, int]] = {}
        self.texts: dict[FieldPath, str] = {}
        self._text = text

    def value(self, node: yaml.Node, kind: inspect.Type, path: FieldPath) -> Any:
        self.places.setdefault(path, _position(node.start_mark))
        bare, _ = _without_metadata(kind)
        parts = bare.types if isinstance(bare, inspect.UnionType) else ()
        if sum(not isinstance(part, inspect.NoneType) for part in parts) > 1:
            return self.value(node, next((part for part in parts if _suits(node, part)), parts[0]), path)
        if isinstance(bare, inspect.DictType) and isinstance(bare.value_type, inspect.AnyType):
            return self._left_open(node, path)
        return super().value(node, kind, path)

    def _left_open(self, node: yaml.Node, path: FieldPath) -> Any:
        if not isinstance(node, yaml.MappingNode):
            return self.fault(node, path, str(_mismatch("fields", node)))
        start: Any = node.start_mark
        self.texts[path] = (
            "\n" * start.line + " " * start.column + self._text[start.index : node.end_mark.index]
        )
        return {}

    def _entries(self, node: yaml.MappingNode, path: FieldPath) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        for name, key, child in super()._entries(node, path):
            shown = child if isinstance(child, yaml.ScalarNode) else key
            self.places.setdefault((*path, name), _position(shown.start_mark))
            yield name, key, child


def _suits(node: yaml.Node, kind: inspect.Type) -> bool:
    """Whether a value looks like one of a kind, of the kinds that a field may have."""
    if isinstance(kind, inspect.DictType):
        return isinstance(node, yaml.MappingNode)
    if isinstance(kind, inspect.StrType):
        return node.tag == f"{_TAG}str"
    if isinstance(kind, inspect.NoneType):
        return node.tag == f"{_TAG}null"
    return isinstance(node, yaml.ScalarNode) and node.tag in (f"{_TAG}int", f"{_TAG}float")


# Scalars ------------------------------------------------------------------------------------------

_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)?(\.[0-9_]*)?([eE][-+]?[0-9]{1,4})?")
_TAG_NAMES = {
    "bool": "the boolean",
    "float": "the number",
    "int": "the number",
    "null": "nothing",
    "str": "the text",
    "timestamp": "the date",
}


def _mismatch(expected: str, node: yaml.Node) -> ValueError:
    return ValueError(f"expected {expected}, got {_described(node)}")


def _described(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "fields"
    name = _TAG_NAMES.get(node.tag.removeprefix(_TAG), f"a value tagged {_shown(node.tag)}:")
    return name if node.tag == f"{_TAG}null" else f"{name} {_shown(node.value)!r}"


def _scalar(node: yaml.Node, kind: inspect.Type, hint: str) -> Any:
    """Return the value of a scalar node; raises ValueError with the fault."""
    if isinstance(kind, inspect.BoolType):
        return _boolean(node)
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        return _number(node, kind)
    if isinstance(kind, inspect.EnumType):
        return _choice(_string(node), kind)
    if isinstance(kind, inspect.StrType):
        return _checked_text(_string(node), kind, hint)
    raise ValueError("is of a kind that spec files do not hold")


def _boolean(node: yaml.Node) -> bool:
    if node.tag != f"{_TAG}bool" or node.value.lower() not in yaml.SafeLoader.bool_values:
        raise _mismatch("true or false", node)
    return bool(yaml.SafeLoader.bool_values[node.value.lower()])


def _string(node: yaml.Node) -> str:
    if node.tag == f"{_TAG}str":
        return str(node.value)
    can_be_quoted = (
        isinstance(node, yaml.ScalarNode) and node.tag.startswith(_TAG) and node.tag != f"{_TAG}null"
    )
    raise ValueError(f"expected text, got {_described(node)}{'; put it in quotes' if can_be_quoted else ''}")


def _choice(text: str, kind: inspect.EnumType) -> Any:
    members = {str(member.value): member for member in kind.cls}
    if text not in members:
        known = ", ".join(members)
        raise ValueError(f"must be one of {known}, got {_shown(text)!r}{_did_you_mean(text, members)}")
    return members[text]


def _checked_text(text: str, kind: inspect.StrType, hint: str) -> str:
    wrong = _wrong_length(len(text), kind, "characters")
    if wrong:
        raise ValueError(wrong)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("holds half a surrogate pair, which is no character")
    if kind.pattern is not None and re.search(kind.pattern, text) is None:
        raise ValueError(f"must be {hint or f'text like {kind.pattern}'}, got {_shown(text)!r}")
    return text


def _number(node: yaml.Node, kind: inspect.IntType | inspect.FloatType) -> int | float:
    whole = isinstance(kind, inspect.IntType)
    noun = "a whole number" if whole else "a number"
    text = node.value.replace("_", "") if isinstance(node, yaml.ScalarNode) else ""
    if node.tag not in (f"{_TAG}int", f"{_TAG}float"):
        raise ValueError(f"expected {noun}, got {_described(node)}{_number_hint(node, text)}")
    if text.lower().strip("+-") in (".inf", ".nan"):
        raise ValueError(f"must be finite, got {_shown(node.value)}")
    if not any(map(str.isdigit, text)) or _DECIMAL.fullmatch(text) is None:
        # YAML 1.1 reads 010 as 8, 1:30 as 90 and 0x10 as 16, which nobody means here.
        raise ValueError(f"expected {noun} in plain decimals, got {_shown(node.value)!r}")
    if whole and node.tag != f"{_TAG}int":
        raise ValueError(f"expected {noun}, got {_shown(node.value)}")
    return _in_range(_parsed(text, whole=whole), kind)


def _parsed(text: str, *, whole: bool) -> int | float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"is too large for a number: {_shown(text)}")
    return int(text) if whole else number


def _number_hint(node: yaml.Node, text: str) -> str:
    """Return what to write instead where YAML 1.1 reads 1e-3 and "0.1" as text."""
    if not isinstance(node, yaml.ScalarNode) or node.tag != f"{_TAG}str":
        return ""
    if not any(map(str.isdigit, text)) or _DECIMAL.fullmatch(text) is None:
        return ""
    if node.style is not None:
        return "; take the quotes away"
    plain = f"{Decimal(text):f}" if abs(Decimal(text).adjusted()) <= 30 else None
    return f"; YAML reads an exponent without point and sign as text{f', write {plain}' if plain else ''}"


def _in_range(number: float, kind: inspect.IntType | inspect.FloatType) -> int | float:
    checks = (
        (kind.gt, operator.gt, "greater than"),
        (kind.ge, operator.ge, "at least"),
        (kind.lt, operator.lt, "less than"),
        (kind.le, operator.le, "at most"),
    )
    for limit, holds, words in checks:
        if limit is not None and not holds(number, limit):
            raise ValueError(f"must be {words} {limit}, got {number!r}")
    return number


# Rules across fields, with stand-ins for what could not be read -----------------------------------

_STAND_IN_ARMS = (Arm(key="\0a", weight=0.5, control=True), Arm(key="\0b", weight=0.5))
_STAND_IN_METRIC = {
    "kind": tuple(MetricKind),
    "role": tuple(Role),
    "aggregation": (None, Aggregation.ANY, Aggregation.SUM),
    "attribution_window": ("1d",),
    "margin": (Threshold(relative=0.5),),
    "minimum_effect": (Threshold(absolute=1.0),),
    "critical": (False,),
    "direction": ("increase",),
    "event": (None,),
    "denominator": (None, Denominator(event="-", aggregation=Aggregation.ANY)),
    "quantiles": (None,),
    "adjustment": (Adjustment.NONE,),
}


def _stand_ins(value: object) -> list[ExperimentSpec]:
    """Specs that agree with `value` where it could be read and differ where not; `value` itself if all could.

    A rule that all of them break is broken by the readable part alone.
    """
    if isinstance(value, ExperimentSpec):
        return [value]
    if not isinstance(value, _Partial):
        return []
    arms = _alternatives(value.fields.get("arms"), _arm_variants, _STAND_IN_ARMS)
    metrics = _alternatives(value.fields.get("metrics"), _metric_variants, (_metric_variants({}, 0)[0],))
    count = max(len(arms), len(metrics))
    return [_spec(value.fields, arms[n % len(arms)], metrics[n % len(metrics)]) for n in range(count)]


def _spec(fields: Mapping[str, Any], arms: tuple[Arm, ...], metrics: tuple[Metric, ...]) -> ExperimentSpec:
    minimum, maximum = fields.get("minimum_runtime", "0s"), fields.get("maximum_runtime")
    covariate = fields.get("covariate")
    if "covariate" in fields and not _readable(covariate):
        covariate = Covariate(scale=1.0, bound=1.0)
    segments = fields.get("segments", {})
    return ExperimentSpec(
        experiment="-",
        owner="-",
        hypothesis="-",
        unit="-",
        planned_sample=100,
        arms=arms,
        metrics=metrics,
        minimum_runtime=minimum if isinstance(minimum, str) else "0s",
        maximum_runtime=maximum if isinstance(maximum, str) else None,
        covariate=covariate,
        segments=segments if _readable(segments) else {},
        **{name: fields[name] for name in _sections(fields)},
    )


def _sections(fields: Mapping[str, Any]) -> list[str]:
    """The sections whose rules can be asked: they and what they speak of could be read.

    A stand-in for a section is none at all: one that heals every rule with every other would be long.
    """
    metrics, arms = (_listed(fields.get(name)) for name in ("metrics", "arms"))
    found = []
    for name in _SECTIONS:
        section = fields.get(name)
        names_others = isinstance(section, Allocation | Ages)
        named = metrics is not None and (
            not names_others or (_keyed(metrics) and _keyed(arms) and _readable(fields.get("segments", {})))
        )
        if _readable(section) and section is not None and named:
            found.append(name)
    return found


_SECTIONS = ("conclusion", "ramp", "allocation", "monitors", "layer", "ages")
"""The rules of a holdout, an overlap and a champion speak of the whole file, so they need all of it."""


def _listed(value: Any) -> tuple[Any, ...] | None:
    return value if isinstance(value, tuple) and not isinstance(value, _Partial) else None


def _keyed(items: tuple[Any, ...] | None) -> bool:
    """Whether every arm or metric of the list has a key that could be read."""
    if items is None:
        return False
    fields = [
        item.fields if isinstance(item, _Partial) else {"key": getattr(item, "key", None)} for item in items
    ]
    return all(isinstance(one.get("key"), str) for one in fields)


def _alternatives(value: Any, variants: Any, fallback: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    items = _listed(value)
    if items is None:
        return [fallback]
    columns = [_element_variants(item, index, variants) for index, item in enumerate(items)]
    count = max(map(len, columns), default=1)
    return [tuple(column[n % len(column)] for column in columns) for n in range(count)]


def _element_variants(item: Any, index: int, variants: Any) -> list[Any]:
    if isinstance(item, (Arm, Metric)):
        return [item]
    return list(variants(item.fields if isinstance(item, _Partial) else {}, index))


def _arm_variants(fields: Mapping[str, Any], index: int) -> list[Arm]:
    known = {name: field for name, field in fields.items() if _readable(field)}
    key = known.get("key", f"\0{index}")
    weights = (known["weight"],) if "weight" in known else (0.0, 0.5)
    unreadable = not fields or ("control" in fields and "control" not in known)
    controls = (False, True) if unreadable else (known.get("control", False),)
    return [Arm(key=key, weight=weight, control=control) for weight in weights for control in controls]


def _metric_variants(fields: Mapping[str, Any], index: int) -> list[Metric]:
    """Every combination of stand-ins for the unreadable fields of one metric."""
    known = {name: field for name, field in fields.items() if _readable(field)}
    unreadable = set(fields) - set(known) if fields else {"kind", "role", "direction", "attribution_window"}
    sizes = {known.get("scale") or 1.0, known.get("bound") or 1.0, 1.0, None}
    stand_ins = {"key": (f"\0{index}",), "scale": tuple(sizes), "bound": tuple(sizes), **_STAND_IN_METRIC}
    names = sorted(unreadable | ({"key"} - set(known)))
    combinations = itertools.product(*(stand_ins[name] for name in names))
    return [Metric(**{**known, **dict(zip(names, chosen, strict=True))}) for chosen in combinations]
