"""Questions and answers made from passages: `synth_qa` of both clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from trilithon._parameters import CallOptions
from trilithon._requests import check_names, given
from trilithon._synth_qa_types import SynthQAPassageDone, SynthQAStarted, SynthQASummary, SynthQATriple
from trilithon._task_streams import AsyncTaskStream, Kinds, TaskStream

Filter = Literal["pair_any", "single", "none"]


class SynthQAPassage(TypedDict):
    """A text to ask about; `id` is what triples call it, each once."""

    id: str
    text: str


class SynthQAOptions(CallOptions, total=False):
    """
    How questions are drawn; names and ranges as in `GenerationOptions`. What is left out is drawn from the 40 likeliest
    tokens and from a nucleus of 0.9 in turn, at temperature 1.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    seed: int
    priority: int
    time_limit_ms: int
    queue_timeout_ms: int
    bypass_cache: bool
    cache_salt: str


EVENTS: Kinds = {"started": SynthQAStarted, "triple": SynthQATriple, "passage": SynthQAPassageDone}

SynthQAStream = TaskStream[SynthQAStarted | SynthQATriple | SynthQAPassageDone, SynthQASummary]
"""What was started, then each passage's triples and its end."""
AsyncSynthQAStream = AsyncTaskStream[SynthQAStarted | SynthQATriple | SynthQAPassageDone, SynthQASummary]
"""What was started, then each passage's triples and its end."""

_NAMES = frozenset((*CallOptions.__annotations__, *SynthQAOptions.__annotations__))


def synth_qa_fields(
    passages: Sequence[SynthQAPassage],
    answers_per_passage: int | None,
    questions_per_answer: int | None,
    unanswerable_per_answer: int | None,
    filter: Filter | None,
    answer_model: str | None,
    reader_model: str | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The fields of a request."""
    check_names("synth_qa", options, _NAMES)
    own = {
        "passages": [dict(passage) for passage in passages],
        "answers_per_passage": answers_per_passage,
        "questions_per_answer": questions_per_answer,
        "unanswerable_per_answer": unanswerable_per_answer,
        "filter": filter,
        "answer_model": answer_model,
        "reader_model": reader_model,
    }
    return given({**own, **options})
