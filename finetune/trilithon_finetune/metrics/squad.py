"""
Exact match and F1 of answers as SQuAD 1.1 and 2.0 define them, and the threshold of "no answer".

Source: Rajpurkar et al. 2016, section 5 (normalisation, exact match, F1) and Rajpurkar et al. 2018 (no answer).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trilithon_server.tasks.answer_match import exact_match as exact_match
from trilithon_server.tasks.answer_match import normalise as normalise


def token_f1(predicted: str, gold: str) -> float:
    """
    F1 of the words that two answers share; where one has none, 1 if both have none, else 0.

    >>> token_f1("in the year 1066", "1066")
    0.5
    """
    found, wanted = normalise(predicted).split(), normalise(gold).split()
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))


def best_of(score: Callable[[str, str], float], predicted: str, golds: Sequence[str]) -> float:
    """The score against the gold answer that fits best; no gold answers, or only blank ones, mean "no answer"."""
    return max(score(predicted, gold) for gold in _known(golds))


@dataclass(frozen=True, slots=True)
class Question:
    """
    A question that was answered.

    Attributes:
        golds: right answers; none for a question without an answer.
        answer: the best span, whatever the model thinks of "no answer".
        null_margin: score of "no answer" less that of `answer`.
    """

    golds: tuple[str, ...]
    answer: str
    null_margin: float = float("-inf")

    @property
    def answerable(self) -> bool:
        """Whether it has an answer."""
        return _known(self.golds) != [""]


def evaluate(questions: Sequence[Question], *, null_threshold: float | None) -> dict[str, float]:
    """
    Exact match and F1.

    Args:
        null_threshold: "no answer" is said where `null_margin` is above it; None: never.
    Returns:
        `exact` and `f1`; where some questions have no answer also `has_answer_exact`, `has_answer_f1`, `no_answer_f1`,
        and `best_f1` with the `best_threshold` that gives it.
    """
    said = [
        "" if null_threshold is not None and question.null_margin > null_threshold else question.answer
        for question in questions
    ]
    exact = [best_of(exact_match, answer, q.golds) for answer, q in zip(said, questions, strict=True)]
    f1 = [best_of(token_f1, answer, q.golds) for answer, q in zip(said, questions, strict=True)]
    numbers = {"exact": _mean(exact), "f1": _mean(f1)}
    answerable = [question.answerable for question in questions]
    if not all(answerable):
        has, lacks = answerable, [not value for value in answerable]
        numbers |= {
            "has_answer_exact": _mean(list(itertools.compress(exact, has))),
            "has_answer_f1": _mean(list(itertools.compress(f1, has))),
            "no_answer_f1": _mean(list(itertools.compress(f1, lacks))),
        }
        numbers["best_f1"], numbers["best_threshold"] = best_threshold(questions)
    return numbers


def best_threshold(questions: Sequence[Question]) -> tuple[float, float]:
    """
    The best mean F1 that any threshold of "no answer" gives, and the lowest threshold that gives it.

    It is one of the questions' margins, or 1 below all of them where it is best to answer nothing.
    """
    total = float(sum(not question.answerable for question in questions))
    best, threshold = total, min((question.null_margin for question in questions), default=0.0) - 1.0
    ranked = sorted(questions, key=lambda question: question.null_margin)
    for value, group in itertools.groupby(ranked, key=lambda question: question.null_margin):
        for question in group:
            total += best_of(token_f1, question.answer, question.golds) - float(not question.answerable)
        if total > best:
            best, threshold = total, value
    return (best / len(questions) if questions else 0.0), threshold


def _known(golds: Sequence[str]) -> list[str]:
    return [gold for gold in golds if normalise(gold)] or [""]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
