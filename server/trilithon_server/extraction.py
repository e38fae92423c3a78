"""
What encoders that were finetuned for a task find in texts: entities, relations, answers, classes.

    texts -> limits -> words and windows (`tasks/`) -> all windows into the engine (`task_run`) -> logits -> `tasks/`

The formats read and write; these functions check a request and bring the two together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.task_model import TaskModel
from trilithon_server.task_run import TaskRun, Told, off_loop
from trilithon_server.tasks.classes import ClassFormat, Classified
from trilithon_server.tasks.pieces import Encoded
from trilithon_server.tasks.relations import RelationFormat
from trilithon_server.tasks.spans import SpanAnswer, SpanFormat, merge_answers
from trilithon_server.tasks.tagging import Entity, TaggingFormat
from trilithon_server.validation import Violations, is_text, nearest

MAX_QUESTION_CHARS = 4096
MAX_ENTITIES = 1000
"""Mentions of one request for relations."""
MAX_ANSWERS = 20
DEFAULT_ANSWERS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Mention:
    """A mention as a request names it; `text` is compared with what stands there unless it is empty."""

    start: int
    end: int
    type: str
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Related:
    """Relations of pairs; `dropped` more were found than may be asked about."""

    pairs: Sequence[tuple[Entity, Entity]]
    relations: Sequence[Classified]
    negative: str
    dropped: int
    told: Told


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """Answers, most probable first."""

    answers: Sequence[SpanAnswer]
    no_answer_probability: float
    no_answer: bool
    told: Told


async def annotate(
    service: Service,
    call: Call,
    model_name: str,
    texts: Sequence[str],
    values: Mapping[str, Any],
    *,
    types: Sequence[str] = (),
    found: Violations | None = None,
) -> tuple[list[list[Entity]], Told]:
    """
    Entities of each text.

    Args:
        texts: 1 to `limits.max_extract_texts`.
        values: parameters by JSON name; those of the request itself matter here.
        types: only these; empty = all.
        found: violations that the front has already found.
    Raises:
        TrilithonError: refused, or the engine could not finish.
    """
    run = TaskRun(service, call, values, found)
    model, task = await run.model(model_name, "annotate")
    run.check_texts("texts", texts)
    assert isinstance(task.format, TaggingFormat)
    for i, name in enumerate(types):
        if name not in task.format.types:
            known = ", ".join(task.format.types)
            rule, hint = f"must be one of {known}", nearest(name, task.format.types).strip()
            run.found.add(f"types[{i}]", rule, given=name, todo=hint)
    run.found.raise_if_any()
    documents = await _tag(run, model, task, texts, field="texts")
    wanted = set(types or task.format.types)
    return [[entity for entity in document if entity.type in wanted] for document in documents], run.told(model)


async def _tag(
    run: TaskRun, model: ServedModel, task: TaskModel, texts: Sequence[str], *, field: str
) -> list[list[Entity]]:
    tagging = task.format
    assert isinstance(tagging, TaggingFormat)
    size = sum(map(len, texts))
    tagged = await off_loop(size, lambda: [tagging.encode_text(text, task.pieces) for text in texts])
    logits = await run.logits(model, task, [w.encoded for one in tagged for w in one.windows], field=field)

    def decode() -> list[list[Entity]]:
        rest = iter(logits)
        return [
            tagging.decode_text(text, one, [next(rest) for _ in one.windows])
            for text, one in zip(texts, tagged, strict=True)
        ]

    return await off_loop(size, decode)


async def relate(
    service: Service,
    call: Call,
    model_name: str,
    text: str,
    values: Mapping[str, Any],
    *,
    pairs: Sequence[tuple[Mention, Mention]] = (),
    entities: Sequence[Mention] = (),
    tagger: str = "",
    found: Violations | None = None,
) -> Related:
    """
    How pairs of mentions of a text are related.

    Args:
        text: not empty.
        pairs: at most `limits.max_extract_pairs`.
        entities: every pair of these that stands in one sentence and may be related.
        tagger: a model that finds the entities; exactly one of the three is given.
    Raises:
        TrilithonError: refused, or the engine could not finish.
    """
    run = TaskRun(service, call, values, found)
    model, task = await run.model(model_name, "relations")
    relation = task.format
    assert isinstance(relation, RelationFormat)
    run.check_texts("text", [text], single=True)
    if sum(map(bool, (pairs, entities, tagger))) != 1:
        rule = "must be set, or one of `entities` and `tagger` in its place: exactly one of the three"
        run.found.add("pairs", rule, code="missing_parameter")
    most = service.limits.max_extract_pairs
    if len(pairs) > most:
        run.found.add("pairs", f"must hold at most {most} pairs", given=len(pairs))
    if len(entities) > MAX_ENTITIES:
        run.found.add("entities", f"must hold at most {MAX_ENTITIES} mentions", given=len(entities))
    run.found.raise_if_any()
    checked = [
        (_mention(run, text, a, relation, f"pairs[{i}].a"), _mention(run, text, b, relation, f"pairs[{i}].b"))
        for i, (a, b) in enumerate(pairs)
    ]
    mentions = [_mention(run, text, item, relation, f"entities[{i}]") for i, item in enumerate(entities)]
    for i, (a, b) in enumerate(checked):
        if a.start < b.end and b.start < a.end:
            given = f"{a.start}:{a.end} and {b.start}:{b.end}"
            run.found.add(f"pairs[{i}]", "must hold two mentions that do not overlap", given=given)
    run.found.raise_if_any()
    if tagger:
        tagging, its_task = await run.model(tagger, "annotate")
        (mentions,) = await _tag(run, tagging, its_task, [text], field="text")
        if len(mentions) > MAX_ENTITIES:
            rule = f"must hold at most {MAX_ENTITIES} entities"
            run.found.add("text", rule, given=len(mentions), code="prompt_too_long", todo="Send a shorter text.")
            run.found.raise_if_any()
    if not pairs:
        checked = await off_loop(len(mentions) ** 2, lambda: relation.candidates(text, mentions))
    asked = checked[:most]
    encoded = await off_loop(
        len(text) * len(asked), lambda: [relation.encode(text, a, b, task.pieces) for a, b in asked]
    )
    logits = await run.logits(model, task, encoded, field="pairs")
    relations = [relation.decode(row) for (row,) in logits]
    dropped = len(checked) - len(asked)
    return Related(pairs=asked, relations=relations, negative=relation.negative, dropped=dropped, told=run.told(model))


def _mention(run: TaskRun, text: str, mention: Mention, relation: RelationFormat, field: str) -> Entity:
    if not 0 <= mention.start < mention.end <= len(text):
        rule = f"must be characters [start, end) of the text, which has {len(text)}"
        run.found.add(field, rule, given=f"{mention.start}:{mention.end}")
    stands = text[mention.start : mention.end]
    if mention.text and mention.text != stands:
        rule = f"must be what stands at {mention.start}:{mention.end}, {stands!r:.64}"
        run.found.add(f"{field}.text", rule, given=mention.text, todo="Offsets count characters, not bytes.")
    if mention.type not in relation.markers:
        rule, hint = f"must be one of {', '.join(relation.markers)}", nearest(mention.type, relation.markers).strip()
        run.found.add(f"{field}.type", rule, given=mention.type, todo=hint)
    return Entity(mention.start, mention.end, mention.type, stands, 1.0)


async def answer(
    service: Service,
    call: Call,
    model_name: str,
    question: str,
    contexts: Sequence[str],
    values: Mapping[str, Any],
    *,
    n_best: int = 0,
    null_threshold: float | None = None,
    found: Violations | None = None,
) -> Answered:
    """
    Spans of the contexts that answer the question.

    Args:
        question: at least one word.
        contexts: 1 to `limits.max_extract_texts`.
        n_best: 1 to `MAX_ANSWERS`; 0 = `DEFAULT_ANSWERS`.
        null_threshold: by how much "no answer" must score above the best answer to be said; None = the model's own.
    Raises:
        TrilithonError: refused, or the engine could not finish.
    """
    run = TaskRun(service, call, values, found)
    model, task = await run.model(model_name, "answer")
    spans = task.format
    assert isinstance(spans, SpanFormat)
    run.check_texts("contexts", contexts)
    if not is_text(question):
        run.found.add("question", "must be sound Unicode (it holds half of a surrogate pair)")
    elif not question.strip():
        run.found.add("question", "must hold at least one word", given=question, code="empty_prompt")
    if len(question) > MAX_QUESTION_CHARS:
        run.found.add("question", f"must have at most {MAX_QUESTION_CHARS} characters", given=len(question))
    if not 0 <= n_best <= MAX_ANSWERS:
        run.found.add("n_best", f"must be from 1 to {MAX_ANSWERS}", given=n_best)
    if null_threshold is not None and not math.isfinite(null_threshold):
        run.found.add("null_threshold", "must be a finite number", given=null_threshold)
    run.found.raise_if_any()
    size = sum(map(len, contexts))
    windows = await off_loop(size, lambda: [spans.encode(question, text, task.pieces) for text in contexts])
    logits = await run.logits(model, task, [w.encoded for one in windows for w in one], field="contexts")
    rest = iter(logits)
    parts = [
        spans.decode(text, one, [next(rest) for _ in one], index=i)
        for i, (text, one) in enumerate(zip(contexts, windows, strict=True))
    ]
    count = n_best or DEFAULT_ANSWERS
    if len(parts) == 1:  # nothing to merge: places stay apart, and long answers stay
        answers, null = list(parts[0].answers[:count]), parts[0].no_answer_probability
    else:
        answers, null = merge_answers(parts, n_best=count)
    threshold = spans.null_threshold if null_threshold is None else null_threshold
    silent = threshold is not None and all(part.null_margin > threshold for part in parts)
    return Answered(answers=answers, no_answer_probability=null, no_answer=silent or not answers, told=run.told(model))


async def classify(
    service: Service,
    call: Call,
    model_name: str,
    texts: Sequence[str],
    values: Mapping[str, Any],
    *,
    text_pairs: Sequence[str] = (),
    found: Violations | None = None,
) -> tuple[list[tuple[Classified, bool]], Told]:
    """
    One label for each text, and whether its end was not read.

    Args:
        texts: 1 to `limits.max_extract_texts`.
        text_pairs: the second text of each; empty = none.
    Raises:
        TrilithonError: refused, or the engine could not finish.
    """
    run = TaskRun(service, call, values, found)
    model, task = await run.model(model_name, "classify")
    classes = task.format
    assert isinstance(classes, ClassFormat)
    run.check_texts("texts", texts)
    if text_pairs:
        run.check_texts("text_pairs", text_pairs, beside=sum(map(len, texts)))
        if len(text_pairs) != len(texts):
            run.found.add("text_pairs", f"must be as many as `texts`, {len(texts)}", given=len(text_pairs))
    run.found.raise_if_any()
    seconds: Sequence[str | None] = text_pairs or [None] * len(texts)

    def encode() -> list[tuple[Encoded, bool]]:
        out = []
        for text, second in zip(texts, seconds, strict=True):
            whole = classes.encode(text, task.pieces, second)
            is_long = len(whole.tokens) > classes.max_tokens
            out.append((classes.cut(text, task.pieces, second) if is_long else whole, is_long))
        return out

    encoded = await off_loop(sum(map(len, (*texts, *text_pairs))), encode)
    logits = await run.logits(model, task, [one for one, _ in encoded], field="texts")
    results = [(classes.decode(row), is_long) for (row,), (_, is_long) in zip(logits, encoded, strict=True)]
    return results, run.told(model)
