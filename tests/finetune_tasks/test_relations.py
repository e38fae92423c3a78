"""Relations and classes: markers in place of mentions, sentences, cuts; one label for texts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from finetune_tasks.encoder_fixtures import CLS, SEP
from hypothesis import given, settings
from hypothesis import strategies as st

from trilithon_parallel.config import ModelError
from trilithon_server.tasks.classes import ClassFormat
from trilithon_server.tasks.pieces import WordPieces
from trilithon_server.tasks.relations import RelationFormat, marker_ids, sentence_of, split_sentences

CHEMICAL, GENE = 1, 2
FORMAT = RelationFormat(("CPR:4", "false"), {"CHEMICAL": CHEMICAL, "GENE": GENE}, max_tokens=32)
TEXT = "It is old. Aspirin inhibits COX-2 of pain. The end."


@dataclass(frozen=True)
class Named:
    start: int
    end: int
    type: str


ASPIRIN, COX, OLD = Named(11, 18, "CHEMICAL"), Named(28, 33, "GENE"), Named(6, 9, "GENE")


def test_a_mention_is_one_marker_and_the_sentence_alone_is_read(pieces: WordPieces) -> None:
    """The other sentences are left out; each mention is one token whatever its words."""
    encoded = FORMAT.encode(TEXT, ASPIRIN, COX, pieces)

    between, after = pieces.text("inhibits").ids, pieces.text("of pain.").ids
    assert (CLS, CHEMICAL, *between, GENE, *after, SEP) == encoded.tokens
    assert encoded.types == ()


def test_the_order_of_the_mentions_is_that_of_the_text(pieces: WordPieces) -> None:
    """Which is a and which is b is said by their types, not by the order in which they are given."""
    assert FORMAT.encode(TEXT, ASPIRIN, COX, pieces) == FORMAT.encode(TEXT, COX, ASPIRIN, pieces)


def test_mentions_of_two_sentences_are_read_together(pieces: WordPieces) -> None:
    """From the start of the first one's sentence to the end of the last one's."""
    assert TEXT[slice(*sentence_of(TEXT, OLD, ASPIRIN))] == "It is old. Aspirin inhibits COX-2 of pain."


@settings(deadline=None)
@given(st.text(st.sampled_from("aB. \t!(1"), max_size=30))
def test_sentences_leave_out_nothing_but_blanks(text: str) -> None:
    """Sentences lie in order and hold every character that is no blank; a sentence is one sentence."""
    sentences = split_sentences(text)

    assert all(a[1] <= b[0] for a, b in itertools.pairwise(sentences))
    covered = {i for start, end in sentences for i in range(start, end)}
    assert all(text[i].isspace() for i in range(len(text)) if i not in covered)


@settings(deadline=None)
@given(before=st.integers(0, 40), between=st.integers(0, 40), after=st.integers(0, 40), room=st.integers(8, 40))
def test_a_long_sentence_is_cut_around_its_mentions(
    pieces: WordPieces, before: int, between: int, after: int, room: int
) -> None:
    """The sequence never is too long, both markers stay, and room is not wasted."""
    head = "of " * before
    middle = " " + "in " * between
    text = f"{head}aspirin{middle}cox{' it' * after}"
    a = Named(len(head), len(head) + 7, "CHEMICAL")
    b = Named(a.end + len(middle), a.end + len(middle) + 3, "GENE")
    tokens = RelationFormat(FORMAT.labels, FORMAT.markers, max_tokens=room).encode(text, a, b, pieces).tokens

    assert min(room, before + between + after + 4) == len(tokens)
    assert tokens.index(CHEMICAL) < tokens.index(GENE)
    assert min(between, room - 4) == tokens.index(GENE) - tokens.index(CHEMICAL) - 1


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (Named(11, 18, "CHEMICAL"), Named(15, 20, "GENE"), "must not overlap"),
        (Named(11, 18, "DRUG"), Named(28, 33, "GENE"), "type must be one of CHEMICAL, GENE. Given: 'DRUG'"),
    ],
    ids=["overlap", "type"],
)
def test_pairs_that_cannot_be_marked_are_refused(pieces: WordPieces, a: Named, b: Named, message: str) -> None:
    """Said in one sentence."""
    with pytest.raises(ValueError, match=message):
        FORMAT.encode(TEXT, a, b, pieces)


def test_candidates_are_pairs_of_one_sentence_that_do_not_overlap() -> None:
    """Chemical first, gene second; another sentence, an overlap and two of a type are none."""
    inside = Named(30, 33, "CHEMICAL")

    assert FORMAT.candidates(TEXT, [OLD, ASPIRIN, COX, inside]) == [(ASPIRIN, COX)]


def test_markers_are_the_vocabulary_s_own_or_free_rows(pieces: WordPieces) -> None:
    """Free rows are given out in the order of the types' names; too many types are refused."""
    assert marker_ids(["GENE", "CHEMICAL"], pieces) == {"CHEMICAL": 1, "GENE": 2}
    with pytest.raises(ModelError, match=r"must have a token @D\$, or a free row"):
        marker_ids(["A", "B", "C", "D"], pieces)


def test_minilm_markers_are_unused_rows(minilm_pieces: WordPieces) -> None:
    """MiniLM's vocabulary cuts `@GENE$` into three; its first free rows stand in."""
    assert len(minilm_pieces.text("@GENE$")) == 3
    assert marker_ids(["CHEMICAL", "GENE"], minilm_pieces) == {"CHEMICAL": 1, "GENE": 2}


def test_a_label_comes_with_all_probabilities() -> None:
    """The most probable label, and a distribution."""
    said = FORMAT.decode(np.array([1.0, 3.0], np.float32))

    assert said.label == "false"
    assert said.score == pytest.approx(1 / (1 + np.exp(-2)))
    assert sum(said.probabilities.values()) == pytest.approx(1.0)


def test_a_pair_of_texts_has_two_types(pieces: WordPieces) -> None:
    """[CLS] text [SEP] of type 0, pair [SEP] of type 1; a text alone has no types."""
    format_ = ClassFormat(("no", "yes"))

    pair = format_.encode("the pain", pieces, "of it")
    assert pair.types == (0, 0, 0, 0, 1, 1, 1)
    assert format_.encode("the pain", pieces).types == ()


@settings(deadline=None)
@given(first=st.integers(0, 30), second=st.integers(0, 30), room=st.integers(8, 30))
def test_the_longer_text_loses_its_end(pieces: WordPieces, first: int, second: int, room: int) -> None:
    """Never too long, full where something is left out, and a text of less than half is whole."""
    format_ = ClassFormat(("no", "yes"), max_tokens=room)
    encoded = format_.cut("the " * first, pieces, "it " * second)
    kept = encoded.tokens.index(SEP) - 1, len(encoded.tokens) - encoded.tokens.index(SEP) - 2

    assert min(room, first + second + 3) == len(encoded.tokens)
    assert kept[0] == min(first, max(room - 3 - second, (room - 2) // 2))
    assert kept[1] == min(second, room - 3 - kept[0])
    assert min(room, first + 2) == len(format_.cut("the " * first, pieces).tokens)
