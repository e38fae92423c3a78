"""The route of open questions: the messages of `trilithon.api.v1` spelt flat."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trilithon_server import openqa, openqa_answers
from trilithon_server.http.dialogue import DialogueDocument
from trilithon_server.http.endpoint import Route
from trilithon_server.http.exchange import Exchange
from trilithon_server.http.native import SCORE_HIDDEN
from trilithon_server.http.openai import model_header
from trilithon_server.http.parse import parse
from trilithon_server.openqa import MAX_TOP_K, Asked
from trilithon_server.sampling_rules import META_NAMES, TASK_RULES
from trilithon_server.served import Call
from trilithon_server.service import Service
from trilithon_server.validation import Violations, nearest

_DRAWN: dict[str, Any] = {
    rule.name: {**rule.schema, "description": rule.meaning} for rule in TASK_RULES if rule.name not in META_NAMES
}


class AnswerRequest(BaseModel):
    """POST /v1/openqa: exactly one of `index` and `documents`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field("", description="The reader; empty means the first served model that reads so.")
    question: str
    index: str = Field("", description="A stored index.")
    documents: list[DialogueDocument] = Field(default_factory=list, description="Cut into passages of 100 words.")
    top_k: int = Field(0, ge=0, le=MAX_TOP_K, description="Passages that are read; 0 means 5.")
    reader: Literal["", "span", "joint", "individual", "causal"] = Field(
        "", description="Empty means what the model is."
    )
    sampling: dict[str, Any] = Field(
        default_factory=dict,
        description="How a reader writes that does; the reader `span` does not.",
        json_schema_extra={"properties": _DRAWN, "additionalProperties": False},
    )
    mode: Literal["", "dense", "bm25", "hybrid"] = Field("", description="Empty means dense.")
    retriever: str = Field("", description="The encoder; empty means the index's own, or the first that is served.")
    min_version: int = Field(0, ge=0, le=(1 << 64) - 1, description="Refused where an older version is served.")
    return_evidence: bool = False


async def answer(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/openqa"""
    parsed = parse(AnswerRequest, await exchange.json(), service.limits, hidden=SCORE_HIDDEN)
    body = parsed.body
    asked = Asked(
        question=body.question,
        index=body.index,
        documents=[item.document() for item in body.documents],
        top_k=body.top_k,
        reader=body.reader,
        mode=body.mode,
        retriever=body.retriever,
        min_version=body.min_version,
    )
    values = {**parsed.values, **_drawn(body.sampling, parsed.found)}

    async def work() -> None:
        result = await openqa.answer(service, call, body.model, asked, values, found=parsed.found)
        exchange.extra_headers.append(model_header(result.model))
        await exchange.respond_json(openqa_answers.answered(result, with_evidence=body.return_evidence))

    await exchange.race(work())


def _drawn(given: dict[str, Any], found: Violations) -> dict[str, Any]:
    """Parameters of drawing; null means unset."""
    for name in given:
        if name not in _DRAWN:
            message = f"unknown parameter `sampling.{name}`.{nearest(name, _DRAWN)}"
            found.say(f"sampling.{name}", message, code="unknown_parameter", rule="is not a parameter here")
    return {name: value for name, value in given.items() if name in _DRAWN and value is not None}


ROUTES: tuple[Route, ...] = (
    Route(
        method="POST", path="/v1/openqa", handler=answer, request=AnswerRequest, parameters=True, hidden=SCORE_HIDDEN,
        answer="OpenAnswer", summary="The answer to a question, from passages of an index or of documents.",
    ),
)  # fmt: skip
