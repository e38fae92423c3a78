"""Indexes on a server: built and refreshed in the background, from documents and files, with progress and told ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from open_questions import ALICE, BOB, DOCUMENTS, ENCODER, INDEXES, Open, bearer
from served import serving
from tiny import tiny_bert

from trilithon.api.v1 import dialogue_pb2, retrieval_pb2, retrieval_pb2_grpc

SEARCH = "/v1/retrieval/search"


def lines(count: int) -> bytes:
    rows = ({"id": f"p{i}", "title": f"Stone {i}", "text": f"Stone {i} lies on stone {i + 1}."} for i in range(count))
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("backend", ["flat", "hnsw"])
def test_an_index_is_built_from_a_file(served: Open, backend: str) -> None:
    """Progress is told while it is built; then each passage is found under its own id, by words and by meaning."""
    name = f"stones-{backend}"
    begun = served.post(INDEXES, name=name, file_id=served.upload(lines(150)), model=ENCODER, backend=backend)
    built = served.built(name)
    by_words = served.post(SEARCH, index=name, queries=["stone 149"], mode="bm25", top_k=1)
    dense = served.post(SEARCH, index=name, queries=["stone 149"], top_k=150)

    assert (begun["state"], begun["version"], begun["error"]) == ("building", 0, "")
    assert 0 <= begun["progress"] < 1
    assert (built["state"], built["version"], built["passages"], built["progress"]) == ("ready", 1, 150, 1)
    assert (built["model"], built["backend"]) == (ENCODER, backend)
    assert by_words["results"][0]["passages"][0]["id"] in ("p149", "p148")
    ids = [hit["id"] for hit in dense["results"][0]["passages"]]
    assert sorted(ids) == sorted({f"p{i}" for i in range(150)} if backend == "flat" else set(ids))
    assert len(ids) >= 128


def test_names_are_listed_taken_and_free_again(served: Open) -> None:
    """A name is taken once; who deletes an index has it free, and nothing of it is left, over either protocol."""
    served.create("once")
    taken = served.refused(INDEXES, name="once", documents=DOCUMENTS, model=ENCODER)
    told = served.retrieval.GetIndex(retrieval_pb2.GetIndexRequest(name="once"), metadata=served.metadata)
    listed = served.retrieval.ListIndexes(retrieval_pb2.ListIndexesRequest(), metadata=served.metadata)
    of_http = served.http.get(INDEXES).json()["indexes"]
    served.retrieval.DeleteIndex(retrieval_pb2.GetIndexRequest(name="once"), metadata=served.metadata)
    gone = served.http.get(f"{INDEXES}/once")
    again = served.retrieval.CreateIndex(
        retrieval_pb2.CreateIndexRequest(
            name="once", model=ENCODER, documents=[dialogue_pb2.Document(id="d", text="Other words.")]
        ),
        metadata=served.metadata,
    )
    rebuilt = served.built("once")
    found = served.post(SEARCH, index="once", queries=["words mill"], mode="bm25")

    assert (taken["status"], taken["code"]) == (409, "name_taken")
    assert (told.state, told.version, told.passages) == (retrieval_pb2.Index.STATE_READY, 1, 5)
    assert [item.name for item in listed.indexes] == [item["name"] for item in of_http]
    assert gone.status_code == 404
    assert again.state == retrieval_pb2.Index.STATE_BUILDING
    assert (rebuilt["version"], rebuilt["passages"]) == (1, 1)
    assert [hit["id"] for hit in found["results"][0]["passages"]] == ["d:0"]


def test_R11_one_broken_index_does_not_hide_the_others(served: Open) -> None:
    """Over either protocol it is listed as failed, with what is wrong with it, until it is deleted."""
    served.create("beside")
    served.create("broken")
    (pointer,) = (served.folder / "store" / "indexes").glob("*/broken/current")
    pointer.write_text("")
    of_http = {item["name"]: item for item in served.http.get(INDEXES).json()["indexes"]}
    of_grpc = served.retrieval.ListIndexes(retrieval_pb2.ListIndexesRequest(), metadata=served.metadata)
    alone = served.http.get(f"{INDEXES}/broken").json()
    removed = served.http.delete(f"{INDEXES}/broken")
    again = served.create("broken")

    assert (of_http["beside"]["state"], of_http["broken"]["state"]) == ("ready", "failed")
    assert "current must hold a version" in of_http["broken"]["error"]
    assert alone == of_http["broken"]
    assert {item.name: item.state for item in of_grpc.indexes}["broken"] == retrieval_pb2.Index.STATE_FAILED
    assert removed.status_code == 200
    assert again["state"] == "ready"


def test_R11_a_bad_file_fails_its_build_with_every_line(served: Open) -> None:
    """The build's error has the file's id and each line; the name is there to be looked at, and can be used again."""
    file_id = served.upload(b'{"id": "a", "title": "", "text": "x"}\n{"id": "a", "title": "", "text": " "}\nnot json\n')
    told = served.create("bad", file_id=file_id)
    searched = served.refused(SEARCH, index="bad", queries=["x"], mode="bm25")
    mended = served.create("bad")

    assert (told["state"], told["version"]) == ("failed", 0)
    assert f"{file_id}:2 " in told["error"]
    assert f"{file_id}:3 " in told["error"]
    assert searched["code"] == "index_not_found"
    assert (mended["state"], mended["error"]) == ("ready", "")


def test_R11_a_file_that_vanishes_is_told(served: Open) -> None:
    """Deleted before it is asked for it is not found; deleted before the build reads it, the build says so."""
    gone = served.upload(lines(3))
    assert served.http.delete(f"/v1/files/{gone}").status_code == 200
    error = served.refused(INDEXES, name="lost", file_id=gone, model=ENCODER)
    file_id = served.upload(lines(3))
    served.post(INDEXES, name="long", file_id=served.upload(lines(3000)), model=ENCODER)
    served.post(INDEXES, name="lost", file_id=file_id, model=ENCODER)  # waits for its turn
    assert served.http.delete(f"/v1/files/{file_id}").status_code == 200
    assert served.http.get(f"{INDEXES}/lost").json()["state"] == "building"
    assert served.http.delete(f"{INDEXES}/long").status_code == 200  # ends the build on its way
    told = served.built("lost")

    assert (error["status"], error["code"]) == (404, "file_not_found")
    assert told["state"] == "failed"
    assert f"{file_id} was deleted before it was read" in told["error"]
    assert served.http.get(f"{INDEXES}/long").status_code == 404


def test_while_it_is_built_an_index_says_so(served: Open) -> None:
    """Before the first version a search is refused as too early; a second build of it is a conflict."""
    served.post(INDEXES, name="slow", file_id=served.upload(lines(3000)), model=ENCODER)
    early = served.refused(SEARCH, index="slow", queries=["x"], mode="bm25")
    taken = served.refused(INDEXES, name="slow", documents=DOCUMENTS, model=ENCODER)
    refresh = served.refused(f"{INDEXES}/slow/refresh")
    served.http.delete(f"{INDEXES}/slow")

    assert (early["status"], early["code"]) == (400, "index_building")
    assert (taken["status"], taken["code"]) == (409, "name_taken")
    assert refresh["code"] == "index_building"


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"name": "n"}, "file_id", "one of the two"),
        ({"name": "n", "documents": DOCUMENTS, "file_id": "file-1"}, "file_id", "one of the two"),
        ({"name": "n", "file_id": "file-nothing"}, None, "there is no file"),
        ({"name": "a.b", "documents": DOCUMENTS}, None, "must have 1 to 64 letters"),
        ({"name": "n", "documents": DOCUMENTS, "backend": "tree"}, "backend", "flat"),
        ({"name": "n", "documents": [{"id": "a", "text": " "}]}, None, "at least one word"),
        ({"name": "n", "documents": [DOCUMENTS[0]] * 2}, None, "must be given once"),
        ({"name": "n", "documents": [{"id": "a" * 251, "text": "x"}]}, "documents[0].id", "at most 250 bytes"),
        ({"name": "n", "documents": [{"id": "a", "text": "x\n\n" * 20_000}]}, None, "at most 16,384 passages"),
        ({"name": "n", "documents": DOCUMENTS, "model": "writer"}, None, "cannot embed"),
    ],
)
def test_R11_what_cannot_be_built_is_told(served: Open, body: dict[str, Any], param: str | None, says: str) -> None:
    """One sentence with the field; nothing is begun."""
    error = served.refused(INDEXES, **{"model": ENCODER, **body})

    assert 400 <= error["status"] < 500
    assert says in error["message"]
    assert param is None or error["param"] == param
    assert served.http.get(f"{INDEXES}/n").status_code == 404


def test_what_is_not_there_is_not_found(served: Open) -> None:
    """Nothing to see, refresh or delete."""
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/refresh")):
        response = served.http.request(method, f"{INDEXES}/nothing{path}", json={} if path else None)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "index_not_found")
    with pytest.raises(grpc.RpcError) as refused:
        served.retrieval.RefreshIndex(retrieval_pb2.RefreshIndexRequest(name="nothing"), metadata=served.metadata)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_E3_both_protocols_count_what_begins_a_build(tmp_path: Path) -> None:
    """
    Creating and refreshing take one of the key's requests; looking at indexes and deleting them does not, so that a
    build can be followed to its end. Inverse seen: over HTTP builds were free, over gRPC looking at them was not.
    """
    keys = tmp_path / "keys"
    keys.write_text(f"{ALICE} tenant=alice requests_per_minute=2\n{BOB} tenant=bob requests_per_minute=2\n")
    keys.chmod(0o600)
    flags = ("--dtype", "float32", "--api-keys-file", str(keys), "--set", f"server.store={tmp_path / 'store'}")
    with (
        serving(tiny_bert(tmp_path / ENCODER), *flags) as server,
        httpx.Client(base_url=server.url, timeout=60, headers=bearer(ALICE)) as http,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        stub = retrieval_pb2_grpc.RetrieverServiceStub(channel)
        metadata = tuple(bearer(BOB).items())
        alice = Open(server, http, stub, None, metadata, tmp_path)  # type: ignore[arg-type]  # asks no questions
        body = {"model": ENCODER, "documents": DOCUMENTS[:1]}
        alice.create("a", **body)
        alice.post(f"{INDEXES}/a/refresh")
        alice.built("a")
        looked = [http.get(INDEXES).status_code, http.get(f"{INDEXES}/a").status_code]
        refused = [alice.refused(INDEXES, name="b", **body), alice.refused(f"{INDEXES}/a/refresh")]
        looked.append(http.delete(f"{INDEXES}/a").status_code)

        documents = [dialogue_pb2.Document(id="d", text="A stone.")]
        create = retrieval_pb2.CreateIndexRequest(name="a", model=ENCODER, documents=documents)
        get, refresh = retrieval_pb2.GetIndexRequest(name="a"), retrieval_pb2.RefreshIndexRequest(name="a")
        stub.CreateIndex(create, metadata=metadata)
        while stub.GetIndex(get, metadata=metadata).state == retrieval_pb2.Index.STATE_BUILDING:
            pass
        stub.RefreshIndex(refresh, metadata=metadata)
        while stub.GetIndex(get, metadata=metadata).state == retrieval_pb2.Index.STATE_BUILDING:
            pass
        codes = []
        for call, message in ((stub.CreateIndex, create), (stub.RefreshIndex, refresh)):
            with pytest.raises(grpc.RpcError) as error:
                call(message, metadata=metadata)
            codes.append(error.value.code())
        listed = stub.ListIndexes(retrieval_pb2.ListIndexesRequest(), metadata=metadata)
        stub.DeleteIndex(get, metadata=metadata)

    assert looked == [200] * 3
    assert [error["status"] for error in refused] == [429, 429]
    assert codes == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 2
    assert [index.name for index in listed.indexes] == ["a"]


def test_R5_a_server_that_ends_forgets_what_it_was_building(tmp_path: Path) -> None:
    """
    SIGTERM in the middle of a build and of a refresh: the server ends as without them; the next one serves the version
    that was whole, and the name of the other index is free.
    """
    model, store = tiny_bert(tmp_path / ENCODER), tmp_path / "store"
    flags = ("--dtype", "float32", "--set", f"server.store={store}")
    long = [{"id": f"d{i}", "text": "a stone lies on another stone " * 500} for i in range(60)]
    with serving(model, *flags) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        served = Open(server, http, None, None, (), tmp_path)  # type: ignore[arg-type]  # HTTP alone
        before = served.create("whole", documents=long[:1])
        served.post(INDEXES, name="half", documents=long)
        served.post(f"{INDEXES}/whole/refresh")
        states = [served.http.get(f"{INDEXES}/{name}").json()["state"] for name in ("half", "whole")]
        code, output = server.stop(), server.output()
    with serving(model, *flags) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        served = Open(server, http, None, None, (), tmp_path)  # type: ignore[arg-type]  # HTTP alone
        listed = served.http.get(INDEXES).json()["indexes"]
        found = served.post(SEARCH, index="whole", queries=["stone"], top_k=1)
        again = served.create("half", documents=long[:1])

    assert states == ["building", "building"]
    assert code == 0
    assert "Traceback" not in output
    assert listed == [before]
    assert (found["index_version"], len(found["results"][0]["passages"])) == (1, 1)
    assert (again["state"], again["version"]) == ("ready", 1)
