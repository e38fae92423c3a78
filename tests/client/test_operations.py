"""Every operation, over both protocols and both kinds of waiting, gives the same typed result."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import contract, grpc_server, http_server

from trilithon import AsyncClient, AsyncStream, Client, Completion, Completions, Delta, Stream

MESSAGES: Any = [{"role": "user", "content": "hi"}]
GENE: Any = {"start": 0, "end": 3, "type": "GENE", "text": "p53"}
CALLS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "generate": ("generate", ("Once",), {"max_tokens": 1, "logprobs": 1, "stop": "."}),
    "generate_ids": ("generate", ([1, 2],), {"n": 1, "constraint": {"choice": ["a"]}}),
    "chat": ("chat", (MESSAGES,), {"temperature": 0.0, "tools": [{"type": "function"}]}),
    "score": ("score", ([{"context": "a", "continuations": [" b"]}],), {"top": 1}),
    "embed": ("embed", (["a"],), {"pooling": "mean", "normalize": True}),
    "tokenize": ("tokenize", (["ab"],), {"return_pieces": True}),
    "detokenize": ("detokenize", ([[1, 2]],), {}),
    "render": ("render", (MESSAGES,), {}),
    "abort": ("abort", ("req_1",), {}),
    "annotate": ("extract.annotate", (["p53 binds"],), {"types": ["GENE"], "timeout": 60.0}),
    "relations": ("extract.relations", ("p53 binds",), {"pairs": [(GENE, GENE)], "timeout": 60.0}),
    "relations_found": ("extract.relations", ("p53 binds",), {"entities": [GENE], "tagger": "t"}),
    "answer": ("extract.answer", ("who?", ["p53 binds"]), {"n_best": 2, "null_threshold": 0.5}),
    "classify": ("extract.classify", (["p53"],), {"text_pairs": ["binds"]}),
    "models.list": ("models.list", (), {}),
    "models.get": ("models.get", ("m",), {}),
}


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server of the contract with fixed answers."""
    if request.param == "http":
        with http_server() as server:
            server.answer = contract
            yield server.url
    else:
        with grpc_server() as scripted:
            yield scripted.url


async def _both(url: str, name: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    with Client(url) as client:
        target: Any = client
        for part in name.split("."):
            target = getattr(target, part)
        first = target(*args, **options)
    async with AsyncClient(url) as twin:
        target = twin
        for part in name.split("."):
            target = getattr(target, part)
        second = await target(*args, **options)
    return first, second


@pytest.mark.parametrize("call", CALLS)
async def test_sync_and_async_answer_alike(url: str, call: str) -> None:
    """The two clients return equal results for every operation."""
    name, args, options = CALLS[call]

    first, second = await _both(url, name, *args, **options)

    assert first == second


@pytest.mark.parametrize("call", CALLS)
async def test_E3_http_and_grpc_answer_alike(call: str) -> None:
    """One answer of the server is one result, whatever the protocol. Seen to fail with the enum prefix left on."""
    name, args, options = CALLS[call]
    with http_server() as http, grpc_server() as rpc:
        http.answer = contract
        over_http, _ = await _both(http.url, name, *args, **options)
        over_grpc, _ = await _both(rpc.url, name, *args, **options)

    assert over_grpc == over_http


def test_generate_returns_one_completion_without_n(url: str) -> None:
    """Without `n` the result is one answer, with everything known about it at hand."""
    with Client(url) as client:
        answer = client.generate("Once", max_tokens=1)

    assert type(answer) is Completion
    assert (answer.text, answer.finish_reason, answer.seed) == (" upon\u2028a time", "max_tokens", 2**62 + 1)
    assert answer.tokens[0].top[0].logprob == -0.5
    assert answer.usage.prompt_tokens == 2
    assert answer.message == {"role": "assistant", "content": answer.text}


def test_generate_returns_completions_with_n(url: str) -> None:
    """With `n` the result is a sequence of answers, even of one."""
    with Client(url) as client:
        answers = client.generate("Once", n=1)

    assert type(answers) is Completions
    assert [choice.text for choice in answers] == [answers[0].text]
    assert len(answers) == 1


def test_stream_joins_to_the_whole_text(url: str) -> None:
    """A stream yields deltas, then knows usage and timings."""
    with Client(url) as client, client.generate("Once", stream=True) as stream:
        before = stream.usage
        deltas = list(stream)

    assert isinstance(stream, Stream)
    assert all(isinstance(delta, Delta) for delta in deltas)
    assert "".join(delta.text for delta in deltas) == " upon\u2028a time"
    assert (stream.request_id, stream.model, stream.started.prompt_tokens) == ("req_1", "m", 2)
    assert before is None
    assert stream.usage is not None
    assert stream.usage.generated_tokens == 1
    assert stream.timings is not None
    assert stream.timings.total_ms == 2.5


async def test_async_stream_joins_to_the_whole_text(url: str) -> None:
    """The same for an event loop."""
    async with AsyncClient(url) as client:
        stream = await client.chat(MESSAGES, stream=True)
        async with stream:
            texts = [delta.text async for delta in stream]

    assert isinstance(stream, AsyncStream)
    assert texts == [" upon\u2028a time"]
    assert stream.finished is not None


def test_health_over_http() -> None:
    """Readiness is the status code; the reason is the body's."""
    with http_server() as server, Client(server.url) as client:
        server.answer = contract
        ready = client.health()

    assert (ready.ready, ready.status, ready.reason) == (True, "ok", "")


async def test_unix_sockets(tmp_path: Path) -> None:
    """Both protocols reach a server by its socket's path."""
    with http_server(uds=str(tmp_path / "h.sock")) as http, grpc_server(uds=str(tmp_path / "g.sock")) as rpc:
        http.answer = contract
        texts = []
        for url in (http.url, rpc.url):
            first, second = await _both(url, "generate", "Once")
            texts += [first.text, second.text]

    assert texts == [" upon\u2028a time"] * 4


def test_signatures_are_twins() -> None:
    """Every public method of the asynchronous client takes what its twin takes, by the same names and defaults."""
    renamed = {"close": "aclose"}
    parts = [(type(getattr(Client(), name)), type(getattr(AsyncClient(), name))) for name in ("models", "extract")]
    for plain, twin in ((Client, AsyncClient), *parts):
        names = [name for name, value in vars(plain).items() if not name.startswith("_") and callable(value)]
        assert names
        for name in names:
            mine = inspect.signature(getattr(plain, name))
            theirs = inspect.signature(getattr(twin, renamed.get(name, name)))
            assert mine.parameters == theirs.parameters, name
            expected = re.sub(r"\b(\w*Stream)\b", r"Async\1", str(mine.return_annotation))
            assert expected == str(theirs.return_annotation), name
    init = inspect.signature(Client.__init__).parameters
    twin_init = inspect.signature(AsyncClient.__init__).parameters
    assert list(init) == list(twin_init)
    assert [p.default for p in init.values()] == [p.default for p in twin_init.values()]
