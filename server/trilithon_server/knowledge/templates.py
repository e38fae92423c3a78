"""
Facts in words: each relation has a sentence, and a number that says how much it helps a story.

`relations.json` holds, by relation:
    prior     3: what happens, what things are for and where they are; 2: what they are and have; 1: the rest
    sentence  with {head} and {tail}
    plural    the same for several heads, where the verb differs

Concepts stand in a sentence as they stand in the file: no article is added, none is taken away, and words keep their
form. (In ConceptNet-100k they have none but the base form: "hockey is something to play on ice".) Only the verb
follows: the plural sentence is taken where the head's last word looks plural (`lemmas.is_plural`). Relations whose head
is something that happens ("play games requires ...") have no plural.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType

from trilithon_server.knowledge.lemmas import is_plural


@dataclass(frozen=True, slots=True)
class Template:
    """How a relation is said; `prior` is from 1 to 3."""

    prior: int
    sentence: str
    plural: str

    def fill(self, head: str, tail: str) -> str:
        """
        The sentence of a fact.

        >>> templates()["AtLocation"].fill("eiffel tower", "paris")
        'eiffel tower is at paris'
        """
        several = is_plural(head.rsplit(" ", 1)[-1].lower())
        # One pass over the template: braces in a concept are text.
        return (self.plural if several else self.sentence).format(head=head, tail=tail)


@cache
def templates() -> MappingProxyType[str, Template]:
    """The template of each relation that is known: those of ConceptNet-100k, and WordNet's."""
    entries = json.loads(resources.files(__package__).joinpath("relations.json").read_text("utf-8"))
    return MappingProxyType(
        {
            relation: Template(entry["prior"], entry["sentence"], entry.get("plural", entry["sentence"]))
            for relation, entry in entries.items()
        }
    )
