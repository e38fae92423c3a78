"""
OpenAI's answers. What repeats in every chunk of a stream is rendered once; a token then costs one `json.dumps` of its
text and a few joins.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from trilithon_server.assembly import Choice, FinishReason, TokenInfo
from trilithon_server.generation import Generation, Part
from trilithon_server.text.detokenizer import TokenTexts

DONE = b"data: [DONE]\n\n"

_BY_TOKEN = (FinishReason.EOS_TOKEN, FinishReason.STOP_TOKEN)

_dumps = json.dumps


class ChunkWriter:
    """
    Renders the chunks of one stream.

    Args:
        generation: whose answers are written.
        chat: chat completions, or plain completions.
        usage: whether every chunk has a `usage` key (null until the last).
    """

    def __init__(self, generation: Generation, *, chat: bool, created: int, usage: bool) -> None:
        self._chat = chat
        self._texts = generation.model.texts
        self._ids = generation.params.return_token_ids
        self._logprobs = generation.params.logprobs is not None
        head = {
            "id": answer_id(generation, chat=chat),
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": created,
            "model": generation.model.name,
            "system_fingerprint": generation.fingerprint,
        }
        self._head = "data: " + _dumps(head)[:-1] + ', "choices": [{"index": '
        self._empty = "data: " + _dumps(head)[:-1] + ', "choices": [], "usage": '
        self._tail = '}], "usage": null}\n\n' if usage else "}]}\n\n"
        self._open = ', "delta": {"content": ' if chat else ', "text": '
        self._close = '}, "logprobs": ' if chat else ', "logprobs": '

    def role(self, index: int) -> str:
        """The first chunk of a chat answer."""
        delta = '{"role": "assistant", "content": ""}'
        return f'{self._head}{index}, "delta": {delta}, "logprobs": null, "finish_reason": null{self._tail}'

    def news(self, choice: Choice) -> str:
        """What is new of an answer, and its finish reason once it has one; may be empty."""
        text, tokens, ids = choice.take()
        out = ""
        if text or (self._logprobs and tokens) or (self._ids and ids):
            logprobs = "null"
            if self._logprobs:
                logprobs = _dumps(self._render_logprobs(tokens))
            extra = f', "token_ids": {ids}' if self._ids else ""
            body = f'{self._open}{_dumps(text)}{self._close}{logprobs}, "finish_reason": null{extra}'
            out = f"{self._head}{choice.index}{body}{self._tail}"
        if choice.finish is not None:
            blank = ', "delta": {}' if self._chat else ', "text": ""'
            reason, detail = choice.finish.openai, _dumps(stop_detail(choice))
            body = f'{blank}, "logprobs": null, "finish_reason": "{reason}", "stop_detail": {detail}'
            out += f"{self._head}{choice.index}{body}{self._tail}"
        return out

    def usage(self, generation: Generation) -> str:
        """The last chunk, with the counts."""
        return f"{self._empty}{_dumps(usage(generation))}}}\n\n"

    def _render_logprobs(self, tokens: Sequence[TokenInfo]) -> dict[str, Any]:
        return chat_logprobs(tokens, self._texts) if self._chat else text_logprobs(tokens)


def joined(generation: Generation, *, chat: bool, created: int, echo_logprobs: bool) -> dict[str, Any]:
    """The whole answer of a request that is not streamed."""
    choices = []
    for part in generation.parts:
        for choice in part.choices:
            choices.append(_choice(generation, part, choice, chat=chat, echo_logprobs=echo_logprobs))
    document = {
        "id": answer_id(generation, chat=chat),
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": generation.model.name,
        "system_fingerprint": generation.fingerprint,
        "choices": choices,
        "usage": usage(generation),
    }
    dropped = sum(part.prepared.dropped for part in generation.parts)
    if dropped:
        document["truncated_prompt_tokens"] = dropped
    return document


def _choice(generation: Generation, part: Part, choice: Choice, *, chat: bool, echo_logprobs: bool) -> dict[str, Any]:
    text, tokens, ids = choice.take()
    params = generation.params
    out: dict[str, Any] = {"index": choice.index}
    if chat:
        out["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        out["text"] = text
    if params.logprobs is None and not echo_logprobs:
        out["logprobs"] = None
    elif chat:
        out["logprobs"] = chat_logprobs(tokens, generation.model.texts)
    else:
        out["logprobs"] = text_logprobs([*part.prompt_tokens, *tokens] if echo_logprobs else tokens)
    out["finish_reason"] = choice.finish.openai if choice.finish is not None else None
    out["stop_detail"] = stop_detail(choice)
    if params.prompt_logprobs is not None and not echo_logprobs:
        out["prompt_logprobs"] = [token_dict(token) for token in part.prompt_tokens]
    if params.return_token_ids:
        out["token_ids"] = ids
        out["prompt_token_ids"] = list(part.prepared.ids)
    return out


def answer_id(generation: Generation, *, chat: bool) -> str:
    """OpenAI's id of an answer, made of the request's."""
    return ("chatcmpl-" if chat else "cmpl-") + generation.call.request_id


def stop_detail(choice: Choice) -> dict[str, Any]:
    """What the standard `finish_reason` does not tell."""
    return {
        "reason": choice.finish.value if choice.finish is not None else None,
        "matched_stop": choice.matched_stop or None,
        "matched_token_id": choice.matched_token_id if choice.finish in _BY_TOKEN else None,
        "seed": choice.seed,
        "constraint_complete": choice.constraint_complete,
    }


def usage(generation: Generation) -> dict[str, Any]:
    """Token counts, in OpenAI's shape."""
    counts = generation.usage
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.generated_tokens,
        "total_tokens": counts.prompt_tokens + counts.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
    }


def chat_logprobs(tokens: Iterable[TokenInfo], texts: TokenTexts) -> dict[str, Any]:
    """Log-probabilities of a chat answer: token, bytes, rivals."""

    def entry(token: TokenInfo) -> dict[str, Any]:
        return {"token": token.text, "logprob": token.logprob, "bytes": list(texts.bytes_of(token.id))}

    content = [{**entry(token), "top_logprobs": [entry(rival) for rival in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[TokenInfo]) -> dict[str, Any]:
    """Log-probabilities of a completion: four parallel lists; the first token of a prompt has none."""
    tops: list[dict[str, float | None] | None] = []
    for token in tokens:
        if token.logprob is None:
            tops.append(None)
            continue
        top: dict[str, float | None] = {}
        for rival in (*token.top, token):
            top.setdefault(rival.text, rival.logprob)
        tops.append(top)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops,
        "text_offset": [token.offset for token in tokens],
    }


def token_dict(token: TokenInfo, *, offsets: bool = True) -> dict[str, Any]:
    """A token, with the field names of `trilithon.api.v1.TokenInfo`."""
    out: dict[str, Any] = {"id": token.id, "text": token.text, "logprob": token.logprob, "rank": token.rank}
    if token.top:
        out["top"] = [token_dict(rival, offsets=False) for rival in token.top]
    if offsets:
        out["text_offset"] = token.offset
    return out
