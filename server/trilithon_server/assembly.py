"""
From an engine's tokens to one answer: text, stop strings, log-probabilities, the finish reason.

The same `Choice` serves streamed and joined answers: a stream takes what is new after each delta, a joined answer takes
everything at the end. That is why they are equal (bar E3).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from trilithon.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    Overloaded,
    TrilithonError,
    Unavailable,
)
from trilithon_server.engine import wire_pb2 as wire
from trilithon_server.sampling import SamplingParams
from trilithon_server.text.detokenizer import Detokenizer, TokenTexts
from trilithon_server.text.stops import StopFinder


class FinishReason(enum.Enum):
    """Why a sequence ended: the names of `trilithon.api.v1.FinishReason` in small letters."""

    EOS_TOKEN = "eos_token"
    STOP_SEQUENCE = "stop_sequence"
    STOP_TOKEN = "stop_token"
    MAX_TOKENS = "max_tokens"
    CONTEXT_LENGTH = "context_length"
    CONSTRAINT_END = "constraint_end"
    TIME_LIMIT = "time_limit"

    @property
    def openai(self) -> str:
        """The value of OpenAI's `finish_reason`."""
        return "length" if self in _LENGTH else "stop"


_LENGTH = (FinishReason.MAX_TOKENS, FinishReason.CONTEXT_LENGTH, FinishReason.TIME_LIMIT)

_FINISH = {
    wire.EOS_TOKEN: FinishReason.EOS_TOKEN,
    wire.STOP_TOKEN: FinishReason.STOP_TOKEN,
    wire.MAX_TOKENS: FinishReason.MAX_TOKENS,
    wire.CONTEXT_LENGTH: FinishReason.CONTEXT_LENGTH,
    wire.CONSTRAINT_END: FinishReason.CONSTRAINT_END,
    wire.TIME_LIMIT: FinishReason.TIME_LIMIT,
}

_SENDERS_FAULT = (
    "invalid_constraint",
    "kv_capacity_exceeded",
    "context_length_exceeded",
    "prompt_too_long",
    "empty_prompt",
    "token_id_range",
    "invalid_value",
    "unsupported_task",
)
"""Codes of requests that the engine refuses although the front let them pass."""

_ERRORS: dict[str, type[TrilithonError]] = {
    **dict.fromkeys(_SENDERS_FAULT, InvalidArgument),
    "constraint_dead_end": FailedPrecondition,
    "adapter_load_failed": FailedPrecondition,
    "adapters_unsupported": FailedPrecondition,
    "queue_timeout": DeadlineExceeded,
    "timeout": DeadlineExceeded,
    "queue_full": Overloaded,
    "engine_lost": Unavailable,
}


@dataclass(slots=True, frozen=True)
class TokenInfo:
    """One token: its id, its text, and, when asked for, its log-probability, rank, rivals and place in the text."""

    id: int
    text: str
    logprob: float | None = None
    rank: int = 0
    top: tuple[TokenInfo, ...] = ()
    offset: int = 0


