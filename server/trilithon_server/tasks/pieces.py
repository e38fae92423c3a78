"""
Words and the pieces that a model reads, both with their place in the original text.

Encoder tasks answer in characters of the text that came in, while an uncased WordPiece vocabulary reads another one:
lower case, no accents, no control characters. So a text is cut into words first, each word is encoded on its own, and
its pieces tile it: the first begins where the word begins, the last ends where it ends, nothing lies between two. No
word vanishes (one that encodes to nothing is read as unknown), and special tokens written out in a text are text.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from trilithon_parallel.config import ModelError
from trilithon_parallel.tokenizer import Tokenizer

CACHED_WORDS = 100_000
"""Words whose pieces are remembered; the vocabulary of a corpus of a few million words."""

UNKNOWN = ("[UNK]", "<unk>")

Span = tuple[int, int]
"""Half-open range of characters."""


def split_words(text: str) -> list[Span]:
    """
    Runs of letters and digits, and every other visible character on its own, as corpora of entities are tokenised.

    Marks and invisible format characters belong to what stands before them, so an accent is never cut off; an
    ideograph is a word.

    >>> [text[start:end] for text in ["IL-2 (6.5%)"] for start, end in split_words(text)]
    ['IL', '-', '2', '(', '6', '.', '5', '%', ')']
    """
    words: list[Span] = []
    previous = "space"
    for i, char in enumerate(text):
        kind = _kind(char)
        if kind == "extend" and previous != "space":
            words[-1] = (words[-1][0], i + 1)
            continue
        if kind == "letter" and previous == "letter":
            words[-1] = (words[-1][0], i + 1)
        elif kind != "space":
            words.append((i, i + 1))
        previous = "other" if kind == "extend" else kind
    return words


def _kind(char: str) -> str:
    if char.isascii():
        return "letter" if char.isalnum() else "space" if char <= " " or char == "\x7f" else "other"
    category = unicodedata.category(char)
    if category[0] == "M" or category == "Cf":
        return "extend"
    if category[0] in "LN":
        return "other" if category == "Lo" and _is_ideograph(char) else "letter"
    return "space" if category[0] == "Z" or category == "Cc" else "other"


def _is_ideograph(char: str) -> bool:
    return "\u3400" <= char <= "\u9fff" or "\uf900" <= char <= "\ufaff" or "\U00020000" <= char <= "\U0003ffff"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence as a model reads it; `types` is empty where every token has type 0."""

    tokens: tuple[int, ...]
    types: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Pieces:
    """Pieces of a text in order, without special tokens. Piece i comes from characters [starts[i], ends[i])."""

    ids: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


class WordPieces:
    """
    A tokenizer of an encoder, word by word.

    Attributes:
        cls_id, sep_id: what stands before and after a sequence.
        unknown_id: what a word is read as that the tokenizer makes nothing of.
    Raises:
        ModelError: `task_tokenizer`, the tokenizer doesn't put one special token before a text and one after it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        framed = tokenizer.encode("", add_special_tokens=True)
        unknown = [i for i in sorted(tokenizer.special_ids) if tokenizer.id_to_piece(i) in UNKNOWN]
        if len(framed) != 2 or not unknown:
            raise ModelError(
                "an encoder task needs a tokenizer with a token before a text, one after it, and an unknown token "
                f"({', '.join(UNKNOWN)}). Given: {len(framed)} around an empty text, {len(unknown)} unknown tokens.",
                code="task_tokenizer",
                hint="Use an encoder model (BERT), or build the tokenizer with [CLS], [SEP] and [UNK].",
            )
        self.cls_id, self.sep_id = framed
        self.unknown_id = unknown[0]
        self._cache: dict[str, tuple[tuple[int, int, int], ...]] = {}

    def word(self, word: str) -> tuple[tuple[int, int, int], ...]:
        """Pieces of one word, at least one: (id, start, end) in characters of the word, which they tile."""
        pieces = self._cache.get(word)
        if pieces is None:
            pieces = self._encode(word)
            if len(self._cache) < CACHED_WORDS:
                self._cache[word] = pieces
        return pieces

    def text(self, text: str, *, spans: Sequence[Span] | None = None) -> Pieces:
        """Pieces of a text, or of those of its words that `spans` names."""
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        for begin, stop in split_words(text) if spans is None else spans:
            for piece, start, end in self.word(text[begin:stop]):
                ids.append(piece)
                starts.append(begin + start)
                ends.append(begin + end)
        return Pieces(tuple(ids), tuple(starts), tuple(ends))

    def id_of(self, piece: str) -> int | None:
        """The id of a vocabulary entry by its spelling; None where there is none."""
        return self._ids.get(piece)

    @functools.cached_property
    def unused_ids(self) -> tuple[int, ...]:
        """Rows that the vocabulary keeps free (`[unused0]` ...), in order."""
        return tuple(i for piece, i in self._ids.items() if piece.startswith("[unused") and piece.endswith("]"))

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        size = self._tokenizer.vocab_size
        return {piece: i for i in range(size) if (piece := self._tokenizer.id_to_piece(i))}

    def _encode(self, word: str) -> tuple[tuple[int, int, int], ...]:
        ids, offsets = self._tokenizer.encode_with_offsets(word, add_special_tokens=False)
        if any(i in self._tokenizer.special_ids and i != self.unknown_id for i in ids):
            ids = []  # `[SEP]` given as one word is a word like others, not the end of the text
        if not ids:
            return ((self.unknown_id, 0, len(word)),)
        starts = [0, *(min(start, len(word)) for start, _ in offsets[1:])]
        return tuple(zip(ids, starts, [*starts[1:], len(word)], strict=True))


def word_pieces(tokenizer: Tokenizer) -> WordPieces:
    """The one `WordPieces` of a tokenizer, so that what it remembers is shared."""
    assert isinstance(tokenizer, Hashable)
    return _remembered(tokenizer)


@functools.lru_cache(maxsize=16)
def _remembered(tokenizer: Hashable) -> WordPieces:
    assert isinstance(tokenizer, Tokenizer)
    return WordPieces(tokenizer)
