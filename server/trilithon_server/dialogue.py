"""
A conversation's next turn: who speaks is told by references, what may be said by knowledge; one prompt holds it all.

    stored actor or references ┐
    documents -> sentences -> chosen by the last turns ├-> one packed sequence -> the engine -> the turn's text
    conversation ┘

What was used and what found no room is told with the answer. Nothing here opens a url.

Source: arXiv 2005.06114 (actors by references), 2010.10150 (local knowledge).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trilithon.errors import FailedPrecondition, NotFound
from trilithon_server.embedding import embed
from trilithon_server.generation import Generation
from trilithon_server.knowledge.local import SCORERS, Choice, Chosen, Document, LocalKnowledge, read_documents
from trilithon_server.knowledge.sentences import Sentence
from trilithon_server.knowledge.shelf import Kept, Shelf
from trilithon_server.prompts import Sequenced
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.task_model import adapter_task
from trilithon_server.tasks.dialogue_format import Conversation, DialogueFormat, Packed, Turn
from trilithon_server.validation import Violations, is_text, nearest, shown

SPEAKERS = ("target", "other")
MAX_REFERENCES = 64
MAX_DOCUMENTS = 64
MAX_DOCUMENT_BYTES = 1 << 20
MAX_TOP_K = 50
DEFAULT_TOP_K = 5
DEFAULT_TOKENS = 128
"""Of a turn, where a request doesn't say."""


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
    """A request: `references` or the stored `actor_id`, not both."""

    conversation: Conversation
    references: Sequence[Conversation] = ()
    actor_id: str = ""
    grounds: Grounds | None = None


class Trimmed:
    """
    A text that comes in pieces, without the spaces around it: what may be its end is held back.

    >>> text = Trimmed()
    >>> [text.push(piece) for piece in (" Yes", ", ", "no. \n")]
    ['Yes', ',', ' no.']
    """

    def __init__(self) -> None:
        self.text = ""
        self._held = ""

    def push(self, piece: str) -> str:
        """What of it is certain."""
        whole = self._held + piece
        whole = whole if self.text else whole.lstrip()
        told = whole.rstrip()
        self._held = whole[len(told) :]
        self.text += told
        return told


@dataclass(slots=True)
class Reply:
    """An admitted request: what writes it, what it is written from, and the candidates as far as they are written."""

    generation: Generation
    packed: Packed
    used: list[Chosen] = field(default_factory=list)
    texts: dict[int, Trimmed] = field(default_factory=dict)

    async def news(self) -> AsyncIterator[tuple[int, str]]:
        """Which candidate has more text, and the text, until all have ended; use it inside of the generation."""
        async for _, choice in self.generation.news():
            if choice is not None:
                piece = self.texts.setdefault(choice.index, Trimmed()).push(choice.take()[0])
                if piece:
                    yield choice.index, piece

    async def joined(self) -> None:
        """Read to the end."""
        async for _ in self.news():
            pass


