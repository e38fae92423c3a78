"""
One version of an index, opened: what is looked for, what is found, and the three ways of searching.

A version never changes, so searches share it without a lock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trilithon.errors import FailedPrecondition, InvalidArgument
from trilithon_server.knowledge.dense import DenseIndex, FlatIndex
from trilithon_server.knowledge.fusion import fuse
from trilithon_server.knowledge.manifest import Manifest, corrupt, read_manifest
from trilithon_server.knowledge.passages import Passage
from trilithon_server.knowledge.ranking import Ranking
from trilithon_server.knowledge.sparse import SparseIndex
from trilithon_server.knowledge.stored import Parts, StoredPassages, read_parts
from trilithon_server.knowledge.words import search_words

Mode = Literal["dense", "bm25", "hybrid"]

HYBRID_DEPTH = 10
"""
Results of each kind that are fused, at least. Not many more than are asked for: what stands far down in both lists
would have a larger sum than what is first of one alone.
"""

_NOTHING = Ranking(np.empty(0, np.int64), np.empty(0, np.float32))


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

    >>> [round(value, 4) for value in log_probabilities([3.0, 3.0], scale=20.0)]
    [-0.6931, -0.6931]

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

    def __init__(self, manifest: Manifest, parts: Parts) -> None:
        self.manifest = manifest
        self._parts: Parts | None = parts

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
        return self._opened().passages.read(row)

    def search(
        self, queries: Queries, top_k: int, *, mode: Mode, most_bytes: int | None = None
    ) -> list[tuple[Hit, ...]]:
        """
        For each query up to `top_k` passages, best first, of equal ones the earlier; `bm25` finds only passages that
        share a word with the query.

        Log-probabilities are those of the inner products, times the encoder's `score_scale`, wherever there are query
        vectors; BM25 scores are weights of evidence, and their scale is 1.

        Args:
            most_bytes: of what is found, over all queries, as lines of the file; None: any number.
        Raises:
            InvalidArgument: `search_invalid`, also where more bytes are found; `vectors_invalid`.
            FailedPrecondition: `index_encoder`, the vectors are another encoder's.
        """
        self._check(queries, top_k, mode)
        parts, scale = self._opened(), self.manifest.encoder.score_scale
        read = _reader(parts.passages, most_bytes)
        return _find(queries, top_k, mode, dense=parts.dense, sparse=parts.sparse, read=read, scale=scale)

    def _opened(self) -> Parts:
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
    return IndexVersion(manifest, read_parts(folder, manifest, where=where))


def search_passages(
    passages: Sequence[Passage],
    queries: Queries,
    top_k: int,
    *,
    mode: Mode,
    vectors_MH: NDArray[np.float32] | None = None,
    scale: float = 1.0,
) -> list[tuple[Hit, ...]]:
    """
    Search passages that lie in no index, as `IndexVersion.search` searches those that do.

    Args:
        vectors_MH: float32[M, H] of the passages, for `dense` and `hybrid`.
        scale: the encoder's `score_scale`.
    Raises:
        InvalidArgument: `vectors_invalid`.
    """
    has_words = mode != "dense" and any(search_words(passage.searched) for passage in passages)
    sparse = SparseIndex.build([passage.searched for passage in passages]) if has_words else None
    dense = None if vectors_MH is None else FlatIndex(vectors_MH)
    return _find(queries, top_k, mode, dense=dense, sparse=sparse, read=passages.__getitem__, scale=scale)


def _reader(passages: StoredPassages, most_bytes: int | None) -> Callable[[int], Passage]:
    """Reads each row once, however many queries found it, and none where the answer would be too large."""
    read = cache(passages.read)
    left = most_bytes

    def bounded(row: int) -> Passage:
        nonlocal left
        if left is not None and (left := left - passages.size(row)) < 0:
            message = f"the passages that are found must have at most {most_bytes:,} bytes in all. Given: more."
            raise InvalidArgument(message, code="search_invalid", hint="Lower top_k, or ask fewer questions at once.")
        return read(row)

    return bounded


def _find(
    queries: Queries,
    top_k: int,
    mode: Mode,
    *,
    dense: DenseIndex | None,
    sparse: SparseIndex | None,
    read: Callable[[int], Passage],
    scale: float,
) -> list[tuple[Hit, ...]]:
    depth = max(top_k, HYBRID_DEPTH) if mode == "hybrid" else top_k
    by_words = [_NOTHING] * len(queries.texts)
    if sparse is not None and mode != "dense":
        by_words = sparse.search(queries.texts, depth)
    if mode == "bm25":
        return [_hits(ranking, log_probabilities(ranking.scores, scale=1.0), read) for ranking in by_words]
    assert dense is not None
    assert queries.vectors_NH is not None
    rankings = dense.search(queries.vectors_NH, depth)
    if mode == "hybrid":
        rankings = [fuse(both, top_k) for both in zip(rankings, by_words, strict=True)]
    found = []
    for query_H, ranking in zip(queries.vectors_NH, rankings, strict=True):
        products = ranking.scores if mode == "dense" else dense.scores(query_H, ranking.rows)
        found.append(_hits(ranking, log_probabilities(products, scale=scale), read))
    return found


def _check_encoder(manifest: Manifest, model_digest: str) -> None:
    if model_digest != manifest.encoder.model_digest:
        raise FailedPrecondition(
            f'index "{manifest.index}" version {manifest.version} holds vectors of the encoder '
            f"{manifest.encoder.model_digest}. Given: queries of {model_digest or 'none'}.",
            code="index_encoder",
            hint="Ask with the encoder that built it, or refresh the index with the other one.",
        )


def _hits(ranking: Ranking, logprobs: Sequence[float], read: Callable[[int], Passage]) -> tuple[Hit, ...]:
    found = zip(ranking.rows.tolist(), ranking.scores.tolist(), logprobs, strict=True)
    return tuple(Hit(read(row), row, score, logprob) for row, score, logprob in found)
