"""What extraction refuses, what ends it early, and what random requests find: nothing."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from typing import Any

import grpc
import httpx
import pytest
from extracting import BODIES, PATHS, RPCS, TEXT, A, B, Served
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tasks import Task

from trilithon import Client, DeadlineExceeded, InvalidArgument, TrilithonError
from trilithon._grpc_errors import DETAILS_KEY, from_grpc
from trilithon.api.v1 import common_pb2

WIDE = "word " * 60_000
BAD: dict[str, tuple[Task, dict[str, Any], str, str]] = {
    "no texts": ("ner", {"texts": []}, "invalid_value", "`texts` must hold from 1 to 64 texts. Given: 0."),
    "empty text": ("ner", {"texts": ["a", ""]}, "empty_prompt", "`texts[1]` must not be empty"),
    "too many": ("classify", {"texts": ["a"] * 65}, "invalid_value", "from 1 to 64 texts. Given: 65"),
    "too long": ("ner", {"texts": [WIDE]}, "prompt_too_long", "at most 262144 characters in all. Given: 300000"),
    "windows": ("ner", {"texts": [WIDE[:60_000]]}, "prompt_too_long", "at most 256 sequences of 24 tokens"),
    "type": ("ner", {"texts": ["a"], "types": ["GENES"]}, "invalid_value", 'Did you mean "GENE"?'),
    "wrong kind": ("ner", {"model": "span_qa", "texts": ["a"]}, "unsupported_model", "Models that can: `ner`."),
    "no head": ("classify", {"model": "plain", "texts": ["a"]}, "unsupported_model", "It can: embed, tokenize."),
    "unknown": ("ner", {"model": "nerr", "texts": ["a"]}, "model_not_found", "no model"),
    "unnamed": ("ner", {"model": "", "texts": ["a"]}, "model_not_found", "several models are served; name one"),
    "tagger": ("relation", {"text": TEXT, "tagger": "classify"}, "unsupported_model", "cannot annotate"),
    "nothing asked": ("relation", {"text": TEXT}, "missing_parameter", "exactly one of the three"),
    "two asked": ("relation", {"text": TEXT, "entities": [A], "tagger": "ner"}, "missing_parameter", "exactly one"),
    "beyond": (
        "relation", {"text": TEXT, "entities": [A | {"end": 900}]}, "invalid_value",
        f"`entities[0]` must be characters [start, end) of the text, which has {len(TEXT)}. Given: \"4:900\"",
    ),
    "backwards": ("relation", {"text": TEXT, "entities": [A | {"end": 4}]}, "invalid_value", '"4:4"'),
    "text differs": (
        "relation", {"text": TEXT, "pairs": [{"a": A | {"text": "masons"}, "b": B}]}, "invalid_value",
        "`pairs[0].a.text` must be what stands at 4:9, 'mason'",
    ),
    "overlap": ("relation", {"text": TEXT, "pairs": [{"a": A, "b": A}]}, "invalid_value", "that do not overlap"),
    "marker": ("relation", {"text": TEXT, "entities": [A | {"type": "Gene"}]}, "invalid_value", "of CHEMICAL, GENE"),
    "pairs": ("relation", {"text": TEXT, "pairs": [{"a": A, "b": B}] * 201}, "invalid_value", "at most 200 pairs"),
    "no question": ("span_qa", {"question": " \n", "contexts": ["a"]}, "empty_prompt", "at least one word"),
    "long question": ("span_qa", {"question": "a" * 5000, "contexts": ["a"]}, "invalid_value", "at most 4096"),
    "n_best": ("span_qa", {"question": "a", "contexts": ["a"], "n_best": 21}, "invalid_value", "n_best"),
    "half pairs": ("classify", {"texts": ["a", "b"], "text_pairs": ["c"]}, "invalid_value", "must be as many as"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_R11_bad_input_is_refused_in_words(served: Served, case: str) -> None:
    """What cannot be is told with the rule and the value, the same over both protocols, before any work."""
    task, body, code, words = BAD[case]
    over_http = served.ask(task, **body)
    with pytest.raises(TrilithonError) as over_grpc:
        ask_bad(served, task, body)

    assert over_http.status_code in (400, 404), over_http.text
    error = over_http.json()["error"]
    assert error["code"] == code
    assert words in json.loads(over_http.text)["error"]["message"]
    assert over_grpc.value.code == code
    if case != "n_best":  # on HTTP the body's own schema speaks first
        assert str(over_grpc.value) == error["message"]


def ask_bad(served: Served, task: Task, body: dict[str, Any]) -> None:
    """The client's view of the refusal over gRPC."""
    try:
        served.call(task, **body)
    except grpc.RpcError as error:
        rich = dict(error.trailing_metadata())[DETAILS_KEY]  # type: ignore[attr-defined]  # the stubs do not say so
        code, text = error.code().name, error.details()  # type: ignore[attr-defined]  # likewise
        raise from_grpc(code, text, rich, url="", timeout_s=None).error from None


def test_half_a_surrogate_pair_is_refused(served: Served) -> None:
    """JSON can smuggle in half a character; no tokenizer sees it."""
    raw = b'{"model": "ner", "texts": ["a \\ud83d b"]}'
    answer = served.http.post(PATHS["ner"], content=raw, headers={"content-type": "application/json"})

    assert answer.status_code == 400
    assert "half of a surrogate pair" in answer.json()["error"]["message"]


