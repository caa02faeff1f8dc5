"""The OpenAPI document of a table of routes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve_apps import schemas

_HEADERS = {
    "X-Request-Id": (
        "Name of this request in the answer, the log and for /feedback: at most 128 letters, "
        "digits, `.`, `_`, `-`. Anything else is replaced by a new one.",
        {"type": "string"},
    ),
    "X-Model-Version": (
        "Version that is to answer; else the traffic policy chooses.",
        {"type": "string", "pattern": "^[0-9]{0,9}$"},
    ),
    "X-Routing-Key": (
        "Requests with the same key are answered by the same version.",
        {"type": "string"},
    ),
    "Inference-Header-Content-Length": (
        "Bytes of the JSON part of a body with binary tensors.",
        {"type": "string", "pattern": "^[0-9]{0,9}$"},
    ),
    "traceparent": ("W3C trace context of the caller.", {"type": "string"}),
}
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


class Described(Protocol):
    """What the document says of a route."""

    method: str
    path: str
    summary: str
    response: type[BaseModel] | None
    content_type: str
    request: Mapping[str, Any] | None
    is_body_required: bool
    errors: tuple[int, ...]
    tag: str
    scope: str | None
    headers: tuple[str, ...]


def document(routes: Sequence[Any], *, title: str, description: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document, as JSON types."""
    models = {schemas.Error, *(route.response for route in routes if route.response)}
    _, definitions = models_json_schema(
        [(model, "serialization") for model in sorted(models, key=lambda model: model.__name__)],
        ref_template="#/components/schemas/{model}",
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "description": description, "version": "2"},
        "paths": paths,
        "components": {"schemas": definitions["$defs"], "securitySchemes": _KEYS},
    }


def inlined(model: type[BaseModel]) -> dict[str, Any]:
    """Return a model's JSON schema with those that it refers to in their places."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolve(part: Any) -> Any:
        if isinstance(part, list):
            return [resolve(each) for each in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return resolve(definitions[part["$ref"].rpartition("/")[2]])
        return {name: resolve(each) for name, each in part.items()}

    resolved: dict[str, Any] = resolve(schema)
    return resolved


def _operation(route: Described) -> dict[str, Any]:
    is_json = route.content_type == "application/json"
    schema = _reference(route.response) if route.response else {"type": "object"}
    answers = {route.content_type: {"schema": schema if is_json else {"type": "string"}}}
    if "Inference-Header-Content-Length" in route.headers:
        answers["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    errors = sorted({*route.errors, *((401, 403) if route.scope else ())})
    operation: dict[str, Any] = {
        "tags": [route.tag],
        "summary": route.summary,
        "operationId": f"{route.method} {route.path}",
        "parameters": [
            *(
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in re.findall(r"\{(\w+)\}", route.path)
            ),
            *(_header(name) for name in ("X-Request-Id", *route.headers)),
        ],
        "responses": {
            "200": {"description": "The answer.", "content": answers},
            **{str(status): _error(status) for status in errors},
        },
        # Without a key where none is asked for.
        "security": [{}, *({name: []} for name in _KEYS)] if route.scope else [],
    }
    if route.request:
        operation["requestBody"] = {
            "required": route.is_body_required,
            "content": dict(route.request),
        }
    return operation


def _header(name: str) -> dict[str, Any]:
    description, schema = _HEADERS[name]
    return {"name": name, "in": "header", "description": description, "schema": schema}


def _error(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": _reference(schemas.Error)}}
    answer: dict[str, Any] = {"description": _ERRORS[status], "content": content}
    if status == 503:
        header = {"description": "Seconds to wait.", "schema": {"type": "string"}}
        answer["headers"] = {"Retry-After": header}
    return answer


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


_ERRORS = {
    400: "The request is malformed.",
    401: "A valid API key is missing.",
    403: "The API key does not allow this, or a page of another site asks.",
    404: "There is no such model or version.",
    408: "The body took too long.",
    413: "The body or picture is too large.",
    415: "The content type or encoding is not served.",
    422: "The body does not fit the model.",
    503: "Overloaded, or not up; try again.",
}
