"""
What requests look like: a pydantic model per route for everything but the sampling parameters, which have their own
table. The OpenAPI document is assembled from both.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

TokenId = Annotated[int, Field(ge=0)]
Tokens = list[TokenId]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Body):
    """A part of a message; only text is taken."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One message, in OpenAI's shape."""

    role: str = Field(json_schema_extra={"enum": ["system", "user", "assistant", "tool"]})
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = Field(None, description="An assistant's calls, handed to the template.")
    tool_call_id: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None


class StreamOptions(_Body):
    """What a stream tells besides the answer."""

    include_usage: bool = Field(False, description="One last chunk with the token counts.")
    include_obfuscation: Literal[False] | None = None


class JsonSchemaFormat(_Body):
    """A named JSON schema."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """The form of the answer, in OpenAI's shape."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class Tool(_Body):
    """A function that the template tells the model about."""

    type: Literal["function"]
    function: dict[str, Any]


class _Streamed(_Body):
    model: str = Field("", description="Name of the model; empty means the only one served.")
    stream: bool = Field(False, description="Answer with server-sent events.")


class _OpenAi(_Streamed):
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    max_completion_tokens: int | None = Field(None, ge=0, description="Another name of `max_tokens`.")
    prompt_cache_key: str | None = Field(None, max_length=64, description="Mixed into `cache_salt`.")


class ChatRequest(_OpenAi):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage]
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    logprobs: bool | None = Field(None, description="Return log-probabilities of the answer's tokens.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="And of this many most likely ones.")


class CompletionRequest(_OpenAi):
    """POST /v1/completions"""

    prompt: str | Tokens | list[str] | list[Tokens]


class GenerateRequest(_Streamed):
    """POST /v1/generate: `prompt` or `messages`."""

    prompt: str | Tokens | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False


class ScoreItem(_Body):
    """A context and what may follow it: texts or token ids, not both."""

    context: str | Tokens | None = None
    continuations: list[str] = Field(default_factory=list)
    continuation_tokens: list[Tokens] = Field(default_factory=list)


class ScoreRequest(_Body):
    """POST /v1/score"""

    model: str = ""
    items: list[ScoreItem]
    top: int = Field(0, ge=0, le=20, description="Most likely tokens to report at each position.")


class EmbeddingRequest(_Body):
    """POST /v1/embeddings"""

    model: str = ""
    input: str | Tokens | list[str] | list[Tokens]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    pooling: Literal["mean", "last", "first"] | None = None
    normalize: bool | None = None


class TokenizeRequest(_Body):
    """POST /v1/tokenize"""

    model: str = ""
    texts: list[str]
    add_special_tokens: bool = True
    return_pieces: bool = False
    return_offsets: bool = False
    truncate_tokens: int = Field(0, ge=0, le=0xFFFFFFFF)


class DetokenizeRequest(_Body):
    """POST /v1/detokenize"""

    model: str = ""
    tokens: list[Tokens]
    keep_special_tokens: bool = False


class RenderRequest(_Body):
    """POST /v1/render"""

    model: str = ""
    messages: list[ChatMessage]
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False


class MegatronRequest(_Body):
    """PUT /api: the body of Megatron-LM's text-generation server."""

    prompts: list[str] = Field(min_length=1, max_length=128)
    tokens_to_generate: int = Field(64, ge=0)
    logprobs: bool = False
    temperature: float = Field(1.0, gt=0, le=100)
    top_k: int = Field(0, ge=0, le=1000)
    top_p: float = Field(0.0, ge=0, le=1)
    top_p_decay: float = Field(0.0, ge=0, le=1)
    top_p_bound: float = Field(0.0, ge=0, le=1)
    add_BOS: bool = False
    stop_on_double_eol: bool = False
    stop_on_eol: bool = False
    prevent_newline_after_colon: bool = False
    random_seed: int | None = Field(None, ge=0)
    no_log: bool = False
    stop_token: int | None = Field(None, ge=0)
    beam_width: int | None = None
    length_penalty: float | None = None


class DrainRequest(_Body):
    """POST /admin/v1/drain"""

    limit_seconds: int | None = Field(None, ge=0, le=3600, description="How long work in flight may go on.")


class ModelOnlyRequest(_Body):
    """POST /admin/v1/abort-all and reset-prefix-cache"""

    model: str = ""


class LoadAdapterRequest(_Body):
    """POST /v1/adapters"""

    id: str = Field(min_length=1, description="The adapter's name.")
    alias: str = Field("", description="An alias to point to it once it is loaded.")
    allow_template_mismatch: bool = Field(
        False, description="Load it although it was trained with another chat template than its base is served with."
    )


class AliasRequest(_Body):
    """PUT /v1/aliases/{name}"""

    target: str = Field(min_length=1, description="The model that the alias shall stand for.")
    expected_target: str | None = Field(
        None, description="What it must stand for now, else 409; empty: it must be new; unset: anything."
    )


class LogLevelRequest(_Body):
    """POST /admin/v1/log-level"""

    level: Literal["debug", "info", "warning", "error"]
