"""The client for an event loop: the same operations, results and errors as `Client`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

from trilithon import _requests
from trilithon._address import settings_for
from trilithon._async_jobs import AsyncFiles, AsyncJobs
from trilithon._client import DEFAULT_TIMEOUT_S
from trilithon._decode import decode
from trilithon._dialogue import AsyncDialogue
from trilithon._extract import AsyncExtract
from trilithon._models import AsyncModels
from trilithon._openqa import AsyncOpenQA
from trilithon._parameters import CallOptions, ChatOptions, GenerationOptions, Message
from trilithon._requests import PromptInput, ScoreItem
from trilithon._retrieval import AsyncRetrieval
from trilithon._retry import Retries, new_request_id
from trilithon._stories import AsyncStories
from trilithon._streams import AsyncStream
from trilithon._synth_qa import EVENTS as SYNTH_QA_EVENTS
from trilithon._synth_qa import AsyncSynthQAStream, Filter, SynthQAOptions, SynthQAPassage, synth_qa_fields
from trilithon._synth_qa_types import SynthQASummary
from trilithon._task_streams import AsyncTaskStream
from trilithon._transport import (
    ABORT,
    DETOKENIZE,
    EMBED,
    GENERATE,
    HEALTH,
    RENDER,
    SCORE,
    SYNTH_QA,
    TOKENIZE,
    AsyncEventStream,
    AsyncTransport,
    AttemptFailed,
    Fields,
    Operation,
    Settings,
)
from trilithon._types import (
    Aborted,
    Completion,
    Completions,
    Embeddings,
    Health,
    Rendered,
    Scores,
    Texts,
    Tokenization,
)

T = TypeVar("T")


class AsyncClient:
    """
    One server, over HTTP or gRPC, for one event loop; close it, or use it as an asynchronous context manager.

        from trilithon import AsyncClient

        async with AsyncClient("grpc://127.0.0.1:8001") as client:
            print((await client.generate("Once upon a time", max_tokens=48, seed=7)).text)

    Arguments and errors are those of `Client`.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: float | None = None,
        max_retries: int = 2,
        tls_ca: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        transport: AsyncTransport | None = None,
    ) -> None:
        self._settings = settings_for(
            url, api_key=api_key, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, headers=headers
        )
        self._timeout = timeout
        self._max_retries = max_retries
        self._transport = transport or _connect(self._settings)
        self.models = AsyncModels(self)
        self.jobs = AsyncJobs(self)
        self.files = AsyncFiles(self)
        self.extract = AsyncExtract(self)
        self.dialogue = AsyncDialogue(self)
        self.stories = AsyncStories(self)
        self.retrieval = AsyncRetrieval(self)
        self.openqa = AsyncOpenQA(self)

    @overload
    async def generate(
        self,
        prompt: PromptInput,
        *,
        stream: Literal[False] = False,
        n: None = None,
        **options: Unpack[GenerationOptions],
    ) -> Completion: ...
    @overload
    async def generate(
        self,
        prompt: PromptInput,
        *,
        stream: Literal[False] = False,
        n: int,
        **options: Unpack[GenerationOptions],
    ) -> Completions: ...
    @overload
    async def generate(
        self,
        prompt: PromptInput,
        *,
        stream: Literal[True],
        n: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncStream: ...
    async def generate(
        self,
        prompt: PromptInput,
        *,
        stream: bool = False,
        n: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Completion | Completions | AsyncStream:
        """
        Go on from a prompt.

        Args:
            prompt: text, or token ids that are used as they are.
            stream: return a `AsyncStream` of deltas as they come.
            n: how many answers; with it the result is a `Completions`, without it one `Completion`.
            options: see `GenerationOptions`.
        """
        return await self._generate(_requests.generate(prompt, n, options), stream, n, options)

    @overload
    async def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[False] = False,
        n: None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion: ...
    @overload
    async def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[False] = False,
        n: int,
        **options: Unpack[ChatOptions],
    ) -> Completions: ...
    @overload
    async def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[True],
        n: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncStream: ...
    async def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: bool = False,
        n: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion | Completions | AsyncStream:
        """
        Answer a conversation, rendered by the model's own template.

        Args:
            messages: from the first to the last, each with `role` and `content`.
            stream, n: as in `generate`.
            options: see `ChatOptions`.
        """
        return await self._generate(_requests.chat(messages, n, options), stream, n, options)

    async def score(
        self,
        items: Sequence[ScoreItem],
        *,
        top: int | None = None,
        **options: Unpack[CallOptions],
    ) -> Scores:
        """
        How likely are these continuations?

        Args:
            items: each a `context` and its `continuations` (or `continuation_tokens`).
            top: also report this many likeliest tokens at each position, 0 to 20.
        """
        return await self._call(SCORE, _requests.score(items, top, options), options, Scores)

    async def embed(
        self,
        inputs: Sequence[PromptInput],
        *,
        pooling: Literal["mean", "last", "first"] | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        **options: Unpack[CallOptions],
    ) -> Embeddings:
        """
        Vectors for texts, from an encoder model.

        Args:
            inputs: 1 to 256 texts, or lists of token ids.
            pooling: how token vectors become one. Default: the model's own way.
            normalize: scale to unit length. Default: the model's own way.
            dimensions: keep only so many leading values.
        """
        return await self._call(
            EMBED, _requests.embed(inputs, pooling, normalize, dimensions, options), options, Embeddings
        )

    async def synth_qa(
        self,
        passages: Sequence[SynthQAPassage],
        *,
        answers_per_passage: int | None = None,
        questions_per_answer: int | None = None,
        unanswerable_per_answer: int | None = None,
        filter: Filter | None = None,
        answer_model: str | None = None,
        reader_model: str | None = None,
        **options: Unpack[SynthQAOptions],
    ) -> AsyncSynthQAStream:
        """
        Questions and answers made from passages, as they are made; the stream's `result` says what they came to.

        A passage's triples depend on the seed and on its text alone.

        Args:
            passages: 1 to 64.
            answers_per_passage: at most, 1 to 20. Default: 5.
            questions_per_answer: 1 to 8. Default: 2.
            unanswerable_per_answer: questions that the passage does not answer, 0 to 8. Default: 0.
            filter: keep all questions of an answer where any leads back to it, those that do, or all that can be read.
                Default: pair_any.
            answer_model: proposes answers. Default: the first served that can, else a rule.
            reader_model: checks the questions. Default: the first served that answers questions.
            options: `model` writes the questions [the first that was trained to, or can write].
        """
        fields = synth_qa_fields(
            passages,
            answers_per_passage,
            questions_per_answer,
            unanswerable_per_answer,
            filter,
            answer_model,
            reader_model,
            options,
        )
        return await self._stream(SYNTH_QA, fields, options, SYNTH_QA_EVENTS, SynthQASummary)

    async def tokenize(
        self,
        texts: Sequence[str],
        *,
        add_special_tokens: bool | None = None,
        return_pieces: bool | None = None,
        return_offsets: bool | None = None,
        truncate_tokens: int | None = None,
        **options: Unpack[CallOptions],
    ) -> Tokenization:
        """Token ids of texts, exactly as the engine would see them."""
        fields = {
            "texts": list(texts),
            "add_special_tokens": add_special_tokens,
            "return_pieces": return_pieces,
            "return_offsets": return_offsets,
            "truncate_tokens": truncate_tokens,
        }
        return await self._call(TOKENIZE, _requests.plain("tokenize", fields, options), options, Tokenization)

    async def detokenize(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        keep_special_tokens: bool | None = None,
        **options: Unpack[CallOptions],
    ) -> Texts:
        """Texts of lists of token ids."""
        fields = {"tokens": [list(ids) for ids in tokens], "keep_special_tokens": keep_special_tokens}
        return await self._call(DETOKENIZE, _requests.plain("detokenize", fields, options), options, Texts)

    async def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        **options: Unpack[CallOptions],
    ) -> Rendered:
        """The prompt that the model's template makes of a conversation."""
        fields = {
            "messages": list(messages),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        return await self._call(RENDER, _requests.plain("render", fields, options), options, Rendered)

    async def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        """End a request of the same key, by its id; whether it was queued or running."""
        options: CallOptions = {} if timeout is None else {"timeout": timeout}
        return (await self._call(ABORT, {"request_id": request_id}, options, Aborted)).was_running

    async def health(self, *, timeout: float | None = None) -> Health:
        """Whether the server takes work; raises ConnectionFailed at once when nothing answers."""
        retries = self._retries({} if timeout is None else {"timeout": timeout}, max_retries=0)
        return decode(Health, await self._attempts(HEALTH, {}, retries))

    async def aclose(self) -> None:
        """Let go of all connections; streams that still run end."""
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._settings.url!r})"

    async def _generate(
        self, fields: Fields, stream: bool, n: int | None, options: CallOptions
    ) -> Completion | Completions | AsyncStream:
        if not stream:
            return await self._call(GENERATE, fields, options, Completion if n is None else Completions)
        return await self._open(GENERATE, fields, options, lambda events: AsyncStream(events)._open())

    async def _stream(
        self,
        operation: Operation,
        fields: Fields,
        options: CallOptions,
        kinds: Mapping[str, type[Any]],
        result: type[T],
    ) -> AsyncTaskStream[Any, T]:
        return await self._open(
            operation, fields, options, lambda events: AsyncTaskStream(events, kinds, result).open()
        )

    async def _open(
        self,
        operation: Operation,
        fields: Fields,
        options: CallOptions,
        begin: Callable[[AsyncEventStream], Awaitable[T]],
    ) -> T:
        retries = self._retries(options)
        while True:
            try:
                return await begin(await self._transport.stream(fields, retries.attempt(), operation))
            except AttemptFailed as failed:
                delay_s = retries.delay_after(failed)
            await _sleep(delay_s)

    async def _call(self, operation: Operation, fields: Fields, options: CallOptions, kind: type[T]) -> T:
        return decode(kind, await self._attempts(operation, fields, self._retries(options)))

    async def _attempts(self, operation: Operation, fields: Fields, retries: Retries) -> Mapping[str, Any]:
        while True:
            try:
                return await self._transport.call(operation, fields, retries.attempt())
            except AttemptFailed as failed:
                delay_s = retries.delay_after(failed)
            await _sleep(delay_s)

    def _retries(self, options: CallOptions, *, max_retries: int | None = None) -> Retries:
        timeout = options.get("timeout", self._timeout)
        return Retries(
            request_id=options.get("request_id") or new_request_id(),
            timeout_s=DEFAULT_TIMEOUT_S if timeout is None else timeout,
            max_retries=self._max_retries if max_retries is None else max_retries,
            tell_server=timeout is not None,
        )


async def _sleep(delay_s: float) -> None:
    import asyncio  # a base import does without it

    await asyncio.sleep(delay_s)


def _connect(settings: Settings) -> AsyncTransport:
    # Imported here: neither library is needed for the other protocol, and both take their time.
    if settings.scheme == "grpc":
        from trilithon._grpc import AsyncGrpcTransport

        return AsyncGrpcTransport(settings)
    from trilithon._http import AsyncHttpTransport

    return AsyncHttpTransport(settings)
