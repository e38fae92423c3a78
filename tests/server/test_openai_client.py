"""The `openai` package as a client: what it sends is taken and what it reads is there."""

from __future__ import annotations

import math
from collections.abc import Iterator

import openai
import pytest
from front_server import ACME, ENCODER, MODEL, Front


@pytest.fixture(scope="module")
def client(front: Front) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{front.server.url}/v1", api_key=ACME, max_retries=0, timeout=60) as made:
        yield made


MESSAGES = [{"role": "user", "content": "Say something"}]


def test_models_are_listed(client: openai.OpenAI) -> None:
    """Both engines are there, in the order of the configuration."""
    assert [model.id for model in client.models.list().data] == [MODEL, ENCODER]
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat_answers_and_streams(client: openai.OpenAI) -> None:
    """A stream's deltas are the answer; usage comes last, in a chunk without choices."""
    options = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 10, "temperature": 0}
    whole = client.chat.completions.create(**options)  # type: ignore[call-overload]  # a dictionary of options
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]  # likewise

    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert whole.usage.completion_tokens == 10


def test_chat_logprobs(client: openai.OpenAI) -> None:
    """Each token has its log-probability, its bytes and as many rivals as asked for."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=2,  # type: ignore[arg-type]  # plain dictionaries
    )

    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content or []
    assert len(tokens) == 5
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)
    assert all(token.top_logprobs[0].logprob == token.logprob for token in tokens)  # greedy: the best was taken
    joined = b"".join(bytes(token.bytes or []) for token in tokens).decode("utf-8", "replace")
    assert joined == answer.choices[0].message.content


def test_completions_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    """As lm-evaluation-harness asks: `echo`, `logprobs` and `max_tokens` 0 give the prompt's log-probabilities."""
    answer = client.completions.create(model=MODEL, prompt="Hello world", max_tokens=0, echo=True, logprobs=1)

    choice = answer.choices[0]
    assert choice.text == "Hello world"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in choice.logprobs.token_logprobs[1:])
    assert choice.logprobs.text_offset[0] == 0  # type: ignore[index]  # optional in the client's types


def test_lists_of_prompts_keep_their_order(client: openai.OpenAI) -> None:
    """Texts and token ids in lists give one answer each, the same as alone; `n` counts within each prompt."""
    options = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    alone = [client.completions.create(prompt=p, **options).choices[0].text for p in ("One", "Two words")]  # type: ignore[call-overload]  # options
    together = client.completions.create(prompt=["One", "Two words"], **options)  # type: ignore[call-overload]  # options
    sampled = client.completions.create(model=MODEL, prompt=["One", "Two"], n=2, seed=3, max_tokens=4)

    assert [choice.text for choice in together.choices] == alone
    assert [choice.index for choice in sampled.choices] == [0, 1, 2, 3]
    assert sampled.usage is not None
    assert sampled.usage.completion_tokens == 16


def test_best_of_returns_the_likeliest(client: openai.OpenAI) -> None:
    """Of `best_of` sequences the one with the highest sum of log-probabilities comes back; all are counted."""
    best = client.completions.create(model=MODEL, prompt="A", best_of=4, n=1, seed=5, max_tokens=4, logprobs=0)
    every = client.completions.create(model=MODEL, prompt="A", n=4, seed=5, max_tokens=4, logprobs=0)

    sums = [sum(c.logprobs.token_logprobs) for c in every.choices if c.logprobs and c.logprobs.token_logprobs]  # type: ignore[arg-type]  # no None here
    likeliest = every.choices[max(range(4), key=sums.__getitem__)]
    assert best.choices[0].text == likeliest.text
    assert best.usage is not None
    assert best.usage.completion_tokens == 16


def test_structured_output(client: openai.OpenAI) -> None:
    """A JSON schema in OpenAI's shape forms the answer."""
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,  # type: ignore[arg-type]  # plain dictionaries
        max_tokens=64,
        seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )

    assert (answer.choices[0].message.content or "").replace(" ", "").replace("\n", "") in (
        '{"ok":true}',
        '{"ok":false}',
    )


def test_embeddings(client: openai.OpenAI) -> None:
    """Vectors have unit length, do not depend on their neighbours, and can be shortened."""
    both = client.embeddings.create(model=ENCODER, input=["a cat", "a dog sat"])
    alone = client.embeddings.create(model=ENCODER, input="a dog sat")
    short = client.embeddings.create(model=ENCODER, input="a dog sat", dimensions=8)

    vector = both.data[1].embedding
    assert math.isclose(math.hypot(*vector), 1.0, abs_tol=1e-5)
    assert vector == pytest.approx(alone.data[0].embedding, abs=1e-5)
    assert len(short.data[0].embedding) == 8
    assert math.isclose(math.hypot(*short.data[0].embedding), 1.0, abs_tol=1e-5)


def test_errors_are_the_clients_own(client: openai.OpenAI, front: Front) -> None:
    """Every refusal arrives as the class that the package has for it, with our code and field."""
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gtp", messages=MESSAGES)  # type: ignore[arg-type]  # plain dictionaries
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1)  # type: ignore[arg-type]  # likewise
    with (
        openai.OpenAI(base_url=f"{front.server.url}/v1", api_key="sk-nobody", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        stranger.models.list()

    assert missing.value.code == "model_not_found"
    assert wrong.value.param == "temperature"
    assert refused.value.code == "invalid_api_key"


def test_extra_body_takes_our_parameters(client: openai.OpenAI) -> None:
    """Our own parameters travel in `extra_body`, and an unknown one is refused with a hint."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=4,
        seed=3,
        extra_body={"top_k": 5, "return_token_ids": True},  # type: ignore[arg-type]  # plain dictionaries
    )
    with pytest.raises(openai.BadRequestError, match="Did you mean"):
        client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={"temprature": 1})  # type: ignore[arg-type]  # likewise

    assert len(answer.choices[0].model_extra["token_ids"]) == 4  # type: ignore[index]  # extras are there
    assert answer.choices[0].model_extra["stop_detail"]["seed"] == 3  # type: ignore[index]  # likewise
