"""
Blocks of documents for the inverse cloze task: whole sentences, as many as fit, never of two documents.

Source: Lee et al. 2019, section 4; sizes as arXiv 2101.00408 has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.knowledge.sentences import split_sentences

MAX_SENTENCE_TOKENS = 512
"""A document with a longer sentence is a table or a list, and is left out."""

MIN_SENTENCES = 2
"""Of a block: one to ask with, one to be found."""


@dataclass(frozen=True, slots=True)
class Block:
    """Sentences of one document, in order."""

    sentences: tuple[str, ...]


def blocks_of(text: str, title: str, tokenizer: Tokenizer, *, room: int) -> Iterator[Block]:
    """
    The blocks of a document; together they hold every sentence once. None of a document that has a sentence above 512
    tokens, or fewer than two sentences.

    A block ends with the sentence that fills it, where at least two are left; else what is left belongs to it.

    Args:
        room: tokens of a sequence, in which title and marks stand too.
    """
    sentences = [" ".join(text[start:end].split()) for start, end in split_sentences(text)]
    sizes = [len(tokenizer.encode(sentence, add_special_tokens=False)) for sentence in sentences]
    if len(sentences) < MIN_SENTENCES or max(sizes) > MAX_SENTENCE_TOKENS:
        return
    most = room - 3 - len(tokenizer.encode(title, add_special_tokens=False))
    first, held = 0, 0
    for at, size in enumerate(sizes):
        held += size
        is_full = held >= most and at + 1 - first >= MIN_SENTENCES
        if is_full and len(sentences) - at - 1 >= MIN_SENTENCES:
            yield Block(tuple(sentences[first : at + 1]))
            first, held = at + 1, 0
    yield Block(tuple(sentences[first:]))
