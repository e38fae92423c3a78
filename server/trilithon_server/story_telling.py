"""
The telling of a story: keywords, facts, a sentence, and again, until it has its length.

    story so far -> keywords (given, or predicted) -> facts of the concept graph -> the best -> the next sentence

Each step is a request of its own to an engine: all obey the call's deadline, and an end of the call ends the one that
runs. Whatever is drawn depends on the story's seed and the sentence's index, so a story repeats, alone or in a batch,
and a rewrite changes what follows alone.

Source: arXiv 2010.00840 (Megatron-CNTRL).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from trilithon.errors import Cancelled, DeadlineExceeded, InvalidArgument
from trilithon_server.assembly import FinishReason, TokenInfo
from trilithon_server.generation import Generation, Timings, Usage
from trilithon_server.knowledge.fact_vectors import ScoredFact
from trilithon_server.knowledge.sentences import split_sentences
from trilithon_server.prompts import Sequenced
from trilithon_server.served import Call, ServedModel
from trilithon_server.service import Service
from trilithon_server.story_knowledge import ranked
from trilithon_server.story_models import Cast
from trilithon_server.story_requests import DEFAULT_TOKENS, META, Sentence, Story
from trilithon_server.tasks.story_format import NoRoom, Packed
from trilithon_server.tasks.writing import one_line

KEYWORD_TOKENS = 32
"""Of a prediction."""


@dataclass(frozen=True, slots=True)
class _Written:
    """What a model wrote: its first sentence, or its line."""

    text: str
    logprob: float
    finish: FinishReason


class Telling:
    """
    A story that is being written; an asynchronous context manager. Nothing is in an engine yet when it is made.

    Args:
        cast: who writes it.
        story: as far as it is written; the rest is written here.
        known: keywords that sentences had before, by index.
        values: parameters of this request itself, by JSON name; the story has those of its sentences.
        is_new: whether nothing is kept of the story yet; else it is written again.

    Attributes:
        story: so far; kept on the server under its id after each sentence, see `_keep`.
        reused: how many sentences were there before, the first ones.
        finish: why it ended; TIME_LIMIT where it is shorter than asked for that reason.
    """

    def __init__(
        self,
        service: Service,
        call: Call,
        cast: Cast,
        story: Story,
        *,
        known: Mapping[int, Sequence[str]],
        values: Mapping[str, Any],
        is_new: bool,
    ) -> None:
        self.story = story
        self.finish: FinishReason | None = None
        self.call, self.cast = call, cast
        self._service, self._known = service, known
        self._values = {name: values[name] for name in META if name in values}
        self.reused = len(story.sentences)
        self._is_new = is_new
        self._kept: Story | None = None  # the last one that was kept by this telling
        self._steps: list[Generation] = []
        self._aborted = False

    async def __aenter__(self) -> Telling:
        self._service.running.add(self.call, self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._service.running.remove(self.call, self)

    def abort(self, cause: str) -> None:
        """End it before its next step; the step that runs is in the table of running requests itself."""
        self._aborted = True

    async def sentences(self) -> AsyncGenerator[tuple[Sentence, bool], None]:
        """
        Each sentence with whether it was there before; first those that were, then the new ones as they are written.

        Raises:
            TrilithonError: an engine refused or could not finish; what was written before is kept.
        """
        if self._is_new:
            self._keep()
        for sentence in self.story.sentences:
            yield sentence, True
        while len(self.story.sentences) < self.story.asked.length:
            try:
                sentence = await self._next()
            except DeadlineExceeded as error:
                if error.code != "timeout" or len(self.story.sentences) == self.reused:
                    raise
                self.finish = FinishReason.TIME_LIMIT
                return
            self.finish = sentence.finish
            if not sentence.text:  # the model has nothing more to tell
                return
            self.story = replace(self.story, sentences=(*self.story.sentences, sentence))
            self._keep()
            yield sentence, False
            if sentence.finish is FinishReason.TIME_LIMIT:
                return

    def _keep(self) -> None:
        """
        Keep the story so far, but not where it was deleted meanwhile, nor where another telling of it was kept since
        this one was: that one began later, or was later with its first sentence.
        """
        stories, tenant, id = self._service.stories, self.call.principal.tenant, self.story.id
        found = stories.get(tenant, id)
        if self._kept is not None:
            may = found is self._kept
        else:
            may = self._is_new or found is not None
        if may:
            stories.put(tenant, id, self.story)
            self._kept = self.story

    # -- one sentence ---------------------------------------------------------------------------------------

    async def _next(self) -> Sentence:
        story, cast = self.story, self.cast
        told = [sentence.text for sentence in story.sentences]
        index = len(told) + 1
        keywords, unopposed = await self._keywords(index, told)
        facts, unknown = await self._facts(told, keywords)
        wanted = story.values.get("max_tokens") or DEFAULT_TOKENS

        def pack() -> Packed:
            return cast.writing.pack(
                told,
                cast.writer.tokenizer,
                keywords=keywords,
                knowledge=[one.fact.text for one in facts],
                room=_room(cast.writer, wanted),
            )

        packed = await _packed(cast.writer, pack)
        drawn = {**story.values, **self._values, "seed": seed_of(story.seed, index), "max_tokens": wanted}
        drawn |= cast.writing.drawing(told, cast.writer.tokenizer)
        written = await self._write(cast.writer, packed, drawn, cast.writing.stops)
        return Sentence(
            index=index,
            text=cast.writing.with_names(written.text, told),
            keywords=tuple(keywords),
            facts=tuple(facts[: packed.knowledge]),
            unknown=unknown,
            unopposed=unopposed,
            logprob=written.logprob,
            finish=written.finish,
        )

    async def _keywords(self, index: int, told: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
        """Of a sentence, and those that were to be turned and have no opposite."""
        control = self.story.controls.get(index)
        given = [one_line(word) for word in control.keywords] if control is not None else []
        if control is None:
            return await self._predicted(index, told), ()
        if control.mode == "replace":
            return list(dict.fromkeys(given)), ()
        if control.mode == "append":
            return list(dict.fromkeys([*given, *await self._predicted(index, told)])), ()
        concepts = self._service.concepts
        assert concepts is not None  # checked with the request
        turned = [concepts.words.opposite(word) for word in given or await self._predicted(index, told)]
        unopposed = tuple(one.keyword for one in turned if not one.is_found)
        return list(dict.fromkeys(one.text for one in turned)), unopposed

    async def _predicted(self, index: int, told: Sequence[str]) -> list[str]:
        """What the sentence was about before, else what the predictor says."""
        if index in self._known:
            return list(self._known[index])
        cast = self.cast
        room = _room(cast.predictor, KEYWORD_TOKENS)
        packed = await _packed(cast.predictor, lambda: cast.predicting.pack(told, cast.predictor.tokenizer, room=room))
        values = {**self._values, "temperature": 0, "max_tokens": KEYWORD_TOKENS, "skip_special_tokens": False}
        values |= cast.predicting.drawing(told, cast.predictor.tokenizer)
        written = await self._write(cast.predictor, packed, values, cast.predicting.stops, whole=True)
        return cast.predicting.read(cast.predicting.with_names(written.text, told))

    async def _facts(self, told: Sequence[str], keywords: Sequence[str]) -> tuple[list[ScoredFact], tuple[str, ...]]:
        """The best facts of the keywords, and keywords that no concept stands for."""
        concepts, ranker = self._service.concepts, self.cast.ranker
        if not self.story.knowledge_k or concepts is None or ranker is None:
            return [], ()
        found = concepts.graph.facts(keywords)
        if not found.facts:
            return [], found.unknown
        self._check_aborted()
        scored = await ranked(self._service, self.call, ranker, told, keywords, found, self._values)
        return scored[: self.story.knowledge_k], found.unknown

    async def _write(
        self,
        model: ServedModel,
        packed: Packed,
        values: Mapping[str, Any],
        stops: Sequence[str],
        *,
        whole: bool = False,
    ) -> _Written:
        """Let a model write behind a prompt: a line, or only the first sentence of it."""
        self._check_aborted()
        generation = await self._service.generate(
            self.call,
            model.name,
            [Sequenced(ids=packed.tokens)],
            {**with_stops(values, stops), "logprobs": 0},
            stream=True,
            field="first_sentence",
        )
        self._steps.append(generation)
        text, tokens = "", list[TokenInfo]()
        async with generation:
            async with aclosing(generation.news()) as news:
                async for part, choice in news:
                    if choice is None:
                        continue
                    more, infos, _ = choice.take()
                    text, tokens = text + more, tokens + infos
                    end = None if whole else first_end(text)
                    if end is None:
                        continue
                    text = text[:end]
                    if choice.finish is None:
                        part.stream.abort_sequence(choice.index)
                    choice.finish = FinishReason.STOP_SEQUENCE
                    break
            finish = generation.choices[0].finish
        assert finish is not None  # the news end with it
        logprob = sum(info.logprob or 0.0 for info in tokens if info.offset < len(text))
        return _Written(one_line(text), logprob, finish)

    def _check_aborted(self) -> None:
        if self._aborted:
            raise Cancelled("the request was cancelled before it was finished.")

    # -- counting -------------------------------------------------------------------------------------------

    @property
    def usage(self) -> Usage:
        """Tokens of all steps that wrote."""
        counts = [generation.usage for generation in self._steps]
        return Usage(
            prompt_tokens=sum(count.prompt_tokens for count in counts),
            generated_tokens=sum(count.generated_tokens for count in counts),
            cached_tokens=sum(count.cached_tokens for count in counts),
            preemptions=sum(count.preemptions for count in counts),
        )

    @property
    def timings(self) -> Timings:
        """Of the first step that wrote up to its first token; `decode_ms` is all that came after."""
        first = (
            self._steps[0].timings
            if self._steps
            else Timings(queue_ms=0.0, prefill_ms=0.0, first_token_ms=0.0, decode_ms=0.0, total_ms=0.0)
        )
        total_ms = 1000 * (time.monotonic() - self.call.arrived_s)
        return replace(first, decode_ms=max(0.0, total_ms - first.first_token_ms), total_ms=total_ms)


def first_end(text: str) -> int | None:
    """
    Where the first sentence of a growing text ends, as soon as another begins: what comes then changes nothing.

    >>> first_end("Tom ran. The dog"), first_end("Tom ran. ")
    (8, None)
    """
    found = split_sentences(text)
    return found[0][1] if len(found) > 1 else None


def seed_of(seed: int, index: int) -> int:
    """The seed of one sentence: 63 bits of the story's and its index."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest(), "little") >> 1


def with_stops(values: Mapping[str, Any], stops: Sequence[str]) -> dict[str, Any]:
    """Parameters with what ends a text of the format beside what the caller says; no list is for the validator."""
    given = values.get("stop")
    own = [] if given is None else [given] if isinstance(given, str) else given
    return {**values, "stop": [*own, *stops]} if stops and isinstance(own, list) else dict(values)


def _room(model: ServedModel, wanted: int) -> int:
    """Tokens that a prompt may have beside an answer of so many."""
    hello = model.ready()
    return max(1, min(hello.max_context_tokens, hello.kv_capacity_tokens or hello.max_context_tokens) - wanted)


async def _packed(model: ServedModel, pack: Callable[[], Packed]) -> Packed:
    """A prompt, made beside the loop."""
    try:
        return await asyncio.to_thread(pack)
    except NoRoom as error:
        raise InvalidArgument(
            f"model `{model.name}` has no room for this story: {error}",
            code="prompt_too_long",
            hint="Shorten the first sentence, give fewer keywords, or lower max_tokens.",
        ) from None
    except ValueError as error:  # characters that the tokenizer needs for itself
        raise InvalidArgument(f"the story {error}.", code="invalid_value", hint="Take it out.") from None
