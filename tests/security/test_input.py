"""Bad input is its sender's 4xx with a sentence, never a 500; the engine answers the next request (S5-S7, S9, R8)."""

from __future__ import annotations

import importlib
import json
import logging
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import hypothesis
import pytest
import schemathesis
from front_server import ACME, ADMIN, CONTEXT, ENCODER, MODEL, Front, bearer
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from under_load import wait_until

from trilithon.api import v1
from trilithon.api.v1 import (
    common_pb2,
    dialogue_pb2,
    dialogue_pb2_grpc,
    embed_pb2,
    embed_pb2_grpc,
    extract_pb2,
    extract_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    openqa_pb2,
    openqa_pb2_grpc,
    retrieval_pb2,
    retrieval_pb2_grpc,
    story_pb2,
    story_pb2_grpc,
    synth_qa_pb2,
    synth_qa_pb2_grpc,
    tokenize_pb2,
    tokenize_pb2_grpc,
)
from trilithon_server.errors import as_error, error_body
from trilithon_server.http.app import ROUTES
from trilithon_server.logs import JsonFormatter, TextFormatter

METADATA = (("authorization", f"Bearer {ACME}"),)
FUZZ = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)


def test_S9_the_document_is_valid(front: Front) -> None:
    """The served document names every route, each with its errors, and every reference in it leads somewhere."""
    document = front.http.get("/openapi.json", headers=bearer(ACME)).json()

    assert document["openapi"].startswith("3.1")
    served = {(method, path) for path, item in document["paths"].items() for method in item}
    assert served == {(route.method.lower(), route.path) for route in ROUTES}
    text = json.dumps(document)
    for part in text.split('"$ref": "#/components/schemas/')[1:]:
        assert part.partition('"')[0] in document["components"]["schemas"]


FUZZED = [
    route
    for route in ROUTES
    if route.path not in ("/admin/v1/drain", "/admin/v1/abort-all", "/admin/v1/log-level", "/static/{name}")
]


PLACES = {
    "/v1/dialogue/actors/{": "actor_id",
    "/v1/knowledge/{": "kb_id",
    "/v1/retrieval/indexes/{": "index",
    "/v1/stories/{": "story_id",
}
"""Where a path names one of the fixture's `things`, and which."""


@pytest.mark.parametrize("route", FUZZED, ids=lambda route: f"{route.method} {route.path}")
def test_S9_http_fuzzing_finds_no_500(front: Front, route: Any, request: pytest.FixtureRequest) -> None:
    """
    Requests that fit the document and requests that break it, of things that are there and of others: answers conform,
    and broken ones are refused.

    Inverse check: a handler that indexes `messages[0]` without a look fails here within a few examples.
    """
    place = next((part for part in PLACES if route.path.startswith(part)), None)
    there = None if place is None else request.getfixturevalue("things")[PLACES[place]]
    schema = schemathesis.openapi.from_url(f"{front.server.url}/openapi.json", headers=bearer(ACME))
    operation = schema[route.path][route.method]
    key = ADMIN if route.access == "admin" else ACME
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    strategy = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    if route.request is not None:
        strategy |= operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
        checks.append(negative_data_rejection)

    @given(case=strategy, known=st.booleans())
    @FUZZ
    def fuzz(case: Any, known: bool) -> None:
        tame(case, route)
        named = known and there is not None
        if named:
            case.path_parameters = dict.fromkeys(case.path_parameters, there)
        response = case.call(base_url=front.server.url, headers=bearer(key), timeout=60)
        assert response.status_code < 500, response.text
        # What was wrong with a request may have been the name that was replaced.
        case.validate_response(response, checks=[c for c in checks if not (named and c is negative_data_rejection)])

    fuzz()
    assert front.generate(prompt="x", max_tokens=1)["choices"]


def tame(case: Any, route: Any) -> None:
    """Name a model that is there, and keep generated requests short: a valid one may ask for 400 tokens 16 times."""
    body = case.body
    if not isinstance(body, dict) or route.access == "admin":
        return
    if route.path != "/api" and isinstance(body.get("model", ""), str):
        body["model"] = ENCODER if route.path == "/v1/embeddings" else MODEL
    for name in ("max_tokens", "max_completion_tokens", "tokens_to_generate"):
        if isinstance(body.get(name), int | float) and body[name] > 4:
            body[name] = 4


def messages_of(kind: type[Message], *, depth: int = 3) -> st.SearchStrategy[Message]:
    """Random messages of a type: any field set to anything that its wire type holds."""
    fields = [f for f in kind.DESCRIPTOR.fields if depth > 0 or f.message_type is None]

    @st.composite
    def build(draw: st.DrawFn) -> Message:
        message = kind()
        for field in draw(st.lists(st.sampled_from(fields), max_size=4, unique_by=lambda f: f.name)) if fields else []:
            repeated = isinstance(getattr(message, field.name), list) or hasattr(getattr(message, field.name), "append")
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                key = field.message_type.fields_by_name["key"]
                value = field.message_type.fields_by_name["value"]
                for _ in range(draw(st.integers(0, 2))):
                    getattr(message, field.name)[draw(scalar(key))] = draw(scalar(value))
            elif field.message_type is not None:
                inner = messages_of(class_of(message, field), depth=depth - 1)
                if repeated:
                    getattr(message, field.name).extend(draw(st.lists(inner, max_size=2)))
                else:
                    getattr(message, field.name).CopyFrom(draw(inner))
            elif repeated:
                getattr(message, field.name).extend(draw(st.lists(scalar(field), max_size=3)))
            else:
                setattr(message, field.name, draw(scalar(field)))
        return message

    return build()


def class_of(message: Message, field: Any) -> type[Message]:
    """The class of a message field."""
    from google.protobuf import message_factory

    return message_factory.GetMessageClass(field.message_type)


def scalar(field: Any) -> st.SearchStrategy[Any]:
    """Anything that a scalar field holds."""
    kinds: dict[int, st.SearchStrategy[Any]] = {
        field.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 20),
        field.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1),
        field.CPPTYPE_UINT32: st.integers(0, 2**32 - 1) | st.integers(0, 20),
        field.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
        field.CPPTYPE_DOUBLE: st.floats(),
        field.CPPTYPE_FLOAT: st.floats(width=32) | st.floats(0, 1, width=32),
        field.CPPTYPE_BOOL: st.booleans(),
        field.CPPTYPE_ENUM: st.integers(0, 6),
        field.CPPTYPE_STRING: st.sampled_from(["", MODEL, ENCODER, "user", "{}", "[]", "a"])
        | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    }
    return kinds[field.cpp_type]


RPCS: list[tuple[str, type[Message], Any]] = [
    ("Generate", generation_pb2.GenerateRequest, generation_pb2_grpc.GenerationServiceStub),
    ("GenerateStream", generation_pb2.GenerateRequest, generation_pb2_grpc.GenerationServiceStub),
    ("Score", generation_pb2.ScoreRequest, generation_pb2_grpc.GenerationServiceStub),
    ("Abort", generation_pb2.AbortRequest, generation_pb2_grpc.GenerationServiceStub),
    ("Tokenize", tokenize_pb2.TokenizeRequest, tokenize_pb2_grpc.TokenizeServiceStub),
    ("Detokenize", tokenize_pb2.DetokenizeRequest, tokenize_pb2_grpc.TokenizeServiceStub),
    ("RenderChat", tokenize_pb2.RenderChatRequest, tokenize_pb2_grpc.TokenizeServiceStub),
    ("Embed", embed_pb2.EmbedRequest, embed_pb2_grpc.EmbedServiceStub),
    ("Annotate", extract_pb2.AnnotateRequest, extract_pb2_grpc.ExtractServiceStub),
    ("ExtractRelations", extract_pb2.RelationsRequest, extract_pb2_grpc.ExtractServiceStub),
    ("Answer", extract_pb2.SpanAnswerRequest, extract_pb2_grpc.ExtractServiceStub),
    ("Classify", extract_pb2.ClassifyRequest, extract_pb2_grpc.ExtractServiceStub),
    ("Encode", retrieval_pb2.EncodeRequest, retrieval_pb2_grpc.RetrieverServiceStub),
    ("Search", retrieval_pb2.SearchRequest, retrieval_pb2_grpc.RetrieverServiceStub),
    ("CreateIndex", retrieval_pb2.CreateIndexRequest, retrieval_pb2_grpc.RetrieverServiceStub),
    ("GetIndex", retrieval_pb2.GetIndexRequest, retrieval_pb2_grpc.RetrieverServiceStub),
    ("RefreshIndex", retrieval_pb2.RefreshIndexRequest, retrieval_pb2_grpc.RetrieverServiceStub),
    ("DeleteIndex", retrieval_pb2.GetIndexRequest, retrieval_pb2_grpc.RetrieverServiceStub),
    ("ListIndexes", retrieval_pb2.ListIndexesRequest, retrieval_pb2_grpc.RetrieverServiceStub),
    ("Answer", openqa_pb2.AnswerRequest, openqa_pb2_grpc.OpenQAServiceStub),
    ("Respond", dialogue_pb2.RespondRequest, dialogue_pb2_grpc.DialogueServiceStub),
    ("RespondStream", dialogue_pb2.RespondRequest, dialogue_pb2_grpc.DialogueServiceStub),
    ("PutActor", dialogue_pb2.PutActorRequest, dialogue_pb2_grpc.DialogueServiceStub),
    ("GetActor", dialogue_pb2.GetActorRequest, dialogue_pb2_grpc.DialogueServiceStub),
    ("DeleteActor", dialogue_pb2.DeleteActorRequest, dialogue_pb2_grpc.DialogueServiceStub),
    ("PutKnowledge", dialogue_pb2.PutKnowledgeRequest, dialogue_pb2_grpc.DialogueServiceStub),
    ("GetKnowledge", dialogue_pb2.GetKnowledgeRequest, dialogue_pb2_grpc.DialogueServiceStub),
    ("DeleteKnowledge", dialogue_pb2.DeleteKnowledgeRequest, dialogue_pb2_grpc.DialogueServiceStub),
    ("Generate", story_pb2.StoryRequest, story_pb2_grpc.StoryServiceStub),
    ("Rewrite", story_pb2.RewriteRequest, story_pb2_grpc.StoryServiceStub),
    ("GetStory", story_pb2.GetStoryRequest, story_pb2_grpc.StoryServiceStub),
    ("DeleteStory", story_pb2.DeleteStoryRequest, story_pb2_grpc.StoryServiceStub),
    ("Generate", synth_qa_pb2.SynthQARequest, synth_qa_pb2_grpc.SynthQAServiceStub),
    ("ListModels", models_pb2.ListModelsRequest, models_pb2_grpc.ModelsServiceStub),
    ("GetModel", models_pb2.GetModelRequest, models_pb2_grpc.ModelsServiceStub),
]
NEVER = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS, grpc.StatusCode.UNAVAILABLE)
ELSEWHERE = {
    "AdminService": "acts on the server as a whole",
    "FinetuneService": "is not there without jobs, which have a fuzzing of their own",
    "LoadAdapter": "for admins",
    "UnloadAdapter": "for admins",
    "SetAlias": "for admins",
    "DeleteAlias": "for admins",
}
NAME = "fuzzed"


def test_S9_every_method_is_fuzzed() -> None:
    """Each method of each service has its row, or a reason. Inverse seen: a row less."""
    modules = (importlib.import_module(f"{v1.__name__}.{found.name}") for found in pkgutil.iter_modules(v1.__path__))
    there = {
        (service.name, method.name)
        for module in modules
        if hasattr(module, "DESCRIPTOR")
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if not {service.name, method.name} & ELSEWHERE.keys()
    }
    assert {(stub.__name__.removesuffix("Stub"), method) for method, _, stub in RPCS} == there


@pytest.fixture
def things(front: Front) -> Iterator[dict[str, str]]:
    """An index, an actor, knowledge and a story that are there when a test begins: field -> name."""
    documents = [{"id": "a", "text": "The sea is two days from the old mill."}]
    turn = {"speaker": "other", "text": "How far is the sea?"}
    key = bearer(ACME)
    for name in (NAME, "made"):
        front.http.delete(f"/v1/retrieval/indexes/{name}", headers=key)
    front.post("/v1/retrieval/indexes", name=NAME, model=ENCODER, documents=documents)
    wait_until(
        lambda: front.http.get(f"/v1/retrieval/indexes/{NAME}", headers=key).json()["state"] == "ready", seconds=60
    )
    for path, body in (
        (f"/v1/dialogue/actors/{NAME}", {"conversations": [[turn]]}),
        (f"/v1/knowledge/{NAME}", {"documents": documents}),
    ):
        assert front.http.put(path, json=body, headers=key).status_code == 200
    told = front.post("/v1/stories", model=MODEL, first_sentence="The sea is far.", sentences=1, max_tokens=2)
    assert told.status_code == 200, told.text
    story = told.json()["story_id"]
    yield dict.fromkeys(("index", "actor_id", "kb_id"), NAME) | {"story_id": story}
    front.http.delete(f"/v1/stories/{story}", headers=key)


def least(things: Mapping[str, str]) -> dict[type[Message], Message]:
    """Of each kind of request the least that is answered; one of things that are not served here has none."""
    meta, encoder = common_pb2.RequestMeta(model=MODEL), common_pb2.RequestMeta(model=ENCODER)
    tokens, text = common_pb2.Stopping(max_tokens=2), common_pb2.Prompt(text="x")
    chat = common_pb2.Chat(messages=[common_pb2.ChatMessage(role="user", content="x")])
    said = dialogue_pb2.Conversation(
        turns=[dialogue_pb2.Turn(speaker=dialogue_pb2.Turn.SPEAKER_OTHER, text="How far is the sea?")]
    )
    document = dialogue_pb2.Document(id="of-its-own", text="The sea is far from the old mill.")
    story, control = things["story_id"], story_pb2.SentenceControl(index=2, keywords=["boat"])
    messages = (
        generation_pb2.GenerateRequest(meta=meta, prompt=text, stopping=tokens),
        generation_pb2.ScoreRequest(meta=meta, items=[generation_pb2.ScoreItem(context=text, continuations=["b"])]),
        generation_pb2.AbortRequest(request_id="nobody"),
        tokenize_pb2.TokenizeRequest(model=MODEL, texts=["x"]),
        tokenize_pb2.DetokenizeRequest(model=MODEL, tokens=[common_pb2.TokenIds(ids=[5])]),
        tokenize_pb2.RenderChatRequest(model=MODEL, chat=chat),
        embed_pb2.EmbedRequest(meta=encoder, inputs=[text]),
        retrieval_pb2.EncodeRequest(meta=encoder, texts=["x"], role=retrieval_pb2.EncodeRequest.ROLE_QUERY),
        retrieval_pb2.SearchRequest(index=NAME, queries=["sea"]),
        retrieval_pb2.CreateIndexRequest(name="made", model=ENCODER, documents=[document]),
        retrieval_pb2.GetIndexRequest(name=NAME),
        retrieval_pb2.RefreshIndexRequest(name=NAME),
        retrieval_pb2.ListIndexesRequest(),
        openqa_pb2.AnswerRequest(meta=meta, question="How far is the sea?", index=NAME, stopping=tokens),
        dialogue_pb2.RespondRequest(meta=meta, conversation=said, actor_id=NAME, stopping=tokens),
        dialogue_pb2.PutActorRequest(actor_id=NAME, conversations=[said]),
        dialogue_pb2.GetActorRequest(actor_id=NAME),
        dialogue_pb2.DeleteActorRequest(actor_id=NAME),
        dialogue_pb2.PutKnowledgeRequest(kb_id=NAME, documents=[document]),
        dialogue_pb2.GetKnowledgeRequest(kb_id=NAME),
        dialogue_pb2.DeleteKnowledgeRequest(kb_id=NAME),
        story_pb2.StoryRequest(meta=meta, first_sentence="The sea is far.", sentences=1, stopping=tokens),
        story_pb2.RewriteRequest(story_id=story, control=control),
        story_pb2.GetStoryRequest(story_id=story),
        story_pb2.DeleteStoryRequest(story_id=story),
        models_pb2.ListModelsRequest(),
        models_pb2.GetModelRequest(id=MODEL),
    )
    return {type(message): message for message in messages}


def restrain(request: Any) -> None:
    """Few tokens: a valid request may ask for hundreds, of many sentences."""
    fields = request.DESCRIPTOR.fields_by_name
    if "stopping" in fields:
        request.stopping.max_tokens = min(request.stopping.max_tokens or 3, 3)
    if "sentences" in fields:
        request.sentences = min(request.sentences, 2) or 2
    if isinstance(request, generation_pb2.GenerateRequest):
        if not request.prompt.WhichOneof("kind"):
            request.prompt.text = "x"
        request.meta.model = request.meta.model or MODEL


@pytest.mark.parametrize(("method", "kind", "stub"), RPCS, ids=lambda value: value if isinstance(value, str) else "")
def test_S9_protobuf_fuzzing_finds_no_internal(
    front: Front, things: dict[str, str], method: str, kind: type[Message], stub: Any
) -> None:
    """
    Any message of each method, those that name things that are there and those that do not, is answered or refused with
    a reason of ours; afterwards the engine still answers. A message with the least that is needed is answered.

    Inverse seen: a server without a store, which refuses all that has to do with indexes.
    """
    rpc, known = getattr(stub(front.channel), method), least(things)
    answered = 0

    @given(request=messages_of(kind), sound=st.booleans())
    @example(request=kind(), sound=True)
    @settings(FUZZ, max_examples=40)
    def fuzz(request: Message, sound: bool) -> None:
        nonlocal answered
        if sound and kind in known:
            request.MergeFrom(known[kind])
        restrain(request)
        refusal = None
        try:
            answer = rpc(request, metadata=METADATA, timeout=30)
            if isinstance(answer, grpc.Call):  # a stream
                list(answer)
            answered += 1
        except grpc.RpcError as error:
            refusal = error
        if refusal is not None:
            assert refusal.code() not in NEVER, refusal  # type: ignore[attr-defined]  # the stubs do not say so
            assert details_of(refusal).details

    fuzz()
    assert answered or kind not in known
    assert front.generate(prompt="x", max_tokens=1)["choices"]


def details_of(error: Any) -> status_pb2.Status:
    """The rich status of a failed RPC."""
    raw = dict(error.trailing_metadata())["grpc-status-details-bin"]
    return status_pb2.Status.FromString(raw)


def test_S9_bytes_that_are_no_message(front: Front) -> None:
    """Garbage in place of a message is the sender's INVALID_ARGUMENT."""
    call = front.channel.unary_unary("/trilithon.api.v1.GenerationService/Generate", lambda b: b, lambda b: b)

    with pytest.raises(grpc.RpcError) as caught:
        call(b"\xff\xff\xff", metadata=METADATA)

    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]  # the stubs do not say so


def test_S5_metadata_is_bounded(front: Front) -> None:
    """More metadata than the limit is refused before anything is read."""
    stub = models_pb2_grpc.ModelsServiceStub(front.channel)

    with pytest.raises(grpc.RpcError) as caught:
        stub.ListModels(models_pb2.ListModelsRequest(), metadata=(*METADATA, ("x-padding", "x" * 9000)))

    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]  # the stubs do not say so


def test_rich_errors_name_the_fields(front: Front) -> None:
    """INVALID_ARGUMENT carries ErrorInfo, every violation and the request's id."""
    request = generation_pb2.GenerateRequest(
        meta=common_pb2.RequestMeta(model=MODEL, request_id="mine"), prompt=common_pb2.Prompt(text="x")
    )
    request.sampling.temperature, request.sampling.top_p = -1, 0

    with pytest.raises(grpc.RpcError) as caught:
        generation_pb2_grpc.GenerationServiceStub(front.channel).Generate(request, metadata=METADATA)

    info, bad, mine = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RequestInfo(),
    )
    for detail in details_of(caught.value).details:
        for message in (info, bad, mine):
            detail.Unpack(message)
    assert (info.reason, info.domain) == ("INVALID_VALUE", "trilithon")
    assert [item.field for item in bad.field_violations] == ["temperature", "top_p"]
    assert mine.request_id == "mine"


RAW: list[tuple[str, bytes, int, str]] = [
    ("duplicate key", b'{"prompt": "a", "prompt": "b"}', 400, "duplicate_key"),
    ("nan", b'{"prompt": "a", "temperature": NaN}', 400, "invalid_json"),
    ("not json", b"{", 400, "invalid_json"),
    ("not an object", b"[1]", 400, "invalid_json"),
    ("not utf-8", b'{"prompt": "\xff"}', 400, "invalid_json"),
    ("deep", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "invalid_json"),
    ("huge number", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
    ("half surrogate", b'{"prompt": "\\ud800"}', 400, "invalid_value"),
    ("empty prompt", b'{"prompt": []}', 400, "empty_prompt"),
    ("no prompt", b"{}", 400, "missing_parameter"),
    ("unknown key", b'{"prompt": "a", "promt": 1}', 400, "unknown_parameter"),
    ("wrong type", b'{"prompt": {"a": 1}}', 400, "invalid_value"),
    ("token out of range", b'{"prompt": [1, 99999999]}', 400, "token_id_range"),
    ("negative token", b'{"prompt": [-1]}', 400, "invalid_value"),
    ("absurd n", b'{"prompt": "a", "n": 1000000}', 400, "invalid_value"),
    ("over-long", b'{"prompt": "' + b"word " * 20_000 + b'"}', 400, "prompt_too_long"),
    ("too many tokens", b'{"prompt": "a b c d", "max_tokens": %d}' % (CONTEXT - 1), 400, "context_length_exceeded"),
    ("unsupported", b'{"prompt": "a", "suffix": "b"}', 400, "unsupported_parameter"),
    ("bad regex", b'{"prompt": "a", "constraint": {"regex": "a)"}}', 400, "invalid_constraint"),
    ("bad schema", b'{"prompt": "a", "constraint": {"json_schema": {"type": "nonsense"}}}', 400, "invalid_constraint"),
    ("choice too long", b'{"prompt": "a", "max_tokens": 1, "constraint": {"choice": ["a b c d e f g"]}}', 400,
     "constraint_too_long"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "status", "code"), [row[1:] for row in RAW], ids=[row[0] for row in RAW])
def test_R11_bad_bodies_are_told_why(front: Front, raw: bytes, status: int, code: str) -> None:
    """Each kind of bad body has its code and one sentence; the id leads to the log, nothing inside is shown (S7)."""
    body = raw.replace(b'"prompt"', b'"model": "tiny", "prompt"', 1)
    headers = bearer(ACME) | {"content-type": "application/json", "x-request-id": "bad-1"}

    answer = front.http.post("/v1/completions", content=body, headers=headers)

    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert error["request_id"] == answer.headers["x-request-id"] == "bad-1"
    assert answer.headers["x-should-retry"] == "false"
    for secret in ("Traceback", "/home", ".py", "site-packages"):
        assert secret not in answer.text


def test_R8_a_huge_constraint_is_refused_for_its_sender_alone(front: Front) -> None:
    """A constraint beyond its budget is a 400; the next constrained request is answered."""
    words = [f"value-{i}" for i in range(8000)]
    huge = front.post("/v1/completions", model=MODEL, prompt="a", constraint={"choice": words})
    fine = front.generate(prompt="a", max_tokens=8, constraint={"choice": ["yes", "no"]})

    assert huge.status_code == 400
    assert huge.json()["error"]["code"] == "constraint_too_large"
    assert fine["choices"][0]["text"] in ("yes", "no")
    assert fine["choices"][0]["finish_reason"] in ("constraint_end", "eos_token")


def test_R8_an_unfinished_constraint_says_so(front: Front) -> None:
    """`max_tokens` inside a constraint ends with its own reason and says that the text is not whole."""
    answer = front.generate(prompt="a", max_tokens=3, constraint={"regex": "[0-9]{40}"})

    choice = answer["choices"][0]
    assert choice["finish_reason"] == "max_tokens"
    assert choice["constraint_complete"] is False


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/nowhere", {}, 404),
        ("PUT", "/v1/completions", {}, 405),
        ("POST", "/v1/completions", {"content-type": "text/plain"}, 415),
        ("GET", "/v1/models", {"content-length": "2"}, 400),
        ("GET", "/v1/models/nobody", {}, 404),
        ("GET", "/v1/models", {"x-padding": "x" * 20_000}, 413),
    ],
)
def test_every_error_has_the_one_body(
    front: Front, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    """The router's own errors have the body that all errors have."""
    content = b"{}" if "content-length" in headers or method in ("POST", "PUT") else None

    answer = front.http.request(method, path, headers=bearer(ACME) | headers, content=content)

    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code", "status", "request_id", "details"}


def test_S6_messages_hold_text_alone(front: Front) -> None:
    """A message that points to a picture is refused: the server fetches nothing."""
    part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}

    answer = front.post("/v1/chat/completions", model=MODEL, messages=[{"role": "user", "content": [part]}])

    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("messages[0].content")


def test_S7_a_bug_shows_an_opaque_id() -> None:
    """An unexpected exception becomes `internal_error` with the id and nothing of itself."""
    error = as_error(RuntimeError("secret /etc/path"), "req_1")

    text = json.dumps(error_body(error))
    assert "secret" not in text
    assert "/etc" not in text
    assert "req_1" in text


def test_S7_log_lines_cannot_be_forged() -> None:
    """Newlines and terminal escapes in what a client sent stay inside one line, in both formats."""
    record = logging.makeLogRecord({"msg": "request", "levelname": "INFO", "route": "a\nb\x1b[31m"})

    for formatter in (JsonFormatter(), TextFormatter()):
        line = formatter.format(record)
        assert "\n" not in line
        assert "\x1b" not in line
