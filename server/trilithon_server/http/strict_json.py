"""JSON as requests must write it: every key once, finite numbers, UTF-8."""

from __future__ import annotations

import json
from typing import Any

from trilithon.errors import InvalidArgument
from trilithon_server.validation import shown


def parse_object(raw: bytes) -> dict[str, Any]:
    """
    A JSON object, strictly: UTF-8, no key twice, no NaN or infinity.

    >>> parse_object(b'{"a": 1}')
    {'a': 1}

    Raises:
        InvalidArgument: `invalid_json` or `duplicate_key`.
    """
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"the body must be UTF-8. Given: byte {error.start} is not.", code="invalid_json"
        ) from None
    except json.JSONDecodeError as error:
        raise InvalidArgument(
            f"the body must be JSON. Given: {error.msg} at line {error.lineno}, column {error.colno}.",
            code="invalid_json",
        ) from None
    except RecursionError:
        raise InvalidArgument("the body must not nest this deep.", code="invalid_json") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise InvalidArgument(f"the body must be JSON. Given: {str(error)[:64]}.", code="invalid_json") from None
    if not isinstance(document, dict):
        raise InvalidArgument(f"the body must be a JSON object. Given: {shown(document)}.", code="invalid_json")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidArgument(f"the key {shown(key)} must come once. Given: twice.", code="duplicate_key")
            seen.add(key)
    return out


def _no_constant(name: str) -> Any:
    raise InvalidArgument(f"numbers must be finite. Given: {name}.", code="invalid_json")
