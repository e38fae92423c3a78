"""Sentences: where they end, where they stand, and which of them are kept."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trilithon_server.knowledge.sentences import MAX_SENTENCES, Sentence, sentences_of, split_sentences

SharedData = Callable[[str], Path]

CAPITALS = st.sampled_from(
    ["The mill. ", "Dr. ", "U.S. ", "No. 5 ", "Is it? ", '"Yes!" ', "he said. ", "\n\n", "\n", "[3] "]
)
TEXTS = st.lists(CAPITALS | st.text(max_size=6), max_size=20).map("".join)


@pytest.mark.parametrize(
    "sentences",
    [
        ["The mill stands.", "It is old!", "Is it open?", "Yes."],
        ["Dr. Hale of the U.S. Mill Trust met Mrs. J. K. Stone.", "They talked."],
        ['"Is it late?" she asked.', "(It was.)", "\u201cThen go.\u201d", "He went."],
        ["It weighs 3.5 tons, i.e. more than the other, etc. and so on.", "The next is lighter."],
        ["No. 5 is closed, see Fig. 2.", "No.", "Vol. 3 has more."],
        ["The doors close at 5 p.m.", "Then I go."],
        ["It was built in 1820.[3]", "It burnt down.[citation needed]", "Nobody knows why..."],
        ["What?!", "That cannot be."],
        ["The line is\nwrapped here.", "So is\nthis one"],
        ["A heading", "\u00c4pfel are apples.", "2 of them fell."],
    ],
    ids=[
        "ends",
        "titles",
        "quotes",
        "small letters",
        "numbers",
        "times",
        "references",
        "several",
        "lines",
        "paragraphs",
    ],
)
def test_sentences_end_where_they_end(sentences: list[str]) -> None:
    """Text made of sentences is cut into them again, and what is no end is none."""
    text = sentences[0] + ("\n \n" if sentences[0] == "A heading" else "  ") + " ".join(sentences[1:])

    assert [text[start:end] for start, end in split_sentences(text)] == sentences


@settings(deadline=None)
@given(TEXTS)
def test_sentences_hold_every_character_in_order(text: str) -> None:
    """
    Whatever the text is, its sentences are in order, do not overlap, have no space at their ends and leave only spaces.

    Inverse check: with the end of a paragraph's match taken for its start, the last sentence before an empty line is
    lost.
    """
    spans = split_sentences(text)

    assert all(start < end for start, end in spans)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
    assert all(text[start:end] == text[start:end].strip() for start, end in spans)
    assert "".join("".join(text[start:end].split()) for start, end in spans) == "".join(text.split())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("piece", ["a. ", ".", '."', ". ", "\n", "\n ", " ", "A.B.", "(", "x[", "Dr. "])
def test_time_is_linear_in_whatever_comes(piece: str) -> None:
    """
    A megabyte of one piece is cut before anyone waits: quadratic time would exceed the test's own limit by far.

    Inverse check: with a run of stops that is looked at from each of its signs, a megabyte of full stops takes an hour.
    """
    text = piece * (1_000_000 // len(piece))

    assert "".join("".join(text[a:b].split()) for a, b in split_sentences(text)) == "".join(text.split())


def test_what_is_kept_is_numbered_and_placed() -> None:
    """Sentences of 5 to 60 words stay, each once, with their number among all and their place in the text."""
    long = "It " + "goes on " * 29 + "now."
    text = "The mill.\n\nIt stands\tby  the river. " + long
    text += f" It STANDS by the river! Read more about our mill. Goes{long[7:]}"
    sentences = sentences_of(text, document_id="d", title="The mill", url="https://example.org/mill")

    assert [sentence.number for sentence in sentences] == [1, 2, 5]
    assert sentences[0] == Sentence(
        "It stands by the river.", "d", 1, 11, 35, title="The mill", url="https://example.org/mill"
    )
    assert all(" ".join(text[s.start : s.end].split()) == s.text for s in sentences)
    assert len(sentences[1].text.split()) == 60
    assert sentences_of(f"It truly {long[3:]}", document_id="d") == []


def test_titles_and_furniture_are_no_knowledge() -> None:
    """The title said again is left out, and so is a line that holds a stop phrase, but not one with a part of it."""
    title = "How the old mill was saved"
    text = (
        f"{title}. This site uses cookies to count you. Please sign up for our letter! "
        "The Cookie-Policy page is long. He gave them cookies to eat at noon. They all resign up for grabs today."
    )

    assert [s.text for s in sentences_of(text, document_id="d", title=title)] == [
        "He gave them cookies to eat at noon.",
        "They all resign up for grabs today.",
    ]


def test_a_page_keeps_its_first_sentences() -> None:
    """No document fills a base alone."""
    text = " ".join(f"This is sentence number {i}." for i in range(600))
    sentences = sentences_of(text, document_id="d")

    assert [s.number for s in sentences] == list(range(MAX_SENTENCES))


def test_paragraphs_of_wikipedia_have_their_sentences(shared_data: SharedData) -> None:
    """Of real paragraphs nearly every sentence begins with no small letter and ends with a stop."""
    articles = json.loads(shared_data("qa/xquad_en.json").read_bytes())["data"]
    texts = [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]
    sentences = [text[start:end] for text in texts for start, end in split_sentences(text)]

    assert 950 <= len(sentences) <= 1000
    assert sum(not s[0].islower() and s.rstrip("\"')]\u201d")[-1] in ".!?" for s in sentences) >= 0.97 * len(sentences)
