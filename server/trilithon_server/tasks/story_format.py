"""
A story, sentence by sentence: what the keyword predictor, the generator and the ranker read. No torch.

The story so far comes first and what belongs to the next sentence alone behind it, so that a server's cached prefix
grows with the story, and the generator finds cached what the predictor has read. The same functions pack what recipes
learn and what a server prompts with. Two realisations, named by the model's task file. `text` needs nothing of the
model:

    Story: Tom has a dog. The dog is big.
    Keywords: park, ball                        the predictor writes this line
    Knowledge: ball is used for play; park is near house
    Next sentence: They play in the park.       the generator this one

`tokens` needs special tokens in the vocabulary:

    <|story|>Tom has a dog. The dog is big.<|kw|>park<|sep|>ball<|know|>...<|sep|>...<|story|>They play ...

With `names: tags` the names of people in the story so far are tags, special tokens too (`knowledge/names.py`); a model
learns to write tags, and the server puts the names back.

Source: arXiv 2010.00840, but the generator is shown the keywords too, and knowledge stands behind the story.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.knowledge.names import TAGS, cut_at_names, names_of, with_names
from trilithon_server.tasks.pieces import Encoded
from trilithon_server.tasks.retrieval import Reads
from trilithon_server.tasks.task_file import Room, Size, TaskFile
from trilithon_server.tasks.writing import lead, literal, one_line, special

Markers = Literal["text", "tokens"]

STORY, KEYWORDS, KNOWLEDGE, SEPARATOR = "<|story|>", "<|kw|>", "<|know|>", "<|sep|>"
MAX_KEYWORDS = 3
"""That are predicted for a sentence."""
MAX_KEYWORD_WORDS = 3

GUIDE = """\
The next sentence of a story must contain all keywords.

Story: Sam lost his hat.
Keywords: dog, river
Next sentence: A dog found the hat by the river.

Story: It was late. Grandma looked at the clock.
Keywords: soup, kitchen
Knowledge: soup is at kitchen; soup is hot
Next sentence: She went to the kitchen to make some hot soup.

Story: Anna had a red kite. One day the wind was strong.
Keywords: tree
Next sentence: The kite flew into a tall tree.

Story: The king was sick. No doctor could help him.
Keywords: little girl, flower
Next sentence: Then a little girl brought him a flower.

"""
"""In front of the story, for a model that was not trained on stories."""


class NoRoom(ValueError):
    """A sequence does not fit even when all is left out that may be."""


@dataclass(frozen=True, slots=True)
class Packed:
    """
    A sequence.

    Attributes:
        tokens: of it; the answer, where one was given, comes last.
        answer: half-open range of tokens that the model is to write, with what ends them; empty at the end of a prompt.
        knowledge: how many of the facts given stand in it, the first ones.
        dropped: sentences of the story that found no room, the oldest ones; one that was cut is among them.
    """

    tokens: tuple[int, ...]
    answer: tuple[int, int]
    knowledge: int
    dropped: int


@dataclass(frozen=True)
class _Format(TaskFile):
    """
    What both formats of decoders share.

    Attributes:
        markers: `text`: labels in words. `tokens`: special tokens.
        guide: text in front of everything.
        max_story: tokens of the story so far, at most: its last whole sentences.
        names: `words`: as they are. `tags`: those that have a tag as their tag.
    """

    markers: Markers = "text"
    guide: str = ""
    max_story: Size = 256
    names: Literal["words", "tags"] = "words"
    written: ClassVar[tuple[str, ...]] = ()
    """Marks within an answer."""

    @classmethod
    def from_task_file(cls, document: Mapping[str, Any]) -> Self:
        """The format; a file that says nothing of names is of a model that reads them as words."""
        return super().from_task_file({"names": "words", **document})

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends an answer, beside the model's end token: in words it is a line."""
        return ("\n",) if self.markers == "text" else ()

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises: ValueError: the tokenizer lacks a special token."""
        for name in self._special():
            special(name, tokenizer)

    def drawing(self, story: Sequence[str], tokenizer: Tokenizer) -> dict[str, Any]:
        """
        Sampling parameters, by JSON name, under which a model writes tags of this story's names: nobody is called by
        another one, and no other special token is written. None where names are words.
        """
        if self.names == "words":
            return {}
        used = (*self.written, *names_of(story).values())
        allowed = {*tokenizer.eos_ids, *(special(name, tokenizer) for name in used)}
        banned = sorted(tokenizer.special_ids - allowed)
        return {"skip_special_tokens": False, "logit_bias": dict.fromkeys(banned, -100.0)}

    def with_names(self, text: str, story: Sequence[str]) -> str:
        """What a model wrote behind a story, with names in the place of their tags."""
        return with_names(text, names_of(story)) if self.names == "tags" else text

    def _special(self) -> tuple[str, ...]:
        """Special tokens that the tokenizer must have."""
        marks = (STORY, KEYWORDS, KNOWLEDGE, SEPARATOR) if self.markers == "tokens" else ()
        return (*marks, *TAGS) if self.names == "tags" else marks


@dataclass(frozen=True)
class KeywordFormat(_Format):
    """How the keyword predictor reads a story; part of a model's task file."""

    task: ClassVar[str] = "story_keywords"
    written: ClassVar[tuple[str, ...]] = (SEPARATOR,)

    def pack(
        self, story: Sequence[str], tokenizer: Tokenizer, *, keywords: Sequence[str] = (), room: int | None = None
    ) -> Packed:
        """
        One sequence: the story so far, then the place for keywords.

        Args:
            story: sentences, at least one.
            keywords: of the next sentence, to learn them; none: a prompt.
            room: tokens at most; None: as many as the story may have.
        Raises:
            NoRoom: the room does not hold the story's last token.
            ValueError: the tokenizer lacks a special token.
        """
        writer = _Writer(self, tokenizer, story)
        opening = writer.opening(KEYWORDS)
        answer = writer.keywords(keywords, ends=True) if keywords else []
        told, dropped = writer.story(story, room, beside=len(opening) + len(answer))
        return _packed([*told, *opening], answer, knowledge=0, dropped=dropped)

    def read(self, text: str) -> list[str]:
        """
        Keywords that a model wrote, the first few, each once.

        >>> KeywordFormat().read(" Park, the ball, park, , a very long walk home")
        ['park', 'the ball', 'long walk home']
        """
        parts = text.split("," if self.markers == "text" else SEPARATOR)
        words = (" ".join(one_line(part).lower().strip(" .;:!?\"'").split(" ")[-MAX_KEYWORD_WORDS:]) for part in parts)
        return list(dict.fromkeys(word for word in words if word))[:MAX_KEYWORDS]


