"""What the retrieval tests share: an encoder that only has a name, small indexes, questions with their passages."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trilithon_server.knowledge.dense import Backend
from trilithon_server.knowledge.index import IndexStore
from trilithon_server.knowledge.manifest import Encoder
from trilithon_server.knowledge.passages import Passage
from trilithon_server.knowledge.stored import Settings
from trilithon_server.knowledge.version import IndexVersion, Queries
from trilithon_server.knowledge.words import chunks

SharedData = Callable[[str], Path]

WIDTH = 8
COUNT = 5

ENCODER = Encoder(model_digest="a1", pooling="mean", normalize=True, passage_format="{title}. {text}", score_scale=20.0)


def random_vectors(count: int, width: int, *, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)


def told(version: int, count: int = 5) -> list[Passage]:
    """Passages that say of which version they are."""
    return [Passage(f"p{i}", "Tales", f"number{i} told in version{version}") for i in range(count)]


def publish(root: Path, version: int, *, name: str = "wiki", backend: Backend = "flat") -> int:
    """Publish passages that say of which version they are; their vectors are other ones as well."""
    vectors = random_vectors(COUNT, WIDTH, seed=version)
    return IndexStore(root).publish(
        name, told(version, COUNT), vectors, encoder=ENCODER, created=1_700_000_000, settings=Settings(backend=backend)
    )


def opened(root: Path, name: str = "wiki") -> IndexVersion:
    return IndexStore(root).open(name, model_digest="a1")


def is_whole(index: IndexVersion) -> bool:
    """Whether passages, vectors and words are those of one version, and each finds its own."""
    vectors = random_vectors(COUNT, WIDTH, seed=index.version)
    passages = told(index.version, COUNT)
    queries = Queries(texts=[p.text for p in passages], vectors_NH=vectors / 100, model_digest="a1")
    by_words = index.search(queries, 1, mode="bm25")
    scores = [hit.score for hits in index.search(queries, COUNT, mode="dense") for hit in hits if hit.row == 0]
    return (
        [index.passage(row) for row in range(COUNT)] == passages
        and [hits[0].passage for hits in by_words] == passages
        and np.allclose(scores, vectors @ vectors[0] / 100, atol=1e-4)
    )


@dataclass(frozen=True)
class Questions:
    """
    A question set over passages.

    Attributes:
        passages: title and text.
        questions: each with its answers and the row of its own passage.
    """

    passages: list[tuple[str, str]]
    questions: list[tuple[str, list[str], int]]

    def cut(self, words: int) -> list[tuple[str, str]]:
        """The passages in pieces of so many words, anew at each; 0 leaves them whole."""
        if not words:
            return self.passages
        return [(title, piece.text) for title, text in self.passages for piece in chunks(text, words)]


def read_xquad(shared_data: SharedData) -> Questions:
    """Titles are names of Wikipedia pages, which write spaces as `_`."""
    passages: list[tuple[str, str]] = []
    questions: list[tuple[str, list[str], int]] = []
    for article in json.loads(shared_data("qa/xquad_en.json").read_bytes())["data"]:
        for paragraph in article["paragraphs"]:
            for item in paragraph["qas"]:
                answers = [answer["text"] for answer in item["answers"]]
                questions.append((item["question"], answers, len(passages)))
            passages.append((article["title"].replace("_", " "), paragraph["context"]))
    return Questions(passages, questions)


def read_qed(shared_data: SharedData) -> Questions:
    """Several questions share a paragraph."""
    rows: dict[tuple[str, str], int] = {}
    questions: list[tuple[str, list[str], int]] = []
    with shared_data("qa/qed_nq_dev.jsonl").open(encoding="utf-8", newline="\n") as file:
        for line in file:
            item = json.loads(line)
            row = rows.setdefault((item["title"], item["context"]), len(rows))
            questions.append((item["question"], [answer["text"] for answer in item["answers"]], row))
    return Questions(list(rows), questions)
