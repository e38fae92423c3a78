"""OpenAI's routes: chat completions, completions, embeddings, models."""

from __future__ import annotations

import base64
import sys
import time
from array import array
from collections.abc import Sequence
from typing import Any, cast

from trilithon_server.embedding import embed
from trilithon_server.generation import Generation
from trilithon_server.http import schemas
from trilithon_server.http.events import EventStream
from trilithon_server.http.exchange import Exchange
from trilithon_server.http.openai_shapes import DONE, ChunkWriter, joined
from trilithon_server.http.parse import Parsed, parse
from trilithon_server.prompts import Conversation, Prompt
from trilithon_server.sampling_rules import NAMES
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.tokens import page
from trilithon_server.validation import Violations

DEFAULT_COMPLETION_TOKENS = 16
"""`max_tokens` of /v1/completions, as OpenAI documents it; chat takes the server's default."""

CHAT_HIDDEN = ("logprobs",)

EMBEDDING_NAMES = ("priority", "time_limit_ms", "queue_timeout_ms", "truncate_prompt_tokens", "add_bos", "metadata")
"""Parameters that an embedding request may have."""

EMBEDDING_HIDDEN = tuple(name for name in NAMES if name not in EMBEDDING_NAMES)


async def chat(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/chat/completions"""
    parsed = parse(schemas.ChatRequest, await exchange.json(), service.limits, openai=True, hidden=CHAT_HIDDEN)
    body, values, found = parsed.body, parsed.values, parsed.found
    _common(parsed, body)
    if body.top_logprobs is not None and not body.logprobs:
        found.add("top_logprobs", "needs `logprobs` to be true", given=body.top_logprobs)
    elif body.logprobs:
        values["logprobs"] = body.top_logprobs or 0
    if body.stream and values.get("prompt_logprobs") is not None:
        found.add("prompt_logprobs", "must be unset when streaming on this route", given=values["prompt_logprobs"])
    prompt = conversation(body)

    async def work() -> None:
        generation = await service.generate(
            call, body.model, [prompt], values, found=found, stream=body.stream, field="messages"
        )
        await _answer(exchange, generation, body, chat=True)

    await exchange.race(work())


async def completions(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/completions"""
    parsed = parse(schemas.CompletionRequest, await exchange.json(), service.limits, openai=True)
    body, values, found = parsed.body, parsed.values, parsed.found
    _common(parsed, body)
    echo_logprobs = values.get("echo") is True and values.get("logprobs") is not None
    if echo_logprobs:
        values.setdefault("prompt_logprobs", values["logprobs"])
    if body.stream and values.get("prompt_logprobs") is not None:
        name = "echo" if echo_logprobs else "prompt_logprobs"
        found.add(name, "must be unset when log-probabilities are streamed on this route", given=True)

    async def work() -> None:
        generation = await service.generate(
            call,
            body.model,
            prompts_of(body.prompt),
            values,
            found=found,
            stream=body.stream,
            default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        )
        await _answer(exchange, generation, body, chat=False, echo_logprobs=echo_logprobs)

    await exchange.race(work())


async def _answer(
    exchange: Exchange,
    generation: Generation,
    body: schemas.ChatRequest | schemas.CompletionRequest,
    *,
    chat: bool,
    echo_logprobs: bool = False,
) -> None:
    created = int(time.time())
    exchange.extra_headers.append(model_header(generation.model))
    async with generation:
        if not body.stream:
            await generation.joined()
            await exchange.respond_json(joined(generation, chat=chat, created=created, echo_logprobs=echo_logprobs))
            return
        usage = body.stream_options is not None and body.stream_options.include_usage
        writer = ChunkWriter(generation, chat=chat, created=created, usage=usage)
        async with EventStream(exchange) as events:
            if chat:
                await events.send("".join(writer.role(choice.index) for choice in generation.choices).encode())
            async for part, choice in generation.news():
                if choice is not None:
                    data = writer.news(choice)
                    if data:
                        part.stream.streamed = True
                        await events.send(data.encode())
            last = writer.usage(generation).encode() if usage else b""
            await events.send(last + DONE)


def _common(parsed: Parsed[Any], body: schemas.ChatRequest | schemas.CompletionRequest) -> None:
    """What both routes spell differently from our own parameters."""
    values, found = parsed.values, parsed.found
    if body.max_completion_tokens is not None:
        given = values.get("max_tokens")
        if given is not None and given != body.max_completion_tokens:
            message = (
                "`max_tokens` and `max_completion_tokens` must be equal when both are set. "
                f"Given: {given} and {body.max_completion_tokens}."
            )
            found.say("max_completion_tokens", message, code="duplicate_limit", rule="must equal `max_tokens`")
        values["max_tokens"] = body.max_completion_tokens
    if body.prompt_cache_key:
        salt = values.get("cache_salt")
        if salt is None or isinstance(salt, str):
            values["cache_salt"] = f"{salt}\0{body.prompt_cache_key}" if salt else body.prompt_cache_key
    if body.stream_options is not None and not body.stream:
        found.add("stream_options", "must be unset unless `stream` is true")
    _response_format(body.response_format, values, found)


def _response_format(form: schemas.ResponseFormat | None, values: dict[str, Any], found: Violations) -> None:
    if form is None:
        return
    if form.type != "json_schema" and form.json_schema is not None:
        found.add("response_format.json_schema", "must be unset unless the type is json_schema")
    if form.type == "text":
        return
    if values.get("constraint") is not None:
        found.add("response_format", "must be unset when `constraint` is set", given=form.type)
    elif form.type == "json_object":
        values["constraint"] = {"json_object": True}
    elif form.json_schema is None or form.json_schema.schema_ is None:
        found.add("response_format.json_schema.schema", "must be set when the type is json_schema")
    else:
        values["constraint"] = {"json_schema": form.json_schema.schema_}


def conversation(body: schemas.ChatRequest | schemas.GenerateRequest | schemas.RenderRequest) -> Conversation:
    """The messages of a body, as templates read them."""
    return Conversation(
        messages=[message.model_dump(exclude_none=True) for message in body.messages or ()],
        tools=[tool.model_dump() for tool in body.tools] if body.tools else None,
        opening=body.add_generation_prompt,
        continue_final=body.continue_final_message,
    )


def prompts_of(given: str | Sequence[Any]) -> list[Prompt]:
    """One prompt, or a list of them: a list of numbers is one prompt of token ids."""
    if isinstance(given, str) or not given or isinstance(given[0], int):
        return [cast(Prompt, given)]
    return list(given)


def model_header(model: ServedModel) -> tuple[bytes, bytes]:
    """`x-trilithon-model`: the served name and the version of the weights."""
    return b"x-trilithon-model", f"{model.name}@{model.version}".encode("latin-1", "replace")


async def embeddings(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/embeddings"""
    parsed = parse(
        schemas.EmbeddingRequest, await exchange.json(), service.limits, openai=True, hidden=EMBEDDING_HIDDEN
    )
    body = parsed.body

    async def work() -> None:
        model, vectors, usage = await embed(
            service,
            call,
            body.model,
            prompts_of(body.input),
            parsed.values,
            pooling=body.pooling,
            normalize=body.normalize,
            dimensions=body.dimensions or 0,
            found=parsed.found,
        )
        exchange.extra_headers.append(model_header(model))
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": _base64(v.values) if body.encoding_format == "base64" else list(v.values),
                "tokens": v.tokens,
            }
            for i, v in enumerate(vectors)
        ]
        counts = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
        await exchange.respond_json({"object": "list", "data": data, "model": model.name, "usage": counts})

    await exchange.race(work())


def _base64(values: Sequence[float]) -> str:
    """Little-endian float32, as OpenAI's client reads it."""
    raw = array("f", values)
    if sys.byteorder == "big":
        raw.byteswap()
    return base64.b64encode(raw.tobytes()).decode()


async def models(service: Service, exchange: Exchange, call: Call) -> None:
    """GET /v1/models"""
    query = exchange.query(("after", "limit", "kind"))
    limit = query.get("limit", "0")
    found, more = await page(
        service,
        call.principal.tenant,
        after=query.get("after", ""),
        limit=int(limit) if limit.isascii() and limit.isdigit() and len(limit) < 6 else -1,
        kind=query.get("kind", ""),
    )
    data = [model_dict(row) for row in found]
    await exchange.respond_json({"object": "list", "data": data, "has_more": more})


async def model(service: Service, exchange: Exchange, call: Call) -> None:
    """GET /v1/models/{id}"""
    row = await service.names.describe(exchange.path_params["id"], call.principal.tenant)
    await exchange.respond_json(model_dict(row))


def model_dict(row: dict[str, Any]) -> dict[str, Any]:
    """A model with OpenAI's keys and those of `trilithon.api.v1.Model`."""
    return {"object": "model", "owned_by": "trilithon", **row}
