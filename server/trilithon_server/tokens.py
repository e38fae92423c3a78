"""Text to token ids and back, exactly as the engine would see them, and what is served."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trilithon_server.prompts import Conversation, encode, encode_conversation, render
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.text.detokenizer import decode_all
from trilithon_server.validation import Violations, invalid

KINDS = ("base", "adapter", "merged", "alias", "encoder")
"""What a name can stand for."""

MAX_TEXTS = 256
"""Texts, or lists of ids, of one call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenized:
    """One text's tokens; the lists run parallel, those not asked for are empty."""

    ids: Sequence[int]
    pieces: Sequence[str]
    starts: Sequence[int]
    ends: Sequence[int]
    count: int
    truncated: bool


async def tokenize(
    service: Service,
    call: Call,
    model_name: str,
    texts: Sequence[str],
    *,
    add_special_tokens: bool = True,
    pieces: bool = False,
    offsets: bool = False,
    truncate: int = 0,
    found: Violations | None = None,
) -> tuple[ServedModel, list[Tokenized]]:
    """
    Token ids of each text; `truncate` keeps only the last ones.

    Raises:
        InvalidArgument: too many or too long texts.
    """
    model = await service.resolve(model_name, call)
    violations = found if found is not None else Violations()
    if not 1 <= len(texts) <= MAX_TEXTS:
        violations.add("texts", f"must hold from 1 to {MAX_TEXTS} texts", given=len(texts))
    violations.raise_if_any()
    out = []
    for i, text in enumerate(texts):
        ids = await encode(model, text, special=add_special_tokens, field=f"texts[{i}]")
        spans: Sequence[tuple[int, int]] = ()
        if offsets:
            ids, spans = await asyncio.to_thread(
                model.tokenizer.encode_with_offsets, text, add_special_tokens=add_special_tokens
            )
        cut = max(0, len(ids) - truncate) if truncate else 0
        out.append(
            Tokenized(
                ids=ids[cut:],
                pieces=[model.tokenizer.id_to_piece(token) for token in ids[cut:]] if pieces else (),
                starts=[start for start, _ in spans[cut:]],
                ends=[end for _, end in spans[cut:]],
                count=len(ids),
                truncated=cut > 0,
            )
        )
    return model, out


async def detokenize(
    service: Service,
    call: Call,
    model_name: str,
    tokens: Sequence[Sequence[int]],
    *,
    keep_special: bool = False,
    found: Violations | None = None,
) -> list[str]:
    """
    The text of each list of token ids.

    Raises:
        InvalidArgument: an id is not the model's, or there are too many.
    """
    model = await service.resolve(model_name, call)
    violations = found if found is not None else Violations()
    if not 1 <= len(tokens) <= MAX_TEXTS:
        violations.add("tokens", f"must hold from 1 to {MAX_TEXTS} lists", given=len(tokens))
    size = max(model.vocab_size, model.tokenizer.vocab_size)
    for i, ids in enumerate(tokens):
        for j, token in enumerate(ids):
            if not 0 <= token < size:
                rule = f"must be from 0 to {size - 1} (vocabulary size {size})"
                violations.add(f"tokens[{i}][{j}]", rule, given=token, code="token_id_range")
    violations.raise_if_any()
    return [decode_all(model.texts, ids, skip_special=not keep_special) for ids in tokens]


async def render_chat(
    service: Service, call: Call, model_name: str, chat: Conversation, *, found: Violations | None = None
) -> tuple[ServedModel, str, list[int]]:
    """
    A conversation as the model's template renders it, and its token ids.

    Raises:
        InvalidArgument: no template, or one that refuses the messages.
    """
    model = await service.resolve(model_name, call)
    if found is not None:
        found.raise_if_any()
    rendered = render(model, chat)
    return model, rendered.text, await encode_conversation(model, rendered, field="messages")


async def page(
    service: Service, tenant: str, *, after: str = "", limit: int = 0, kind: str = ""
) -> tuple[list[dict[str, Any]], bool]:
    """
    What a tenant may name, configured models first, and whether there is more.

    Raises:
        InvalidArgument: an unknown `after`, `limit` or `kind`.
    """
    if kind not in ("", *KINDS):
        raise invalid("kind", f"must be one of {', '.join(KINDS)}", given=kind)
    if not 0 <= limit <= 1000:
        raise invalid("limit", "must be from 0 to 1000", given=limit)
    rows = [row for row in await service.names.listing(tenant) if not kind or row["kind"] == kind]
    names = [row["id"] for row in rows]
    if after:
        if after not in names:
            raise invalid("after", "must be the id of a model on this list", given=after)
        rows = rows[names.index(after) + 1 :]
    size = limit or 100
    return rows[:size], len(rows) > size
