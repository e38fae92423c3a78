"""
Safetensors by hand: a strict header reader, reads of slices, and a streaming writer.

The format (https://github.com/safetensors/safetensors): 8 bytes little-endian header length, a JSON header of
`name -> {dtype, shape, data_offsets}`, then the data, row-major and little-endian, without holes.

Reads go through `pread` rather than a memory map: a rank then holds only the bytes of its own slices (a map's touched
pages count as resident), and a file cut short while it is read is an error in words instead of a bus error.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from trilithon_parallel.config import ModelError

MAX_HEADER_BYTES = 100 * 1024 * 1024
"""The format's own limit; a larger length means that the file is something else."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes that a header may name. Weights must be one of the floats; the others occur in buffers that are left out."""

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_BLOCK_BYTES = 8 * 1024 * 1024  # of one read when rows are sliced or cast: bounds the memory beside the result

_FETCH_AGAIN = "Copy or download the file again."


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: `start` and `end` are bytes from the beginning of the file, half open."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """
    An open safetensors file whose header has been checked whole.

    Raises (from the constructor):
        ModelError: `weights_truncated` when bytes are missing, `weights_invalid` for everything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelError(
                f"{path.name} cannot be opened: {error.strerror}.", code="weights_missing", hint=_FETCH_AGAIN
            ) from None
        try:
            self.tensors, self.metadata = _read_header(path.name, self._fd)
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
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_into(self, name: str, slices: Sequence[slice], out: torch.Tensor) -> None:
        """
        Read a block of a tensor into `out`, casting to its dtype; at most one 8 MiB buffer is held beside it.

        Args:
            name: a name of `tensors`.
            slices: one slice with step 1 per dimension, within the shape.
            out: a CPU tensor (any strides) of the block's shape.
        Raises:
            ModelError: the file has become shorter since it was opened.
        """
        entry = self.tensors[name]
        starts = [item.start for item in slices]
        sizes = [item.stop - item.start for item in slices]
        assert list(out.shape) == sizes, f"{name}: out {tuple(out.shape)} for a block of {sizes}"
        if out.numel() == 0:
            return
        if not entry.shape:
            buffer = torch.empty(1, dtype=entry.dtype)
            self._fill(entry, buffer, entry.start)
            out.copy_(buffer[0])
            return
        row_shape = entry.shape[1:]
        row_bytes = math.prod(row_shape) * entry.dtype.itemsize
        begin = entry.start + starts[0] * row_bytes
        whole_rows = tuple(sizes[1:]) == row_shape
        if whole_rows and out.dtype == entry.dtype and out.is_contiguous():
            self._fill(entry, out, begin)
            return
        inner = tuple(slices[1:])
        rows_at_once = max(1, _BLOCK_BYTES // max(1, row_bytes))
        for first in range(0, sizes[0], rows_at_once):
            rows = min(rows_at_once, sizes[0] - first)
            block = torch.empty((rows, *row_shape), dtype=entry.dtype)
            self._fill(entry, block, begin + first * row_bytes)
            out[first : first + rows].copy_(block[(slice(None), *inner)])

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in the dtype of the file."""
        entry = self.tensors[name]
        out = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(name, [slice(0, size) for size in entry.shape], out)
        return out

    def _fill(self, entry: TensorEntry, out: torch.Tensor, offset: int) -> None:
        """Read as many bytes as the contiguous tensor `out` takes."""
        view = bytes_of(out)
        while view:
            count = os.preadv(self._fd, [view], offset)
            if count == 0:
                raise ModelError(
                    f"{self.path.name} tensor {entry.name} ends at byte {offset}, before its {entry.end} bytes are "
                    "complete: the file has become shorter since it was opened.",
                    code="weights_truncated",
                    hint=_FETCH_AGAIN,
                )
            view, offset = view[count:], offset + count


def _read_header(file: str, fd: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Parse and check the header of an open file; every claim in it is held against the file's real size."""
    size = os.fstat(fd).st_size
    if size < 8:
        raise ModelError(
            f"{file} must begin with an 8-byte header length. Given: a file of {size} bytes.",
            code="weights_truncated",
            hint=_FETCH_AGAIN,
        )
    (length,) = struct.unpack("<Q", os.pread(fd, 8, 0))
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise ModelError(
            f"{file} is not a safetensors file: its header length must be from 2 to {MAX_HEADER_BYTES} bytes. "
            f"Given: {length}.",
            code="weights_invalid",
            hint="Convert the weights to safetensors, or download the file again.",
        )
    if 8 + length > size:
        raise ModelError(
            f"{file} is cut short: its header needs {8 + length} bytes. Given: a file of {size} bytes.",
            code="weights_truncated",
            hint=_FETCH_AGAIN,
        )
    try:
        header = json.loads(os.pread(fd, length, 8).decode(), object_pairs_hook=_unique_keys)
    except _DuplicateKey as error:
        raise _invalid(file, f"header names {error} twice", "Write each tensor once.") from None
    except (ValueError, RecursionError) as error:
        raise _invalid(file, f"header is not JSON ({error})", _FETCH_AGAIN) from None
    if not isinstance(header, dict):
        raise _invalid(file, f"header must be a JSON object. Given: {type(header).__name__}", _FETCH_AGAIN)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _invalid(file, "header __metadata__ must map strings to strings", _FETCH_AGAIN)
    entries = [_entry(file, name, item, base=8 + length) for name, item in header.items()]
    end = 8 + length
    for entry in sorted(entries, key=lambda item: (item.start, item.end)):
        if entry.start != end:
            kind = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise _invalid(
                file,
                f"tensor {entry.name} {kind}: its data must begin at byte {end}. Given: {entry.start}",
                "The file is broken: export or download it again.",
            )
        end = entry.end
    if end > size:
        raise ModelError(
            f"{file} is cut short: its tensors need {end} bytes. Given: a file of {size} bytes.",
            code="weights_truncated",
            hint=_FETCH_AGAIN,
        )
    if end < size:
        raise _invalid(file, f"has {size - end} bytes after the last tensor", "The file is broken: export it again.")
    return {entry.name: entry for entry in entries}, metadata


def _entry(file: str, name: str, item: Any, *, base: int) -> TensorEntry:
    """One header entry, checked; `base` is where the data begins."""
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise _invalid(
            file, f"tensor {name} must have exactly dtype, shape and data_offsets. Given: {item!r:.200}", _FETCH_AGAIN
        )
    dtype = DTYPES.get(item["dtype"]) if isinstance(item["dtype"], str) else None
    if dtype is None:
        raise _invalid(
            file,
            f"tensor {name} has an unknown dtype. Given: {item['dtype']!r}. Allowed: {', '.join(DTYPES)}",
            "Convert the weights to F32, BF16 or F16.",
        )
    shape, offsets = item["shape"], item["data_offsets"]
    if not _is_sizes(shape):
        raise _invalid(file, f"tensor {name} shape must list sizes. Given: {shape!r:.200}", _FETCH_AGAIN)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _invalid(file, f"tensor {name} data_offsets must be [begin, end]. Given: {offsets!r:.200}", _FETCH_AGAIN)
    needed = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise _invalid(
            file,
            f"tensor {name} of shape {shape} and dtype {item['dtype']} must take {needed} bytes. "
            f"Given: {offsets[1] - offsets[0]}",
            "The file is broken: export or download it again.",
        )
    return TensorEntry(name, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**53 for item in value)


class _DuplicateKey(Exception):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKey(key)
        found[key] = value
    return found


def _invalid(file: str, rule: str, hint: str) -> ModelError:
    return ModelError(f"{file} {rule}.", code="weights_invalid", hint=hint)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: what the header must say before the data is there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the data in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def header_bytes(specs: Sequence[TensorSpec], *, metadata: Mapping[str, str] | None = None) -> bytes:
    """
    What a file of `specs` begins with, length included; the data follows at once, in the order of the specs.

    >>> len(header_bytes([TensorSpec("a", torch.float32, (2, 3))])) % 8
    0

    Args:
        specs: every tensor of the file, each name once.
        metadata: strings for `__metadata__`; `{"format": "pt"}` is what `transformers` expects.
    """
    assert sys.byteorder == "little", "safetensors data is little-endian"
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.num_bytes],
        }
        end += spec.num_bytes
    assert len(header) == len(specs) + 1, "two specs have one name"
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # data begins aligned, as the reference writer has it
    return struct.pack("<Q", len(encoded)) + encoded


