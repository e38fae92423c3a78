"""
Passages as a model that writes answers reads them, and what the answers to several passages say together. No torch.

The prompt is that of `answer_format`, with the passage as its context: what the recipe `answer_qa` has trained reads
passages, too. The title is the context's first sentence.

Source: arXiv 2101.00408, readers of the individual top k: p(a|q) = sum over the passages of p(z|q) p(a|q, z).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.tasks.answer_format import ANSWER_END, answer_prompt, answer_text


@dataclass(frozen=True, slots=True)
class ReaderPrompt:
    """What a model reads; `truncated`: the end of the passage found no room."""

    tokens: tuple[int, ...]
    truncated: bool


def passage_context(title: str, text: str) -> str:
    """
    A passage as the context of a question.

    >>> passage_context("Stonehenge", "It was built in stages.")
    'Stonehenge. It was built in stages.'
    """
    title, text = title.strip(), text.strip()
    return f"{title}{'' if title[-1] in '.!?' else '.'} {text}" if title else text


def pack(question: str, title: str, text: str, tokenizer: Tokenizer, *, room: int) -> ReaderPrompt:
    """
    The tokens of a question about a passage, in which nothing that was given is read as a special token.

    Args:
        room: tokens at most; the passage loses words at its end to fit.
    Raises:
        ValueError: there is no room for the question and a word of the passage.
    """
    begin = tokenizer.encode("", add_special_tokens=True)
    begin = begin[:1] if begin and begin[0] == tokenizer.bos_id else []
    words = passage_context(title, text).split(" ")

    def tokens(kept: int) -> list[int]:
        return [*begin, *_plain(answer_prompt(question, " ".join(words[:kept])), tokenizer)]

    whole = tokens(len(words))
    if len(whole) <= room:
        return ReaderPrompt(tuple(whole), truncated=False)
    kept = bisect.bisect_right(range(1, len(words)), room, key=lambda count: len(tokens(count)))
    if not kept:
        raise ValueError(f"the question must leave room for a word of the passage in {room} tokens")
    return ReaderPrompt(tuple(tokens(kept)), truncated=True)


def answer_tokens(answer: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of an answer behind the prompt, without what ends it."""
    return _plain(answer_text(answer), tokenizer)


def answer_ends(tokenizer: Tokenizer) -> list[list[int]]:
    """
    What may end an answer: an end token of the model, or the line's end.

    An answer's probability is that of its tokens and of an end: without it "New" would always be likelier than "New
    York". A model that was trained to answer ends it by its token, others by going on with another question.
    """
    return [*([token] for token in sorted(tokenizer.eos_ids)), _plain(ANSWER_END, tokenizer)]


def log_sum(values: Iterable[float]) -> float:
    """
    The logarithm of the sum of exponentials; minus infinity of nothing.

    >>> round(math.exp(log_sum([math.log(0.25), math.log(0.5)])), 6)
    0.75
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


def _plain(text: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode_with_literals(text, [(0, len(text))])[0]