@dataclass(frozen=True)
class SentenceFormat(_Format):
    """
    How the generator reads a story; part of a model's task file.

    Attributes:
        max_knowledge: tokens of all facts, at most; each is taken or left whole.
        with_keywords: whether it is shown the keywords, and not only what is known of them.
    """

    task: ClassVar[str] = "story_generator"

    max_knowledge: Room = 128
    with_keywords: bool = True

    def pack(
        self,
        story: Sequence[str],
        tokenizer: Tokenizer,
        *,
        keywords: Sequence[str] = (),
        knowledge: Sequence[str] = (),
        answer: str = "",
        room: int | None = None,
    ) -> Packed:
        """
        One sequence: the story so far, keywords, knowledge, then the place for the next sentence.

        Args:
            story: sentences, at least one.
            knowledge: facts, best first; where one finds no room, those behind it are left out too.
            answer: the next sentence, to learn it; empty: a prompt.
            room: tokens at most; None: as many as the parts may have. Where it is too small the knowledge gives way
                first, then the story's oldest sentences; keywords stay.
        Raises:
            NoRoom: the room does not hold the story's last token.
            ValueError: the tokenizer lacks a special token.
        """
        writer = _Writer(self, tokenizer, story)
        shown = keywords if self.with_keywords else ()
        words = [*writer.opening(KEYWORDS), *writer.keywords(shown)] if shown else []
        opening = writer.opening(STORY)
        said = writer.sentence(answer) if answer else []
        fixed = len(words) + len(opening) + len(said)
        told, dropped = writer.story(story, room, beside=fixed)
        left = self.max_knowledge if room is None else min(self.max_knowledge, room - fixed - len(told))
        facts, count = writer.knowledge(knowledge, left)
        return _packed([*told, *words, *facts, *opening], said, knowledge=count, dropped=dropped)


@dataclass(frozen=True)
class RankerFormat(TaskFile):
    """
    How the ranker, an encoder of vectors, reads a story and a fact; part of a model's task file.

    A fact goes with a story where the cosine of their vectors is high: a story asks, and facts are its passages.

    Attributes:
        max_story: tokens of the story so far, special tokens included: its last ones.
        max_fact: tokens of a fact, special tokens included: its first ones.
        with_keywords: whether a story asks with the keywords of its next sentence behind it.
        reads, passages_by: as of a `RetrievalFormat`.
    """

    task: ClassVar[str] = "story_ranker"
    added: ClassVar[tuple[str, ...]] = ("reads", "passages_by")

    max_story: Annotated[int, Field(ge=3)] = 128
    max_fact: Annotated[int, Field(ge=3)] = 64
    with_keywords: bool = True
    reads: Reads = "both"
    passages_by: str = ""

    def story(self, story: Sequence[str], tokenizer: Tokenizer, *, keywords: Sequence[str] = ()) -> Encoded:
        """The story so far, and what its next sentence is to be about, as a last sentence of its own."""
        first, last = tokenizer.encode("", add_special_tokens=True)
        about = [f"{', '.join(keywords)}."] if keywords and self.with_keywords else []
        ids = literal(" ".join(map(one_line, [*story, *about])), tokenizer)
        return Encoded((first, *ids[-(self.max_story - 2) :], last))

    def fact(self, text: str, tokenizer: Tokenizer) -> Encoded:
        """A fact in words."""
        first, last = tokenizer.encode("", add_special_tokens=True)
        return Encoded((first, *literal(one_line(text), tokenizer)[: self.max_fact - 2], last))


