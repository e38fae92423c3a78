"""Stories by keywords and knowledge: `client.stories` of both clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack, overload

from trilithon._dialogue_types import Nothing
from trilithon._parameters import CallOptions, TaskOptions
from trilithon._requests import check_names, given, plain, task
from trilithon._story_types import Story, StorySentence, StoryStarted
from trilithon._task_streams import AsyncTaskStream, Kinds, TaskStream
from trilithon._transport import DELETE_STORY, GET_STORY, REWRITE_STORY, TELL_STORY

if TYPE_CHECKING:
    from trilithon._async_client import AsyncClient
    from trilithon._client import Client


class _ControlRequired(TypedDict):
    index: int


class SentenceControl(_ControlRequired, total=False):
    """
    What the `index`-th sentence, from 2, is to be about.

    keywords: words or phrases, at most 8.
    mode: `replace`: in the place of predicted ones [the default]. `append`: before them. `antonym`: the opposites of
        these, or of those that the sentence would have had where none are given.
    """

    keywords: Sequence[str]
    mode: Literal["replace", "append", "antonym"]


class RewriteOptions(CallOptions, total=False):
    """What a rewrite takes; a story keeps how its texts are drawn. Names and ranges as in `TaskOptions`."""

    priority: int
    time_limit_ms: int
    queue_timeout_ms: int
    bypass_cache: bool
    cache_salt: str


REWRITE_OPTIONS = frozenset(CallOptions.__annotations__) | frozenset(RewriteOptions.__annotations__)

EVENTS: Kinds = {"started": StoryStarted, "sentence": StorySentence}

StoryStream = TaskStream[StoryStarted | StorySentence, Story]
"""What names the story, then its sentences as they are written."""
AsyncStoryStream = AsyncTaskStream[StoryStarted | StorySentence, Story]
"""What names the story, then its sentences as they are written."""


class Stories:
    """Stories sentence by sentence, by keywords and knowledge; reached as `client.stories`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @overload
    def generate(
        self,
        first_sentence: str,
        *,
        stream: Literal[False] = False,
        sentences: int | None = None,
        controls: Sequence[SentenceControl] | None = None,
        knowledge_k: int | None = None,
        kb: str | None = None,
        keyword_model: str | None = None,
        ranker: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> Story: ...
    @overload
    def generate(
        self,
        first_sentence: str,
        *,
        stream: Literal[True],
        sentences: int | None = None,
        controls: Sequence[SentenceControl] | None = None,
        knowledge_k: int | None = None,
        kb: str | None = None,
        keyword_model: str | None = None,
        ranker: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> StoryStream: ...
    def generate(
        self,
        first_sentence: str,
        *,
        stream: bool = False,
        sentences: int | None = None,
        controls: Sequence[SentenceControl] | None = None,
        knowledge_k: int | None = None,
        kb: str | None = None,
        keyword_model: str | None = None,
        ranker: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> Story | StoryStream:
        """
        Tell a story from its first sentence.

        Args:
            stream: return the sentences as they are written; its `result` is the story.
            sentences: to be written beside the first, 1 to 32. Default: 4.
            controls: what sentences are to be about, at most one of each.
            knowledge_k: facts of a sentence at most, 0 to 50. Default: 3 where the server has any.
            kb: name of the server's concepts. Default: those that it has.
            keyword_model: predicts keywords. Default: one that was trained to, else the base of the one that writes.
            ranker: ranks facts. Default: one that was trained to, else the first encoder.
            options: see `TaskOptions`; of one sentence.
        """
        fields = {
            "first_sentence": first_sentence,
            "sentences": sentences,
            "controls": None if controls is None else [dict(control) for control in controls],
            "knowledge_k": knowledge_k,
            "kb": kb,
            "keyword_model": keyword_model,
            "ranker": ranker,
        }
        told = self._client._stream(TELL_STORY, task("generate", fields, options), options, EVENTS, Story)
        return told if stream else whole_story(told)

    @overload
    def rewrite(
        self,
        story_id: str,
        control: SentenceControl,
        *,
        stream: Literal[False] = False,
        **options: Unpack[RewriteOptions],
    ) -> Story: ...
    @overload
    def rewrite(
        self, story_id: str, control: SentenceControl, *, stream: Literal[True], **options: Unpack[RewriteOptions]
    ) -> StoryStream: ...
    def rewrite(
        self, story_id: str, control: SentenceControl, *, stream: bool = False, **options: Unpack[RewriteOptions]
    ) -> Story | StoryStream:
        """
        Tell a story again from one sentence on; those before it stay as they are.

        Args:
            control: of a sentence that was written, or of the next one.
            stream: return the sentences as they are written, those that stay first; its `result` is the story.
            options: see `RewriteOptions`.
        """
        check_names("rewrite", options, REWRITE_OPTIONS)
        fields = {"story_id": story_id, "control": dict(control), **options}
        told = self._client._stream(REWRITE_STORY, given(fields), options, EVENTS, Story)
        return told if stream else whole_story(told)

    def get(self, story_id: str, **options: Unpack[CallOptions]) -> Story:
        """A story as far as it is written."""
        fields = plain("get", {"story_id": story_id}, options)
        return self._client._call(GET_STORY, fields, options, Story)

    def delete(self, story_id: str, **options: Unpack[CallOptions]) -> None:
        """Forget a story."""
        fields = plain("delete", {"story_id": story_id}, options)
        self._client._call(DELETE_STORY, fields, options, Nothing)


class AsyncStories:
    """Stories sentence by sentence, by keywords and knowledge; reached as `client.stories`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @overload
    async def generate(
        self,
        first_sentence: str,
        *,
        stream: Literal[False] = False,
        sentences: int | None = None,
        controls: Sequence[SentenceControl] | None = None,
        knowledge_k: int | None = None,
        kb: str | None = None,
        keyword_model: str | None = None,
        ranker: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> Story: ...
    @overload
    async def generate(
        self,
        first_sentence: str,
        *,
        stream: Literal[True],
        sentences: int | None = None,
        controls: Sequence[SentenceControl] | None = None,
        knowledge_k: int | None = None,
        kb: str | None = None,
        keyword_model: str | None = None,
        ranker: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> AsyncStoryStream: ...
    async def generate(
        self,
        first_sentence: str,
        *,
        stream: bool = False,
        sentences: int | None = None,
        controls: Sequence[SentenceControl] | None = None,
        knowledge_k: int | None = None,
        kb: str | None = None,
        keyword_model: str | None = None,
        ranker: str | None = None,
        **options: Unpack[TaskOptions],
    ) -> Story | AsyncStoryStream:
        """
        Tell a story from its first sentence.

        Args:
            stream: return the sentences as they are written; its `result` is the story.
            sentences: to be written beside the first, 1 to 32. Default: 4.
            controls: what sentences are to be about, at most one of each.
            knowledge_k: facts of a sentence at most, 0 to 50. Default: 3 where the server has any.
            kb: name of the server's concepts. Default: those that it has.
            keyword_model: predicts keywords. Default: one that was trained to, else the base of the one that writes.
            ranker: ranks facts. Default: one that was trained to, else the first encoder.
            options: see `TaskOptions`; of one sentence.
        """
        fields = {
            "first_sentence": first_sentence,
            "sentences": sentences,
            "controls": None if controls is None else [dict(control) for control in controls],
            "knowledge_k": knowledge_k,
            "kb": kb,
            "keyword_model": keyword_model,
            "ranker": ranker,
        }
        told = await self._client._stream(TELL_STORY, task("generate", fields, options), options, EVENTS, Story)
        return told if stream else await whole_story_of_loop(told)

    @overload
    async def rewrite(
        self,
        story_id: str,
        control: SentenceControl,
        *,
        stream: Literal[False] = False,
        **options: Unpack[RewriteOptions],
    ) -> Story: ...
    @overload
    async def rewrite(
        self, story_id: str, control: SentenceControl, *, stream: Literal[True], **options: Unpack[RewriteOptions]
    ) -> AsyncStoryStream: ...
    async def rewrite(
        self, story_id: str, control: SentenceControl, *, stream: bool = False, **options: Unpack[RewriteOptions]
    ) -> Story | AsyncStoryStream:
        """
        Tell a story again from one sentence on; those before it stay as they are.

        Args:
            control: of a sentence that was written, or of the next one.
            stream: return the sentences as they are written, those that stay first; its `result` is the story.
            options: see `RewriteOptions`.
        """
        check_names("rewrite", options, REWRITE_OPTIONS)
        fields = {"story_id": story_id, "control": dict(control), **options}
        told = await self._client._stream(REWRITE_STORY, given(fields), options, EVENTS, Story)
        return told if stream else await whole_story_of_loop(told)

    async def get(self, story_id: str, **options: Unpack[CallOptions]) -> Story:
        """A story as far as it is written."""
        fields = plain("get", {"story_id": story_id}, options)
        return await self._client._call(GET_STORY, fields, options, Story)

    async def delete(self, story_id: str, **options: Unpack[CallOptions]) -> None:
        """Forget a story."""
        fields = plain("delete", {"story_id": story_id}, options)
        await self._client._call(DELETE_STORY, fields, options, Nothing)


def whole_story(stream: StoryStream) -> Story:
    """Read to the end."""
    for _ in stream:
        pass
    assert stream.result is not None  # it has ended
    return stream.result


async def whole_story_of_loop(stream: AsyncStoryStream) -> Story:
    """Read to the end."""
    async for _ in stream:
        pass
    assert stream.result is not None
    return stream.result
