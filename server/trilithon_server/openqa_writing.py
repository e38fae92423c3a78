"""
Answers that a model writes to passages, weighed: each distinct one is read back behind every prompt.

    log p(a|q) = log sum_k p(z_k|q) p(a|q, z_k)

Source: arXiv 2101.00408, individual top k. One prompt with all passages is the case of K = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trilithon.errors import DeadlineExceeded
from trilithon_server.assembly import FinishReason
from trilithon_server.generation import NO_TOKENS, Timings, Usage
from trilithon_server.prompts import Sequenced
from trilithon_server.sampling_rules import META_NAMES
from trilithon_server.scoring import ScoreItem, score
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.tasks.reading import log_sum, marginal


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """
    What answers are written to, and how they are read.

    Attributes:
        prompts: K of them. logprobs: of each prompt's passage, log p(z|q).
        default_tokens: of an answer, where a request doesn't say.
        read: the answer in what was written; empty: none.
        tokens: of an answer, without its end. ends: what may end one.
        longest: tokens of an answer that fit behind a prompt; what is longer is not weighed.
    """

    prompts: Sequence[Sequenced]
    logprobs: Sequence[float]
    default_tokens: int
    read: Callable[[str], str]
    tokens: Callable[[str], list[int]]
    ends: Sequence[Sequence[int]]
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """
    The best answer.

    Attributes:
        text: empty: none was written. logprob: 0 where there is none.
        by_prompt: log p(a|q, z_k); None where there is no answer.
        written: what each prompt's draws say.
        is_cut_off: time ran out before everything was written and weighed.
    """

    text: str
    logprob: float
    by_prompt: Sequence[float] | None
    written: Sequence[Sequence[str]]
    usage: Usage
    timings: Timings
    is_cut_off: bool


async def weigh(
    service: Service, call: Call, model: ServedModel, writing: Writing, values: Mapping[str, Any], *, field: str
) -> Weighed:
    """
    Have answers written to every prompt, and weigh each over all of them.

    Args:
        values: sampling parameters by JSON name, complete; `meta` ones count for the scoring too.
        field: what a request is told of where there are too many prompts, or too large ones.
    Raises:
        TrilithonError: refused, or the engine could not finish; DeadlineExceeded: before any answer was scored.
    """
    generation = await service.generate(
        call, model.name, writing.prompts, values, default_max_tokens=writing.default_tokens, field=field
    )
    async with generation:
        await generation.joined()
    written = [
        ["" if choice.finish is FinishReason.TIME_LIMIT else writing.read(choice.take()[0]) for choice in part.choices]
        for part in generation.parts
    ]
    late = FinishReason.TIME_LIMIT in generation.finish_reasons
    # What decodes to no text is longer in tokens than it was; it cannot be asked about.
    tokens = {text: writing.tokens(text) for texts in written for text in texts if text}
    candidates = {text: ids for text, ids in tokens.items() if len(ids) <= writing.longest}
    scored = await _score(service, call, model, writing, candidates, values)
    if late and not scored.by_answer:
        raise DeadlineExceeded("the time limit passed before an answer was written.", code="timeout")
    sums = {text: marginal(writing.logprobs, by_prompt) for text, by_prompt in scored.by_answer.items()}
    answer = max(sums, key=sums.__getitem__, default="")
    return Weighed(
        text=answer,
        logprob=sums.get(answer, 0.0),
        by_prompt=scored.by_answer.get(answer),
        written=written,
        usage=generation.usage + scored.usage,
        timings=generation.timings,
        is_cut_off=late or len(scored.by_answer) < len(candidates),
    )


@dataclass(frozen=True, slots=True)
class _Scored:
    """log p(a|q, z_k) of each answer and prompt, as far as there was time, and what was read for it."""

    by_answer: Mapping[str, Sequence[float]]
    usage: Usage


async def _score(
    service: Service,
    call: Call,
    model: ServedModel,
    writing: Writing,
    candidates: Mapping[str, Sequence[int]],
    values: Mapping[str, Any],
) -> _Scored:
    """
    Each candidate behind each prompt with each of its ends, as many at once as a request may have.

    Raises:
        DeadlineExceeded: before the first of them was scored.
    """
    meta = {name: value for name, value in values.items() if name in META_NAMES}
    prompts, ends, usage = writing.prompts, writing.ends, NO_TOKENS
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
