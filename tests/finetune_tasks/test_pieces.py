"""Words and pieces know their place in the original text, whatever the text is."""

from __future__ import annotations

import itertools
import string
from pathlib import Path

import pytest
from finetune_tasks.encoder_fixtures import CLS, SEP, UNK
from hypothesis import given, settings
from hypothesis import strategies as st

from trilithon_parallel.config import ModelError
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.tasks.pieces import WordPieces, split_words

TEXTS = st.text(
    st.one_of(st.sampled_from(string.ascii_letters + " \t\n.-@$[]"), st.characters(codec="utf-8")), max_size=40
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("IL-2 (6.5%)", ["IL", "-", "2", "(", "6", ".", "5", "%", ")"]),
        ("a  b\tc\nd", ["a", "b", "c", "d"]),
        ("cafe\u0301s, 25\u00b0C", ["cafe\u0301s", ",", "25", "\u00b0", "C"]),
        ("\U0001f469\u200d\U0001f52c ok", ["\U0001f469\u200d", "\U0001f52c", "ok"]),
        ("snake_case", ["snake", "_", "case"]),
        ("\u767d\u8840 TNF\u03b1", ["\u767d", "\u8840", "TNF\u03b1"]),
        ("\u0301 a\u00a0b", ["\u0301", "a", "b"]),
        ("", []),
    ],
)
def test_words_are_runs_of_letters_and_single_signs(text: str, words: list[str]) -> None:
    """Letters and digits run on, other signs stand alone, marks stay with what they mark."""
    assert words == [text[start:end] for start, end in split_words(text)]


@settings(deadline=None)
@given(TEXTS)
def test_words_hold_every_visible_character_once(text: str) -> None:
    """Words lie in order, do not overlap, and what is between them is blank or invisible."""
    words = split_words(text)

    assert all(start < end for start, end in words)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(words))
    covered = {i for start, end in words for i in range(start, end)}
    assert not any(char.isalnum() or char in string.punctuation for i, char in enumerate(text) if i not in covered)


@settings(deadline=None)
@given(text=TEXTS)
def test_pieces_tile_their_words(pieces: WordPieces, text: str) -> None:
    """Every word has a piece, and its pieces leave none of its characters out."""
    words = split_words(text)
    read = pieces.text(text)

    tiles = list(zip(read.starts, read.ends, strict=True))
    for start, end in words:
        inside = [tile for tile in tiles if start <= tile[0] and tile[1] <= end]
        assert inside[0][0] == start
        assert inside[-1][1] == end
        assert all(a[1] == b[0] for a, b in itertools.pairwise(inside))
    assert len(tiles) == sum(len(pieces.word(text[start:end])) for start, end in words)


def test_a_word_that_encodes_to_nothing_is_read_as_unknown(pieces: WordPieces) -> None:
    """Control and format characters vanish in the tokenizer, but not from the sequence."""
    assert pieces.word("\u200d") == ((UNK, 0, 1),)
    assert pieces.text("\u200d").ids == (UNK,)


def test_special_tokens_in_a_text_are_text(pieces: WordPieces) -> None:
    """Nobody ends a sequence from within, neither in running text nor with a token of a data file."""
    assert not {CLS, SEP} & set(pieces.text("the [SEP] [CLS]").ids)
    assert tuple(piece for piece, _, _ in pieces.word("[SEP]")) == (UNK,)


def test_an_accent_of_its_own_belongs_to_its_letter(minilm_pieces: WordPieces) -> None:
    """MiniLM's own offsets end before an accent at the end of a word (seen to fail with them); ours hold it."""
    text = "au cafe\u0301 noir"
    read = minilm_pieces.text(text)

    assert [text[a:b] for a, b in zip(read.starts, read.ends, strict=True)] == ["au", "cafe\u0301", "noir"]


def test_a_tokenizer_without_a_frame_is_refused(smollm2_dir: Path) -> None:
    """A decoder's tokenizer puts nothing around a text: said in one sentence."""
    with pytest.raises(ModelError, match="an encoder task needs a tokenizer with a token before a text"):
        WordPieces(load_tokenizer(smollm2_dir))
