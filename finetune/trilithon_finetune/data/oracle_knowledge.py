"""
Knowledge chosen by looking at the reply that it is for: for building training rows, never for answering.

It lives here because the server imports nothing of this package: no request can reach it. Every sentence says that it
was chosen so (`selected_by`), and a row with such sentences shows what a model does with perfect retrieval, not what it
will do.
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import JsonValue

from trilithon_server.knowledge.local import Choice, Chosen, LocalKnowledge

ORACLE = "oracle"


def oracle_knowledge(base: LocalKnowledge, reply: str, *, choice: Choice) -> list[dict[str, JsonValue]]:
    """
    The sentences that are most like the gold reply, as a row's `knowledge`.

    Args:
        choice: how; its scorer must be one that needs no vectors.
    Raises:
        InvalidArgument: `knowledge_invalid`.
    """
    return knowledge_entries(base.select([reply], replace(choice, turns=1)), selected_by=ORACLE)


def knowledge_entries(chosen: list[Chosen], *, selected_by: str) -> list[dict[str, JsonValue]]:
    """
    Sentences as a row of grounded dialogue holds them.

    Args:
        selected_by: the scorer, or `ORACLE`.
    """
    return [
        {
            "text": one.sentence.text,
            "doc_id": one.sentence.document_id,
            "sent_idx": one.sentence.number,
            "score": one.score,
            "selected_by": selected_by,
        }
        for one in chosen
    ]
