"""The route of synthetic questions: the messages of `trilithon.api.v1` spelt flat."""

from __future__ import annotations

import contextlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trilithon_server import synthesis, synthesis_answers
from trilithon_server.http.endpoint import Route
from trilithon_server.http.events import EventStream
from trilithon_server.http.exchange import Exchange
from trilithon_server.http.openai import model_header
from trilithon_server.http.parse import parse
from trilithon_server.served import Call
from trilithon_server.service import Service
from trilithon_server.synthesis_records import Passage, Triple, Wanted


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SynthQAPassage(_Strict):
    """A text to ask about."""

    id: str = Field(description="What triples call it; each once.")
    text: str


class SynthQARequest(_Strict):
    """POST /v1/synthetic-qa"""

    model: str = Field("", description="Writes the questions; empty means the first that was trained to, or can write.")
    passages: list[SynthQAPassage]
    answers_per_passage: int = Field(0, description="1 to 20; 0 means 5.")
    questions_per_answer: int = Field(0, description="1 to 8; 0 means 2.")
    unanswerable_per_answer: int = Field(
        0, description="0 to 8 questions beside each answer that the passage does not answer; the model must know how."
    )
    filter: Literal["", "pair_any", "single", "none"] = Field("", description="Empty means pair_any.")
    answer_model: str = Field("", description="Proposes answers; empty means the first that can, or else a rule.")
    stream: Literal[True] = Field(True, description="The answer is always a stream.")
    reader_model: str = Field("", description="Checks the questions; empty means the first that answers questions.")


async def generate(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/synthetic-qa"""
    parsed = parse(SynthQARequest, await exchange.json(), service.limits, hidden=synthesis.HIDDEN)
    body = parsed.body
    wanted = Wanted(
        passages=[Passage(item.id, item.text) for item in body.passages],
        answers=body.answers_per_passage,
        questions=body.questions_per_answer,
        unanswerable=body.unanswerable_per_answer,
        filter=body.filter,
        answer_model=body.answer_model,
        reader_model=body.reader_model,
    )

    async def work() -> None:
        made = await synthesis.synthesise(service, call, body.model, wanted, parsed.values, found=parsed.found)
        exchange.extra_headers.append(model_header(made.writer.model))
        async with EventStream(exchange, named_errors=True) as events, contextlib.aclosing(made.events()) as news:
            await events.send(_event(b"started", synthesis_answers.started(made, call)))
            async for item in news:
                if isinstance(item, Triple):
                    await events.send(_event(b"triple", synthesis_answers.triple(item)))
                else:
                    await events.send(_event(b"passage", synthesis_answers.passage(item)))
            await events.send(_event(b"finished", synthesis_answers.finished(made, call)))

    await exchange.race(work())


def _event(name: bytes, document: dict[str, Any]) -> bytes:
    return b"event: " + name + b"\ndata: " + json.dumps(document).encode() + b"\n\n"


ROUTES: tuple[Route, ...] = (
    Route(
        method="POST", path="/v1/synthetic-qa", handler=generate, request=SynthQARequest, parameters=True,
        hidden=synthesis.HIDDEN, media="text/event-stream",
        summary="Questions and answers made from passages, as they are made.",
    ),
)  # fmt: skip