StoryFormat = KeywordFormat | SentenceFormat | RankerFormat


class _Writer:
    """The parts of a story as tokens."""

    def __init__(self, format: _Format, tokenizer: Tokenizer, story: Sequence[str]) -> None:
        self._format, self._tokenizer = format, tokenizer
        self._in_words = format.markers == "text"
        self._names = names_of(story) if format.names == "tags" else {}

    def opening(self, part: str) -> list[int]:
        """Where a part begins."""
        return self._plain(_LABELS[part]) if self._in_words else [special(part, self._tokenizer)]

    def story(self, story: Sequence[str], room: int | None, *, beside: int) -> tuple[list[int], int]:
        """The last sentences that fit beside so many tokens, behind the guide; and how many do not."""
        head = [*lead(self._tokenizer), *self._plain(self._format.guide)]
        head += self._plain("Story:") if self._in_words else [special(STORY, self._tokenizer)]
        end = self._plain("\n") if self._in_words else []
        most = self._format.max_story
        left = most if room is None else min(most, room - beside - len(head) - len(end))
        kept: list[list[int]] = []
        for sentence in reversed(story):
            tokens = self._told(f" {one_line(sentence)}")
            if len(tokens) > left:
                break
            kept.append(tokens)
            left -= len(tokens)
        dropped = len(story) - len(kept)
        if not kept:
            last = self._told(f" {one_line(story[-1])}")
            if left < 1:
                raise NoRoom(f"its last sentence has {len(last)} tokens, and there is room for none of them.")
            kept = [last[-left:]]
        return [*head, *(token for tokens in kept[::-1] for token in tokens), *end], dropped

    def keywords(self, keywords: Sequence[str], *, ends: bool = False) -> list[int]:
        """A line of keywords, or keywords with separators, and an end where the answer has one."""
        words = [one_line(word) for word in keywords]
        if self._in_words:
            return self._told(f" {', '.join(words)}\n", any_case=True)
        parts = [self._told(word, any_case=True) for word in words]
        return [*self._separated(parts), *(self._end() if ends else [])]

    def sentence(self, text: str) -> list[int]:
        """The next sentence, and its end."""
        if self._in_words:
            return self._told(f" {one_line(text)}\n")
        return [*self._told(f" {one_line(text)}"), *self._end()]

    def knowledge(self, facts: Sequence[str], room: int) -> tuple[list[int], int]:
        """The first facts that fit, and how many they are; nothing for none."""
        opening, end = self.opening(KNOWLEDGE), self._plain("\n") if self._in_words else []
        kept: list[list[int]] = []
        left = room - len(opening) - len(end)
        for fact in facts:
            between = (";" if kept else "") if self._in_words else ""
            tokens = self._plain(f"{between} {one_line(fact)}" if self._in_words else one_line(fact))
            left -= len(tokens) + (not self._in_words and bool(kept))
            if left < 0:
                break
            kept.append(tokens)
        if not kept:
            return [], 0
        body = [token for tokens in kept for token in tokens] if self._in_words else self._separated(kept)
        return [*opening, *body, *end], len(kept)

    def _separated(self, parts: Sequence[Sequence[int]]) -> list[int]:
        between = special(SEPARATOR, self._tokenizer)
        return [token for i, part in enumerate(parts) for token in ([between] if i else []) + list(part)]

    def _end(self) -> list[int]:
        return [self._tokenizer.eos_ids[0]]

    def _told(self, text: str, *, any_case: bool = False) -> list[int]:
        """A text of the story, with its names as tags where the format has them so."""
        ids: list[int] = []
        for part, tag in cut_at_names(text, self._names, any_case=any_case):
            ids += [special(tag, self._tokenizer)] if tag else self._plain(part)
        return ids

    def _plain(self, text: str) -> list[int]:
        return literal(text, self._tokenizer) if text else []


_LABELS = {KEYWORDS: "Keywords:", KNOWLEDGE: "Knowledge:", STORY: "Next sentence:"}


def _packed(prompt: list[int], answer: list[int], *, knowledge: int, dropped: int) -> Packed:
    tokens = (*prompt, *answer)
    return Packed(tokens, (len(prompt), len(tokens)), knowledge, dropped)
