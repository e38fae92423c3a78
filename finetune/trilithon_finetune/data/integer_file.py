"""
Integers on disk as safetensors: written sample by sample, mapped when they are read.

Read and written by hand: ranks map the file as it is, and a writer never holds more than a few integers a sample.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from trilithon_finetune.recipes.base import Sample

Ints = npt.NDArray[np.int32] | npt.NDArray[np.int64]

TOKEN_ARRAYS = ("tokens", "targets", "types", "positions")
"""One integer a token; the others have one a sample."""

_DTYPES: Mapping[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
_MAX_HEADER_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 22


class SampleWriter:
    """
    Writes samples into one file: `tokens`, `targets`, `types` and `positions` end to end, where they are; `offsets`
    [samples + 1]; `row`, `part`, `cut`, `supervised` and `column.NAME` [samples].

    Args:
        path: the `.safetensors` file; files beside it are used on the way.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._streams: dict[str, IO[bytes]] = {}
        self._offsets = array("q", [0])
        self._integers: dict[str, array[int]] = {name: array("i") for name in ("row", "part", "cut", "supervised")}
        self._shape: tuple[tuple[bool, ...], tuple[str, ...]] | None = None
        self.num_supervised, self.longest = 0, 0

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Of all samples."""
        return self._offsets[-1]

    def add(self, sample: Sample) -> None:
        """Append one sample; all of a file have the same arrays and columns."""
        arrays: dict[str, tuple[int, ...]] = {name: getattr(sample, name) for name in TOKEN_ARRAYS}
        shape = tuple(map(bool, arrays.values())), tuple(sorted(sample.columns))
        self._shape = self._shape or shape
        assert shape == self._shape, (shape, self._shape)
        assert sample.tokens, sample
        for name, values in arrays.items():
            if values:
                assert len(values) == len(sample.tokens), name
                stream = self._streams.get(name) or self._open(name)
                stream.write(np.asarray(values, "<i4").tobytes())
        self._offsets.append(self._offsets[-1] + len(sample.tokens))
        integers = {"row": sample.row, "part": sample.part, "cut": sample.cut, "supervised": sample.num_supervised}
        integers |= {f"column.{name}": value for name, value in sample.columns.items()}
        for name, value in integers.items():
            self._integers.setdefault(name, array("i")).append(value)
        self.num_supervised += integers["supervised"]
        self.longest = max(self.longest, len(sample.tokens))

    def _open(self, name: str) -> IO[bytes]:
        self._streams[name] = self._path.with_suffix(f".{name}").open("w+b")
        return self._streams[name]

    def finish(self) -> None:
        """Put the file together."""
        names = sorted(self._integers)
        sizes = {"offsets": len(self) + 1, **dict.fromkeys(names, len(self))}
        sizes |= dict.fromkeys(self._streams, self.num_tokens)
        with self._path.open("wb") as out:
            out.write(_header(sizes))
            out.write(np.asarray(self._offsets, "<i8").tobytes())
            for name in names:
                out.write(np.asarray(self._integers[name], "<i4").tobytes())
            for stream in self._streams.values():
                stream.seek(0)
                shutil.copyfileobj(stream, out, _BLOCK_BYTES)

    def close(self) -> None:
        """Remove the files that were used on the way."""
        for name, stream in self._streams.items():
            stream.close()
            self._path.with_suffix(f".{name}").unlink(missing_ok=True)
        self._streams = {}


def map_integers(path: Path) -> dict[str, Ints]:
    """
    The arrays of a file by name, mapped.

    Raises:
        ValueError: it is not such a file.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes")
        table = json.loads(file.read(size))
    arrays: dict[str, Ints] = {}
    try:
        for name, entry in table.items():
            start, stop = entry["data_offsets"]
            dtype, (length,) = _DTYPES[entry["dtype"]], entry["shape"]
            if stop - start != length * dtype.itemsize:
                raise ValueError(f"{name} has {stop - start} bytes")
            # What is empty cannot be mapped.
            arrays[name] = (
                np.memmap(path, dtype, "r", offset=8 + size + start, shape=(length,)) if length else np.empty(0, dtype)
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a header without {error}") from None
    return arrays


def _header(sizes: Mapping[str, int]) -> bytes:
    """The safetensors header: names, types and places, padded so that the i64 that comes first lies on 8 bytes."""
    at, table = 0, {}
    for name, size in sizes.items():
        kind = "I64" if name == "offsets" else "I32"
        stop = at + size * _DTYPES[kind].itemsize
        table[name] = {"dtype": kind, "shape": [size], "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
