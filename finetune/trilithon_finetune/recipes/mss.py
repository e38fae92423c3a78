"""
Task `mss`: a reader and its retriever learn from sentences alone, before there are any questions (arXiv 2101.00408,
section 2.2, after Guu et al. 2020). Rows are

    {"text", "title"?, "id"?}                             passages; each sentence with a salient span is a question
    {"doc_id", "sent_text", "linguistic_ent"?: [[text, type, start, end]], "bert_ent_pos"?}      sentences

A few salient spans of a sentence are replaced by <extra_id_0>, <extra_id_1> ..., and the reader writes them, each
behind its mark, from passages that the retriever finds for what is left. The sentence's own passage is not among them:
known by `doc_id` or `id`, else by its title and text. One of them is empty: what the others are worth is how much
likelier they make the spans than that one does (`retriever_utility`).

Places in `linguistic_ent` are characters; `bert_ent_pos` counts pieces of a tokenizer that may be another one, and is
not read. Without entities spans are told by their looks (`data/salient.py`).

Of a sentence that is too long what stands nearest to its masks is kept: without them there would be nothing to ask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from trilithon_finetune.config import Section
from trilithon_finetune.data.findings import Finding, finding, shown
from trilithon_finetune.data.salient import Span, salient_spans
from trilithon_finetune.errors import refuse
from trilithon_finetune.recipes.base import Context, Needs, Sample
from trilithon_finetune.recipes.fields import RowCheck
from trilithon_finetune.recipes.openqa import Asked, IndividualOptions, Reader, format_of, own_key
from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.knowledge.sentences import split_sentences
from trilithon_server.tasks.reader_format import ReaderKind, frame
from trilithon_server.tasks.writing import literal, special

TEXT, SENTENCE = "text", "doc_id/sent_text"

MASK = "[MASK]"
"""What the retriever reads in place of a span, where it knows it; else nothing."""


class MssOptions(IndividualOptions):
    """Options of the task `mss`."""

    max_spans: Annotated[int, Field(ge=1, le=16)] = 1
    """Of a sentence that are masked, at most; never more than half of its salient ones, but one always."""
    null_passage: bool = True
    """The last of the `top_k` passages is empty: spans that the reader knows need no other (Guu et al. 2020)."""

    @property
    def has_null(self) -> bool:
        """As the option says."""
        return self.null_passage

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.null_passage and self.top_k < 2:
            raise ValueError("top_k must be at least 2 with a null_passage, which is one of them")
        return self


@dataclass(frozen=True)
class Masked:
    """A sentence and those of its spans that are to be written, in order."""

    text: str
    spans: tuple[Span, ...]

    @property
    def written(self) -> list[str]:
        """The spans' texts."""
        return [self.text[start:end] for start, end in self.spans]

    def between(self) -> list[str]:
        """What is left: one text more than there are spans."""
        bounds = [0, *(place for span in self.spans for place in span), len(self.text)]
        return [self.text[start:end] for start, end in zip(bounds[::2], bounds[1::2], strict=True)]


