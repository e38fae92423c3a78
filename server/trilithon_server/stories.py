"""
Stories that are written sentence by sentence and can be written again from any sentence on.

    generate   a first sentence, and what the next ones are to be about -> a telling
    rewrite    a story that was told, and one sentence's new control -> a telling from that sentence on

A story is kept in this process for a day after it was last written, each tenant its own. Where an engine fails in the
middle, what was written stays: a rewrite from the next sentence on goes on, and one that writes none changes nothing.

Source: arXiv 2010.00840 (Megatron-CNTRL).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from trilithon.errors import NotFound
from trilithon_server.sampling import validate
from trilithon_server.served import Call
from trilithon_server.service import Service
from trilithon_server.story_models import cast
from trilithon_server.story_requests import (
    DEFAULT_TOKENS,
    Asked,
    Control,
    Sentence,
    Story,
    check,
    check_control,
    drawing,
    knowledge_of,
)
from trilithon_server.story_telling import Telling, with_stops
from trilithon_server.tasks.writing import one_line
from trilithon_server.validation import Violations, shown


async def generate(
    service: Service,
    call: Call,
    model_name: str,
    asked: Asked,
    values: Mapping[str, Any],
    *,
    found: Violations | None = None,
) -> Telling:
    """
    Check a request and begin a story; use the telling as an asynchronous context manager.

    Args:
        values: sampling parameters by JSON name.
        found: violations that the front has already found.
    Raises:
        TrilithonError: refused; nothing was written.
    """
    violations = found if found is not None else Violations()
    players = await cast(
        service,
        call,
        model_name,
        predictor_name=asked.keyword_model,
        ranker_name=asked.ranker,
        may_have_facts=asked.knowledge_k != 0,
    )
    check(asked, values, violations, concepts=service.concepts, limits=service.limits)
    writer = players.writer
    bounds = writer.bounds(call.principal, writer.ready(), default_max_tokens=DEFAULT_TOKENS)
    params = validate(with_stops(values, players.writing.stops), bounds, violations, stream=True)
    violations.raise_if_any()
    story = Story(
        id=f"story_{secrets.token_hex(16)}",
        model=writer.name,
        seed=secrets.randbits(63) if params.seed is None else params.seed,
        asked=asked,
        values=drawing(values),
        knowledge_k=knowledge_of(asked, service.concepts, has_encoder=players.ranker is not None),
        controls={control.index: control for control in asked.controls},
        sentences=(Sentence(index=1, text=one_line(asked.first_sentence)),),
    )
    return Telling(service, call, players, story, known={}, values=values, is_new=True)


async def rewrite(
    service: Service,
    call: Call,
    model_name: str,
    story_id: str,
    control: Control,
    values: Mapping[str, Any],
    *,
    found: Violations | None = None,
) -> Telling:
    """
    Begin a story again at one sentence; those before it stay as they are. Use it as `generate`.

    What is kept stays whole until the first new sentence is there, which then takes the place of all that followed.

    Args:
        model_name: empty, or the one that the story was written by.
        control: of a sentence that was written, or of the next one.
        values: parameters of the request itself, by JSON name.
    Raises:
        TrilithonError: refused; the story stays as it was.
    """
    story = get_story(service, call, story_id)
    violations = found if found is not None else Violations()
    written = len(story.sentences)
    check_control("control", control, violations, last=min(written + 1, story.asked.length), concepts=service.concepts)
    if model_name not in ("", story.model):
        violations.add("model", f"must be empty or {shown(story.model)}, which writes the story", given=model_name)
    violations.raise_if_any()
    asked = story.asked
    players = await cast(
        service,
        call,
        story.model,
        predictor_name=asked.keyword_model,
        ranker_name=asked.ranker,
        may_have_facts=story.knowledge_k > 0,
    )
    writer = players.writer
    validate(values, writer.bounds(call.principal, writer.ready()), violations, stream=True)
    violations.raise_if_any()
    before = story.sentences[: control.index - 1]
    known = {one.index: one.keywords for one in story.sentences if one.index == control.index}
    begun = replace(story, controls={**story.controls, control.index: control}, sentences=before)
    return Telling(service, call, players, begun, known=known, values=values, is_new=False)


def get_story(service: Service, call: Call, story_id: str) -> Story:
    """
    A story as far as it is written.

    Raises:
        NotFound: `story_not_found`.
    """
    story = service.stories.get(call.principal.tenant, story_id)
    if story is None:
        raise _not_found(story_id)
    return story


def delete_story(service: Service, call: Call, story_id: str) -> None:
    """
    Forget a story.

    Raises:
        NotFound: `story_not_found`.
    """
    if not service.stories.delete(call.principal.tenant, story_id):
        raise _not_found(story_id)


def _not_found(story_id: str) -> NotFound:
    return NotFound(
        f"no story {shown(story_id)} is kept here.",
        code="story_not_found",
        hint="Stories are kept for a day, by the server that told them, until it ends.",
    )
