"""Opposites and synonyms."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from trilithon.errors import InvalidArgument
from trilithon_server.knowledge.antonyms import Opposite, PartOfSpeech, Synset, WordRelations, read_synsets
from trilithon_server.knowledge.templates import templates
from trilithon_server.knowledge.triples import Triple, read_triples
from trilithon_server.knowledge.word_lists import stop_words

SharedData = Callable[[str], Path]

TRIPLES: list[Triple] = [
    ("antonym", "light", "dark"),
    ("antonym", "heavy", "light"),
    ("antonym", "light", "shade"),
    ("hypernym", "light", "energy"),
    ("antonym", "go away", "stay"),
    ("antonym", "same", "same"),
    ("antonym", "take", "give"),
]
SYNSETS = [
    Synset("a", ("dark", "unlit")),
    Synset("a", ("heavy",)),
    Synset("n", ("shade", "shadow")),
    Synset("n", ("Dark",)),
    Synset("v", ("take", "take in", "consume")),
]


@pytest.fixture(scope="module")
def wordnet(shared_data: SharedData) -> WordRelations:
    """WordNet 3.0's."""
    triples = read_triples(shared_data("kb/wordnet30_triples.tsv"), relations=templates())
    return WordRelations(triples, read_synsets(shared_data("kb/wordnet30_glosses.jsonl")))


@pytest.mark.parametrize(
    ("word", "part", "expected"),
    [
        ("light", None, ("dark", "heavy", "shade")),
        ("Lights", None, ("dark", "heavy", "shade")),
        ("dark", None, ("light",)),
        ("light", "a", ("dark", "heavy")),
        ("light", "n", ("dark", "shade")),
        ("light", "v", ()),
        ("stay", "v", ("go away",)),
        ("took", None, ("give",)),
        ("same", None, ()),
        ("energy", None, ()),
    ],
)
def test_antonyms_go_both_ways_and_have_the_part_of_speech(
    word: str, part: PartOfSpeech | None, expected: tuple[str, ...]
) -> None:
    """
    A word's opposites in the order of the file, whichever side it stands on; words of another part of speech are none.

    Inverse check: with pairs read one way only, `dark` has none; without the parts of speech `light` has `shade` as an
    adjective too.
    """
    assert WordRelations(TRIPLES, SYNSETS).antonyms(word, part=part) == expected


def test_what_is_known_to_be_of_the_part_comes_first() -> None:
    """A word of which the glosses say nothing may be of any part of speech, but after those that are."""
    relations = WordRelations([("antonym", "up", "below"), ("antonym", "up", "down")], [Synset("r", ("down",))])

    assert relations.antonyms("up", part="r") == ("down", "below")
    assert relations.antonyms("up") == ("below", "down")


def test_synonyms_share_a_synset() -> None:
    """Without the word itself, in any form, and of the part of speech that is asked for."""
    relations = WordRelations(TRIPLES, SYNSETS)

    assert relations.synonyms("takes") == ("take in", "consume")
    assert relations.synonyms("dark", part="n") == ()
    assert relations.synonyms("unlit") == ("dark",)
    assert relations.synonyms("boat") == ()


@pytest.mark.parametrize(
    ("keyword", "expected"),
    [
        ("the light", Opposite("the light", "dark", "light", "dark")),
        ("go away", Opposite("go away", "stay", "go away", "stay")),
        ("a heavy dark stone", Opposite("a heavy dark stone", "light dark stone", "heavy", "light")),
        ("stone heavy", Opposite("stone heavy", "stone light", "heavy", "light")),
        ("Old Boat", Opposite("Old Boat", "Old Boat")),
        ("", Opposite("", "")),
    ],
)
def test_keywords_are_turned_into_their_opposites(keyword: str, expected: Opposite) -> None:
    """The whole phrase, else its first word that has an opposite; else the keyword stays and says so."""
    found = WordRelations(TRIPLES, SYNSETS).opposite(keyword)

    assert found == expected
    assert found.is_found == bool(expected.antonym)


def test_wordnet_has_the_usual_opposites(wordnet: WordRelations, shared_data: SharedData) -> None:
    """What anybody would say, and about a quarter of the content words of stories have one as they stand."""
    for word, opposite in (("happy", "unhappy"), ("day", "night"), ("hot", "cold"), ("man", "woman"), ("give", "take")):
        assert wordnet.antonyms(word)[0] == opposite
    lines = shared_data("stories/five_sentence_stories.jsonl").read_bytes().splitlines()
    words = re.findall("[a-z]+", " ".join(" ".join(json.loads(line)["sentences"]) for line in lines).lower())
    content = [word for word in words if word not in stop_words()]

    assert sum(wordnet.opposite(word).word == word for word in content) / len(content) > 0.2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"pos": "n", "lemmas": ["a"]}\n{"pos": "x", "lemmas": ["a"]}\n', r":2 pos must be one of n, v, a, r\."),
        (b'{"pos": "n", "lemmas": []}\n', r":1 lemmas must be a list of words\. Given: \[\]"),
        (b'{"pos": "n", "lemmas": [1]}\n', r":1 lemmas must be a list of words"),
        (b'{"pos": "n", "lemmas": ["a"]', r":1 must be JSON"),
        (b"[]\n", r":1 must be a JSON object"),
        (b"", r":1 is missing: there must be at least one synset"),
    ],
)
def test_broken_glosses_are_refused_with_their_line(tmp_path: Path, content: bytes, message: str) -> None:
    """The message has file, line and what is allowed."""
    path = tmp_path / "glosses.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match=f"^glosses\\.jsonl{message}") as caught:
        read_synsets(path)

    assert caught.value.code == "synsets_invalid"