def test_every_violation_is_told_at_once(served: Served) -> None:
    """A request hears of all that is wrong with it, the call's own parameters included."""
    error = served.ask("ner", texts=[""], types=["x"], time_limit_ms=-1, temperature=1.0).json()["error"]

    assert [item["field"] for item in error["details"]] == ["temperature", "time_limit_ms", "texts[0]", "types[0]"]


# Ends -------------------------------------------------------------------------------------------------------


def wait_until(condition: Any, timeout_s: float = 60.0) -> None:
    """Poll; fail when it never holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


SLOW = {"texts": ["the " * 800] * 4}  # some 200 windows: far more than one step


def test_R6_whoever_leaves_takes_the_windows_along(served: Served) -> None:
    """A client that hangs up, a cancelled RPC and an explicit abort leave no window in the engine."""
    with contextlib.suppress(httpx.TimeoutException):
        served.http.post(PATHS["ner"], json={"model": "ner", **SLOW}, timeout=0.05)
    name, kind = RPCS["ner"]
    future = getattr(served.stub, name).future(kind(meta=common_pb2.RequestMeta(model="ner"), **SLOW))
    time.sleep(0.05)
    future.cancel()
    wait_until(lambda: served.in_flight() == 0)

    aborted: list[httpx.Response] = []
    headers = {"x-request-id": "leave"}
    thread = threading.Thread(
        target=lambda: aborted.append(served.http.post(PATHS["ner"], json={"model": "ner", **SLOW}, headers=headers))
    )
    thread.start()
    while thread.is_alive() and not served.http.delete("/v1/requests/leave").json()["was_running"]:
        time.sleep(0.002)
    thread.join()
    wait_until(lambda: served.in_flight() == 0)

    answer = aborted[0]
    assert answer.status_code in (200, 499)  # 200: it was faster than the abort
    if answer.status_code == 499:
        assert answer.json()["error"]["code"] == "request_cancelled"
    assert served.ask("ner", texts=[TEXT]).status_code == 200


def test_R7_time_limits_hold(served: Served) -> None:
    """A limit that passes ends the request with its own error: HTTP's by parameter, gRPC's by deadline."""
    over_http = served.ask("ner", **SLOW, time_limit_ms=1)
    with Client(served.server.grpc_target, max_retries=0) as client, pytest.raises(DeadlineExceeded):
        client.extract.annotate(SLOW["texts"], model="ner", timeout=0.002)

    assert (over_http.status_code, over_http.json()["error"]["code"]) == (504, "timeout")
    wait_until(lambda: served.in_flight() == 0)


def test_the_client_raises_the_servers_errors(served: Served) -> None:
    """A refusal is the same class with the same details by either protocol; a str for a list is a TypeError."""
    for url in (served.server.url, served.server.grpc_target):
        with Client(url) as client:
            with pytest.raises(InvalidArgument) as refused:
                client.extract.annotate([""], model="ner")
            with pytest.raises(TypeError):
                client.extract.annotate("text", model="ner")
        assert refused.value.details[0].field == "texts[0]"


# Fuzz -------------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from([TEXT, "", " ", "[SEP] [CLS]"])
SIZE = st.integers(-3, 120) | st.integers(0, 2**33)
MENTION = st.fixed_dictionaries(
    {"start": SIZE, "end": SIZE, "type": st.sampled_from(["CHEMICAL", "GENE", "x", ""])}, optional={"text": WORDS}
)
FUZZ: dict[Task, st.SearchStrategy[dict[str, Any]]] = {
    "ner": st.fixed_dictionaries(
        {"texts": st.lists(WORDS, max_size=5)}, optional={"types": st.lists(WORDS, max_size=2)}
    ),
    "relation": st.fixed_dictionaries(
        {"text": WORDS},
        optional={
            "pairs": st.lists(st.fixed_dictionaries({"a": MENTION, "b": MENTION}), max_size=4),
            "entities": st.lists(MENTION, max_size=4),
            "tagger": st.sampled_from(["", "ner", "x"]),
        },
    ),
    "span_qa": st.fixed_dictionaries(
        {"question": WORDS, "contexts": st.lists(WORDS, max_size=4)}, optional={"n_best": SIZE}
    ),
    "classify": st.fixed_dictionaries(
        {"texts": st.lists(WORDS, max_size=4)}, optional={"text_pairs": st.lists(WORDS, max_size=4)}
    ),
}
FUZZED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def status_of(method: Any, request: Any) -> grpc.StatusCode:
    """How a call ends."""
    future = method.future(request, timeout=60)
    future.exception()
    code: grpc.StatusCode = future.code()
    return code


@pytest.mark.parametrize("task", PATHS)
def test_S9_random_requests_find_no_internal_error(served: Served, task: Task) -> None:
    """Texts, offsets and counts of any kind are answered or refused, alike over both protocols; the engine lives on."""

    @given(body=FUZZ[task])
    @FUZZED
    def fuzz(body: dict[str, Any]) -> None:
        answer = served.ask(task, **body)
        assert answer.status_code in (200, 400, 404), answer.text
        name, kind = RPCS[task]
        try:
            request = kind(meta=common_pb2.RequestMeta(model=task), **body)
        except ValueError:
            return  # a number that the message cannot hold
        code = status_of(getattr(served.stub, name), request)
        assert code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
        assert (code is grpc.StatusCode.OK) == (answer.status_code == 200)

    fuzz()
    assert served.ask(task, **BODIES[task]).status_code == 200
