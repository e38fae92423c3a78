"""Routes of retrieval and open questions under fuzzing, on a server that keeps an index (S9)."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_questions import DOCUMENTS, ENCODER, INDEXES, SPANS, WRITER, Open
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from trilithon_server.http import openqa, retrieval

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
FUZZ = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
)
ROUTES = [*retrieval.ROUTES, *openqa.ROUTES]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_S9_fuzzing_finds_no_500(served: Open, route: Any) -> None:
    """
    Requests that fit the document and requests that break it, of an index that is there and of others: answers conform,
    broken ones are refused, and the server goes on.
    """
    if not served.http.get(f"{INDEXES}/fuzzed").is_success:
        served.create("fuzzed")
    url, headers = served.server.url, dict(served.metadata)
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
    operation = schema[route.path][route.method]
    strategy = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    if route.request is not None:
        strategy |= operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

    @given(case=strategy, known=st.booleans())
    @FUZZ
    def fuzz(case: Any, known: bool) -> None:
        if known:
            tame(case)
        response = case.call(base_url=url, headers=headers, timeout=60)
        assert response.status_code < 500, response.text
        checks = CHECKS if known or route.request is None else [*CHECKS, negative_data_rejection]
        case.validate_response(response, checks=checks)

    fuzz()
    assert served.post("/v1/openqa", model=SPANS, question="sea", documents=DOCUMENTS, mode="bm25")["reader"] == "span"


def tame(case: Any) -> None:
    """Go beyond the door: an index, a model, passages and a question that are there, and few tokens."""
    if case.path_parameters:
        case.path_parameters = {"name": "fuzzed"}
    body = case.body
    if not isinstance(body, dict):
        return
    for name, value in (("index", "fuzzed"), ("retriever", ENCODER), ("question", "the sea"), ("queries", ["the sea"])):
        if name in body:
            body[name] = value
    if "question" in body:
        body["model"] = WRITER if body.get("sampling") or body.get("reader") == "causal" else SPANS
        if isinstance(body.get("sampling"), dict):
            body["sampling"]["max_tokens"] = 3
    elif "model" in body:
        body["model"] = ENCODER
