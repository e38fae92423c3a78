"""
Questions and passages as encoder-decoders read them, and how they write answers. No torch. The same function packs what
a recipe learns and what a server asks.

One passage is one sequence of the encoder. How its parts are told apart is the vocabulary's, by what it puts around a
text:

    [CLS] question [SEP] title [SEP] text [SEP]                 a token before and one after it (BERT)
    question: ... title: ... context: ... </s>                  one after it (T5)

The decoder begins with its start token and ends an answer with what ends the encoder's sequences: [SEP] or </s>.

Source: arXiv 2101.00408, readers of the individual and joint top k; in words as in arXiv 2007.01282.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from trilithon_parallel.config import ModelError
from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.tasks.reading import ReaderPrompt
from trilithon_server.tasks.task_file import Size, TaskFile
from trilithon_server.tasks.writing import literal, one_line

ReaderKind = Literal["individual", "joint"]

LEAST_PASSAGE = 16
"""Tokens that a sequence must have beyond the question's: what parts it, and some words of a passage."""


@dataclass(frozen=True)
class ReaderFormat(TaskFile):
    """
    How a reader reads, and what it was trained for.

    Attributes:
        kind: `individual`: each passage alone, p(a|q) = sum over the passages of p(z|q) p(a|q, z). `joint`: the decoder
            reads the passages together.
        max_question_tokens: a longer question is cut at its end.
        max_passage_tokens: of one encoder sequence, question and all; a longer passage is cut at its end.
        max_answer_tokens: of an answer, its end token included.
        strength: what p(z|q) is multiplied by before it is added to the scores of the decoder's attention to a passage
            (lambda in the paper); 0: no bias, fusion in the decoder. An individual reader has none.
    Raises:
        ValueError: there is no room for a passage, or an individual reader has a bias.
    """

    task: ClassVar[str] = "reader"

    kind: ReaderKind = "joint"
    max_question_tokens: Size = 64
    max_passage_tokens: Size = 256
    max_answer_tokens: Annotated[int, Field(ge=2)] = 32
    strength: Annotated[float, Field(allow_inf_nan=False)] = 0.0

    def __post_init__(self) -> None:
        if self.max_passage_tokens < self.max_question_tokens + LEAST_PASSAGE:
            raise ValueError(
                f"max_passage_tokens must be at least max_question_tokens + {LEAST_PASSAGE}. "
                f"Given: {self.max_passage_tokens} and {self.max_question_tokens}."
            )
        if self.kind == "individual" and self.strength:
            raise ValueError(f"strength must be 0 where each passage is read alone. Given: {self.strength}.")

    def pack(self, question: str, title: str, text: str, tokenizer: Tokenizer) -> ReaderPrompt:
        """
        One encoder sequence, of at most `max_passage_tokens`; nothing that was given is read as a special token.

        A passage without a title has no part for it.

        Raises:
            ModelError: `task_tokenizer`, as `frame`.
        """
        head, body = self.question_tokens(question, tokenizer), passage_tokens(title, text, tokenizer)
        return self.join(head, body, tokenizer)

    def question_tokens(self, question: str, tokenizer: Tokenizer) -> list[int]:
        """A question, cut to `max_question_tokens`, with what stands around it."""
        begin = "" if frame(tokenizer)[0] else "question: "
        return self.framed(literal(f"{begin}{question.strip()}", tokenizer), tokenizer)

    def framed(self, tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
        """The tokens of a question, cut to `max_question_tokens`, with what stands around them."""
        before, end = frame(tokenizer)
        return [*before, *tokens[: self.max_question_tokens], *([end] if before else [])]

    def join(self, question: Sequence[int], passage: Sequence[int], tokenizer: Tokenizer) -> ReaderPrompt:
        """`pack`, of tokens that `question_tokens` and `passage_tokens` have made."""
        _, end = frame(tokenizer)
        room = self.max_passage_tokens - len(question) - 1
        return ReaderPrompt((*question, *passage[:room], end), truncated=len(passage) > room)

    def answer_tokens(self, answer: str, tokenizer: Tokenizer) -> list[int]:
        """
        What the decoder writes: the answer, cut to `max_answer_tokens`, and its end token.

        Raises:
            ModelError: `task_tokenizer`, as `frame`.
        """
        _, end = frame(tokenizer)
        return [*literal(answer.strip(), tokenizer)[: self.max_answer_tokens - 1], end]


def passage_tokens(title: str, text: str, tokenizer: Tokenizer) -> list[int]:
    """A passage whole, with what parts its title from its text; a passage without a title has no part for it."""
    before, end = frame(tokenizer)
    title, text = title.strip(), text.strip()
    if before:
        return [*([*literal(title, tokenizer), end] if title else []), *literal(text, tokenizer)]
    return [*(literal(f"title: {title}", tokenizer) if title else []), *literal(f"context: {text}", tokenizer)]


def frame(tokenizer: Tokenizer) -> tuple[list[int], int]:
    """
    What stands before a sequence (nothing or one token) and the token that ends it, and answers, too.

    Raises:
        ModelError: `task_tokenizer`, the tokenizer puts no token after a text, or more than one around it.
    """
    framed = tokenizer.encode("", add_special_tokens=True)
    if not 1 <= len(framed) <= 2 or framed == [tokenizer.bos_id]:
        raise ModelError(
            "a reader needs a tokenizer with one token after a text, and at most one before it. "
            f"Given: {len(framed)} around an empty text{', which begins it' if len(framed) == 1 else ''}.",
            code="task_tokenizer",
            hint="Use the tokenizer of a BERT or T5 model.",
        )
    return framed[:-1], framed[-1]


def read_answer(text: str) -> str:
    """
    The answer in what the model wrote; empty: it says that there is none.

    >>> read_answer(" twelve  sacks ")
    'twelve sacks'
    """
    return one_line(text)
