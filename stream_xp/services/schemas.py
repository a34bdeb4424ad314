"""Writes the JSON Schema (2020-12) of every record, from the types that decode it.

::

    python -m stream_xp.services.schemas --check
    python -m stream_xp.services.schemas --write
"""

from __future__ import annotations

import inspect
import json
import re
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from stream_xp.adapters.kafka_admin import topics_dir
from stream_xp.domain.dead_letter import DeadLetter
from stream_xp.domain.decision import ConfigRecord, Result, Signal
from stream_xp.domain.events import Exposure, Reward
from stream_xp.domain.experiment import ExperimentRecord, ExperimentSpec
from stream_xp.domain.operator import OrderSignal
from stream_xp.domain.statistics import PartitionStatistics

if TYPE_CHECKING:
    from pathlib import Path

BASE_ID: Final = "https://raw.githubusercontent.com/stream-xp/stream-xp/main/topics/schemas/"
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

RECORDS: Final[dict[str, type[msgspec.Struct]]] = {
    "exposure": Exposure,
    "reward": Reward,
    "experiment": ExperimentRecord,
    "experiment-spec": ExperimentSpec,
    "statistics": PartitionStatistics,
    "result": Result,
    "signal": Signal,
    "operator": OrderSignal,
    "config": ConfigRecord,
    "deadletter": DeadLetter,
}
ENVELOPED: Final[dict[str, type[msgspec.Struct]]] = {
    "exposure-cloudevent": Exposure,
    "reward-cloudevent": Reward,
}


def schemas() -> dict[str, dict[str, Any]]:
    """Return every schema under its file name."""
    plain = {name: _schema(kind) for name, kind in RECORDS.items()}
    enveloped = {name: _envelope(_schema(kind), kind.__name__) for name, kind in ENVELOPED.items()}
    return {
        f"{name}.v1.json": {"$schema": DIALECT, "$id": f"{BASE_ID}{name}.v1.json", **schema}
        for name, schema in {**plain, **enveloped}.items()
    }


def schema_text(schema: dict[str, Any]) -> str:
    """Return a schema as it stands in its file."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def differences(folder: Path) -> list[str]:
    """Return the files in `folder` that are missing, too many or not as generated."""
    wanted = {name: schema_text(schema) for name, schema in schemas().items()}
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}
    return sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))


def write(folder: Path) -> None:
    """Write every schema into `folder`; files that no record has any more are left for a person to judge."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, schema in schemas().items():
        (folder / name).write_text(schema_text(schema), encoding="utf-8")


def _schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    (reference,), generated = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    components = _whole_limits(generated)
    definitions = {name: _described(definition) for name, definition in sorted(components.items())}
    for struct in _structs(kind):
        _describe_fields(definitions[struct.__name__], struct)
    return {
        "title": kind.__name__,
        "description": definitions[kind.__name__].get("description", ""),
        **reference,
        "$defs": definitions,
    }


def _whole_limits(node: Any) -> Any:
    """Return a schema with limits of 0.0 and 1.0 as 0 and 1.

    Python holds a type with the limit 0 and one with 0.0 to be the same and keeps the first it sees, so that else
    the schemas would depend on what was imported before.
    """
    if isinstance(node, dict):
        return {
            key: int(value) if key in _LIMITS and value == int(value) else _whole_limits(value)
            for key, value in node.items()
        }
    return [_whole_limits(value) for value in node] if isinstance(node, list) else node


_LIMITS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def _envelope(schema: dict[str, Any], title: str) -> dict[str, Any]:
    """Return the schema of a structured CloudEvent around an event.

    The envelope's `id` and `source` are the identity, and its `time` stands in where the data has none.
    """
    data = schema["$defs"][title]
    timed = {"required": ["time"]}
    data["required"] = [name for name in data["required"] if name not in ("id", "time")]
    for name in ("id", "source"):
        del data["properties"][name]
    text = {"type": "string", "minLength": 1, "maxLength": 200}
    return {
        "title": f"{title} in a structured CloudEvent",
        "description": f"{schema['description']} The header is `content-type: application/cloudevents+json`.",
        "type": "object",
        "properties": {
            "specversion": {"const": "1.0"},
            "id": text,
            "source": text,
            "type": {"type": "string", "minLength": 1},
            "time": {"type": "string", "format": "date-time"},
            "data": {"$ref": schema["$ref"]},
        },
        "required": ["specversion", "id", "source", "type", "data"],
        "anyOf": [timed, {"properties": {"data": timed}}],
        "$defs": schema["$defs"],
    }


def _structs(kind: type[msgspec.Struct]) -> list[type[msgspec.Struct]]:
    """Return `kind` and every struct inside it."""
    found: dict[type[msgspec.Struct], None] = {}

    def visit(node: object) -> None:
        if isinstance(node, msgspec.inspect.StructType):
            if node.cls in found:
                return
            found[node.cls] = None
        if isinstance(node, list | tuple):
            for part in node:
                visit(part)
        elif isinstance(node, msgspec.Struct):
            for name in node.__struct_fields__:
                visit(getattr(node, name))

    visit(msgspec.inspect.type_info(kind))
    return list(found)


def _described(definition: dict[str, Any]) -> dict[str, Any]:
    # A docstring's indentation is kept up to Python 3.12 and cut from 3.13 on.
    if "description" not in definition:
        return definition
    summary, _, _ = inspect.cleandoc(definition["description"]).partition("\n\nAttributes:")
    return {**definition, "description": summary.strip()}


def _describe_fields(definition: dict[str, Any], struct: type[msgspec.Struct]) -> None:
    """Give each property the sentence that the docstring has for its attribute."""
    properties = definition.get("properties", {})
    sentences = _attribute_sentences(struct)
    for name, encoded in zip(struct.__struct_fields__, struct.__struct_encode_fields__, strict=True):
        if name in sentences and encoded in properties:
            properties[encoded] = {"description": sentences[name], **properties[encoded]}


def _attribute_sentences(struct: type[msgspec.Struct]) -> dict[str, str]:
    _, _, listed = inspect.cleandoc(struct.__doc__ or "").partition("\n\nAttributes:\n")
    block, _, _ = listed.partition("\n\n")
    joined = re.sub(r"\n {6,}", " ", block)
    lines = (line.strip().partition(": ") for line in joined.splitlines())
    return {name.strip(): text for names, _, text in lines for name in names.split(",")}


@click.command()
@click.option(
    "--check", "action", flag_value="check", default=True, help="Exit 1 if a file is not as generated."
)
@click.option("--write", "action", flag_value="write", help="Write every file.")
def main(action: str) -> None:
    """Check or write the JSON Schema of every record."""
    folder = topics_dir() / "schemas"
    if action == "write":
        write(folder)
    wrong = differences(folder)
    for name in wrong:
        click.echo(f"{name}: not as generated; run python -m stream_xp.services.schemas --write", err=True)
    if wrong:
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
