"""
Texts of which some parts must not be read as special tokens: what a user wrote can never open or close a turn.

The `tokenizers` library can switch special tokens off for a whole text, not for a part of it. So the ones that count
become marks, one private character each, which the library splits on exactly as it does on the tokens themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

import tokenizers

_FIRST_MARK = 0x100000
"""Plane 16 is for private use: no character of it has a meaning, so hardly any text holds one."""

Ranges = Sequence[tuple[int, int]]


class LiteralEncoder:
    """
    A tokenizer that reads special tokens outside of given ranges only.

    Args:
        document: `tokenizer.json`.
        special_ids: the tokens that are not read within the ranges.
    """

    def __init__(self, document: str, special_ids: frozenset[int]) -> None:
        tree = json.loads(document)
        special = [entry for entry in tree["added_tokens"] if entry["id"] in special_ids]
        for entry in special:
            # Some files name a special token in their configuration alone.
            entry["special"] = True
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(tree))
        self._tokenizer.encode_special_tokens = True
        self._mark_of = {entry["content"]: chr(_FIRST_MARK + i) for i, entry in enumerate(special)}
        self._id_of: dict[int, int] = {}
        for entry in special:
            mark = self._mark_of[entry["content"]]
            sides = {side: entry[side] for side in ("single_word", "lstrip", "rstrip")}
            self._tokenizer.add_tokens([tokenizers.AddedToken(mark, normalized=False, special=False, **sides)])
            added = self._tokenizer.token_to_id(mark)
            assert added is not None
            self._id_of[added] = entry["id"]
        self._pattern = alternation(self._mark_of)

    def encode(self, text: str, literals: Ranges) -> tuple[list[int], list[tuple[int, int]]]:
        """
        Token ids of a text and the characters that each came from.

        Raises:
            ValueError: the text holds one of the private characters.
        """
        for mark in self._mark_of.values():
            if mark in text:
                raise ValueError(f"holds U+{ord(mark):X}, a character for private use, beside special token text")
        marked: list[str] = []
        origin: list[int] = []  # of each character of the marked text
        at = 0
        for start, end in special_ranges(self._pattern, text, literals):
            marked += [text[at:start], self._mark_of[text[start:end]]]
            origin += [*range(at, start), start]
            at = end
        marked.append(text[at:])
        origin += [*range(at, len(text)), len(text)]
        encoding = self._tokenizer.encode("".join(marked), add_special_tokens=False)
        ids = [self._id_of.get(token, token) for token in encoding.ids]
        return ids, [(origin[start], origin[end]) for start, end in encoding.offsets]


def alternation(texts: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of the texts, the longest where several begin; None for none."""
    ordered = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def special_ranges(pattern: re.Pattern[str] | None, text: str, literals: Ranges) -> list[tuple[int, int]]:
    """Where special tokens stand in a text, as half-open ranges, but for those that touch a literal range."""
    found = [] if pattern is None else [match.span() for match in pattern.finditer(text)]
    return [span for span in found if not any(span[0] < end and start < span[1] for start, end in literals)]
