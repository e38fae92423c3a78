"""A model that this server offers, and who is asking for it: what every call of the service works with."""

from __future__ import annotations

import copy
import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from trilithon.errors import InvalidArgument, Unavailable
from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.auth import Principal
from trilithon_server.config import LimitsConfig
from trilithon_server.engine import wire_pb2 as wire
from trilithon_server.engine.constraint_check import ConstraintChecker
from trilithon_server.engine_client import EngineClient
from trilithon_server.limits import bounds_for
from trilithon_server.metrics import RequestRecord
from trilithon_server.task_model import TaskCapability, TaskModel
from trilithon_server.tasks.dialogue_format import DialogueFormat
from trilithon_server.tasks.msdp_format import MsdpFormat
from trilithon_server.tasks.question_format import QuestionFormat
from trilithon_server.tasks.reader_format import ReaderFormat
from trilithon_server.tasks.retrieval import RetrievalFormat
from trilithon_server.tasks.story_format import StoryFormat
from trilithon_server.text.detokenizer import TokenTexts
from trilithon_server.text.template import ChatTemplate, template_digest
from trilithon_server.validation import Bounds

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

Capability = Literal["generate", "chat", "score", "embed", "tokenize"] | TaskCapability


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """
    An adapter that requests can name.

    Attributes:
        name: what they call it.
        base: name of the model that it stands on.
        base_digest: of that model's weights; empty where the configuration says which model it is.
        digest: identity of this version, and of its rows in the prefix cache.
        directory: its files, in PEFT's layout.
        checked: whether the digest is that of the files' content, which they must still have when they are loaded.
        template_digest: of the chat template that it was trained with; empty where none is known.
        template: that template's text, of an adapter that comes with a file of it; empty where none is known.
        job_id, step: where it comes from; empty and 0 for one that was made elsewhere.
        created: Unix seconds.
    """

    name: str
    base: str
    base_digest: str = ""
    digest: str
    directory: str
    checked: bool = False
    template_digest: str = ""
    template: str = ""
    job_id: str = ""
    step: int = 0
    created: int = 0

    @property
    def wire(self) -> wire.Adapter:
        """As the engine is told of it."""
        return wire.Adapter(digest=self.digest, directory=self.directory, checked=self.checked)


