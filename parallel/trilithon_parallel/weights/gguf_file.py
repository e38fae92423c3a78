"""
A strict reader of GGUF files: every length and offset is held against the file's size before it is used.

Format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: "GGUF", version, number of tensors,
number of metadata pairs; the pairs (key, value type, value); per tensor its name, dimensions (fastest first), type and
offset; padding to `general.alignment`; the data. Blocks are turned into numbers by the `gguf` package.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import gguf
import numpy as np
import numpy.typing as npt

from trilithon_parallel.config import ModelError

_VERSIONS = (2, 3)
_MAX_STRING_BYTES = 64 * 1024 * 1024  # far above any chat template
_MAX_ARRAY_ITEMS = 16 * 1024 * 1024  # vocabularies have up to 0.3 M tokens, merges no more
_MAX_TENSORS = 1_000_000
_MAX_DIMS = 4  # of ggml

_SCALARS: Final[Mapping[int, str]] = {
    0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

_FETCH_AGAIN = "Copy or download the file again."


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's place: `shape` is row-major (slowest first), `start` and `end` are bytes in the file, half open."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    end: int


class GgufFile:
    """
    An open GGUF file.

    Attributes:
        metadata: key -> number, bool, string or list of these.
        tensors: name -> place; data is read by `dequantise`.

    Raises (from the constructor):
        ModelError: `gguf_truncated` when bytes are missing, `gguf_invalid` for everything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path.name} cannot be read: {error}.", code="gguf_invalid", hint=_FETCH_AGAIN) from None
        try:
            cursor = _Cursor(self._map, path.name)
            self.metadata, infos = _read_head(cursor)
            alignment = self.metadata.get("general.alignment", 32)
            if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
                raise cursor.broken(f"general.alignment must be a power of two from 8 to 1048576. Given: {alignment}")
            base = -(-cursor.position // alignment) * alignment
            self.tensors = _place(cursor, infos, base=base, alignment=alignment)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; safe to call twice."""
        self._map.close()

    def dequantise(self, name: str) -> npt.NDArray[np.float32]:
        """
        A tensor as fp32, in its row-major shape.

        Raises:
            ModelError: its type cannot be turned into numbers.
        """
        tensor = self.tensors[name]
        raw = np.frombuffer(bytearray(self._map[tensor.start : tensor.end]), dtype=np.uint8)  # writable, as torch asks
        try:
            values = gguf.dequantize(raw.reshape(*tensor.shape[:-1], -1), tensor.kind)
        except NotImplementedError:
            raise ModelError(
                f"{self.path.name} tensor {name} has a type that cannot be dequantised. Given: {tensor.kind.name}.",
                code="gguf_unsupported",
                hint="Use a file quantised as Q8_0, Q4_K, F16 or BF16.",
            ) from None
        floats: npt.NDArray[np.float32] = np.ascontiguousarray(values, dtype=np.float32).reshape(tensor.shape)
        return floats


class _Cursor:
    """Reads forward through the head of a file; never beyond its end."""

    def __init__(self, data: mmap.mmap, file: str) -> None:
        self._data, self._file = data, file
        self.size = len(data)
        self.position = 0

    def broken(self, rule: str) -> ModelError:
        return ModelError(f"{self._file} {rule}.", code="gguf_invalid", hint=_FETCH_AGAIN)

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.position:
            raise ModelError(
                f"{self._file} is cut short: {what} needs {count} bytes at byte {self.position}. "
                f"Given: a file of {self.size} bytes.",
                code="gguf_truncated",
                hint=_FETCH_AGAIN,
            )
        chunk = self._data[self.position : self.position + count]
        self.position += count
        return chunk

    def scalar(self, kind: int, what: str) -> Any:
        code = _SCALARS[kind]
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def count(self, limit: int, what: str) -> int:
        value: int = self.scalar(10, what)
        if value > limit:
            raise self.broken(f"{what} must be at most {limit}. Given: {value}")
        return value

    def string(self, what: str) -> str:
        raw = self.take(self.count(_MAX_STRING_BYTES, f"the length of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.broken(f"{what} must be UTF-8. Given: {raw[:40]!r}") from None

    def value(self, kind: int, what: str, *, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY and depth == 0:  # nothing real nests arrays
            item_kind = self.scalar(4, what)
            items = self.count(_MAX_ARRAY_ITEMS, f"the length of {what}")
            if item_kind in _SCALARS:
                code = _SCALARS[item_kind].removeprefix("<")
                raw = self.take(items * struct.calcsize(_SCALARS[item_kind]), what)
                return list(struct.unpack(f"<{items}{code}", raw))
            return [self.value(item_kind, what, depth=1) for _ in range(items)]
        if kind in _SCALARS:
            return self.scalar(kind, what)
        raise self.broken(f"{what} has an unknown value type. Given: {kind}")


_Info = tuple[str, tuple[int, ...], int, int]  # name, shape, type, offset


def _read_head(cursor: _Cursor) -> tuple[dict[str, Any], list[_Info]]:
    """Everything before the data: metadata and tensor infos, as the file states them."""
    if cursor.take(4, "the magic number") != b"GGUF":
        raise cursor.broken("is not a GGUF file: it does not begin with GGUF")
    version = cursor.scalar(4, "the version")
    if version not in _VERSIONS:
        raise cursor.broken(f"must be GGUF version 2 or 3, little-endian. Given: {version}")
    num_tensors = cursor.count(_MAX_TENSORS, "the number of tensors")
    num_pairs = cursor.count(_MAX_TENSORS, "the number of metadata pairs")
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise cursor.broken(f"names metadata key {key!r:.100} twice")
        metadata[key] = cursor.value(cursor.scalar(4, key), key)
    infos: list[_Info] = []
    for _ in range(num_tensors):
        name = cursor.string("a tensor name")
        num_dims = cursor.scalar(4, f"tensor {name:.100}")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise cursor.broken(f"tensor {name:.100} must have from 1 to {_MAX_DIMS} dimensions. Given: {num_dims}")
        dims = [cursor.count(2**48, f"a dimension of tensor {name:.100}") for _ in range(num_dims)]
        kind, offset = cursor.scalar(4, name), cursor.scalar(10, name)
        infos.append((name, tuple(reversed(dims)), kind, offset))
    return metadata, infos


def _place(cursor: _Cursor, infos: list[_Info], *, base: int, alignment: int) -> dict[str, GgufTensor]:
    """Check each tensor's type, size and offset; tensors may not overlap nor reach beyond the file."""
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind_number, offset in infos:
        if name in tensors:
            raise cursor.broken(f"names tensor {name} twice")
        try:
            kind = gguf.GGMLQuantizationType(kind_number)
        except ValueError:
            raise cursor.broken(f"tensor {name} has an unknown type. Given: {kind_number}") from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise cursor.broken(f"tensor {name} rows must be a multiple of {block} ({kind.name}). Given: {shape[-1]}")
        if offset % alignment:
            raise cursor.broken(f"tensor {name} must begin at a multiple of {alignment}. Given: {offset}")
        start, num_bytes = base + offset, math.prod(shape) // block * block_bytes
        if start + num_bytes > cursor.size:
            raise ModelError(
                f"{cursor._file} is cut short: tensor {name} needs bytes {start} to {start + num_bytes}. "
                f"Given: a file of {cursor.size} bytes.",
                code="gguf_truncated",
                hint=_FETCH_AGAIN,
            )
        tensors[name] = GgufTensor(name, kind, shape, start, start + num_bytes)
    end = base
    for tensor in sorted(tensors.values(), key=lambda item: (item.start, item.end)):
        if tensor.start < end:
            raise cursor.broken(f"tensor {tensor.name} overlaps the one before it: it begins at byte {tensor.start}")
        end = tensor.end
    return tensors
