"""What a story is told with."""

from __future__ import annotations

from dataclasses import dataclass, field

from trilithon._types import Timings, Usage, _Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class StoryFact(_Answer):
    """A fact that a sentence's prompt held, in words and in parts, with the cosine of its vector and the story's."""

    text: str = ""
    score: float = 0.0
    head: str = ""
    relation: str = ""
    tail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorySentence(_Answer):
    """
    One sentence and what it was written from.

    Attributes:
        index: from 1.
        keywords: what it is about.
        facts: that the prompt held, best first.
        logprob: of its tokens, summed; 0 of the first sentence, which was given.
        finish_reason: why it ended; empty of the first one.
        reused: whether it was there before.
        unknown_keywords: of which the server's concepts know nothing.
        unopposed_keywords: that have no opposite, and stayed.
    """

    index: int = 0
    text: str = ""
    keywords: tuple[str, ...] = ()
    facts: tuple[StoryFact, ...] = ()
    logprob: float = 0.0
    finish_reason: str = ""
    reused: bool = False
    unknown_keywords: tuple[str, ...] = ()
    unopposed_keywords: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoryStarted(_Answer):
    """The name of a story that is being written, and the seed that repeats it."""

    request_id: str = ""
    story_id: str = ""
    seed: int = 0
    model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Story(_Answer):
    """
    A story, all of it or as far as it is written.

    Attributes:
        story_id: names it on the server, for a day after it was last written.
        seed: repeats it.
        text: all sentences in one line.
        finish_reason: of the last sentence; time_limit where sentences are missing for that reason.
        model: the served model that wrote it.
    """

    story_id: str = ""
    seed: int = 0
    text: str = ""
    sentences: tuple[StorySentence, ...] = ()
    finish_reason: str = ""
    model: str = ""
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
