"""What is kept for conversations, each tenant's apart: earlier conversations of actors, and sentences of documents."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from trilithon.errors import FailedPrecondition, NotFound
from trilithon_server.dialogue_requests import MAX_DOCUMENTS, MAX_REFERENCES, check_conversations, check_documents
from trilithon_server.knowledge.local import Document, read_documents
from trilithon_server.knowledge.sentences import MAX_SENTENCES, Sentence
from trilithon_server.knowledge.shelf import Kept, Shelf
from trilithon_server.served import Call
from trilithon_server.service import Service
from trilithon_server.tasks.dialogue_format import Conversation, Turn
from trilithon_server.validation import Violations, shown

MAX_BASE_SENTENCES = MAX_DOCUMENTS * MAX_SENTENCES
"""Of a knowledge base: as many as one request may bring, however many it is put together from."""
MAX_BASE_DOCUMENTS = 4096
MAX_BASE_BYTES = 16 << 20
"""Of its sentences, each with id, title and url: every turn that stands on it reads them all."""


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
    check_conversations("conversations", conversations, service, found)
    if not conversations:
        found.add("conversations", f"must hold from 1 to {MAX_REFERENCES} conversations", given=0)
    found.raise_if_any()
    document = {"conversations": [[[turn.speaker, turn.text] for turn in item] for item in conversations]}
    shelf, tenant = _shelf(service, "actors"), call.principal.tenant

    def keep() -> Kept:
        with shelf.writing(tenant, name):
            return shelf.put(tenant, name, document)

    return _actor(await asyncio.to_thread(keep))


async def get_actor(service: Service, call: Call, name: str) -> ActorFacts:
    """Raises: NotFound: `actor_not_found`."""
    return _actor(await _kept(service, call, "actors", name, "actor_not_found"))


async def delete_actor(service: Service, call: Call, name: str) -> None:
    """Raises: NotFound: `actor_not_found`."""
    await _forget(service, call, "actors", name, "actor_not_found")


async def put_knowledge(
    service: Service, call: Call, name: str, documents: Sequence[Document], *, replace: bool
) -> KnowledgeFacts:
    """
    Keep the sentences of documents.

    Raises:
        InvalidArgument, FailedPrecondition: refused, `store_full` where there is no room; what was kept stays.
    """
    found = Violations()
    check_documents("documents", documents, found)
    if not documents:
        found.add("documents", f"must hold from 1 to {MAX_DOCUMENTS} documents", given=0)
    found.raise_if_any()
    shelf, tenant = _shelf(service, "knowledge"), call.principal.tenant

    def keep() -> Kept:
        new = read_documents(documents)  # pages take the longest, and need no lock
        ids = {document.id for document in documents}
        with shelf.writing(tenant, name):
            before = None if replace else shelf.get(tenant, name)
            held = [] if before is None else [s for s in _sentences(before) if s.document_id not in ids]
            known = [] if before is None else [i for i in before.document["documents"] if i not in ids]
            sentences, known = [*held, *new], [*known, *(document.id for document in documents)]
            _check_size(known, sentences)
            rows = [[s.text, s.document_id, s.number, s.start, s.end, s.title, s.url] for s in sentences]
            return shelf.put(tenant, name, {"documents": known, "sentences": rows})

    return _knowledge(await asyncio.to_thread(keep))


async def get_knowledge(service: Service, call: Call, name: str) -> KnowledgeFacts:
    """Raises: NotFound: `knowledge_not_found`."""
    return _knowledge(await _kept(service, call, "knowledge", name, "knowledge_not_found"))


async def delete_knowledge(service: Service, call: Call, name: str) -> None:
    """Raises: NotFound: `knowledge_not_found`."""
    await _forget(service, call, "knowledge", name, "knowledge_not_found")


async def conversations_of(service: Service, call: Call, actor: str) -> list[Conversation]:
    """Raises: NotFound: `actor_not_found`."""
    kept = await _kept(service, call, "actors", actor, "actor_not_found")
    return [[Turn(speaker, text) for speaker, text in item] for item in kept.document["conversations"]]


async def sentences_of(service: Service, call: Call, base: str) -> list[Sentence]:
    """Raises: NotFound: `knowledge_not_found`."""
    return await asyncio.to_thread(_sentences, await _kept(service, call, "knowledge", base, "knowledge_not_found"))


def _shelf(service: Service, kind: str) -> Shelf:
    if service.store is None:
        raise FailedPrecondition(
            "this server keeps nothing: it has no store.", code="store_missing", hint="Set server.store to a folder."
        )
    return Shelf(service.store, kind)


async def _kept(service: Service, call: Call, kind: str, name: str, code: str) -> Kept:
    """Read beside the loop: a document may have megabytes."""
    kept = await asyncio.to_thread(_shelf(service, kind).get, call.principal.tenant, name)
    if kept is None:
        raise NotFound(f"nothing is stored under {shown(name)}.", code=code, hint="Put it first.")
    return kept


async def _forget(service: Service, call: Call, kind: str, name: str, code: str) -> None:
    shelf, tenant = _shelf(service, kind), call.principal.tenant

    def forget() -> bool:
        with shelf.writing(tenant, name):
            return shelf.delete(tenant, name)

    if not await asyncio.to_thread(forget):
        raise NotFound(f"nothing is stored under {shown(name)}.", code=code)


def _check_size(documents: Sequence[str], sentences: Sequence[Sentence]) -> None:
    size = sum(len(part.encode()) for s in sentences for part in (s.text, s.document_id, s.title, s.url))
    for given, most, what in (
        (len(documents), MAX_BASE_DOCUMENTS, "documents"),
        (len(sentences), MAX_BASE_SENTENCES, "sentences"),
        (size, MAX_BASE_BYTES, "bytes of sentences, each with id, title and url"),
    ):
        if given > most:
            raise FailedPrecondition(
                f"a knowledge base may hold at most {most} {what}. Given: {given}, with what it holds.",
                code="store_full",
                hint="Replace what is there, or put the documents into another base.",
            )


def _actor(kept: Kept) -> ActorFacts:
    conversations = kept.document["conversations"]
    return ActorFacts(kept.name, len(conversations), sum(map(len, conversations)), kept.version)


def _knowledge(kept: Kept) -> KnowledgeFacts:
    return KnowledgeFacts(len(kept.document["documents"]), len(kept.document["sentences"]), kept.version)


def _sentences(kept: Kept) -> list[Sentence]:
    return [Sentence(*row) for row in kept.document["sentences"]]
