"""Words as they are counted and matched, and pieces of so many words that know their place."""

from __future__ import annotations

import itertools
import json
import unicodedata

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from knowledge.retrieval_cases import SharedData, read_qed, read_xquad

from trilithon_server.knowledge.words import answer_words, chunks, contains, search_words

ODD = "abcXYZ019_-.' \t\n\r\u0301\u00a0\u200b\u00e9\u0130\u00df\u767d"
TEXTS = st.text(st.one_of(st.sampled_from(ODD), st.characters(exclude_categories=["Cn", "Cs"])), max_size=40)


@pytest.mark.parametrize(
    ("text", "counted", "matched"),
    [
        ("The U.S. won", ["the", "u", "s", "won"], ["the", "u", ".", "s", ".", "won"]),
        ("forty-two 3,5", ["forty", "two", "3", "5"], ["forty", "-", "two", "3", ",", "5"]),
        ("snake_case", ["snake_case"], ["snake", "_", "case"]),
        ("R\u00f6ntgen", ["ro", "ntgen"], ["ro\u0308ntgen"]),
        ("Ro\u0308ntgen", ["ro", "ntgen"], ["ro\u0308ntgen"]),
        ("6\u00bd sacks", ["6\u00bd", "sacks"], ["6\u00bd", "sacks"]),
        ("a\u00a0b\u200bc", ["a", "b", "c"], ["a", "b", "c"]),
        ("$5 (50%)", ["5", "50"], ["$", "5", "(", "50", "%", ")"]),
        ("\u0130zmir", ["i", "zmir"], ["i\u0307zmir"]),
        ("\u767d\u8840", ["\u767d\u8840"], ["\u767d\u8840"]),
        (" ", [], []),
    ],
)
def test_acc_A05_words(text: str, counted: list[str], matched: list[str]) -> None:
    """
    Abbreviations, hyphens, signs and accents, composed or not, as each of the two ways of cutting has them.

    Inverse check: seen to fail without the decomposition, and with accents as words of their own.
    """
    assert search_words(text) == counted
    assert answer_words(text) == matched


PUBLISHED = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


@given(TEXTS)
def test_acc_A05_words_of_answers_are_those_of_the_published_pattern(text: str) -> None:
    """
    Any text is cut as DPR's pattern cuts it, written with Unicode classes that the standard library lacks. Characters
    that Python's tables lack are left out: the pattern's engine may have newer ones.

    Inverse check: seen to fail when a mark continues a sign, and when invisible characters are kept.
    """
    decomposed = unicodedata.normalize("NFD", text)

    assert answer_words(text) == [found.lower() for found in PUBLISHED.findall(decomposed)]


def test_acc_A05_answers_stand_in_one_stretch() -> None:
    """Whole words, one behind another; nothing at all stands nowhere."""
    words = answer_words("It was New York, in 1958")

    assert contains(words, answer_words("new york"))
    assert contains(words, answer_words("1958"))
    assert not contains(words, answer_words("york in"))
    assert not contains(words, answer_words("195"))
    assert not contains(words, [])
    assert not contains([], ["a"])


@given(text=TEXTS | st.lists(st.sampled_from(["a", "bb", " ", "\n", "\n\n", "\r\n"]), max_size=60).map("".join))
@pytest.mark.parametrize("size", [1, 3])
def test_chunks_hold_every_word_once(text: str, size: int) -> None:
    """
    Pieces are slices of the text in order, of `size` words each but the last of a paragraph; no word is lost.

    Inverse check: seen to fail with a paragraph's border counted as a word, and with the count kept across it.
    """
    pieces = chunks(text, size)

    assert [piece.text for piece in pieces] == [text[piece.start : piece.end] for piece in pieces]
    assert all(a.end <= b.start for a, b in itertools.pairwise(pieces))
    assert [word for piece in pieces for word in piece.text.split()] == text.split()
    for piece, after in itertools.pairwise(pieces):
        held, is_border = len(piece.text.split()), text.count("\n", piece.end, after.start) > 1
        assert held == size or (held < size and is_border)
    assert all(piece.text.strip() == piece.text for piece in pieces)
    # within a piece no two line ends stand between words
    assert not any(regex.search(r"\n\s*\n", piece.text) for piece in pieces)


def test_chunks_of_real_texts(shared_data: SharedData) -> None:
    """As many pieces as others counted in articles and in paragraphs."""
    with shared_data("pretrain/wikipedia_en_articles.jsonl").open(encoding="utf-8", newline="\n") as file:
        articles = [json.loads(line)["text"] for line in file]
    xquad, qed = read_xquad(shared_data), read_qed(shared_data)

    assert sum(len(chunks(text)) for text in articles) == 4418
    assert [len(xquad.cut(words)) for words in (0, 100, 50)] == [195, 340, 585]
    assert [len(qed.cut(words)) for words in (0, 100)] == [1343, 2145]
