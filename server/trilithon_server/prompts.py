"""From what a request says to go on from - text, token ids or messages - to the token ids that the engine sees."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trilithon.errors import InvalidArgument
from trilithon_server.engine import wire_pb2 as wire
from trilithon_server.engine.request import blocks_held, longest_answer, source_blocks
from trilithon_server.sampling import SamplingParams
from trilithon_server.served import ServedModel
from trilithon_server.text.chat import Rendered, encode_chat, render_chat
from trilithon_server.text.detokenizer import decode_all
from trilithon_server.validation import Bounds, Broken, Violations, invalid, is_text, nearest, shown, token_id

ROLES = ("system", "user", "assistant", "tool")

INLINE_CHARS = 16_384
"""Texts up to this size are tokenised on the loop (a few milliseconds); longer ones in a thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages for the model's chat template; `opening` None means: open an assistant turn unless one is continued."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] | None = None
    opening: bool | None = None
    continue_final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequenced:
    """
    Token ids that a task has packed, with types and positions of their own; see `engine.wire.Submit`.

    For an encoder-decoder `sources` are what its encoder reads, `biases` one each or none, and `ids` begin the answer.
    """

    ids: Sequence[int]
    types: Sequence[int] = ()
    positions: Sequence[int] = ()
    answer_type: int = 0
    sources: Sequence[Sequence[int]] = ()
    biases: Sequence[float] = ()

    def to_wire(self) -> wire.Submit:
        """The part of a request that is its prompt."""
        return wire.Submit(
            prompt=self.ids,
            types=self.types,
            positions=self.positions,
            answer_type=self.answer_type,
            source_tokens=[token for source in self.sources for token in source],
            source_lengths=[len(source) for source in self.sources],
            source_biases=self.biases,
        )


