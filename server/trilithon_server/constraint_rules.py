"""The `constraint` parameter: one of five kinds, brought to the three that the engine knows. Compiling is elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from trilithon_server.engine import wire_pb2 as wire
from trilithon_server.validation import Bounds, Broken, is_text

KINDS = ("json_schema", "json_object", "regex", "grammar", "choice")


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """The form an answer must take; `kind` is json_schema, regex, grammar or choice, `source` its text (or texts)."""

    kind: str
    source: str = ""
    choices: tuple[str, ...] = ()

    def to_wire(self) -> wire.Constraint:
        """The engine's form of it."""
        if self.kind == "choice":
            return wire.Constraint(choice=wire.Constraint.Choice(values=self.choices))
        if self.kind == "json_schema":
            return wire.Constraint(json_schema=self.source)
        if self.kind == "regex":
            return wire.Constraint(regex=self.source)
        return wire.Constraint(grammar=self.source)


def parse_constraint(value: object, bounds: Bounds) -> Constraint:
    """
    Check a constraint's shape and size.

    >>> parse_constraint({"json_object": True}, Bounds()).source
    '{"type": "object"}'

    Raises:
        Broken: not exactly one kind, a wrong type, an empty or too large source, a schema that is not JSON.
    """
    if not isinstance(value, Mapping):
        raise Broken
    unknown = [key for key in value if key not in KINDS and key != "whitespace"]
    kinds = [kind for kind in KINDS if value.get(kind) is not None]
    if unknown or len(kinds) != 1:
        raise Broken(sorted(map(str, value)))
    kind = kinds[0]
    source = value[kind]
    whitespace = value.get("whitespace")
    if whitespace not in (None, "", "flexible", "compact"):
        raise Broken(whitespace, at=".whitespace", rule="must be flexible or compact")
    if whitespace and not kind.startswith("json"):
        raise Broken(whitespace, at=".whitespace", rule="must be unset unless the constraint is JSON")
    if kind == "choice":
        return Constraint(kind="choice", choices=_choices(source, bounds))
    if kind == "json_object":
        if source is not True:
            raise Broken(source, at=".json_object", rule="must be true")
        return Constraint(kind="json_schema", source=_with_whitespace({"type": "object"}, whitespace))
    if kind == "json_schema":
        return Constraint(kind="json_schema", source=_with_whitespace(_schema(source, bounds), whitespace))
    if not isinstance(source, str) or not source or not is_text(source):
        raise Broken(source, at=f".{kind}", rule="must be a string that is not empty")
    _check_size(len(source.encode()), kind, bounds)
    return Constraint(kind=kind, source=source)


def _choices(source: object, bounds: Bounds) -> tuple[str, ...]:
    rule = "must be a list of at least one string, none empty"
    if not isinstance(source, list | tuple) or not source:
        raise Broken(source, at=".choice", rule=rule)
    for i, item in enumerate(source):
        if not isinstance(item, str) or not item or not is_text(item):
            raise Broken(item, at=f".choice[{i}]", rule=rule)
    _check_size(sum(len(item.encode()) for item in source), "choice", bounds)
    return tuple(source)


def _schema(source: object, bounds: Bounds) -> object:
    rule = "must be a JSON schema (an object, true, or a string that holds one)"
    if isinstance(source, str):
        _check_size(len(source.encode(errors="replace")), "json_schema", bounds)
        try:
            source = json.loads(source)
        except (ValueError, RecursionError):
            raise Broken(source, at=".json_schema", code="invalid_constraint", rule=rule) from None
    if not isinstance(source, dict | bool) or source is False:
        raise Broken(source, at=".json_schema", code="invalid_constraint", rule=rule)
    return source


def _with_whitespace(schema: object, whitespace: object) -> str:
    if whitespace == "compact" and isinstance(schema, dict):
        # llguidance reads its options from this key of the schema's root.
        schema = {**schema, "x-guidance": {"whitespace_flexible": False}}
    try:
        return json.dumps(schema)
    except RecursionError:
        raise Broken(at=".json_schema", code="invalid_constraint", rule="must not nest this deep") from None


def _check_size(size: int, kind: str, bounds: Bounds) -> None:
    if size > bounds.max_constraint_bytes:
        rule = f"must have at most {bounds.max_constraint_bytes} bytes"
        raise Broken(f"{size} bytes", at=f".{kind}", code="constraint_too_large", rule=rule)
