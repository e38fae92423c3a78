"""Routes of conversations: the messages of `trilithon.api.v1` spelt flat."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trilithon_server import dialogue, dialogue_answers, dialogue_store
from trilithon_server.dialogue import Reply
from trilithon_server.dialogue_requests import MAX_TOP_K, Asked, Grounds
from trilithon_server.http.endpoint import Route
from trilithon_server.http.events import EventStream
from trilithon_server.http.exchange import Exchange
from trilithon_server.http.openai import model_header
from trilithon_server.http.parse import parse
from trilithon_server.knowledge.local import Document
from trilithon_server.sampling_rules import TASK_HIDDEN
from trilithon_server.served import Call
from trilithon_server.service import Service
from trilithon_server.tasks.dialogue_format import Turn


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class DialogueTurn(_Strict):
    """What one side says."""

    speaker: Literal["target", "other"] = Field(description="`target`: the actor whose next turn is asked for.")
    text: str

    def turn(self) -> Turn:
        """As the service takes it."""
        return Turn(self.speaker, self.text)


class DialogueDocument(_Strict):
    """A text or an html page; exactly one of the two."""

    id: str
    text: str = ""
    html: str = ""
    title: str = ""
    url: str = Field("", description="A label; it is never opened.")

    def document(self) -> Document:
        """As the service takes it."""
        return Document(id=self.id, text=self.text, html=self.html, title=self.title, url=self.url)


class DialogueKnowledge(_Strict):
    """Where knowledge comes from: `documents`, or the stored `kb_id`."""

    documents: list[DialogueDocument] = Field(default_factory=list)
    kb_id: str = ""
    scorer: Literal["", "tfidf", "bm25", "dense", "hybrid"] = Field("", description="Empty means tfidf.")
    top_k: int = Field(0, ge=0, le=MAX_TOP_K, description="Sentences at most; 0 means 5.")
    min_score: float | None = Field(None, allow_inf_nan=False, description="null means the scorer's own.")
    return_knowledge: bool = True

    def grounds(self) -> Grounds:
        """As the service takes it."""
        return Grounds(
            documents=[item.document() for item in self.documents],
            kb_id=self.kb_id,
            scorer=self.scorer,
            top_k=self.top_k,
            min_score=self.min_score,
        )


class DialogueRequest(_Strict):
    """POST /v1/dialogue"""

    model: str = Field("", description="Name of the model; empty means the only one served.")
    conversation: list[DialogueTurn]
    references: list[list[DialogueTurn]] = Field(
        default_factory=list, description="Earlier conversations of the target actor, oldest first."
    )
    actor_id: str = Field("", description="A stored actor, in place of `references`.")
    topic: str = Field(
        "", description="What is talked about; of a model that is prompted by examples, and of no other."
    )
    knowledge: DialogueKnowledge | None = None
    stream: bool = False


class ActorRequest(_Strict):
    """PUT /v1/dialogue/actors/{id}"""

    conversations: list[list[DialogueTurn]]


class KnowledgeRequest(_Strict):
    """PUT /v1/knowledge/{kb}"""

    documents: list[DialogueDocument]
    replace: bool = Field(True, description="In the place of what is there; else beside it.")


async def respond(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/dialogue"""
    parsed = parse(DialogueRequest, await exchange.json(), service.limits, hidden=TASK_HIDDEN)
    body = parsed.body
    asked = Asked(
        conversation=_turns(body.conversation),
        references=[_turns(item) for item in body.references],
        actor_id=body.actor_id,
        grounds=None if body.knowledge is None else body.knowledge.grounds(),
        topic=body.topic,
    )
    told = body.knowledge is None or body.knowledge.return_knowledge

    async def work() -> None:
        reply = await dialogue.respond(
            service, call, body.model, asked, parsed.values, found=parsed.found, stream=body.stream
        )
        exchange.extra_headers.append(model_header(reply.generation.model))
        async with reply.generation:
            if body.stream:
                await _stream(exchange, reply, told=told)
            else:
                await reply.joined()
                await exchange.respond_json(dialogue_answers.responded(reply, with_knowledge=told))

    await exchange.race(work())


