"""
Questions of a decoder that was never trained to ask them: an instruction in words, and how its reply is read. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from trilithon_server.tasks.pieces import Span
from trilithon_server.tasks.question_format import surroundings

SIDE_CHARS = 1000
"""Of the text, at most, on either side of an answer, and of an answer: sentences may have no end."""

MAX_TOKENS = 64
"""Of a reply; its first question is enough."""

STOP = "?"

_LABEL = re.compile(r"^\W*(?:question)\s*:\s*", re.IGNORECASE)
_LIST = re.compile(r"^\s*(?:[-*]|\d+[.)])\s+")


def question_instruction(text: str, answer: Span, sentences: Sequence[Span] | None = None) -> str:
    r"""
    What the model is asked, of characters [start, end) of a text.

    >>> print(question_instruction("The miller counted 12 sacks.", (19, 21)))
    Text: The miller counted 12 sacks.
    <BLANKLINE>
    Write one short question about the text. Its answer must be "12". Reply with the question alone.

    Args:
        sentences: of the text, for callers that ask about many answers of one; None: they are looked for.
    Raises:
        ValueError: the answer has more than `SIDE_CHARS` characters.
    """
    first, last = answer
    if last - first > SIDE_CHARS:
        raise ValueError(f"the answer has {last - first} characters. It may have {SIDE_CHARS}.")
    start, stop = surroundings(text, answer, sentences)
    near, said = text[max(start, first - SIDE_CHARS) : min(stop, last + SIDE_CHARS)], text[first:last]
    return (
        f"Text: {' '.join(near.split())}\n\nWrite one short question about the text. Its answer must be "
        f'"{" ".join(said.split())}". Reply with the question alone.'
    )


def question_prompt(text: str, answer: Span, sentences: Sequence[Span] | None = None) -> str:
    """The same for a model without a chat template: it goes on behind the label."""
    return f"{question_instruction(text, answer, sentences)}\n\nQuestion:"


def read_reply(reply: str) -> str | None:
    """
    The first question of a reply, without labels and quotes; None where there is none.

    >>> read_reply('Question: "How many sacks did he count?" The answer is 12.')
    'How many sacks did he count?'
    """
    for line in reply.splitlines():
        bare = _LIST.sub("", _LABEL.sub("", line)).strip(" \t\"'*\u201c\u201d")
        question, mark, _ = bare.partition("?")
        if mark and question.strip():
            return f"{' '.join(question.split())}?"
    return None
