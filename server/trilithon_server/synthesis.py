"""
Questions and answers made from passages: proposed answers, questions about them, and a reader that checks each.

    passage -> answers (a model's spans, or a rule) -> questions (two each) -> the reader's own answers -> kept or not

A passage's triples depend on the seed and on its text alone: they are the same in any batch and after any interruption.
Several passages are in the engines at once; they are told in their order.

Source: arXiv 2002.09599 (answer generation, question generation, round-trip filtration).
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from trilithon.errors import DeadlineExceeded, FailedPrecondition
from trilithon_server.generation import Usage
from trilithon_server.knowledge.sentences import split_sentences
from trilithon_server.question_writing import Writer, Written, asked, writer_of
from trilithon_server.sampling import validate
from trilithon_server.sampling_rules import TASK_HIDDEN, TASK_RULES
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.synthesis_records import Passage, PassageDone, Summary, Triple, Wanted
from trilithon_server.task_model import TaskCapability, TaskModel
from trilithon_server.task_run import TaskRun, off_loop
from trilithon_server.tasks.answer_spans import AnswerFormat, Candidates, Proposal, capitals_and_numbers
from trilithon_server.tasks.pieces import Encoded, Pieces, Span, WordPieces
from trilithon_server.tasks.round_trip import FILTERS, Asked, Filter, judge, judge_unanswerable
from trilithon_server.tasks.spans import Logits, SpanAnswers, SpanFormat, SpanWindow
from trilithon_server.validation import Violations, nearest

T = TypeVar("T")

MAX_PASSAGES = 64
MAX_ANSWERS = 20
MAX_QUESTIONS = 8
DEFAULT_ANSWERS, DEFAULT_QUESTIONS = 5, 2
AHEAD = 4
"""Passages that are worked on at once."""
RULE = "capitals_and_numbers"
"""What proposes answers where no model does."""

HIDDEN = (
    *TASK_HIDDEN, "n", "best_of", "max_tokens", "min_tokens", "stop", "stop_token_ids", "include_stop_str_in_output",
    "ignore_eos",
)  # fmt: skip
"""Parameters that mean nothing here: how many questions there are, and where one ends, is the task's own."""


@dataclass(frozen=True, slots=True)
class _Encoder:
    """A model with a task head, and what this request has spent on it."""

    run: TaskRun
    model: ServedModel
    task: TaskModel

    @property
    def most(self) -> int:
        """Sequences of a passage that are read at once: with the others' as many as one request may have."""
        limits = self.run.service.limits
        return min(limits.max_extract_windows, limits.max_queue_requests) // AHEAD or 1

    async def logits(self, sequences: Sequence[Encoded], *, field: str) -> list[Logits]:
        """Of each."""
        parts = [
            await self.run.logits(self.model, self.task, sequences[first : first + self.most], field=field)
            for first in range(0, len(sequences), self.most)
        ]
        return list(chain.from_iterable(parts))


