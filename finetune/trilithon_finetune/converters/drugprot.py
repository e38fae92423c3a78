"""
DrugProt as JSON lines: an abstract with its chemicals, its genes, and the relations between them.

Every chemical and gene of one sentence that do not overlap make a row of the task `relation`. The classes are
DrugProt's own thirteen, or the five groups on which ChemProt is judged; what is no relation is `false`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trilithon_finetune.converters.pubtator import Mention, tagged_sentences
from trilithon_server.tasks.relations import RelationFormat, sentence_of

Labels = Literal["chemprot5", "drugprot13"]

NEGATIVE = "false"

CHEMPROT5: Mapping[str, str] = {
    "INDIRECT-UPREGULATOR": "CPR:3",
    "ACTIVATOR": "CPR:3",
    "INHIBITOR": "CPR:4",
    "INDIRECT-DOWNREGULATOR": "CPR:4",
    "AGONIST": "CPR:5",
    "AGONIST-ACTIVATOR": "CPR:5",
    "AGONIST-INHIBITOR": "CPR:5",
    "ANTAGONIST": "CPR:6",
    "SUBSTRATE": "CPR:9",
    "PRODUCT-OF": "CPR:9",
    "SUBSTRATE_PRODUCT-OF": "CPR:9",
}
"""Group of a DrugProt class; DIRECT-REGULATOR and PART-OF, which are in none, count as no relation."""


@dataclass(frozen=True, slots=True)
class Abstract:
    """A document: chemicals and genes by their id, and the classes of related pairs (chemical, gene) in file order."""

    text: str
    mentions: Mapping[str, Mention]
    relations: Mapping[tuple[str, str], tuple[str, ...]]


def read_drugprot(document: bytes) -> list[Abstract]:
    """
    Abstracts in the order of the file; the two kinds of genes (GENE-Y, GENE-N) are both GENE.

    Raises:
        ValueError, KeyError: not JSON lines of this form, or a mention is not where it is said to be.
    """
    abstracts = []
    for number, line in enumerate(document.decode("utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        row = json.loads(line)
        mentions = {}
        for item in row["entities"]:
            kind = "GENE" if item["type"].startswith("GENE") else item["type"]
            mention = Mention(item["start"], item["end"], kind, item["text"])
            if row["text"][mention.start : mention.end] != mention.text:
                raise ValueError(f"line {number}: entity {item['id']} is not at {mention.start} to {mention.end}.")
            mentions[item["id"]] = mention
        relations: dict[tuple[str, str], tuple[str, ...]] = {}
        for item in row["relations"]:
            roles = dict(item["args"])
            pair = roles["head"], roles["tail"]
            relations[pair] = (*relations.get(pair, ()), item["type"])
        abstracts.append(Abstract(row["text"], mentions, relations))
    return abstracts


def relation_rows(abstract: Abstract, labels: Labels) -> list[dict[str, Any]]:
    """
    Rows `{"text", "a", "b", "label"}` of all candidates, each with its sentence as text.

    A pair with several relations takes the first that has a class among the labels.
    """
    names = {id(mention): name for name, mention in abstract.mentions.items()}
    entities = list(abstract.mentions.values())
    format_ = RelationFormat(labels=(), markers={})
    rows = []
    for a, b in format_.candidates(abstract.text, entities):
        classes = abstract.relations.get((names[id(a)], names[id(b)]), ())
        mapped = [CHEMPROT5.get(name) if labels == "chemprot5" else name for name in classes]
        label = next((name for name in mapped if name is not None), NEGATIVE)
        begin, stop = sentence_of(abstract.text, a, b)
        rows.append(
            {
                "text": abstract.text[begin:stop],
                "a": {"start": a.start - begin, "end": a.end - begin, "type": a.type},
                "b": {"start": b.start - begin, "end": b.end - begin, "type": b.type},
                "label": label,
            }
        )
    return rows


def tagging_rows(abstract: Abstract) -> list[dict[str, Any]]:
    """Rows of the task `ner`: the chemicals and genes of each sentence."""
    return tagged_sentences(abstract.text, list(abstract.mentions.values()))
