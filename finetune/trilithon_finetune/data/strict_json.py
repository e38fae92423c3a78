"""One row of a data file, parsed strictly: what two readers could understand differently is refused."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from trilithon_finetune.data.findings import shown

MAX_DEPTH = 32
"""Of lists and objects within a row, the row itself counted."""


class RowError(ValueError):
    """What is wrong with a row: a finding without its place."""

    def __init__(self, code: str, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.path = code, message, path


def parse_row(content: bytes, *, offset: int = 0) -> dict[str, Any]:
    """
    The object that a row holds.

    >>> parse_row(b'{"text": "a"}')
    {'text': 'a'}

    Args:
        content: the row without its line end.
        offset: of its first byte in the file.
    Raises:
        RowError: E-DATA-002, it is not UTF-8, or spells half of a surrogate pair; E-DATA-003, it is not JSON as RFC
            8259 has it, holds NUL, NaN or a key twice, or is nested too deep; E-DATA-004, it is not an object.
    """
    if (at := content.find(b"\0")) >= 0:
        raise RowError("E-DATA-003", f"holds a NUL byte at byte {at + 1} of the row (byte {offset + at} of the file).")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        at = error.start
        raise RowError(
            "E-DATA-002",
            f"is not UTF-8: 0x{content[at]:02x} at byte {at + 1} of the row (byte {offset + at} of the file).",
        ) from None
    try:
        value = _DECODER.decode(text)
    except RowError:
        raise
    except json.JSONDecodeError as error:
        raise RowError("E-DATA-003", f"is not JSON: {error.msg} at column {error.pos + 1}.") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        # Whole numbers of thousands of digits.
        raise RowError("E-DATA-003", f"is not JSON that is read: {error}.") from None
    if not isinstance(value, dict):
        raise RowError("E-DATA-004", f"must be an object. Given: {shown(value)}.")
    if "\\u" in text or text.count("[") + text.count("{") > MAX_DEPTH:
        _walk(value)
    return value


def _walk(row: dict[str, Any]) -> None:
    """Refuse what parses but is not to be read: NUL, half surrogate pairs, deep nesting."""
    pending: list[tuple[Any, str, int]] = [(row, "", 1)]
    while pending:
        value, path, depth = pending.pop()
        if isinstance(value, str):
            _check_text(value, path)
        elif isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                raise _too_deep()
            if isinstance(value, list):
                items = [(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
            else:
                for key in value:
                    _check_text(key, path)
                items = [(item, f"{path}.{key}" if path else key, depth + 1) for key, item in value.items()]
            pending += reversed(items)


def _check_text(text: str, path: str) -> None:
    if "\0" in text:
        raise RowError("E-DATA-003", "holds NUL (\\u0000).", path=path)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise RowError("E-DATA-002", f"cannot be UTF-8: {half} is half of a surrogate pair.", path=path) from None


def _too_deep() -> RowError:
    return RowError("E-DATA-003", f"is nested deeper than {MAX_DEPTH} lists and objects.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in value if keys.count(key) > 1)
        raise RowError("E-DATA-003", f"has the key {shown(twice)} twice in one object.")
    return value


def _constant(name: str) -> NoReturn:
    raise RowError("E-DATA-003", f"holds {name}, which is not JSON.")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
