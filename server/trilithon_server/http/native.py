"""Routes of our own: the messages of `trilithon.api.v1` as JSON, requests spelt flat."""

from __future__ import annotations

import json
from typing import Any

from trilithon_server import answers
from trilithon_server.generation import Generation
from trilithon_server.http import schemas
from trilithon_server.http.events import EventStream
from trilithon_server.http.exchange import Exchange
from trilithon_server.http.openai import conversation, model_header
from trilithon_server.http.parse import parse
from trilithon_server.prompts import Prompt
from trilithon_server.sampling_rules import META_NAMES, NAMES
from trilithon_server.scoring import ScoreItem, score
from trilithon_server.served import Call
from trilithon_server.service import Service
from trilithon_server.tokens import detokenize, render_chat, tokenize
from trilithon_server.validation import Violations

SCORE_HIDDEN = tuple(name for name in NAMES if name not in META_NAMES)


async def generate(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/generate"""
    parsed = parse(schemas.GenerateRequest, await exchange.json(), service.limits)
    body, found = parsed.body, parsed.found
    prompt, field = _prompt(body, found)

    async def work() -> None:
        generation = await service.generate(
            call, body.model, [prompt], parsed.values, found=found, stream=body.stream, field=field
        )
        exchange.extra_headers.append(model_header(generation.model))
        async with generation:
            if body.stream:
                await _stream(exchange, generation)
            else:
                await generation.joined()
                await exchange.respond_json(answers.generated(generation))

    await exchange.race(work())


def _prompt(body: schemas.GenerateRequest, found: Violations) -> tuple[Prompt, str]:
    if (body.prompt is None) == (body.messages is None):
        found.add("prompt", "or `messages` must be set, one of the two", code="missing_parameter")
    if body.messages is not None:
        return conversation(body), "messages"
    for name, value in (("tools", body.tools), ("add_generation_prompt", body.add_generation_prompt)):
        if value is not None:
            found.add(name, "needs `messages`")
    return body.prompt if body.prompt is not None else "", "prompt"


async def _stream(exchange: Exchange, generation: Generation) -> None:
    offsets = generation.params.return_offsets
    async with EventStream(exchange, named_errors=True) as events:
        async for part, choice in generation.news():
            if choice is None:
                await events.send(_event(b"started", answers.started(generation, part)))
            else:
                part.stream.streamed = True
                await events.send(_event(b"delta", answers.choice_news(choice, offsets=offsets)))
        await events.send(_event(b"finished", answers.finished(generation)))


def _event(name: bytes, document: dict[str, Any]) -> bytes:
    return b"event: " + name + b"\ndata: " + json.dumps(document).encode() + b"\n\n"


async def score_route(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/score"""
    parsed = parse(schemas.ScoreRequest, await exchange.json(), service.limits, hidden=SCORE_HIDDEN)
    body = parsed.body
    items = [
        ScoreItem(context=item.context, continuations=item.continuations, continuation_tokens=item.continuation_tokens)
        for item in body.items
    ]

    async def work() -> None:
        result = await score(service, call, body.model, items, parsed.values, top=body.top, found=parsed.found)
        exchange.extra_headers.append(model_header(result.model))
        await exchange.respond_json(answers.scores(result))

    await exchange.race(work())


async def tokenize_route(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/tokenize"""
    parsed = parse(schemas.TokenizeRequest, await exchange.json(), service.limits, parameters=False)
    body = parsed.body

    async def work() -> None:
        model, results = await tokenize(
            service,
            call,
            body.model,
            body.texts,
            add_special_tokens=body.add_special_tokens,
            pieces=body.return_pieces,
            offsets=body.return_offsets,
            truncate=body.truncate_tokens,
            found=parsed.found,
        )
        await exchange.respond_json(
            {
                "results": [answers.tokenized(result) for result in results],
                "max_context_tokens": model.describe()["max_context_tokens"],
                "tokenizer_digest": model.tokenizer.digest,
            }
        )

    await exchange.race(work())


async def detokenize_route(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/detokenize"""
    parsed = parse(schemas.DetokenizeRequest, await exchange.json(), service.limits, parameters=False)
    body = parsed.body

    async def work() -> None:
        texts = await detokenize(
            service, call, body.model, body.tokens, keep_special=body.keep_special_tokens, found=parsed.found
        )
        await exchange.respond_json({"texts": texts})

    await exchange.race(work())


async def render_route(service: Service, exchange: Exchange, call: Call) -> None:
    """POST /v1/render"""
    parsed = parse(schemas.RenderRequest, await exchange.json(), service.limits, parameters=False)

    async def work() -> None:
        model, text, ids = await render_chat(
            service, call, parsed.body.model, conversation(parsed.body), found=parsed.found
        )
        digest = model.template_digest
        await exchange.respond_json({"text": text, "ids": ids, "template_digest": digest})

    await exchange.race(work())


async def abort(service: Service, exchange: Exchange, call: Call) -> None:
    """DELETE /v1/requests/{id}"""
    await exchange.respond_json({"was_running": service.running.abort(call, exchange.path_params["id"])})


async def megatron(service: Service, exchange: Exchange, call: Call) -> None:
    """PUT /api"""
    parsed = parse(schemas.MegatronRequest, await exchange.json(), service.limits, parameters=False)
    body, found = parsed.body, parsed.found
    values = megatron_values(body, found)
    text_only = [prompt for prompt in body.prompts if not prompt]
    if text_only and not body.add_BOS:
        found.add("add_BOS", "must be true when a prompt is empty", given=False)

    async def work() -> None:
        generation = await service.generate(
            call,
            service.first("generate"),
            list(body.prompts),
            values,
            found=found,
            field="prompts",
            default_max_tokens=body.tokens_to_generate,
            always_tokens=True,
        )
        async with generation:
            await generation.joined()
            await exchange.respond_json(_megatron_answer(generation, body))

    await exchange.race(work())


def megatron_values(body: schemas.MegatronRequest, found: Violations) -> dict[str, Any]:
    """Megatron-LM's parameters under our names; what this server does not do is refused by name."""
    if body.prevent_newline_after_colon:
        found.add(
            "prevent_newline_after_colon", "must be false on this server", given=True, code="unsupported_parameter"
        )
    if body.top_k > 0 and body.top_p > 0:
        found.add("top_p", "must be 0 when `top_k` is set", given=body.top_p)
    if body.tokens_to_generate == 0 and not body.logprobs:
        found.add("tokens_to_generate", "must be at least 1 unless `logprobs` is true", given=0)
    if body.top_p_decay and not body.top_p:
        found.add("top_p_decay", "needs `top_p`", given=body.top_p_decay)
    greedy = body.top_k == 1
    values: dict[str, Any] = {
        "max_tokens": body.tokens_to_generate,
        "temperature": 0 if greedy else body.temperature,
        "top_k": 0 if greedy else body.top_k,
        "top_p": body.top_p or None,
        "seed": body.random_seed,
        "echo": True,
        "add_bos": True if body.add_BOS else None,
    }
    if body.beam_width:
        if len(body.prompts) > 1:
            found.add("prompts", "must be one with `beam_width`", given=len(body.prompts))
        values |= {"beam_width": body.beam_width, "n": body.beam_width, "length_penalty": body.length_penalty}
        values |= dict.fromkeys(("temperature", "top_k", "top_p", "seed"))
    elif body.length_penalty is not None:
        found.add("length_penalty", "needs `beam_width`", given=body.length_penalty)
    if body.top_p_decay:
        values |= {"top_p_decay": body.top_p_decay, "top_p_floor": body.top_p_bound}
    stops = (["\n\n"] if body.stop_on_double_eol else []) + (["\n"] if body.stop_on_eol else [])
    if stops:
        values |= {"stop": stops, "include_stop_str_in_output": True}
    if body.stop_token is not None:
        values["stop_token_ids"] = [body.stop_token]
    if body.logprobs:
        values |= {"logprobs": 0, "prompt_logprobs": 0}
    return values


def _megatron_answer(generation: Generation, body: schemas.MegatronRequest) -> dict[str, Any]:
    texts, segments, logprobs = [], [], []
    answers = [(part, choice) for part in generation.parts for choice in part.choices]
    for part, choice in answers:
        text, tokens, ids = choice.take()
        texts.append(text)
        pieces = generation.model.texts
        segments.append([pieces.text_of(token) for token in (*part.prepared.ids, *ids)])
        if body.logprobs:
            known = (*part.prompt_tokens[1:], *tokens)
            logprobs.append([info.logprob for info in known])
    answer: dict[str, Any] = {"text": texts, "segments": segments}
    if body.logprobs:
        answer["logprobs"] = logprobs
    if body.beam_width:
        penalty = 1.0 if body.length_penalty is None else body.length_penalty
        answer["scores"] = [choice.cumulative_logprob / max(1, choice.generated) ** penalty for _, choice in answers]
    return answer
