"""What a request for synthetic questions asks for, and what it is answered with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from trilithon_server.tasks.round_trip import Reason


@dataclass(frozen=True, slots=True)
class Passage:
    """A text to ask about; `id` is what triples call it."""

    id: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """
    A request.

    Attributes:
        answers, questions: of a passage, and of an answer; 0 for the defaults, 5 and 2.
        unanswerable: questions beside an answer that its passage does not answer.
        filter: of `tasks.round_trip`; empty for `pair_any`.
        answer_model, reader_model: by name; empty for the first served that can.
    """

    passages: Sequence[Passage]
    answers: int = 0
    questions: int = 0
    unanswerable: int = 0
    filter: str = ""
    answer_model: str = ""
    reader_model: str = ""


@dataclass(frozen=True, slots=True)
class Triple:
    """
    A question, its answer, and what became of it.

    Attributes:
        question: as it was written, where it can't be read.
        start: of the answer, in characters of the passage.
        is_impossible: whether the passage should not answer the question; the answer then only looks right.
        p_answer: of the answer among all spans. qa_answer, qa_probability: the reader's own; empty and 0 where it finds
            none or was not asked.
    """

    passage_id: str
    question: str
    answer: str
    start: int
    p_answer: float
    qa_answer: str
    qa_probability: float
    kept: bool
    reason: Reason
    is_impossible: bool = False


@dataclass(frozen=True, slots=True)
class PassageDone:
    """The end of a passage: all of its triples have been told."""

    passage_id: str
    answers: int
    triples: int
    kept: int


@dataclass(slots=True)
class Summary:
    """What a request came to; complete where `is_complete`, else the time limit passed before the next passage."""

    passages: int = 0
    triples: int = 0
    kept: int = 0
    dropped: Counter[Reason] = field(default_factory=Counter)
    is_complete: bool = True

    def add(self, triples: Sequence[Triple]) -> None:
        """Count a passage."""
        self.passages += 1
        self.triples += len(triples)
        self.kept += sum(triple.kept for triple in triples)
        self.dropped += Counter(triple.reason for triple in triples if not triple.kept)
