"""The pieces that stories are told with: ends of sentences, what is kept and forgotten, facts by their vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trilithon_server.knowledge.concepts import ConceptsError, read_concepts
from trilithon_server.knowledge.fact_vectors import FactVectors, by_cosine
from trilithon_server.knowledge.graph import Fact
from trilithon_server.recent import Recent
from trilithon_server.story_requests import DRAWING, drawing
from trilithon_server.story_telling import first_end, seed_of

TEXT = ' Dr. Hale said, "It is late." Then he left! He went home.'


@given(cuts=st.lists(st.integers(0, len(TEXT)), max_size=8))
def test_a_sentence_ends_where_it_ends_in_whatever_pieces_it_comes(cuts: list[int]) -> None:
    """Also where a piece brings two ends at once. Inverse seen: the last end that a text has."""
    ends = [first_end(TEXT[:stop]) for stop in [*sorted(cuts), len(TEXT)]]

    assert ends[-1] is not None
    assert set(ends) <= {None, ends[-1]}
    assert TEXT[: ends[-1]] == ' Dr. Hale said, "It is late."'


@pytest.mark.parametrize("text", ["", "Tom ran", "Tom ran.", "Tom ran. ", "Mr. Hale", 'He said, "No."'])
def test_a_sentence_goes_on_until_another_begins(text: str) -> None:
    """An end is certain only when something stands behind it."""
    assert first_end(text) is None


def test_seeds_of_sentences_differ_and_repeat() -> None:
    """63 bits of the story's seed and the index, the same in every process."""
    seeds = [seed_of(seed, index) for seed in (0, 1, 12) for index in range(2, 34)]

    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert seed_of(1, 2) == 2579038953868284024


def test_what_is_kept_is_kept_for_so_long_and_so_much_of_it() -> None:
    """The oldest of one tenant goes first, at its time or when there are too many; putting again renews."""
    now = 0.0
    kept = Recent[str](most=2, kept_s=10.0, clock=lambda: now)
    kept.put("alice", "a", "A")
    kept.put("bob", "a", "B")
    kept.put("alice", "b", "A2")
    now = 5.0
    kept.put("alice", "a", "A3")
    kept.put("alice", "c", "A4")
    assert [kept.get("alice", id) for id in "abc"] == ["A3", None, "A4"]
    assert kept.get("bob", "a") == "B"
    now = 10.0
    assert kept.get("bob", "a") is None
    assert kept.get("alice", "a") == "A3"
    assert [kept.delete("alice", "a"), kept.delete("alice", "a"), kept.delete("carol", "a")] == [True, False, False]
    now = 15.0
    assert kept.get("alice", "c") is None
    assert kept._of == {}


def test_facts_by_cosine_keep_their_order_where_they_are_equal() -> None:
    """Best first; differences below the digits of a score decide nothing; lengths do not matter."""
    facts = [Fact("IsA", name, "x", name) for name in "abcd"]
    vectors = [np.array(row, np.float32) for row in ([1, 1], [2, 0], [1, 1e-7], [0, -1])]
    scored = by_cosine(facts, vectors, np.array([5, 0], np.float32))

    assert [one.fact.head for one in scored] == ["b", "c", "a", "d"]
    assert [one.score for one in scored] == [1.0, 1.0, 0.70711, 0.0]
    assert by_cosine([], [], vectors[0]) == []


def test_vectors_are_forgotten_by_use() -> None:
    """The one that was asked for the longest ago goes first."""
    vectors = FactVectors(most=2)
    one, two, three = (np.array([value], np.float32) for value in (1, 2, 3))
    vectors.put(("one",), one)
    vectors.put(("two",), two)
    assert vectors.get(("one",)) is one
    vectors.put(("three",), three)

    assert [vectors.get((name,)) for name in ("one", "two", "three")] == [one, None, three]


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ({}, {**DRAWING}),
        ({"seed": 3, "stop": ["x"]}, {**DRAWING, "seed": 3, "stop": ["x"]}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"top_p": None, "priority": 3, "time_limit_ms": 5}, {**DRAWING}),
    ],
)
def test_how_a_story_is_drawn(given_: dict[str, Any], expected: dict[str, Any]) -> None:
    """Defaults stand together: who sets one parameter of drawing sets all; those of a request are not a story's."""
    assert drawing(given_) == expected


def test_concepts_of_a_file_and_of_a_folder(tmp_path: Path) -> None:
    """A folder's files count by name, in order; what is missing or broken is told with its file."""
    (tmp_path / "a.tsv").write_text("IsA\tdog\tanimal\n")
    (tmp_path / "b.tsv").write_text("antonym\tearly\tlate\n")
    (tmp_path / "c.jsonl").write_text('{"pos": "n", "lemmas": ["dog", "hound"]}\n')
    folder, file = read_concepts(tmp_path), read_concepts(tmp_path / "a.tsv")

    assert (folder.name, file.name) == (tmp_path.name, "a")
    assert folder.graph.num_facts == 2
    assert folder.words.opposite("late").text == "early"
    assert folder.words.synonyms("dog") == ("hound",)
    assert not file.words.opposite("late").is_found
    assert folder.digest != file.digest
    (tmp_path / "b.tsv").write_text("antonym\tearly\n")
    with pytest.raises(ConceptsError, match=r"b\.tsv:1 must have 3 fields"):
        read_concepts(tmp_path)
    (tmp_path / "none").mkdir()
    for missing in (tmp_path / "none", tmp_path / "nowhere"):
        with pytest.raises(ConceptsError, match=r"at least one \*.tsv"):
            read_concepts(missing)
