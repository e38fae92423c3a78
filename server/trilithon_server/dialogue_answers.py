"""Answers of the dialogue calls as plain dictionaries, as `answers.py` makes those of the others."""

from __future__ import annotations

from typing import Any

from trilithon_server import answers
from trilithon_server.dialogue import Reply
from trilithon_server.dialogue_store import ActorFacts, KnowledgeFacts
from trilithon_server.knowledge.local import Chosen
from trilithon_server.validation import float32


def responded(reply: Reply, *, with_knowledge: bool) -> dict[str, Any]:
    """RespondResponse"""
    generation, packed = reply.generation, reply.packed
    return {
        "candidates": [
            {
                "text": reply.text(choice),
                "mean_logprob": choice.cumulative_logprob / max(1, choice.generated),
                "finish_reason": choice.finish.value if choice.finish is not None else None,
            }
            for choice in generation.choices
        ],
        "knowledge": used(reply) if with_knowledge else [],
        "reference_tokens": packed.references,
        "turns_dropped": packed.dropped.conversation,
        "reference_turns_dropped": packed.dropped.references,
        "knowledge_dropped": packed.dropped.knowledge,
        "model": generation.model.name,
        "usage": answers.usage(reply.usage),
        "timings": answers.timings(generation.timings),
    }


def used(reply: Reply) -> list[dict[str, Any]]:
    """KnowledgeUsed, in the order of the prompt."""
    known = reply.known
    if known.written:
        return [{"text": known.written, "document_id": "", "sentence": 0, "score": 0.0, "generated": True}]
    return [_of_document(item) for item in known.chosen]


def _of_document(item: Chosen) -> dict[str, Any]:
    sentence = item.sentence
    return {
        "text": sentence.text,
        "document_id": sentence.document_id,
        "sentence": sentence.number,
        "score": float32(item.score),
        "generated": False,
    }


def actor(facts: ActorFacts) -> dict[str, Any]:
    """Actor"""
    return {
        "actor_id": facts.name,
        "conversations": facts.conversations,
        "turns": facts.turns,
        "version": facts.version,
    }


def knowledge(facts: KnowledgeFacts) -> dict[str, Any]:
    """PutKnowledgeResponse"""
    return {"documents": facts.documents, "sentences": facts.sentences, "version": facts.version}
