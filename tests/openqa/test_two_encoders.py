"""A server of two encoders, one of passages and one of questions: which of them is asked for what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from open_questions import DOCUMENTS, INDEXES, QUESTION, Asked
from served import serving
from tiny import tiny_bert, tiny_llama

from trilithon_server.catalog import Catalog, CatalogEntry
from trilithon_server.encoders import QUESTIONS_SUFFIX
from trilithon_server.engine.identity import model_digest
from trilithon_server.knowledge.index import IndexStore
from trilithon_server.knowledge.passages import read_passages
from trilithon_server.knowledge.stored import Settings
from trilithon_server.local_index import LocalEncoder, build, search
from trilithon_server.tasks.retrieval import RetrievalFormat

PASSAGES, QUESTIONS, OTHER, MADE = "passages", "questions", "other", "ft:walker"
SEARCH, ENCODE = "/v1/retrieval/search", "/v1/retrieval/encode"


@dataclass
class Two(Asked):
    """The server, and where the encoders lie."""

    http: httpx.Client
    directory: Path

    def create(self, name: str, model: str) -> dict[str, Any]:
        """A new index, when it is there."""
        self.post(INDEXES, name=name, documents=DOCUMENTS, model=model)
        return self.built(name)


def written(path: Path, format_: RetrievalFormat, *, seed: int) -> Path:
    """An encoder that reads as its format says."""
    tiny_bert(path, seed=seed)
    (path / "task.json").write_text(json.dumps(format_.task_file()), encoding="utf-8")
    return path


def pair(path: Path, *, seed: int) -> Path:
    """An encoder of passages, and in its directory that of questions."""
    passages = written(path, RetrievalFormat(reads="passages"), seed=seed)
    asks = RetrievalFormat(reads="questions", passages_by=model_digest(passages))
    written(passages / "query", asks, seed=seed + 1)
    return passages


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    """A writer, two encoders that belong together, that of questions first, and one that is neither."""
    folder = tmp_path_factory.mktemp("two")
    passages = pair(folder / PASSAGES, seed=1)
    flags = ["--dtype", "float32"]
    for key, value in {"store": "store", "catalog": "catalog", "max_hosted_models": 2}.items():
        flags += ["--set", f"server.{key}={value if isinstance(value, int) else folder / value}"]
    made = pair(folder / "made", seed=4)
    for name, directory in {MADE: made, MADE + QUESTIONS_SUFFIX: made / "query"}.items():
        entry = CatalogEntry(name=name, kind="model", base="", base_digest="", path=directory, digest=f"d-{name}")
        Catalog(folder / "catalog").register(entry)
    served = {QUESTIONS: passages / "query", PASSAGES: passages, OTHER: tiny_bert(folder / OTHER, seed=3)}
    for i, (name, directory) in enumerate(served.items(), 1):
        engine = {"name": name, "served_name": name, "model": directory, "num_threads": 1, "dtype": "float32"}
        for key, value in engine.items():
            flags += ["--set", f"engines.{i}.{key}={value}"]
    with (
        serving(tiny_llama(folder / "writer", context=2048), *flags) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        yield Two(http, passages)


@pytest.fixture(scope="module")
def index(two: Two) -> str:
    """Built by the encoder of passages."""
    assert two.create("walks", PASSAGES)["model"] == PASSAGES
    return "walks"


def test_questions_are_encoded_by_one_and_passages_by_the_other(two: Two, index: str) -> None:
    """Scores are products of the one's vectors with the other's, whichever of them a search names, or none."""
    by_one, by_other = (
        np.array([row["values"] for row in told["vectors"]])
        for told in (
            two.post(ENCODE, texts=[QUESTION], role="query", model=QUESTIONS),
            two.post(ENCODE, texts=[DOCUMENTS[2]["text"]], titles=["Mills!"], role="passage", model=PASSAGES),
        )
    )
    found = [
        two.post(SEARCH, index=index, queries=[QUESTION], **named)["results"][0]["passages"]
        for named in ({}, {"model": QUESTIONS}, {"model": PASSAGES})
    ]
    score = next(hit["score"] for hit in found[0] if hit["id"] == "mill:0")

    assert score == pytest.approx(float(by_one[0] @ by_other[0]), abs=1e-5)
    assert found[0] == found[1] == found[2]


def test_both_tell_the_digest_of_the_passages(two: Two, index: str) -> None:
    """So whoever searches by itself can compare it with an index's."""
    told = [
        two.post(ENCODE, texts=["a"], role=role, model=model)["model_digest"]
        for role, model in (("query", QUESTIONS), ("passage", PASSAGES))
    ]

    assert told == [model_digest(two.directory)] * 2
    assert two.http.get(f"{INDEXES}/{index}").json()["model_digest"] == told[0]


