"""The OpenAPI document, made of the table of routes and the types that decode and encode."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from stream_xp import __version__
from stream_xp.services.api.wire import ErrorBody

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stream_xp.services.api.routes import Route

_REFERENCE: Final = "#/components/schemas/{name}"
_EXAMPLES: Final = {"experiment": "checkout", "canary_config": "checkout@canary"}
_WORDS: Final = {
    400: "It is not what it must be.",
    401: "A token is missing, or is none of ours.",
    403: "It is closed, or the page that asks may not.",
    404: "There is no such thing.",
    408: "The body did not come in time.",
    409: "It would change nothing; the sentence says why.",
    413: "The body is too long.",
    415: "The content type must be application/json.",
    421: "The service is not called by that name.",
    429: "Too many are on their way.",
    431: "Address and headers are too long.",
    503: "Not now.",
}


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The document of these routes, OpenAPI 3.1."""
    kinds = [kind for route in routes for kind in (route.answer, route.body) if kind is not None]
    schemas, components = msgspec.json.schema_components([*kinds, ErrorBody], ref_template=_REFERENCE)
    of_kind = dict(zip([repr(kind) for kind in (*kinds, ErrorBody)], schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, of_kind)
    return {
        "openapi": "3.1.0",
        "info": {"title": "stream_xp", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": {name: _described(schema) for name, schema in sorted(components.items())},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, of_kind: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.text,
        "responses": _responses(route, of_kind),
    }
    parameters = [_path_parameter(name) for name in re.findall(r"{(\w+)}", route.path)]
    parameters += [
        {"name": one.name, "in": one.where, "description": one.text, "schema": one.schema}
        for one in route.parameters
    ]
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        content = {"application/json": {"schema": of_kind[repr(route.body)]}}
        operation["requestBody"] = {"required": True, "content": content}
    if route.writes:
        operation["security"] = [{"token": []}]
    return operation


def _path_parameter(name: str) -> dict[str, Any]:
    schema = {"type": "string", "minLength": 1, "maxLength": 2000}
    example = {"example": _EXAMPLES[name]} if name in _EXAMPLES else {}
    return {"name": name, "in": "path", "required": True, "schema": schema, **example}


def _responses(route: Route, of_kind: dict[str, Any]) -> dict[str, Any]:
    text = {"text/plain": {"schema": {"type": "string"}}}
    error = {"application/json": {"schema": of_kind[repr(ErrorBody)]}}
    content = text if route.answer is None else {"application/json": {"schema": of_kind[repr(route.answer)]}}
    refusals = {*route.refusals, 400, 431, *(() if route.unguarded else (403, 421))}
    responses: dict[str, Any] = {str(route.status): {"description": "As asked for.", "content": content}}
    for status in sorted(refusals):
        said = error
        if route.unguarded and status == 503:
            said = content
        elif route.answer is None and status == 403:
            said = {**error, **text}
        responses[str(status)] = {"description": _WORDS[status], "content": said}
    return responses


def _described(schema: dict[str, Any]) -> dict[str, Any]:
    if "description" not in schema:
        return schema
    summary, _, _ = inspect.cleandoc(schema["description"]).partition("\n\nAttributes:")
    return {**schema, "description": summary.strip()}