@dataclass(kw_only=True)
class ServedModel:
    """
    One model under its served name.

    Args:
        name: what requests call it.
        engine: the ranks that run it.
        tokenizer: of the model directory.
        template: its chat template, or None.
        limits: of the server.
        checker: compiles constraints before they are admitted; None for encoders.
        task: what its head was trained for; None for models without one.
        dialogue: how the model of the engine reads conversations, where its task file says it.
        story: how it reads stories, where it was trained for a part of them.
        retrieval: how an encoder reads questions and passages, where it was trained on them.
        questions: how it is asked for questions, where it was trained to write them.
        reader: how it reads passages, where it is an encoder-decoder that was trained on them.
        decoder_start_id: what an encoder-decoder's answers begin with; None for other models.
        encoder: whether it gives vectors rather than text.
        pooling, normalize: an encoder's own way to make one vector of many; `first` is the [CLS] token.
        max_context: the window as configured; the engine's word counts once it is there.
        vocab_size: rows of the embedding; the engine's word counts once it is there.
        adapter: on top of the engine's model; the name is then the adapter's.
    """

    name: str
    engine: EngineClient
    tokenizer: Tokenizer
    template: ChatTemplate | None
    limits: LimitsConfig
    checker: ConstraintChecker | None = None
    task: TaskModel | None = None
    dialogue: DialogueFormat | MsdpFormat | None = None
    story: StoryFormat | None = None
    retrieval: RetrievalFormat | None = None
    questions: QuestionFormat | None = None
    reader: ReaderFormat | None = None
    decoder_start_id: int | None = None
    encoder: bool = False
    pooling: Literal["mean", "last", "first"] = "mean"
    normalize: bool = True
    max_context: int = 1 << 20
    vocab_size: int = 0
    adapter: AdapterRef | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.texts = TokenTexts(self.tokenizer)
        self.template_digest = "" if self.template is None else template_digest(self.template, self.tokenizer)
        """Of what decides the tokens of a conversation; empty without a template."""
        self.steps = 0
        """Steps of the engine since it started, as its last result told."""
        self.engine.step_listeners.append(self._on_step)

    def with_adapter(self, adapter: AdapterRef) -> ServedModel:
        """The same model with an adapter on top, under the adapter's name; it shares everything else."""
        model = copy.copy(self)
        model.name, model.adapter, model.created = adapter.name, adapter, adapter.created
        return model

    @property
    def label(self) -> str:
        """What metrics call it: an adapter counts as its base, for there may be any number of them."""
        return self.name if self.adapter is None else self.adapter.base

    @property
    def version(self) -> str:
        """Which weights: the start of the model's digest, or an adapter's step or, where it has none, its digest."""
        if self.adapter is not None:
            return str(self.adapter.step) if self.adapter.step else self.adapter.digest[:16]
        return self.engine.hello.model_digest[:16] if self.engine.hello is not None else ""

    def _on_step(self, step: wire.StepResult) -> None:
        self.steps = step.step

    @property
    def is_seq2seq(self) -> bool:
        """Whether it is an encoder-decoder: what a request gives is read by the encoder."""
        return self.decoder_start_id is not None

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """What it can do."""
        if self.encoder:
            task: tuple[Capability, ...] = () if self.task is None else (self.task.capability,)
            return (*task, "embed", "tokenize")
        chat: tuple[Capability, ...] = ("chat",) if self.template is not None else ()
        return ("generate", *chat, "score", "tokenize")

    def ready(self) -> wire.Hello:
        """
        The engine's word about itself.

        Raises:
            Unavailable: it is loading, draining or lost.
        """
        self.engine.check_admission(0, requests=0)
        hello = self.engine.hello
        if hello is None:
            raise Unavailable("the model is loading.", code="loading", retry_after_s=1.0)
        return hello

    def bounds(self, principal: Principal, hello: wire.Hello, *, default_max_tokens: int | None = None) -> Bounds:
        """What this key may ask of it; `default_max_tokens` is the route's own."""
        return bounds_for(
            self.limits,
            principal,
            vocab_size=hello.vocab_size,
            max_context=hello.max_context_tokens,
            default_max_tokens=default_max_tokens,
        )

    def require(self, capability: Capability) -> None:
        """
        Raises:
            InvalidArgument: the model cannot do that.
        """
        if capability not in self.capabilities:
            able = ", ".join(self.capabilities)
            lacks_template = capability == "chat" and not (self.encoder or self.is_seq2seq)
            raise InvalidArgument(
                f"model `{self.name}` cannot {capability}. It can: {able}. Name another model.",
                code="no_chat_template" if lacks_template else "unsupported_model",
                hint="Use /v1/completions, or serve it with `--chat-template FILE`." if lacks_template else "",
            )

    def describe(self) -> dict[str, Any]:
        """What clients may know of it, with the field names of `trilithon.api.v1.Model`."""
        hello = self.engine.hello or wire.Hello()
        window = hello.max_context_tokens or self.max_context
        state = {"ready": "ready", "draining": "ready", "failed": "failed"}.get(self.engine.state, "loading")
        return {
            "id": self.name,
            "kind": "encoder" if self.encoder else "base",
            "digest": hello.model_digest,
            "template_digest": self.template_digest,
            "tokenizer_digest": self.tokenizer.digest,
            "max_context_tokens": window,
            "max_output_tokens": 0 if self.encoder else min(window - 1, self.limits.max_output_tokens or window),
            "vocab_size": hello.vocab_size or self.vocab_size,
            "dtype": hello.dtype,
            "quantization": "",
            "tp": hello.tp,
            "pp": hello.pp,
            "state": state,
            "created": self.created,
            "capabilities": list(self.capabilities),
            "defaults": {},
        }

    def salt(self, principal: Principal, cache_salt: str) -> bytes:
        """What parts the prefix cache by tenant and by the request's own salt (bar S8)."""
        return hashlib.sha256(principal.tenant.encode() + b"\0" + cache_salt.encode()).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """
    One call of either protocol.

    Args:
        principal: who asks.
        request_id: given or made.
        route: the HTTP path or RPC name, for metrics.
        arrived_s: monotonic time of arrival.
        deadline_s: monotonic time by which the answer must be there (gRPC), or None.
        late: it began when the server was on its way down already, and is given no model.
        record: what is counted and logged of it at its end.
        ends: called once when the call is over, however it ended; what a call holds is let go of here.
    """

    principal: Principal
    request_id: str
    route: str
    arrived_s: float
    deadline_s: float | None = None
    late: bool = False
    record: RequestRecord
    ends: list[Callable[[], None]] = field(default_factory=list)


def request_id(given: str | None) -> str:
    """The caller's id when it is well-formed, else a new one whose order is that of time."""
    if given and _REQUEST_ID.fullmatch(given):
        return given
    return f"req_{time.time_ns() // 1000:013x}{os.urandom(6).hex()}"
