"""What a request for a conversation's next turn says, and what may be wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trilithon_server.knowledge.local import SCORERS, Document
from trilithon_server.service import Service
from trilithon_server.tasks.dialogue_format import Conversation
from trilithon_server.validation import Violations, is_text, nearest

SPEAKERS = ("target", "other")
MAX_REFERENCES = 64
MAX_DOCUMENTS = 64
MAX_DOCUMENT_BYTES = 1 << 20
MAX_TOP_K = 50
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grounds:
    """
    Where knowledge comes from, and how much of it.

    Attributes:
        documents: of the request; or kb_id: what is stored under this name. Not both.
        scorer: one of `SCORERS`; empty: tfidf.
        top_k: sentences at most; 0: five. min_score: None: the scorer's own.
    """

    documents: Sequence[Document] = ()
    kb_id: str = ""
    scorer: str = ""
    top_k: int = 0
    min_score: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """
    A request: `references` or the stored `actor_id`, not both. `topic`: for a model that is prompted by examples, which
    reads no references.
    """

    conversation: Conversation
    references: Sequence[Conversation] = ()
    actor_id: str = ""
    grounds: Grounds | None = None
    topic: str = ""


def check(asked: Asked, service: Service, found: Violations, *, by_examples: bool) -> None:
    """`by_examples`: the model is prompted by them."""
    _check_conversation("conversation", asked.conversation, service, found)
    check_conversations("references", asked.references, service, found)
    if asked.actor_id and asked.references:
        found.add("references", "and `actor_id` must not both be set")
    if by_examples:
        _check_text("topic", asked.topic, service, found)
        for name, given in (("references", asked.references), ("actor_id", asked.actor_id)):
            if given:
                found.add(name, "must not be set: this model is prompted by examples and reads no references")
    elif asked.topic:
        found.add("topic", "must not be set: this model is not prompted by examples", given=asked.topic)
    grounds = asked.grounds
    if grounds is None:
        return
    check_documents("knowledge.documents", grounds.documents, found)
    if grounds.kb_id and grounds.documents:
        found.add("knowledge.documents", "and `kb_id` must not both be set")
    if not grounds.kb_id and not grounds.documents:
        found.add("knowledge.documents", "or `kb_id` must be set", code="missing_parameter")
    if grounds.scorer and grounds.scorer not in SCORERS:
        hint = nearest(grounds.scorer, SCORERS).strip()
        found.add("knowledge.scorer", f"must be one of {', '.join(SCORERS)}", given=grounds.scorer, todo=hint)
    if not 0 <= grounds.top_k <= MAX_TOP_K:
        found.add("knowledge.top_k", f"must be from 1 to {MAX_TOP_K}", given=grounds.top_k)
    if grounds.min_score is not None and not abs(grounds.min_score) <= _LARGEST:  # NaN neither
        found.add("knowledge.min_score", "must be a finite number of 32 bits", given=grounds.min_score)


def check_conversations(name: str, conversations: Sequence[Conversation], service: Service, found: Violations) -> None:
    if len(conversations) > MAX_REFERENCES:
        found.add(name, f"must hold at most {MAX_REFERENCES} conversations", given=len(conversations))
    for i, conversation in enumerate(conversations[:MAX_REFERENCES]):
        _check_conversation(f"{name}[{i}]", conversation, service, found)


def _check_conversation(name: str, conversation: Conversation, service: Service, found: Violations) -> None:
    limits = service.limits
    if not 1 <= len(conversation) <= limits.max_messages:
        found.add(name, f"must hold from 1 to {limits.max_messages} turns", given=len(conversation))
    for i, turn in enumerate(conversation[: limits.max_messages]):
        where = f"{name}[{i}]"
        if turn.speaker not in SPEAKERS:
            hint = nearest(turn.speaker, SPEAKERS).strip()
            found.add(f"{where}.speaker", "must be target or other", given=turn.speaker or None, todo=hint)
        _check_text(f"{where}.text", turn.text, service, found)


def _check_text(name: str, text: str, service: Service, found: Violations) -> None:
    most = service.limits.max_message_bytes
    if not text.strip():
        found.add(name, "must not be empty", given=text, code="empty_prompt")
    elif not is_text(text):
        found.add(name, "must be sound Unicode (it holds half of a surrogate pair)")
    elif (size := len(text.encode())) > most:
        found.add(name, f"must have at most {most} bytes", given=f"{size} bytes")


def check_documents(name: str, documents: Sequence[Document], found: Violations) -> None:
    if len(documents) > MAX_DOCUMENTS:
        found.add(name, f"must hold at most {MAX_DOCUMENTS} documents", given=len(documents))
    size = sum(_size(body) for document in documents for body in (document.text, document.html))
    if size > MAX_DOCUMENT_BYTES:
        found.add(name, f"must have at most {MAX_DOCUMENT_BYTES} bytes in all", given=f"{size} bytes")
    for i, document in enumerate(documents[:MAX_DOCUMENTS]):
        if bool(document.text) == bool(document.html):
            found.add(f"{name}[{i}]", "must have text or html, one of the two", code="missing_parameter")
        if not document.id:
            found.add(f"{name}[{i}].id", "must not be empty", code="missing_parameter")
        for label, text in (("id", document.id), ("title", document.title), ("url", document.url)):
            if not is_text(text):
                found.add(f"{name}[{i}].{label}", "must be sound Unicode (it holds half of a surrogate pair)")


def _size(body: str | bytes) -> int:
    """Bytes of it; half of a surrogate pair counts, and is a sign for nothing once it is read."""
    return len(body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass"))
