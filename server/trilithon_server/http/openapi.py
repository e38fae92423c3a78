"""
The OpenAPI 3.1 document, assembled from the route table, the pydantic models and the table of parameters.

Nothing is written twice: a route that is served is in the document, and what the document says of a parameter is what
its rule checks.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import pydantic

from trilithon_server.http.answer_schemas import ANSWERS
from trilithon_server.http.endpoint import Route
from trilithon_server.http.parse import AT_DEFAULT, HARMLESS
from trilithon_server.sampling_rules import RULES, UNSUPPORTED
from trilithon_server.service import VERSION

_REF = "#/components/schemas/{model}"

CONSTRAINT = {
    "type": "object",
    "description": "Exactly one form, compiled before the request is admitted.",
    "properties": {
        "json_schema": {"type": ["object", "string", "boolean"]},
        "json_object": {"const": True},
        "regex": {"type": "string", "minLength": 1},
        "grammar": {"type": "string", "minLength": 1, "description": "A Lark grammar."},
        "choice": {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        "whitespace": {"enum": ["flexible", "compact"]},
    },
    "additionalProperties": False,
}

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code", "status", "request_id", "details"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The first field that broke a rule."},
                "code": {"type": "string"},
                "status": {"type": "string", "description": "The status that gRPC has for it."},
                "request_id": {"type": "string"},
                "details": {"type": "array", "items": {"$ref": "#/components/schemas/Violation"}},
            },
        }
    },
}

VIOLATION = {
    "type": "object",
    "required": ["field", "code", "rule", "limit", "given", "message"],
    "properties": {name: {"type": "string"} for name in ("field", "code", "rule", "limit", "given", "message")},
}

_ERRORS = {
    "400": "The request breaks a rule; `details` names each.",
    "401": "No key, or not a known one.",
    "403": "The key lacks the scope.",
    "404": "No such model or object.",
    "409": "Something else holds the object, or it was changed in between.",
    "413": "The request is larger than the server reads.",
    "415": "The body has another media type than the route takes.",
    "429": "The queue is full, or the key too fast; see `Retry-After`.",
    "500": "A bug of the server; the request id leads to its log line.",
    "503": "Loading, draining or lost; see `Retry-After`.",
    "504": "The time limit passed.",
}


def document(routes: tuple[Route, ...], *, schemas: Mapping[str, Any]) -> dict[str, Any]:
    """
    The whole document.

    Args:
        routes: that are served.
        schemas: of the answers of extensions.
    """
    known: dict[str, Any] = {"Constraint": CONSTRAINT, "Error": ERROR, "Violation": VIOLATION, **ANSWERS, **schemas}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, known)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Trilithon",
            "version": VERSION,
            "description": "Text, log-probabilities and vectors from models on tensor- and pipeline-parallel ranks.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": known,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {
        "operationId": re.sub(r"[^a-z0-9]+", "_", f"{route.method} {route.path}".lower()).strip("_"),
        "summary": route.summary,
        "security": [] if route.access == "public" else [{"bearer": []}, {"header": []}, {}],
        "responses": _responses(route),
    }
    names = re.findall(r"{(\w+)}", route.path)
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for name in names
    ]
    for name, schema in (route.query or {}).items():
        parameters.append({"name": name, "in": "query", "required": False, "schema": schema})
    if parameters:
        out["parameters"] = parameters
    if route.request is not None:
        name = route.request.__name__
        schemas[name] = _request_schema(route, schemas)
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        out["requestBody"] = {"required": True, "content": content}
    if route.form is not None:
        out["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": dict(route.form)}}}
    return out


def _responses(route: Route) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if route.media != "application/json":
        content[route.media] = {"schema": {"type": "string"}}
    else:
        schema = {"$ref": f"#/components/schemas/{route.answer}"} if route.answer else {"type": "object"}
        content["application/json"] = {"schema": schema}
    if route.stream:
        content["text/event-stream"] = {}  # events are told in words: validators differ on what a schema would hold for
    out: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status in route.errors:
        out[status] = {"description": _ERRORS[status], "content": error}
    if route.access == "public" and route.path != "/livez":
        body = {"application/json": {"schema": {"$ref": "#/components/schemas/Health"}}}
        out["503"] = {"description": "Not now; `reason` tells why.", "content": body}
    return out


def _request_schema(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    model: type[pydantic.BaseModel] = route.request
    schema = model.model_json_schema(ref_template=_REF, by_alias=True)
    schemas.update(schema.pop("$defs", {}))
    properties: dict[str, Any] = {name: nullable(item) for name, item in schema.get("properties", {}).items()}
    for name in schema.get("required", ()):
        properties[name] = schema["properties"][name]
    if route.parameters:
        for rule in RULES:
            if rule.name not in properties and rule.name not in route.hidden:
                properties[rule.name] = nullable({**rule.schema, "description": rule.meaning})
        for name, (_, _, accepted) in UNSUPPORTED.items():
            if name not in route.hidden:
                text = "Not supported by this version; refused at any other value."
                properties[name] = nullable({**accepted, "description": text})
    if route.openai:
        for name, values in (*HARMLESS.items(), *AT_DEFAULT.items()):
            free = name in HARMLESS and not values
            text = "Taken without effect." if name in HARMLESS else "Taken at these values only."
            accepted = {"type": "string"} if free else {"enum": [*values, None]}
            properties[name] = (
                nullable({**accepted, "description": text}) if free else {**accepted, "description": text}
            )
    out = {"type": "object", "properties": properties, "additionalProperties": False}
    if "required" in schema:
        out["required"] = schema["required"]
    return out


def nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """The same, or null: a key that is null counts as unset."""
    schema = copy.deepcopy(schema)
    if schema.get("type") == "null" or any(part.get("type") == "null" for part in schema.get("anyOf", ())):
        return schema
    outer: dict[str, Any] = {key: schema.pop(key) for key in ("description", "default", "title") if key in schema}
    return {"anyOf": [schema, {"type": "null"}], **outer}
