"""Entities: windows cut between words, labels of pieces, and spans of the original text."""

from __future__ import annotations

import numpy as np
import pytest
from finetune_tasks.encoder_fixtures import CLS, SEP
from hypothesis import given, settings
from hypothesis import strategies as st

from trilithon_server.tasks.pieces import WordPieces
from trilithon_server.tasks.tagging import IGNORE, Logits, TaggingFormat, TagWindow, labels_of, legal, spans_of

FORMAT = TaggingFormat(("Chemical", "Disease"), max_tokens=12, stride=4)
WORDS = st.lists(st.text("abc", min_size=1, max_size=9), max_size=60)


def _logits(window: TagWindow, tags: list[str], *, sure: float = 5.0) -> Logits:
    """Logits that say `tags` at the first piece of every word in the window, and nonsense elsewhere."""
    labels = FORMAT.labels
    values = np.zeros((len(window.encoded.tokens), len(labels)), np.float32)
    values[:, 1] = 9.0
    for i, (first, _) in enumerate(window.pieces):
        values[first] = 0.0
        values[first, labels.index(tags[window.start + i])] = sure
    return values


def test_labels_stand_in_the_order_of_the_types() -> None:
    """O first, then B and I of each type."""
    assert FORMAT.labels == ("O", "B-Chemical", "I-Chemical", "B-Disease", "I-Disease")


@settings(deadline=None)
@given(words=WORDS, room=st.integers(3, 30), stride=st.integers(0, 12))
def test_windows_fit_and_decide_every_word_once(pieces: WordPieces, words: list[str], room: int, stride: int) -> None:
    """No window is too long, their kept words tile the text, and each holds the words that it decides."""
    windows = TaggingFormat(("x",), max_tokens=room, stride=stride).encode(words, pieces)

    assert list(range(len(words))) == [word for window in windows for word in range(*window.kept)]
    for window in windows:
        assert len(window.encoded.tokens) <= room
        assert (window.encoded.tokens[0], window.encoded.tokens[-1]) == (CLS, SEP)
        assert window.start <= window.kept[0] <= window.kept[1] <= window.start + len(window.pieces)


def test_the_middle_of_shared_words_is_where_windows_change(pieces: WordPieces) -> None:
    """Windows of ten words share four; the first decides two of them, the second the other two."""
    windows = FORMAT.encode(["the"] * 16, pieces)

    assert [(window.start, window.start + len(window.pieces)) for window in windows] == [(0, 10), (6, 16)]
    assert [window.kept for window in windows] == [(0, 8), (8, 16)]


def test_a_word_longer_than_a_window_loses_pieces_not_its_label(pieces: WordPieces) -> None:
    """What is too long for any window is cut, and still labelled."""
    (window,) = FORMAT.encode(["x" * 40], pieces)

    assert len(window.encoded.tokens) == 12
    assert window.kept == (0, 1)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("first", [IGNORE, 1, IGNORE, 2, 0, IGNORE, IGNORE, IGNORE]),
        ("whole", [IGNORE, 1, 2, 2, 0, 0, 0, IGNORE]),
    ],
)
def test_the_method_says_which_pieces_carry_the_label(pieces: WordPieces, method: str, expected: list[int]) -> None:
    """`first`: one piece a word. `whole`: every piece, B at the first and I behind it."""
    format_ = TaggingFormat(("x",), method=method)  # type: ignore[arg-type]  # a parameter of the test
    (window,) = format_.encode(["aspirins", "pain", "cab"], pieces)

    assert expected == list(format_.targets(window, ["B-x", "I-x", "O"]))


def test_words_of_another_window_are_not_learned_twice(pieces: WordPieces) -> None:
    """Over all windows every word is supervised once."""
    tags = ["B-Disease"] * 16
    targets = [FORMAT.targets(window, tags) for window in FORMAT.encode(["the"] * 16, pieces)]

    assert sum(value != IGNORE for row in targets for value in row) == 16


@settings(deadline=None)
@given(words=WORDS, data=st.data())
def test_decoded_labels_are_what_the_model_says(pieces: WordPieces, words: list[str], data: st.DataObject) -> None:
    """
    Whatever the windows, the labels of the words come back, made legal, and gold targets decode to gold.

    Seen to fail when windows decide words from their own start instead of from `kept`.
    """
    tags = data.draw(st.lists(st.sampled_from(FORMAT.labels), min_size=len(words), max_size=len(words)))
    windows = FORMAT.encode(words, pieces)
    decoded, scores = FORMAT.decode(windows, [_logits(window, tags) for window in windows])

    assert legal(tags) == decoded
    assert all(0.5 < score <= 1.0 for score in scores)
    said = [FORMAT.targets(window, tags) for window in windows]
    assert tags == [FORMAT.labels[value] for row in said for value in row if value != IGNORE]


@pytest.mark.parametrize(
    "text",
    [
        "Pain\t\U0001f480  cafe\u0301  aspirin!",
        "\u200dPain \U0001f469\u200d\U0001f52c\u0301 of  IL-2\n",
        "\ufeffN\u0303an\u0303o\t\t\u00bd x",
        " \t ",
        "",
    ],
    ids=["emoji", "joined", "accents", "blank", "empty"],
)
def test_acc_F02_entities_are_substrings_of_the_original(minilm_pieces: WordPieces, text: str) -> None:
    """
    Every run of words that could be an entity comes back as it stands in the text, tabs, emoji and accents included.

    Seen to fail when an entity's text is its words joined by spaces.
    """
    format_ = TaggingFormat(("x",))
    tagged = format_.encode_text(text, minilm_pieces)
    for first in range(len(tagged.words)):
        for stop in range(first + 1, len(tagged.words) + 1):
            tags = ["O"] * first + ["B-x"] + ["I-x"] * (stop - first - 1) + ["O"] * (len(tagged.words) - stop)
            (window,) = tagged.windows
            values = np.zeros((len(window.encoded.tokens), 3), np.float32)
            for word, (piece, _) in enumerate(window.pieces):
                values[piece, format_.labels.index(tags[word])] = 3.0
            (entity,) = format_.decode_text(text, tagged, [values])

            assert text[entity.start : entity.end] == entity.text
            assert (tagged.words[first][0], tagged.words[stop - 1][1]) == (entity.start, entity.end)
            assert entity.score == pytest.approx(np.exp(3) / (np.exp(3) + 2), abs=1e-6)


def test_an_entity_without_words_has_no_windows(pieces: WordPieces) -> None:
    """A blank text is answered with no entity, without asking the model."""
    tagged = FORMAT.encode_text("  ", pieces)

    assert tagged.windows == ()
    assert FORMAT.decode_text("  ", tagged, []) == []


@settings(deadline=None)
@given(st.lists(st.sampled_from(labels_of(["x", "y"])), max_size=12))
def test_legal_tags_lose_no_label_that_is_not_O(tags: list[str]) -> None:
    """Making tags legal keeps every word's type and needs no second pass."""
    made = legal(tags)

    assert [tag[2:] for tag in tags] == [tag[2:] for tag in made]
    assert made == legal(made)
    covered = {word for start, stop, _ in spans_of(made) for word in range(start, stop)}
    assert covered == {word for word, tag in enumerate(tags) if tag != "O"}
