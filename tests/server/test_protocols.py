"""Streamed = joined and gRPC = HTTP, on a real engine (bar E3)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from front_server import ACME, ENCODER, MODEL, Front, bearer
from google.protobuf.json_format import MessageToDict

from trilithon.api.v1 import (
    common_pb2,
    embed_pb2,
    embed_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    tokenize_pb2,
    tokenize_pb2_grpc,
)

PROMPT = "Once upon a time"
VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "seed": 6},
    "sampled": {"seed": 7, "top_p": 0.9, "top_k": 40},
    "several": {"seed": 8, "n": 3},
    "stopped": {"seed": 9, "stop": ["e", "a b"], "min_tokens": 3},
    "stop kept": {"seed": 9, "stop": ["e"], "include_stop_str_in_output": True},
    "logprobs": {"seed": 10, "logprobs": 3, "prompt_logprobs": 2, "return_offsets": True},
    "echo": {"temperature": 0, "seed": 6, "echo": True},
    "factual": {"seed": 11, "top_p": 0.9, "top_p_decay": 0.9, "top_p_floor": 0.3},
    "penalised": {"seed": 12, "repetition_penalty": 1.2, "presence_penalty": 0.5, "bad_words": ["the"], "min_p": 0.01},
    "five at once": {"seed": 13, "stream_interval": 5},
    "special kept": {"seed": 14, "skip_special_tokens": False, "return_token_ids": True},
}


def stream_http(front: Front, body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    events = []
    request = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "stream": True, **body}
    with front.http.stream("POST", "/v1/generate", json=request, headers=bearer(ACME)) as response:
        assert response.status_code == 200, response.read()
        name = ""
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                events.append((name, json.loads(line[6:])))
    return events


def join(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choices put together from their deltas."""
    out: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        choice = out.setdefault(delta["index"], {"text": "", "tokens": []})
        choice["text"] += delta["text"]
        choice["tokens"] += delta.get("tokens", [])
        for name in ("index", "finish_reason", "seed", "generated_tokens", "cumulative_logprob", "matched_stop"):
            choice[name] = delta.get(name)
    return [out[index] for index in sorted(out)]


