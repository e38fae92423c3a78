"""`client.retrieval` and `client.openqa` against a real server: both protocols, threads and event loops."""

from __future__ import annotations

import time
from typing import Literal

import pytest
from open_questions import ALICE, DOCUMENTS, ENCODER, QUESTION, SPANS, WRITER, Open

from trilithon import AsyncClient, Client, Document, Index, InvalidArgument, NotFound
from trilithon.api.v1 import retrieval_pb2
from trilithon_server import retrieval_answers
from trilithon_server.knowledge.indexes import Facts

LISTED: list[Document] = [Document(**document) for document in DOCUMENTS]  # type: ignore[typeddict-item]  # as they are


@pytest.fixture(params=["http", "grpc"])
def url(request: pytest.FixtureRequest, served: Open) -> str:
    """The server by either protocol."""
    return served.server.url if request.param == "http" else served.server.grpc_target


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
