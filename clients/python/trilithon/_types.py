"""What comes back: frozen dataclasses whose field names are the wire's. What a newer server adds is kept in `extra`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trilithon._parameters import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """Base of all results."""

    extra: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Fields that this version of the client does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage(_Answer):
    """Counts of one request, in tokens; `preemptions` in times."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings(_Answer):
    """Where the server's time went, in milliseconds."""

    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    first_token_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Token(_Answer):
    """One token; `logprob` is a natural logarithm, `rank` 1 is the most likely, `top` the likeliest at its position."""

    id: int = 0
    text: str = ""
    logprob: float | None = None
    rank: int = 0
    top: tuple[Token, ...] = ()
    text_offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice(_Answer):
    """
    One answer.

    `finish_reason` is one of eos_token, stop_sequence, stop_token, max_tokens, context_length, constraint_end,
    time_limit, cancelled, shutdown, error; None when it is not finished. A newer server may know others.
    `seed` repeats the answer; `cumulative_logprob` is the sum over its tokens; `constraint_complete` tells whether a
    constrained text is whole.
    """

    index: int = 0
    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None
    matched_stop: str = ""
    matched_token_id: int = 0
    seed: int = 0
    cumulative_logprob: float = 0.0
    constraint_complete: bool = False
    generated_tokens: int = 0

    @property
    def message(self) -> Message:
        """The answer as a message, to go on with the conversation."""
        return {"role": "assistant", "content": self.text}


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta(Choice):
    """What is new of one answer: `text` and `tokens` are to be appended, the rest is as in `Choice`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions(_Answer):
    """
    n answers to one prompt, by index.

    `fingerprint` names version, layout and configuration of the server: seeded answers repeat while it is the same.
    """

    request_id: str = ""
    model: str = ""
    fingerprint: str = ""
    choices: tuple[Choice, ...] = ()
    prompt_tokens: tuple[Token, ...] = ()
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)

    def __len__(self) -> int:
        return len(self.choices)

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices)

    def __getitem__(self, index: int) -> Choice:
        return self.choices[index]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion(Completions):
    """The one answer to a prompt: what `Completions` has, and the choice's own fields at hand."""

    @property
    def text(self) -> str:
        """The answer's text."""
        return self.choices[0].text

    @property
    def tokens(self) -> tuple[Token, ...]:
        """Its tokens, when asked for."""
        return self.choices[0].tokens

    @property
    def finish_reason(self) -> str | None:
        """Why it ended; see `Choice`."""
        return self.choices[0].finish_reason

    @property
    def seed(self) -> int:
        """The seed that repeats it."""
        return self.choices[0].seed

    @property
    def message(self) -> Message:
        """The answer as a message, to go on with the conversation."""
        return self.choices[0].message


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(_Answer):
    """First news of a stream."""

    request_id: str = ""
    model: str = ""
    fingerprint: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(_Answer):
    """Last news of a stream."""

    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemScore(_Answer):
    """Scores of one context's continuations; the tuples run parallel to them. Log-probabilities are natural."""

    sum_logprob: tuple[float, ...] = ()
    token_count: tuple[int, ...] = ()
    byte_count: tuple[int, ...] = ()
    is_greedy: tuple[bool, ...] = ()
    details: tuple[Choice, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores(_Answer):
    """One `ItemScore` per context."""

    items: tuple[ItemScore, ...] = ()
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding(_Answer):
    """One input's vector; `tokens` counts the input's tokens, where the server tells."""

    index: int = 0
    values: tuple[float, ...] = ()
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings(_Answer):
    """One vector per input, in order."""

    model: str = ""
    data: tuple[Embedding, ...] = ()
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenized(_Answer):
    """One text's tokens; `starts` and `ends` are characters, `count` is before truncation."""

    ids: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    count: int = 0
    truncated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenization(_Answer):
    """One `Tokenized` per text, and what they were made with."""

    results: tuple[Tokenized, ...] = ()
    max_context_tokens: int = 0
    tokenizer_digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts(_Answer):
    """One text per list of token ids."""

    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered(_Answer):
    """What a model's template makes of a conversation."""

    text: str = ""
    ids: tuple[int, ...] = ()
    template_digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model(_Answer):
    """
    One served model.

    `kind` is base, adapter, merged, alias or encoder; `state` is available, loading, ready or failed; `created` is
    seconds since 1970 UTC; `defaults` are request defaults of its own, by parameter name.
    """

    id: str
    kind: str | None = None
    base: str = ""
    digest: str = ""
    alias_of: str = ""
    template_digest: str = ""
    tokenizer_digest: str = ""
    max_context_tokens: int = 0
    max_output_tokens: int = 0
    vocab_size: int = 0
    dtype: str = ""
    quantization: str = ""
    tp: int = 0
    pp: int = 0
    state: str | None = None
    created: int = 0
    capabilities: tuple[str, ...] = ()
    job_id: str = ""
    job_step: int = 0
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unloaded(_Answer):
    """What an adapter's unloading found: `requests_in_flight` were at work with it, and end as they would have."""

    requests_in_flight: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletedAlias(_Answer):
    """An alias that is gone, and the model that it stood for, which stays."""

    alias: str = ""
    target: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPage(_Answer):
    """One page of models."""

    data: tuple[Model, ...] = ()
    has_more: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Health(_Answer):
    """Whether the server takes work, and why not. That there is an answer at all means that it is alive."""

    ready: bool
    status: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aborted(_Answer):
    """Whether a request of that id was queued or running."""

    was_running: bool = False
