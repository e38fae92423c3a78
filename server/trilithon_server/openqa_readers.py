"""
The readers of open questions: each takes a question and the passages that were found, and finds or writes the answer.

SPAN    an encoder marks a span of each passage; log p(z|q) + log p(span), the best of all passages.
CAUSAL  a model writes an answer to each passage; log p(a|q) = log sum_k p(z_k|q) p(a|q, z_k) of each distinct one.

Source: arXiv 2101.00408, individual top k.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trilithon.errors import DeadlineExceeded
from trilithon_server.assembly import FinishReason
from trilithon_server.generation import NO_TOKENS, Timings, Usage
from trilithon_server.knowledge.version import Hit
from trilithon_server.prompts import Sequenced
from trilithon_server.sampling_rules import META_NAMES
from trilithon_server.scoring import ScoreItem, score
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.task_run import TaskRun, off_loop
from trilithon_server.tasks.answer_format import ANSWER_END, read_answer
from trilithon_server.tasks.reading import answer_ends, answer_tokens, log_sum, marginal, pack
from trilithon_server.tasks.spans import SpanFormat
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
    An answer to each passage, weighed over all of them.

    Args:
        values: sampling parameters by JSON name; `meta` ones count for the scoring too.
    Raises:
        TrilithonError: refused, or the engine could not finish; DeadlineExceeded: before any answer was scored.
    """
    prompts, longest, truncated = await _prompts(model, question, hits, values)
    generation = await service.generate(
        call,
        model.name,
        [Sequenced(ids=ids) for ids in prompts],
        as_written(values),
        default_max_tokens=DEFAULT_TOKENS,
        field="top_k",
    )
    async with generation:
        await generation.joined()
    written = [
        ["" if choice.finish is FinishReason.TIME_LIMIT else read_answer(choice.take()[0]) for choice in part.choices]
        for part in generation.parts
    ]
    late = FinishReason.TIME_LIMIT in generation.finish_reasons
    # What decodes to no text is longer in tokens than it was; it cannot be asked about.
    tokens = {text: answer_tokens(text, model.tokenizer) for texts in written for text in texts if text}
    candidates = {text: ids for text, ids in tokens.items() if len(ids) <= longest}
    scored = await _score(service, call, model, prompts, candidates, values)
    if late and not scored.by_answer:
        raise DeadlineExceeded("the time limit passed before an answer was written.", code="timeout")
    passages = [hit.logprob for hit in hits]
    sums = {text: marginal(passages, by_passage) for text, by_passage in scored.by_answer.items()}
    answer = max(sums, key=sums.__getitem__, default="")
    of_answer = scored.by_answer.get(answer)
    evidence = [
        Evidence(
            hit=hit,
            answer_logprob=None if of_answer is None else of_answer[i],
            candidate=next((text for text in written[i] if text), ""),
            truncated=truncated[i],
        )
        for i, hit in enumerate(hits)
    ]
    return Reading(
        text=answer,
        logprob=sums.get(answer, 0.0),
        evidence=tuple(evidence),
        usage=generation.usage + scored.usage,
        timings=generation.timings,
        is_cut_off=late or len(scored.by_answer) < len(candidates),
    )


async def _prompts(
    model: ServedModel, question: str, hits: Sequence[Hit], values: Mapping[str, Any]
) -> tuple[list[list[int]], int, list[bool]]:
    """What is read of each passage, how many tokens an answer may have there, and which passages were cut."""
    hello = model.ready()
    window = min(hello.max_context_tokens, hello.kv_capacity_tokens or hello.max_context_tokens)
    wanted = values.get("max_tokens")
    # An answer that is read back may have some tokens more than it was written with.
    longest = 2 * (wanted if isinstance(wanted, int) and wanted > 0 else DEFAULT_TOKENS)
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


@dataclass(frozen=True, slots=True)
class _Scored:
    """log p(a|q, z_k) of each answer and passage, as far as there was time, and what was read for it."""

    by_answer: Mapping[str, Sequence[float]]
    usage: Usage


async def _score(
    service: Service,
    call: Call,
    model: ServedModel,
    prompts: Sequence[Sequence[int]],
    candidates: Mapping[str, Sequence[int]],
    values: Mapping[str, Any],
) -> _Scored:
    """
    Each candidate behind each prompt with each of its ends, as many at once as a request may have.

    Raises:
        DeadlineExceeded: before the first of them was scored.
    """
    meta = {name: value for name, value in values.items() if name in META_NAMES}
    ends, usage = answer_ends(model.tokenizer), NO_TOKENS
    asked = [(text, i, end) for text in candidates for i in range(len(prompts)) for end in ends]
    sums: dict[tuple[str, int], list[float]] = {}
    done = 0
    most = service.limits.max_prompts
    for part in (asked[first : first + most] for first in range(0, len(asked), most)):
        items = [ScoreItem(context=prompts[i], continuation_tokens=[[*candidates[t], *end]]) for t, i, end in part]
        try:
            scores = await score(service, call, model.name, items, meta)
        except DeadlineExceeded:
            if done < len(prompts) * len(ends):
                raise
            break
        done += len(part)
        usage += scores.usage
        for (text, i, _), (one,) in zip(part, scores.items, strict=True):
            sums.setdefault((text, i), []).append(one.sum_logprob)
    whole = list(candidates)[: done // (len(prompts) * len(ends))]
    return _Scored({text: [log_sum(sums[text, i]) for i in range(len(prompts))] for text in whole}, usage)


def as_written(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    Parameters of an answer that is written: greedy unless they say otherwise, and its line ends it.

    >>> as_written({"stop": "."})
    {'temperature': 0.0, 'stop': ['.', '\\n']}
    """
    stop = values.get("stop")
    if stop is None or isinstance(stop, str):
        stop = [stop] if stop else []
    # What is no list is for the validator.
    return {"temperature": 0.0, **values, "stop": [*stop, ANSWER_END] if isinstance(stop, list) else stop}
