"""
Answers that a text could be asked for, as spans of it: `[CLS] text [SEP]` and one score for each span. No torch.

    format = AnswerFormat()
    windows = format.encode(text, pieces)
    candidates = format.decode(windows, logits)       # logits [T, L] of each window: spans of 1, 2 ... L tokens
    chosen = candidates.sample(5, seed=7)

Where no model proposes answers, runs of capitalised words and numbers do: `capitals_and_numbers`.

Source: arXiv 2002.09599, section 2.1 (answer generation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from trilithon_parallel.task_head import span_lengths
from trilithon_server.tasks.pieces import Encoded, Pieces, Span, WordPieces, split_words
from trilithon_server.tasks.spans import Logits, SpanWindow, place_of
from trilithon_server.tasks.task_file import Size, TaskFile

TOP_P = 0.9
"""Of the nucleus that answers are drawn from."""

RUN_WORDS = 16
"""Of a run that is an answer by the rule, at most: a table of numbers is not one answer, nor is a line of capitals."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A span that could be an answer: characters [start, end) of the text, and its probability among all spans."""

    start: int
    end: int
    probability: float


@dataclass(frozen=True)
class Candidates:
    """
    All spans of a text that could be answers, in the order in which they stand.

    Attributes:
        spans: characters of the text.
        logprobs: fp64, one a span; of all spans their exponentials add up to 1.
    """

    spans: Sequence[Span]
    logprobs: npt.NDArray[np.float64]

    def worded(self, text: str) -> Candidates:
        """Those that are whole words and hold a letter or a digit; probabilities stay as they are."""
        words = split_words(text)
        starts, ends = {start for start, _ in words}, {end for _, end in words}
        kept = [
            i
            for i, (start, end) in enumerate(self.spans)
            if start in starts and end in ends and any(map(str.isalnum, text[start:end]))
        ]
        return Candidates([self.spans[i] for i in kept], self.logprobs[kept])

    def sample(self, count: int, *, seed: int, temperature: float = 1.0, top_p: float = TOP_P) -> list[Proposal]:
        """
        Spans drawn one after another, none twice, each in proportion to its probability among those that are left.

        Args:
            count: at most; a text with fewer spans gives all of them.
            seed: 0 or above; the same seed draws the same.
            temperature: 0: the likeliest.
            top_p: the likeliest spans whose probabilities reach this are drawn from, and at least `count`.
        Source: Gumbel top-k (Kool et al. 2019, arXiv 1903.06059): the largest of log p + Gumbel noise.
        """
        order = np.argsort(-self.logprobs, kind="stable")
        if temperature > 0:
            before = np.cumsum(np.exp(self.logprobs[order])) - np.exp(self.logprobs[order])
            kept = order[: max(count, int((before < top_p).sum()))]
            noise = np.random.Generator(np.random.Philox(seed)).gumbel(size=len(self.spans))
            keys = self.logprobs[kept] / temperature + noise[kept]
            order = kept[np.argsort(-keys, kind="stable")]
        chosen = [(self.spans[i], self.logprobs[i]) for i in order[:count].tolist()]
        return [Proposal(start, end, float(np.exp(logprob))) for (start, end), logprob in chosen]


@dataclass(frozen=True)
class AnswerFormat(TaskFile):
    """
    How a model proposes answers.

    Attributes:
        max_tokens: of a window.
        doc_stride: pieces of the text from the start of one window to the next.
        max_answer_tokens: longer spans are no answers; at least 2, as many labels as the model's head has.
    """

    task: ClassVar[str] = "answer_gen"

    max_tokens: Size = 256
    doc_stride: Size = 128
    max_answer_tokens: Annotated[int, Field(ge=2)] = 16

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the model's head."""
        return span_lengths(self.max_answer_tokens)

    def encode(self, text: str, pieces: WordPieces) -> tuple[SpanWindow, ...]:
        """Windows over the text, at least one; together they hold all of it."""
        read = pieces.text(text)
        room = self.max_tokens - 2
        step = min(self.doc_stride, room)
        starts = range(0, max(1, len(read) - room + step), step)
        return tuple(_window(read, (start, min(start + room, len(read))), pieces) for start in starts)

    def target(self, window: SpanWindow, start: int, end: int) -> Span | None:
        """First and last token of the answer at characters [start, end); None where it is too long or not all here."""
        place = place_of(window, start, end)
        return place if place is not None and place[1] - place[0] < self.max_answer_tokens else None

    def decode(self, windows: Sequence[SpanWindow], logits: Sequence[Logits]) -> Candidates:
        """
        The spans of all windows under one softmax; a span that several windows hold counts once, by its best score.

        Args:
            logits: [T, L] of each window.
        """
        found: dict[Span, float] = {}
        for window, logits_TL in zip(windows, logits, strict=True):
            scores_CL = np.asarray(logits_TL, dtype=np.float64)[slice(*window.context)]
            size = len(scores_CL)
            for first in range(size):
                for length in range(min(self.max_answer_tokens, size - first)):
                    place = window.starts[first], window.ends[first + length]
                    score = float(scores_CL[first, length])
                    found[place] = max(score, found.get(place, score))
        spans = sorted(found)
        scores = np.array([found[span] for span in spans])
        return Candidates(spans, scores - np.logaddexp.reduce(scores) if spans else scores)


def _window(read: Pieces, part: Span, pieces: WordPieces) -> SpanWindow:
    start, stop = part
    tokens = (pieces.cls_id, *read.ids[start:stop], pieces.sep_id)
    return SpanWindow(Encoded(tokens), (1, 1 + stop - start), read.starts[start:stop], read.ends[start:stop])


def capitals_and_numbers(text: str) -> Candidates:
    """
    Runs of words that begin with a capital letter or a digit, each as likely as the others; of `RUN_WORDS` at most,
    and a longer one is cut.

    >>> text = "In 1066 the Battle of Hastings was fought."
    >>> [text[start:end] for start, end in capitals_and_numbers(text).spans]
    ['In 1066', 'Battle', 'Hastings']
    """
    runs: list[Span] = []
    last, words = -1, 0  # the end of the run that may go on, and its words
    for start, end in split_words(text):
        if text[start].isupper() or text[start].isdigit():
            goes_on = last >= 0 and words < RUN_WORDS and text[last:start] in ("", " ")
            words = words + 1 if goes_on else 1
            runs[-1:] = [(runs[-1][0], end)] if goes_on else [*runs[-1:], (start, end)]
            last = end
        elif not (end == start + 1 and text[start] in "-.,'" and last == start and text[end : end + 1].isalnum()):
            last = -1
        else:
            last = end  # within a number or a name: 3.5, 1,000, Saint-Denis
    return Candidates(runs, np.full(len(runs), -np.log(max(1, len(runs)))))
