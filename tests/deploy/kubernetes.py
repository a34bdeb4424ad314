"""Holds resources against the schemas of Kubernetes, and of the operators whose resources deploy/ has."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, Final

import jsonschema
import yaml

from tests.deploy.tools import kubernetes_schemas

RELEASES: Final = ("1.25.0", "1.31.0", "1.37.0")
"""Of Kubernetes: the oldest that the chart names, one in between, the newest that there is a schema of."""
_CUSTOM: Final = Path(__file__).with_name("schemas")


def resources(text: str) -> list[dict[str, Any]]:
    """The resources in a text of several YAML documents."""
    return [document for document in yaml.safe_load_all(text) if document]


def faults(resource: dict[str, Any], release: str) -> list[str]:
    """What a release of Kubernetes would refuse of a resource; unknown fields are refused too."""
    group, _, version = resource["apiVersion"].rpartition("/")
    kind = resource["kind"]
    where = f"{kind} {resource['metadata']['name']}"
    if "." in group and not group.endswith(".k8s.io"):
        schema = json.loads((_CUSTOM / f"{kind.lower()}-{version}.json").read_text())
        validator = jsonschema.Draft202012Validator(schema)
    else:
        validator = _validator(kind.lower(), group.partition(".")[0], version, release)
    return [
        f"{where}: {'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in validator.iter_errors(resource)
    ]


@cache
def _validator(kind: str, group: str, version: str, release: str) -> jsonschema.protocols.Validator:
    name = "-".join(filter(None, (kind, group, version)))
    # The metaschema is named by the definitions, which stand beside.
    return jsonschema.Draft202012Validator(
        {**_schema(name, release), "$defs": _schema("_definitions", release)["$defs"]}
    )


@cache
def _schema(name: str, release: str) -> dict[str, Any]:
    file = f"kubernetes_validate/kubernetes-json-schema/v{release}-local-strict/{name}.json"
    text = re.sub(r'"\$ref":\s*"[^"#]*#/', '"$ref": "#/', kubernetes_schemas().read(file).decode())
    found: dict[str, Any] = json.loads(text)
    found.pop("$id", None)
    return found
