"""One request's way through encoders with task heads: admitted at once, awaited together, counted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from trilithon.errors import DeadlineExceeded, InvalidArgument
from trilithon_server.adapters import MAX_SHOWN
from trilithon_server.assembly import engine_error
from trilithon_server.engine import wire_pb2 as wire
from trilithon_server.engine_client import EngineStream
from trilithon_server.generation import Timings, Usage
from trilithon_server.prompts import INLINE_CHARS, Sequenced
from trilithon_server.sampling import SamplingParams, validate
from trilithon_server.scoring import aborting
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.task_model import TaskCapability, TaskModel
from trilithon_server.tasks.pieces import Encoded
from trilithon_server.validation import Violations, is_text

Logits = npt.NDArray[np.float32]
T = TypeVar("T")

_VERBS: Mapping[TaskCapability, str] = {
    "annotate": "annotate",
    "relations": "find relations",
    "answer": "answer questions",
    "classify": "classify",
    "propose": "propose answers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What every answer says beside its result."""

    model: ServedModel
    usage: Usage
    timings: Timings


@dataclass(slots=True)
class TaskRun:
    """One request's way through the engines: who may ask, what was counted, where the time went."""

    service: Service
    call: Call
    values: Mapping[str, Any]
    given: Violations | None
    found: Violations = field(init=False)
    params: SamplingParams = field(init=False)
    tokens: int = 0
    queue_ms: float | None = None
    prefill_ms: float = 0.0

    def __post_init__(self) -> None:
        self.found = self.given if self.given is not None else Violations()

    async def model(self, name: str, capability: TaskCapability) -> tuple[ServedModel, TaskModel]:
        """The model of that name; parameters are checked against it."""
        model = await self.service.resolve(name, self.call)
        if model.task is None or model.task.capability != capability:
            can = f"model `{model.name}` cannot {_VERBS[capability]}. It can: {', '.join(model.capabilities)}."
            raise InvalidArgument(f"{can} {await self._able(capability)}", code="unsupported_model")
        bounds = model.bounds(self.call.principal, model.ready())
        self.params = validate(self.values, bounds, self.found)
        return model, model.task

    async def _able(self, capability: TaskCapability) -> str:
        listed = await self.service.names.listing(self.call.principal.tenant)
        names = [f"`{row['id']}`" for row in listed if capability in row["capabilities"]]
        more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
        return f"Models that can: {', '.join(names[:MAX_SHOWN])}{more}." if names else "None that is served here can."

    def check_texts(self, name: str, texts: Sequence[str], *, single: bool = False, beside: int = 0) -> None:
        """Number, size and soundness; `beside` characters are in the request already."""
        limits = self.service.limits
        if not 1 <= len(texts) <= limits.max_extract_texts:
            self.found.add(name, f"must hold from 1 to {limits.max_extract_texts} texts", given=len(texts))
        size = sum(map(len, texts)) + beside
        if size > limits.max_extract_chars:
            rule = f"must have at most {limits.max_extract_chars} characters in all"
            self.found.add(name, rule, given=size, code="prompt_too_long", todo="Send fewer texts in one request.")
        for i, text in enumerate(texts[: limits.max_extract_texts]):
            where = name if single else f"{name}[{i}]"
            if not text:
                self.found.add(where, "must not be empty", given="", code="empty_prompt")
            elif not is_text(text):
                self.found.add(where, "must be sound Unicode (it holds half of a surrogate pair)")

    async def logits(
        self, model: ServedModel, task: TaskModel, sequences: Sequence[Encoded], *, field: str
    ) -> list[Logits]:
        """The task head's logits [T, L] or [1, L] of each sequence; all of them are in the engine at once."""
        service, call = self.service, self.call
        most = min(service.limits.max_extract_windows, service.limits.max_queue_requests)
        if len(sequences) > most:
            rule = f"must make at most {most} sequences of {task.format.max_tokens} tokens"
            self.found.add(field, rule, given=len(sequences), code="prompt_too_long", todo="Send less in one request.")
            self.found.raise_if_any()
        total = sum(len(one.tokens) for one in sequences)
        self.tokens += total
        call.record.prompt_tokens += total
        model.engine.check_admission(total, requests=len(sequences))
        limit_s = service.time_left_s(call, model, self.params.time_limit_ms)
        service.limiter.spend_tokens(call.principal, total)
        how = wire.Pooling(task_logits=True)
        with contextlib.ExitStack() as stack:
            streams = []
            for one in sequences:
                packed = Sequenced(ids=one.tokens, types=one.types)
                stream = service.submit(call, model, packed, self.params, limit_s=limit_s, pooling=how)
                stack.enter_context(aborting(service, call, stream))
                streams.append(stream)
            return [await self._read(stream, columns=task.num_labels) for stream in streams]

    async def _read(self, stream: EngineStream, *, columns: int) -> Logits:
        packed = b""
        async for delta in stream:
            if delta.finish == wire.TIME_LIMIT:
                raise DeadlineExceeded("the time limit passed before every text was read.", code="timeout")
            if delta.finish in (wire.ERROR, wire.CANCELLED, wire.SHUTDOWN):
                raise engine_error(delta)
            packed += delta.task_logits
            times = delta.timings
            self.queue_ms = times.queue_ms if self.queue_ms is None else min(self.queue_ms, times.queue_ms)
            self.prefill_ms = max(self.prefill_ms, times.queue_ms + times.prefill_ms)
        return np.frombuffer(packed, np.dtype("<f4")).reshape(-1, columns)

    def told(self, model: ServedModel) -> Told:
        """The end of the request."""
        queue_ms = self.queue_ms or 0.0
        record = self.call.record
        record.model = model.name
        record.queue_s, record.prefill_s = queue_ms / 1000, max(0.0, self.prefill_ms - queue_ms) / 1000
        return Told(
            model=model,
            usage=Usage(prompt_tokens=self.tokens, generated_tokens=0, cached_tokens=0),
            timings=Timings(
                queue_ms=queue_ms,
                prefill_ms=max(0.0, self.prefill_ms - queue_ms),
                first_token_ms=0.0,
                decode_ms=0.0,
                total_ms=1000 * (time.monotonic() - self.call.arrived_s),
            ),
        )


async def off_loop(chars: int, work: Callable[[], T]) -> T:
    """Short work at once, long work in a thread: the loop serves others meanwhile."""
    return work() if chars <= INLINE_CHARS else await asyncio.to_thread(work)
