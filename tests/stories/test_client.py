"""`client.stories` against a real server: both protocols, threads and event loops, whole and as it comes."""

from __future__ import annotations

from typing import Any

import pytest
from served import Server

from trilithon import (
    AsyncClient,
    Client,
    InvalidArgument,
    NotFound,
    SentenceControl,
    Story,
    StorySentence,
    StoryStarted,
    TaskOptions,
    TrilithonError,
)

FIRST = "The old miller had a dog."
CONTROLS: list[SentenceControl] = [{"index": 3, "keywords": ["boat"]}]
DRAWN: TaskOptions = {"model": "writer", "seed": 5, "max_tokens": 12}


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest, server: Server) -> str:
    """The server by either protocol."""
    return server.url if request.param == "http" else server.grpc_target


def told(story: Story) -> tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]:
    """What a story's sentences say, are about, and know."""
    return tuple((one.text, one.keywords, tuple(fact.text for fact in one.facts)) for one in story.sentences)


async def test_E3_stories_are_one_by_every_way(url: str) -> None:
    """Whole, as it comes, from a thread and from a loop: the same sentences about the same keywords."""
    with Client(url) as client:
        whole = client.stories.generate(FIRST, controls=CONTROLS, knowledge_k=2, **DRAWN)
        with client.stories.generate(FIRST, controls=CONTROLS, knowledge_k=2, stream=True, **DRAWN) as stream:
            events = list(stream)
    async with AsyncClient(url) as twin:
        other = await twin.stories.generate(FIRST, controls=CONTROLS, knowledge_k=2, **DRAWN)
        stream_of_loop = await twin.stories.generate(FIRST, controls=CONTROLS, knowledge_k=2, stream=True, **DRAWN)
        events_of_loop = [event async for event in stream_of_loop]

    assert told(whole) == told(other)
    assert isinstance(events[0], StoryStarted)
    assert events[0].seed == whole.seed == 5
    sentences = tuple(event for event in events if isinstance(event, StorySentence))
    assert sentences == tuple(event for event in events_of_loop if isinstance(event, StorySentence)) == whole.sentences
    assert stream.result is not None
    assert stream_of_loop.result is not None
    assert told(stream.result) == told(stream_of_loop.result) == told(whole)
    assert whole.sentences[2].keywords == ("boat",)
    assert len(whole.sentences[2].facts) == 2
    assert whole.text.startswith(f"{FIRST} ")
    assert whole.usage.cached_tokens > 0
    assert whole.finish_reason == whole.sentences[-1].finish_reason != ""


def test_E3_scores_of_facts_are_one_by_both_protocols(server: Server) -> None:
    """To the last bit, as everything else of a sentence is. Seen to fail with HTTP's scores left in 64 bits."""
    told = []
    for address in (server.url, server.grpc_target):
        with Client(address) as client:
            story = client.stories.generate(FIRST, controls=CONTROLS, knowledge_k=2, **DRAWN)
        told.append(story.sentences)

    assert told[0] == told[1]
    assert len(told[0][2].facts) == 2


async def test_a_story_is_rewritten_read_and_forgotten(url: str) -> None:
    """Only what comes behind the changed sentence is new; the server keeps the last telling until it is deleted."""
    with Client(url) as client:
        story = client.stories.generate(FIRST, sentences=2, **DRAWN)
        again = client.stories.rewrite(story.story_id, {"index": 3, "keywords": ["lamp"]}, time_limit_ms=60_000)
        with client.stories.rewrite(story.story_id, {"index": 3, "keywords": ["lamp"]}, stream=True) as stream:
            events = list(stream)
        kept = client.stories.get(story.story_id)
    async with AsyncClient(url) as twin:
        same = await twin.stories.rewrite(story.story_id, {"index": 3, "keywords": ["lamp"]})
        assert told(await twin.stories.get(story.story_id)) == told(same)
        await twin.stories.delete(story.story_id)
        with pytest.raises(NotFound) as gone:
            await twin.stories.rewrite(story.story_id, {"index": 2, "keywords": ["dog"]}, stream=True)

    assert [one.reused for one in again.sentences] == [True, True, False]
    assert told(again)[:2] == told(story)[:2]
    assert told(again) == told(kept) == told(same)
    assert again.sentences[2].keywords == ("lamp",)
    assert tuple(event for event in events if isinstance(event, StorySentence)) == again.sentences
    assert gone.value.code == "story_not_found"