class Synthesis:
    """
    An admitted request. Read `events` to the end, or close it: what the engines still hold is let go then.

    Attributes:
        seed: of the request, or drawn. writer: of questions. proposed_by: the answer model's name, or `RULE`.
        reader_name: empty where nothing is checked.
        summary: so far.
    """

    def __init__(
        self, call: Call, wanted: Wanted, writer: Writer, proposer: _Encoder | None, reader: _Encoder | None, seed: int
    ) -> None:
        self.seed, self.writer = seed, writer
        self.proposed_by = RULE if proposer is None else proposer.model.name
        self.reader_name = "" if reader is None else reader.model.name
        self.summary = Summary()
        self._call, self._wanted, self._proposer, self._reader = call, wanted, proposer, reader
        self._filter: Filter = wanted.filter or FILTERS[0]  # type: ignore[assignment]  # checked

    @property
    def usage(self) -> Usage:
        """Of all models so far."""
        encoders = [item.run.tokens for item in (self._proposer, self._reader) if item is not None]
        return Usage(
            prompt_tokens=self.writer.prompt_tokens + sum(encoders),
            generated_tokens=self.writer.generated_tokens,
            cached_tokens=self.writer.cached_tokens,
        )

    async def events(self) -> AsyncGenerator[Triple | PassageDone, None]:
        """
        Each passage's triples, and its end; what the time limit cuts off is left out by whole passages.

        Raises:
            TrilithonError: an engine could not finish; passages that were told stand.
        """
        waiting = deque(enumerate(self._wanted.passages))
        running: deque[tuple[Passage, asyncio.Task[list[Triple]]]] = deque()
        try:
            while waiting or running:
                while waiting and len(running) < AHEAD:
                    index, passage = waiting.popleft()
                    running.append((passage, asyncio.create_task(self._work(index, passage))))
                passage, task = running[0]
                try:
                    triples = await task
                except DeadlineExceeded as error:
                    if error.code != "timeout":
                        raise
                    self.summary.is_complete = False
                    return
                running.popleft()
                self.summary.add(triples)
                for triple in triples:
                    yield triple
                answers = len({(triple.start, triple.answer) for triple in triples})
                yield PassageDone(passage.id, answers, len(triples), sum(triple.kept for triple in triples))
        finally:
            for _, task in running:
                task.cancel()
            await asyncio.gather(*(task for _, task in running), return_exceptions=True)

    async def _work(self, index: int, passage: Passage) -> list[Triple]:
        """All triples of a passage."""
        text, where = passage.text, f"passages[{index}].text"
        count, more = self._wanted.questions or DEFAULT_QUESTIONS, self._wanted.unanswerable
        proposals = await self._propose(text, where)
        # Seeds of the second kind stand behind all that the first may have: one kind changes nothing for the other.
        draws = [(n, n) for n in range(count)] + [(n, MAX_QUESTIONS + n) for n in range(more)]
        sentences = await off_loop(len(text), lambda: split_sentences(text))
        about = await _all(self._write(text, sentences, item, draws, where) for item in proposals)
        written = list(chain.from_iterable(about))
        asked = await self._read(text, written, where)
        triples: list[Triple] = []
        for item, at in zip(proposals, range(0, len(asked), len(draws)), strict=True):
            answer = text[item.start : item.end]
            own, others = asked[at : at + count], asked[at + count : at + len(draws)]
            verdicts = judge(answer, own, self._filter) + judge_unanswerable(others, self._filter, answerable=own)
            triples += [
                Triple(
                    passage_id=passage.id,
                    question=said.text if said.question is None else said.question,
                    answer=answer,
                    start=item.start,
                    p_answer=item.probability,
                    qa_answer=found.reply or "",
                    qa_probability=found.probability,
                    kept=verdict.kept,
                    reason=verdict.reason,
                    is_impossible=place >= MAX_QUESTIONS,
                )
                for (_, place), said, found, verdict in zip(
                    draws, written[at : at + len(draws)], [*own, *others], verdicts, strict=True
                )
            ]
        return triples

    async def _write(
        self, text: str, sentences: Sequence[Span], item: Proposal, draws: Sequence[tuple[int, int]], where: str
    ) -> list[Written]:
        """The questions about one answer."""
        kinds = {place < MAX_QUESTIONS for _, place in draws}
        prompts = {
            kind: await self.writer.prompt(text, sentences, (item.start, item.end), answerable=kind) for kind in kinds
        }
        seeds = await off_loop(
            len(text) * len(draws), lambda: [seed_of(self.seed, text, item, place) for _, place in draws]
        )
        return await _all(
            self.writer.ask(prompts[place < MAX_QUESTIONS], n, seed=seed, field=where)
            for (n, place), seed in zip(draws, seeds, strict=True)
        )

    async def _propose(self, text: str, where: str) -> list[Proposal]:
        """Spans that could be asked for, likely ones more often."""
        candidates = await self._candidates(text, where)
        count = self._wanted.answers or DEFAULT_ANSWERS
        return await asyncio.to_thread(lambda: candidates.worded(text).sample(count, seed=seed_of(self.seed, text)))

    async def _candidates(self, text: str, where: str) -> Candidates:
        if self._proposer is None:
            return await off_loop(len(text), lambda: capitals_and_numbers(text))
        spans, pieces = self._proposer.task.format, self._proposer.task.pieces
        assert isinstance(spans, AnswerFormat)
        windows = await off_loop(len(text), lambda: spans.encode(text, pieces))
        logits = await self._proposer.logits([window.encoded for window in windows], field=where)
        return await asyncio.to_thread(spans.decode, windows, logits)

    async def _read(self, text: str, written: Sequence[Written], where: str) -> list[Asked]:
        """What the reader answers to each question that can be read."""
        if self._reader is None:
            return [asked(item) for item in written]
        spans, pieces = self._reader.task.format, self._reader.task.pieces
        assert isinstance(spans, SpanFormat)
        questions = [item.question for item in written if item.question is not None]
        read = await off_loop(len(text), lambda: pieces.text(text))
        answers: list[SpanAnswers] = []
        # A long text has hundreds of windows for each question, which would be a gigabyte for all of them.
        while rest := questions[len(answers) :]:
            windows = await asyncio.to_thread(_packed, spans, rest, read, pieces, most=self._reader.most)
            logits = await self._reader.logits([w.encoded for one in windows for w in one], field=where)
            answers += await asyncio.to_thread(_decoded, spans, text, windows, logits)
        found = iter(answers)
        return [asked(item) if item.question is None else _replied(item, next(found), spans) for item in written]


