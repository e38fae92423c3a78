"""Answers of the calls for open questions as plain dictionaries, as `answers.py` makes those of the others."""

from __future__ import annotations

from typing import Any

from trilithon_server import answers
from trilithon_server.openqa import Answer
from trilithon_server.openqa_readers import Evidence
from trilithon_server.retrieval_answers import passage


def answered(result: Answer, *, with_evidence: bool) -> dict[str, Any]:
    """AnswerResponse"""
    return {
        "answer": result.text,
        "logprob": result.logprob,
        "no_answer": not result.text,
        "evidence": [_evidence(place) for place in result.evidence] if with_evidence else [],
        "index_version": result.index_version,
        "usage": answers.usage(result.usage),
        "timings": answers.timings(result.timings),
        "model": result.model.name,
        "reader": result.reader,
        "finish_reason": "time_limit" if result.is_cut_off else None,
    }


def _evidence(place: Evidence) -> dict[str, Any]:
    """Evidence"""
    return {
        "passage": passage(place.hit),
        "retrieval_logprob": place.hit.logprob,
        "answer_logprob": place.answer_logprob,
        "start": place.start,
        "end": place.end,
        "candidate": place.candidate,
        "truncated": place.truncated,
    }
