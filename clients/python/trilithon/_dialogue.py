"""Conversations by actor and knowledge: `client.dialogue` of both clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from trilithon._dialogue_types import Actor, KnowledgeBase, KnowledgeUsed, Nothing, Reply, ReplyDelta
from trilithon._parameters import CallOptions, TaskOptions
from trilithon._requests import plain, task
from trilithon._task_streams import AsyncTaskStream, Kinds, TaskStream
from trilithon._transport import (
    DELETE_ACTOR,
    DELETE_KNOWLEDGE,
    GET_ACTOR,
    GET_KNOWLEDGE,
    PUT_ACTOR,
    PUT_KNOWLEDGE,
    RESPOND,
)
from trilithon.errors import InvalidArgument, Violation

if TYPE_CHECKING:
    from trilithon._async_client import AsyncClient
    from trilithon._client import Client


class DialogueTurn(TypedDict):
    """What one side says; the next turn is the target's."""

    speaker: Literal["target", "other"]
    text: str


class _DocumentRequired(TypedDict):
    id: str


class Document(_DocumentRequired, total=False):
    """A text or an html page, exactly one of the two; `url` is a label that is never opened."""

    text: str
    html: str
    title: str
    url: str


class Knowledge(TypedDict, total=False):
    """
    Where knowledge comes from: `documents` of the call, or the stored `kb_id`.

    scorer: how sentences are compared with the last two turns [tfidf].
    top_k: sentences at most, 1 to 50 [5].
    min_score: below it a sentence is not used [the scorer's own].
    return_knowledge: tell which sentences were used [True].
    """

    documents: Sequence[Document]
    kb_id: str
    scorer: Literal["tfidf", "bm25", "dense", "hybrid"]
    top_k: int
    min_score: float
    return_knowledge: bool


EVENTS: Kinds = {"knowledge": KnowledgeUsed, "delta": ReplyDelta}

ReplyStream = TaskStream[KnowledgeUsed | ReplyDelta, Reply]
"""The sentences that are used, then pieces of the first candidate's text."""
AsyncReplyStream = AsyncTaskStream[KnowledgeUsed | ReplyDelta, Reply]
"""The sentences that are used, then pieces of the first candidate's text."""


