"""How values of the configuration are written: sizes and times with units, lists, names with paths, dtypes. Pure."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

_UNITS = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4, "b": 1}
_UNITS |= {f"{u}ib": 1024**p for p, u in enumerate("kmgt", start=1)}
_UNITS |= {f"{u}b": 1000**p for p, u in enumerate("kmgt", start=1)}
_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_DTYPES = {
    "fp32": "float32",
    "f32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
}


def parse_size(value: object) -> object:
    """
    A whole number with an optional unit: k, M, G, T and KiB, MiB ... are powers of 1024, kB, MB ... of 1000.

    >>> parse_size("64k"), parse_size("2GiB"), parse_size("1.5MB")
    (65536, 2147483648, 1500000)
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError("must be a whole number with an optional unit (k, M, G, KiB, MiB, GiB, kB, MB, GB)")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_seconds(value: object) -> object:
    """
    A time in seconds, or with a unit: ms, s, m, min, h.

    >>> parse_seconds("30s"), parse_seconds("1.5m"), parse_seconds(2)
    (30.0, 90.0, 2)
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value)
    if match is None or match[2] not in _SECONDS:
        raise ValueError("must be a time: a number with an optional unit (ms, s, m, h)")
    return float(match[1]) * _SECONDS[match[2]]


def _parse_list(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _parse_pairs(value: object) -> object:
    """`NAME=PATH,...` as a mapping; a pair without `=` is left to fail as one."""
    if not isinstance(value, str):
        return value
    pairs = [part.strip().partition("=") for part in value.split(",") if part.strip()]
    if broken := [name for name, separator, path in pairs if not separator or not name or not path]:
        raise ValueError(f"must be NAME=PATH, several separated by commas. Given: {broken[0]!r} without its pair")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError("must give each name once")
    return {name: path for name, _, path in pairs}


def _parse_dtype(value: object) -> object:
    return _DTYPES.get(value.lower(), value) if isinstance(value, str) else value


Size = Annotated[int, BeforeValidator(parse_size)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(allow_inf_nan=False)]
StringList = Annotated[tuple[str, ...], BeforeValidator(_parse_list)]
Paths = Annotated[dict[str, str], BeforeValidator(_parse_pairs)]
Port = Annotated[int, Field(ge=0, le=65535)]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(_parse_dtype)]
