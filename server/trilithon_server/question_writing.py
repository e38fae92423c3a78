"""One question from a served decoder: in the format that it was trained on, or asked for in words."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trilithon.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument
from trilithon_server.assembly import FinishReason
from trilithon_server.prompts import Conversation, Prompt, Sequenced
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.task_model import adapter_task
from trilithon_server.tasks import plain_questions
from trilithon_server.tasks.pieces import Span
from trilithon_server.tasks.question_format import CLOSE, QuestionFormat, read_question
from trilithon_server.tasks.round_trip import Asked

IN_FLIGHT = 32
"""Questions of one request that are written at once."""

DRAWS: tuple[Mapping[str, Any], ...] = ({"top_k": 40}, {"top_p": 0.9})
"""How the questions of an answer are drawn in turn, unless the request says: two ways differ more than two draws."""

_SHAPING = ("top_k", "top_p", "min_p", "typical_p")
_NO_ROOM = ("prompt_too_long", "context_length_exceeded", "kv_capacity_exceeded")
"""Codes of a refusal that means: the prompt and a question behind it are more than the model can hold."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a model wrote, and the question in it; None where there is none, or nothing was written."""

    text: str
    question: str | None
    too_long: bool = False


@dataclass(slots=True)
class Writer:
    """
    Who writes the questions of a request.

    Attributes:
        format: of the model; None: it was not trained to ask, and is asked in words.
        values: parameters of the request.
        gate: how many may be written at once. packing: prompts are made one after another, in a thread.
        prompt_tokens, generated_tokens, cached_tokens: so far.
    """

    service: Service
    call: Call
    model: ServedModel
    format: QuestionFormat | None
    values: Mapping[str, Any]
    gate: asyncio.Semaphore
    packing: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    prompt_tokens: int = field(default=0, init=False)
    generated_tokens: int = field(default=0, init=False)
    cached_tokens: int = field(default=0, init=False)

    async def prompt(
        self, text: str, sentences: Sequence[Span], answer: Span, *, answerable: bool = True
    ) -> Prompt | None:
        """
        What questions about characters [start, end) of a text are asked with, or those that they only seem to answer;
        None where the answer fills the context.

        Args:
            sentences: of the text.
        """
        async with self.packing:
            try:
                return await asyncio.to_thread(self._prompt, text, sentences, answer, answerable=answerable)
            except ValueError:
                return None

    async def ask(self, prompt: Prompt | None, number: int, *, seed: int, field: str) -> Written:
        """
        The question `number` of a prompt.

        Raises:
            TrilithonError: refused, or the engine could not finish.
        """
        if prompt is None:
            return Written("", None, too_long=True)
        values = {**self._draw(number), **self.values, "seed": seed, **self._ends()}
        async with self.gate:
            try:
                generation = await self.service.generate(self.call, self.model.name, [prompt], values, field=field)
            except InvalidArgument as error:
                # A task's format knows its length; whether words fit is only known as tokens.
                if self.format is not None or error.code not in _NO_ROOM:
                    raise
                return Written("", None, too_long=True)
            async with generation:
                await generation.joined()
        (choice,) = generation.choices
        usage = generation.usage
        self.prompt_tokens += usage.prompt_tokens
        self.generated_tokens += usage.generated_tokens
        self.cached_tokens += usage.cached_tokens
        if choice.finish is FinishReason.TIME_LIMIT:
            raise DeadlineExceeded("the time limit passed before the question was written.", code="timeout")
        said = choice.take()[0]
        return Written(said.strip(), plain_questions.read_reply(said) if self.format is None else read_question(said))

    def _draw(self, number: int) -> Mapping[str, Any]:
        return {} if any(name in self.values for name in _SHAPING) else DRAWS[number % len(DRAWS)]

    def _ends(self) -> dict[str, Any]:
        most = plain_questions.MAX_TOKENS if self.format is None else self.format.max_question
        stop = plain_questions.STOP if self.format is None else CLOSE
        return {"max_tokens": most, "stop": [stop], "include_stop_str_in_output": True}

    def _prompt(self, text: str, sentences: Sequence[Span], answer: Span, *, answerable: bool) -> Prompt:
        if self.format is not None:
            packed = self.format.pack(text, answer, self.model.tokenizer, answerable=answerable, sentences=sentences)
            return Sequenced(ids=packed.tokens, types=packed.types, answer_type=packed.answer_type)
        if "chat" not in self.model.capabilities:
            return plain_questions.question_prompt(text, answer, sentences)
        content = plain_questions.question_instruction(text, answer, sentences)
        return Conversation(messages=[{"role": "user", "content": content}])


async def writer_of(service: Service, call: Call, name: str, values: Mapping[str, Any]) -> Writer:
    """
    The model that writes questions: the one named, else the first that was trained to, else the first that writes.

    Raises:
        TrilithonError: there is none, or it cannot.
    """
    trained = next((known for known, model in service.models.items() if model.questions is not None), "")
    name = name or trained or service.first("generate")
    if not name:
        raise FailedPrecondition(
            "no model that writes is served, and questions need one.",
            code="unsupported_model",
            hint="Serve a decoder, best one of the task question_gen.",
        )
    model = await service.resolve(name, call)
    model.require("generate")
    model.ready()
    known = model.questions
    if model.adapter is not None:
        task = adapter_task(model.adapter.directory, model.adapter.digest)
        known = task if isinstance(task, QuestionFormat) else None
    if known is not None and not model.tokenizer.eos_ids:
        raise FailedPrecondition(
            f"model `{model.name}` has no end token, and a question ends with one.",
            code="task_tokenizer",
            hint="Name the end token in the model's tokenizer_config.json.",
        )
    return Writer(
        service, call, model, known, values, asyncio.Semaphore(min(IN_FLIGHT, service.limits.max_queue_requests))
    )


def asked(written: Written, *, reply: str | None = None, probability: float = 0.0) -> Asked:
    """A question as the round trip judges it."""
    return Asked(written.question, too_long=written.too_long, reply=reply, probability=probability)
