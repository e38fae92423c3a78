"""
BM25: passages by the words that they share with a question, rare words first.

    score = sum over the query's distinct words w of  idf(w) * tf (k1 + 1) / (tf + k1 (1 - b + b len / mean len))
    idf(w) = ln(1 + (N - n + 0.5) / (n + 0.5)),  N passages, n of them with w

Source: Robertson and Zaragoza 2009, with Lucene's idf, which is never negative; k1 = 0.9 and b = 0.4 as retrieval for
open questions has them (Karpukhin et al. 2020). The engine is bm25s, which computes the scores when the index is built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import bm25s
import numpy as np

from trilithon.errors import InvalidArgument
from trilithon_server.knowledge.ranking import Ranking, best
from trilithon_server.knowledge.words import search_words

K1 = 0.9
B = 0.4

_NAMES = {
    "data_name": "bm25_scores.npy",
    "indices_name": "bm25_rows.npy",
    "indptr_name": "bm25_starts.npy",
    "vocab_name": "bm25_words.json",
    "params_name": "bm25.json",
}
SPARSE_FILES = tuple(_NAMES.values())
"""What `save` writes."""

_DTYPES = {"data": np.dtype("<f4"), "indices": np.dtype("<i4"), "indptr": np.dtype("<i8")}


class SparseIndex:
    """BM25 over passages, by their rows; made by `build` or `load`. Searches may run side by side."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    @property
    def count(self) -> int:
        """Passages."""
        return int(self._engine.scores["num_docs"])

    @classmethod
    def build(cls, texts: Sequence[str], *, k1: float = K1, b: float = B) -> Self:
        """
        Index texts, title included where there is one.

        Args:
            k1: how much another occurrence of a word still counts; from 0, finite.
            b: how much a long passage is held against it; from 0 to 1.
        Raises:
            InvalidArgument: `index_invalid`, a number is out of its range, or no text has a word.
        """
        if not (math.isfinite(k1) and k1 >= 0 and 0 <= b <= 1):
            raise InvalidArgument(
                f"BM25 needs k1 of at least 0 and b from 0 to 1. Given: k1 {k1}, b {b}.", code="index_invalid"
            )
        ids: dict[str, int] = {}
        words = [[ids.setdefault(word, len(ids)) for word in search_words(text)] for text in texts]
        if not ids:
            raise InvalidArgument(
                f"BM25 needs a passage with a word. Given: {len(texts)} without any.", code="index_invalid"
            )
        engine = bm25s.BM25(k1=k1, b=b, method="atire", idf_method="lucene")
        engine.index((words, ids), create_empty_token=False, show_progress=False)
        return cls(engine)

    def search(self, queries: Sequence[str], k: int) -> list[Ranking]:
        """
        For each query the `k` best passages, of equal ones the earlier; only those that share a word with it.

        Scores are above 0 and hang on nothing but the index and the words of the query.
        """
        return [self._search(query, k) for query in queries]

    def _search(self, query: str, k: int) -> Ranking:
        words = self._engine.get_tokens_ids(list(dict.fromkeys(search_words(query))))
        scores = self._engine.get_scores_from_ids(words)
        rows = np.flatnonzero(scores > 0)
        return best(scores[rows], k, rows=rows)

    def save(self, folder: Path) -> None:
        """Write `SPARSE_FILES` into a folder."""
        self._engine.save(folder, allow_pickle=False, show_progress=False, **_NAMES)

    @classmethod
    def load(cls, folder: Path, *, count: int) -> Self:
        """
        Read what `save` wrote; arrays are mapped into memory.

        Args:
            count: passages that it must be of.
        Raises:
            ValueError: the files are not such an index; names what is wrong.
            OSError: one cannot be read.
        """
        try:
            engine = bm25s.BM25.load(folder, mmap=True, allow_pickle=False, load_corpus=False, **_NAMES)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{_NAMES['params_name']} does not describe a BM25 index: {error}") from None
        _check(engine, count)
        return cls(engine)


def _check(engine: Any, count: int) -> None:
    """That no search can read past an end: each row is a passage, each word a stretch of rows."""
    scores = engine.scores
    for part, dtype in _DTYPES.items():
        if scores[part].dtype != dtype or scores[part].ndim != 1:
            name = _NAMES[f"{part}_name"]
            raise ValueError(f"{name} must be {dtype} [n]. Given: {scores[part].dtype} {list(scores[part].shape)}")
    rows, starts = scores["indices"], scores["indptr"]
    if scores["num_docs"] != count or sorted(engine.vocab_dict.values()) != list(range(len(starts) - 1)):
        raise ValueError(
            f"the BM25 files must be of {count} passages and one vocabulary. Given: {scores['num_docs']} passages, "
            f"{len(engine.vocab_dict)} words in {_NAMES['vocab_name']}, {len(starts) - 1} in {_NAMES['indptr_name']}"
        )
    sizes = {len(scores["data"]), len(rows), int(starts[-1])}
    if len(sizes) > 1 or starts[0] != 0 or np.any(np.diff(starts) < 0) or np.any((rows < 0) | (rows >= count)):
        raise ValueError("the BM25 arrays do not fit each other")