async def respond(
    service: Service,
    call: Call,
    model_name: str,
    asked: Asked,
    values: Mapping[str, Any],
    *,
    found: Violations | None = None,
    stream: bool = False,
) -> Reply:
    """
    Pack the prompt and admit it; use the reply's generation as an asynchronous context manager.

    Args:
        values: sampling parameters by JSON name.
        found: violations that the front has already found.
    Raises:
        TrilithonError: refused; nothing was admitted.
    """
    violations = found if found is not None else Violations()
    model = await service.resolve(model_name, call)
    model.require("generate")
    hello = model.ready()
    _check(asked, service, violations)
    violations.raise_if_any()
    references = _references(service, call, asked)
    chosen = await _chosen(service, call, asked)
    format_ = format_of(model)
    room = min(hello.max_context_tokens, hello.kv_capacity_tokens or hello.max_context_tokens)
    wanted = values.get("max_tokens")
    left = max(1, room - (wanted if isinstance(wanted, int) and 0 < wanted < room else min(DEFAULT_TOKENS, room // 2)))
    packed = await asyncio.to_thread(
        format_.pack,
        asked.conversation,
        model.tokenizer,
        references=references,
        knowledge=[item.sentence.text for item in chosen],
        room=left,
    )
    prompt = Sequenced(
        ids=packed.tokens, types=packed.types, positions=packed.positions, answer_type=packed.answer_type
    )
    generation = await service.generate(
        call,
        model_name,
        [prompt],
        {**values, "logprobs": 0, **({"stop": _stops(values, format_)} if format_.markers == "text" else {})},
        found=violations,
        stream=stream,
        default_max_tokens=DEFAULT_TOKENS,
        field="conversation",
    )
    return Reply(generation, packed, [chosen[i] for i in packed.knowledge])


def format_of(model: ServedModel) -> DialogueFormat:
    """
    How a model reads dialogues: as its task file says, or its adapter's; else in words, with budgets for its window.

    Raises:
        FailedPrecondition: `task_invalid`, the adapter's task file is broken.
    """
    window, known = model.max_context, model.dialogue
    if model.adapter is not None:
        task = adapter_task(model.adapter.directory, model.adapter.digest)
        known = task if isinstance(task, DialogueFormat) else None
    return known or DialogueFormat(
        max_references=min(1024, window // 4),
        max_knowledge=min(512, window // 8),
        max_conversation=min(2048, window // 2),
    )


def _stops(values: Mapping[str, Any], format_: DialogueFormat) -> list[str]:
    """A turn in words is a line."""
    given = values.get("stop")
    own = [given] if isinstance(given, str) else list(given) if isinstance(given, list) else []
    return [*own, "\n"]


# -- what is kept -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ActorFacts:
    """What is kept of an actor."""

    name: str
    conversations: int
    turns: int
    version: int


@dataclass(frozen=True, slots=True)
class KnowledgeFacts:
    """What is kept of a knowledge base."""

    documents: int
    sentences: int
    version: int


async def put_actor(service: Service, call: Call, name: str, conversations: Sequence[Conversation]) -> ActorFacts:
    """
    Keep an actor's reference conversations.

    Raises:
        InvalidArgument, FailedPrecondition: refused; what was kept stays.
    """
    found = Violations()
    _check_conversations("conversations", conversations, service, found)
    if not conversations:
        found.add("conversations", f"must hold from 1 to {MAX_REFERENCES} conversations", given=0)
    found.raise_if_any()
    document = {"conversations": [[[turn.speaker, turn.text] for turn in item] for item in conversations]}
    return _actor(await asyncio.to_thread(_shelf(service, "actors").put, call.principal.tenant, name, document))


async def get_actor(service: Service, call: Call, name: str) -> ActorFacts:
    """Raises: NotFound: `actor_not_found`."""
    return _actor(_kept(service, call, "actors", name, "actor_not_found"))


async def delete_actor(service: Service, call: Call, name: str) -> None:
    """Raises: NotFound: `actor_not_found`."""
    _forget(service, call, "actors", name, "actor_not_found")


async def put_knowledge(
    service: Service, call: Call, name: str, documents: Sequence[Document], *, replace: bool
) -> KnowledgeFacts:
    """
    Keep the sentences of documents.

    Raises:
        InvalidArgument, FailedPrecondition: refused; what was kept stays.
    """
    found = Violations()
    check_documents("documents", documents, found)
    if not documents:
        found.add("documents", f"must hold from 1 to {MAX_DOCUMENTS} documents", given=0)
    found.raise_if_any()
    shelf, tenant = _shelf(service, "knowledge"), call.principal.tenant

    def keep() -> Kept:
        new = read_documents(documents)
        before = None if replace else shelf.get(tenant, name)
        ids = {document.id for document in documents}
        held = [] if before is None else [s for s in _sentences(before) if s.document_id not in ids]
        known = [] if before is None else [i for i in before.document["documents"] if i not in ids]
        rows = [[s.text, s.document_id, s.number, s.start, s.end, s.title, s.url] for s in (*held, *new)]
        return shelf.put(tenant, name, {"documents": [*known, *(d.id for d in documents)], "sentences": rows})

    return _knowledge(await asyncio.to_thread(keep))


async def get_knowledge(service: Service, call: Call, name: str) -> KnowledgeFacts:
    """Raises: NotFound: `knowledge_not_found`."""
    return _knowledge(_kept(service, call, "knowledge", name, "knowledge_not_found"))


async def delete_knowledge(service: Service, call: Call, name: str) -> None:
    """Raises: NotFound: `knowledge_not_found`."""
    _forget(service, call, "knowledge", name, "knowledge_not_found")


def _shelf(service: Service, kind: str) -> Shelf:
    if service.store is None:
        raise FailedPrecondition(
            "this server keeps nothing: it has no store.", code="store_missing", hint="Set server.store to a folder."
        )
    return Shelf(service.store, kind)


def _kept(service: Service, call: Call, kind: str, name: str, code: str) -> Kept:
    kept = _shelf(service, kind).get(call.principal.tenant, name)
    if kept is None:
        raise NotFound(f"nothing is stored under {shown(name)}.", code=code, hint="Put it first.")
    return kept


def _forget(service: Service, call: Call, kind: str, name: str, code: str) -> None:
    if not _shelf(service, kind).delete(call.principal.tenant, name):
        raise NotFound(f"nothing is stored under {shown(name)}.", code=code)


def _actor(kept: Kept) -> ActorFacts:
    conversations = kept.document["conversations"]
    return ActorFacts(kept.name, len(conversations), sum(map(len, conversations)), kept.version)


def _knowledge(kept: Kept) -> KnowledgeFacts:
    return KnowledgeFacts(len(kept.document["documents"]), len(kept.document["sentences"]), kept.version)


def _sentences(kept: Kept) -> list[Sentence]:
    return [Sentence(*row) for row in kept.document["sentences"]]


# -- what a request stands on -----------------------------------------------------------------------------------


def _references(service: Service, call: Call, asked: Asked) -> Sequence[Conversation]:
    if not asked.actor_id:
        return asked.references
    kept = _kept(service, call, "actors", asked.actor_id, "actor_not_found")
    return [[Turn(speaker, text) for speaker, text in item] for item in kept.document["conversations"]]


async def _chosen(service: Service, call: Call, asked: Asked) -> list[Chosen]:
    """The sentences that go with the last turns."""
    grounds = asked.grounds
    if grounds is None:
        return []
    if grounds.kb_id:
        sentences = _sentences(_kept(service, call, "knowledge", grounds.kb_id, "knowledge_not_found"))
    else:
        sentences = list(await asyncio.to_thread(read_documents, grounds.documents))
    if not sentences:
        return []
    scorer = grounds.scorer or "tfidf"
    choice = Choice(scorer=scorer, top_k=grounds.top_k or DEFAULT_TOP_K, min_score=grounds.min_score)  # type: ignore[arg-type]  # checked
    turns = [turn.text for turn in asked.conversation]
    if scorer in ("tfidf", "bm25"):
        return await asyncio.to_thread(lambda: LocalKnowledge(sentences).select(turns, choice))
    vectors = await _vectors(service, call, [*(s.text for s in sentences), *turns[-choice.turns :]])
    known, last = vectors[: len(sentences)], vectors[len(sentences) :]
    return await asyncio.to_thread(
        lambda: LocalKnowledge(sentences, vectors_NH=known).select(turns[-choice.turns :], choice, turn_vectors_MH=last)
    )


async def _vectors(service: Service, call: Call, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Vectors of a served encoder, in pieces of as many texts as one request may have."""
    encoder = service.first("embed")
    if not encoder:
        raise FailedPrecondition(
            "this scorer compares vectors, and no encoder is served.",
            code="unsupported_model",
            hint="Serve one beside the model, or ask for tfidf or bm25.",
        )
    found: list[Sequence[float]] = []
    most = service.limits.max_embedding_inputs
    for first in range(0, len(texts), most):
        _, rows, _ = await embed(service, call, encoder, texts[first : first + most], {"truncate_prompt_tokens": 256})
        found += [row.values for row in rows]
    return np.array(found, np.float32)


# -- what is wrong with a request -------------------------------------------------------------------------------


def _check(asked: Asked, service: Service, found: Violations) -> None:
    _check_conversation("conversation", asked.conversation, service, found)
    _check_conversations("references", asked.references, service, found)
    if asked.actor_id and asked.references:
        found.add("references", "and `actor_id` must not both be set")
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
    if grounds.min_score is not None and not np.isfinite(grounds.min_score):
        found.add("knowledge.min_score", "must be a finite number", given=grounds.min_score)


def _check_conversations(name: str, conversations: Sequence[Conversation], service: Service, found: Violations) -> None:
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
        if not turn.text.strip():
            found.add(f"{where}.text", "must not be empty", given=turn.text, code="empty_prompt")
        elif not is_text(turn.text):
            found.add(f"{where}.text", "must be sound Unicode (it holds half of a surrogate pair)")
        elif (size := len(turn.text.encode())) > limits.max_message_bytes:
            found.add(f"{where}.text", f"must have at most {limits.max_message_bytes} bytes", given=f"{size} bytes")


def check_documents(name: str, documents: Sequence[Document], found: Violations) -> None:
    if len(documents) > MAX_DOCUMENTS:
        found.add(name, f"must hold at most {MAX_DOCUMENTS} documents", given=len(documents))
    size = sum(len(body) for document in documents for body in (document.text, document.html))
    if size > MAX_DOCUMENT_BYTES:
        found.add(name, f"must have at most {MAX_DOCUMENT_BYTES} bytes in all", given=f"{size} bytes")
    for i, document in enumerate(documents[:MAX_DOCUMENTS]):
        if bool(document.text) == bool(document.html):
            found.add(f"{name}[{i}]", "must have text or html, one of the two", code="missing_parameter")
        if not document.id:
            found.add(f"{name}[{i}].id", "must not be empty", code="missing_parameter")
