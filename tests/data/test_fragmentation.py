"""How finely vocabularies cut texts: counts by hand, and the command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from trilithon.cli._main import main
from trilithon_parallel.data.errors import DataError
from trilithon_parallel.data.fragmentation import Fragmentation, fragmentation, fragmentation_of_files
from trilithon_parallel.tokenizer import load_tokenizer


class Letters:
    """A vocabulary of single letters; digits are unknown."""

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        assert not add_special_tokens
        places = [i for i, letter in enumerate(text) if letter != " "]
        return [0 if text[i].isdigit() else ord(text[i]) for i in places], [(i, i + 1) for i in places]

    def id_to_piece(self, token_id: int) -> str:
        return chr(token_id) if token_id else "[UNK]"


def test_counts_are_those_of_a_hand() -> None:
    """Words between spaces, their pieces, whole and unknown ones."""
    texts = ["a bcd  7 ef", "", " \u00e9 "]

    found = fragmentation(texts, Letters())  # type: ignore[arg-type]  # two methods of the protocol are needed

    assert found == Fragmentation(words=5, pieces=8, num_bytes=15, whole=3, unknown=1)
    assert (found.pieces_per_word, found.bytes_per_piece) == (1.6, 15 / 8)
    assert (found.whole_share, found.unknown_share) == (0.6, 0.2)


class Spaced(Letters):
    """Words whose pieces hold the space before them, as those of SentencePiece and byte-level vocabularies do."""

    def encode_with_offsets(self, text: str, *, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        found = [match.span() for match in re.finditer(r" ?[^ ]{1,3}", text)]
        return [ord(text[end - 1]) for _, end in found], found


def test_pieces_with_spaces_belong_to_the_word_behind() -> None:
    """A piece is its word's though it begins before it."""
    found = fragmentation(["abc de fghi"], Spaced())  # type: ignore[arg-type]

    assert (found.words, found.pieces, found.whole) == (3, 4, 2)


def test_the_command_shows_vocabularies_side_by_side(
    write_rows: Callable[..., Path], tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each vocabulary, and the same numbers as JSON."""
    rows = write_rows("rows.jsonl", ["one little text", "and another"])
    names = ["--tokenizer", str(tokenizer_dir), "--tokenizer", str(tokenizer_dir / "tokenizer.json")]

    assert main(["data", "fragmentation", str(rows), *names]) == 0
    table = capsys.readouterr().out
    assert "5 words" in table
    assert "pieces a word" in table
    assert main(["data", "fragmentation", str(rows), *names, "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["words"] for item in found.values()] == [5, 5]
    assert all(item["pieces_per_word"] == item["pieces"] / 5 for item in found.values())


def test_R11_nothing_to_count(write_rows: Callable[..., Path], tokenizer_dir: Path) -> None:
    """Rows without a word, and rows that are none, are told."""
    tokenizer = load_tokenizer(tokenizer_dir)

    with pytest.raises(DataError, match="at least one document with text"):
        fragmentation_of_files([write_rows("empty.jsonl", ["", "  "])], tokenizer)
    with pytest.raises(DataError, match=r"rows.jsonl.*2"):
        fragmentation_of_files([write_rows("rows.jsonl", ["good", b"{not json"])], tokenizer)
