"""Answers of the extraction calls as plain dictionaries, as `answers.py` makes those of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trilithon_server import answers
from trilithon_server.extraction import Answered, Related
from trilithon_server.task_run import Told
from trilithon_server.tasks.classes import Classified
from trilithon_server.tasks.tagging import Entity
from trilithon_server.validation import float32


def annotated(documents: Sequence[Sequence[Entity]], told: Told) -> dict[str, Any]:
    """AnnotateResponse"""
    return {"documents": [{"entities": [_entity(item) for item in document]} for document in documents], **_told(told)}


def related(result: Related) -> dict[str, Any]:
    """RelationsResponse"""
    relations = [
        {
            "label": found.label,
            "score": float32(found.score),
            "probs": _shares(found.probabilities),
            "pair": {"a": _entity(a), "b": _entity(b)},
        }
        for (a, b), found in zip(result.pairs, result.relations, strict=True)
    ]
    told = {"negative_label": result.negative, "pairs_dropped": result.dropped, **_told(result.told)}
    return {"relations": relations, **told}


def answered(result: Answered) -> dict[str, Any]:
    """SpanAnswerResponse"""
    return {
        "answers": [
            {
                "text": item.text,
                "probability": float32(item.probability),
                "context": item.context,
                "start": item.start,
                "end": item.end,
            }
            for item in result.answers
        ],
        "no_answer_probability": float32(result.no_answer_probability),
        "no_answer": result.no_answer,
        **_told(result.told),
    }


def classified(results: Sequence[tuple[Classified, bool]], told: Told) -> dict[str, Any]:
    """ClassifyResponse"""
    return {
        "results": [
            {
                "label": one.label,
                "score": float32(one.score),
                "probs": _shares(one.probabilities),
                "truncated": truncated,
            }
            for one, truncated in results
        ],
        **_told(told),
    }


def _entity(item: Entity) -> dict[str, Any]:
    return {
        "start": item.start,
        "end": item.end,
        "type": item.type,
        "text": item.text,
        "score": float32(item.score),
    }


def _shares(probabilities: Mapping[str, float]) -> dict[str, float]:
    return {label: float32(value) for label, value in probabilities.items()}


def _told(told: Told) -> dict[str, Any]:
    return {"usage": answers.usage(told.usage), "model": told.model.name, "timings": answers.timings(told.timings)}
