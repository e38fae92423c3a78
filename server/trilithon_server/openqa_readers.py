"""
The readers of open questions: each takes a question and the passages that were found, and finds or writes the answer.

SPAN        an encoder marks a span of each passage; log p(z|q) + log p(span), the best of all passages.
CAUSAL      a decoder writes an answer to each passage; log p(a|q) = log sum_k p(z_k|q) p(a|q, z_k), of each one.
INDIVIDUAL  the same, by an encoder-decoder that was trained to read a passage.
JOINT       an encoder-decoder writes one answer to all passages, which its decoder reads together; log p(a|q, Z).

Source: arXiv 2101.00408, individual and joint top k.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trilithon_server.generation import Timings, Usage
from trilithon_server.knowledge.version import Hit
from trilithon_server.openqa_writing import Weighed, Writing, weigh
from trilithon_server.prompts import Sequenced
from trilithon_server.sampling import validate
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.task_run import TaskRun, off_loop
from trilithon_server.tasks import reader_format
from trilithon_server.tasks.answer_format import ANSWER_END, read_answer
from trilithon_server.tasks.reader_format import frame
from trilithon_server.tasks.reading import ReaderPrompt, answer_ends, answer_tokens, log_sum, pack
from trilithon_server.tasks.spans import SpanFormat
from trilithon_server.tasks.writing import literal
from trilithon_server.validation import invalid

DEFAULT_TOKENS = 32
"""Of a written answer, where a request doesn't say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """
    A passage that was read.

    Attributes:
        answer_logprob: of its own best span, or of the answer given this passage alone; None: not scored.
        start, end: of the span, characters [start, end) of the passage's text; 0 and 0 where none is marked.
        candidate: what this passage alone answers; empty: nothing.
        truncated: its end found no room.
    """

    hit: Hit
    answer_logprob: float | None = None
    start: int = 0
    end: int = 0
    candidate: str = ""
    truncated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a reader found: the answer (empty: none), its log-probability, and every passage as it was read."""

    text: str
    logprob: float
    evidence: tuple[Evidence, ...]
    usage: Usage
    timings: Timings
    is_cut_off: bool = False
    """Time ran out before every passage was read and every candidate scored."""


async def read_spans(
    service: Service, call: Call, model: ServedModel, question: str, hits: Sequence[Hit], values: Mapping[str, Any]
) -> Reading:
    """
    The best span of all passages; none where the model says of each that it holds no answer.

    Raises:
        TrilithonError: refused, or the engine could not finish.
    """
    run = TaskRun(service, call, values, None)
    _, task = await run.model(model.name, "answer")
    spans = task.format
    assert isinstance(spans, SpanFormat)
    run.found.raise_if_any()
    texts = [hit.passage.text for hit in hits]
    size = sum(map(len, texts))
    windows = await off_loop(size, lambda: [spans.encode(question, text, task.pieces) for text in texts])
    logits = iter(await run.logits(model, task, [w.encoded for one in windows for w in one], field="top_k"))
    evidence = []
    for hit, text, one in zip(hits, texts, windows, strict=True):
        found = spans.decode(text, one, [next(logits) for _ in one])
        if found.best(spans.null_threshold).strip():
            span = found.answers[0]
            rivals = [answer.score - span.score for answer in found.answers]
            logprob = -log_sum([*rivals, found.null_margin])
            place = Evidence(hit=hit, answer_logprob=logprob, start=span.start, end=span.end, candidate=span.text)
        else:
            place = Evidence(hit=hit)
        evidence.append(place)
    best = max(evidence, key=_of_span)
    told = run.told(model)
    return Reading(
        text=best.candidate,
        logprob=_of_span(best) if best.candidate else 0.0,
        evidence=tuple(evidence),
        usage=told.usage,
        timings=told.timings,
    )


def _of_span(place: Evidence) -> float:
    return -math.inf if place.answer_logprob is None else place.hit.logprob + place.answer_logprob


async def write_answers(
    service: Service, call: Call, model: ServedModel, question: str, hits: Sequence[Hit], values: Mapping[str, Any]
) -> Reading:
    """
    An answer to each passage in a decoder's own words, weighed over all of them.

    Args:
        values: sampling parameters by JSON name; `meta` ones count for the scoring too.
    Raises:
        TrilithonError: refused, or the engine could not finish; DeadlineExceeded: before any answer was scored.
    """
    values = as_written(model, values)
    params = validate(values, model.bounds(call.principal, model.ready()))
    prompts, longest, truncated = await _prompts(model, question, hits, params.max_tokens or DEFAULT_TOKENS)
    writing = Writing(
        prompts=[Sequenced(ids=ids) for ids in prompts],
        logprobs=[hit.logprob for hit in hits],
        default_tokens=DEFAULT_TOKENS,
        read=read_answer,
        tokens=lambda answer: answer_tokens(answer, model.tokenizer),
        ends=answer_ends(model.tokenizer),
        longest=longest,
    )
    weighed = await weigh(service, call, model, writing, values, field="top_k")
    return _apart(weighed, hits, truncated)