def _packed(
    spans: SpanFormat, questions: Sequence[str], read: Pieces, pieces: WordPieces, *, most: int
) -> list[tuple[SpanWindow, ...]]:
    """Windows of the first questions, about so many; at least those of one."""
    first = spans.windows(questions[0], read, pieces)
    more = questions[1 : most // len(first)]
    return [first, *(spans.windows(question, read, pieces) for question in more)]


def _decoded(
    spans: SpanFormat, text: str, windows: Sequence[Sequence[SpanWindow]], logits: Sequence[Logits]
) -> list[SpanAnswers]:
    rest = iter(logits)
    return [spans.decode(text, one, [next(rest) for _ in one]) for one in windows]


def _replied(item: Written, found: SpanAnswers, spans: SpanFormat) -> Asked:
    reply = found.best(spans.null_threshold)
    return asked(item, reply=reply, probability=found.answers[0].probability) if reply else asked(item)


async def synthesise(
    service: Service,
    call: Call,
    model_name: str,
    wanted: Wanted,
    values: Mapping[str, Any],
    *,
    found: Violations | None = None,
) -> Synthesis:
    """
    Check a request and find its models.

    Args:
        model_name: of the decoder that writes questions; empty for the first that was trained to, or the first.
        values: parameters by JSON name, none of `HIDDEN`.
        found: violations that the front has already found.
    Raises:
        TrilithonError: refused; nothing was begun.
    """
    violations = found if found is not None else Violations()
    _check(wanted, violations)
    TaskRun(service, call, {}, violations).check_texts("passages", [passage.text for passage in wanted.passages])
    writer = await writer_of(service, call, model_name, values)
    if wanted.unanswerable and (writer.format is None or not writer.format.unanswerable):
        raise FailedPrecondition(
            f"model `{writer.model.name}` has not learned to ask what a text does not answer.",
            code="unsupported_model",
            hint="Train one with options.unanswerable of the task question_gen, or set unanswerable_per_answer to 0.",
        )
    common = _common(values)
    proposer = await _encoder(service, call, common, wanted.answer_model or service.first("propose"), "propose")
    reader_name = wanted.reader_model or service.first("answer")
    is_checked = wanted.filter != "none"
    if is_checked and not reader_name:
        raise FailedPrecondition(
            "no model that answers questions is served, and the filter needs one.",
            code="unsupported_model",
            hint="Serve one of the task span_qa, or set filter to none.",
        )
    reader = await _encoder(service, call, common, reader_name, "answer") if is_checked else None
    if wanted.unanswerable and reader is not None and _always_answers(reader.task):
        raise FailedPrecondition(
            f"model `{reader.model.name}` answers every question, so it cannot tell which have no answer.",
            code="unsupported_model",
            hint="Serve a reader that learned from questions without an answer, or set filter to none.",
        )
    bounds = writer.model.bounds(call.principal, writer.model.ready())
    seed = validate(values, bounds, violations).seed
    violations.raise_if_any()
    return Synthesis(call, wanted, writer, proposer, reader, secrets.randbits(63) if seed is None else seed)


async def _encoder(
    service: Service, call: Call, values: Mapping[str, Any], name: str, capability: TaskCapability
) -> _Encoder | None:
    if not name:
        return None
    run = TaskRun(service, call, values, None)
    model, task = await run.model(name, capability)
    return _Encoder(run, model, task)


def _always_answers(task: TaskModel) -> bool:
    return isinstance(task.format, SpanFormat) and task.format.null_threshold is None


def _common(values: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that belong to a request rather than to a draw."""
    names = {rule.name for rule in TASK_RULES if rule.proto.startswith("meta.")}
    return {name: value for name, value in values.items() if name in names}


def _check(wanted: Wanted, found: Violations) -> None:
    given = len(wanted.passages)
    if given > MAX_PASSAGES:
        todo = "Use the command `trilithon synth-qa`, which works through files of any size."
        found.add("passages", f"must hold at most {MAX_PASSAGES} passages", given=given, todo=todo)
        found.raise_if_any()
    seen: set[str] = set()
    for i, passage in enumerate(wanted.passages):
        if not passage.id:
            found.add(f"passages[{i}].id", "must not be empty", code="missing_parameter")
        elif passage.id in seen:
            found.add(f"passages[{i}].id", "must be given once", given=passage.id)
        seen.add(passage.id)
    for name, value, most in (
        ("answers_per_passage", wanted.answers, MAX_ANSWERS),
        ("questions_per_answer", wanted.questions, MAX_QUESTIONS),
    ):
        if not 0 <= value <= most:
            found.add(name, f"must be from 1 to {most}", given=value)
    if not 0 <= wanted.unanswerable <= MAX_QUESTIONS:
        found.add("unanswerable_per_answer", f"must be from 0 to {MAX_QUESTIONS}", given=wanted.unanswerable)
    if wanted.filter and wanted.filter not in FILTERS:
        hint = nearest(wanted.filter, FILTERS).strip()
        found.add("filter", f"must be one of {', '.join(FILTERS)}", given=wanted.filter, todo=hint)
    if wanted.filter == "none" and wanted.reader_model:
        found.add("reader_model", "must be empty where `filter` is none: nothing is checked", given=wanted.reader_model)


def seed_of(seed: int, text: str, answer: Proposal | None = None, number: int = 0) -> int:
    """Of the draws of a passage's answers, or of one question; from 0 to 2**63 - 1."""
    place = "" if answer is None else f"{answer.start} {answer.end} {number}"
    digest = hashlib.sha256(f"{seed}\0{place}\0{text}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; the first error ends the others."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
