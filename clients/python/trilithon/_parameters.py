"""Every parameter of a generation request, once: types for checkers, names for the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict


class Constraint(TypedDict, total=False):
    """A form that the answer must take: set exactly one kind. `whitespace`, for JSON, is "flexible" or "compact"."""

    json_schema: Mapping[str, Any] | str
    json_object: bool
    regex: str
    grammar: str
    choice: Sequence[str]
    whitespace: Literal["flexible", "compact"]


class ToolCall(TypedDict, total=False):
    """A call that an assistant made, in OpenAI's shape."""

    id: str
    type: str
    function: Mapping[str, Any]


class _MessageRequired(TypedDict):
    role: str


class Message(_MessageRequired, total=False):
    """
    One message of a conversation.

    >>> question: Message = {"role": "user", "content": "What is gravity?"}
    """

    content: str | None
    name: str
    tool_calls: Sequence[ToolCall]
    tool_call_id: str


class CallOptions(TypedDict, total=False):
    """
    What every call takes.

    model: the served model's name; may be left out when only one is served.
    timeout: seconds for the whole call, retries included; also the server's deadline. Default: the client's.
    request_id: your name for the request, [A-Za-z0-9._-]{1,128}; made when left out.
    """

    model: str
    timeout: float
    request_id: str


class GenerationOptions(CallOptions, total=False):
    """
    How to generate. What is left out has the server's default, shown in brackets; ranges are checked by the server.

    temperature: 0 is greedy, else 0.001 to 100 [1].
    top_k: draw from the k most likely; 0 is off [off].
    top_p: draw from the smallest set with this much probability, above 0 to 1 [1].
    min_p: drop tokens below this share of the likeliest one's probability, 0 to 1 [0].
    typical_p: locally typical sampling, above 0 to 1 [1].
    top_p_decay, top_p_floor, top_p_reset_token_ids: factual-nucleus sampling; needs `top_p` below 1 [off].
    seed: 0 to 2^63 - 1 [drawn by the server and returned].
    best_of: draw this many, return the best [n].
    presence_penalty, frequency_penalty: -2 to 2, over generated tokens [0].
    repetition_penalty: above 0 to 10, over prompt and generated tokens [1].
    no_repeat_ngram: 0 to 32; 0 is off [0].
    logit_bias: token id to a value from -100 to 100.
    allowed_token_ids: only these may be drawn.
    bad_words: texts that must not appear.
    max_tokens: tokens to generate at most [the room left, capped by the server]; 0 scores the prompt only.
    min_tokens: no end before that many [0].
    stop, stop_token_ids: texts and tokens that end the answer.
    include_stop_str_in_output: keep the stop string in the text [False].
    ignore_eos: go on past the model's end tokens [False].
    echo: put the prompt before the answer's text [False].
    return_token_ids, return_offsets: fill `tokens`, and their `text_offset` [False].
    bypass_cache, cache_salt: stay out of the prefix cache, or share it only with the same salt.
    skip_special_tokens: leave special tokens out of the text [True].
    add_bos: put the begin token first [what the tokenizer does].
    speculation: allow speculative decoding, which never changes the answer [True].
    truncate_prompt_tokens: keep only the last so many tokens of the prompt; 0 never truncates [0].
    logprobs, prompt_logprobs: chosen tokens and this many likeliest ones, 0 to 20 [none].
    logprob_token_ids: report these too, at every position.
    after_processing: log-probabilities after penalties, masks and temperature [False].
    stream_interval: tokens per event, 1 to 64 [1].
    beam_width, length_penalty, early_stopping: beam search instead of draws; the best `n` come at the end.
    constraint: a `Constraint`.
    priority: -10 to 10, larger first [0].
    time_limit_ms: end with what there is after so long [`timeout`, when one was given].
    queue_timeout_ms: give up after waiting so long [60000].
    metadata: labels of your own.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    top_p_decay: float
    top_p_floor: float
    top_p_reset_token_ids: Sequence[int]
    seed: int
    best_of: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    no_repeat_ngram: int
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]
    bad_words: Sequence[str]
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop_str_in_output: bool
    ignore_eos: bool
    echo: bool
    return_token_ids: bool
    return_offsets: bool
    bypass_cache: bool
    skip_special_tokens: bool
    add_bos: bool
    speculation: bool
    truncate_prompt_tokens: int
    logprobs: int
    prompt_logprobs: int
    logprob_token_ids: Sequence[int]
    after_processing: bool
    stream_interval: int
    beam_width: int
    length_penalty: float
    early_stopping: Literal["heuristic", "first", "never"]
    constraint: Constraint
    priority: int
    time_limit_ms: int
    queue_timeout_ms: int
    cache_salt: str
    metadata: Mapping[str, str]


class TaskOptions(CallOptions, total=False):
    """
    How a task's texts are drawn; names and ranges as in `GenerationOptions`. What is left out has the task's default.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    priority: int
    time_limit_ms: int
    queue_timeout_ms: int
    bypass_cache: bool
    cache_salt: str


class ChatOptions(GenerationOptions, total=False):
    """
    What a chat takes besides.

    tools: offered to the model's template, in OpenAI's shape.
    add_generation_prompt: end with the opening of an assistant turn [True].
    continue_final_message: leave the last message open and go on with it [False].
    """

    tools: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool
    continue_final_message: bool


PROTO_FIELDS: Mapping[str, str] = {
    # JSON name -> path in GenerateRequest, for those that are copied as they are
    "model": "meta.model",
    "priority": "meta.priority",
    "time_limit_ms": "meta.time_limit_ms",
    "queue_timeout_ms": "meta.queue_timeout_ms",
    "cache_salt": "meta.cache_salt",
    "bypass_cache": "meta.bypass_cache",
    "metadata": "meta.metadata",
    "add_bos": "prompt.add_bos",
    "truncate_prompt_tokens": "prompt.truncate_tokens",
    "temperature": "sampling.temperature",
    "top_k": "sampling.top_k",
    "top_p": "sampling.top_p",
    "min_p": "sampling.min_p",
    "typical_p": "sampling.typical_p",
    "top_p_decay": "sampling.factual.decay",
    "top_p_floor": "sampling.factual.floor",
    "top_p_reset_token_ids": "sampling.factual.reset_token_ids",
    "seed": "sampling.seed",
    "n": "sampling.n",
    "best_of": "sampling.best_of",
    "presence_penalty": "penalties.presence",
    "frequency_penalty": "penalties.frequency",
    "repetition_penalty": "penalties.repetition",
    "no_repeat_ngram": "penalties.no_repeat_ngram",
    "logit_bias": "penalties.logit_bias",
    "allowed_token_ids": "penalties.allowed_token_ids",
    "bad_words": "penalties.bad_words",
    "beam_width": "beam.width",
    "length_penalty": "beam.length_penalty",
    "early_stopping": "beam.early",
    "max_tokens": "stopping.max_tokens",
    "min_tokens": "stopping.min_tokens",
    "stop": "stopping.stop",
    "stop_token_ids": "stopping.stop_token_ids",
    "include_stop_str_in_output": "stopping.include_stop",
    "ignore_eos": "stopping.ignore_eos",
    "logprobs": "output.logprobs",
    "prompt_logprobs": "output.prompt_logprobs",
    "logprob_token_ids": "output.logprob_token_ids",
    "after_processing": "output.after_processing",
    "return_token_ids": "output.token_ids",
    "return_offsets": "output.offsets",
    "echo": "output.echo",
    "skip_special_tokens": "output.keep_special_tokens",
    "stream_interval": "output.stream_interval",
    "constraint": "constraint",
    "speculation": "no_speculation",
}
"""Where each JSON name lives in the message; `skip_special_tokens` and `speculation` are stored negated."""
