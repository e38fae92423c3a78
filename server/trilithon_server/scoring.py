"""How likely are given continuations of a context: the model reads, and writes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trilithon.errors import DeadlineExceeded
from trilithon_server.assembly import TokenInfo, engine_error, token_info
from trilithon_server.engine import wire_pb2 as wire
from trilithon_server.engine.request import source_blocks
from trilithon_server.engine_client import EngineStream
from trilithon_server.generation import Usage
from trilithon_server.prompts import (
    Conversation,
    Prompt,
    Sequenced,
    check_ids,
    encode,
    encode_conversation,
    prepare,
    render,
)
from trilithon_server.sampling import SamplingParams, to_wire, validate
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.text.chat import Rendered
from trilithon_server.validation import Bounds, Violations, invalid


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreItem:
    """A context (None: the begin token alone) and what may follow it: texts or token ids, not both."""

    context: Prompt | None
    continuations: Sequence[str] = ()
    continuation_tokens: Sequence[Sequence[int]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One continuation's score; log-probabilities are natural logarithms."""

    sum_logprob: float
    byte_count: int
    is_greedy: bool
    tokens: Sequence[TokenInfo]


@dataclass(slots=True, kw_only=True)
class Scores:
    """What `score` returns: per item, per continuation."""

    model: ServedModel
    items: list[list[Score]] = field(default_factory=list)
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """One sequence to read: all its ids, and where the continuation starts; what an encoder reads before it."""

    item: int
    ids: Sequence[int]
    start: int
    byte_count: int
    begun: Sequenced

    @property
    def packed(self) -> Sequenced:
        """As the engine gets it."""
        return replace(self.begun, ids=self.ids)

    @property
    def num_tokens(self) -> int:
        """All that is read."""
        return len(self.ids) + sum(map(len, self.begun.sources))


async def score(
    service: Service,
    call: Call,
    model_name: str,
    items: Sequence[ScoreItem],
    values: Mapping[str, Any],
    *,
    top: int = 0,
    found: Violations | None = None,
) -> Scores:
    """
    Score every continuation of every item.

    Args:
        items: at least one; continuations in all at most `limits.max_prompts`.
        values: parameters by JSON name; those of the request itself (priority, time_limit_ms ...) matter here.
        top: how many most likely tokens to report at each position.
        found: violations that the front has already found.
    Raises:
        TrilithonError: refused, or the engine could not finish.
    """
    violations = found if found is not None else Violations()
    model = await service.resolve(model_name, call, able="score")
    model.require("score")
    hello = model.ready()
    bounds = model.bounds(call.principal, hello)
    params = validate({**values, "max_tokens": 0, "prompt_logprobs": top}, bounds, violations)
    most = service.limits.max_prompts
    count = sum(len(item.continuations) + len(item.continuation_tokens) for item in items)
    if not items:
        violations.add("items", "must hold at least one item", given=0)
    elif count > most:
        violations.add("items", f"must hold at most {most} continuations in all", given=count)
    for i, item in enumerate(items):
        if bool(item.continuations) == bool(item.continuation_tokens):
            rule = "must set exactly one of continuations, continuation_tokens"
            violations.add(f"items[{i}]", rule, given=[len(item.continuations), len(item.continuation_tokens)])
    violations.raise_if_any()
    readings: list[_Reading] = []
    for i, item in enumerate(items):
        readings += await _readings(model, item, params, bounds, hello, index=i)
    return await _run(service, call, model, params, readings, len(items))


async def _readings(
    model: ServedModel, item: ScoreItem, params: SamplingParams, bounds: Bounds, hello: wire.Hello, *, index: int
) -> list[_Reading]:
    where = f"items[{index}]"
    out: list[_Reading] = []
    context = item.context
    rendered = render(model, context, field=f"{where}.context") if isinstance(context, Conversation) else None
    text = rendered.text if rendered is not None else context if isinstance(context, str) else None
    begun = Sequenced(ids=())
    if context is None:
        if model.tokenizer.bos_id is None or model.is_seq2seq:
            todo = "Give a context."
            why = "an encoder-decoder reads it" if model.is_seq2seq else "this model has no begin token"
            raise invalid(f"{where}.context", f"must be set: {why}", code="empty_prompt", todo=todo)
        head: list[int] = [model.tokenizer.bos_id]
    elif model.is_seq2seq and rendered is None:
        begun, text = (await prepare(model, context, params, bounds, field=f"{where}.context")).packed, None
        head = list(begun.ids)
    elif rendered is not None:
        head = await encode_conversation(model, rendered, field=f"{where}.context")
    elif text is not None:
        head = await encode(model, text, special=True, field=f"{where}.context")
    else:
        head = list((await prepare(model, context, params, bounds, field=f"{where}.context")).ids)
    for j, continuation in enumerate(item.continuations):
        name = f"{where}.continuations[{j}]"
        if not continuation:
            raise invalid(name, "must not be empty", given="")
        if text is not None:
            # Tokenised together: a token may span the seam, and then belongs to the continuation.
            if rendered is not None:
                whole = Rendered(text + continuation, rendered.literals)
                ids = await encode_conversation(model, whole, field=name)
            else:
                ids = await encode(model, text + continuation, special=True, field=name)
            start = _common(head, ids)
        else:
            ids = [*head, *await encode(model, continuation, special=False, field=name)]
            start = len(head)
        size = len(continuation.encode())
        out.append(_Reading(item=index, ids=ids, start=start, byte_count=size, begun=begun))
    for j, tokens in enumerate(item.continuation_tokens):
        name = f"{where}.continuation_tokens[{j}]"
        if not tokens:
            raise invalid(name, "must not be empty", given=[])
        checked = check_ids(tokens, bounds, field=name)
        size = sum(len(model.texts.bytes_of(token)) for token in checked)
        out.append(_Reading(item=index, ids=[*head, *checked], start=len(head), byte_count=size, begun=begun))
    for reading in out:
        _check_size(reading, bounds, hello, where=where)
    return out


