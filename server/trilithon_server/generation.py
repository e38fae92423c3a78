"""
One generation in flight: one or more prompts, each an engine request with one or more sequences.

It is an asynchronous context manager. Whatever ends it early - the client left, a deadline, an error of one prompt -
leaving the context aborts what the engine still holds, so no blocks outlive the call (bar R6).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from trilithon.errors import Cancelled, DeadlineExceeded, TrilithonError
from trilithon_server.assembly import Choice, FinishReason, TokenInfo, token_info
from trilithon_server.engine import wire_pb2 as wire
from trilithon_server.engine_client import EngineStream
from trilithon_server.metrics import Metrics
from trilithon_server.prompts import Prepared
from trilithon_server.sampling import SamplingParams
from trilithon_server.served import Call, ServedModel

PUMP_DEPTH = 64
"""Deltas that wait for the reader when several prompts are merged; beyond it the streams hold them."""

BACKSTOP_S = 10.0
"""Over its time limit by this much, a request is ended here: the engine should have done so long before."""


@dataclass(slots=True, kw_only=True)
class Part:
    """One prompt of a generation and what the engine has said of it."""

    prepared: Prepared
    stream: EngineStream
    choices: list[Choice]
    started: bool = False
    cached_tokens: int = 0
    prompt_tokens: Sequence[TokenInfo] = ()

    @property
    def done(self) -> bool:
        """Whether every answer has its finish reason."""
        return all(choice.finish is not None for choice in self.choices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    preemptions: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Of both."""
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            generated_tokens=self.generated_tokens + other.generated_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            preemptions=self.preemptions + other.preemptions,
        )


