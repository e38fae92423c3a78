"""
How often the right sentence of knowledge is found, by each scorer of the dialogue system: for `retrieval.py sentences`.

XQuAD: the sentence of a question's answer among those of its article. BEGIN: the knowledge that a reply uses, by the
message before it, among all knowledge of the set. Topical-Chat: the section that a writer used among what they had
before them, by the last two turns. Intervals are 95 % of 2,000 draws of whole articles, messages or conversations.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from runs import data_dir

from trilithon_finetune.converters.questions import json_lines
from trilithon_server.knowledge.local import Choice, LocalKnowledge, Scorer
from trilithon_server.knowledge.passages import Passage
from trilithon_server.knowledge.sentences import Sentence
from trilithon_server.local_index import LocalEncoder

DRAWS = 2000
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Search:
    """
    Sentences to choose from, and what they are asked for.

    Attributes:
        group: what intervals draw as a whole.
        asked: each with its turns, and the rows that are right.
    """

    group: str
    texts: Sequence[str]
    asked: Sequence[tuple[Sequence[str], frozenset[int]]]


def xquad() -> Iterable[Search]:
    """An article each."""
    for article in json.loads((data_dir() / "qa/xquad_en.json").read_bytes())["data"]:
        texts: list[str] = []
        asked: list[tuple[list[str], frozenset[int]]] = []
        for paragraph in article["paragraphs"]:
            context = paragraph["context"]
            starts = [0, *(match.end() for match in _SENTENCE_ENDS.finditer(context))]
            for item in paragraph["qas"]:
                place = item["answers"][0]["answer_start"]
                right = len(texts) + sum(start <= place for start in starts) - 1
                asked.append(([item["question"]], frozenset([right])))
            texts += _SENTENCE_ENDS.split(context)
        yield Search(article["title"], texts, asked)


def begin() -> Iterable[Search]:
    """A message each; the sentences are the same."""
    rows = list(json_lines((data_dir() / "dialogue/begin_wow.jsonl").read_bytes()))
    places = {text: i for i, text in enumerate(dict.fromkeys(row["knowledge"] for row in rows))}
    pairs = dict.fromkeys((row["message"], places[row["knowledge"]]) for row in rows)
    texts = list(places)
    for message, right in pairs:
        yield Search(message, texts, [([message], frozenset([right]))])


def topical() -> Iterable[Search]:
    """A turn each, of writers who used a section, and had another one before them."""
    for row in json_lines((data_dir() / "dialogue/topical_chat_valid_freq.jsonl").read_bytes()):
        for i, turn in enumerate(row["turns"]):
            read = {name: s for name, s in row["reading"].get(turn["agent"], {}).items() if s.get("wiki")}
            used = set(turn["knowledge"]) & set(read)
            if i == 0 or not used or len(read) < 2:
                continue
            named = [(n, f"{s['entity']} {text}") for n, s in read.items() for text in _SENTENCE_ENDS.split(s["wiki"])]
            turns = [before["text"] for before in row["turns"][max(0, i - 2) : i]]
            right = frozenset(place for place, (name, _) in enumerate(named) if name in used)
            yield Search(row["id"], [text for _, text in named], [(turns, right)])


SETS = {"xquad_in_article": (xquad, (1, 5, 10)), "begin": (begin, (1, 5, 20)), "topical_chat_section": (topical, (1,))}
"""Searches, and the ranks within which a sentence counts as found."""


def found(model: Path, scorers: Sequence[Scorer], limit: int | None) -> dict[str, Any]:
    """
    Shares in percent, with intervals.

    Args:
        limit: searches of each set; None: all.
    """
    numbers: dict[str, Any] = {}
    with LocalEncoder(model, name=model.name) as encoder:
        for name, (searches, tops) in SETS.items():
            taken = list(searches())[:limit]
            vectors = _vectors(encoder, taken)
            numbers[name] = {"asked": sum(len(search.asked) for search in taken)}
            for scorer in scorers:
                numbers[name][scorer] = _shares(_ranks(taken, scorer, vectors), tops)
    return numbers


def _vectors(encoder: LocalEncoder, searches: Sequence[Search]) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Of every text once; a turn is read as a sentence is, as the server does."""
    texts = dict.fromkeys(text for search in searches for text in search.texts)
    texts |= dict.fromkeys(turn for search in searches for turns, _ in search.asked for turn in turns)
    rows = encoder.passages([Passage(str(i), "", text) for i, text in enumerate(texts)])
    return dict(zip(texts, rows, strict=True))


def _ranks(
    searches: Sequence[Search], scorer: Scorer, vectors: Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]
) -> dict[str, list[int]]:
    """By group, the rank from 0 of the best right sentence; of equal scores the earlier is better."""
    ranks: dict[str, list[int]] = defaultdict(list)
    base, known = None, None
    for search in searches:
        if base is None or search.texts is not known:  # the same sentences are prepared once
            base = LocalKnowledge(_sentences(search.texts), vectors_NH=np.array([vectors[t] for t in search.texts]))
            known = search.texts
        for turns, right in search.asked:
            last = np.array([vectors[turn] for turn in turns])
            order = np.argsort(-base.scores(turns, Choice(scorer=scorer), turn_vectors_MH=last), kind="stable")
            ranks[search.group].append(next(rank for rank, row in enumerate(order.tolist()) if row in right))
    return ranks


def _sentences(texts: Sequence[str]) -> list[Sentence]:
    return [Sentence(text, "", i, 0, len(text)) for i, text in enumerate(texts)]


def _shares(ranks: Mapping[str, Sequence[int]], tops: Sequence[int]) -> dict[str, dict[str, float]]:
    """Of each rank, the share within it and its interval."""
    told = {}
    for top in tops:
        by_group = np.array([[sum(rank < top for rank in group), len(group)] for group in ranks.values()])
        draws = np.random.default_rng(0).integers(len(by_group), size=(DRAWS, len(by_group)))
        sums = by_group[draws].sum(1)
        low, high = np.quantile(100 * sums[:, 0] / sums[:, 1], [0.025, 0.975])
        share = 100 * by_group[:, 0].sum() / by_group[:, 1].sum()
        told[f"recall_at_{top}"] = {"percent": float(share), "low": float(low), "high": float(high)}
    return told
