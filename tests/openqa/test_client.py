"""`client.retrieval` and `client.openqa` against a real server: both protocols, threads and event loops."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
from knowledge.html_pages import ENTITIES, SMALL_BOMBS
from open_questions import ALICE, DOCUMENTS, ENCODER, QUESTION, SPANS, WRITER, Open

from trilithon import AsyncClient, Client, Document, Index, InvalidArgument, NotFound, TrilithonError
from trilithon.api.v1 import retrieval_pb2
from trilithon.errors import DataLoss
from trilithon_server import retrieval_answers
from trilithon_server.knowledge.index import IndexStore
from trilithon_server.knowledge.indexes import Facts
from trilithon_server.knowledge.passages import Passage

LISTED: list[Document] = [Document(**document) for document in DOCUMENTS]  # type: ignore[typeddict-item]  # as they are


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest, served: Open) -> str:
    """The server by either protocol."""
    return served.server.url if request.param == "http" else served.server.grpc_target


@pytest.fixture
def kept(served: Open) -> IndexStore:
    """The tenant's indexes on the server's disk."""
    return IndexStore(served.folder / "store" / "indexes" / hashlib.sha256(b"alice").hexdigest())


@pytest.fixture(scope="module")
def index(served: Open) -> Iterator[str]:
    """An index of the documents, by the encoder."""
    assert served.create("asked-by-both")["state"] == "ready"
    yield "asked-by-both"
    served.http.delete("/v1/retrieval/indexes/asked-by-both")


def built(client: Client, name: str) -> Index:
    """The index, when it is."""
    deadline = time.monotonic() + 60
    while (index := client.retrieval.get_index(name)).state == "building":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return index


async def test_E3_clients_of_threads_and_of_loops_are_one(url: str, served: Open) -> None:
    """Vectors, searches and answers are the same typed results."""
    with Client(url, api_key=ALICE) as client:
        begun = client.retrieval.create_index("client", documents=LISTED, model=ENCODER, backend="flat")
        index = built(client, "client")
        vectors = client.retrieval.encode(["a mill"], role="passage", titles=["Mills"], model=ENCODER)
        found = client.retrieval.search("client", [QUESTION], mode="hybrid", top_k=2, min_version=1)
        spans = client.openqa.answer(QUESTION, index="client", model=SPANS, return_evidence=True, timeout=60.0)
        written = client.openqa.answer(
            QUESTION, index="client", reader="causal", top_k=2, sampling={"max_tokens": 4, "top_k": 1}
        )
        refreshed = client.retrieval.refresh_index("client", model=SPANS)
        assert built(client, "client").version == 2
    async with AsyncClient(url, api_key=ALICE) as twin:
        assert (await twin.retrieval.refresh_index("client", model=ENCODER)).version == 2
        with Client(url, api_key=ALICE) as client:
            again = built(client, "client")
        assert (await twin.retrieval.encode(["a mill"], role="passage", titles=["Mills"], model=ENCODER)) == vectors
        assert (await twin.retrieval.search("client", [QUESTION], mode="hybrid", top_k=2)).results == found.results
        other = await twin.openqa.answer(QUESTION, index="client", model=SPANS, return_evidence=True)
        of_documents = await twin.openqa.answer(
            QUESTION, documents=LISTED, retriever=ENCODER, model=WRITER, top_k=2, sampling={"max_tokens": 4}
        )
        assert "client" in [item.name for item in await twin.retrieval.list_indexes()]
        await twin.retrieval.delete_index("client")
        with pytest.raises(NotFound) as gone:
            await twin.retrieval.get_index("client")

    assert (begun.state, index.state, index.version, index.model, index.backend) == (
        "building", "ready", 1, ENCODER, "flat",
    )  # fmt: skip
    assert again.version == 3
    assert refreshed.version == 1
    assert (len(found[0]), found.index_version) == (2, 1)
    assert spans.answer == other.answer != ""
    assert spans.evidence[0].passage.id == other.evidence[0].passage.id
    assert (spans.reader, written.reader, written.model) == ("span", "causal", WRITER)
    assert written.answer == of_documents.answer
    assert gone.value.code == "index_not_found"


def test_E3_scores_and_progress_are_one_by_both_protocols(served: Open) -> None:
    """
    To the last bit, in every mode; how far a build is too. Seen to fail with HTTP's progress left in 64 bits.
    """
    facts = Facts(name="third", state="building", manifest=None, progress=1 / 3, error="")
    assert retrieval_answers.index(facts)["progress"] == retrieval_pb2.Index(progress=1 / 3).progress
    served.create("scores")
    told = []
    for address in (served.server.url, served.server.grpc_target):
        with Client(address, api_key=ALICE) as client:
            modes: tuple[Literal["dense", "bm25", "hybrid"], ...] = ("dense", "bm25", "hybrid")
            told.append([client.retrieval.search("scores", [QUESTION], mode=mode).results for mode in modes])

    assert told[0] == told[1]
    assert all(hits[0].passages for hits in told[0])


def test_a_file_becomes_an_index(url: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Uploaded, built, searched, deleted: by the same client."""
    path = tmp_path_factory.mktemp("file") / "stones.jsonl"
    path.write_text('{"id": "a", "title": "", "text": "An upright stone."}\n')
    with Client(url, api_key=ALICE) as client:
        file = client.files.upload(path, purpose="evidence")
        client.retrieval.create_index("file", file=file.id, model=ENCODER)
        assert built(client, "file").passages == 1
        hits = client.retrieval.search("file", ["stone"], mode="bm25")[0]
        client.retrieval.delete_index("file")

    assert [(hit.id, hit.text) for hit in hits] == [("a", "An upright stone.")]


