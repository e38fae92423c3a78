"""
The files of one version of an index, written and read.

    passages.jsonl   the passages; offsets.npy the first byte of each, ids.npy their ids
    vectors.npy      float32[M, H], of passage m in row m; graph.npy beside it for `hnsw`
    bm25*            word by word, the scores of the passages
    manifest.json    what made it, and the checksum of every file

No file is unpickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trilithon.errors import InvalidArgument
from trilithon_server.knowledge.dense import Backend, DenseIndex, FlatIndex, HnswIndex
from trilithon_server.knowledge.manifest import (
    MANIFEST_FILE,
    Encoder,
    Manifest,
    check_files,
    corrupt,
    encode_manifest,
    file_entry,
)
from trilithon_server.knowledge.passages import Passage, check_passages, parse_passage, write_passages
from trilithon_server.knowledge.sparse import K1, SPARSE_FILES, B, SparseIndex
from trilithon_server.validation import shown

_PASSAGES, _OFFSETS, _IDS, _VECTORS, _GRAPH = "passages.jsonl", "offsets.npy", "ids.npy", "vectors.npy", "graph.npy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """
    How an index is built.

    Attributes:
        backend: `flat`, exact; `hnsw`, quick for many passages, and its graph lies in memory.
        k1, b: of BM25.
    """

    backend: Backend = "flat"
    k1: float = K1
    b: float = B


class StoredPassages:
    """
    The passages of a version, read from its file one by one.

    Raises (from the constructor):
        ValueError: the files are not of `count` passages with ids of their own; names what is wrong.
        OSError: one cannot be read.
    """

    def __init__(self, folder: Path, *, count: int) -> None:
        self._lines = np.memmap(folder / _PASSAGES, dtype=np.uint8, mode="r")
        self._offsets = _load(folder / _OFFSETS, "<i8", (count + 1,))
        self._ids = _load(folder / _IDS, None, (count,))
        if self._offsets[0] != 0 or self._offsets[-1] != len(self._lines) or np.any(np.diff(self._offsets) <= 0):
            raise ValueError(f"{_OFFSETS} must tell the lines of {_PASSAGES}, which has {len(self._lines)} bytes")
        if self._ids.dtype.kind != "S":
            raise ValueError(f"{_IDS} must hold byte strings. Given: {self._ids.dtype}")
        if (distinct := len(np.unique(self._ids))) != count:
            raise ValueError(f"{_IDS} must hold {count} ids, none of them twice. Given: {distinct} distinct ones")

    def size(self, row: int) -> int:
        """Bytes of a row's line, which is not read for it."""
        return int(self._offsets[row + 1] - self._offsets[row])

    def read(self, row: int) -> Passage:
        """
        The passage of a row.

        Raises:
            DataLoss: `index_corrupt`, its line is not a passage of that id.
        """
        line = self._lines[self._offsets[row] : self._offsets[row + 1]].tobytes()
        try:
            passage = parse_passage(line)
        except InvalidArgument as error:
            raise corrupt(f"{_PASSAGES}:{row + 1} {error.message}") from None
        expected = bytes(self._ids[row]).decode(errors="replace")
        if passage.id != expected:
            raise corrupt(f"{_PASSAGES}:{row + 1} must be passage {shown(expected)}. Given: {shown(passage.id)}.")
        return passage


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What a version is searched with; rows are the same in all three."""

    dense: DenseIndex
    sparse: SparseIndex
    passages: StoredPassages


def write_version(
    folder: Path,
    passages: Sequence[Passage],
    vectors_MH: NDArray[np.float32],
    *,
    index: str,
    version: int,
    encoder: Encoder,
    settings: Settings,
    created: int,
) -> None:
    """
    Write the files of a version into an empty folder, the manifest last.

    Raises:
        InvalidArgument: `passages_invalid`, `vectors_invalid`, `index_invalid`.
        OSError: a file cannot be written.
    """
    check_passages(passages)
    if vectors_MH.ndim != 2 or len(vectors_MH) != len(passages):
        raise InvalidArgument(
            f"each of {len(passages)} passages needs a vector. Given: vectors {list(vectors_MH.shape)}.",
            code="vectors_invalid",
        )
    if settings.backend == "hnsw":
        np.save(folder / _GRAPH, HnswIndex.build(vectors_MH).graph_bytes())
    else:
        FlatIndex(vectors_MH)  # refuses what cannot be searched
    np.save(folder / _VECTORS, np.ascontiguousarray(vectors_MH, dtype="<f4"))
    np.save(folder / _OFFSETS, np.array(write_passages(folder / _PASSAGES, passages), dtype="<i8"))
    np.save(folder / _IDS, np.array([passage.id.encode() for passage in passages]))
    SparseIndex.build([passage.searched for passage in passages], k1=settings.k1, b=settings.b).save(folder)
    manifest = Manifest(
        index=index,
        version=version,
        encoder=encoder,
        backend=settings.backend,
        dim=vectors_MH.shape[1],
        count=len(passages),
        created=created,
        files={name: file_entry(folder / name) for name in _files_of(settings.backend)},
    )
    (folder / MANIFEST_FILE).write_bytes(encode_manifest(manifest))


def read_parts(folder: Path, manifest: Manifest, *, where: str) -> Parts:
    """
    Read all files of a version once, compare them with the manifest, and map them.

    Args:
        where: begins the messages, e.g. `index "wiki" version 3`.
    Raises:
        DataLoss: `index_corrupt`, a file is missing, changed, or not what the manifest says.
    """
    check_files(folder, manifest, _files_of(manifest.backend), where=where)
    try:
        vectors_MH = _load(folder / _VECTORS, "<f4", (manifest.count, manifest.dim))
        dense: DenseIndex
        if manifest.backend == "hnsw":
            dense = HnswIndex.load(np.load(folder / _GRAPH, allow_pickle=False), vectors_MH)
        else:
            dense = FlatIndex(vectors_MH)
        sparse = SparseIndex.load(folder, count=manifest.count)
        return Parts(dense, sparse, StoredPassages(folder, count=manifest.count))
    except (ValueError, EOFError, OSError, InvalidArgument) as error:
        raise corrupt(f"{where}: {error}.") from None


def _files_of(backend: Backend) -> tuple[str, ...]:
    graph = (_GRAPH,) if backend == "hnsw" else ()
    return (_PASSAGES, _OFFSETS, _IDS, _VECTORS, *graph, *SPARSE_FILES)


def _load(path: Path, dtype: str | None, shape: tuple[int, ...]) -> NDArray[Any]:
    """An array of a file, mapped into memory."""
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.shape != shape or (dtype is not None and array.dtype != np.dtype(dtype)):
        expected = f"{np.dtype(dtype)} " if dtype is not None else ""
        raise ValueError(f"{path.name} must be {expected}{list(shape)}. Given: {array.dtype} {list(array.shape)}")
    return array
