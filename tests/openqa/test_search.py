"""Vectors and searches over HTTP and gRPC on tiny models: what is found, which version answers, what is refused."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from open_questions import BOB, DOCUMENTS, ENCODER, INDEXES, QUESTION, SPANS, WRITER, Open, bearer

from trilithon.api.v1 import common_pb2, retrieval_pb2
from trilithon_server.knowledge.fusion import fuse
from trilithon_server.knowledge.html import read_html
from trilithon_server.knowledge.passages import Passage, passages_of
from trilithon_server.knowledge.ranking import Ranking, best
from trilithon_server.knowledge.sparse import SparseIndex
from trilithon_server.retrieval import MAX_FOUND_BYTES

SEARCH, ENCODE = "/v1/retrieval/search", "/v1/retrieval/encode"
QUERIES = [QUESTION, "Who counts the gulls?", "snow in May"]
FLOAT32 = 1e-6  # doubles in JSON, floats in protobuf
MODES = {
    "dense": retrieval_pb2.SearchRequest.MODE_DENSE,
    "bm25": retrieval_pb2.SearchRequest.MODE_BM25,
    "hybrid": retrieval_pb2.SearchRequest.MODE_HYBRID,
}


@pytest.fixture(scope="module")
def index(served: Open) -> Iterator[str]:
    """An index of the documents."""
    assert served.create("walks")["state"] == "ready"
    yield "walks"
    served.http.delete(f"{INDEXES}/walks")


def passages() -> list[Passage]:
    """What the documents are cut into."""
    found: list[Passage] = []
    for document in DOCUMENTS:
        page = read_html(document["html"]) if "html" in document else None
        text, title = (page.text, page.title) if page else (document["text"], document.get("title", ""))
        found += passages_of(document["id"], title, text)
    return found


def vectors(served: Open, role: str, texts: list[str], **more: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    told = served.post(ENCODE, texts=texts, role=role, **more)
    return np.array([row["values"] for row in told["vectors"]], np.float32)


def rankings(served: Open, mode: str) -> list[Ranking]:
    """By brute force."""
    known = passages()
    rows = np.arange(len(known))
    by_words = SparseIndex.build([p.searched for p in known]).search(QUERIES, 100)
    if mode == "bm25":
        return by_words
    known_MH = vectors(served, "passage", [p.text for p in known], titles=[p.title for p in known])
    asked_NH = vectors(served, "query", QUERIES)
    dense = [best((known_MH.astype(float) @ q.astype(float)).astype(np.float32), 100, rows=rows) for q in asked_NH]
    return dense if mode == "dense" else [fuse(both, 100) for both in zip(dense, by_words, strict=True)]


def answered(answers: list[dict[str, Any]], version: int) -> bool:
    """Whether the last of them is of that version."""
    return bool(answers) and answers[-1]["index_version"] == version


def scores_of(answer: dict[str, Any]) -> dict[str, float]:
    """Of each question and passage."""
    return {f"{i} {hit['id']}": hit["score"] for i, hits in enumerate(answer["results"]) for hit in hits["passages"]}


def wait_until(holds: Callable[[], bool]) -> None:
    """Poll, for a minute at most."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("mode", MODES)
def test_acc_A04_a_search_is_brute_force_over_either_protocol(served: Open, index: str, mode: str) -> None:
    """
    Every way of searching finds what numpy, BM25 and their fusion find among the same passages, with the same scores,
    over HTTP and gRPC; log-probabilities of a question sum to one. Inverse seen: an index built without the titles.
    """
    told = served.post(SEARCH, index=index, queries=QUERIES, mode=mode, top_k=4)
    request = retrieval_pb2.SearchRequest(index=index, queries=QUERIES, mode=MODES[mode], top_k=4)
    message = served.retrieval.Search(request, metadata=served.metadata)
    known = passages()
    for hits, hits_of_message, ranking in zip(told["results"], message.results, rankings(served, mode), strict=True):
        found = [Passage(hit["id"], hit["title"], hit["text"]) for hit in hits["passages"]]
        scores = [hit["score"] for hit in hits["passages"]]
        total = sum(np.exp(hit["logprob"]) for hit in hits["passages"])

        assert found == [known[row] for row in ranking.rows[:4]]
        assert scores == pytest.approx(ranking.scores[:4].tolist(), abs=FLOAT32)
        assert [hit.id for hit in hits_of_message.passages] == [passage.id for passage in found]
        assert [hit.score for hit in hits_of_message.passages] == pytest.approx(scores, abs=FLOAT32)
        assert total == pytest.approx(1.0)
    assert told["index_version"] == message.index_version == 1
    assert told["model"] == message.model == ("" if mode == "bm25" else ENCODER)
    assert (told["usage"]["prompt_tokens"] == 0) == (mode == "bm25")


