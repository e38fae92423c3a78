"""Plain JSON values to the dataclasses of `_types`, checked field by field."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from trilithon.errors import ProtocolError

T = TypeVar("T")
Convert = Callable[[Any], Any]


def decode(kind: type[T], value: object) -> T:
    """
    Build a result from what the server sent. Unknown fields are kept in `extra`; null means unset.

    >>> from trilithon._types import Usage
    >>> decode(Usage, {"prompt_tokens": 3, "new_in_2030": 1}).extra
    {'new_in_2030': 1}

    Raises:
        ProtocolError: a field has another type, or a required one is missing.
    """
    result: T = _decoder(cast(Any, kind))(value)
    return result


@cache
def _decoder(kind: Any) -> Convert:
    hints = get_type_hints(kind)
    converters = {field.name: _converter(hints[field.name]) for field in fields(kind) if field.name != "extra"}

    def build(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ProtocolError(f"The answer's {kind.__name__} must be an object. Given: {_shown(value)}.")
        known: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for name, given in value.items():
            if name not in converters:
                extra[name] = given
            elif given is not None:
                try:
                    known[name] = converters[name](given)
                except (TypeError, ValueError, OverflowError):
                    message = f"The answer's {kind.__name__}.{name} has an unexpected type. Given: {_shown(given)}."
                    raise ProtocolError(message) from None
        try:
            return kind(**known, extra=extra)
        except TypeError:
            missing = f"The answer's {kind.__name__} lacks a field. Given: {', '.join(known) or 'none'}."
            raise ProtocolError(missing) from None

    return build


def _converter(hint: Any) -> Convert:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        return _converter(next(argument for argument in arguments if argument is not type(None)))
    if origin is tuple:
        item = _converter(arguments[0])
        return lambda values: tuple([item(value) for value in _listed(values)])
    if is_dataclass(hint) and isinstance(hint, type):
        # Looked up when used, since a type may contain itself (a token's likeliest tokens).
        return lambda value: _decoder(hint)(value)
    return _SCALARS.get(hint, lambda value: dict(value))


def _listed(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise TypeError
    return value


def _whole(value: Any) -> int:
    # Some JSON writers quote 64-bit integers.
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return float(value)


def _exactly(kind: type[Any]) -> Convert:
    def check(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return check


_SCALARS: Mapping[Any, Convert] = {int: _whole, float: _number, str: _exactly(str), bool: _exactly(bool)}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 64 else f"{text[:61]}..."
