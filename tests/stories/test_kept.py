"""What is kept of a story while it is told: which telling may write there, one sentence after the other."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from trilithon_server.assembly import FinishReason
from trilithon_server.recent import Recent
from trilithon_server.story_requests import Asked, Sentence, Story
from trilithon_server.story_telling import Telling

STORY = Story(
    id="story_1",
    model="writer",
    seed=1,
    asked=Asked(first_sentence="It was late.", sentences=3),
    values={},
    knowledge_k=0,
    sentences=(Sentence(index=1, text="It was late."),),
)


class Teller(Telling):
    """It writes one word and the number of a sentence."""

    def __init__(self, kept: Recent[Story], story: Story, *, word: str, is_new: bool) -> None:
        service: Any = SimpleNamespace(stories=kept)
        call: Any = SimpleNamespace(principal=SimpleNamespace(tenant="alice"))
        nobody: Any = None
        super().__init__(service, call, nobody, story, known={}, values={}, is_new=is_new)
        self._word = word

    async def _next(self) -> Sentence:
        index = len(self.story.sentences) + 1
        text = f"{self._word} {index}." if self._word else ""
        return Sentence(index=index, text=text, finish=FinishReason.EOS_TOKEN)


def shelf() -> Recent[Story]:
    return Recent[Story](most=8, kept_s=60.0)


def text_of(kept: Recent[Story]) -> str | None:
    story = kept.get("alice", STORY.id)
    return None if story is None else story.text


async def told(sentences: AsyncGenerator[tuple[Sentence, bool], None], count: int = 99) -> None:
    """Read so many sentences."""
    while count and await anext(sentences, None) is not None:
        count -= 1


async def test_a_story_is_kept_with_every_sentence() -> None:
    """The first one, which was given, too: a story that ends at once can be written again."""
    kept = shelf()
    sentences = Teller(kept, STORY, word="Old", is_new=True).sentences()
    seen = []
    for _ in range(4):
        await told(sentences, 1)
        seen.append(text_of(kept))

    assert seen == [
        "It was late.",
        "It was late. Old 2.",
        "It was late. Old 2. Old 3.",
        "It was late. Old 2. Old 3. Old 4.",
    ]


async def test_a_rewrite_takes_the_place_with_its_first_sentence() -> None:
    """Until then the whole story is there, and one that has nothing to tell leaves it there."""
    kept = shelf()
    await told(Teller(kept, STORY, word="Old", is_new=True).sentences())
    before = text_of(kept)
    await told(Teller(kept, STORY, word="", is_new=False).sentences())
    sentences = Teller(kept, STORY, word="New", is_new=False).sentences()
    await told(sentences, 1)

    assert text_of(kept) == before
    await told(sentences, 1)
    assert text_of(kept) == "It was late. New 2."


async def test_what_was_deleted_while_it_was_told_does_not_come_back() -> None:
    """Neither by the telling of a new story nor by a rewrite, whether it has written a sentence or not."""
    for is_new, count in ((True, 1), (True, 2), (False, 1), (False, 2)):
        kept = shelf()
        kept.put("alice", STORY.id, replace(STORY))
        sentences = Teller(kept, STORY, word="New", is_new=is_new).sentences()
        await told(sentences, count)
        assert kept.delete("alice", STORY.id)
        await told(sentences)
        assert text_of(kept) is None


async def test_a_telling_does_not_write_over_a_later_rewrite() -> None:
    """Both are told to their ends; kept is the one that took the other's place, whole."""
    kept = shelf()
    first = Teller(kept, STORY, word="Old", is_new=True)
    sentences = first.sentences()
    await told(sentences, 2)
    rewritten = Teller(kept, STORY, word="New", is_new=False).sentences()
    await told(rewritten, 2)
    await told(sentences, 1)
    await told(rewritten)
    await told(sentences)

    assert first.story.text == "It was late. Old 2. Old 3. Old 4."
    assert text_of(kept) == "It was late. New 2. New 3. New 4."