def test_E3_encode_is_one_by_either_protocol(served: Open) -> None:
    """Vectors, digest and usage; a title is part of a passage, and a question is read otherwise than a passage."""
    texts, titles = ["The sea.", "A mill."], ["Coast", ""]
    told = served.post(ENCODE, model=ENCODER, texts=texts, titles=titles, role="passage")
    message = served.retrieval.Encode(
        retrieval_pb2.EncodeRequest(
            meta=common_pb2.RequestMeta(model=ENCODER),
            texts=texts,
            titles=titles,
            role=retrieval_pb2.EncodeRequest.ROLE_PASSAGE,
        ),
        metadata=served.metadata,
    )
    plain = vectors(served, "passage", texts, model=ENCODER)

    assert [list(row.values) for row in message.vectors] == [
        pytest.approx(row["values"], abs=FLOAT32) for row in told["vectors"]
    ]
    assert message.model_digest == told["model_digest"] == served.http.get(f"/v1/models/{ENCODER}").json()["digest"]
    assert message.usage.prompt_tokens == told["usage"]["prompt_tokens"]
    assert not np.allclose(plain[0], told["vectors"][0]["values"], atol=1e-3)
    assert np.allclose(plain[1], told["vectors"][1]["values"], atol=FLOAT32)


def test_acc_A04_versions_swap_under_searchers_and_never_mix(served: Open) -> None:
    """
    An index is refreshed with another encoder and back while four searchers ask: none fails, each answer is wholly of
    the version that it names, and a searcher never sees an older version after a newer one. Inverse seen: the version
    read after the search rather than held during it.
    """
    served.create("swapped")
    first = served.post(SEARCH, index="swapped", queries=QUERIES)
    seen: list[list[dict[str, Any]]] = [[] for _ in range(4)]
    failed: list[str] = []
    ended = threading.Event()

    def ask(mine: list[dict[str, Any]]) -> None:
        with httpx.Client(base_url=served.server.url, headers=dict(served.metadata), timeout=60) as http:
            while not ended.is_set():
                response = http.post(SEARCH, json={"index": "swapped", "queries": QUERIES})
                if response.status_code != 200:
                    failed.append(response.text)
                    return
                mine.append(response.json())

    threads = [threading.Thread(target=ask, args=(mine,)) for mine in seen]
    for thread in threads:
        thread.start()
    expected = {1: first}
    for model in (SPANS, ENCODER):
        wait_until(lambda: bool(failed) or all(answered(mine, len(expected)) for mine in seen))
        begun = served.post(f"{INDEXES}/swapped/refresh", model=model)
        assert begun["version"] == len(expected)
        told = served.built("swapped")
        assert (told["state"], told["version"], told["model"]) == ("ready", len(expected) + 1, model)
        expected[told["version"]] = served.post(SEARCH, index="swapped", queries=QUERIES)
    wait_until(lambda: bool(failed) or all(answered(mine, 3) for mine in seen))
    ended.set()
    for thread in threads:
        thread.join()
    scores = {version: scores_of(answer) for version, answer in expected.items()}

    assert not failed
    assert scores[1] == pytest.approx(scores[3], abs=FLOAT32)
    assert scores[1] != pytest.approx(scores[2], abs=1e-3)
    for mine in seen:
        versions = [answer["index_version"] for answer in mine]
        assert versions == sorted(versions)
        assert all(scores_of(answer) == pytest.approx(scores[answer["index_version"]], abs=FLOAT32) for answer in mine)