async def _stream(exchange: Exchange, reply: Reply, *, told: bool) -> None:
    async with EventStream(exchange, named_errors=True) as events:
        for item in dialogue_answers.used(reply) if told else ():
            await events.send(_event(b"knowledge", item))
        async for index, piece in reply.news():
            if index == 0:
                await events.send(_event(b"delta", {"delta": piece}))
        await events.send(_event(b"finished", dialogue_answers.responded(reply, with_knowledge=told)))


def _event(name: bytes, document: dict[str, Any]) -> bytes:
    return b"event: " + name + b"\ndata: " + json.dumps(document).encode() + b"\n\n"


def _turns(items: list[DialogueTurn]) -> list[Turn]:
    return [item.turn() for item in items]


async def put_actor(service: Service, exchange: Exchange, call: Call) -> None:
    """PUT /v1/dialogue/actors/{id}"""
    parsed = parse(ActorRequest, await exchange.json(), service.limits, parameters=False)
    parsed.found.raise_if_any()
    conversations = [_turns(item) for item in parsed.body.conversations]
    facts = await dialogue_store.put_actor(service, call, exchange.path_params["id"], conversations)
    await exchange.respond_json(dialogue_answers.actor(facts))


async def get_actor(service: Service, exchange: Exchange, call: Call) -> None:
    """GET /v1/dialogue/actors/{id}"""
    facts = await dialogue_store.get_actor(service, call, exchange.path_params["id"])
    await exchange.respond_json(dialogue_answers.actor(facts))


async def delete_actor(service: Service, exchange: Exchange, call: Call) -> None:
    """DELETE /v1/dialogue/actors/{id}"""
    await dialogue_store.delete_actor(service, call, exchange.path_params["id"])
    await exchange.respond_json({})


async def put_knowledge(service: Service, exchange: Exchange, call: Call) -> None:
    """PUT /v1/knowledge/{kb}"""
    parsed = parse(KnowledgeRequest, await exchange.json(), service.limits, parameters=False)
    parsed.found.raise_if_any()
    documents = [item.document() for item in parsed.body.documents]
    name, replace = exchange.path_params["kb"], parsed.body.replace
    facts = await dialogue_store.put_knowledge(service, call, name, documents, replace=replace)
    await exchange.respond_json(dialogue_answers.knowledge(facts))


async def get_knowledge(service: Service, exchange: Exchange, call: Call) -> None:
    """GET /v1/knowledge/{kb}"""
    facts = await dialogue_store.get_knowledge(service, call, exchange.path_params["kb"])
    await exchange.respond_json(dialogue_answers.knowledge(facts))


async def delete_knowledge(service: Service, exchange: Exchange, call: Call) -> None:
    """DELETE /v1/knowledge/{kb}"""
    await dialogue_store.delete_knowledge(service, call, exchange.path_params["kb"])
    await exchange.respond_json({})


ROUTES: tuple[Route, ...] = (
    Route(
        method="POST", path="/v1/dialogue", handler=respond, request=DialogueRequest, parameters=True,
        hidden=TASK_HIDDEN, answer="DialogueAnswer", stream=True,
        summary="The next turn of a conversation, by actor and knowledge.",
    ),
    Route(
        method="PUT", path="/v1/dialogue/actors/{id}", handler=put_actor, request=ActorRequest, answer="ActorAnswer",
        summary="Keep an actor's reference conversations.",
    ),
    Route(
        method="GET", path="/v1/dialogue/actors/{id}", handler=get_actor, answer="ActorAnswer",
        summary="What is kept of an actor.",
    ),
    Route(
        method="DELETE", path="/v1/dialogue/actors/{id}", handler=delete_actor, answer="Nothing",
        summary="Forget an actor.",
    ),
    Route(
        method="PUT", path="/v1/knowledge/{kb}", handler=put_knowledge, request=KnowledgeRequest,
        answer="KnowledgeAnswer", summary="Keep documents to take knowledge from.",
    ),
    Route(
        method="GET", path="/v1/knowledge/{kb}", handler=get_knowledge, answer="KnowledgeAnswer",
        summary="What a knowledge base holds.",
    ),
    Route(
        method="DELETE", path="/v1/knowledge/{kb}", handler=delete_knowledge, answer="Nothing",
        summary="Forget a knowledge base.",
    ),
)  # fmt: skip