def test_refusals_are_typed(url: str) -> None:
    """A bad value is refused before or by the server; a name that no call takes is no call."""
    with Client(url, api_key=ALICE) as client:
        with pytest.raises(InvalidArgument, match="mode"):
            client.retrieval.search("x", ["y"], mode="words")  # type: ignore[arg-type]  # wrong on purpose
        with pytest.raises(InvalidArgument, match="temperature"):
            client.openqa.answer("x", documents=LISTED, mode="bm25", model=WRITER, sampling={"temperature": -1.0})
        with pytest.raises(TypeError, match="list of texts"):
            client.retrieval.search("x", "y")
        with pytest.raises(TypeError, match="timeout"):
            client.openqa.answer("x", index="y", timeoutt=3)  # type: ignore[call-arg]  # misspelt on purpose


def test_R11_nothing_found_is_an_answer_by_either_protocol(url: str, index: str) -> None:
    """Words that stand nowhere find nothing to read: no answer, no evidence, and no error."""
    with Client(url, api_key=ALICE) as client:
        for model in (SPANS, WRITER):
            told = client.openqa.answer("quarks", index=index, mode="bm25", model=model, return_evidence=True)
            assert (told.answer, told.no_answer, told.evidence, told.index_version) == ("", True, (), 1)
        assert client.retrieval.search(index, ["quarks"], mode="bm25")[0].passages == ()


@pytest.mark.parametrize(
    ("asked", "code", "field"),
    [
        ({}, "missing_parameter", "index"),
        ({"index": "nobody"}, "index_not_found", None),
        ({"index": "../up"}, "index_invalid", None),
        ({"index": "asked-by-both", "documents": LISTED}, "missing_parameter", "index"),
        ({"index": "asked-by-both", "top_k": 51}, "invalid_value", "top_k"),
        ({"index": "asked-by-both", "min_version": 9}, "index_version", None),
        ({"index": "asked-by-both", "model": SPANS, "reader": "causal"}, "unsupported_model", None),
        ({"index": "asked-by-both", "model": ENCODER}, "unsupported_model", None),
        ({"documents": LISTED, "min_version": 1}, "invalid_value", "min_version"),
        ({"documents": LISTED * 2}, "knowledge_invalid", None),
        ({"documents": [{"id": "a", "text": "x", "html": "y"}]}, "missing_parameter", "documents[0]"),
        ({"documents": [{"id": "a", "html": "<p> </p>"}]}, "passages_invalid", None),
    ],
)
def test_R11_a_refusal_is_the_same_by_either_protocol(
    url: str, index: str, asked: dict[str, Any], code: str, field: str | None
) -> None:
    """The same code for the same field."""
    with Client(url, api_key=ALICE) as client, pytest.raises(TrilithonError) as refused:
        client.openqa.answer(QUESTION, **asked)

    assert (refused.value.code, refused.value.param) == (code, field)


@pytest.mark.parametrize("name", SMALL_BOMBS)
def test_R11_a_page_that_is_a_bomb_is_its_senders_error(url: str, name: str) -> None:
    """Refused when it is asked of; of an index it is the build that says so. The next question is answered."""
    html, code = SMALL_BOMBS[name]
    documents: list[Document] = [{"id": "a", "text": "A mill."}, {"id": "b", "html": html}]
    with Client(url, api_key=ALICE) as client:
        with pytest.raises(InvalidArgument) as asked:
            client.openqa.answer(QUESTION, documents=documents, mode="bm25", model=SPANS)
        with pytest.raises(InvalidArgument) as begun:
            client.retrieval.create_index("bombs", documents=documents, model=ENCODER)
        with pytest.raises(NotFound):
            client.retrieval.get_index("bombs")
        assert client.openqa.answer(QUESTION, documents=LISTED, mode="bm25", model=SPANS).reader == "span"

    for refused in (asked, begun):
        assert refused.value.code == code
        assert refused.value.param == ("documents" if code == "invalid_value" else "documents[1].html")