def test_R11_an_answer_has_an_end(served: Open) -> None:
    """
    Passages of 60,000 characters: as many as may be found come over both protocols, the same; one question more is
    refused by both, and so is a larger passage when the index is built.
    """
    text = "stone " * 10_000
    line = {"id": "a", "title": "", "text": text}
    built = served.create("large", file_id=served.upload(json.dumps(line).encode()))
    larger = served.create("larger", file_id=served.upload(json.dumps({**line, "text": text * 2}).encode()))
    wanted = {"queries": ["stone"] * 64, "index": "large", "mode": "bm25"}
    told = served.post(SEARCH, **wanted)
    of_grpc = served.retrieval.Search(
        retrieval_pb2.SearchRequest(index="large", queries=wanted["queries"], mode=MODES["bm25"]),
        metadata=served.metadata,
    )

    assert 64 * len(text) < MAX_FOUND_BYTES < 4 * 64 * len(text)
    assert (built["state"], larger["state"]) == ("ready", "failed")
    assert "must have at most 65,536 bytes" in larger["error"]
    assert [[hit["text"] for hit in hits["passages"]] for hits in told["results"]] == [[text]] * 64
    assert [[hit.text for hit in hits.passages] for hits in of_grpc.results] == [[text]] * 64

    lines = b"".join(json.dumps({**line, "id": f"p{i}"}).encode() + b"\n" for i in range(4))
    served.create("several", file_id=served.upload(lines))
    error = served.refused(SEARCH, **{**wanted, "index": "several"})
    with pytest.raises(grpc.RpcError) as refused:
        served.retrieval.Search(
            retrieval_pb2.SearchRequest(index="several", queries=wanted["queries"], mode=MODES["bm25"]),
            metadata=served.metadata,
        )

    assert (error["status"], error["code"]) == (400, "search_invalid")
    assert "at most 12,582,912 bytes" in error["message"]
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_version_is_waited_for_by_name(served: Open, index: str) -> None:
    """`min_version` above what is served is refused with the version that is; at it, it is answered."""
    error = served.refused(SEARCH, index=index, queries=["sea"], min_version=2)
    with pytest.raises(grpc.RpcError) as refused:
        served.retrieval.Search(
            retrieval_pb2.SearchRequest(index=index, queries=["sea"], min_version=2), metadata=served.metadata
        )

    assert (error["status"], error["code"]) == (400, "index_version")
    assert "version 1 is served" in error["message"]
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert served.post(SEARCH, index=index, queries=["sea"], min_version=1)["index_version"] == 1


def test_acc_A04_another_encoder_is_refused(served: Open, index: str) -> None:
    """Its vectors mean nothing there, even where words alone are compared; the index's own may be named."""
    for mode in MODES:
        error = served.refused(SEARCH, index=index, queries=["sea"], model=SPANS, mode=mode)
        assert (error["status"], error["code"]) == (400, "index_encoder")
        assert ENCODER in error["message"]
    named = served.post(SEARCH, index=index, queries=["sea"], model=ENCODER)
    assert named["results"] == served.post(SEARCH, index=index, queries=["sea"])["results"]


def test_S8_indexes_are_each_tenants_own(served: Open, index: str) -> None:
    """Another tenant neither sees nor searches nor deletes one, and may use the name."""
    bob = bearer(BOB)
    path, search = f"{INDEXES}/{index}", {"index": index, "queries": ["sea"]}
    codes = [
        served.http.get(path, headers=bob).status_code,
        served.http.delete(path, headers=bob).status_code,
        served.http.post(f"{path}/refresh", json={}, headers=bob).status_code,
        served.http.post(SEARCH, json=search, headers=bob).status_code,
    ]
    listed = served.http.get(INDEXES, headers=bob).json()["indexes"]
    documents = {"name": index, "model": ENCODER, "documents": [{"id": "x", "text": "Bob's own."}]}
    created = served.http.post(INDEXES, json=documents, headers=bob)

    assert codes == [404] * 4
    assert listed == []
    assert created.status_code == 200
    assert index in [item["name"] for item in served.http.get(INDEXES).json()["indexes"]]
    assert served.post(SEARCH, **search)["results"][0]["passages"][0]["id"] != "x:0"


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        (SEARCH, {"index": "nobody", "queries": ["x"]}, None, "does not exist"),
        (SEARCH, {"index": "../up", "queries": ["x"]}, None, "must have 1 to 64 letters"),
        (SEARCH, {"index": "walks", "queries": []}, "queries", "from 1 to 64"),
        (SEARCH, {"index": "walks", "queries": ["a", " "]}, "queries[1]", "must not be empty"),
        (SEARCH, {"index": "walks", "queries": ["x" * 5000]}, "queries[0]", "at most 4096 characters"),
        (SEARCH, {"index": "walks", "queries": ["x"] * 64, "top_k": 1000}, "top_k", "at most 8192"),
        (SEARCH, {"index": "walks", "queries": ["x"], "mode": "sparse"}, "mode", "dense"),
        (SEARCH, {"index": "walks", "queries": ["x"], "temperature": 1}, "temperature", "unknown parameter"),
        (SEARCH, {"index": "walks", "queries": ["x"], "model": WRITER}, None, "cannot embed"),
        (ENCODE, {"texts": ["x"], "role": "query", "titles": ["t"]}, "titles", "only of passages"),
        (ENCODE, {"texts": ["x"], "role": "both"}, "role", "query"),
        (ENCODE, {"texts": [], "role": "query"}, "texts", "from 1 to"),
        (ENCODE, {"texts": ["x"], "role": "query", "model": "nobody"}, None, "no model"),
    ],
)
def test_R11_what_cannot_be_searched_is_told(
    served: Open, index: str, path: str, body: dict[str, Any], param: str | None, says: str
) -> None:
    """One sentence with the field."""
    error = served.refused(path, **body)

    assert 400 <= error["status"] < 500
    assert says in error["message"]
    assert param is None or error["param"] == param
