"""Writes indexed token files, the index last, so that a pair of files is whole or is not there."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from array import array
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from trilithon_parallel.data.errors import DataError
from trilithon_parallel.data.index import DTYPES, MAGIC, VERSION, file_of
from trilithon_parallel.data.publish import locked, sync, temporary_path

_MAX_LENGTH = 2**31 - 1  # lengths are i32


class IndexWriter:
    """
    Writes an indexed token file; it exists, whole, once `publish` has returned, and not at all before.

    Args:
        prefix: `PREFIX.bin` and `PREFIX.idx` are written; the folder is created.
        dtype: of the tokens, one of the whole-number `DTYPES`; see `token_dtype`.
        overwrite: replace files of this name; else they are refused.
    Raises:
        DataError: `data_exists`.
    """

    def __init__(self, prefix: Path, *, dtype: np.dtype[Any], overwrite: bool = False) -> None:
        self.prefix, self._dtype, self._overwrite = prefix, dtype.newbyteorder("<"), overwrite
        self._code = next(code for code, known in DTYPES.items() if known == self._dtype and known.kind != "f")
        self._refuse_existing()
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._lengths, self._borders = array("i"), array("q", [0])
        self.num_tokens = 0
        self._digest = hashlib.sha256()
        self._aside = {suffix: temporary_path(file_of(prefix, suffix)) for suffix in ("bin", "json", "idx")}
        self._bin = self._aside["bin"].open("xb")

    @property
    def num_documents(self) -> int:
        """Documents ended so far."""
        return len(self._borders) - 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Throw away what was not published."""
        self._bin.close()
        for path in self._aside.values():
            path.unlink(missing_ok=True)

    def add_sequence(self, tokens: ArrayLike) -> None:
        """Append a sequence to the current document."""
        given = np.asarray(tokens)
        limits = np.iinfo(self._dtype)
        if given.size and not (limits.min <= given.min() and given.max() <= limits.max):
            raise DataError(
                f"{self.prefix} tokens must be from {limits.min} to {limits.max} in {self._dtype.name}. "
                f"Given: {given.min()} to {given.max()}.",
                hint="Choose the dtype by the tokenizer's vocabulary size.",
            )
        if given.size > _MAX_LENGTH:
            raise DataError(
                f"{self.prefix} document {self.num_documents} must have at most {_MAX_LENGTH} tokens. "
                f"Given: {given.size}.",
                hint="Split the document.",
            )
        block = given.astype(self._dtype).tobytes()
        self._bin.write(block)
        self._digest.update(block)
        self._lengths.append(given.size)
        self.num_tokens += given.size

    def end_document(self) -> None:
        """The sequences since the last end are one document."""
        self._borders.append(len(self._lengths))

    def add_document(self, tokens: ArrayLike) -> None:
        """Append a document of one sequence."""
        self.add_sequence(tokens)
        self.end_document()

    def publish(self, facts: Mapping[str, Any] | None = None) -> None:
        """
        Bring the files to the disk under their names, the index last: without it nobody reads the others.

        Args:
            facts: written to `PREFIX.json`, with counts and digests; None writes no such file.
        Raises:
            DataError: `data_exists`, somebody else published under this name meanwhile.
        """
        self._bin.flush()
        os.fsync(self._bin.fileno())
        index = self._index_bytes()
        self._aside["idx"].write_bytes(index)
        sync(self._aside["idx"])
        if facts is not None:
            counts = {"num_documents": self.num_documents, "num_tokens": self.num_tokens, "dtype": self._dtype.name}
            digests = {"bin_sha256": self._digest.hexdigest(), "idx_sha256": hashlib.sha256(index).hexdigest()}
            self._aside["json"].write_text(json.dumps({**facts, **counts, **digests}, indent=2) + "\n", "utf-8")
            sync(self._aside["json"])
        with locked(self.prefix.parent):
            self._refuse_existing()
            for suffix in ("idx", "json"):
                file_of(self.prefix, suffix).unlink(missing_ok=True)
            for suffix in ("bin", "json", "idx") if facts is not None else ("bin", "idx"):
                self._aside[suffix].rename(file_of(self.prefix, suffix))
            sync(self.prefix.parent)

    def _index_bytes(self) -> bytes:
        lengths = np.array(self._lengths, "<i4")
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        pointers = np.concatenate([[0], ends])[:-1].astype("<i8")
        header = MAGIC + struct.pack("<QBQQ", VERSION, self._code, len(lengths), len(self._borders))
        return header + lengths.tobytes() + pointers.tobytes() + np.array(self._borders, "<i8").tobytes()

    def _refuse_existing(self) -> None:
        if not self._overwrite and (path := file_of(self.prefix, "idx")).exists():
            raise DataError(
                f"{path} exists already.",
                code="data_exists",
                hint="Choose another prefix, or replace it with --overwrite.",
            )
