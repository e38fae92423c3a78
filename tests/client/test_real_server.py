"""The client against our own server, started as a user starts it, on a tiny random model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Server, serving
from tiny import tiny_llama

import trilithon
from trilithon import AsyncClient, Client, errors
from trilithon.cli import main

GREEDY: Any = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, "seed": 1}
MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests of this file."""
    with serving(tiny_llama(tmp_path_factory.mktemp("model") / "tiny")) as running:
        yield running


@pytest.fixture(params=["url", "grpc_target"], ids=["http", "grpc"])
def address(request: pytest.FixtureRequest, server: Server) -> str:
    """Its address, by each protocol."""
    return str(getattr(server, request.param))


OPERATIONS: dict[str, Callable[[Client], Any]] = {
    "generate": lambda c: c.generate("Once upon", logprobs=2, prompt_logprobs=0, **GREEDY).choices,
    "generate-ids": lambda c: c.generate([5, 6, 7], return_token_ids=True, **GREEDY).choices,
    "generate-n": lambda c: c.generate("Once", n=2, seed=3, max_tokens=6, ignore_eos=True).choices,
    "generate-stop": lambda c: c.generate("Once", seed=1, max_tokens=24, stop=["e", "a"], n=1).choices,
    "generate-choice": lambda c: c.generate("Once", constraint={"choice": ["yes", "no"]}, max_tokens=8, seed=1).choices,
    "chat": lambda c: c.chat(MESSAGES, **GREEDY).choices,
    "score": lambda c: c.score([{"context": "Once", "continuations": [" upon", " a"]}]).items,
    "score-ids": lambda c: c.score([{"context": [5, 6], "continuation_tokens": [[7, 8]]}]).items,
    "tokenize": lambda c: c.tokenize(["Once upon", ""], return_pieces=True, return_offsets=True),
    "detokenize": lambda c: c.detokenize([[40, 41], [42]]),
    "render": lambda c: c.render(MESSAGES),
    "models": lambda c: c.models.list(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_E3_grpc_equals_http(name: str, server: Server) -> None:
    """Every operation answers alike over both protocols, to the last log-probability (float32 on the wire)."""
    with Client(server.url) as http, Client(server.grpc_target) as rpc:
        over_http, over_grpc = OPERATIONS[name](http), OPERATIONS[name](rpc)

    assert _rounded(over_grpc) == _rounded(over_http)


def _rounded(value: Any) -> Any:
    """Results as plain values, floats to 5 places: gRPC carries log-probabilities as float32, JSON as digits."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.compare]
        return {name: _rounded(getattr(value, name)) for name in names}
    if isinstance(value, tuple):
        return [_rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


def test_E3_streamed_and_joined_equals_whole(address: str) -> None:
    """The deltas of a stream join to the answer that is not streamed, text and tokens."""
    with Client(address) as client:
        whole = client.generate("Once upon", return_token_ids=True, **GREEDY)
        with client.generate("Once upon", stream=True, return_token_ids=True, **GREEDY) as stream:
            deltas = list(stream)

    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token.id for delta in deltas for token in delta.tokens] == [token.id for token in whole.tokens]
    assert deltas[-1].finish_reason == whole.finish_reason == "max_tokens"
    assert stream.usage is not None
    assert stream.usage.generated_tokens == whole.usage.generated_tokens == 12


async def test_async_client_answers_the_same(address: str) -> None:
    """The asynchronous twin gets the same answer, whole and streamed."""
    with Client(address) as client:
        expected = client.chat(MESSAGES, **GREEDY).text
    async with AsyncClient(address) as twin:
        whole = await twin.chat(MESSAGES, **GREEDY)
        stream = await twin.chat(MESSAGES, stream=True, **GREEDY)
        joined = "".join([delta.text async for delta in stream])

    assert whole.text == joined == expected


def test_wrong_requests_name_every_violation(address: str) -> None:
    """A refusal is `InvalidArgument` with all violations, alike over both protocols."""
    with Client(address) as client, pytest.raises(errors.InvalidArgument) as caught:
        client.generate("Once", top_p=3.0, min_p=2.0, request_id="mine-1")

    assert [violation.field for violation in caught.value.details] == ["top_p", "min_p"]
    assert caught.value.request_id == "mine-1"


def test_unknown_model_is_not_found(address: str) -> None:
    """A model that is not served is `NotFound`, and the message names those that are."""
    with Client(address) as client, pytest.raises(errors.NotFound, match="tiny") as caught:
        client.generate("Once", model="gtp")

    assert caught.value.code == "model_not_found"


def test_R7_timeout_returns_what_there_is(address: str) -> None:
    """`timeout` reaches the server as its limit: the answer so far comes back, or the deadline passed in the queue."""
    with Client(address) as client:
        try:
            answer = client.generate("Once", max_tokens=500, ignore_eos=True, temperature=0.0, timeout=0.6)
        except errors.DeadlineExceeded:
            return  # a machine under load: nothing was there in time

    assert answer.finish_reason in ("time_limit", "max_tokens")


def test_R6_closing_a_stream_frees_the_engine(address: str, server: Server) -> None:
    """After a stream was closed midway, abort finds nothing of it running."""
    with Client(address) as client:
        stream = client.generate("Once", stream=True, max_tokens=500, ignore_eos=True, request_id="leaver")
        next(stream)
        stream.close()

        running = True
        for _ in range(200):
            running = client.abort("leaver")
            if not running:
                break

    assert not running


def test_health(address: str) -> None:
    """A ready server says so over both protocols."""
    with Client(address) as client:
        assert client.health().ready


def _snippet(text: str) -> str:
    """The indented block of a docstring that begins with an import of ours."""
    lines = text[text.rindex("\n", 0, text.index("from trilithon import")) + 1 :].splitlines()
    depth = len(lines[0]) - len(lines[0].lstrip())
    taken = itertools.takewhile(lambda line: not line.strip() or line.startswith(" " * depth), lines)
    return textwrap.dedent("\n".join(taken))


@pytest.mark.parametrize("source", ["module", "Client", "AsyncClient"])
def test_documented_snippets_run(source: str, server: Server) -> None:
    """The snippets of the docstrings run as they stand, against a server at their address."""
    documented = trilithon if source == "module" else getattr(trilithon, source)
    code = _snippet(documented.__doc__ or "")
    if "async with" in code:
        first, _, rest = code.partition("\n")
        code = f"import asyncio\n{first}\nasync def main():\n{textwrap.indent(rest, '    ')}\nasyncio.run(main())\n"
    code = code.replace("http://127.0.0.1:8000", server.url).replace("grpc://127.0.0.1:8001", server.grpc_target)

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_command_talks_to_it(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The command's verbs work against the real server, by either address."""
    monkeypatch.setenv("TRILITHON_URL", address)
    for arguments in (
        ["generate", "Once", "--max-tokens", "4", "--seed", "7"],
        ["chat", "hi", "--max-tokens", "4", "-o", "json"],
        ["score", "Once", " upon", " a"],
        ["tokenize", "Once upon"],
        ["models", "--served"],
    ):
        assert main(arguments) == 0, arguments
        assert capsys.readouterr().out


def test_bench_measures_it(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """The measuring command gets exact lengths from our server, and sees the warm pass hit the prefix cache."""
    flags = ["--requests", "3", "--prompt-len", "40", "--answer-len", "4", "--runs", "1", "--concurrency", "2"]

    code = main(["bench", "serve", "--url", server.url, *flags, "--prompt-format", "text", "-o", "json"])

    result = json.loads(capsys.readouterr().out)
    assert code == 0
    assert result["cold"]["requests_failed"]["max"] == 0
    assert result["cold"]["answers_of_other_length"]["max"] == 0
    assert result["warm"]["cached_tokens"]["median"] > result["cold"]["cached_tokens"]["median"]
    assert result["fingerprint"]
