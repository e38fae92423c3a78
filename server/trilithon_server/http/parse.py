"""From a JSON body to a typed request: structure by pydantic, parameters by their table, everything wrong at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pydantic

from trilithon_server.config import LimitsConfig
from trilithon_server.sampling import validate
from trilithon_server.sampling_rules import NAMES
from trilithon_server.validation import Bounds, Violations, nearest, shown

M = TypeVar("M", bound=pydantic.BaseModel)

HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "user": (),
    "safety_identifier": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""OpenAI keys that cannot change the text: taken without effect; () takes any string."""

AT_DEFAULT: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""OpenAI keys that this server does not act on: taken at these values, refused by name at others."""


@dataclass(frozen=True, slots=True)
class Parsed(Generic[M]):
    """A request: its structure, its parameters by name, and what is already known to be wrong with the latter."""

    body: M
    values: dict[str, Any]
    found: Violations


def parse(
    model: type[M],
    document: Mapping[str, Any],
    limits: LimitsConfig,
    *,
    parameters: bool = True,
    openai: bool = False,
    hidden: tuple[str, ...] = (),
) -> Parsed[M]:
    """
    Check a body's keys and structure.

    Args:
        model: of the route.
        document: the JSON object; null means unset.
        limits: for the ranges of parameters when the structure is broken.
        parameters: whether the route takes sampling parameters.
        openai: whether it takes OpenAI's further keys.
        hidden: parameters that the route does not take under their own name.
    Raises:
        InvalidArgument: the structure is broken; the parameters' violations are told too.
    """
    found = Violations()
    names = {info.alias or name: name for name, info in model.model_fields.items()}
    taken = [name for name in NAMES if name not in names and name not in hidden] if parameters else []
    allowed = [*names, *taken, *((*HARMLESS, *AT_DEFAULT) if openai else ())]
    structure: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for key, value in document.items():
        if key in names:
            if value is not None:
                structure[key] = value
        elif key in taken:
            values[key] = value
        elif openai and (key in HARMLESS or key in AT_DEFAULT):
            _check_openai(key, value, found)
        else:
            message = f"unknown parameter `{shown(key)[1:-1]}`.{nearest(key, allowed)}"
            found.say(shown(key)[1:-1], message, code="unknown_parameter", rule="is not a parameter here")
    try:
        body = model.model_validate(structure)
    except pydantic.ValidationError as error:
        _tell(error, found)
        if parameters:
            validate(values, Bounds(max_time_ms=limits.max_time_limit_ms), found)
        found.raise_if_any()
        raise AssertionError("a validation error was told") from None
    return Parsed(body, values, found)


def _check_openai(key: str, value: Any, found: Violations) -> None:
    if value is None:
        return
    if key in HARMLESS:
        allowed = HARMLESS[key]
        if (isinstance(value, str) and not allowed) or _among(value, allowed):
            return
    elif _among(value, AT_DEFAULT[key]):
        return
    message = f"`{key}` is not supported by this server. Given: {shown(value)}. Remove it."
    found.say(key, message, code="unsupported_parameter", rule="is not supported", given=shown(value))


def _among(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(type(value) is type(item) and value == item for item in allowed)


_UNION_TAGS = (
    "str",
    "none",
    "list[",
    "int",
    "bool",
    "dict[",
    "constrained",
    "function-",
    "float",
    "ChatMessage",
    "TextPart",
)


def _tell(error: pydantic.ValidationError, found: Violations) -> None:
    """pydantic's findings in our words; of the branches of a union, one sentence per field."""
    told: set[str] = set()
    for item in error.errors(include_url=False, include_context=False):
        field = _path(item["loc"])
        if field in told:
            continue
        told.add(field)
        kind, given = item["type"], item["input"]
        if kind == "missing":
            found.add(field, "must be set", code="missing_parameter")
        elif kind == "extra_forbidden":
            found.say(field, f"unknown parameter `{field}`.", code="unknown_parameter", rule="is not a parameter here")
        else:
            rule = item["msg"].replace("Input should be", "must be").replace("Input should have", "must have")
            found.add(field, rule[:1].lower() + rule[1:], given=given, code="invalid_value")


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith(_UNION_TAGS) or not path:
            name = shown(part)[1:-1]
            path = f"{path}.{name}" if path else name
    return path