async def read_apart(
    service: Service, call: Call, model: ServedModel, question: str, hits: Sequence[Hit], values: Mapping[str, Any]
) -> Reading:
    """
    An encoder-decoder's answer to each passage, weighed over all of them.

    Args, raises: as `write_answers`.
    """
    passages = await _passages(model, question, hits)
    sources = [passage.tokens for passage in passages]
    writing = _reader_writing(model, [[source] for source in sources], [hit.logprob for hit in hits])
    weighed = await weigh(service, call, model, writing, as_written(model, values), field="top_k")
    return _apart(weighed, hits, [passage.truncated for passage in passages])


async def read_together(
    service: Service, call: Call, model: ServedModel, question: str, hits: Sequence[Hit], values: Mapping[str, Any]
) -> Reading:
    """
    An encoder-decoder's answer to all passages, which its decoder reads together, the likely ones more.

    Args, raises: as `write_answers`.
    """
    passages = await _passages(model, question, hits)
    assert model.reader is not None
    strength = model.reader.strength
    biases = [strength * math.exp(hit.logprob) for hit in hits] if strength else []
    writing = _reader_writing(model, [[passage.tokens for passage in passages]], [0.0], biases=biases)
    weighed = await weigh(service, call, model, writing, as_written(model, values), field="top_k")
    return Reading(
        text=weighed.text,
        logprob=weighed.logprob,
        evidence=tuple(Evidence(hit=h, truncated=p.truncated) for h, p in zip(hits, passages, strict=True)),
        usage=weighed.usage,
        timings=weighed.timings,
        is_cut_off=weighed.is_cut_off,
    )


def _apart(weighed: Weighed, hits: Sequence[Hit], truncated: Sequence[bool]) -> Reading:
    """What was found where each passage had a prompt of its own."""
    evidence = [
        Evidence(
            hit=hit,
            answer_logprob=None if weighed.by_prompt is None else weighed.by_prompt[i],
            candidate=next((text for text in weighed.written[i] if text), ""),
            truncated=truncated[i],
        )
        for i, hit in enumerate(hits)
    ]
    return Reading(
        text=weighed.text,
        logprob=weighed.logprob,
        evidence=tuple(evidence),
        usage=weighed.usage,
        timings=weighed.timings,
        is_cut_off=weighed.is_cut_off,
    )


async def _passages(model: ServedModel, question: str, hits: Sequence[Hit]) -> list[ReaderPrompt]:
    """What an encoder reads of each passage."""
    reader = model.reader
    assert reader is not None

    def work() -> list[ReaderPrompt]:
        return [reader.pack(question, hit.passage.title, hit.passage.text, model.tokenizer) for hit in hits]

    return await asyncio.to_thread(work)


def _reader_writing(
    model: ServedModel,
    prompts: Sequence[Sequence[Sequence[int]]],
    logprobs: Sequence[float],
    *,
    biases: Sequence[float] = (),
) -> Writing:
    """Prompts of an encoder-decoder, by what its encoder reads for each."""
    assert model.reader is not None
    assert model.decoder_start_id is not None
    _, end = frame(model.tokenizer)
    begun = [model.decoder_start_id]
    return Writing(
        prompts=[Sequenced(ids=begun, sources=sources, biases=biases) for sources in prompts],
        logprobs=logprobs,
        default_tokens=model.reader.max_answer_tokens,
        read=reader_format.read_answer,
        tokens=lambda answer: literal(answer, model.tokenizer),
        ends=[[end]],
        longest=model.ready().max_context_tokens - len(begun) - 1,
    )


async def _prompts(
    model: ServedModel, question: str, hits: Sequence[Hit], max_tokens: int
) -> tuple[list[list[int]], int, list[bool]]:
    """What is read of each passage, how many tokens an answer may have there, and which passages were cut."""
    hello = model.ready()
    window = min(hello.max_context_tokens, hello.kv_capacity_tokens or hello.max_context_tokens)
    # An answer that is read back may have some tokens more than it was written with.
    longest = 2 * max_tokens
    end = max(map(len, answer_ends(model.tokenizer)))

    def work() -> list[tuple[list[int], bool]]:
        tokenizer, room = model.tokenizer, window - longest - end
        packed = (pack(question, hit.passage.title, hit.passage.text, tokenizer, room=room) for hit in hits)
        return [(list(one.tokens), one.truncated) for one in packed]

    try:
        packed = await asyncio.to_thread(work)
    except ValueError:
        rule = f"must leave room for a passage in the {window} tokens of the model"
        raise invalid(
            "question", rule, given=f"{len(question)} characters", code="prompt_too_long", todo="Lower `max_tokens`."
        ) from None
    return [ids for ids, _ in packed], longest, [cut for _, cut in packed]


def as_written(model: ServedModel, values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of an answer that is written: greedy unless they say otherwise; its line or its end token ends it."""
    if model.is_seq2seq:
        name, end = "stop_token_ids", frame(model.tokenizer)[1]
        stop: Any = values.get(name) or []
        end_of_answer: Any = end
    else:
        name, stop, end_of_answer = "stop", values.get("stop"), ANSWER_END
        if stop is None or isinstance(stop, str):
            stop = [stop] if stop else []
    # What is no list is for the validator.
    return {"temperature": 0.0, **values, name: [*stop, end_of_answer] if isinstance(stop, list) else stop}
