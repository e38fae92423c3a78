"""Answers of the story calls as plain dictionaries, as `answers.py` makes those of the others."""

from __future__ import annotations

from typing import Any

from trilithon_server import answers
from trilithon_server.knowledge.fact_vectors import ScoredFact
from trilithon_server.story_requests import Sentence, Story
from trilithon_server.story_telling import Telling
from trilithon_server.validation import float32


def started(telling: Telling) -> dict[str, Any]:
    """StoryStarted"""
    story = telling.story
    return {
        "request_id": telling.call.request_id,
        "story_id": story.id,
        "seed": story.seed,
        "model": telling.cast.writer.name,
    }


def sentence(told: Sentence, *, reused: bool) -> dict[str, Any]:
    """Sentence"""
    return {
        "index": told.index,
        "text": told.text,
        "keywords": list(told.keywords),
        "facts": [_fact(fact) for fact in told.facts],
        "logprob": told.logprob,
        "finish_reason": told.finish.value if told.finish is not None else None,
        "reused": reused,
        "unknown_keywords": list(told.unknown),
        "unopposed_keywords": list(told.unopposed),
    }


def finished(telling: Telling) -> dict[str, Any]:
    """StoryFinished"""
    return {
        **_whole(telling.story, reused=telling.reused),
        "finish_reason": telling.finish.value if telling.finish is not None else None,
        "usage": answers.usage(telling.usage),
        "timings": answers.timings(telling.timings),
    }


def story(told: Story) -> dict[str, Any]:
    """Story"""
    return _whole(told, reused=0)


def _whole(told: Story, *, reused: int) -> dict[str, Any]:
    return {
        "story_id": told.id,
        "seed": told.seed,
        "model": told.model,
        "text": told.text,
        "sentences": [sentence(one, reused=one.index <= reused) for one in told.sentences],
    }


def _fact(scored: ScoredFact) -> dict[str, Any]:
    fact = scored.fact
    return {
        "text": fact.text,
        "score": float32(scored.score),
        "head": fact.head,
        "relation": fact.relation,
        "tail": fact.tail,
    }
