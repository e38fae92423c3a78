"""Vectors for texts, from an encoder model; the engine batches them by itself."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trilithon.errors import DeadlineExceeded
from trilithon_server.assembly import engine_error
from trilithon_server.engine import wire_pb2 as wire
from trilithon_server.engine_client import EngineStream
from trilithon_server.generation import Usage
from trilithon_server.prompts import Conversation, Prepared, Prompt, Sequenced, prepare
from trilithon_server.sampling import validate
from trilithon_server.scoring import aborting
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.validation import Violations, nearest

POOLINGS = {"mean": wire.Pooling.MEAN, "last": wire.Pooling.LAST, "first": wire.Pooling.FIRST}


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """One input's vector and its number of tokens."""

    values: Sequence[float]
    tokens: int


async def embed(
    service: Service,
    call: Call,
    model_name: str,
    inputs: Sequence[Prompt],
    values: Mapping[str, Any],
    *,
    pooling: str | None = None,
    normalize: bool | None = None,
    dimensions: int = 0,
    found: Violations | None = None,
) -> tuple[ServedModel, list[Embedding], Usage]:
    """
    One vector per input, and the model that made them.

    Args:
        inputs: 1 to `limits.max_embedding_inputs` texts or lists of token ids.
        values: parameters by JSON name; those of the request itself matter here.
        pooling: mean, last or first; None = the model's own.
        normalize: scale to unit length; None = the model's own.
        dimensions: keep only this many leading values; 0 = all.
        found: violations that the front has already found.
    Raises:
        TrilithonError: refused, or the engine could not finish.
    """
    violations = found if found is not None else Violations()
    model = await service.resolve(model_name, call, able="embed")
    model.require("embed")
    hello = model.ready()
    bounds = model.bounds(call.principal, hello)
    params = validate(values, bounds, violations)
    most = service.limits.max_embedding_inputs
    if not 1 <= len(inputs) <= most:
        violations.add("input", f"must hold from 1 to {most} inputs", given=len(inputs))
    if any(isinstance(item, Conversation) for item in inputs):
        violations.add("input", "must be text or token ids")
    if pooling is not None and pooling not in POOLINGS:
        hint = nearest(str(pooling), POOLINGS).strip()
        violations.add("pooling", "must be one of mean, last, first", given=pooling, todo=hint)
    if not 0 <= dimensions <= hello.hidden_size:
        violations.add("dimensions", f"must be from 1 to {hello.hidden_size}", given=dimensions)
    violations.raise_if_any()
    prepared: list[Prepared] = []
    for i, item in enumerate(inputs):
        name = "input" if len(inputs) == 1 else f"input[{i}]"
        ready = await prepare(model, item, params, bounds, field=name)
        if not 1 <= len(ready.ids) <= bounds.max_context:
            code = "prompt_too_long" if ready.ids else "empty_prompt"
            todo = "Set `truncate_prompt_tokens`." if ready.ids else ""
            rule = f"must have from 1 to {bounds.max_context} tokens"
            violations.add(name, rule, given=f"{len(ready.ids)} tokens", code=code, todo=todo)
        prepared.append(ready)
    violations.raise_if_any()
    total = sum(len(ready.ids) for ready in prepared)
    call.record.prompt_tokens += total
    model.engine.check_admission(total, requests=len(prepared))
    limit_s = service.time_left_s(call, model, params.time_limit_ms)
    service.limiter.spend_tokens(call.principal, total)
    unit = model.normalize if normalize is None else normalize
    how = wire.Pooling(kind=POOLINGS[pooling or model.pooling], normalize=unit)
    out: list[Embedding] = []
    with contextlib.ExitStack() as stack:
        streams = []
        for ready in prepared:
            packed = Sequenced(ids=ready.ids)
            stream = service.submit(call, model, packed, params, limit_s=limit_s, pooling=how)
            stack.enter_context(aborting(service, call, stream))
            streams.append(stream)
        for ready, stream in zip(prepared, streams, strict=True):
            vector = await _read(stream)
            out.append(Embedding(values=shorten(vector, dimensions, unit=unit), tokens=len(ready.ids)))
    return model, out, Usage(prompt_tokens=total, generated_tokens=0, cached_tokens=0)


def shorten(vector: Sequence[float], dimensions: int, *, unit: bool) -> list[float]:
    """
    The leading values, scaled to unit length again when the whole vector was.

    >>> shorten([3.0, 4.0, 12.0], 2, unit=True)
    [0.6, 0.8]
    """
    if dimensions in (0, len(vector)):
        return list(vector)
    head = list(vector[:dimensions])
    length = math.sqrt(sum(value * value for value in head))
    return [value / length for value in head] if unit and length > 0 else head


async def _read(stream: EngineStream) -> list[float]:
    vector: list[float] = []
    async for delta in stream:
        if delta.finish == wire.TIME_LIMIT:
            raise DeadlineExceeded("the time limit passed before every input was embedded.", code="timeout")
        if delta.finish in (wire.ERROR, wire.CANCELLED, wire.SHUTDOWN):
            raise engine_error(delta)
        vector += delta.embedding
    return vector