class MaskedSpans(Reader):
    """The recipe of `mss`: a reader that reads each passage alone."""

    task = "mss"
    kind: ClassVar[ReaderKind] = "individual"
    formats: tuple[str, ...] = (TEXT, SENTENCE)
    Options: type[Section] = MssOptions

    def needs(self, options: Section) -> Needs:
        """The marks that stand for spans."""
        assert isinstance(options, MssOptions)
        return Needs(special_tokens=tuple(mark(number) for number in range(options.max_spans)))

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """By its text."""
        return SENTENCE if "sent_text" in row else TEXT if "text" in row else None

    def check(self, row: Mapping[str, Any], format: str, *, file: str, line: int) -> list[Finding]:
        """A text; entities lie where they say."""
        check = RowCheck(row, file=file, line=line)
        if format == TEXT:
            check.keys(("text", "title", "id"))
            check.text("text")
            for key in ("title", "id"):
                if key in row:
                    check.value(key, str)
            return check.findings
        check.keys(("doc_id", "sent_text", "linguistic_ent", "bert_ent_pos"))
        text = check.text("sent_text")
        if not isinstance(row.get("doc_id"), str | int) or isinstance(row["doc_id"], bool):
            check.add("E-DATA-008", "doc_id", f"must be a text or a whole number. Given: {shown(row.get('doc_id'))}.")
        entities = check.value("linguistic_ent", list) if "linguistic_ent" in row else ()
        for i, item in enumerate(entities or ()):
            is_entity = isinstance(item, list) and len(item) == 4 and isinstance(item[0], str)
            if not is_entity or not all(isinstance(place, int) for place in item[2:]):
                rule = f"must be [text, type, start, end]. Given: {shown(item)}."
                check.add("E-DATA-008", f"linguistic_ent[{i}]", rule)
            elif text is not None and (not item[0] or item[2] < 0 or text[item[2] : item[3]] != item[0]):
                rule = f"{shown(item[0])} must stand at characters {item[2]} to {item[3]} of sent_text."
                check.add("E-DATA-041", f"linguistic_ent[{i}]", rule)
        return check.findings

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> Sequence[Sample | Finding]:
        """The sentences of a row, masked."""
        if context.retriever is None:
            message = "options.retriever and options.passages are needed for the task mss. Given: neither."
            raise refuse("invalid_config", message, param="options.retriever", hint="Name an encoder and a file.")
        samples = super().encode(row, line, context, file=file)
        if not samples:
            hint = "Remove the row, or allow some in data.bad_rows_allowed."
            return [finding("E-DATA-022", "no sentence has a salient span.", file=file, line=line, hint=hint)]
        return samples

    def asked(self, row: Mapping[str, Any], context: Context) -> Sequence[Asked]:
        """Each masked sentence; its own passage by number."""
        retriever, format_ = context.retriever, format_of(context, self.kind)
        assert retriever is not None
        own = row.get("doc_id", row.get("id", f"{row.get('title', '')}\0{row.get('text', '')}"))
        begin = [] if frame(context.tokenizer)[0] else literal("question: ", context.tokenizer)
        end = frame(context.tokenizer)[1]
        room, query_room = format_.max_question_tokens - len(begin), retriever.format.max_query_tokens - 2
        _check_room(room, len(begin), context)
        asked = []
        for masked in self._masked(row, context):
            marks = [special(mark(number), context.tokenizer) for number in range(len(masked.spans))]
            query = _joined(masked.between(), _mask_of(retriever.tokenizer), retriever.tokenizer, query_room)
            question = _joined(masked.between(), [[token] for token in marks], context.tokenizer, room)
            answer = [
                token
                for number, text in zip(marks, masked.written, strict=True)
                for token in (number, *literal(text, context.tokenizer))
            ]
            asked.append(
                Asked(
                    retriever.format.framed(query, retriever.tokenizer).tokens,
                    format_.framed([*begin, *question], context.tokenizer),
                    [*answer[: format_.max_answer_tokens - 1], end],
                    own_key(str(own)),
                )
            )
        return asked

    def golds(self, row: Mapping[str, Any], part: int, context: Context) -> list[str]:
        """The spans, one behind the other."""
        return [" ".join(self._masked(row, context)[part].written)]

    def looked_for(self, row: Mapping[str, Any], part: int, context: Context) -> list[str]:
        """Each span by itself: nothing holds them one behind the other but by chance."""
        return self._masked(row, context)[part].written

    def _masked(self, row: Mapping[str, Any], context: Context) -> list[Masked]:
        assert isinstance(context.options, MssOptions)
        most = context.options.max_spans
        if "sent_text" in row:
            text, entities = row["sent_text"], row.get("linguistic_ent")
            places = None if entities is None else _apart(sorted({(item[2], item[3]) for item in entities}))
            sentences = [(text, salient_spans(text) if places is None else places)]
        else:
            texts = [row["text"][start:end] for start, end in split_sentences(row["text"])]
            sentences = [(text, salient_spans(text)) for text in texts]
        return [Masked(text, _chosen(text, spans, most)) for text, spans in sentences if spans]


def mark(number: int) -> str:
    """
    What stands for a span.

    >>> mark(0)
    '<extra_id_0>'
    """
    return f"<extra_id_{number}>"


def _chosen(text: str, spans: Sequence[Span], most: int) -> tuple[Span, ...]:
    """Some of the spans, by the sentence alone: every time the same."""
    drawn = [hashlib.blake2b(f"{text}\0{start}".encode(), digest_size=8).digest() for start, _ in spans]
    order = sorted(range(len(spans)), key=drawn.__getitem__)
    return tuple(spans[i] for i in sorted(order[: max(1, min(most, len(spans) // 2))]))


def _apart(spans: Sequence[Span]) -> list[Span]:
    """Without those that begin within one before them."""
    kept: list[Span] = []
    for start, end in spans:
        if not kept or start >= kept[-1][1]:
            kept.append((start, end))
    return kept


def _mask_of(tokenizer: Tokenizer) -> list[list[int]]:
    """For any span the same."""
    ids = tokenizer.encode(MASK, add_special_tokens=False)
    return [ids] if len(ids) == 1 and ids[0] in tokenizer.special_ids else [[]]


def _check_room(room: int, begin: int, context: Context) -> None:
    """
    Every mask has a place in a question.

    Raises:
        FinetuneError: `invalid_config`.
    """
    assert isinstance(context.options, MssOptions)
    if room < context.options.max_spans:
        least, given = context.options.max_spans + begin, room + begin
        message = f"options.max_question_tokens must be at least {least}, for options.max_spans masks. Given: {given}."
        raise refuse("invalid_config", message, param="options.max_question_tokens", hint="Mask fewer, or allow more.")


def _joined(texts: Sequence[str], marks: Sequence[Sequence[int]], tokenizer: Tokenizer, room: int) -> list[int]:
    """
    Texts with a mark between two; the last mark stands for all that follow. Of more than `room` tokens those nearest to
    a mark are kept.
    """
    tokens, places = literal(texts[0], tokenizer), []
    for number, text in enumerate(texts[1:]):
        start = len(tokens)
        tokens += marks[min(number, len(marks) - 1)]
        places.append((start, len(tokens)))
        tokens += literal(text, tokenizer)

    def distance(at: int) -> int:
        return min(max(start - at, at - stop + 1, 0) for start, stop in places)

    kept = sorted(range(len(tokens)), key=distance)[:room]
    return [tokens[at] for at in sorted(kept)]
