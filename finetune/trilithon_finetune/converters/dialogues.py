"""
Published conversations as rows of the tasks `dialogue` and `grounded_dialogue`: Persona-Chat, Topical-Chat, BEGIN.

What a set says of a speaker becomes that speaker's references, what it says of a turn becomes its knowledge. Source of
the rows' shape: arXiv 2005.06114, 2010.10150.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trilithon_finetune.converters.questions import json_lines

Row = dict[str, Any]

CONTEXT_TURNS = 6
"""Turns before the one that is learned, in rows of single turns."""

ATTRIBUTABLE = "Fully attributable"

_SPEAKER = re.compile(r"^\W*User ([12])\s*:\s*")


def persona_rows(document: bytes, dropped: Counter[str]) -> Iterator[tuple[str, Row]]:
    """
    A row for each side of each dialogue: what the set says of a person is one earlier conversation of that person.

    A line without a speaker goes on with the turn before; before the first turn it is left out. Turns of one speaker in
    succession stay as they are.

    Args:
        dropped: counts lines that were left out or joined, under the reason.
    Yields:
        The dialogue, which must not stand on both sides of a split, and the row.
    """
    for number, dialogue in enumerate(json_lines(document)):
        turns: list[dict[str, str]] = []
        for line in dialogue["turns"]:
            match = _SPEAKER.match(line)
            if match is not None:
                turns.append({"author": f"u{match[1]}", "text": line[match.end() :].strip()})
            elif turns:
                dropped["lines that go on with the turn before (joined)"] += 1
                turns[-1]["text"] = f"{turns[-1]['text']} {line.strip()}".strip()
            else:
                dropped["lines before the first turn"] += 1
        dropped["turns without words"] += sum(not turn["text"] for turn in turns)
        turns = [turn for turn in turns if turn["text"]]
        for author in sorted({turn["author"] for turn in turns}):
            persona = [text for text in dialogue[f"user{author[1]}_persona"] if text.strip()]
            refs = [[{"author": author, "text": text} for text in persona]] if persona else []
            yield str(number), {"actor": author, "target": turns, "refs": refs}


def topical_rows(document: bytes, dropped: Counter[str]) -> Iterator[tuple[str, Row]]:
    """
    A row for each turn that names a section of its speaker's reading set: the sentences of those sections that go with
    the turns before it are its knowledge.

    Args:
        dropped: counts turns that were left out, under the reason.
    Yields:
        The conversation, which must not stand on both sides of a split, and the row.
    """
    for conversation in json_lines(document):
        turns = [{"author": turn["agent"], "text": turn["text"].strip()} for turn in conversation["turns"]]
        for at, turn in enumerate(conversation["turns"]):
            sections = conversation["reading"].get(turn["agent"], {})
            texts = {
                name: section for name, section in sections.items() if name in turn["knowledge"] and section.get("wiki")
            }
            before = [item for item in turns[max(0, at - CONTEXT_TURNS) : at] if item["text"]]
            if not turns[at]["text"]:
                dropped["turns without words"] += 1
            elif not texts:
                dropped["turns whose text was not in the reading set"] += 1
            elif not before:
                dropped["turns that nothing stands before"] += 1
            else:
                knowledge = _knowledge(texts, [item["text"] for item in before])
                yield (
                    conversation["id"],
                    {"actor": turn["agent"], "target": [*before, turns[at]], "knowledge": knowledge},
                )


def _knowledge(sections: Mapping[str, Mapping[str, Any]], before: Sequence[str]) -> list[dict[str, Any]]:
    from trilithon_finetune.data.oracle_knowledge import knowledge_entries  # readers of pages: no other set has any
    from trilithon_server.knowledge.local import Choice, Document, LocalKnowledge, read_documents

    documents = [Document(id=name, title=section["entity"], text=section["wiki"]) for name, section in sections.items()]
    chosen = LocalKnowledge(read_documents(documents)).select(before, Choice())
    return list(knowledge_entries(chosen, selected_by="tfidf"))


def begin_rows(document: bytes, dropped: Counter[str]) -> Iterator[tuple[str, Row]]:
    """
    A row for each reply that says what its knowledge says, and nothing else, by a person's judgement.

    Args:
        dropped: counts replies that were left out, by their label.
    Yields:
        The knowledge, which must not stand on both sides of a split, and the row.
    """
    for row in json_lines(document):
        if row["label"] != ATTRIBUTABLE:
            dropped[f"replies that are {row['label'].lower()}"] += 1
        elif not (row["message"].strip() and row["response"].strip()):
            dropped["turns without words"] += 1
        else:
            message, reply = row["message"].strip(), row["response"].strip()
            target = [{"author": "u2", "text": message}, {"author": "u1", "text": reply}]
            yield row["knowledge"], {"actor": "u1", "target": target, "knowledge": [{"text": row["knowledge"]}]}
