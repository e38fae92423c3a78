"""
Whether what was retrieved holds an answer, and whether an answer to an open question is right.

Source: Karpukhin et al. 2020 (DPR), section 5, and its answer matching; exact match with the canonical decomposition of
Sachan et al. 2021 (EMDR2).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from trilithon_finetune.metrics.squad import exact_match
from trilithon_server.knowledge.words import answer_words, contains

HasAnswer = Callable[[str, Sequence[str]], bool]


def has_answer(text: str, answers: Sequence[str], *, regex: bool = False) -> bool:
    """
    Whether a text holds one of the answers, word by word; a blank answer is in no text.

    >>> has_answer("Born in the U.S. in 1958", ["u.s"]), has_answer("a carpet", ["car"])
    (True, False)

    Args:
        regex: answers are patterns, found anywhere in the text, whatever the case (CuratedTREC).
    Raises:
        ValueError: an answer is no pattern.
    """
    if regex:
        plain = unicodedata.normalize("NFD", text)
        return any(_pattern(answer).search(plain) for answer in answers)
    words = answer_words(text)
    return any(contains(words, answer_words(answer)) for answer in answers)


def has_pattern(text: str, answers: Sequence[str]) -> bool:
    """`has_answer` of patterns."""
    return has_answer(text, answers, regex=True)


def top_k_accuracy(
    results: Sequence[Sequence[str]],
    answers: Sequence[Sequence[str]],
    ks: Sequence[int],
    *,
    holds: HasAnswer = has_answer,
) -> dict[int, float]:
    """
    Share of questions for which one of the first k texts holds an answer, for each k.

    >>> top_k_accuracy([["no", "a yes"]], [["yes"]], [1, 2])
    {1: 0.0, 2: 1.0}

    Args:
        results: texts retrieved for each question, best first, without their titles.
        answers: of each question.
        holds: whether a text holds one of the answers.
    """
    most = max(ks)
    ranks = []
    for texts, golds in zip(results, answers, strict=True):
        ranks.append(next((rank for rank, text in enumerate(texts[:most], start=1) if holds(text, golds)), most + 1))
    return {k: sum(rank <= k for rank in ranks) / max(1, len(ranks)) for k in ks}


def open_exact_match(predicted: str, gold: str) -> float:
    """
    1 where both say the same after canonical decomposition and SQuAD's normalisation, else 0.

    >>> open_exact_match("The Caf\\u00e9", "cafe\\u0301")
    1.0
    """
    return exact_match(unicodedata.normalize("NFD", predicted), unicodedata.normalize("NFD", gold))


def _pattern(answer: str) -> re.Pattern[str]:
    try:
        return re.compile(unicodedata.normalize("NFD", answer), re.IGNORECASE | re.MULTILINE)
    except re.error as error:
        raise ValueError(f"an answer must be a regular expression. Given: {answer!r} ({error}).") from None
