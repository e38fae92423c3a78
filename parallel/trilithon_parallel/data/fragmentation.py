"""
How finely a vocabulary cuts texts: what decides, before any training, whether a vocabulary suits a domain.

A word is what stands between spaces. A vocabulary made for other texts cuts the domain's words into many pieces, so
that a window holds less text and meanings have to be put together from syllables (arXiv 2010.06060, section 3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trilithon_parallel.data.documents import Findings, check_inputs, documents_of, read_blocks
from trilithon_parallel.data.errors import DataError
from trilithon_parallel.data.prepare import BLOCK_BYTES
from trilithon_parallel.pieces import UNKNOWN_PIECES
from trilithon_parallel.tokenizer import Tokenizer

_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Fragmentation:
    """
    What a vocabulary makes of texts.

    Attributes:
        words, pieces, num_bytes: of the texts; bytes are those of UTF-8.
        whole: words that are one piece. unknown: words with a part that the vocabulary lacks.
    """

    words: int
    pieces: int
    num_bytes: int
    whole: int
    unknown: int

    @property
    def pieces_per_word(self) -> float:
        """1 is the least."""
        return self.pieces / max(1, self.words)

    @property
    def bytes_per_piece(self) -> float:
        """How much text a token of the window holds."""
        return self.num_bytes / max(1, self.pieces)

    @property
    def whole_share(self) -> float:
        """Share of words that are one piece."""
        return self.whole / max(1, self.words)

    @property
    def unknown_share(self) -> float:
        """Share of words that are not read in full."""
        return self.unknown / max(1, self.words)


def fragmentation(texts: Iterable[str], tokenizer: Tokenizer) -> Fragmentation:
    """
    Count, without special tokens.

    >>> Fragmentation(words=4, pieces=6, num_bytes=24, whole=3, unknown=0).pieces_per_word
    1.5
    """
    words = pieces = num_bytes = whole = unknown = 0
    for text in texts:
        ids, offsets = tokenizer.encode_with_offsets(text, add_special_tokens=False)
        num_bytes += len(text.encode())
        pieces += len(ids)
        ends = [(end, token) for token, (_, end) in zip(ids, offsets, strict=True)]
        at = 0
        for word in _WORD.finditer(text):
            words += 1
            first = at
            while at < len(ends) and ends[at][0] <= word.end():
                at += 1
            held = ends[first:at]
            whole += len(held) == 1
            unknown += any(tokenizer.id_to_piece(token) in UNKNOWN_PIECES for _, token in held)
    return Fragmentation(words, pieces, num_bytes, whole, unknown)


def fragmentation_of_files(inputs: Sequence[Path], tokenizer: Tokenizer, *, text_key: str = "text") -> Fragmentation:
    """
    The same of files.

    Args:
        inputs: .jsonl and .txt files, as `prepare` reads them.
    Raises:
        DataError: `data_rows`; `data_empty`, there is no word.
    """
    findings = Findings()
    check_inputs(inputs, findings)
    findings.raise_any()
    found = fragmentation(_texts(inputs, text_key, findings), tokenizer)
    findings.raise_any()
    if not found.words:
        raise DataError("the input must hold at least one document with text.", code="data_empty")
    return found


def _texts(inputs: Sequence[Path], text_key: str, findings: Findings) -> Iterator[str]:
    for path in inputs:
        for block in read_blocks(path, block_bytes=BLOCK_BYTES):
            for text in documents_of(block, text_key=text_key, findings=findings):
                if not findings.total and text:
                    yield text
