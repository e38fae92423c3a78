"""The measuring command measures what it says: times, counts, lengths, loops, and when it refuses to compare."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Reply, Scripted, contract, http_server

from trilithon._bench.load import run_pass
from trilithon._bench.report import NotComparable, block, compare
from trilithon._bench.serve import measure, target_for
from trilithon._bench.statistics import figures, percentile
from trilithon._bench.trace import Workload, arrivals_s, body, prompts
from trilithon._bench.wire import Exchange, read
from trilithon.cli import main
from trilithon.errors import ConnectionFailed

SMALL = Workload(num_requests=4, prompt_len=6, answer_len=3, concurrency=2, runs=2, warmup=1)


@pytest.fixture
def measured() -> tuple[Scripted, dict[str, Any]]:
    """A measurement of a server with fixed answers."""
    with http_server() as server:
        server.answer = contract
        result = measure(server.url, SMALL)
    return server, result


def _stream(texts: list[str], *, chunk_sizes: list[int] | None = None, usage: Any = None) -> bytes:
    events = [{"choices": [{"index": 0, "text": text}]} for text in texts]
    events.append({"choices": [], "usage": usage or {"prompt_tokens": 5, "completion_tokens": len(texts)}})
    content = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
    pieces = []
    for size in chunk_sizes or [len(content)]:
        pieces.append(content[:size])
        content = content[size:]
    pieces.append(content)
    chunks = b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in pieces if piece)
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


@settings(deadline=None)  # shared cores
@given(
    st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5),
    st.lists(st.integers(1, 60), max_size=6),
    st.lists(st.integers(0, 600), max_size=10),
)
def test_events_have_the_time_of_their_last_byte(texts: list[str], chunks: list[int], cuts: list[int]) -> None:
    """
    However chunks and packets cut the stream, each text has the arrival time of the packet that completed its line.

    Seen to fail with the time of the packet in which the line began.
    """
    raw = _stream(texts, chunk_sizes=chunks)
    edges = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
    exchange = Exchange(-1.0)
    for index, (start, end) in enumerate(itertools.pairwise(edges)):
        exchange.pieces.append((float(index), raw[start:end]))

    answer = read(exchange)

    expected = []
    seen = b""
    lines = 0
    for at_s, piece in exchange.pieces:
        seen += piece
        payload = re.sub(rb"\r\n[0-9a-f]+\r\n|^[0-9a-f]+\r\n", b"", seen.partition(b"\r\n\r\n")[2])
        # A line's end may be the last byte before a chunk's own end, which is not there yet.
        complete = min(len(texts), payload.count(b"}\n"))
        expected += [at_s] * (complete - lines)
        lines = complete
    assert answer.error == ""
    assert answer.text == "".join(texts)
    assert answer.token_times_s == tuple(expected)
    assert (answer.prompt_tokens, answer.answer_tokens) == (5, len(texts))


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\nno"], "HTTP 503: no"),
        ([b"rubbish"], "HTTP no status"),
        ([_stream([])], "an answer without text"),
        ([_stream(["a"]).replace(b"choices", b'x"y', 1)], "answer not understood"),
    ],
    ids=["status", "rubbish", "empty", "bad-json"],
)
def test_failures_are_counted_not_raised(pieces: list[bytes], error: str) -> None:
    """An answer that went wrong is a failure with its reason."""
    answer = read(Exchange(0.0, [(1.0, piece) for piece in pieces]))

    assert answer.error.startswith(error)


def test_traces_are_seeded() -> None:
    """One seed is one trace; runs differ from each other; lengths are exact; the shared prefix is shared."""
    workload = Workload(num_requests=3, prompt_len=6, shared_prefix_len=4, answer_len=1, rate=2.0)
    again, other = prompts(workload, 0), prompts(workload, 1)

    assert prompts(workload, 0) == again
    assert other != again
    assert {len(prompt) for prompt in again} == {6}
    assert len({tuple(prompt[:4]) for prompt in again}) == 1
    assert len({tuple(prompt) for prompt in again}) == 3
    assert arrivals_s(workload, 0) == sorted(arrivals_s(workload, 0))
    assert arrivals_s(workload, 0)[0] == 0.0


def test_poisson_times_have_the_rate() -> None:
    """The mean gap is one over the rate (4,000 draws: within 6 %, four standard errors)."""
    workload = Workload(num_requests=4001, prompt_len=1, answer_len=1, rate=8.0)

    assert arrivals_s(workload, 0)[-1] / 4000 == pytest.approx(1 / 8, rel=0.06)


def test_a_measurement_has_cold_and_warm_passes(measured: tuple[Scripted, dict[str, Any]]) -> None:
    """Each run asks fresh prompts, then the same ones again; the warm-up asks others; every figure has its spread."""
    server, result = measured
    asked = [tuple(request.body["prompt"]) for request in server.asked if request.method == "POST"]
    warmup, cold, warm, second = asked[:1], asked[1:5], asked[5:9], asked[9:13]

    assert sorted(cold) == sorted(warm)
    assert not set(warmup) & set(cold)
    assert not set(second) & set(cold)
    assert all(request.body["ignore_eos"] for request in server.asked if request.method == "POST")
    assert result["cold"]["requests_ok"] == {"median": 4, "min": 4, "max": 4}
    assert result["cold"]["answers_of_other_length"]["max"] == 0
    assert set(result["cold"]["ttft_ms"]) == {"mean", "p50", "p90", "p99"}
    assert result["machine"]["num_cpus"] >= 1
    json.dumps(result)


def test_the_block_names_what_counts(measured: tuple[Scripted, dict[str, Any]]) -> None:
    """The printed block has the fixed lines, both caches and the settings."""
    text = block(measured[1])

    for words in ("TTFT p99 ms", "TPOT mean ms", "ITL p50 ms", "E2E p90 ms", "output tokens/s", "cold prefix cache"):
        assert words in text
    assert "closed loop, 2 at a time; 4 requests of 6 tokens in, 3 out" in text


@pytest.mark.parametrize("concurrency", [1, 3])
def test_closed_loop_keeps_its_number(concurrency: int) -> None:
    """A closed loop has exactly so many requests in flight at most."""
    with http_server() as server:
        server.answer = contract
        bodies = [body(SMALL, "m", [1, 2])] * 6
        done = asyncio.run(run_pass(target_for(server.url, None), bodies, concurrency=concurrency))

    assert done.max_in_flight == concurrency
    assert len(done.answers) == 6


def test_open_loop_does_not_wait_for_answers() -> None:
    """An open loop sends on time though nothing has come back: all are in flight at once."""
    hanging = Reply(events=[("", {"choices": [{"text": "a"}]})], hang=True)
    with http_server(hanging) as server:
        bodies = [body(SMALL, "m", [1])] * 3
        passing = run_pass(
            target_for(server.url, None), bodies, concurrency=None, arrivals_s=[0.0, 0.01, 0.02], timeout_s=0.5
        )
        done = asyncio.run(passing)

    assert done.max_in_flight == 3
    assert {answer.error for answer in done.answers} == {"no end within 0.5 s"}


def test_nothing_answers_is_said(free_port: Callable[[], int]) -> None:
    """A closed loop at a dead port is ConnectionFailed."""
    target = target_for(f"http://127.0.0.1:{free_port()}", None)

    with pytest.raises(ConnectionFailed):
        asyncio.run(run_pass(target, [b"{}"], concurrency=1))


def test_goodput_counts_requests_within_all_limits() -> None:
    """Goodput is the requests a second that met every limit."""
    with http_server() as server:
        server.answer = contract
        done = asyncio.run(run_pass(target_for(server.url, None), [body(SMALL, "m", [1])] * 4, concurrency=1))

    strict = figures(done, answer_len=3, slo={"ttft_ms": 1e-6})
    lax = figures(done, answer_len=3, slo={"ttft_ms": 1e6, "e2e_ms": 1e6})

    assert (strict["goodput_share"], lax["goodput_share"]) == (0, 1)


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_percentiles_are_numpys(values: list[float], share: float) -> None:
    """Percentiles equal numpy's default."""
    import numpy

    assert percentile(sorted(values), share) == pytest.approx(float(numpy.quantile(values, share)), rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("path", ["machine.num_cpus", "workload.answer_len", "workload.seed"])
def test_unlike_results_are_not_compared(path: str, measured: tuple[Scripted, dict[str, Any]]) -> None:
    """No ratio of results whose settings or machines differ; the message names what differs."""
    group, name = path.split(".")
    other = json.loads(json.dumps(measured[1]))
    other[group][name] += 1

    with pytest.raises(NotComparable, match=re.escape(path)):
        compare(measured[1], other)


def test_like_results_are_compared(measured: tuple[Scripted, dict[str, Any]]) -> None:
    """A ratio is second to first, and overlapping ranges are said to overlap."""
    other = json.loads(json.dumps(measured[1]))
    other["cold"]["output_tokens_per_s"] = {
        key: value * 4 for key, value in measured[1]["cold"]["output_tokens_per_s"].items()
    }

    rows = {(row["cache"], row["figure"]): row for row in compare(measured[1], other)}

    assert rows["cold", "output_tokens_per_s"]["ratio"] == pytest.approx(4)
    assert rows["warm", "output_tokens_per_s"]["ranges_overlap"]


def test_baseline_fails_with_7(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Falling below the baseline by more than allowed is exit code 7."""
    flags = ["--requests", "2", "--prompt-len", "4", "--answer-len", "2", "--runs", "1", "--concurrency", "1"]
    saved = tmp_path / "baseline.json"
    with http_server() as server:
        server.answer = contract
        first = main(["bench", "serve", "--url", server.url, *flags, "--save", str(saved)])
        result = json.loads(saved.read_text())
        for kind in ("cold", "warm"):
            for key in ("median", "min", "max"):
                result[kind]["output_tokens_per_s"][key] *= 1e6
        saved.write_text(json.dumps(result))
        second = main(["bench", "serve", "--url", server.url, *flags, "--baseline", str(saved)])

    assert (first, second) == (0, 7)
    assert "of the baseline" in capsys.readouterr().err
