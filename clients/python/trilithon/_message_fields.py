"""What every message of a request is made with: single fields by their JSON names, checked, and the call's own part."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from google.protobuf.message import Message

from trilithon._parameters import PROTO_FIELDS
from trilithon._transport import Fields
from trilithon.api.v1 import common_pb2
from trilithon.errors import InvalidArgument, Violation

_EARLY = {
    "heuristic": common_pb2.Beam.EARLY_HEURISTIC,
    "first": common_pb2.Beam.EARLY_FIRST,
    "never": common_pb2.Beam.EARLY_NEVER,
}


def with_meta(kind: Callable[..., Message]) -> Callable[[Fields], Message]:
    """A message whose fields are the request's own, but for those of the call."""

    def build(fields: Fields) -> Message:
        own = {name: value for name, value in fields.items() if name not in ("model", "time_limit_ms")}
        return kind(meta=meta(fields), **own)

    return build


def meta(fields: Fields) -> common_pb2.RequestMeta:
    """The call's own part of a request."""
    return common_pb2.RequestMeta(model=fields.get("model", ""), time_limit_ms=fields.get("time_limit_ms"))


def put(request: Any, name: str, value: Any) -> None:
    """Set a parameter, by its flat name, where the message has it. Raises KeyError: no request has such a one."""
    *groups, leaf = PROTO_FIELDS[name].split(".")
    message: Any = request
    for group in groups:
        message = getattr(message, group)
    if name in ("skip_special_tokens", "speculation"):
        setattr(message, leaf, not _boolean(value))
    elif name == "constraint":
        request.constraint.MergeFrom(_constraint(value))
    elif name == "early_stopping":
        message.early = choice(name, value, _EARLY)
    elif name == "top_p_reset_token_ids" and not value:
        message.no_reset = True
    elif name == "top_k" and value == -1:
        message.top_k = 0  # HTTP's other spelling of off
    elif name == "stop" and isinstance(value, str):
        message.stop.append(value)
    elif isinstance(value, Mapping):
        container = getattr(message, leaf)
        for key, item in value.items():
            container[int(key) if name == "logit_bias" else key] = item
    elif isinstance(value, str | int | float):
        setattr(message, leaf, value)
    else:
        getattr(message, leaf).extend(value)


def _constraint(given: Mapping[str, Any]) -> common_pb2.Constraint:
    constraint = common_pb2.Constraint()
    kinds = [name for name in given if name != "whitespace"]
    if len(kinds) != 1:
        raise ValueError("must set exactly one of json_schema, json_object, regex, grammar, choice")
    for name, value in given.items():
        if name == "json_schema" and not isinstance(value, str):
            constraint.json_schema = json.dumps(value)
        elif name == "choice":
            constraint.choice.values.extend(value)
        else:
            setattr(constraint, name, value)
    return constraint


def choice(name: str, given: Any, known: Mapping[str, Any]) -> Any:
    """The number of an enum's value by its name, 0 for none. Raises InvalidArgument: a name that is none."""
    if given is None:
        return 0
    if given not in known:
        raise InvalidArgument(f"`{name}` must be one of {', '.join(known)}. Given: {given!r}.", code="invalid_value")
    return known[given]


def one_body(name: str, documents: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """
    Documents as they are: of a text and a page the message would keep one, and leave out the other without a word.

    Raises:
        InvalidArgument: a document has both, as the server says it of JSON.
    """
    for i, document in enumerate(documents):
        if document.get("text") and document.get("html"):
            message = f"`{name}[{i}]` must have text or html, one of the two."
            violation = Violation(field=f"{name}[{i}]", code="missing_parameter", message=message)
            raise InvalidArgument(message, code="missing_parameter", details=[violation])
    return documents


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("must be true or false")
    return value


def checked(name: str, value: Any, put: Callable[[Any], None]) -> None:
    """Put a value, or say that it does not fit. Raises InvalidArgument."""
    try:
        put(value)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        message = f"`{name}` does not fit its field: {error}. Given: {value!r:.64}."
        violation = Violation(field=name, code="invalid_value", message=message, given=repr(value)[:64])
        raise InvalidArgument(message, code="invalid_value", details=[violation]) from None
