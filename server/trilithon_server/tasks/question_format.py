"""
Questions about an answer in a text: the sequence that a decoder reads and goes on, and how its question is read. No
torch. The same function packs what a recipe learns and what a server prompts with.

Two realisations, named by the model's task file. `markers` is plain words and needs nothing of the model:

    Context: The mill stood still. The miller counted << 12 >> sacks. Nobody came.
    Answer: 12
    question: How many sacks were there? :question

`types` parts the text by end tokens and tells by token types what is context (0), what is the answer, in the context
too (1), and what is question (2):

    context <end> answer <end> question: How many sacks were there? :question <end>

A model that also asks what a text does not answer (SQuAD 2.0) is told which is wanted: the last word of its prompt is
`answerable question:` or `unanswerable question:`, and the answer is then one that only looks right.

The two words around a question are text, not special tokens: what doesn't have both is no question.

Source: arXiv 2002.09599, section 2.2 (question generation); the words around a question are those of its
re-implementations.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, ClassVar, Literal, Self

from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.knowledge.sentences import split_sentences
from trilithon_server.tasks.pieces import Span
from trilithon_server.tasks.task_file import Size, TaskFile

OPEN, CLOSE = "question:", ":question"
CONTEXT_TYPE, ANSWER_TYPE, QUESTION_TYPE = 0, 1, 2
NUM_TYPES = 3
# Some vocabularies put spaces around every punctuation mark, so a space may stand within either word.
_QUESTION = re.compile(r"question\s*:(.*?):\s*question", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PackedQuestion:
    """
    A sequence.

    Attributes:
        tokens: of it. types: one a token; empty where the format has none.
        question: half-open range of the tokens that the model writes: the question, its last word and the end token;
            empty, at the end, where no question was given.
        answers: half-open ranges of tokens that are the answer: in the context, and behind it.
    """

    tokens: tuple[int, ...]
    types: tuple[int, ...]
    question: Span
    answers: tuple[Span, Span]

    @property
    def answer_type(self) -> int:
        """Of the tokens that the model writes behind it."""
        return QUESTION_TYPE if self.types else 0


@dataclass(frozen=True)
class QuestionFormat(TaskFile):
    """
    How questions are asked for; part of a model's task file.

    Attributes:
        roles: `markers`: plain words. `types`: token types, of which the model must have `NUM_TYPES`.
        context: `near`: the sentences of the answer with one before and one behind. `whole`: all of the text.
        max_context: tokens of the context; a longer one loses tokens that are far from the answer.
        max_question: tokens of a question, with its last word and the end token.
        unanswerable: whether it also asks what a text does not answer.
    """

    task: ClassVar[str] = "question_gen"

    roles: Literal["markers", "types"] = "markers"
    context: Literal["near", "whole"] = "near"
    max_context: Size = 160
    max_question: Size = 48
    unanswerable: bool = False

    @classmethod
    def from_task_file(cls, document: Mapping[str, Any]) -> Self:
        """The format; a file that says nothing of questions without an answer is of a model that asks none."""
        return super().from_task_file({"unanswerable": False, **document})

    def pack(
        self,
        text: str,
        answer: Span,
        tokenizer: Tokenizer,
        *,
        question: str | None = None,
        answerable: bool = True,
        sentences: Sequence[Span] | None = None,
    ) -> PackedQuestion:
        """
        Write one sequence.

        Args:
            text: what is asked about. answer: characters [start, end) of it.
            question: to be learned; None: the sequence ends where the model begins to write.
            answerable: False: the text does not answer it; the format must be one of both kinds.
            sentences: of the text, for callers that ask about many answers of one; None: they are looked for.
        Raises:
            ValueError: the tokenizer has no end token, or the answer is longer than a context may be.
        """
        assert answerable or self.unanswerable
        opening = f"{'answerable' if answerable else 'unanswerable'} {OPEN}" if self.unanswerable else OPEN
        if not tokenizer.eos_ids:
            raise ValueError("the tokenizer names no end token, and a question ends with one.")
        before, said, behind = _parts(text, answer, near=self.context == "near", sentences=sentences)
        part = _Sequence(tokenizer)
        if self.roles == "markers":
            marked = (f" {before}" if before else "", " <<", f" {said.strip()}", " >>")
        else:
            marked = (before, "", said if before else said.lstrip(), "")
        head, opened, inner, closed = map(part.plain, marked)
        tail = part.plain(behind)
        room = self.max_context - len(opened) - len(inner) - len(closed)
        if room < 0:
            raise ValueError(f"the answer has {len(inner)} tokens, and the context at most {self.max_context}.")
        kept = min(len(head), max(room // 2, room - len(tail)))
        part.lead()
        if self.roles == "markers":
            part.put(part.plain("Context:"), CONTEXT_TYPE)
        part.put([*head[len(head) - kept :], *opened], CONTEXT_TYPE)
        answers = [part.put(inner, ANSWER_TYPE)]
        part.put([*closed, *tail[: room - kept]], CONTEXT_TYPE)
        if self.roles == "markers":
            part.put(part.plain("\nAnswer:"), ANSWER_TYPE)
            answers.append(part.put(part.plain(f" {said.strip()}"), ANSWER_TYPE))
            part.put(part.plain(f"\n{opening}"), QUESTION_TYPE)
        else:
            part.put(part.end, CONTEXT_TYPE)
            answers.append(part.put(part.plain(said.strip()), ANSWER_TYPE))
            part.put(part.end, ANSWER_TYPE)
            part.put(part.plain(opening), QUESTION_TYPE)
        written = [] if question is None else [*part.plain(written_question(question)), *part.end]
        place = part.put(written, QUESTION_TYPE)
        types = tuple(part.types) if self.roles == "types" else ()
        return PackedQuestion(tuple(part.tokens), types, place, (answers[0], answers[1]))


def written_question(question: str) -> str:
    """
    What a model writes behind the prompt, up to its end token.

    >>> written_question("How many\\nsacks?")
    ' How many sacks? :question'
    """
    return f" {' '.join(question.split())} {CLOSE}"


def read_question(written: str) -> str | None:
    """
    The question in what a model wrote behind a prompt; None where it has no end or is empty.

    >>> read_question(" How many sacks? :question question: And?")
    'How many sacks?'
    """
    found = _QUESTION.search(OPEN + written)
    return " ".join(found[1].split()) or None if found else None


def surroundings(text: str, answer: Span, sentences: Sequence[Span] | None = None) -> Span:
    """
    Characters of the sentences that hold an answer, with one before and one behind; all of them where none does.

    Args:
        sentences: of the text, as `split_sentences` finds them; None: it is asked.

    >>> text = "It was late. The mill stood still. The miller counted 12 sacks. Nobody came. All slept."
    >>> text[slice(*surroundings(text, (55, 57)))]
    'The mill stood still. The miller counted 12 sacks. Nobody came.'
    """
    first, last = answer
    sentences = split_sentences(text) if sentences is None else sentences
    # They stand in order, so neither end needs a look at all of them.
    touched = bisect_right(sentences, first, key=itemgetter(1)), bisect_left(sentences, last, key=itemgetter(0)) - 1
    if touched[0] > touched[1]:
        return 0, len(text)
    return sentences[max(0, touched[0] - 1)][0], sentences[min(len(sentences) - 1, touched[1] + 1)][1]


class _Sequence:
    """A sequence that grows by its parts. What callers wrote is never read as a special token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.end = [tokenizer.eos_ids[0]]
        self.tokens: list[int] = []
        self.types: list[int] = []

    def lead(self) -> None:
        """What the model's texts begin with."""
        ids = self._tokenizer.encode("", add_special_tokens=True)
        self.put(ids[:1] if ids and ids[0] == self._tokenizer.bos_id else [], CONTEXT_TYPE)

    def plain(self, text: str) -> list[int]:
        """Tokens of a text."""
        return self._tokenizer.encode_with_literals(text, [(0, len(text))])[0] if text else []

    def put(self, tokens: Sequence[int], type: int) -> Span:
        """Behind what is there; where they stand now."""
        start = len(self.tokens)
        self.tokens += tokens
        self.types += [type] * len(tokens)
        return start, len(self.tokens)


def _parts(text: str, answer: Span, *, near: bool, sentences: Sequence[Span] | None) -> tuple[str, str, str]:
    """
    What stands before the answer, the answer, and what stands behind it, in one line. A space before the answer goes
    with it, as vocabularies of bytes have it.
    """
    first, last = answer
    start, stop = surroundings(text, answer, sentences) if near else (0, len(text))
    before, said, behind = _squeezed(text[start:first]), _squeezed(text[first:last]), _squeezed(text[last:stop])
    before = before.lstrip()
    if before.endswith(" "):
        before, said = before[:-1], f" {said.lstrip()}"
    return before, said, behind.rstrip()


def _squeezed(text: str) -> str:
    """In one line, with one space where there were some."""
    return re.sub(r"\s+", " ", text)