Prompt = str | Sequence[int] | Conversation | Sequenced
"""Text, token ids, a conversation, or what a task has packed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """
    A prompt; `dropped` tokens were cut off its front by `truncate_prompt_tokens`.

    `ids` are what was given to read, by an encoder-decoder's encoder; `packed` is what the engine gets.
    """

    ids: Sequence[int]
    packed: Sequenced
    dropped: int = 0
    source: str | None = None

    @staticmethod
    def of(ids: Sequence[int], start: int | None, *, dropped: int = 0, source: str | None = None) -> Prepared:
        """Token ids for a decoder or an encoder, or for an encoder-decoder whose answers begin with `start`."""
        packed = Sequenced(ids=ids) if start is None else Sequenced(ids=[start], sources=[ids])
        return Prepared(ids=ids, packed=packed, dropped=dropped, source=source)

    @staticmethod
    def by_task(packed: Sequenced) -> Prepared:
        """What a task has packed."""
        read = [token for source in packed.sources for token in source] if packed.sources else packed.ids
        return Prepared(ids=read, packed=packed)

    def text(self, model: ServedModel, *, skip_special: bool) -> str:
        """The prompt as text, for `echo`: as it was given, or decoded when it came as ids or was cut."""
        if self.source is not None and not self.dropped:
            return self.source
        return decode_all(model.texts, self.ids, skip_special=skip_special)


async def prepare(
    model: ServedModel, prompt: Prompt, params: SamplingParams, bounds: Bounds, *, field: str
) -> Prepared:
    """
    Render, tokenise and truncate one prompt.

    Args:
        field: how the request names it, for messages.
    Raises:
        InvalidArgument: it is malformed or too long to be looked at.
    """
    source: str | None = None
    if isinstance(prompt, str):
        source = prompt
        ids = await encode(model, prompt, special=params.add_bos is not False, field=field)
        bos = model.tokenizer.bos_id
        if params.add_bos and bos is not None and (not ids or ids[0] != bos):
            ids = [bos, *ids]
    elif isinstance(prompt, Sequenced):
        if model.is_seq2seq and not prompt.sources:
            message = f"this task needs a decoder, and model `{model.name}` is an encoder-decoder. Name another model."
            raise InvalidArgument(message, code="unsupported_model")
        return Prepared.by_task(prompt)
    elif isinstance(prompt, Conversation):
        ids = await encode_conversation(model, render(model, prompt, field=field), field=field)
    else:
        ids = check_ids(prompt, bounds, field=field)
    limit = params.truncate_prompt_tokens
    dropped = max(0, len(ids) - limit) if limit else 0
    return Prepared.of(ids[dropped:], model.decoder_start_id, dropped=dropped, source=source)


async def encode(model: ServedModel, text: str, *, special: bool, field: str) -> list[int]:
    """
    Token ids of a text.

    Raises:
        InvalidArgument: it is not sound Unicode, or has more characters than any fitting prompt.
    """
    check_text(model, text, field=field)
    if len(text) <= INLINE_CHARS:
        return model.tokenizer.encode(text, add_special_tokens=special)
    return await asyncio.to_thread(model.tokenizer.encode, text, add_special_tokens=special)


def check_text(model: ServedModel, text: str, *, field: str) -> None:
    """
    Raises:
        InvalidArgument: it is not sound Unicode, or has more characters than any fitting prompt.
    """
    most = model.max_context * model.limits.max_prompt_chars_per_token
    if len(text) > most:
        rule = f"must have at most {most} characters"
        raise invalid(field, rule, given=f"{len(text)} characters", code="prompt_too_long")
    if not is_text(text):
        raise invalid(field, "must be sound Unicode (it holds half of a surrogate pair)")


async def encode_conversation(model: ServedModel, rendered: Rendered, *, field: str) -> list[int]:
    """
    Token ids of a rendered conversation, in which no message can spell a special token.

    Raises:
        InvalidArgument: as `encode`.
    """
    if not rendered.literals:
        return await encode(model, rendered.text, special=False, field=field)
    check_text(model, rendered.text, field=field)
    return (await asyncio.to_thread(encode_chat, model.tokenizer, rendered))[0]


def check_ids(ids: Sequence[Any], bounds: Bounds, *, field: str) -> list[int]:
    """
    Raises:
        InvalidArgument: an item is not a token id of the model.
    """
    found = Violations()
    out: list[int] = []
    for position, item in enumerate(ids):
        try:
            out.append(token_id(item, bounds, at=f"[{position}]"))
        except Broken as broken:
            rule = broken.rule or f"must be a token id below {bounds.vocab_size}"
            found.add(field + broken.at, rule, given=broken.given, code=broken.code or "invalid_value")
    found.raise_if_any()
    return out


def render(model: ServedModel, chat: Conversation, *, field: str = "messages") -> Rendered:
    """
    What the model's template makes of a conversation.

    Raises:
        InvalidArgument: no template, bad messages, or the template refuses them.
    """
    model.require("chat")
    assert model.template is not None  # `chat` is a capability only with one
    check_messages(chat, model)
    opening = not chat.continue_final if chat.opening is None else chat.opening
    if opening and chat.continue_final:
        raise invalid("continue_final_message", "must be false when `add_generation_prompt` is true", given=True)
    messages = [{**message, "content": content_text(message.get("content"))} for message in chat.messages]
    return render_chat(
        model.template,
        model.tokenizer,
        messages,
        tools=chat.tools,
        add_generation_prompt=opening,
        continue_final_message=chat.continue_final,
    )


def content_text(content: Any) -> str:
    """A message's content as one string; OpenAI's list of text parts is joined."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return content or ""


def check_messages(chat: Conversation, model: ServedModel) -> None:
    """
    Raises:
        InvalidArgument: none, too many or too large messages, or an unknown role.
    """
    found, limits = Violations(), model.limits
    if not 1 <= len(chat.messages) <= limits.max_messages:
        rule = f"must hold from 1 to {limits.max_messages} messages"
        found.add("messages", rule, given=f"{len(chat.messages)} messages")
    for i, message in enumerate(chat.messages[: limits.max_messages]):
        role = message.get("role")
        if role not in ROLES:
            todo = nearest(str(role), ROLES).strip()
            found.add(
                f"messages[{i}].role", f"must be one of {', '.join(ROLES)}", given=role, code="chat_roles", todo=todo
            )
        size = len(content_text(message.get("content")).encode("utf-8", "replace"))
        if size > limits.max_message_bytes:
            rule = f"must have at most {limits.max_message_bytes} bytes"
            found.add(f"messages[{i}].content", rule, given=f"{size} bytes")
    found.raise_if_any()


