"""Routes of finetuned encoders: what stands in texts, as the messages of `trilithon.api.v1` spelt flat."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from trilithon_server import extract_answers, extraction
from trilithon_server.extraction import MAX_ANSWERS, Mention
from trilithon_server.http.endpoint import Route
from trilithon_server.http.exchange import Exchange
from trilithon_server.http.native import SCORE_HIDDEN
from trilithon_server.http.openai import model_header
from trilithon_server.http.parse import parse
from trilithon_server.served import Call
from trilithon_server.service import Service
from trilithon_server.task_run import Told

_HIDDEN = SCORE_HIDDEN


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field("", description="Name of the model; empty means the only one served.")


class ExtractEntity(BaseModel):
    """A mention: characters [start, end) of the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    start: int = Field(ge=0, le=0xFFFFFFFF)
    end: int = Field(ge=0, le=0xFFFFFFFF)
    type: str
    text: str = Field("", description="Compared with what stands there, unless it is empty.")
    score: float | None = Field(None, description="Ignored, so that found entities can be sent back as they came.")

    def mention(self) -> Mention:
        """As the service takes it."""
        return Mention(start=self.start, end=self.end, type=self.type, text=self.text)


class ExtractPair(BaseModel):
    """Two mentions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    a: ExtractEntity
    b: ExtractEntity


class EntitiesRequest(_Body):
    """POST /v1/extract/entities"""

    texts: list[str]
    types: list[str] = Field(default_factory=list, description="Only entities of these types; empty means all.")


class RelationsRequest(_Body):
    """POST /v1/extract/relations: exactly one of `pairs`, `entities` and `tagger`."""

    text: str
    pairs: list[ExtractPair] = Field(default_factory=list)
    entities: list[ExtractEntity] = Field(default_factory=list, description="Every pair of these that may be related.")
    tagger: str = Field("", description="Name of a served model that finds the entities.")


class SpansRequest(_Body):
    """POST /v1/extract/spans"""

    question: str
    contexts: list[str]
    n_best: int = Field(0, ge=0, le=MAX_ANSWERS, description="How many answers; 0 means the default, 5.")
    null_threshold: float | None = Field(
        None,
        allow_inf_nan=False,
        description='By how much "no answer" must score above the best answer to be said; null means the model\'s own.',
    )


class ClassesRequest(_Body):
    """POST /v1/extract/classes"""

    texts: list[str]
    text_pairs: list[str] = Field(default_factory=list, description="The second text of each; empty means none.")


async def entities(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/extract/entities"""
    parsed = parse(EntitiesRequest, await exchange.json(), service.limits, hidden=_HIDDEN)
    body = parsed.body

    async def work() -> None:
        documents, told = await extraction.annotate(
            service, call, body.model, body.texts, parsed.values, types=body.types, found=parsed.found
        )
        await _respond(exchange, extract_answers.annotated(documents, told), told)

    await exchange.race(work())


async def relations(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/extract/relations"""
    parsed = parse(RelationsRequest, await exchange.json(), service.limits, hidden=_HIDDEN)
    body = parsed.body

    async def work() -> None:
        result = await extraction.relate(
            service,
            call,
            body.model,
            body.text,
            parsed.values,
            pairs=[(pair.a.mention(), pair.b.mention()) for pair in body.pairs],
            entities=[entity.mention() for entity in body.entities],
            tagger=body.tagger,
            found=parsed.found,
        )
        await _respond(exchange, extract_answers.related(result), result.told)

    await exchange.race(work())


async def spans(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/extract/spans"""
    parsed = parse(SpansRequest, await exchange.json(), service.limits, hidden=_HIDDEN)
    body = parsed.body

    async def work() -> None:
        result = await extraction.answer(
            service,
            call,
            body.model,
            body.question,
            body.contexts,
            parsed.values,
            n_best=body.n_best,
            null_threshold=body.null_threshold,
            found=parsed.found,
        )
        await _respond(exchange, extract_answers.answered(result), result.told)

    await exchange.race(work())


async def classes(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/extract/classes"""
    parsed = parse(ClassesRequest, await exchange.json(), service.limits, hidden=_HIDDEN)
    body = parsed.body

    async def work() -> None:
        results, told = await extraction.classify(
            service, call, body.model, body.texts, parsed.values, text_pairs=body.text_pairs, found=parsed.found
        )
        await _respond(exchange, extract_answers.classified(results, told), told)

    await exchange.race(work())


async def _respond(exchange: Exchange, document: dict[str, Any], told: Told) -> None:
    exchange.extra_headers.append(model_header(told.model))
    await exchange.respond_json(document)


ROUTES: tuple[Route, ...] = (
    Route(
        method="POST", path="/v1/extract/entities", handler=entities, request=EntitiesRequest,
        parameters=True, hidden=_HIDDEN, answer="EntitiesAnswer", summary="Entities of texts.",
    ),
    Route(
        method="POST", path="/v1/extract/relations", handler=relations, request=RelationsRequest,
        parameters=True, hidden=_HIDDEN, answer="RelationsAnswer",
        summary="How pairs of entities of a text are related.",
    ),
    Route(
        method="POST", path="/v1/extract/spans", handler=spans, request=SpansRequest,
        parameters=True, hidden=_HIDDEN, answer="SpansAnswer", summary="Spans of texts that answer a question.",
    ),
    Route(
        method="POST", path="/v1/extract/classes", handler=classes, request=ClassesRequest,
        parameters=True, hidden=_HIDDEN, answer="ClassesAnswer", summary="One label for each text.",
    ),
)  # fmt: skip
