"""What synthetic questions are told with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trilithon._types import Usage, _Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthQAStarted(_Answer):
    """
    The first event.

    Attributes:
        seed: repeats the request.
        question_model, reader_model: served models; the second is empty where nothing is checked.
        proposed_by: the served model that proposes answers, or `capitals_and_numbers`.
    """

    request_id: str = ""
    seed: int = 0
    question_model: str = ""
    reader_model: str = ""
    proposed_by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthQATriple(_Answer):
    """
    A question with its answer.

    Attributes:
        question: as it was written, where it can't be read.
        answer: what stands at character `answer_start` of the passage; `p_answer`: of all its spans.
        kept, reason: whether the filter keeps it; if not, too_long, unreadable, repeated, no_answer, other_answer or
            answered.
        qa_answer, qa_prob: what the reader answers.
        is_impossible: whether the passage should not answer it; `answer` then only looks right.
    """

    passage_id: str = ""
    question: str = ""
    answer: str = ""
    answer_start: int = 0
    kept: bool = False
    p_answer: float = 0.0
    qa_prob: float = 0.0
    qa_answer: str = ""
    reason: str = ""
    is_impossible: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthQAPassageDone(_Answer):
    """All triples of a passage have been told."""

    passage_id: str = ""
    answers: int = 0
    triples: int = 0
    kept: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthQASummary(_Answer):
    """
    What a request came to.

    Attributes:
        passages: whose triples were told; `finish_reason` is time_limit where others were left out, else empty.
        dropped: how many questions, by reason.
    """

    passages: int = 0
    triples: int = 0
    kept: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    finish_reason: str = ""
    usage: Usage = field(default_factory=Usage)
    total_ms: float = 0.0
