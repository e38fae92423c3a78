"""
Indexed token files: `PREFIX.bin` holds the tokens, `PREFIX.idx` says where each sequence and document begins.

The bytes are those of Megatron's MMIDIDX format, both ways. `.idx`, little-endian:

    bytes 0-8     `MMIDIDX`, two zero bytes
    bytes 9-16    version, u64 = 1
    byte  17      dtype code, u8 (see `DTYPES`)
    bytes 18-25   number of sequences N, u64
    bytes 26-33   number of document borders D + 1, u64
    then          lengths i32[N], byte pointers i64[N], document borders i64[D + 1], optionally modes i8[N]

Everything that the index claims is checked when it is opened, so that reading it later cannot fail half way.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from trilithon_parallel.data.errors import DataError

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER_BYTES = 34

DTYPES: Mapping[int, np.dtype[Any]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
"""The format's dtype codes. The two floats exist in it, but no token is one."""

SMALL_VOCAB = 65500
"""Below so many ids tokens are u16, from there on i32 (Megatron's border)."""

_REMADE = "Prepare the data again, or copy both files again."


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype of the tokens of a vocabulary: u16 below 65500 ids, else i32."""
    return DTYPES[8] if vocab_size < SMALL_VOCAB else DTYPES[4]


def file_of(prefix: Path, suffix: str) -> Path:
    """`PREFIX.bin` and its like; only the suffix is added, so `corpus.v2` stays whole."""
    return prefix.with_name(f"{prefix.name}.{suffix}")


def prefix_of(path: Path) -> Path:
    """The prefix that a user means who names one of the files."""
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


class IndexedTokens:
    """
    An indexed token file, mapped into memory and checked.

    Attributes:
        lengths: tokens per sequence, i32[N].
        document_borders: the first sequence of each document and, last, N; i64[D + 1].
        modes: i8[N] where the file has them, else None.
    Raises (from the constructor):
        DataError: `data_missing` or `data_index`; names the file, the byte, what is there and what must be.
    """

    def __init__(self, path: Path) -> None:
        self.prefix = prefix_of(path)
        self._file = file_of(self.prefix, "idx")
        index = _mapped(self._file, np.dtype("<u1"))
        self.dtype, num_sequences, num_borders = self._header(index)
        at = HEADER_BYTES
        self.lengths: NDArray[np.int32] = index[at : (at := at + 4 * num_sequences)].view("<i4")
        self._pointers: NDArray[np.int64] = index[at : (at := at + 8 * num_sequences)].view("<i8")
        self.document_borders: NDArray[np.int64] = index[at : (at := at + 8 * num_borders)].view("<i8")
        self.modes: NDArray[np.int8] | None = index[at:].view("<i1") if len(index) > at else None
        self._check_lengths()
        self._check_borders()
        self.num_tokens = int(self.lengths.sum(dtype=np.int64))
        self._check_pointers()
        self._tokens = self._open_bin()
        self._index = index

    @property
    def num_sequences(self) -> int:
        """Sequences of all documents together."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Documents; each is one or more sequences."""
        return len(self.document_borders) - 1

    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens per document, i64[D]."""
        ends = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        return np.diff(ends[self.document_borders])

    def read(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Tokens [start, stop) of a document, in the dtype of the file; a view, read-only."""
        begin, end = self._token_at(document), self._token_at(document + 1)
        stop = end - begin if stop is None else stop
        assert 0 <= start <= stop <= end - begin, f"document {document}: [{start}, {stop}) of {end - begin} tokens"
        return self._tokens[begin + start : begin + stop]

    def sequence(self, sequence: int) -> NDArray[Any]:
        """The tokens of one sequence."""
        begin = int(self._pointers[sequence]) // self.dtype.itemsize
        return self._tokens[begin : begin + int(self.lengths[sequence])]

    @cached_property
    def index_digest(self) -> str:
        """SHA-256 of the `.idx` file in hex: all lengths and borders, which decide how samples are cut."""
        content: Any = self._index  # numpy's stubs leave out the buffer protocol
        return hashlib.sha256(content).hexdigest()

    @cached_property
    def digest(self) -> str:
        """
        A name for the content, in hex: SHA-256 of the whole index, and of the first and last MiB of the tokens.

        Terabytes are not read for it; other texts or another tokenizer give other lengths and so another digest.
        """
        block = max(1, (1 << 20) // self.dtype.itemsize)
        edges = hashlib.sha256(self._tokens[:block].tobytes() + self._tokens[-block:].tobytes())
        return hashlib.sha256(f"{self.index_digest} {edges.hexdigest()}".encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What `PREFIX.json` says about how the files were made; empty where there is none."""
        path = file_of(self.prefix, "json")
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}.", code="data_index", hint=_REMADE) from None
        if not isinstance(found, dict):
            raise DataError(f"{path} must hold a JSON object.", code="data_index", hint=_REMADE)
        return found

    def _token_at(self, document: int) -> int:
        """The place in `.bin` where a document begins; that of number D is the end."""
        sequence = int(self.document_borders[document])
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def _header(self, index: NDArray[np.uint8]) -> tuple[np.dtype[Any], int, int]:
        if len(index) < HEADER_BYTES:
            self._refuse(len(index), f"a header of {HEADER_BYTES} bytes", f"a file of {len(index)} bytes")
        raw = index[:HEADER_BYTES].tobytes()
        if raw[:9] != MAGIC:
            self._refuse(0, f"the magic {MAGIC!r}", repr(raw[:9]))
        version, code, num_sequences, num_borders = struct.unpack("<QBQQ", raw[9:])
        if version != VERSION:
            self._refuse(9, f"version {VERSION}", f"version {version}")
        if code not in DTYPES:
            self._refuse(17, f"a dtype code from 1 to {max(DTYPES)}", f"code {code}")
        if DTYPES[code].kind == "f":
            self._refuse(17, "the dtype code of whole numbers (1 to 5, or 8)", f"code {code}, {DTYPES[code].name}")
        if num_borders < 1:
            self._refuse(26, "at least one document border", "0")
        size = HEADER_BYTES + 12 * num_sequences + 8 * num_borders
        if len(index) not in (size, size + num_sequences):
            self._refuse(
                18,
                f"a file of {size} bytes (or {size + num_sequences} with modes) for {num_sequences} sequences and "
                f"{num_borders} document borders",
                f"{len(index)} bytes",
            )
        return DTYPES[code], num_sequences, num_borders

    def _check_lengths(self) -> None:
        for i in np.flatnonzero(self.lengths < 0)[:1]:
            self._refuse(HEADER_BYTES + 4 * int(i), f"a length of sequence {i} of at least 0", str(self.lengths[i]))

    def _check_borders(self) -> None:
        borders, at = self.document_borders, HEADER_BYTES + 12 * self.num_sequences
        if borders[0] != 0:
            self._refuse(at, "a first document border of 0", str(borders[0]))
        for i in np.flatnonzero(np.diff(borders) < 0)[:1]:
            self._refuse(
                at + 8 * (int(i) + 1),
                f"document border {i + 1} not before border {i}, which is {borders[i]}",
                str(borders[i + 1]),
            )
        if borders[-1] != self.num_sequences:
            self._refuse(
                at + 8 * (len(borders) - 1),
                f"a last document border of {self.num_sequences}, the number of sequences",
                str(borders[-1]),
            )

    def _check_pointers(self) -> None:
        """Sequences lie one behind the other, so each pointer follows from the lengths before it."""
        ends = np.cumsum(self.lengths, dtype=np.int64) * self.dtype.itemsize
        expected = np.concatenate([[0], ends[:-1]])[: self.num_sequences]
        for i in np.flatnonzero(self._pointers != expected)[:1]:
            self._refuse(
                HEADER_BYTES + 4 * self.num_sequences + 8 * int(i),
                f"the pointer of sequence {i} at byte {expected[i]}, the end of those before it",
                str(self._pointers[i]),
            )

    def _open_bin(self) -> NDArray[Any]:
        file = file_of(self.prefix, "bin")
        needed = self.num_tokens * self.dtype.itemsize
        size = _size(file)
        if size != needed:
            raise DataError(
                f"{file} must have {needed} bytes, {self.num_tokens} tokens of {self.dtype.name}, as {self._file.name} "
                f"says. Given: {size} bytes.",
                code="data_index",
                hint=_REMADE,
            )
        return _mapped(file, self.dtype)

    def _refuse(self, offset: int, expected: str, found: str) -> NoReturn:
        raise DataError(
            f"{self._file} byte {offset} must be {expected}. Given: {found}.", code="data_index", hint=_REMADE
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}.",
            code="data_missing",
            hint="Name the prefix of both files, without .bin or .idx; `trilithon data prepare` makes them.",
        ) from None


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The file as a read-only array; an empty file cannot be mapped."""
    if _size(path) == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