def _check_size(reading: _Reading, bounds: Bounds, hello: wire.Hello, *, where: str) -> None:
    sources, window = [len(source) for source in reading.begun.sources], bounds.max_context
    if reading.start == 0 or 0 in sources:
        raise invalid(f"{where}.context", "must not be empty", given="0 tokens", code="empty_prompt")
    if sources and max(sources) > window:
        rule, given = f"must have at most {window} tokens", f"{max(sources)} tokens"
        raise invalid(f"{where}.context", rule, given=given, code="prompt_too_long")
    read = hello.block_size * source_blocks(sources, block_size=hello.block_size)
    most = min(window, max(0, hello.kv_capacity_tokens - read)) if hello.kv_capacity_tokens else window
    if len(reading.ids) > most:
        rule, given = f"must have at most {most} tokens with its continuation", f"{len(reading.ids)} tokens"
        raise invalid(where, rule, given=given, code="prompt_too_long")


def _common(head: Sequence[int], ids: Sequence[int]) -> int:
    """How many leading tokens two sequences share, the last of `ids` excepted: something must be scored."""
    size = 0
    for a, b in zip(head, ids[:-1], strict=False):
        if a != b:
            break
        size += 1
    return size


async def _run(
    service: Service, call: Call, model: ServedModel, params: SamplingParams, readings: Sequence[_Reading], items: int
) -> Scores:
    total = sum(reading.num_tokens for reading in readings)
    model.engine.check_admission(total, requests=len(readings))
    limit_s = service.time_left_s(call, model, params.time_limit_ms)
    service.limiter.spend_tokens(call.principal, total)
    sampling = to_wire(params, seed=0, max_tokens=0, end_token_ids=(), reset_token_ids=())
    results: list[list[Score]] = [[] for _ in range(items)]
    cached = 0
    call.record.prompt_tokens = total
    with contextlib.ExitStack() as stack:
        streams = []
        for reading in readings:
            sampling.prompt_logprobs_from = reading.start
            stream = service.submit(call, model, reading.packed, params, limit_s=limit_s, sampling=sampling)
            stack.enter_context(aborting(service, call, stream))
            streams.append(stream)
        for reading, stream in zip(readings, streams, strict=True):
            tokens, hit = await _read(model, stream)
            cached += hit
            results[reading.item].append(_score(reading, tokens))
    call.record.cached_tokens = cached
    return Scores(
        model=model, items=results, usage=Usage(prompt_tokens=total, generated_tokens=0, cached_tokens=cached)
    )


@contextlib.contextmanager
def aborting(service: Service, call: Call, stream: EngineStream) -> Iterator[None]:
    """Keep a stream in the table of running requests; abort what is left of it at the end."""
    service.running.add(call, stream)
    try:
        yield
    finally:
        stream.abort("disconnect")
        service.running.remove(call, stream)


async def _read(model: ServedModel, stream: EngineStream) -> tuple[list[TokenInfo], int]:
    tokens: list[TokenInfo] = []
    cached = 0
    async for delta in stream:
        if delta.HasField("started"):
            cached = delta.started.cached_tokens
        tokens += [token_info(model.texts, token) for token in delta.prompt_tokens]
        if delta.finish == wire.TIME_LIMIT:
            raise DeadlineExceeded("the time limit passed before everything was scored.", code="timeout")
        if delta.finish in (wire.ERROR, wire.CANCELLED, wire.SHUTDOWN):
            raise engine_error(delta)
    return tokens, cached


def _score(reading: _Reading, tokens: Sequence[TokenInfo]) -> Score:
    return Score(
        sum_logprob=sum(token.logprob or 0.0 for token in tokens),
        byte_count=reading.byte_count,
        is_greedy=all(token.rank == 1 for token in tokens),
        tokens=tokens,
    )