class Dialogue:
    """The next turn of conversations, by actor and knowledge; reached as `client.dialogue`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @overload
    def respond(
        self,
        conversation: Sequence[DialogueTurn],
        *,
        stream: Literal[False] = False,
        references: Sequence[Sequence[DialogueTurn]] | None = None,
        actor: str | None = None,
        knowledge: Knowledge | None = None,
        topic: str | None = None,
        n: int | None = None,
        **options: Unpack[TaskOptions],
    ) -> Reply: ...
    @overload
    def respond(
        self,
        conversation: Sequence[DialogueTurn],
        *,
        stream: Literal[True],
        references: Sequence[Sequence[DialogueTurn]] | None = None,
        actor: str | None = None,
        knowledge: Knowledge | None = None,
        topic: str | None = None,
        n: int | None = None,
        **options: Unpack[TaskOptions],
    ) -> ReplyStream: ...
    def respond(
        self,
        conversation: Sequence[DialogueTurn],
        *,
        stream: bool = False,
        references: Sequence[Sequence[DialogueTurn]] | None = None,
        actor: str | None = None,
        knowledge: Knowledge | None = None,
        topic: str | None = None,
        n: int | None = None,
        **options: Unpack[TaskOptions],
    ) -> Reply | ReplyStream:
        """
        What the target speaker says next.

        Args:
            conversation: oldest first.
            stream: return the events as they come; its `result` is the reply.
            references: earlier conversations of the target speaker, oldest first; not together with `actor`.
            actor: name of a stored one.
            knowledge: documents, or a stored knowledge base, whose sentences may be used.
            topic: what is talked about; of a model that is prompted by examples, and of no other.
            n: how many candidates. Default: 1.
            options: see `TaskOptions`.
        """
        fields = respond_fields(conversation, references, actor, knowledge, topic, n, options)
        if stream:
            return self._client._stream(RESPOND, fields, options, EVENTS, Reply)
        return self._client._call(RESPOND, fields, options, Reply)

    def put_actor(
        self, name: str, conversations: Sequence[Sequence[DialogueTurn]], **options: Unpack[CallOptions]
    ) -> Actor:
        """Keep an actor's reference conversations, 1 to 64, oldest first, in the place of those that were there."""
        fields = plain("put_actor", {"actor_id": name, "conversations": turns_of(conversations)}, options)
        return self._client._call(PUT_ACTOR, fields, options, Actor)

    def get_actor(self, name: str, **options: Unpack[CallOptions]) -> Actor:
        """What is kept of an actor."""
        return self._client._call(GET_ACTOR, plain("get_actor", {"actor_id": name}, options), options, Actor)

    def delete_actor(self, name: str, **options: Unpack[CallOptions]) -> None:
        """Forget an actor."""
        self._client._call(DELETE_ACTOR, plain("delete_actor", {"actor_id": name}, options), options, Nothing)

    def put_knowledge(
        self, name: str, documents: Sequence[Document], *, replace: bool = True, **options: Unpack[CallOptions]
    ) -> KnowledgeBase:
        """
        Keep documents to take knowledge from.

        Args:
            documents: 1 to 64, together at most 1 MiB.
            replace: in the place of what is there; else beside it.
        """
        own = {"kb_id": name, "documents": documents_of("documents", documents), "replace": replace}
        fields = plain("put_knowledge", own, options)
        return self._client._call(PUT_KNOWLEDGE, fields, options, KnowledgeBase)

    def get_knowledge(self, name: str, **options: Unpack[CallOptions]) -> KnowledgeBase:
        """What a knowledge base holds."""
        fields = plain("get_knowledge", {"kb_id": name}, options)
        return self._client._call(GET_KNOWLEDGE, fields, options, KnowledgeBase)

    def delete_knowledge(self, name: str, **options: Unpack[CallOptions]) -> None:
        """Forget a knowledge base."""
        fields = plain("delete_knowledge", {"kb_id": name}, options)
        self._client._call(DELETE_KNOWLEDGE, fields, options, Nothing)


