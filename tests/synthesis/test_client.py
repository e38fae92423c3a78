"""`client.synth_qa` against a real server: both protocols, threads and event loops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from synthesis.synthesizing import PASSAGES, Asked, parts, serving_parts, triples

from trilithon import (
    AsyncClient,
    Client,
    InvalidArgument,
    SynthQAPassage,
    SynthQAPassageDone,
    SynthQAStarted,
    SynthQATriple,
)

TEXTS: list[SynthQAPassage] = [SynthQAPassage(id=item["id"], text=item["text"]) for item in PASSAGES[:3]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    with serving_parts(*parts(Path(tmp_path_factory.mktemp("parts")))) as asked:
        yield asked


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest, served: Asked) -> str:
    """The server by either protocol."""
    return served.server.url if request.param == "http" else served.server.grpc_target


async def test_E3_triples_are_one_by_every_way(url: str, served: Asked) -> None:
    """From a thread and from a loop, by both protocols: what the plain route tells."""
    plain = triples(served.ask(passages=PASSAGES[:3], answers_per_passage=3, filter="single"))
    with Client(url) as client, client.synth_qa(TEXTS, answers_per_passage=3, filter="single", seed=7) as stream:
        events = list(stream)
    async with AsyncClient(url) as twin:
        stream_of_loop = await twin.synth_qa(TEXTS, answers_per_passage=3, filter="single", seed=7)
        events_of_loop = [event async for event in stream_of_loop]
    found = [event for event in events if isinstance(event, SynthQATriple)]
    ends = [event for event in events if isinstance(event, SynthQAPassageDone)]

    assert isinstance(events[0], SynthQAStarted)
    assert (events[0].seed, events[0].proposed_by, events[0].reader_model) == (7, "proposer", "reader")
    assert events[1:] == events_of_loop[1:]
    assert [(item.question, item.answer, item.answer_start, item.kept, item.reason) for item in found] == [
        (item["question"], item["answer"], item["answer_start"], item["kept"], item["reason"]) for item in plain
    ]
    assert [end.passage_id for end in ends] == [item["id"] for item in TEXTS]
    assert stream.result is not None
    assert stream_of_loop.result is not None
    assert stream.result.usage.generated_tokens == stream_of_loop.result.usage.generated_tokens > 0
    assert stream.result.kept == sum(item.kept for item in found)
    assert sum(stream.result.dropped.values()) == stream.result.triples - stream.result.kept > 0
    assert stream.result.finish_reason == ""


async def test_refusals_come_before_the_first_event(url: str) -> None:
    """What the server refuses, and what no call takes, is an error at once."""
    with Client(url) as client:
        with pytest.raises(InvalidArgument, match="passages"):
            client.synth_qa([])
        with pytest.raises(TypeError, match="max_tokens"):
            client.synth_qa(TEXTS, max_tokens=3)  # type: ignore[call-arg]  # a question ends by itself
    async with AsyncClient(url) as twin:
        with pytest.raises(InvalidArgument, match="synth-qa"):
            await twin.synth_qa([SynthQAPassage(id=str(n), text="a") for n in range(65)])
