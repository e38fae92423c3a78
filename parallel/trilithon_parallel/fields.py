"""Typed access to the JSON files of a model directory; a mistake in them names file, field and value. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ModelError(ValueError):
    """
    A user's mistake about a model: its files, its architecture or the layout asked for.

    `code` is stable and machine readable, `message` says what, where and the value given, `hint` what to do.
    """

    def __init__(self, message: str, *, code: str = "model_invalid", hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.code = code
        self.message = message
        self.hint = hint


class Fields:
    """Typed access to one JSON object: a wrong kind or a missing key names the file and the field."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; `default` where the key is absent or null."""
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise ModelError(
                f"{self.where} {key} must be a positive integer. Given: {value!r}.",
                hint="Repair the file or export the model again.",
            )
        return value

    def number(self, key: str, default: float) -> float:
        """A positive finite number; `default` where the key is absent."""
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ModelError(
                f"{self.where} {key} must be a positive number. Given: {value!r}.",
                hint="Repair the file or export the model again.",
            )
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; `default` where the key is absent or null."""
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise ModelError(
                f"{self.where} {key} must be true or false. Given: {value!r}.",
                hint="Repair the file or export the model again.",
            )
        return value

    def require(self, key: str, allowed: tuple[object, ...], default: object) -> Any:
        """The value of `key`, which must be one that this project computes exactly."""
        value = self.raw.get(key, default)
        if not any(value == option and type(value) is type(option) for option in allowed):
            raise ModelError(
                f"{self.where} {key} is not supported. Given: {value!r}.",
                code="model_unsupported",
                hint=f"Allowed: {', '.join(map(repr, allowed))}.",
            )
        return value


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from `path`; the error names the file alone, never where it lies."""
    try:
        raw = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path.name} is missing in the model directory.",
            code="model_not_found",
            hint="A model directory holds config.json, *.safetensors and the tokenizer's files.",
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(
            f"{path.name} is not readable JSON: {error}.", hint="Copy or export the model again."
        ) from None
    if not isinstance(raw, dict):
        raise ModelError(
            f"{path.name} must hold one JSON object. Given: {type(raw).__name__}.",
            hint="Copy or export the model again.",
        )
    return raw