def stripped(choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without log-probabilities' last digits: a batch of another shape may change those (E2 says how far)."""
    out = []
    for choice in choices:
        tokens = [{k: v for k, v in t.items() if k not in ("logprob", "top")} for t in choice.get("tokens", [])]
        kept = ("index", "text", "finish_reason", "seed", "generated_tokens", "matched_stop")
        out.append({name: choice.get(name) for name in kept} | {"tokens": tokens})
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_E3_streamed_joined_equals_not_streamed(front: Front, variant: str) -> None:
    """
    The deltas of a stream put together are the answer that is not streamed: text byte for byte, tokens, reasons.

    Inverse check: telling news only at whole intervals, and not at the end, made `five at once` fail.
    """
    body = VARIANTS[variant]

    whole = front.generate(prompt=PROMPT, max_tokens=24, **body)
    events = stream_http(front, body)

    names = [name for name, _ in events]
    assert names[0] == "started"
    assert names[-1] == "finished"
    assert set(names[1:-1]) == {"delta"}
    assert stripped(join([data for name, data in events if name == "delta"])) == stripped(whole["choices"])
    assert events[-1][1]["usage"]["generated_tokens"] == whole["usage"]["generated_tokens"]
    assert len(events[0][1]["prompt"]) == len(whole["prompt_tokens"])


def proto_request(body: dict[str, Any]) -> generation_pb2.GenerateRequest:
    request = generation_pb2.GenerateRequest(
        meta=common_pb2.RequestMeta(model=MODEL), prompt=common_pb2.Prompt(text=PROMPT)
    )
    request.stopping.max_tokens = 24
    for name, value in body.items():
        match name:
            case "temperature" | "seed" | "top_p" | "top_k" | "min_p" | "n":
                setattr(request.sampling, name, value)
            case "top_p_decay" | "top_p_floor":
                setattr(request.sampling.factual, name.removeprefix("top_p_"), value)
            case "stop":
                request.stopping.stop.extend(value)
            case "min_tokens":
                request.stopping.min_tokens = value
            case "include_stop_str_in_output":
                request.stopping.include_stop = value
            case "return_offsets" | "return_token_ids":
                setattr(request.output, name.removeprefix("return_"), value)
            case "skip_special_tokens":
                request.output.keep_special_tokens = not value
            case "presence_penalty" | "repetition_penalty":
                setattr(request.penalties, name.removesuffix("_penalty"), value)
            case "bad_words":
                request.penalties.bad_words.extend(value)
            case _:
                setattr(request.output, name, value)
    return request


def choices_of(response: generation_pb2.GenerateResponse) -> list[dict[str, Any]]:
    document = MessageToDict(response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    for choice in document["choices"]:
        choice["seed"] = int(choice["seed"])
        choice["finish_reason"] = choice["finish_reason"].removeprefix("FINISH_REASON_").lower()
        for token in choice["tokens"]:
            if "return_offsets" not in VARIANTS or token["text_offset"] == 0:
                token.setdefault("text_offset", 0)
    return list(document["choices"])


def without_offsets(choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        choice | {"tokens": [{k: v for k, v in token.items() if k != "text_offset"} for token in choice["tokens"]]}
        for choice in choices
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_E3_grpc_equals_http(front: Front, variant: str) -> None:
    """The same request over gRPC, joined and streamed, gives the answer that HTTP gives."""
    body = VARIANTS[variant]
    stub = generation_pb2_grpc.GenerationServiceStub(front.channel)
    metadata = (("authorization", f"Bearer {ACME}"),)

    over_http = without_offsets(stripped(front.generate(prompt=PROMPT, max_tokens=24, **body)["choices"]))
    joined = stub.Generate(proto_request(body), metadata=metadata)
    events = list(stub.GenerateStream(proto_request(body), metadata=metadata))

    assert without_offsets(stripped(choices_of(joined))) == over_http
    assert [event.WhichOneof("event") for event in (events[0], events[-1])] == ["started", "finished"]
    texts: dict[int, str] = {}
    for event in events[1:-1]:
        texts[event.delta.index] = texts.get(event.delta.index, "") + event.delta.text
    assert [texts[index] for index in sorted(texts)] == [choice["text"] for choice in over_http]


def test_E3_chat_and_completions_give_the_native_text(front: Front) -> None:
    """OpenAI's routes and our own are one service: a rendered conversation gives one text on all three."""
    messages = [{"role": "user", "content": "Tell me"}]
    options = {"model": MODEL, "max_tokens": 12, "temperature": 0}
    rendered = front.post("/v1/render", model=MODEL, messages=messages).json()

    native = front.generate(messages=messages, max_tokens=12, temperature=0)["choices"][0]["text"]
    chat = front.post("/v1/chat/completions", messages=messages, **options).json()["choices"][0]["message"]["content"]
    plain = front.post("/v1/completions", prompt=rendered["ids"], **options).json()["choices"][0]["text"]

    assert native == chat == plain


def test_scores_agree_with_prompt_logprobs(front: Front) -> None:
    """Scoring a continuation sums the log-probabilities that reading the whole text as a prompt gives."""
    scored = front.post("/v1/score", model=MODEL, items=[{"context": PROMPT, "continuations": [" there was", " x"]}])
    whole = front.generate(prompt=PROMPT + " there was", max_tokens=0, prompt_logprobs=0)

    item = scored.json()["items"][0]
    size = item["token_count"][0]
    expected = sum(token["logprob"] for token in whole["prompt_tokens"][-size:])
    assert item["sum_logprob"][0] == pytest.approx(expected, abs=1e-4)
    assert item["byte_count"] == [len(" there was"), 2]
    assert len(item["details"]) == 2


def test_E3_other_calls_agree_between_protocols(front: Front) -> None:
    """Scores, vectors, token ids, rendered chats and models are the same over gRPC and HTTP."""
    metadata = (("authorization", f"Bearer {ACME}"),)
    chat = common_pb2.Chat(messages=[common_pb2.ChatMessage(role="user", content="Hi")])
    item = generation_pb2.ScoreItem(context=common_pb2.Prompt(text=PROMPT), continuations=[" there"])
    meta, encoder = common_pb2.RequestMeta(model=MODEL), common_pb2.RequestMeta(model=ENCODER)
    tokens = tokenize_pb2_grpc.TokenizeServiceStub(front.channel)

    scored = generation_pb2_grpc.GenerationServiceStub(front.channel).Score(
        generation_pb2.ScoreRequest(meta=meta, items=[item]), metadata=metadata
    )
    embedded = embed_pb2_grpc.EmbedServiceStub(front.channel).Embed(
        embed_pb2.EmbedRequest(meta=encoder, inputs=[common_pb2.Prompt(text="a cat")]), metadata=metadata
    )
    tokenized = tokens.Tokenize(tokenize_pb2.TokenizeRequest(model=MODEL, texts=[PROMPT]), metadata=metadata)
    rendered = tokens.RenderChat(tokenize_pb2.RenderChatRequest(model=MODEL, chat=chat), metadata=metadata)
    model = models_pb2_grpc.ModelsServiceStub(front.channel).GetModel(
        models_pb2.GetModelRequest(id=MODEL), metadata=metadata
    )

    over_http = {
        "score": front.post("/v1/score", model=MODEL, items=[{"context": PROMPT, "continuations": [" there"]}]).json(),
        "embed": front.post("/v1/embeddings", model=ENCODER, input="a cat").json(),
        "tokenize": front.post("/v1/tokenize", model=MODEL, texts=[PROMPT]).json(),
        "render": front.post("/v1/render", model=MODEL, messages=[{"role": "user", "content": "Hi"}]).json(),
        "model": front.http.get(f"/v1/models/{MODEL}", headers=bearer(ACME)).json(),
    }
    assert list(scored.items[0].sum_logprob) == pytest.approx(over_http["score"]["items"][0]["sum_logprob"], abs=1e-5)
    assert list(embedded.data[0].values) == pytest.approx(over_http["embed"]["data"][0]["embedding"], abs=1e-6)
    assert list(tokenized.results[0].ids) == over_http["tokenize"]["results"][0]["ids"]
    assert (rendered.text, list(rendered.ids)) == (over_http["render"]["text"], over_http["render"]["ids"])
    assert (model.digest, model.max_context_tokens) == (
        over_http["model"]["digest"],
        over_http["model"]["max_context_tokens"],
    )
    assert models_pb2.Model.Kind.Name(model.kind) == "KIND_BASE"
