"""
A conversation's next turn: who speaks is told by references, what may be said by knowledge; one prompt holds it all.

    stored actor or references ┐
    documents -> sentences -> chosen by the last turns ├-> one packed sequence -> the engine -> the turn's text
    conversation ┘

A model whose task file names examples is prompted by them instead: it writes the knowledge, then the turn.

What was used and what found no room is told with the answer. Nothing here opens a url.

Source: arXiv 2005.06114 (actors by references), 2010.10150 (local knowledge), 2203.08745 (prompting by examples).
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trilithon.errors import InvalidArgument
from trilithon_server.assembly import Choice
from trilithon_server.dialogue_knowledge import Known, choose, room_of, write
from trilithon_server.dialogue_requests import Asked, check
from trilithon_server.dialogue_store import conversations_of
from trilithon_server.generation import Generation, Usage
from trilithon_server.prompts import Sequenced
from trilithon_server.sampling import validate
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.task_model import adapter_task
from trilithon_server.tasks.dialogue_format import DialogueFormat, NoRoomError, Packed
from trilithon_server.tasks.msdp_format import MsdpFormat
from trilithon_server.validation import Violations, invalid

DEFAULT_TOKENS = 128
"""Of a turn, where a request doesn't say."""


class Trimmed:
    """
    A text that comes in pieces, without the spaces around it: what may be its end is held back.

    >>> text = Trimmed()
    >>> [text.push(piece) for piece in (" Yes", ", ", "no. \n")]
    ['Yes', ',', ' no.']
    """

    def __init__(self) -> None:
        self.text = ""
        self._held = ""

    def push(self, piece: str) -> str:
        """What of it is certain."""
        whole = self._held + piece
        whole = whole if self.text else whole.lstrip()
        told = whole.rstrip()
        self._held = whole[len(told) :]
        self.text += told
        return told


@dataclass(slots=True)
class Reply:
    """An admitted request: what writes it, what it is written from, and the candidates as far as they are written."""

    generation: Generation
    packed: Packed
    known: Known
    _texts: dict[int, Trimmed] = field(default_factory=dict)  # by identity: `best_of` numbers candidates anew

    @property
    def usage(self) -> Usage:
        """Tokens of all that was read and written for it."""
        return self.known.usage + self.generation.usage

    async def news(self) -> AsyncIterator[tuple[int, str]]:
        """Which candidate has more text, and the text, until all have ended; use it inside of the generation."""
        async for _, choice in self.generation.news():
            if choice is not None:
                piece = self._texts.setdefault(id(choice), Trimmed()).push(choice.take()[0])
                if piece:
                    yield choice.index, piece

    async def joined(self) -> None:
        """Read to the end; with `best_of` only the best candidates are left."""
        async for _ in self.news():
            pass
        self.generation.keep_best()

    def text(self, choice: Choice) -> str:
        """Of a candidate, as far as it is written."""
        known = self._texts.get(id(choice))
        return known.text if known is not None else ""


async def respond(
    service: Service,
    call: Call,
    model_name: str,
    asked: Asked,
    values: Mapping[str, Any],
    *,
    found: Violations | None = None,
    stream: bool = False,
) -> Reply:
    """
    Pack the prompt and admit it; use the reply's generation as an asynchronous context manager.

    Args:
        values: sampling parameters by JSON name.
        found: violations that the front has already found.
    Raises:
        TrilithonError: refused; nothing was admitted.
    """
    violations = found if found is not None else Violations()
    model = await service.resolve(model_name, call, able="generate")
    model.require("generate")
    model.ready()
    format_ = format_of(model)
    check(asked, service, violations, by_examples=isinstance(format_, MsdpFormat))
    violations.raise_if_any()
    if format_.markers == "text":
        values = {**values, "stop": _stops(values.get("stop"))}
    wanted, room = values.get("max_tokens"), room_of(model)
    usual = min(DEFAULT_TOKENS, room // 2)
    taken = wanted if isinstance(wanted, int) and 0 < wanted < room else usual  # by the turn that is to be written
    references = await conversations_of(service, call, asked.actor_id) if asked.actor_id else asked.references
    known = Known(chosen=await choose(service, call, asked, values))
    if isinstance(format_, MsdpFormat):
        # Before anything is written: what is wrong with the parameters is told at once.
        bounds = model.bounds(call.principal, model.ready(), default_max_tokens=DEFAULT_TOKENS)
        validate(values, bounds, violations, stream=stream)
        violations.raise_if_any()
        if not known.chosen:
            try:
                known = await write(service, call, model, format_, asked, values)
            except NoRoomError:
                raise _too_long(asked, room) from None
        pack: Callable[..., Packed] = functools.partial(format_.pack, asked.topic)
    else:
        pack = functools.partial(format_.pack, references=references)
    try:
        packed = await asyncio.to_thread(
            pack, asked.conversation, model.tokenizer, knowledge=known.texts, room=room - taken
        )
    except NoRoomError as error:
        is_by_tokens = error.needed + usual <= room
        raise _too_long(asked, room, max_tokens=taken if is_by_tokens else None) from None
    prompt = Sequenced(
        ids=packed.tokens, types=packed.types, positions=packed.positions, answer_type=packed.answer_type
    )
    generation = await service.generate(
        call,
        model_name,
        [prompt],
        {**values, "logprobs": 0},
        found=violations,
        stream=stream,
        default_max_tokens=DEFAULT_TOKENS,
        field="conversation",
    )
    kept = [known.chosen[i] for i in packed.knowledge] if known.chosen else ()
    written = known.written if packed.knowledge else ""
    return Reply(generation, packed, dataclasses.replace(known, chosen=kept, written=written))


def _too_long(asked: Asked, room: int, *, max_tokens: int | None = None) -> InvalidArgument:
    """The refusal of a prompt that leaves no room for the turn; `max_tokens`: where that takes what would be enough."""
    name, todo = "conversation", "Shorten its last turn."
    if max_tokens is not None:
        name, todo = "max_tokens", "Lower it."
    elif len(asked.topic) > len(asked.conversation[-1].text):
        name, todo = "topic", "Shorten it."
    rule = f"must leave room for a turn in the {room} tokens of the model"
    given = ... if max_tokens is None else max_tokens
    return invalid(name, rule, given=given, code="prompt_too_long", todo=todo)


def format_of(model: ServedModel) -> DialogueFormat | MsdpFormat:
    """
    How a model reads dialogues: as its task file says, or its adapter's; else in words, with budgets for its window.

    Raises:
        FailedPrecondition: `task_invalid`, the adapter's task file is broken.
    """
    window, known = model.max_context, model.dialogue
    if model.adapter is not None:
        task = adapter_task(model.adapter.directory, model.adapter.digest)
        known = task if isinstance(task, DialogueFormat | MsdpFormat) else None
    return known or DialogueFormat(
        max_references=min(1024, window // 4),
        max_knowledge=min(512, window // 8),
        max_conversation=min(2048, window // 2),
    )


def _stops(given: Any) -> Any:
    """A turn in words is a line; what is no list is for the validator."""
    if given is None or isinstance(given, str):
        given = [given] if given else []
    return [*given, "\n"] if isinstance(given, list) else given
