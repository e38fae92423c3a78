"""
Token ids to text, one token at a time, such that the pieces joined are the whole text byte for byte.

A token may end inside a character: its bytes wait until the next token completes them. Bytes that are no UTF-8 become
U+FFFD, the same ones in pieces as in the whole, because both come from the same incremental decoder.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from trilithon_parallel.tokenizer import Tokenizer

_DECODER = codecs.getincrementaldecoder("utf-8")

SENTENCE_ENDS = (b".", b"!", b"?", b"\n")
"""Last bytes of the tokens that end a sentence: factual-nucleus sampling starts anew after them."""


class TokenTexts:
    """What every token of a vocabulary contributes to a text; looked up once per token, shared by all requests."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}
        self._sentence_ends: tuple[int, ...] | None = None

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes; empty for the rows with which a model pads its vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            inside = token_id < self.tokenizer.vocab_size
            found = self._bytes[token_id] = self.tokenizer.token_bytes(token_id) if inside else b""
        return found

    def text_of(self, token_id: int) -> str:
        """The token by itself as text; half a character shows as U+FFFD."""
        found = self._texts.get(token_id)
        if found is None:
            found = self._texts[token_id] = self.bytes_of(token_id).decode("utf-8", errors="replace")
        return found

    @property
    def sentence_ends(self) -> tuple[int, ...]:
        """Tokens whose text ends in . ! ? or a newline; computed once."""
        if self._sentence_ends is None:
            ends = (i for i in range(self.tokenizer.vocab_size) if self.bytes_of(i).endswith(SENTENCE_ENDS))
            self._sentence_ends = tuple(ends)
        return self._sentence_ends


class Detokenizer:
    """
    The text of one sequence, as its tokens come.

    Args:
        texts: the model's tokens.
        skip_special: leave special tokens out of the text.
    """

    __slots__ = ("_bytes_of", "_decode", "_skip")

    def __init__(self, texts: TokenTexts, *, skip_special: bool) -> None:
        self._bytes_of = texts.bytes_of
        self._skip: frozenset[int] = texts.tokenizer.special_ids if skip_special else frozenset()
        self._decode = _DECODER(errors="replace").decode

    def push(self, token_id: int) -> str:
        """The characters that this token completes; may be empty."""
        if token_id in self._skip:
            return ""
        return self._decode(self._bytes_of(token_id))

    def flush(self) -> str:
        """What is left when the sequence ends: U+FFFD for an unfinished character, else nothing."""
        return self._decode(b"", True)


def decode_all(texts: TokenTexts, ids: Iterable[int], *, skip_special: bool) -> str:
    """The whole text of `ids`."""
    detokenizer = Detokenizer(texts, skip_special=skip_special)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()
