"""
Questions and passages as a model that writes text reads them, and what several passages say together. No torch.

    Passage: Stonehenge. It was built in stages.
    Question: How was it built?
    Answer: in stages

An answer is a line: the end of the line is part of it, else "New" would always be likelier than "New York". A recipe
trains with these functions (`completion` is what is learned), the server asks and scores with them.

Source: arXiv 2101.00408, readers of the individual top k: p(a|q) = sum over the passages of p(z|q) p(a|q, z).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trilithon_parallel.tokenizer import Tokenizer

STOP = "\n"
"""Where an answer ends."""


@dataclass(frozen=True, slots=True)
class ReaderPrompt:
    """What a model reads; `truncated`: the end of the passage found no room."""

    tokens: tuple[int, ...]
    truncated: bool


def prompt(question: str, title: str, text: str) -> str:
    """
    What a model goes on from.

    >>> prompt("How?", "Stonehenge", "In stages.")
    'Passage: Stonehenge. In stages.\\nQuestion: How?\\nAnswer:'
    """
    return _passage(title, text) + _question(question)


def completion(answer: str) -> str:
    """
    What a model writes behind the prompt.

    >>> completion(" in\\nstages ")
    ' in stages\\n'
    """
    return f" {one_line(answer)}{STOP}"


def one_line(text: str) -> str:
    """A text in one line, with single spaces."""
    return " ".join(text.split())


def pack(question: str, title: str, text: str, tokenizer: Tokenizer, *, room: int) -> ReaderPrompt:
    """
    The tokens of `prompt`, in which nothing that was given is read as a special token.

    Args:
        room: tokens at most; the passage is cut at its end to fit.
    Raises:
        ValueError: there is no room for the question and a token of the passage.
    """
    begin = tokenizer.encode("", add_special_tokens=True)
    begin = begin[:1] if begin and begin[0] == tokenizer.bos_id else []
    passage, asked = _plain(_passage(title, text), tokenizer), _plain(_question(question), tokenizer)
    left = room - len(begin) - len(asked)
    if left < 1:
        raise ValueError(f"the question must have at most {room - len(begin) - 1} tokens. Given: {len(asked)}")
    return ReaderPrompt((*begin, *passage[:left], *asked), len(passage) > left)


def answer_tokens(answer: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of `completion`."""
    return _plain(completion(answer), tokenizer)


def log_sum(values: Iterable[float]) -> float:
    """
    The logarithm of the sum of exponentials; minus infinity of nothing.

    >>> round(log_sum([math.log(0.25), math.log(0.5)]), 6) == round(math.log(0.75), 6)
    True
    """
    held = [value for value in values if value != -math.inf]
    if not held:
        return -math.inf
    most = max(held)
    return most + math.log(math.fsum(math.exp(value - most) for value in held))


def marginal(passages_K: Sequence[float], answer_K: Sequence[float]) -> float:
    """
    log p(a|q), from log p(z_k|q) and log p(a|q, z_k).

    >>> round(math.exp(marginal([math.log(0.5), math.log(0.5)], [math.log(0.2), math.log(0.6)])), 6)
    0.4
    """
    return log_sum(z + a for z, a in zip(passages_K, answer_K, strict=True))


def _passage(title: str, text: str) -> str:
    title, text = one_line(title), one_line(text)
    dot = "" if not title or title[-1] in ".!?" else "."
    return f"Passage: {title}{dot} {text}" if title else f"Passage: {text}"


def _question(question: str) -> str:
    return f"\nQuestion: {one_line(question)}\nAnswer:"


def _plain(text: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode_with_literals(text, [(0, len(text))])[0]