class AsyncDialogue:
    """The next turn of conversations, by actor and knowledge; reached as `client.dialogue`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @overload
    async def respond(
        self,
        conversation: Sequence[DialogueTurn],
        *,
        stream: Literal[False] = False,
        references: Sequence[Sequence[DialogueTurn]] | None = None,
        actor: str | None = None,
        knowledge: Knowledge | None = None,
        topic: str | None = None,
        n: int | None = None,
        **options: Unpack[TaskOptions],
    ) -> Reply: ...
    @overload
    async def respond(
        self,
        conversation: Sequence[DialogueTurn],
        *,
        stream: Literal[True],
        references: Sequence[Sequence[DialogueTurn]] | None = None,
        actor: str | None = None,
        knowledge: Knowledge | None = None,
        topic: str | None = None,
        n: int | None = None,
        **options: Unpack[TaskOptions],
    ) -> AsyncReplyStream: ...
    async def respond(
        self,
        conversation: Sequence[DialogueTurn],
        *,
        stream: bool = False,
        references: Sequence[Sequence[DialogueTurn]] | None = None,
        actor: str | None = None,
        knowledge: Knowledge | None = None,
        topic: str | None = None,
        n: int | None = None,
        **options: Unpack[TaskOptions],
    ) -> Reply | AsyncReplyStream:
        """
        What the target speaker says next.

        Args:
            conversation: oldest first.
            stream: return the events as they come; its `result` is the reply.
            references: earlier conversations of the target speaker, oldest first; not together with `actor`.
            actor: name of a stored one.
            knowledge: documents, or a stored knowledge base, whose sentences may be used.
            topic: what is talked about; of a model that is prompted by examples, and of no other.
            n: how many candidates. Default: 1.
            options: see `TaskOptions`.
        """
        fields = respond_fields(conversation, references, actor, knowledge, topic, n, options)
        if stream:
            return await self._client._stream(RESPOND, fields, options, EVENTS, Reply)
        return await self._client._call(RESPOND, fields, options, Reply)

    async def put_actor(
        self, name: str, conversations: Sequence[Sequence[DialogueTurn]], **options: Unpack[CallOptions]
    ) -> Actor:
        """Keep an actor's reference conversations, 1 to 64, oldest first, in the place of those that were there."""
        fields = plain("put_actor", {"actor_id": name, "conversations": turns_of(conversations)}, options)
        return await self._client._call(PUT_ACTOR, fields, options, Actor)

    async def get_actor(self, name: str, **options: Unpack[CallOptions]) -> Actor:
        """What is kept of an actor."""
        return await self._client._call(GET_ACTOR, plain("get_actor", {"actor_id": name}, options), options, Actor)

    async def delete_actor(self, name: str, **options: Unpack[CallOptions]) -> None:
        """Forget an actor."""
        await self._client._call(DELETE_ACTOR, plain("delete_actor", {"actor_id": name}, options), options, Nothing)

    async def put_knowledge(
        self, name: str, documents: Sequence[Document], *, replace: bool = True, **options: Unpack[CallOptions]
    ) -> KnowledgeBase:
        """
        Keep documents to take knowledge from.

        Args:
            documents: 1 to 64, together at most 1 MiB.
            replace: in the place of what is there; else beside it.
        """
        own = {"kb_id": name, "documents": documents_of("documents", documents), "replace": replace}
        fields = plain("put_knowledge", own, options)
        return await self._client._call(PUT_KNOWLEDGE, fields, options, KnowledgeBase)

    async def get_knowledge(self, name: str, **options: Unpack[CallOptions]) -> KnowledgeBase:
        """What a knowledge base holds."""
        fields = plain("get_knowledge", {"kb_id": name}, options)
        return await self._client._call(GET_KNOWLEDGE, fields, options, KnowledgeBase)

    async def delete_knowledge(self, name: str, **options: Unpack[CallOptions]) -> None:
        """Forget a knowledge base."""
        fields = plain("delete_knowledge", {"kb_id": name}, options)
        await self._client._call(DELETE_KNOWLEDGE, fields, options, Nothing)


def respond_fields(
    conversation: Sequence[DialogueTurn],
    references: Sequence[Sequence[DialogueTurn]] | None,
    actor: str | None,
    knowledge: Knowledge | None,
    topic: str | None,
    n: int | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The fields of a request for the next turn."""
    fields = {
        "conversation": [dict(turn) for turn in conversation],
        "references": None if references is None else turns_of(references),
        "actor_id": actor,
        "knowledge": None if knowledge is None else _knowledge(knowledge),
        "topic": topic,
        "n": n,
    }
    return task("respond", fields, options)


def _knowledge(given: Knowledge) -> dict[str, Any]:
    known: dict[str, Any] = {"return_knowledge": True, **given}
    if known.get("documents") is not None:
        known["documents"] = documents_of("knowledge.documents", known["documents"])
    return known


def documents_of(name: str, documents: Sequence[Document]) -> list[dict[str, Any]]:
    """
    Documents in their JSON shape; what is empty is left out, so that it takes nothing's place in a message.

    Raises:
        InvalidArgument: one has text and html, as the server says it; a message could hold only one of them.
    """
    for i, document in enumerate(documents):
        if document.get("text") and document.get("html"):
            field, rule = f"{name}[{i}]", "must have text or html, one of the two"
            wrong = Violation(field=field, code="missing_parameter", message=f"`{field}` {rule}.", rule=rule)
            raise InvalidArgument(wrong.message, code=wrong.code, details=[wrong])
    return [
        {key: value for key, value in document.items() if key == "id" or value not in ("", None)}
        for document in documents
    ]


def turns_of(conversations: Sequence[Sequence[DialogueTurn]]) -> list[list[dict[str, Any]]]:
    """Conversations in their JSON shape."""
    return [[dict(turn) for turn in turns] for turns in conversations]
