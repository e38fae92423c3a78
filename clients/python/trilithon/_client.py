"""The client for threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

from trilithon import _requests
from trilithon._address import settings_for
from trilithon._decode import decode
from trilithon._dialogue import Dialogue
from trilithon._extract import Extract
from trilithon._jobs import Files, Jobs
from trilithon._models import Models
from trilithon._openqa import OpenQA
from trilithon._parameters import CallOptions, ChatOptions, GenerationOptions, Message
from trilithon._requests import PromptInput, ScoreItem
from trilithon._retrieval import Retrieval
from trilithon._retry import Retries, new_request_id
from trilithon._stories import Stories
from trilithon._streams import Stream
from trilithon._synth_qa import EVENTS as SYNTH_QA_EVENTS
from trilithon._synth_qa import Filter, SynthQAOptions, SynthQAPassage, SynthQAStream, synth_qa_fields
from trilithon._synth_qa_types import SynthQASummary
from trilithon._task_streams import TaskStream
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
    AttemptFailed,
    EventStream,
    Fields,
    Operation,
    Settings,
    Transport,
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
DEFAULT_TIMEOUT_S = 600.0


class Client:
    """
    One server, over HTTP or gRPC. Threads may share it; close it, or use it as a context manager.

        from trilithon import Client

        with Client("grpc://127.0.0.1:8001") as client:
            print(client.generate("Once upon a time", max_tokens=48, seed=7).text)

    Args:
        url: http://, https://, grpc:// or grpcs:// with host and port, or http+unix:///path and grpc+unix:///path.
        api_key: sent as a bearer token; never shown.
        timeout: seconds for each call as a whole, retries included; also sent to the server as its deadline.
            Default: 600, not sent.
        max_retries: further attempts after a refusal that may pass (429, 502, 503, 504, UNAVAILABLE,
            RESOURCE_EXHAUSTED) or a failed connect; never after the first streamed event.
        tls_ca, tls_cert, tls_key: PEM files, with https:// and grpcs://.
        headers: sent with every request.
        transport: reaches the server in some way of your own (tests run one in process).
    Raises:
        InvalidArgument: `url` is not such an address.
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
        transport: Transport | None = None,
    ) -> None:
        self._settings = settings_for(
            url, api_key=api_key, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, headers=headers
        )
        self._timeout = timeout
        self._max_retries = max_retries
        self._transport = transport or _connect(self._settings)
        self.models = Models(self)
        self.jobs = Jobs(self)
        self.files = Files(self)
        self.extract = Extract(self)
        self.dialogue = Dialogue(self)
        self.stories = Stories(self)
        self.retrieval = Retrieval(self)
        self.openqa = OpenQA(self)

    @overload
    def generate(
        self,
        prompt: PromptInput,
        *,
        stream: Literal[False] = False,
        n: None = None,
        **options: Unpack[GenerationOptions],
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: PromptInput,
        *,
        stream: Literal[False] = False,
        n: int,
        **options: Unpack[GenerationOptions],
    ) -> Completions: ...
    @overload
    def generate(
        self,
        prompt: PromptInput,
        *,
        stream: Literal[True],
        n: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Stream: ...
    def generate(
        self,
        prompt: PromptInput,
        *,
        stream: bool = False,
        n: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Completion | Completions | Stream:
        """
        Go on from a prompt.

        Args:
            prompt: text, or token ids that are used as they are.
            stream: return a `Stream` of deltas as they come.
            n: how many answers; with it the result is a `Completions`, without it one `Completion`.
            options: see `GenerationOptions`.
        """
        return self._generate(_requests.generate(prompt, n, options), stream, n, options)

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[False] = False,
        n: None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[False] = False,
        n: int,
        **options: Unpack[ChatOptions],
    ) -> Completions: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[True],
        n: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> Stream: ...
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: bool = False,
        n: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion | Completions | Stream:
        """
        Answer a conversation, rendered by the model's own template.

        Args:
            messages: from the first to the last, each with `role` and `content`.
            stream, n: as in `generate`.
            options: see `ChatOptions`.
        """
        return self._generate(_requests.chat(messages, n, options), stream, n, options)

    def score(self, items: Sequence[ScoreItem], *, top: int | None = None, **options: Unpack[CallOptions]) -> Scores:
        """
        How likely are these continuations?

        Args:
            items: each a `context` and its `continuations` (or `continuation_tokens`).
            top: also report this many likeliest tokens at each position, 0 to 20.
        """
        return self._call(SCORE, _requests.score(items, top, options), options, Scores)

    def embed(
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
        fields = _requests.embed(inputs, pooling, normalize, dimensions, options)
        return self._call(EMBED, fields, options, Embeddings)

    def synth_qa(
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
    ) -> SynthQAStream:
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
        return self._stream(SYNTH_QA, fields, options, SYNTH_QA_EVENTS, SynthQASummary)

    def tokenize(
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
        return self._call(TOKENIZE, _requests.plain("tokenize", fields, options), options, Tokenization)

    def detokenize(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        keep_special_tokens: bool | None = None,
        **options: Unpack[CallOptions],
    ) -> Texts:
        """Texts of lists of token ids."""
        fields = {"tokens": [list(ids) for ids in tokens], "keep_special_tokens": keep_special_tokens}
        return self._call(DETOKENIZE, _requests.plain("detokenize", fields, options), options, Texts)

    def render(
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
        return self._call(RENDER, _requests.plain("render", fields, options), options, Rendered)

    def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        """End a request of the same key, by its id; whether it was queued or running."""
        options: CallOptions = {} if timeout is None else {"timeout": timeout}
        return self._call(ABORT, {"request_id": request_id}, options, Aborted).was_running

    def health(self, *, timeout: float | None = None) -> Health:
        """Whether the server takes work; raises ConnectionFailed at once when nothing answers."""
        retries = self._retries({} if timeout is None else {"timeout": timeout}, max_retries=0)
        return decode(Health, self._attempts(HEALTH, {}, retries))

    def close(self) -> None:
        """Let go of all connections; streams that still run end."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._settings.url!r})"

    def _generate(
        self, fields: Fields, stream: bool, n: int | None, options: CallOptions
    ) -> Completion | Completions | Stream:
        if not stream:
            return self._call(GENERATE, fields, options, Completion if n is None else Completions)
        return self._open(GENERATE, fields, options, Stream)

    def _stream(
        self,
        operation: Operation,
        fields: Fields,
        options: CallOptions,
        kinds: Mapping[str, type[Any]],
        result: type[T],
    ) -> TaskStream[Any, T]:
        return self._open(operation, fields, options, lambda events: TaskStream(events, kinds, result))

    def _open(self, operation: Operation, fields: Fields, options: CallOptions, kind: Callable[[EventStream], T]) -> T:
        retries = self._retries(options)
        while True:
            try:
                return kind(self._transport.stream(fields, retries.attempt(), operation))
            except AttemptFailed as failed:
                delay_s = retries.delay_after(failed)
            time.sleep(delay_s)

    def _call(self, operation: Operation, fields: Fields, options: CallOptions, kind: type[T]) -> T:
        return decode(kind, self._attempts(operation, fields, self._retries(options)))

    def _attempts(self, operation: Operation, fields: Fields, retries: Retries) -> Mapping[str, Any]:
        while True:
            try:
                return self._transport.call(operation, fields, retries.attempt())
            except AttemptFailed as failed:
                delay_s = retries.delay_after(failed)
            time.sleep(delay_s)

    def _retries(self, options: CallOptions, *, max_retries: int | None = None) -> Retries:
        timeout = options.get("timeout", self._timeout)
        return Retries(
            request_id=options.get("request_id") or new_request_id(),
            timeout_s=DEFAULT_TIMEOUT_S if timeout is None else timeout,
            max_retries=self._max_retries if max_retries is None else max_retries,
            tell_server=timeout is not None,
        )


def _connect(settings: Settings) -> Transport:
    # Imported here: neither library is needed for the other protocol, and both take their time.
    if settings.scheme == "grpc":
        from trilithon._grpc import GrpcTransport

        return GrpcTransport(settings)
    from trilithon._http import HttpTransport

    return HttpTransport(settings)