async def test_refusals_come_before_the_first_event(url: str) -> None:
    """Of a stream as of a whole story; a name that no story takes is no request at all."""
    with Client(url) as client:
        for stream in (False, True):
            with pytest.raises(InvalidArgument, match="first_sentence"):
                client.stories.generate(" ", stream=stream, **DRAWN)  # type: ignore[call-overload]  # either of the two
        with pytest.raises(TypeError, match="max_tokens"):
            client.stories.generate(FIRST, max_token=3)  # type: ignore[call-overload]  # misspelt on purpose
        with pytest.raises(TypeError, match="seed"):
            client.stories.rewrite("x", CONTROLS[0], seed=3)  # type: ignore[call-overload]  # a story keeps its own
        with pytest.raises(InvalidArgument, match="mode"):
            client.stories.generate(FIRST, controls=[{"index": 2, "mode": "swap"}], **DRAWN)  # type: ignore[typeddict-item]  # not one
    async with AsyncClient(url) as twin:
        with pytest.raises(InvalidArgument, match="first_sentence"):
            await twin.stories.generate(" ", stream=True, **DRAWN)


def test_R11_a_keyword_that_no_concept_stands_for_is_told(url: str) -> None:
    """It is no error: the sentence is about it, without facts of it, as whole stories and streams tell."""
    controls: list[SentenceControl] = [{"index": 2, "keywords": ["quark", "dog"]}]
    with Client(url) as client:
        story = client.stories.generate(FIRST, sentences=1, controls=controls, **DRAWN)
        with client.stories.generate(FIRST, sentences=1, controls=controls, stream=True, **DRAWN) as stream:
            streamed = [event for event in stream if isinstance(event, StorySentence)]

    for sentence in (story.sentences[1], streamed[1]):
        assert sentence.keywords == ("quark", "dog")
        assert sentence.unknown_keywords == ("quark",)
        assert {fact.head for fact in sentence.facts} == {"dog"}


@pytest.mark.parametrize(
    ("asked", "code", "field"),
    [
        ({"controls": [{"index": 2, "keywords": ["a"]}] * 2}, "invalid_value", "controls[1].index"),
        (
            {"controls": [{"index": 2, "mode": "antonym"}, {"index": 2, "keywords": ["a"]}]},
            "invalid_value",
            "controls[1].index",
        ),
        ({"controls": [{"index": 1, "keywords": ["a"]}]}, "invalid_value", "controls[0].index"),
        ({"controls": [{"index": 6, "keywords": ["a"]}]}, "invalid_value", "controls[0].index"),
        ({"controls": [{"index": 2}]}, "missing_parameter", "controls[0].keywords"),
        ({"controls": [{"index": 2, "mode": "append"}]}, "missing_parameter", "controls[0].keywords"),
        ({"controls": [{"index": 2, "keywords": ["a, b"]}]}, "invalid_value", "controls[0].keywords[0]"),
        ({"controls": [{"index": 2, "keywords": ["a"] * 9}]}, "invalid_value", "controls[0].keywords"),
        ({"sentences": 33}, "invalid_value", "sentences"),
        ({"knowledge_k": 51}, "invalid_value", "knowledge_k"),
        ({"kb": "town"}, "knowledge_not_found", None),
        ({"ranker": "writer"}, "unsupported_model", None),
        ({"keyword_model": "nobody"}, "model_not_found", None),
    ],
)
def test_R11_a_refusal_is_the_same_by_either_protocol(
    url: str, asked: dict[str, Any], code: str, field: str | None
) -> None:
    """The same code for the same field, of a story and of a stream."""
    with Client(url) as client:
        for stream in (False, True):
            with pytest.raises(TrilithonError) as refused:
                client.stories.generate(FIRST, stream=stream, **asked, **DRAWN)
            assert (refused.value.code, refused.value.param) == (code, field)


@pytest.mark.parametrize(
    ("control", "code", "field"),
    [
        ({"index": 7, "keywords": ["a"]}, "invalid_value", "control.index"),
        ({"index": 1, "keywords": ["a"]}, "invalid_value", "control.index"),
        ({"index": 3}, "missing_parameter", "control.keywords"),
    ],
)
def test_R11_a_rewrite_that_contradicts_its_story_is_refused(
    url: str, control: SentenceControl, code: str, field: str
) -> None:
    """Of a call and of a stream, and the story stays as it was."""
    with Client(url) as client:
        story = client.stories.generate(FIRST, sentences=3, **DRAWN)
        for stream in (False, True):
            with pytest.raises(InvalidArgument) as refused:
                client.stories.rewrite(story.story_id, control, stream=stream)  # type: ignore[call-overload]  # either
            assert (refused.value.code, refused.value.param) == (code, field)
        assert told(client.stories.get(story.story_id)) == told(story)
