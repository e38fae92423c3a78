"""
Whether a sentence that was written for a keyword is about it, and whether the keyword that it replaced still shows.

A sentence is about a keyword where it holds the keyword's content words, in any form and order, or a synonym of the
whole keyword; with vectors also where the two are closer than nine of ten pairs that do not belong together.

Source: ours, in the place of the question that people were asked in arXiv 2010.00840, "is the story controlled by the
keyword".

Shape legend: N sentences with a keyword each, H width of the vectors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trilithon_server.knowledge.antonyms import WordRelations
from trilithon_server.knowledge.lemmas import base_forms, normalised
from trilithon_server.knowledge.word_lists import stop_words

UNRELATED_PERCENTILE = 90.0

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")


@dataclass(frozen=True, slots=True)
class Controlled:
    """A sentence, the keyword that it was written for, and the one that stood there before; empty where none did."""

    sentence: str
    keyword: str
    replaced: str = ""


def mentions(sentence: str, keyword: str, relations: WordRelations) -> bool:
    """
    Whether a sentence holds all content words of a keyword, or a synonym of it, in any form; never for a blank keyword.

    >>> mentions("They stopped here.", "stop", WordRelations([]))
    True
    """
    held = [set(base_forms(word)) for word in _words(sentence)]
    words = [word for word in _words(keyword) if word not in stop_words()] or _words(keyword)
    if words and all(_stands([word], held) for word in words):
        return True
    return any(_stands(_words(synonym), held) for synonym in relations.synonyms(keyword))


def control_rate(
    cases: Sequence[Controlled], relations: WordRelations, *, is_close: Sequence[bool] | None = None
) -> float:
    """
    Share of sentences that are about their keyword; 0 for none.

    Args:
        is_close: of each sentence, what `close_pairs` says; None: words alone decide.
    """
    close = [False] * len(cases) if is_close is None else is_close
    hits = (near or mentions(case.sentence, case.keyword, relations) for case, near in zip(cases, close, strict=True))
    return sum(hits) / len(cases) if cases else 0.0


def leakage(cases: Sequence[Controlled], relations: WordRelations) -> float:
    """Share of the sentences with a replaced keyword that mention it still; 0 for none."""
    replaced = [case for case in cases if case.replaced]
    held = sum(mentions(case.sentence, case.replaced, relations) for case in replaced)
    return held / len(replaced) if replaced else 0.0


def close_pairs(keywords_NH: NDArray[np.float32], sentences_NH: NDArray[np.float32]) -> list[bool]:
    """
    Of each sentence whether its cosine with its own keyword is above the 90th percentile of its cosines with the
    others' keywords, all sentences taken together.

    Args:
        keywords_NH, sentences_NH: vectors in the same order, none of them zero; at least 2 of each.
    """
    assert keywords_NH.shape == sentences_NH.shape
    assert len(keywords_NH) >= 2
    cosines_NN = _unit(keywords_NH) @ _unit(sentences_NH).T
    unrelated = cosines_NN[~np.eye(len(cosines_NN), dtype=bool)]
    least = np.percentile(unrelated, UNRELATED_PERCENTILE)
    return [bool(value > least) for value in np.diag(cosines_NN)]


def _words(text: str) -> list[str]:
    return [word.removesuffix("'s") for word in _WORD.findall(normalised(text))]


def _stands(phrase: Sequence[str], held: Sequence[set[str]]) -> bool:
    """Whether the words of a phrase follow each other in a sentence, of whose words all base forms are given."""
    wanted = [set(base_forms(word)) for word in phrase]
    starts = range(len(held) - len(wanted) + 1)
    return bool(wanted) and any(all(forms & held[i + j] for j, forms in enumerate(wanted)) for i in starts)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    rows = vectors.astype(np.float64)
    unit: NDArray[np.float64] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit
