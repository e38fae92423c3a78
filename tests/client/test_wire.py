"""The pieces between values and bytes: parameters to messages, events from bytes, values from JSON."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pool
from hypothesis import given, settings
from hypothesis import strategies as st

from trilithon import _retrieval_messages, _task_messages
from trilithon._decode import decode
from trilithon._messages import generate_request, message_fields
from trilithon._parameters import PROTO_FIELDS, ChatOptions, GenerationOptions
from trilithon._sse import SSEDecoder
from trilithon._types import Completion, Model
from trilithon._wire_errors import class_for_grpc, class_for_http
from trilithon.api import v1
from trilithon.api.v1 import (
    dialogue_pb2,
    generation_pb2,
    openqa_pb2,
    retrieval_pb2,
    story_pb2,
    synth_qa_pb2,
)
from trilithon.errors import SERVER_ERRORS
from trilithon_server.sampling_rules import BY_NAME, UNSUPPORTED

GOLDEN = Path(__file__).with_name("api_v1.txt")

VALUES: dict[str, Any] = {
    "logit_bias": {5: -1.0},
    "metadata": {"a": "b"},
    "constraint": {"json_schema": {"type": "object"}},
    "early_stopping": "first",
    "stop": ["a", "b"],
    "bad_words": ["x"],
    "skip_special_tokens": False,
    "speculation": False,
}


_EXAMPLES = {"int": 3, "float": 0.5, "bool": True, "str": "s"}


def _value(name: str) -> Any:
    if name in VALUES:
        return VALUES[name]
    annotation = str(GenerationOptions.__annotations__.get(name, "int"))
    if "Sequence" in annotation:
        return [3, 4]
    return next(value for kind, value in _EXAMPLES.items() if kind in annotation)


@pytest.mark.parametrize(
    ("known", "enum"),
    [
        (_retrieval_messages.ENUMS["mode"], retrieval_pb2.SearchRequest.Mode),
        (_retrieval_messages.ENUMS["role"], retrieval_pb2.EncodeRequest.Role),
        (_retrieval_messages.ENUMS["backend"], retrieval_pb2.CreateIndexRequest.Backend),
        (_retrieval_messages.ENUMS["reader"], openqa_pb2.AnswerRequest.Reader),
        (_task_messages.SPEAKERS, dialogue_pb2.Turn.Speaker),
        (_task_messages.SCORERS, dialogue_pb2.KnowledgeOptions.Scorer),
        (_task_messages.MODES, story_pb2.SentenceControl.Mode),
        (_task_messages.FILTERS, synth_qa_pb2.SynthQARequest.Filter),
    ],
)
def test_every_value_of_an_enum_can_be_named(known: Mapping[str, int], enum: Any) -> None:
    """Inverse seen: readers that a server had and a client could not ask for."""
    assert set(known.values()) == set(enum.values()) - {0}


@pytest.mark.parametrize("name", PROTO_FIELDS)
def test_each_parameter_reaches_its_field(name: str) -> None:
    """A flat parameter lands in the field that the table names, and in no other."""
    message = generate_request({name: _value(name)})

    fields = message_fields(message)
    *groups, leaf = PROTO_FIELDS[name].split(".")
    for group in groups:
        assert list(fields) == [group]
        fields = fields[group]
    assert list(fields) == [leaf]


def test_tables_of_client_and_server_agree() -> None:
    """What the client may send is what the server reads, by the same names into the same fields."""
    server = {name: rule.proto for name, rule in BY_NAME.items()} | {
        name: entry[0] for name, entry in UNSUPPORTED.items()
    }

    assert dict(PROTO_FIELDS) == {**server, "model": "meta.model"}
    elsewhere = {"timeout", "request_id", "tools", "add_generation_prompt", "continue_final_message"}
    typed = set(ChatOptions.__annotations__) | set(GenerationOptions.__annotations__) | {"model", "n"}
    assert typed - elsewhere == set(PROTO_FIELDS)


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ({"top_p_reset_token_ids": []}, {"factual": {"no_reset": True}}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"temperature": 0}, {"temperature": 0.0}),
    ],
    ids=["no-reset", "top-k-off", "explicit-zero"],
)
def test_zero_is_told_from_unset(given_: dict[str, Any], expected: dict[str, Any]) -> None:
    """An explicit zero travels; what is left out does not."""
    assert message_fields(generate_request(given_).sampling) == expected


def test_wire_only_grows() -> None:
    """
    No field, number, type or method of the published contract changes or goes. Seen to fail with one field renumbered.

    New ones are added to the golden file by hand: run this test and append what it prints.
    """
    golden = GOLDEN.read_text("ascii").splitlines()
    now = _described()

    missing = [line for line in golden if line not in now]
    new = [line for line in now if line not in golden]
    assert missing == []
    assert new == [], "append to api_v1.txt:\n" + "\n".join(new)


def _described() -> list[str]:
    names = [name for _, name, _ in pkgutil.iter_modules(v1.__path__) if name.endswith("_pb2")]
    lines = []
    for module in (importlib.import_module(f"{v1.__name__}.{name}") for name in names):
        file: Any = descriptor_pool.Default().FindFileByName(module.DESCRIPTOR.name)
        for message in file.message_types_by_name.values():
            lines += _message(message)
        for enum in file.enum_types_by_name.values():
            lines += [f"{enum.full_name}.{value.name} = {value.number}" for value in enum.values]
        for service in file.services_by_name.values():
            for method in service.methods:
                asked = f"{'stream ' if method.client_streaming else ''}{method.input_type.full_name}"
                told = f"{'stream ' if method.server_streaming else ''}{method.output_type.full_name}"
                lines.append(f"{method.full_name}({asked}) {told}")
    return lines


def _message(message: Any) -> list[str]:
    lines = [
        f"{field.full_name} = {field.number} type {field.type}{' optional' if field.has_presence else ''}"
        for field in message.fields
    ]
    for nested in message.nested_types:
        lines += _message(nested)
    for enum in message.enum_types:
        lines += [f"{enum.full_name}.{value.name} = {value.number}" for value in enum.values]
    return lines


@settings(deadline=None)  # shared cores
@given(st.lists(st.tuples(st.sampled_from(["", "delta"]), st.text(max_size=20))), st.data())
def test_events_survive_any_split(events: list[tuple[str, str]], data: st.DataObject) -> None:
    """Wherever the network cuts the bytes, the same events come out. Seen to fail with `str.splitlines`."""
    ends = data.draw(st.sampled_from(["\n", "\r\n", "\r"]))
    lines = []
    for name, text in events:
        lines += [f"event: {name}"] if name else []
        lines += [f"data: {json.dumps(text, ensure_ascii=False)}", ": ping", ""]
    raw = "".join(line + ends for line in lines).encode("utf-8", "surrogatepass")
    raw = raw.decode("utf-8", "replace").encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    decoder = SSEDecoder()

    found = []
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        found += decoder.feed(raw[start:end])
    found += decoder.feed(b"\n")  # a final CR may have waited for its LF

    assert [(name, json.loads(text)) for name, text in found] == [
        (name, text.encode("utf-8", "replace").decode()) for name, text in events
    ]


def test_unknown_news_is_kept() -> None:
    """A newer server's finish reasons, states and fields arrive; nothing crashes."""
    answer = decode(Completion, {"choices": [{"finish_reason": "moon_phase", "aura": 3}], "mood": "good"})
    model = decode(Model, {"id": "m", "state": "dreaming"})
    future = message_fields(generation_pb2.Choice(finish_reason=99))  # type: ignore[arg-type]  # from the future

    assert answer.finish_reason == "moon_phase"
    assert answer.choices[0].extra == {"aura": 3}
    assert answer.extra == {"mood": "good"}
    assert model.state == "dreaming"
    assert future == {"finish_reason": "99"}


SERVERS = ("trilithon_server", "trilithon_finetune")
EITHER = {"unsupported_model"}
"""Of a model that the caller named, and of none that is served: only gRPC tells the two apart."""


def raised() -> set[tuple[str, str]]:
    """Classes of errors and the codes that they are made with where a server runs."""
    found = set()
    for package in SERVERS:
        for path in sorted(Path(str(importlib.import_module(package).__file__)).parent.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    codes = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
                    found |= {(node.func.id, code.value) for code in codes if isinstance(code, ast.Constant)}
    return found


def test_E3_an_error_has_one_class_by_either_protocol() -> None:
    """
    Whatever code a server makes an error with, the client raises the class that it was made as, over HTTP as over gRPC.
    Inverse seen: a code that shares its status with another class's and is not told apart.
    """
    kinds = {kind.__name__: kind for kind in SERVER_ERRORS}
    made = {(kinds[name], code) for name, code in raised() if name in kinds and code not in EITHER}
    by_http = {(class_for_http(kind.http_status, code), code) for kind, code in made}
    by_grpc = {(class_for_grpc(kind.grpc_status, code), code) for kind, code in made}

    assert len({kind for kind, _ in made}) > 8
    assert by_http == made
    assert by_grpc == made
