"""
TF-IDF over the texts of one conversation: how rare a word is depends on these texts alone.

    weight(term) = (1 + ln tf) * idf,  idf = ln((1 + N) / (1 + df)) + 1

over the N texts and the context that they are asked with; vectors have length 1. Terms are words (runs of word
characters, lowered, stop words left out) and pairs of words that then follow each other.

Shape legend: N texts, M texts of the context, V terms, E terms of the context alone, Z terms of all texts together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trilithon_server.knowledge.word_lists import stop_words

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_WORD = re.compile(r"\w+")


class TermCounts:
    """
    Terms of texts, counted once; weighted anew for each context.

    Args:
        longest: words of the longest term.
        left_out: words that make no term; by default those of `stop_words.txt`.
    """

    def __init__(self, texts: Sequence[str], *, longest: int = 2, left_out: Collection[str] | None = None) -> None:
        self._longest = longest
        self._left_out = stop_words() if left_out is None else frozenset(left_out)
        self._ids: dict[str, int] = {}
        self._num_texts = len(texts)
        counts = [self._count(text) for text in texts]
        sizes = [len(count) for count in counts]
        num_entries = sum(sizes)
        self._rows_Z = np.repeat(np.arange(len(texts), dtype=np.int64), sizes)
        entries = (self._ids.setdefault(term, len(self._ids)) for count in counts for term in count)
        self._terms_Z = np.fromiter(entries, np.int64, num_entries)
        self._tf_Z = 1 + np.log(np.fromiter((tf for count in counts for tf in count.values()), np.float64, num_entries))
        self._df_V = np.bincount(self._terms_Z, minlength=len(self._ids))

    def weighted(self, context: Sequence[str], *, counted: bool = True) -> TermVectors:
        """
        Vectors of the texts and of the context's.

        Args:
            counted: whether the context counts as texts where it says how rare a term is.
        """
        counts = [self._count(text) for text in context]
        num_known = len(self._ids)
        extra: dict[str, int] = {}
        for count in counts:
            for term in count:
                if term not in self._ids:
                    extra.setdefault(term, num_known + len(extra))
        df = np.concatenate([self._df_V, np.zeros(len(extra), np.int64)])
        context_MX = np.zeros((len(context), len(df)))
        for row, count in enumerate(counts):
            for term, tf in count.items():
                term_id = self._ids.get(term, extra.get(term, -1))
                context_MX[row, term_id] = 1 + np.log(tf)
                df[term_id] += counted
        idf = np.log((1 + self._num_texts + counted * len(context)) / (1 + df)) + 1
        weights_Z = self._tf_Z * idf[self._terms_Z]
        lengths_N = np.sqrt(np.bincount(self._rows_Z, weights_Z**2, minlength=self._num_texts))
        context_MX *= idf
        return TermVectors(
            self._rows_Z, self._terms_Z, weights_Z / lengths_N[self._rows_Z], self._num_texts, unit(context_MX)
        )

    def _count(self, text: str) -> Counter[str]:
        words = [word for word in _WORD.findall(text.lower()) if word not in self._left_out]
        sizes = range(1, self._longest + 1)
        return Counter(" ".join(words[i : i + size]) for size in sizes for i in range(len(words) - size + 1))


@dataclass(frozen=True, slots=True, eq=False)
class TermVectors:
    """
    Vectors of length 1 (or 0, for a text without terms).

    Attributes:
        rows_Z, terms_Z, weights_Z: the texts' as triples of row, term and weight, by rows.
        num_texts: N.
        context: of the context, [M, V + E].
    """

    rows_Z: Ints
    terms_Z: Ints
    weights_Z: Floats
    num_texts: int
    context: Floats

    def products(self, vector: Floats) -> Floats:
        """Inner products of every text with a vector [V + E]: float64[N]."""
        weighted = self.weights_Z * vector[self.terms_Z]
        return np.asarray(np.bincount(self.rows_Z, weighted, minlength=self.num_texts), dtype=np.float64)

    def similarities(self, row: int) -> Floats:
        """Cosines of every text with one of them: float64[N]."""
        vector = np.zeros(self.context.shape[1])
        start, stop = np.searchsorted(self.rows_Z, [row, row + 1])
        vector[self.terms_Z[start:stop]] = self.weights_Z[start:stop]
        return self.products(vector)


def unit(rows: Floats) -> Floats:
    """Rows brought to length 1; zeros stay zeros."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)
