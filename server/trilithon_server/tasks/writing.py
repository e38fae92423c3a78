"""Texts as tokens of a prompt that a task packs: what callers wrote is never read as a special token."""

from __future__ import annotations

from trilithon_parallel.tokenizer import Tokenizer


def lead(tokenizer: Tokenizer) -> list[int]:
    """What the model's texts begin with: its begin token, or nothing."""
    ids = tokenizer.encode("", add_special_tokens=True)
    return ids[:1] if ids and ids[0] == tokenizer.bos_id else []


def literal(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a text in which nothing is read as a special token."""
    return tokenizer.encode_with_literals(text, [(0, len(text))])[0]


def special(name: str, tokenizer: Tokenizer) -> int:
    """
    The id of a special token.

    Raises:
        ValueError: the tokenizer has none of that name.
    """
    ids = tokenizer.encode(name, add_special_tokens=False)
    if len(ids) != 1 or ids[0] not in tokenizer.special_ids:
        raise ValueError(f"the tokenizer has no special token {name}.")
    return ids[0]


def one_line(text: str) -> str:
    """A text with single spaces: behind a label, a line of its own would be another part of the prompt."""
    return " ".join(text.split())