def answer_room(
    prepared: Prepared, params: SamplingParams, bounds: Bounds, hello: wire.Hello, *, field: str = "prompt"
) -> int:
    """
    Tokens to generate at most: `max_tokens`, or what the window, the cache and the default leave.

    Raises:
        InvalidArgument: `empty_prompt`, `prompt_too_long`, `context_length_exceeded`, `kv_capacity_exceeded`, or
            `min_tokens` above the room.
    """
    size, window, capacity = len(prepared.packed.ids), bounds.max_context, hello.kv_capacity_tokens
    sources = prepared.packed.sources
    found, sequences, wanted = Violations(), params.num_sequences, params.max_tokens
    if not size or not all(map(len, sources)):
        todo = "" if sources else " Set `add_bos` to true to generate from nothing."
        message = f"`{field}` must not be empty. Given: 0 tokens.{todo}"
        found.say(field, message, code="empty_prompt", rule="must not be empty", given="0 tokens")
        found.raise_if_any()
    scoring = wanted == 0
    longest = max(map(len, sources), default=size)
    most = window - (0 if scoring or sources else 1)  # what an encoder reads leaves the window to the answer
    if longest > most:
        todo = "Shorten it or set `truncate_prompt_tokens`."
        rule = f"must have at most {most} tokens"
        found.add(field, rule, given=f"{longest} tokens", code="prompt_too_long", todo=todo)
        found.raise_if_any()
    room = window - size
    if wanted is not None and wanted > room:
        message = (
            f"prompt tokens + `max_tokens` must be at most {window}. Given: {size} prompt tokens and `max_tokens` "
            f"{wanted}, {wanted - room} too many. Lower `max_tokens` to {room} or set `truncate_prompt_tokens`."
        )
        found.say("max_tokens", message, code="context_length_exceeded", limit=str(window), given=str(size + wanted))
    block = hello.block_size
    share = room
    read = source_blocks(map(len, sources), block_size=block)
    if capacity:
        share = longest_answer(size, capacity // block - read, num_sequences=sequences, block_size=block)
    if share < (wanted or 1):
        asked = block * (read + blocks_held(size, wanted or 1, num_sequences=sequences, block_size=block))
        encoder = f"{block * read} for the encoder + " if read else ""
        message = (
            f"one request may hold at most {capacity} cache tokens on this server. Given: {asked} "
            f"({encoder}prompt {size} + {sequences} x {wanted or 1}, in blocks of {block})."
        )
        found.say(field, message, code="kv_capacity_exceeded", limit=str(capacity), given=str(asked))
    tokens = wanted if wanted is not None else min(bounds.default_max_tokens, bounds.max_output, room, share)
    if params.min_tokens > tokens:
        found.add("min_tokens", f"must be from 0 to `max_tokens` ({tokens})", given=params.min_tokens)
    found.raise_if_any()
    return tokens


def check_reading(params: SamplingParams, violations: Violations) -> None:
    """What cannot be asked of an encoder-decoder: its prompt is read by the encoder and is no part of the answer."""
    rule = "is for decoders: an encoder-decoder's prompt is read, not gone on with"
    if params.echo:
        violations.add("echo", rule, given=True)
    if params.prompt_logprobs is not None:
        violations.add("prompt_logprobs", rule, given=params.prompt_logprobs)


def bad_word_ids(model: ServedModel, params: SamplingParams, bounds: Bounds) -> tuple[tuple[int, ...], ...]:
    """
    The token sequences of `bad_words`, each with and without a leading space.

    Raises:
        InvalidArgument: a word has too many tokens.
    """
    found = Violations()
    sequences: dict[tuple[int, ...], None] = {}
    for i, word in enumerate(params.bad_words):
        for text in (word, " " + word.lstrip(" ")):
            ids = tuple(model.tokenizer.encode(text, add_special_tokens=False))
            if len(ids) > bounds.max_bad_word_tokens:
                rule = f"must have at most {bounds.max_bad_word_tokens} tokens"
                found.add(f"bad_words[{i}]", rule, given=f"{len(ids)} tokens ({shown(word)})")
                break
            if ids:
                sequences[ids] = None
    found.raise_if_any()
    return tuple(sequences)