def write_safetensors(
    path: Path,
    specs: Sequence[TensorSpec],
    produce: Callable[[TensorSpec], torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """
    Write a file tensor by tensor, so that no more than one of them is in memory, and bring it to the disk.

    Args:
        path: the file; an existing one is replaced.
        specs: what to write, in the order of the data.
        produce: makes a tensor of the spec's shape when its turn comes; it is cast to the spec's dtype.
        metadata: as for `header_bytes`.
    """
    with path.open("wb") as file:
        file.write(header_bytes(specs, metadata=metadata))
        for spec in specs:
            tensor = produce(spec)
            assert tuple(tensor.shape) == spec.shape, f"{spec.name}: {tuple(tensor.shape)} for {spec.shape}"
            data = tensor.detach().to(device="cpu", dtype=spec.dtype).contiguous()
            file.write(bytes_of(data))
        file.flush()
        os.fsync(file.fileno())


def split_shards(specs: Iterable[TensorSpec], *, max_bytes: int) -> list[list[TensorSpec]]:
    """
    Split tensors over files of at most `max_bytes` each, in order; a larger tensor gets a file of its own.

    >>> a, b, c = (TensorSpec(n, torch.float32, (4,)) for n in "abc")
    >>> [[spec.name for spec in shard] for shard in split_shards([a, b, c], max_bytes=32)]
    [['a', 'b'], ['c']]
    """
    shards: list[list[TensorSpec]] = []
    used = 0
    for spec in specs:
        if not shards or used + spec.num_bytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += spec.num_bytes
    return shards


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()  # numpy's stubs leave out the buffer protocol
    return memoryview(array)
