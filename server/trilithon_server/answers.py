"""
Answers of the native API as plain dictionaries, with the field names of `trilithon.api.v1`.

Both protocols are made from them - JSON as it stands, protobuf by its constructors - so they cannot differ (bar E3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from trilithon_server.assembly import Choice, TokenInfo
from trilithon_server.generation import Generation, Part, Timings, Usage
from trilithon_server.scoring import Score, Scores
from trilithon_server.tokens import Tokenized


def token(info: TokenInfo, *, offsets: bool = False) -> dict[str, Any]:
    """TokenInfo"""
    out: dict[str, Any] = {"id": info.id, "text": info.text, "logprob": info.logprob, "rank": info.rank}
    if info.top:
        out["top"] = [token(rival) for rival in info.top]
    if offsets:
        out["text_offset"] = info.offset
    return out


def choice_news(choice: Choice, *, offsets: bool) -> dict[str, Any]:
    """Choice: what is new since the last call; the whole of it at the end of a joined answer."""
    text, tokens, _ = choice.take()
    out: dict[str, Any] = {
        "index": choice.index,
        "text": text,
        "finish_reason": choice.finish.value if choice.finish is not None else None,
        "seed": choice.seed,
        "cumulative_logprob": choice.cumulative_logprob,
        "generated_tokens": choice.generated,
    }
    if tokens:
        out["tokens"] = [token(info, offsets=offsets) for info in tokens]
    if choice.finish is not None:
        out["matched_stop"] = choice.matched_stop
        out["matched_token_id"] = choice.matched_token_id
        out["constraint_complete"] = choice.constraint_complete
    return out


def usage(counts: Usage) -> dict[str, Any]:
    """Usage"""
    return dataclasses.asdict(counts)


def timings(times: Timings) -> dict[str, Any]:
    """Timings"""
    return {name: round(value, 3) for name, value in dataclasses.asdict(times).items()}


def generated(generation: Generation) -> dict[str, Any]:
    """GenerateResponse"""
    offsets = generation.params.return_offsets
    part = generation.parts[0]
    return {
        "request_id": generation.call.request_id,
        "model": generation.model.name,
        "fingerprint": generation.fingerprint,
        "choices": [choice_news(choice, offsets=offsets) for choice in generation.choices],
        "prompt_tokens": [token(info, offsets=offsets) for info in part.prompt_tokens],
        "usage": usage(generation.usage),
        "timings": timings(generation.timings),
    }


def started(generation: Generation, part: Part) -> dict[str, Any]:
    """Started"""
    return {
        "request_id": generation.call.request_id,
        "model": generation.model.name,
        "fingerprint": generation.fingerprint,
        "prompt_tokens": len(part.prepared.ids),
        "cached_tokens": part.cached_tokens,
        "prompt": [token(info, offsets=generation.params.return_offsets) for info in part.prompt_tokens],
    }


def finished(generation: Generation) -> dict[str, Any]:
    """Finished"""
    return {"usage": usage(generation.usage), "timings": timings(generation.timings)}


def scores(result: Scores) -> dict[str, Any]:
    """ScoreResponse"""
    return {"items": [_item(item) for item in result.items], "usage": usage(result.usage)}


def _item(item: Sequence[Score]) -> dict[str, Any]:
    return {
        "sum_logprob": [one.sum_logprob for one in item],
        "token_count": [len(one.tokens) for one in item],
        "byte_count": [one.byte_count for one in item],
        "is_greedy": [one.is_greedy for one in item],
        "details": [
            {
                "index": i,
                "text": "".join(info.text for info in one.tokens),
                "tokens": [token(info) for info in one.tokens],
                "cumulative_logprob": one.sum_logprob,
            }
            for i, one in enumerate(item)
        ],
    }


def tokenized(result: Tokenized) -> dict[str, Any]:
    """Tokenized"""
    return {
        "ids": list(result.ids),
        "pieces": list(result.pieces),
        "starts": list(result.starts),
        "ends": list(result.ends),
        "count": result.count,
        "truncated": result.truncated,
    }
