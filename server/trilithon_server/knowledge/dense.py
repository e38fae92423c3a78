"""
Search by inner product over vectors: exact (`flat`), or by walking a graph of neighbours (`hnsw`).

Both only propose rows. What a row scores is computed the same way for all of them, in an order that depends neither on
where the row lies nor on what else is asked: a matrix product adds in another order for another batch, so equal vectors
would win or lose by a rounding error.

Shape legend: N queries, M passages, H width of the vectors, K results.

Source of `hnsw`: Malkov and Yashunin 2018, as faiss has it.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, Self, get_args

import numpy as np
from numpy.typing import NDArray

from trilithon.errors import InvalidArgument
from trilithon_server.knowledge.ranking import Ranking, Rows, Scores, best

Backend = Literal["flat", "hnsw"]
BACKENDS: tuple[str, ...] = get_args(Backend)

MAX_NORM = 1e15
"""Of a vector. Inner products stay far below the largest float32, 3.4e38."""

BLOCK_ROWS = 16_384
RESCORED_ROWS = 1_024
ROUNDING = 2.0**-24  # of one float32 operation, relative
SMALLEST = float(np.finfo(np.float32).tiny)  # below it processors may round to 0

# Neighbours of a node, candidates while a node is linked, and while a query walks.
HNSW_LINKS = 32
HNSW_BUILD_WIDTH = 200
HNSW_SEARCH_WIDTH = 128


class DenseIndex(Protocol):
    """Vectors that can be searched; searches may run side by side."""

    def search(self, queries_NH: NDArray[np.float32], k: int) -> list[Ranking]:
        """For each query the `k` best rows, of equal ones the lower."""
        ...

    def scores(self, query_H: NDArray[np.float32], rows: Rows) -> Scores:
        """Inner products of a query with some rows, float32[K]."""
        ...


class FlatIndex:
    """
    All vectors, compared one by one: what it finds is exact.

    Args:
        vectors_MH: float32[M, H], for example mapped from a file.
    Raises:
        InvalidArgument: `vectors_invalid`.
    """

    def __init__(self, vectors_MH: NDArray[np.float32]) -> None:
        self._largest = float(_norms(vectors_MH, "the vectors").max(initial=0.0))
        self.vectors_MH = vectors_MH

    def search(self, queries_NH: NDArray[np.float32], k: int) -> list[Ranking]:
        """
        For each query the `k` rows with the highest inner products, of equal ones the lower.

        Raises:
            InvalidArgument: `vectors_invalid`, the queries are not finite float32[N, H].
        """
        norms_N = _query_norms(queries_NH, self.vectors_MH)
        width = self.vectors_MH.shape[1]
        # A product is wrong by at most H roundings of |q| |z|, and by what each of its terms may lose near 0; the exact
        # one is rounded once. Of two rows that change places both may be wrong. What may be among the best is kept.
        slack_N = 2 * width * SMALLEST + 2 * (width + 2) * ROUNDING * norms_N * self._largest
        kept = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries_NH)
        for start in range(0, len(self.vectors_MH), BLOCK_ROWS):
            block_BH = self.vectors_MH[start : start + BLOCK_ROWS]
            rows_B = np.arange(start, start + len(block_BH))
            for i, scores_B in enumerate(queries_NH @ block_BH.T):
                rows, scores = np.append(kept[i][0], rows_B), np.append(kept[i][1], scores_B)
                if k < len(scores):
                    good = scores >= np.partition(scores, len(scores) - k)[len(scores) - k] - slack_N[i]
                    rows, scores = rows[good], scores[good]
                kept[i] = rows, scores
        return [
            best(self.scores(query_H, rows), k, rows=rows) for query_H, (rows, _) in zip(queries_NH, kept, strict=True)
        ]

    def scores(self, query_H: NDArray[np.float32], rows: Rows) -> Scores:
        """Inner products with some rows, float32[K]: summed in float64 row by row, then rounded."""
        exact = query_H.astype(np.float64)
        out = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), RESCORED_ROWS):
            part = slice(start, start + RESCORED_ROWS)
            out[part] = (self.vectors_MH[rows[part]] * exact).sum(axis=1)
        return out


class HnswIndex:
    """A graph of near neighbours over the vectors, made by `build` or `load`: quick, and most of the best are found."""

    def __init__(self, graph: Any, flat: FlatIndex) -> None:
        graph.hnsw.efSearch = HNSW_SEARCH_WIDTH  # faiss takes k where that is more
        self._graph, self._flat = graph, flat

    @classmethod
    def build(cls, vectors_MH: NDArray[np.float32]) -> Self:
        """
        Link the vectors. The same vectors give the same graph in any number of threads, as faiss has it from 1.15.1 on.

        Raises:
            InvalidArgument: `vectors_invalid`.
        """
        import faiss  # only where it is used: the front starts without it

        flat = FlatIndex(vectors_MH)
        graph = faiss.IndexHNSWFlat(vectors_MH.shape[1], HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = HNSW_BUILD_WIDTH
        graph.add(np.ascontiguousarray(vectors_MH))
        return cls(graph, flat)

    def search(self, queries_NH: NDArray[np.float32], k: int) -> list[Ranking]:
        """
        For each query up to `k` rows with high inner products, of equal ones the lower.

        Raises:
            InvalidArgument: `vectors_invalid`, the queries are not finite float32[N, H].
        """
        _query_norms(queries_NH, self._flat.vectors_MH)
        most = min(max(k, HNSW_SEARCH_WIDTH), self._graph.ntotal)
        found_NK = self._graph.search(np.ascontiguousarray(queries_NH), most)[1]
        rows = [np.sort(found_K[found_K >= 0]) for found_K in found_NK]
        return [best(self.scores(query_H, r), k, rows=r) for query_H, r in zip(queries_NH, rows, strict=True)]

    def scores(self, query_H: NDArray[np.float32], rows: Rows) -> Scores:
        """Inner products with some rows, float32[K], equal to those of `FlatIndex`."""
        return self._flat.scores(query_H, rows)

    def graph_bytes(self) -> NDArray[np.uint8]:
        """The graph as faiss writes it, uint8[n]."""
        import faiss

        out: NDArray[np.uint8] = faiss.serialize_index(self._graph)
        return out

    @classmethod
    def load(cls, graph_bytes: NDArray[np.uint8], vectors_MH: NDArray[np.float32]) -> Self:
        """
        The index of `graph_bytes`.

        Raises:
            ValueError: it is no graph of these vectors.
            InvalidArgument: `vectors_invalid`.
        """
        import faiss

        try:
            graph = faiss.deserialize_index(np.array(graph_bytes))
        except RuntimeError as error:
            raise ValueError(f"the graph cannot be read: {str(error).splitlines()[0]}") from None
        expected = (faiss.IndexHNSWFlat, *vectors_MH.shape, faiss.METRIC_INNER_PRODUCT)
        if (type(graph), graph.ntotal, graph.d, graph.metric_type) != expected:
            raise ValueError(
                f"the graph must be of {vectors_MH.shape[0]} vectors of width {vectors_MH.shape[1]}. "
                f"Given: {type(graph).__name__}, {graph.ntotal} of width {graph.d}"
            )
        return cls(graph, FlatIndex(vectors_MH))


def _query_norms(queries_NH: NDArray[np.float32], vectors_MH: NDArray[np.float32]) -> NDArray[np.float64]:
    if queries_NH.ndim == 2 and queries_NH.shape[1] != vectors_MH.shape[1]:
        raise InvalidArgument(
            f"the queries' vectors must have width {vectors_MH.shape[1]}. Given: {queries_NH.shape[1]}.",
            code="vectors_invalid",
        )
    return _norms(queries_NH, "the queries' vectors")


def _norms(vectors_MH: NDArray[np.float32], what: str) -> NDArray[np.float64]:
    """Lengths of vectors, after a look at what they are."""
    if vectors_MH.ndim != 2 or vectors_MH.dtype != np.float32:
        raise InvalidArgument(
            f"{what} must be float32 [count, width]. Given: {vectors_MH.dtype} {list(vectors_MH.shape)}.",
            code="vectors_invalid",
        )
    norms_M = np.empty(len(vectors_MH))
    for start in range(0, len(vectors_MH), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        norms_M[part] = np.linalg.norm(vectors_MH[part].astype(np.float64), axis=1)
    for row in np.flatnonzero(~(norms_M <= MAX_NORM))[:1]:
        raise InvalidArgument(
            f"{what} must be finite, of length {MAX_NORM:g} at most. Given: row {row}, of length {norms_M[row]:g}.",
            code="vectors_invalid",
        )
    return norms_M