NO_TOKENS = Usage(prompt_tokens=0, generated_tokens=0, cached_tokens=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time went, in milliseconds from arrival; the fields of `trilithon.api.v1.Timings`."""

    queue_ms: float
    prefill_ms: float
    first_token_ms: float
    decode_ms: float
    total_ms: float


class Generation:
    """
    What `Service.generate` returns: admitted, and not yet read.

    Args:
        call: of the client.
        model: that answers.
        fingerprint: of the server, for the answer.
        params: as validated.
        parts: one per prompt, submitted.
        limit_s: after which the engine ends it by itself.
        on_close: called once, when it leaves the service's table.
    """

    def __init__(
        self,
        *,
        call: Call,
        model: ServedModel,
        fingerprint: str,
        params: SamplingParams,
        parts: list[Part],
        limit_s: float,
        metrics: Metrics,
        on_close: Callable[[Generation], None],
    ) -> None:
        self.call = call
        self.model = model
        self.fingerprint = fingerprint
        self.params = params
        self.parts = parts
        self._metrics = metrics
        self._inter_token = metrics.inter_token(model.label)
        self._on_close = on_close
        self._closed = False
        self._abort_cause = ""
        self._submitted_s = time.monotonic()
        self._queue_s: float | None = None
        self._first_token_s: float | None = None
        self._last_token_s = 0.0
        self._preemptions = 0
        self._dropped_tokens = 0
        self._backstop = asyncio.get_running_loop().call_later(limit_s + BACKSTOP_S, self._overdue)

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("cancelled" if isinstance(error, Cancelled) else "disconnect")

    # -- reading --------------------------------------------------------------------------------------------

    async def news(self) -> AsyncGenerator[tuple[Part, Choice | None], None]:
        """
        Each time there is news: the prompt, and the answer that has more; None when a prompt has only started.

        A prompt's start is told before its first answer, and after its own log-probabilities are known.

        Raises:
            TrilithonError: the engine could not finish, or the request was aborted.
        """
        if len(self.parts) == 1:
            part = self.parts[0]
            async for delta in part.stream:
                for item in self._take(part, delta):
                    yield item
                if part.done:
                    return
            return
        async with contextlib.aclosing(self._merged()) as merged:
            async for part, delta in merged:
                for item in self._take(part, delta):
                    yield item

    async def joined(self) -> None:
        """Read to the end; the answers are then whole, and with `best_of` only the best are left."""
        async with contextlib.aclosing(self.news()) as news:
            async for _ in news:
                pass
        self.keep_best()

    def keep_best(self) -> None:
        """Of answers that are whole, leave those that `best_of` is for; others stay as they are."""
        if self.params.num_told > self.params.n:
            for part in self.parts:
                kept = best(part.choices, self.params.n)
                self._dropped_tokens += sum(c.generated for c in part.choices) - sum(c.generated for c in kept)
                part.choices = kept

    async def _merged(self) -> AsyncGenerator[tuple[Part, wire.SequenceDelta], None]:
        queue: asyncio.Queue[tuple[Part, wire.SequenceDelta | BaseException | None]] = asyncio.Queue(PUMP_DEPTH)

        async def pump(part: Part) -> None:
            try:
                async for delta in part.stream:
                    await queue.put((part, delta))
                await queue.put((part, None))
            except TrilithonError as error:
                await queue.put((part, error))

        pumps = [asyncio.create_task(pump(part)) for part in self.parts]
        ended: set[int] = set()
        try:
            while len(ended) < len(self.parts):
                part, item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is not None:
                    yield part, item
                if item is None or part.done:
                    ended.add(id(part))
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def _take(self, part: Part, delta: wire.SequenceDelta) -> tuple[tuple[Part, Choice | None], ...]:
        """What a delta is news of; this runs for every token, so the common case comes first."""
        began: tuple[tuple[Part, Choice | None], ...] = ()
        if not part.started or delta.finish:
            began = self._begin_or_end(part, delta)
        choice = part.choices[delta.index]
        if choice.finish is not None or not (delta.tokens or delta.finish):
            return began
        if delta.tokens:
            now = self._last_token_s = time.monotonic()
            if choice.last_event_s:
                self._inter_token.observe(now - choice.last_event_s)
            elif self._first_token_s is None:
                self._first_token_s = now
            choice.last_event_s = now
        if choice.feed(delta):
            part.stream.abort_sequence(delta.index)
        if choice.finish is not None or len(choice.new_ids) >= self.params.stream_interval:
            return (*began, (part, choice))
        return began

    def _begin_or_end(self, part: Part, delta: wire.SequenceDelta) -> tuple[tuple[Part, None], ...]:
        """A prompt's first deltas and its last; tells its start once, when everything about the prompt is known."""
        if delta.HasField("started"):
            part.cached_tokens = delta.started.cached_tokens
            if self._queue_s is None:
                self._queue_s = self._submitted_s - self.call.arrived_s + delta.started.queue_ms / 1000
        if delta.prompt_tokens:
            part.prompt_tokens = self._prompt_infos(part, delta.prompt_tokens)
        if delta.finish:
            self._preemptions = max(self._preemptions, delta.timings.preemptions)
            if delta.finish == wire.TIME_LIMIT and self._queue_s is None:
                raise DeadlineExceeded("the time limit passed while the request was queued.", code="timeout")
            if delta.finish == wire.CANCELLED and self._abort_cause == "overdue":
                raise DeadlineExceeded("the time limit passed.", code="timeout")
        complete = self.params.prompt_logprobs is None or delta.tokens or delta.finish or delta.prompt_tokens
        if part.started or not complete:
            return ()
        part.started = True
        return ((part, None),)

    def _prompt_infos(self, part: Part, tokens: Sequence[wire.Token]) -> list[TokenInfo]:
        """The prompt's tokens; nothing comes before the first, so it has no log-probability."""
        first = TokenInfo(part.prepared.ids[0], self.model.texts.text_of(part.prepared.ids[0]))
        infos, offset = [first], len(first.text)
        for token in tokens:
            infos.append(token_info(self.model.texts, token, offset=offset))
            offset += len(infos[-1].text)
        return infos

    # -- ending ---------------------------------------------------------------------------------------------

    def abort(self, cause: str) -> bool:
        """Ask the engine to drop what is not finished; True when there was something. Idempotent."""
        open_parts = [part for part in self.parts if not part.done and not part.stream.finished]
        if open_parts and not self._abort_cause:
            self._abort_cause = cause
            self._metrics.aborted(self.model.label, cause, self.phase)
        for part in open_parts:
            part.stream.abort(cause)
        return bool(open_parts)

    def close(self, cause: str) -> None:
        """Leave the service: abort what is open, fill in the record. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._backstop.cancel()
        self.abort(cause)
        record, usage, now = self.call.record, self.usage, time.monotonic()
        record.prompt_tokens += usage.prompt_tokens
        record.generated_tokens += usage.generated_tokens
        record.cached_tokens += usage.cached_tokens
        finishes = [choice.finish for part in self.parts for choice in part.choices if choice.finish is not None]
        record.finish_reason = finishes[0].value if finishes else ""
        arrived_s = self.call.arrived_s
        if record.queue_s is not None and self._first_token_s is not None:  # a later step of the same call
            record.decode_s = (record.decode_s or 0.0) + self._last_token_s - self._first_token_s
        elif record.queue_s is None and self._queue_s is not None:
            record.queue_s = self._queue_s
            if self._first_token_s is not None:
                record.first_token_s = self._first_token_s - arrived_s
                record.prefill_s = max(0.0, record.first_token_s - self._queue_s)
                record.decode_s = self._last_token_s - self._first_token_s
            else:
                record.prefill_s = now - arrived_s - self._queue_s
        self._on_close(self)

    def _overdue(self) -> None:
        self.abort("overdue")
        for part in self.parts:
            part.stream.fail(DeadlineExceeded("the time limit passed.", code="timeout"))

    # -- counting -------------------------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        """queued, prefill or decode."""
        if self._first_token_s is not None:
            return "decode"
        return "queued" if self._queue_s is None else "prefill"

    @property
    def choices(self) -> list[Choice]:
        """Every answer, in the order of the prompts."""
        return [choice for part in self.parts for choice in part.choices]

    @property
    def finish_reasons(self) -> list[FinishReason | None]:
        """Of every answer so far."""
        return [choice.finish for choice in self.choices]

    @property
    def usage(self) -> Usage:
        """Tokens so far; sequences that `best_of` dropped count too."""
        return Usage(
            prompt_tokens=sum(len(part.prepared.ids) for part in self.parts),
            generated_tokens=self._dropped_tokens + sum(choice.generated for choice in self.choices),
            cached_tokens=sum(part.cached_tokens for part in self.parts),
            preemptions=self._preemptions,
        )

    @property
    def timings(self) -> Timings:
        """So far."""
        now, arrived = time.monotonic(), self.call.arrived_s
        queue_s = self._queue_s or 0.0
        first_s = (self._first_token_s or now) - arrived
        return Timings(
            queue_ms=1000 * queue_s,
            prefill_ms=1000 * max(0.0, first_s - queue_s),
            first_token_ms=1000 * first_s if self._first_token_s is not None else 0.0,
            decode_ms=1000 * (self._last_token_s - self._first_token_s) if self._first_token_s is not None else 0.0,
            total_ms=1000 * (now - arrived),
        )


def best(choices: Sequence[Choice], n: int) -> list[Choice]:
    """The `n` answers with the highest cumulative log-probability, best first; ties keep their order."""
    base = choices[0].index
    ranked = sorted(choices, key=lambda choice: -choice.cumulative_logprob)[:n]
    for position, choice in enumerate(ranked):
        choice.index = base + position
    return ranked
