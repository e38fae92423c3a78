"""Routes of stories: the messages of `trilithon.api.v1` spelt flat."""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trilithon_server import stories, story_answers
from trilithon_server.http.endpoint import Route
from trilithon_server.http.events import EventStream
from trilithon_server.http.exchange import Exchange
from trilithon_server.http.openai import model_header
from trilithon_server.http.parse import parse
from trilithon_server.sampling_rules import TASK_HIDDEN
from trilithon_server.served import Call
from trilithon_server.service import Service
from trilithon_server.story_requests import (
    MAX_CONTROL_KEYWORDS,
    MAX_KNOWLEDGE,
    MAX_SENTENCES,
    REWRITE_HIDDEN,
    Asked,
    Control,
)
from trilithon_server.story_telling import Telling


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SentenceControl(_Strict):
    """What one sentence is to be about."""

    index: int = Field(description="Of the sentence, from 2: the first one is given.")
    keywords: list[str] = Field(default_factory=list, description=f"At most {MAX_CONTROL_KEYWORDS}.")
    mode: Literal["replace", "append", "antonym"] = Field(
        "replace",
        description="In the place of predicted keywords, before them, or the opposites of these, or of those that the "
        "sentence would have had.",
    )

    def control(self) -> Control:
        """As the service takes it."""
        return Control(index=self.index, keywords=self.keywords, mode=self.mode)


class StoryRequest(_Strict):
    """POST /v1/stories"""

    model: str = Field("", description="Name of the model that writes; empty means the only one served.")
    first_sentence: str
    sentences: int = Field(0, ge=0, le=MAX_SENTENCES, description="To be written beside the first; 0 means 4.")
    controls: list[SentenceControl] = Field(default_factory=list, description="At most one of each sentence.")
    kb: str = Field("", description="Name of the server's concepts; empty means those that it has.")
    knowledge_k: int | None = Field(
        None, ge=0, le=MAX_KNOWLEDGE, description="Facts of a sentence at most; null means 3 where there are any."
    )
    keyword_model: str = Field("", description="That predicts keywords; empty: one trained to, else the writer's base.")
    ranker: str = Field("", description="That ranks facts; empty: one trained to, else the first encoder.")
    stream: bool = False


class RewriteRequest(_Strict):
    """POST /v1/stories/{id}/rewrite"""

    model: str = Field("", description="Empty, or the one that the story was written by.")
    control: SentenceControl
    stream: bool = False


async def generate(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/stories"""
    parsed = parse(StoryRequest, await exchange.json(), service.limits, hidden=TASK_HIDDEN)
    body = parsed.body
    asked = Asked(
        first_sentence=body.first_sentence,
        sentences=body.sentences,
        controls=[item.control() for item in body.controls],
        kb=body.kb,
        knowledge_k=body.knowledge_k,
        keyword_model=body.keyword_model,
        ranker=body.ranker,
    )

    async def work() -> None:
        telling = await stories.generate(service, call, body.model, asked, parsed.values, found=parsed.found)
        await _tell(exchange, telling, stream=body.stream)

    await exchange.race(work())


async def rewrite(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/stories/{id}/rewrite"""
    parsed = parse(RewriteRequest, await exchange.json(), service.limits, hidden=REWRITE_HIDDEN)
    body = parsed.body

    async def work() -> None:
        telling = await stories.rewrite(
            service,
            call,
            body.model,
            exchange.path_params["id"],
            body.control.control(),
            parsed.values,
            found=parsed.found,
        )
        await _tell(exchange, telling, stream=body.stream)

    await exchange.race(work())


async def get_story(service: Service, exchange: Exchange, call: Call) -> None:
    """GET /v1/stories/{id}"""
    story = stories.get_story(service, call, exchange.path_params["id"])
    await exchange.respond_json(story_answers.story(story))


async def delete_story(service: Service, exchange: Exchange, call: Call) -> None:
    """DELETE /v1/stories/{id}"""
    stories.delete_story(service, call, exchange.path_params["id"])
    await exchange.respond_json({})


async def _tell(exchange: Exchange, telling: Telling, *, stream: bool) -> None:
    """A whole story, or one sentence after the other."""
    exchange.extra_headers.append(model_header(telling.cast.writer))
    async with telling:
        if not stream:
            async with aclosing(telling.sentences()) as sentences:
                async for _ in sentences:
                    pass
            await exchange.respond_json(story_answers.finished(telling))
            return
        async with EventStream(exchange, named_errors=True) as events:
            await events.send(_event(b"started", story_answers.started(telling)))
            async with aclosing(telling.sentences()) as sentences:
                async for told, reused in sentences:
                    await events.send(_event(b"sentence", story_answers.sentence(told, reused=reused)))
            await events.send(_event(b"finished", story_answers.finished(telling)))


def _event(name: bytes, document: dict[str, Any]) -> bytes:
    return b"event: " + name + b"\ndata: " + json.dumps(document).encode() + b"\n\n"


ROUTES: tuple[Route, ...] = (
    Route(
        method="POST", path="/v1/stories", handler=generate, request=StoryRequest, parameters=True,
        hidden=TASK_HIDDEN, answer="StoryAnswer", stream=True,
        summary="Tell a story from its first sentence, with keywords and knowledge.",
    ),
    Route(
        method="POST", path="/v1/stories/{id}/rewrite", handler=rewrite, request=RewriteRequest, parameters=True,
        hidden=REWRITE_HIDDEN, answer="StoryAnswer", stream=True,
        summary="Tell a story again from one sentence on.",
    ),
    Route(
        method="GET", path="/v1/stories/{id}", handler=get_story, answer="Story",
        summary="A story as far as it is written.",
    ),
    Route(
        method="DELETE", path="/v1/stories/{id}", handler=delete_story, answer="Nothing",
        summary="Forget a story.",
    ),
)  # fmt: skip