def test_a_folder_finds_what_the_server_finds(two: Two, index: str, tmp_path: Path) -> None:
    """The encoders in this process, of one directory, score as those behind the server."""
    lines = [{"id": hit["id"], "title": hit["title"], "text": hit["text"]} for hit in everything(two, index)]
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    store = IndexStore(tmp_path / "indexes")
    with LocalEncoder(two.directory, name="mine") as encoder:
        passages = read_passages(tmp_path / "p.jsonl", name="p.jsonl")
        build(store, "mine", passages, encoder, settings=Settings(), created=0, told=lambda done, of: None)
        (hits,) = search(store, "mine", [QUESTION], encoder, top_k=10, mode="dense").hits

    assert {hit.passage.id: pytest.approx(hit.score, abs=1e-5) for hit in hits} == {
        hit["id"]: hit["score"] for hit in everything(two, index)
    }


def everything(two: Two, index: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = two.post(SEARCH, index=index, queries=[QUESTION], top_k=10)["results"][0]["passages"]
    return found


def test_an_index_is_refreshed_by_the_one_of_passages(two: Two, index: str) -> None:
    """Whichever stands first among the served."""
    response = two.http.post(f"{INDEXES}/{index}/refresh", json={})
    assert response.status_code == 200, response.text
    told = two.built(index)

    assert (told["version"], told["model"], told["error"]) == (2, PASSAGES, "")


def test_two_that_a_job_made_are_started_when_they_are_needed(two: Two) -> None:
    """The one of questions by the other's name: no search names it, and it never was asked for before."""
    built = two.create("made", MADE)
    found = two.post(SEARCH, index="made", queries=[QUESTION])["results"][0]["passages"]
    (vector,) = two.post(ENCODE, texts=[QUESTION], role="query", model=MADE + QUESTIONS_SUFFIX)["vectors"]
    (mill,) = two.post(ENCODE, texts=[DOCUMENTS[2]["text"]], titles=["Mills!"], role="passage", model=MADE)["vectors"]

    assert (built["state"], built["model"]) == ("ready", MADE)
    assert next(hit["score"] for hit in found if hit["id"] == "mill:0") == pytest.approx(
        float(np.dot(vector["values"], mill["values"])), abs=1e-5
    )


def test_an_answer_from_documents_takes_both(two: Two) -> None:
    """The encoder of passages is named, and that of its questions is found."""
    answer = two.post(
        "/v1/openqa", question=QUESTION, documents=DOCUMENTS, retriever=PASSAGES, model="writer",
        sampling={"max_tokens": 2}, return_evidence=True,
    )  # fmt: skip

    assert len(answer["evidence"]) == 5


@pytest.mark.parametrize(
    ("path", "body", "code", "says"),
    [
        (ENCODE, {"texts": ["a"], "role": "passage", "model": QUESTIONS}, "unsupported_model", "reads questions alone"),
        (ENCODE, {"texts": ["a"], "role": "query", "model": PASSAGES}, "unsupported_model", "reads passages alone"),
        (INDEXES, {"name": "no", "documents": DOCUMENTS, "model": QUESTIONS}, "unsupported_model", "reads questions"),
        (SEARCH, {"index": "walks", "queries": ["a"], "model": OTHER}, "index_encoder", "Given: `other`"),
        (
            "/v1/openqa",
            {"question": "a", "documents": DOCUMENTS, "retriever": QUESTIONS, "model": "writer"},
            "unsupported_model",
            "reads questions alone",
        ),
    ],
)
def test_R11_the_wrong_one_is_named(
    two: Two, index: str, path: str, body: dict[str, Any], code: str, says: str
) -> None:
    """What it reads, and what was asked for."""
    error = two.refused(path, **body)

    assert error["code"] == code
    assert says in error["message"]


def test_a_turn_asks_as_a_question_does_and_sentences_answer_as_passages(two: Two) -> None:
    """
    What a conversation stands on is chosen by both encoders, though their windows are smaller than what is read of a
    text where there is room. Inverse seen: refused, as all was asked of the first encoder in 256 tokens.
    """

    def vectors(model: str, texts: list[str]) -> Any:
        data = two.post("/v1/embeddings", model=model, input=texts)["data"]
        return np.array([row["embedding"] for row in data])

    known = {"documents": DOCUMENTS, "scorer": "dense", "top_k": 50, "min_score": 0}
    count = 0
    for turn in (QUESTION, "No.", "Tea, and bread with it!", "abc", "The mill is far away."):
        asked = {"conversation": [{"speaker": "other", "text": turn}], "model": "writer", "max_tokens": 4}
        told = two.post("/v1/dialogue", **asked, knowledge=known)["knowledge"]
        if told:
            cosines = vectors(PASSAGES, [one["text"] for one in told]) @ vectors(QUESTIONS, [turn])[0]
            assert [one["score"] for one in told] == pytest.approx(cosines.tolist(), abs=1e-4)
        count += len(told)
    assert count


@pytest.mark.parametrize("scorer", ["tfidf", "dense", "hybrid"])
def test_the_end_of_a_long_turn_asks(two: Two, scorer: str) -> None:
    """No scorer refuses a turn for its length. Inverse seen: refused as an `input` that nobody sent."""
    turn = "The mill is old and far away. " * 400 + QUESTION
    known = {"documents": DOCUMENTS, "scorer": scorer, "min_score": 0}
    asked = {"conversation": [{"speaker": "other", "text": turn}], "model": "writer", "max_tokens": 4}

    assert two.post("/v1/dialogue", **asked, knowledge=known)["candidates"]
