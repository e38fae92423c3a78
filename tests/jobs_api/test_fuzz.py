"""The jobs routes and messages under fuzzing: no 500, no INTERNAL, and the OpenAPI document keeps its word (S9)."""

from __future__ import annotations

import json
from typing import Any

import grpc
import hypothesis
import pytest
import schemathesis
from front_server import ACME, bearer
from google.protobuf import descriptor_pool, message_factory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs_server import JobsServer
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from trilithon_finetune.api.extension import SERVICES, JobsExtension
from trilithon_server.config import EngineConfig, JobsConfig, ServeConfig

EXTENSION = JobsExtension(ServeConfig(engines=(EngineConfig(model="x"),), jobs=JobsConfig(store="unused")))
METADATA = (("x-api-key", ACME),)
FUZZ = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)


def test_S9_the_document_has_the_jobs_routes(served_jobs: JobsServer) -> None:
    """The served document names every route of the extension, and every reference in it leads somewhere."""
    document = served_jobs.http.get("/openapi.json").json()

    served = {(method, path) for path, item in document["paths"].items() for method in item}
    assert served >= {(route.method.lower(), route.path) for route in EXTENSION.routes}
    for part in json.dumps(document).split('"$ref": "#/components/schemas/')[1:]:
        assert part.partition('"')[0] in document["components"]["schemas"]
    form = document["paths"]["/v1/files"]["post"]["requestBody"]["content"]
    assert list(form) == ["multipart/form-data"]


@pytest.mark.parametrize("route", EXTENSION.routes, ids=lambda route: f"{route.method} {route.path}")
def test_S9_http_fuzzing_of_jobs_finds_no_500(served_jobs: JobsServer, route: Any) -> None:
    """
    Requests that fit the document and requests that break it: answers conform, and broken ones are refused.

    Inverse check: a page's limit that is read with `int(...)` alone fails here within a few examples.
    """
    url = served_jobs.server.url
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=bearer(ACME))
    operation = schema[route.path][route.method]
    job, checks = served_jobs.job(), [not_a_server_error, status_code_conformance, content_type_conformance]
    checks.append(response_schema_conformance)
    strategy = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    if route.request is not None or route.query is not None:
        strategy |= operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    if route.request is not None:
        checks.append(negative_data_rejection)

    @given(case=strategy, known=st.booleans())
    @FUZZ
    def fuzz(case: Any, known: bool) -> None:
        if known and case.path_parameters:  # also beyond the door of an id that is there
            names = {"job_id": job.id, "file_id": job.training_file}
            case.path_parameters = {name: names[name] for name in case.path_parameters}
        response = case.call(base_url=url, headers=bearer(ACME), timeout=60)
        assert response.status_code < 500, response.text
        if known and negative_data_rejection in checks and route.request is not None:
            case.validate_response(response, checks=[item for item in checks if item is not negative_data_rejection])
        else:
            case.validate_response(response, checks=checks)

    fuzz()
    assert served_jobs.http.get(f"/v1/fine_tuning/jobs/{job.id}").status_code == 200


METHODS = [
    (f"/{name}/{method.name}", method) for name in SERVICES for method in
    descriptor_pool.Default().FindServiceByName(name).methods
]  # fmt: skip

WORDS = st.one_of(st.text(max_size=12), st.sampled_from(["tiny", "sft", "fine-tune", "peft", "ftjob-" + "0" * 20]))


def values(field: Any, ids: dict[str, str]) -> st.SearchStrategy[Any]:
    """Values of one field of a message."""
    if field.enum_type is not None:
        return st.integers(-1, 40)
    if field.type in (field.TYPE_DOUBLE, field.TYPE_FLOAT):
        return st.floats()
    if field.type == field.TYPE_BOOL:
        return st.booleans()
    if field.type == field.TYPE_BYTES:
        return st.binary(max_size=20)
    if field.type == field.TYPE_STRING:
        return WORDS | st.sampled_from(list(ids.values()))
    top = {field.TYPE_UINT32: 2**32 - 1, field.TYPE_SINT32: 2**31 - 1, field.TYPE_INT32: 2**31 - 1}
    return st.sampled_from([0, 1, 20]) | st.integers(0, top.get(field.type, 2**63 - 1))


def messages(descriptor: Any, ids: dict[str, str]) -> st.SearchStrategy[Any]:
    """Any message of a type: scalars, lists of them, maps of texts and one level of messages."""
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for field in descriptor.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            strategy = st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2)
        elif field.message_type is not None:
            strategy = messages(field.message_type, ids)
        else:
            strategy = values(field, ids)
            strategy = st.lists(strategy, max_size=3) if field.label == field.LABEL_REPEATED else strategy
        fields[field.name] = strategy
    kind = message_factory.GetMessageClass(descriptor)
    return st.fixed_dictionaries({}, optional=fields).map(lambda given_: kind(**given_))


@pytest.mark.parametrize(("path", "method"), METHODS, ids=[path.rpartition("/")[2] for path, _ in METHODS])
def test_S9_message_fuzzing_of_jobs_finds_no_internal(served_jobs: JobsServer, path: str, method: Any) -> None:
    """
    Any message of a method's type is answered or refused, never INTERNAL or UNKNOWN.

    Inverse check: a servicer that indexes what a lookup by state number gives fails here for ListJobs.
    """
    job = served_jobs.job()
    ids = {"job": job.id, "file": job.training_file}

    @given(sent=st.lists(messages(method.input_type, ids), min_size=1, max_size=3 if method.client_streaming else 1))
    @settings(FUZZ, max_examples=30)
    def fuzz(sent: list[Any]) -> None:
        requests = iter([item.SerializeToString() for item in sent])
        code = grpc.StatusCode.OK
        try:
            for _, _ in zip(range(3), call(requests, metadata=METADATA, timeout=1), strict=False):
                pass
        except grpc.RpcError as error:
            code = error.code()  # type: ignore[attr-defined]  # the stubs do not say so
        assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)

    with served_jobs.channel() as channel:
        call = channel.stream_stream(path, lambda b: b, lambda b: b)
        fuzz()
    assert served_jobs.http.get(f"/v1/fine_tuning/jobs/{job.id}").status_code == 200
