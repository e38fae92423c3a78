"""Which special tokens a base model never learned: their rows of the head are as they were made. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HEADS = ("lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight", "wte.weight")
"""What gives the logits, the first that a model directory has: a head of its own, or the embedding."""

TINY = 1e-16
"""Rows that never got a gradient are zeros, or numbers that weight decay has worn down below this."""

_SIZES = {"F32": 4, "F16": 2, "BF16": 2}


def untrained_tokens(model_dir: Path, ids: Iterable[int]) -> frozenset[int]:
    """
    Those of `ids` whose row of the head is all but zero, or the same as that of another of them.

    Args:
        ids: the special tokens.
    Returns:
        Empty also where no head of a known name and type is found.
    """
    found = _find(model_dir)
    if found is None:
        return frozenset()
    path, entry, data_start = found
    dtype, (rows, width) = entry["dtype"], entry["shape"]
    size = width * _SIZES[dtype]
    raw: dict[int, bytes] = {}
    with path.open("rb") as file:
        for token in sorted(token for token in ids if token < rows):
            file.seek(data_start + entry["data_offsets"][0] + token * size)
            raw[token] = file.read(size)
    seen: dict[bytes, int] = {}
    for row in raw.values():
        seen[row] = seen.get(row, 0) + 1
    return frozenset(token for token, row in raw.items() if seen[row] > 1 or np.abs(_floats(row, dtype)).max() <= TINY)


def _find(model_dir: Path) -> tuple[Path, Mapping[str, Any], int] | None:
    headers = [(path, *_header(path)) for path in sorted(model_dir.glob("*.safetensors"))]
    for name in HEADS:
        for path, header, start in headers:
            if name in header and header[name]["dtype"] in _SIZES:
                return path, header[name], start
    return None


def _header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def _floats(row: bytes, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "BF16":
        return (np.frombuffer(row, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(row, "<f4" if dtype == "F32" else "<f2").astype(np.float32)
