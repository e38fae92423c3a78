"""
Questions about a text whose answer is a span of it: `[CLS] question [SEP] context [SEP]`. No torch.

    format = SpanFormat()
    windows = format.encode(question, context, pieces)
    answers = format.decode(context, windows, logits)       # logits [T, 2] of each window: start, end

Source: the BERT recipe for SQuAD (Devlin et al. 2019, section 4.2 and 4.3) with its sizes; lists of answers over
several contexts as BioBERT makes them (Lee et al. 2020).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from trilithon_server.tasks.pieces import Encoded, Pieces, Span, WordPieces

Logits = npt.NDArray[np.float32]

MAX_LISTED_CHARS = 100
"""Longer answers are left out of lists (BioBERT's transformation to BioASQ answers)."""


@dataclass(frozen=True, slots=True)
class SpanWindow:
    """
    One sequence: the question and a part of the context.

    Attributes:
        encoded: what the model reads; token types 0 for the question, 1 for the context.
        context: half-open range of tokens that are context; an answer lies in it.
        starts, ends: characters of the context from which each of these tokens comes.
    """

    encoded: Encoded
    context: Span
    starts: tuple[int, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SpanAnswer:
    """
    A possible answer: `text` is characters [start, end) of a context.

    Attributes:
        probability: of this answer among all candidates and "no answer".
        score: sum of its start and end logits.
        context: which of the contexts, from 0.
    """

    text: str
    start: int
    end: int
    probability: float
    score: float
    context: int = 0


@dataclass(frozen=True, slots=True)
class SpanAnswers:
    """
    What a model says of one question and one context.

    Attributes:
        answers: best first; at most `n_best`.
        no_answer_probability: of the [CLS] span, among the same candidates.
        null_margin: score of "no answer" less that of the best answer; infinite where there is no candidate.
    """

    answers: tuple[SpanAnswer, ...]
    no_answer_probability: float
    null_margin: float

    def best(self, null_threshold: float | None) -> str:
        """The best answer's text; empty where `null_margin` is above the threshold (None: never)."""
        if not self.answers or (null_threshold is not None and self.null_margin > null_threshold):
            return ""
        return self.answers[0].text


@dataclass(frozen=True)
class SpanFormat:
    """
    How answers are asked for.

    Attributes:
        max_tokens: of a window.
        doc_stride: pieces of the context from the start of one window to the next.
        max_question_tokens: a longer question is cut.
        max_answer_tokens: longer spans are no candidates.
        n_best: candidates that are kept.
        null_threshold: "no answer" wins where its score is higher than the best answer's by more than this; None:
            every question has an answer.
    """

    max_tokens: int = 384
    doc_stride: int = 128
    max_question_tokens: int = 64
    max_answer_tokens: int = 30
    n_best: int = 20
    null_threshold: float | None = None

    def encode(self, question: str, context: str, pieces: WordPieces) -> tuple[SpanWindow, ...]:
        """Windows over the context, at least one; together they hold all of it."""
        return self.windows(question, pieces.text(context), pieces)

    def windows(self, question: str, read: Pieces, pieces: WordPieces) -> tuple[SpanWindow, ...]:
        """The same over a context that was read before: one that is asked much is read once."""
        asked = pieces.text(question).ids[: min(self.max_question_tokens, self.max_tokens // 2)]
        room = self.max_tokens - len(asked) - 3
        step = min(self.doc_stride, room)
        starts = range(0, max(1, len(read) - room + step), step)
        return tuple(self._window(asked, read, (start, min(start + room, len(read))), pieces) for start in starts)

    def target(self, window: SpanWindow, start: int, end: int) -> Span:
        """
        First and last token of the answer at characters [start, end); (0, 0), [CLS], where the window lacks a part.

        Which of several equal texts is meant follows from the characters alone.
        """
        return place_of(window, start, end) or (0, 0)

    def decode(
        self, context: str, windows: Sequence[SpanWindow], logits: Sequence[Logits], *, index: int = 0
    ) -> SpanAnswers:
        """
        The best spans over all windows; a span that several windows hold counts once, with its best score.

        Args:
            logits: [T, 2] of each window, start and end.
            index: of the context among several, for `SpanAnswer.context`.
        """
        found: dict[Span, float] = {}
        null = np.inf
        for window, logits_T2 in zip(windows, logits, strict=True):
            values_T2 = np.asarray(logits_T2, dtype=np.float64)
            null = min(null, float(values_T2[0].sum()))
            for first, last, score in self._candidates(window, values_T2):
                place = window.starts[first], window.ends[last]
                found[place] = max(score, found.get(place, -np.inf))
        ranked = heapq.nsmallest(self.n_best, ((-score, place) for place, score in found.items()))
        scores = np.array([*(-negative for negative, _ in ranked), null])
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()
        answers = tuple(
            SpanAnswer(context[start:end], start, end, float(probability), -negative, index)
            for (negative, (start, end)), probability in zip(ranked, probabilities, strict=False)
        )
        margin = null - answers[0].score if answers else np.inf
        return SpanAnswers(answers, float(probabilities[-1]), float(margin))

    def task_file(self) -> dict[str, JsonValue]:
        """What `from_task_file` reads."""
        return {
            "task": "span_qa",
            "labels": ["start", "end"],
            "max_tokens": self.max_tokens,
            "doc_stride": self.doc_stride,
            "max_question_tokens": self.max_question_tokens,
            "max_answer_tokens": self.max_answer_tokens,
            "n_best": self.n_best,
            "null_threshold": self.null_threshold,
        }

    @classmethod
    def from_task_file(cls, document: Mapping[str, Any]) -> Self:
        """
        The format of a `task.json`.

        Raises:
            ValueError, KeyError, TypeError: it is not one that `task_file` writes.
        """
        names = ("max_tokens", "doc_stride", "max_question_tokens", "max_answer_tokens", "n_best")
        threshold = document["null_threshold"]
        return cls(
            **{name: int(document[name]) for name in names},
            null_threshold=None if threshold is None else float(threshold),
        )

    def _window(self, asked: tuple[int, ...], read: Pieces, part: Span, pieces: WordPieces) -> SpanWindow:
        start, stop = part
        head = (pieces.cls_id, *asked, pieces.sep_id)
        tokens = (*head, *read.ids[start:stop], pieces.sep_id)
        types = (0,) * len(head) + (1,) * (stop - start + 1)
        context = len(head), len(head) + stop - start
        return SpanWindow(Encoded(tokens, types), context, read.starts[start:stop], read.ends[start:stop])

    def _candidates(self, window: SpanWindow, values_T2: npt.NDArray[np.float64]) -> list[tuple[int, int, float]]:
        """Spans (first, last, score), in tokens of the context, of the best starts and ends."""
        start_C, end_C = values_T2[slice(*window.context)].T
        firsts, lasts = _best(start_C, self.n_best), _best(end_C, self.n_best)
        return [
            (first, last, float(start_C[first] + end_C[last]))
            for first in firsts
            for last in lasts
            if first <= last < first + self.max_answer_tokens
        ]


def place_of(window: SpanWindow, start: int, end: int) -> Span | None:
    """First and last token of characters [start, end) of the context; None where the window lacks a part of them."""
    if not window.starts or start >= end or start < window.starts[0] or end > window.ends[-1]:
        return None
    first = next(i for i, stop in enumerate(window.ends) if stop > start)
    last = max(i for i, begin in enumerate(window.starts) if begin < end)
    return (window.context[0] + first, window.context[0] + last) if first <= last else None


def merge_answers(found: Sequence[SpanAnswers], *, n_best: int) -> tuple[list[SpanAnswer], float]:
    """
    One list of answers from those of several contexts: equal texts (in lower case) add up.

    Args:
        found: of each context.
        n_best: answers to keep.
    Returns:
        Answers, most probable first, each where its most probable place is, without those that are blank or longer
        than 100 characters; and the probability that there is none. Probabilities are means over the contexts.
    Source: transform_nbset2bioasqform.py of BioBERT, which adds without the mean; the order is the same.
    """
    places: dict[str, SpanAnswer] = {}
    sums: dict[str, float] = {}
    for answers in found:
        for answer in answers.answers:
            key = answer.text.lower().strip()
            if not key or len(key) > MAX_LISTED_CHARS:
                continue
            sums[key] = sums.get(key, 0.0) + answer.probability
            if key not in places or answer.probability > places[key].probability:
                places[key] = answer
    count = max(1, len(found))
    ranked = sorted(sums, key=lambda key: (-sums[key], places[key].context, places[key].start))
    merged = [replace(places[key], probability=sums[key] / count) for key in ranked[:n_best]]
    return merged, sum(answers.no_answer_probability for answers in found) / count


def _best(values: npt.NDArray[np.float64], count: int) -> list[int]:
    """Indices of the largest values, best first; of equal ones the first."""
    return [int(i) for i in np.argsort(-values, kind="stable")[:count]]