class Choice:
    """
    One answer in the making.

    Args:
        index: of the answer within its request, as the client sees it.
        texts: the model's tokens.
        params: of the request.
        seed: that repeats it.
        prefix: text that goes before (`echo`).
        with_tokens: keep a `TokenInfo` of each token.
    """

    __slots__ = (
        "_detokenizer",
        "_finder",
        "_keep_end",
        "_length",
        "_min_tokens",
        "_texts",
        "_with_tokens",
        "constraint_complete",
        "cumulative_logprob",
        "finish",
        "generated",
        "index",
        "last_event_s",
        "matched_stop",
        "matched_token_id",
        "new_ids",
        "new_text",
        "new_tokens",
        "seed",
    )

    def __init__(
        self,
        *,
        index: int,
        texts: TokenTexts,
        params: SamplingParams,
        seed: int,
        prefix: str = "",
        with_tokens: bool = False,
    ) -> None:
        self.index = index
        self.seed = seed
        self.generated = 0
        self.cumulative_logprob = 0.0
        self.finish: FinishReason | None = None
        self.matched_stop = ""
        self.matched_token_id = 0
        self.constraint_complete = False
        self.new_text = prefix
        self.new_tokens: list[TokenInfo] = []
        self.new_ids: list[int] = []
        self.last_event_s = 0.0
        self._texts = texts
        self._detokenizer = Detokenizer(texts, skip_special=params.skip_special_tokens)
        self._finder = StopFinder(params.stop, keep=params.include_stop_str_in_output) if params.stop else None
        self._keep_end = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._with_tokens = with_tokens
        self._length = len(prefix)

    def feed(self, delta: wire.SequenceDelta) -> bool:
        """
        Take what the engine says of this sequence; nothing counts after the first finish.

        Returns:
            Whether a stop string ended it here, so that the engine must be told.
        Raises:
            TrilithonError: the engine could not finish it.
        """
        if self.finish is not None:
            return False
        finish = delta.finish
        end = len(delta.tokens) - 1 if finish in (wire.EOS_TOKEN, wire.STOP_TOKEN) and not self._keep_end else -1
        for position, token in enumerate(delta.tokens):
            self.generated += 1
            self.new_ids.append(token.id)
            if token.HasField("logprob"):
                self.cumulative_logprob += token.logprob
            if self._with_tokens:
                self.new_tokens.append(token_info(self._texts, token, offset=self._length))
            piece = "" if position == end else self._detokenizer.push(token.id)
            if piece:
                self._length += len(piece)
                if self._add(piece):
                    return finish == wire.NOT_FINISHED
        if finish != wire.NOT_FINISHED:
            self._end(delta)
        return False

    def _add(self, piece: str) -> bool:
        """Let out what is certain of the text; True when a stop string is complete."""
        if self._finder is None or self.generated < self._min_tokens:
            self.new_text += piece
            return False
        released, matched = self._finder.push(piece)
        self.new_text += released
        if matched is None:
            return False
        self.finish = FinishReason.STOP_SEQUENCE
        self.matched_stop = matched
        return True

    def _end(self, delta: wire.SequenceDelta) -> None:
        self.constraint_complete = delta.constraint_complete
        reason = _FINISH.get(delta.finish)
        if reason is None:
            raise engine_error(delta)
        rest = self._detokenizer.flush()
        if rest and self._add(rest):
            return
        if self._finder is not None:
            self.new_text += self._finder.flush()
        self.finish = reason
        if reason in (FinishReason.EOS_TOKEN, FinishReason.STOP_TOKEN):
            self.matched_token_id = delta.matched_token_id

    def take(self) -> tuple[str, list[TokenInfo], list[int]]:
        """What is new since the last call: text, tokens, token ids."""
        taken = self.new_text, self.new_tokens, self.new_ids
        self.new_text, self.new_tokens, self.new_ids = "", [], []
        return taken


def token_info(texts: TokenTexts, token: wire.Token, *, offset: int = 0) -> TokenInfo:
    """A token of the engine, with its text."""
    top = tuple(TokenInfo(t.id, texts.text_of(t.id), t.logprob, t.rank) for t in token.top)
    logprob = token.logprob if token.HasField("logprob") else None
    return TokenInfo(token.id, texts.text_of(token.id), logprob, token.rank, top, offset)


def engine_error(delta: wire.SequenceDelta) -> TrilithonError:
    """The error behind a sequence that the engine could not finish."""
    if delta.finish == wire.CANCELLED:
        return Cancelled("the request was cancelled before it was finished.")
    if delta.finish == wire.SHUTDOWN:
        return Unavailable("the server is shutting down.", code="server_shutting_down", retry_after_s=5.0)
    code, message = delta.error.code, delta.error.message
    kind = _ERRORS.get(code)
    if kind is None:
        if code == "numerical_failure":
            return Internal("the model's numbers were not finite for this request.", code=code)
        return Internal("the engine failed on this request.")
    retry = 1.0 if kind in (DeadlineExceeded, Overloaded, Unavailable) else None
    return kind(message or f"the engine ended this request: {code}.", code=code, retry_after_s=retry)