def test_R11_what_a_page_declares_is_not_expanded(url: str) -> None:
    """A page with entities that stand for each other has the words that stand there."""
    with Client(url, api_key=ALICE) as client:
        told = client.openqa.answer(
            "mill", documents=[{"id": "a", "html": ENTITIES}], mode="bm25", model=SPANS, return_evidence=True
        )
    texts = {place.passage.text for place in told.evidence}

    assert texts == {"The mill has stood by the river since 1820.", "&e9;"}
    assert {place.passage.title for place in told.evidence} == {"The river mill"}


def test_acc_A04_the_index_of_another_encoder_is_refused_by_its_manifest(
    url: str, index: str, kept: IndexStore
) -> None:
    """
    One that the caller names instead of the index's own; and an index whose encoder nobody serves, which words alone
    can still search. Inverse seen: the digest is not compared.
    """
    known = kept.manifest(index)
    encoder = known.encoder.model_copy(update={"model_digest": "0" * len(known.encoder.model_digest)})
    passages = [Passage("a", "", "The sea is two days from the old mill."), Passage("b", "", "A mill grinds grain.")]
    kept.publish("strange", passages, np.eye(2, known.dim, dtype=np.float32), encoder=encoder, created=1)
    refusals: list[TrilithonError] = []
    with Client(url, api_key=ALICE) as client:
        for mode in ("dense", "hybrid", "bm25"):
            for name, named in ((index, SPANS), ("strange", ENCODER), ("strange", None)):
                if (mode, named) == ("bm25", None):
                    continue
                model = {} if named is None else {"model": named}
                with pytest.raises(TrilithonError) as searched:
                    client.retrieval.search(name, ["sea"], mode=mode, **model)
                with pytest.raises(TrilithonError) as asked:
                    client.openqa.answer(QUESTION, index=name, mode=mode, retriever=named, model=SPANS)
                refusals += [searched.value, asked.value]
        by_words = client.retrieval.search("strange", ["sea"], mode="bm25")[0]
        answered = client.openqa.answer(QUESTION, index="strange", mode="bm25", model=SPANS, return_evidence=True)
        client.retrieval.delete_index("strange")

    assert {(type(error).__name__, error.code) for error in refusals} == {("FailedPrecondition", "index_encoder")}
    assert len(refusals) == 16
    assert all(ENCODER in error.message for error in refusals)
    assert [hit.id for hit in by_words] == ["a"]
    assert answered.evidence[0].passage.id == "a"


@pytest.mark.parametrize("file", ["vectors.npy", "passages.jsonl", "manifest.json"])
def test_R11_a_file_that_vanishes_under_the_server_is_told(url: str, kept: IndexStore, served: Open, file: str) -> None:
    """
    An index that is open is searched on; one that is not yet says which file is missing, and no path of the server's.
    It can be deleted and built again, and other indexes are not touched.
    """
    with Client(url, api_key=ALICE) as client:
        client.retrieval.create_index("open", documents=LISTED, model=ENCODER)
        assert built(client, "open").state == "ready"
        before = client.retrieval.search("open", [QUESTION]).results
        manifest = kept.manifest("open")
        kept.publish(
            "shut",
            [Passage("a", "", "The sea is far.")],
            np.eye(1, manifest.dim, dtype=np.float32),
            encoder=manifest.encoder,
            created=1,
        )
        for name in ("open", "shut"):
            (kept.root / name / "v00000001" / file).unlink()
        after = client.retrieval.search("open", [QUESTION]).results
        with pytest.raises(DataLoss) as searched:
            client.retrieval.search("shut", ["sea"])
        with pytest.raises(DataLoss) as asked:
            client.openqa.answer(QUESTION, index="shut", mode="bm25", model=SPANS)
        for name in ("open", "shut"):
            client.retrieval.delete_index(name)
        client.retrieval.create_index("shut", documents=LISTED, model=ENCODER)
        assert built(client, "shut").state == "ready"
        again = client.retrieval.search("shut", [QUESTION]).results
        client.retrieval.delete_index("shut")

    assert before == after
    assert [hit.id for hit in again[0].passages] == [hit.id for hit in before[0].passages] != []
    for error in (searched.value, asked.value):
        assert error.code == "index_corrupt"
        assert f'index "shut" version 1 {file} cannot be read' in error.message.replace(": ", " ")
        assert str(served.folder) not in str(error)
