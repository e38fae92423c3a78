"""
The concept graph: facts as (relation, head, tail), looked up by what a keyword names.

    graph = ConceptGraph(read_triples(path, relations=templates()))
    found = graph.facts(["red car", "dog"])

A keyword is looked for as it stands (small letters, no article), then with its words in their base forms, then by its
head word alone (the last one, or the last before a preposition); the first that the graph holds, as head or tail of a
fact, is taken. Concepts are expected in base form, as ConceptNet-100k has them. What a concept knows is ranked once: by
how much the relation helps a story, then by how rare the other concept is, so that a hub ("person") doesn't drown what
is particular, then in file order.

Shape legend: F facts, D distinct concepts, P places (a concept in a fact), by concepts and then by rank.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trilithon_server.knowledge.lemmas import base_forms, known_forms, normalised
from trilithon_server.knowledge.templates import templates
from trilithon_server.knowledge.triples import Triple

PER_KEYWORD = 100
MOST = 200

Match = Literal["keyword", "base form", "head word", "none"]
"""What of a keyword the graph holds."""

_PREPOSITION = re.compile(r" (?:about|at|by|for|from|in|into|of|on|to|with) ")


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact, in words as `text`."""

    relation: str
    head: str
    tail: str
    text: str


@dataclass(frozen=True, slots=True)
class KeywordFacts:
    """
    What the graph says of one keyword.

    Attributes:
        concept: that stood for the keyword; empty where none does.
        match: how it was found.
        facts: best first; none where no concept was found.
    """

    keyword: str
    concept: str
    match: Match
    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """
    What the graph says of several keywords.

    Attributes:
        facts: each once: the best of every keyword in turn, then the second best.
        keywords: what was found for each, in the order given.
    """

    facts: tuple[Fact, ...]
    keywords: tuple[KeywordFacts, ...]

    @property
    def unknown(self) -> tuple[str, ...]:
        """Keywords of which the graph says nothing."""
        return tuple(found.keyword for found in self.keywords if not found.concept)


class ConceptGraph:
    """
    An index over facts; looks up in the time that it takes to write the answer.

    Args:
        triples: relations with a template; one that repeats an earlier one is left out.
    """

    def __init__(self, triples: Sequence[Triple]) -> None:
        self._triples = list(dict.fromkeys(triples))
        self._ids: dict[str, int] = {}
        ends = [
            tuple(self._ids.setdefault(normalised(end), len(self._ids)) for end in (head, tail))
            for _, head, tail in self._triples
        ]
        self._words = frozenset(word for concept in self._ids for word in concept.split(" "))
        head_F, tail_F = np.array(ends, dtype=np.int64).reshape(-1, 2).T
        prior_F = np.array([templates()[relation].prior for relation, _, _ in self._triples], dtype=np.int64)
        fact_F = np.arange(len(self._triples))
        # A fact stands under both of its concepts, and once where they are the same.
        other = tail_F != head_F
        concept_P = np.concatenate([head_F, tail_F[other]])
        other_P = np.concatenate([tail_F, head_F[other]])
        fact_P = np.concatenate([fact_F, fact_F[other]])
        degree_D = np.bincount(concept_P, minlength=len(self._ids))
        # The rarer a concept, the higher its idf: places in order of the degree are places in order of the idf.
        order = np.lexsort((fact_P, degree_D[other_P], -prior_F[fact_P], concept_P))
        self._fact_P = fact_P[order]
        self._starts_D = np.concatenate([[0], np.cumsum(degree_D)])

    @property
    def num_facts(self) -> int:
        """Facts, each counted once."""
        return len(self._triples)

    @property
    def num_concepts(self) -> int:
        """Concepts, those counted once that differ in capitals, spaces or articles only."""
        return len(self._ids)

    def degree(self, concept: str) -> int:
        """In how many facts a concept stands, by its normal form alone; 0 for one that the graph lacks."""
        place = self._ids.get(normalised(concept))
        return 0 if place is None else int(self._starts_D[place + 1] - self._starts_D[place])

    def about(self, keyword: str, *, most: int = PER_KEYWORD) -> KeywordFacts:
        """The best facts of one keyword, at most so many."""
        concept, match = self._concept(normalised(keyword))
        if match == "none":
            return KeywordFacts(keyword, "", match, ())
        place = self._ids[concept]
        start, stop = int(self._starts_D[place]), int(self._starts_D[place + 1])
        facts = (self._triples[i] for i in self._fact_P[start : min(stop, start + most)])
        return KeywordFacts(keyword, concept, match, tuple(_fact(*triple) for triple in facts))

    def facts(self, keywords: Sequence[str], *, per_keyword: int = PER_KEYWORD, most: int = MOST) -> Facts:
        """
        The best facts of several keywords, taken in turns so that none crowds out another.

        Args:
            per_keyword: facts of one keyword at most.
            most: facts in all at most.
        """
        found = tuple(self.about(keyword, most=per_keyword) for keyword in keywords)
        rounds = itertools.zip_longest(*(one.facts for one in found))
        in_turn = dict.fromkeys(fact for row in rounds for fact in row if fact is not None)
        return Facts(tuple(itertools.islice(in_turn, most)), found)

    def _concept(self, phrase: str) -> tuple[str, Match]:
        """What the graph holds of a phrase in normal form."""
        for candidate, match in self._candidates(phrase):
            if candidate in self._ids:
                return candidate, match
        return "", "none"

    def _candidates(self, phrase: str) -> Iterator[tuple[str, Match]]:
        yield phrase, "keyword"
        words = phrase.split(" ")
        if len(words) > 1:
            yield " ".join(self._base_form(word) for word in words), "base form"
        head = _PREPOSITION.split(phrase, maxsplit=1)[0].split(" ")[-1]
        for form in base_forms(head):
            yield form, "base form" if head == phrase else "head word"

    def _base_form(self, word: str) -> str:
        """The first base form that some concept holds, the word itself last."""
        forms = [form for form in known_forms(word, self._words) if form != word]
        return forms[0] if forms else word


def _fact(relation: str, head: str, tail: str) -> Fact:
    return Fact(relation, head, tail, templates()[relation].fill(head, tail))
