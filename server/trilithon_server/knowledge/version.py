"""
One version of an index: its files, written and opened, and the search over it.

    passages.jsonl   the passages; offsets.npy the first byte of each, ids.npy their ids
    vectors.npy      float32[M, H], of passage m in row m; graph.npy beside it for `hnsw`
    bm25*            word by word, the scores of the passages
    manifest.json    what made it, and the checksum of every file

No file is unpickled. A version never changes, so searches share it without a lock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trilithon.errors import FailedPrecondition, InvalidArgument
from trilithon_server.knowledge.dense import Backend, DenseIndex, FlatIndex, HnswIndex
from trilithon_server.knowledge.fusion import fuse
from trilithon_server.knowledge.manifest import (
    MANIFEST_FILE,
    Encoder,
    Manifest,
    check_files,
    corrupt,
    encode_manifest,
    file_entry,
    read_manifest,
)
from trilithon_server.knowledge.passages import Passage, check_passages, parse_passage, write_passages
from trilithon_server.knowledge.ranking import Ranking
from trilithon_server.knowledge.sparse import K1, SPARSE_FILES, B, SparseIndex

Mode = Literal["dense", "bm25", "hybrid"]

HYBRID_DEPTH = 100
"""Results of each kind that are fused, at least: what is far down in both lists may still be first of the sum."""

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


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Queries:
    """
    What is looked for.

    Attributes:
        texts: for `bm25` and `hybrid`.
        vectors_NH: float32[N, H], for `dense` and `hybrid`; of as many queries where both are given.
        model_digest: of the encoder that made the vectors.
    """

    texts: Sequence[str] = ()
    vectors_NH: NDArray[np.float32] | None = None
    model_digest: str = ""


@dataclass(frozen=True, slots=True)
class Hit:
    """
    A passage that was found.

    Attributes:
        row: of the passage in this version, from 0.
        score: inner product, BM25 or fused score, as the search was.
        logprob: log p(z|q), over what was found for the query; see `IndexVersion.search`.
    """

    passage: Passage
    row: int
    score: float
    logprob: float


def log_probabilities(scores: Iterable[float], *, scale: float) -> list[float]:
    """
    Log-softmax of scaled scores: log p(z|q) over the passages retrieved for one query.

    >>> log_probabilities([3.0, 3.0], scale=20.0) == [math.log(0.5)] * 2
    True

    Source: arXiv 2101.00408, whose scale is 1 / sqrt(width).
    """
    scaled = [scale * float(score) for score in scores]
    if not scaled:
        return []
    most = max(scaled)
    total = most + math.log(math.fsum(math.exp(value - most) for value in scaled))
    return [value - total for value in scaled]


class IndexVersion:
    """
    An opened version; made by `open_version`. Searches may run side by side until it is closed.

    Attributes:
        manifest: its facts.
    """

    def __init__(self, manifest: Manifest, dense: DenseIndex, sparse: SparseIndex, passages: StoredPassages) -> None:
        self.manifest = manifest
        self._parts: tuple[DenseIndex, SparseIndex, StoredPassages] | None = (dense, sparse, passages)

    @property
    def version(self) -> int:
        """Its number."""
        return self.manifest.version

    @property
    def is_open(self) -> bool:
        """Whether it may be searched."""
        return self._parts is not None

    def close(self) -> None:
        """Let go of the files and the memory; no search may run, and none may begin."""
        self._parts = None

    def passage(self, row: int) -> Passage:
        """The passage of a row."""
        return self._opened()[2].read(row)

    def search(self, queries: Queries, top_k: int, *, mode: Mode) -> list[tuple[Hit, ...]]:
        """
        For each query up to `top_k` passages, best first, of equal ones the earlier; `bm25` finds only passages that
        share a word with the query.

        Log-probabilities are those of the inner products, times the encoder's `score_scale`, wherever there are query
        vectors; BM25 scores are weights of evidence, and their scale is 1.

        Raises:
            InvalidArgument: `search_invalid`, `vectors_invalid`.
            FailedPrecondition: `index_encoder`, the vectors are another encoder's.
        """
        dense, sparse, passages = self._opened()
        self._check(queries, top_k, mode)
        depth = max(top_k, HYBRID_DEPTH) if mode == "hybrid" else top_k
        by_words = sparse.search(queries.texts, depth) if mode != "dense" else []
        if mode == "bm25" or queries.vectors_NH is None:
            return [_hits(ranking, log_probabilities(ranking.scores, scale=1.0), passages) for ranking in by_words]
        scale = self.manifest.encoder.score_scale
        rankings = dense.search(queries.vectors_NH, depth)
        if mode == "hybrid":
            rankings = [fuse(both, top_k) for both in zip(rankings, by_words, strict=True)]
        found = []
        for query_H, ranking in zip(queries.vectors_NH, rankings, strict=True):
            products = ranking.scores if mode == "dense" else dense.scores(query_H, ranking.rows)
            found.append(_hits(ranking, log_probabilities(products, scale=scale), passages))
        return found

    def _opened(self) -> tuple[DenseIndex, SparseIndex, StoredPassages]:
        assert self._parts is not None, "the version is closed"
        return self._parts

    def _check(self, queries: Queries, top_k: int, mode: Mode) -> None:
        wrong = ""
        vectors = None if queries.vectors_NH is None else len(queries.vectors_NH)
        if top_k < 1:
            wrong = f"top_k must be at least 1. Given: {top_k}."
        elif mode != "bm25" and vectors is None:
            wrong = f"a {mode} search needs the queries' vectors. Given: texts alone."
        elif mode == "hybrid" and vectors != len(queries.texts):
            wrong = f"a hybrid search needs as many texts as vectors. Given: {len(queries.texts)} and {vectors}."
        if wrong:
            raise InvalidArgument(wrong, code="search_invalid")
        if mode != "bm25":
            _check_encoder(self.manifest, queries.model_digest)


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
        if passage.id.encode() != self._ids[row]:
            raise corrupt(f"{_PASSAGES}:{row + 1} must be passage {self._ids[row]!r}. Given: {passage.id!r}.")
        return passage


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


def open_version(folder: Path, *, index: str, version: int, model_digest: str) -> IndexVersion:
    """
    Open a version after reading all of it once.

    Args:
        index, version: that it must be.
        model_digest: of the encoder that will make the queries' vectors.
    Raises:
        DataLoss: `index_corrupt`, a file is missing, changed, or not what the manifest says.
        FailedPrecondition: `index_unsupported`; `index_encoder`, another encoder made the vectors.
    """
    where = f'index "{index}" version {version}'
    manifest = read_manifest(folder, where=where)
    if (manifest.index, manifest.version) != (index, version):
        raise corrupt(f'{where} has the files of index "{manifest.index}" version {manifest.version}.')
    _check_encoder(manifest, model_digest)
    check_files(folder, manifest, _files_of(manifest.backend), where=where)
    try:
        vectors_MH = _load(folder / _VECTORS, "<f4", (manifest.count, manifest.dim))
        dense: DenseIndex
        if manifest.backend == "hnsw":
            dense = HnswIndex.load(np.load(folder / _GRAPH, allow_pickle=False), vectors_MH)
        else:
            dense = FlatIndex(vectors_MH)
        sparse = SparseIndex.load(folder, count=manifest.count)
        return IndexVersion(manifest, dense, sparse, StoredPassages(folder, count=manifest.count))
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


def _check_encoder(manifest: Manifest, model_digest: str) -> None:
    if model_digest != manifest.encoder.model_digest:
        raise FailedPrecondition(
            f'index "{manifest.index}" version {manifest.version} holds vectors of the encoder '
            f"{manifest.encoder.model_digest}. Given: queries of {model_digest or 'none'}.",
            code="index_encoder",
            hint="Ask with the encoder that built it, or refresh the index with the other one.",
        )


def _hits(ranking: Ranking, logprobs: Sequence[float], passages: StoredPassages) -> tuple[Hit, ...]:
    found = zip(ranking.rows.tolist(), ranking.scores.tolist(), logprobs, strict=True)
    return tuple(Hit(passages.read(row), row, score, logprob) for row, score, logprob in found)
