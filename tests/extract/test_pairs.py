"""Pairs of mentions in texts of any length: what is read of a long text is what reading all of it would give."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tasks import Task

from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.tasks.pieces import WordPieces, split_words
from trilithon_server.tasks.relations import RelationFormat, split_sentences
from trilithon_server.tasks.tagging import Entity

PARTS = ["a", "b", "stone", "word", " ", " ", " ", ". ", ".", "-", "\u0301", "\n", "\t", "A", "! ", "\u4e2d", "  "]


@pytest.fixture(scope="module")
def pieces(task_dirs: dict[Task, Path]) -> WordPieces:
    """Words of the tiny vocabulary."""
    return WordPieces(load_tokenizer(task_dirs["relation"]))


def read_all(text: str, first: Entity, second: Entity, pieces: WordPieces, room: int) -> list[tuple[int, ...]]:
    """The three parts around two mentions, all of them read before anything is cut."""
    starts = [start for start, _ in split_sentences(text) if start <= first.start]
    ends = [end for _, end in split_sentences(text) if second.end <= end]
    bounds = [
        (max(starts, default=0), first.start),
        (first.end, second.start),
        (second.end, min(ends, default=len(text))),
    ]
    before, between, after = (
        pieces.text(text, spans=[(begin + s, begin + e) for s, e in split_words(text[begin:end])]).ids
        for begin, end in bounds
    )
    if len(between) > room:
        return [(), between[: room - room // 2] + between[len(between) - room // 2 :], ()]
    left = min(len(before), max(room - len(between) - len(after), (room - len(between)) // 2))
    return [before[len(before) - left :], between, after[: room - len(between) - left]]


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_long_text_is_read_as_if_all_of_it_were(pieces: WordPieces, data: st.DataObject) -> None:
    """
    The sequence of a pair is the same as when every word of the text is encoded first.

    Inverse: a quarter of the words beside a mention (`count // 4`, from an eighth of the characters on) turns it red.
    """
    size = data.draw(st.sampled_from([8, 40, 400, 1500]))
    seed = data.draw(st.randoms(use_true_random=False))
    text = "".join(seed.choice(PARTS) for _ in range(size)) + " end"
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=4, max_size=4, unique=True)))
    first = Entity(places[0], places[1], "CHEMICAL", "", 1.0)
    second = Entity(places[2], places[3], "GENE", "", 1.0)
    max_tokens = data.draw(st.sampled_from([8, 16, 64]))
    relation = RelationFormat(("x", "false"), {"CHEMICAL": 5, "GENE": 6}, max_tokens=max_tokens)

    before, between, after = read_all(text, first, second, pieces, max_tokens - 4)
    expected = (pieces.cls_id, *before, 5, *between, 6, *after, pieces.sep_id)

    assert relation.encode(text, first, second, pieces).tokens == expected
    assert relation.encode(text, second, first, pieces).tokens == expected
