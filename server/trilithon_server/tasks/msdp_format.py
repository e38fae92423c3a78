"""
A conversation's next turn by prompting alone, in two steps: any model that generates text can do it. No torch.

First it writes what is known, from the examples that are most like this conversation, the most similar one last:

    ( When did tea come to Europe? ) Tea => The first tea came to Europe in 1610.
    ( Who drank it first? ) Tea =>

then the turn, from examples that are always the same, so that they stay in the prefix cache:

    Topic: Tea. User says: Who drank it first? We know that: Dutch merchants did. System replies: The Dutch, it seems.
    Topic: Tea. User says: Was it dear? We know that: A pound cost a month's pay. System replies:

Examples are JSON lines beside the model. Each serves the first step, and those with a `reply` the second one:

    {"topic": "Tea", "turns": ["I like tea.", "When did it come to Europe?"], "knowledge": "...", "reply": "..."}

Source: multi-stage dialogue prompting, arXiv 2203.08745; every line of a prompt ends with a space, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.knowledge.tfidf import TermCounts
from trilithon_server.tasks import writing
from trilithon_server.tasks.dialogue_format import Conversation, Dropped, NoRoomError, Packed
from trilithon_server.tasks.task_file import Size, TaskFile

LAST_TURNS = 3
"""Of a conversation: by them and its topic examples are found."""
MAX_EXAMPLES = 10_000

Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Example(BaseModel):
    """A row of an examples' file; the last of `turns` is what was answered."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    topic: Words
    turns: tuple[Words, ...]
    knowledge: Words
    reply: str = ""


@dataclass(frozen=True)
class MsdpFile(TaskFile):
    """
    What a task file says of it.

    Attributes:
        msdp: tells it from the file of a model that was trained on dialogues.
        examples: name of a file in the same directory.
        knowledge_examples, reply_examples: of a prompt of each step, at most.
        knowledge_tokens: that the first step writes at most.
    """

    task: ClassVar[str] = "dialogue"

    msdp: Literal[True]
    examples: str
    knowledge_examples: Size = 10
    reply_examples: Size = 20
    knowledge_tokens: Size = 64

    def beside(self, directory: Path) -> MsdpFormat:
        """
        The format, its examples read.

        Raises:
            ValueError: the file is not there, or a line of it is no example.
        """
        if not self.examples or self.examples != Path(self.examples).name:
            raise ValueError(f"examples must be the name of a file beside it. Given: {self.examples!r}")
        found = read_examples(directory / self.examples)
        return MsdpFormat(self, found, tuple(one for one in found if one.reply.strip())[: self.reply_examples])


def read_examples(path: Path) -> tuple[Example, ...]:
    """
    The examples of a file, at least one of them with a reply.

    Raises:
        ValueError: with the line and what is wrong with it.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"examples {path.name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"examples {path.name} must be UTF-8 text") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            example = Example.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            given = f" Given: {first['input']!r:.64}" if where else ""
            raise ValueError(f"examples {path.name}:{number} {where}: {first['msg']}.{given}") from None
        if not example.turns:
            raise ValueError(f"examples {path.name}:{number} turns must hold at least one turn. Given: []")
        found.append(example)
    if not 1 <= len(found) <= MAX_EXAMPLES:
        raise ValueError(f"examples {path.name} must hold from 1 to {MAX_EXAMPLES} examples. Given: {len(found)}")
    if not any(example.reply.strip() for example in found):
        raise ValueError(f"examples {path.name} must hold at least one example with a reply")
    return tuple(found)


@dataclass(frozen=True)
class MsdpFormat:
    """
    The prompts of both steps.

    Attributes:
        examples: of the first step. replies: of the second one, in the order in which they stand there.
    """

    markers: ClassVar[Literal["text"]] = "text"

    file: MsdpFile
    examples: tuple[Example, ...]
    replies: tuple[Example, ...]

    def similar(self, topic: str, conversation: Conversation) -> list[Example]:
        """Examples by the cosine of topic and last turns, the most similar last; of equal ones the earlier is later."""
        asked = _looked_up(topic, [turn.text for turn in conversation])
        vectors = self._terms.weighted([asked], counted=False)
        scores_N = vectors.products(vectors.context[0])
        best = np.argsort(-scores_N, kind="stable")[: self.file.knowledge_examples]
        return [self.examples[i] for i in reversed(best.tolist())]

    def ask(self, topic: str, conversation: Conversation, tokenizer: Tokenizer, *, room: int) -> list[int]:
        """
        The prompt of the first step, in which the examples that are least similar are left out where `room` is short.

        Raises:
            NoRoomError: there is no room for the conversation's last turn.
        """
        asked = f"( {_line(conversation[-1].text)} ) {_line(topic)} =>"
        shown = [
            f"( {_line(one.turns[-1])} ) {_line(one.topic)} => {_line(one.knowledge)} \n"
            for one in self.similar(topic, conversation)
        ]
        return _fitting(shown, asked, tokenizer, room)

    def pack(
        self, topic: str, conversation: Conversation, tokenizer: Tokenizer, *, knowledge: Sequence[str], room: int
    ) -> Packed:
        """
        The prompt of the second step: of the conversation it holds the last turn alone.

        Where `room` is short, the first examples give way, then knowledge, from the end.

        Raises:
            NoRoomError: there is no room for the topic and the last turn.
        """
        shown = [f"{_situation(one.topic, one.turns[-1], one.knowledge)} {_line(one.reply)} \n" for one in self.replies]
        for count in range(len(knowledge), -1, -1):
            asked = _situation(topic, conversation[-1].text, " ".join(knowledge[:count]))
            try:
                tokens = _fitting(shown, asked, tokenizer, room)
                break
            except NoRoomError:
                if not count:
                    raise
        return Packed(
            tokens=tuple(tokens),
            positions=tuple(range(len(tokens))),
            types=(),
            spans=(),
            references=0,
            knowledge=tuple(range(count)),
            dropped=Dropped(conversation=len(conversation) - 1, knowledge=len(knowledge) - count),
            answer_type=0,
        )

    @cached_property
    def _terms(self) -> TermCounts:
        return TermCounts([_looked_up(one.topic, one.turns) for one in self.examples])


def _looked_up(topic: str, turns: Sequence[str]) -> str:
    return " ".join((topic, *turns[-LAST_TURNS:]))


def _situation(topic: str, said: str, knowledge: str) -> str:
    return f"Topic: {_line(topic)}. User says: {_line(said)} We know that: {_line(knowledge)} System replies:"


def _fitting(shown: Sequence[str], asked: str, tokenizer: Tokenizer, room: int) -> list[int]:
    """As many of the last examples as fit before what is asked."""
    for first in range(len(shown) + 1):
        text = "".join((*shown[first:], asked))
        tokens = [*writing.lead(tokenizer), *writing.literal(text, tokenizer)]
        if len(tokens) <= room:
            return tokens
    raise NoRoomError(f"a prompt of {len(tokens)} tokens does not fit in {room}.", len(tokens))


_line = writing.one_line
