"""A conversation's next turn over HTTP and gRPC, on a tiny model: what it stands on, what is kept, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from served import Server, serving
from tiny import tiny_llama

from trilithon.api.v1 import common_pb2, dialogue_pb2, dialogue_pb2_grpc
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.http import dialogue as http_dialogue
from trilithon_server.http import stories as http_stories
from trilithon_server.knowledge.local import Choice, Document, LocalKnowledge, read_documents
from trilithon_server.tasks.dialogue_format import DialogueFormat, Turn

TARGET, OTHER = dialogue_pb2.Turn.SPEAKER_TARGET, dialogue_pb2.Turn.SPEAKER_OTHER
TALK = [{"speaker": "other", "text": "How far is the sea from the old mill?"}]
PAST = [[{"speaker": "target", "text": "I never leave the mill."}, {"speaker": "other", "text": "Why not?"}]]
MILLER = [[{"speaker": "target", "text": f"The mill has {n} wheels and {n + 1} doors."}] for n in range(20)]
DOCUMENTS = [
    {"id": "coast", "text": "The sea is two days from the old mill. Nobody counts the gulls of the coast today."},
    {"id": "town", "html": "<html><body><p>The town has a market on every Friday of the year.</p></body></html>"},
]
GREEDY = {"temperature": 0, "max_tokens": 12}
KEYS = "alice-key-0001 tenant=alice\nbob-key-000001 tenant=bob\n"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights."""
    return tiny_llama(tmp_path_factory.mktemp("dialogue") / "model", context=2048)


@pytest.fixture(scope="module")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that keeps things."""
    store = tmp_path_factory.mktemp("store")
    with serving(model_dir, "--dtype", "float32", "--set", f"server.store={store}") as started:
        yield started


def post(server: Server, body: dict[str, Any], *, path: str = "/v1/dialogue", method: str = "POST") -> httpx.Response:
    """Any JSON: httpx writes none that is no sound text."""
    headers = {"content-type": "application/json"}
    return httpx.request(method, server.url + path, content=json.dumps(body), headers=headers, timeout=60)


def answer(server: Server, **body: Any) -> dict[str, Any]:
    response = post(server, {"conversation": TALK, **GREEDY, **body})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def by(documents: list[dict[str, str]], **options: Any) -> dict[str, Any]:
    return {"conversation": TALK, "knowledge": {"documents": documents, **options}}


def written(server: Server, prompt: list[int], *, stop: str = "\n") -> str:
    """What the plain route writes behind a prompt."""
    body = {"prompt": prompt, "stop": [stop], **GREEDY}
    text: str = httpx.post(f"{server.url}/v1/generate", json=body, timeout=60).json()["choices"][0]["text"]
    return text.strip()


def test_acc_005_the_prompt_is_the_packed_sequence(server: Server, model_dir: Path) -> None:
    """
    References, chosen knowledge and the conversation are packed by the function that recipes train with: the plain
    route writes the same behind that prompt. Inverse check: the references in another order.
    """
    tokenizer = load_tokenizer(model_dir)
    told = answer(server, references=PAST, knowledge={"documents": DOCUMENTS})
    sentences = read_documents([Document(**document) for document in DOCUMENTS])
    chosen = LocalKnowledge(sentences).select([TALK[0]["text"]], Choice())
    packed = DialogueFormat(max_references=512, max_knowledge=256, max_conversation=1024).pack(
        [Turn("other", TALK[0]["text"])],
        tokenizer,
        references=[[Turn(turn["speaker"], turn["text"]) for turn in item] for item in PAST],  # type: ignore[arg-type]
        knowledge=[item.sentence.text for item in chosen],
    )

    assert [item["text"] for item in told["knowledge"]] == [item.sentence.text for item in chosen]
    assert told["knowledge"][0]["document_id"] == "coast"
    assert told["usage"]["prompt_tokens"] == len(packed.tokens)
    assert told["reference_tokens"] == packed.references > 0
    assert told["candidates"][0]["text"] == written(server, list(packed.tokens))
    assert told["candidates"][0]["mean_logprob"] < 0


def test_E3_streamed_joined_and_grpc_are_one(server: Server) -> None:
    """Deltas joined are the unstreamed text, and both protocols say the same, knowledge first."""
    body = {"conversation": TALK, **GREEDY, "references": PAST, "knowledge": {"documents": DOCUMENTS}}
    whole = answer(server, **{key: value for key, value in body.items() if key != "conversation"})
    with httpx.stream("POST", f"{server.url}/v1/dialogue", json={**body, "stream": True}, timeout=60) as response:
        lines = [line for line in response.iter_lines() if line]
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    request = dialogue_pb2.RespondRequest(
        conversation=dialogue_pb2.Conversation(turns=[dialogue_pb2.Turn(speaker=OTHER, text=TALK[0]["text"])]),
        references=[
            dialogue_pb2.Conversation(
                turns=[
                    dialogue_pb2.Turn(speaker=TARGET, text=PAST[0][0]["text"]),
                    dialogue_pb2.Turn(speaker=OTHER, text=PAST[0][1]["text"]),
                ]
            )
        ],
        knowledge=dialogue_pb2.KnowledgeOptions(
            documents=[dialogue_pb2.Document(**document) for document in DOCUMENTS], return_knowledge=True
        ),
        sampling=common_pb2.Sampling(temperature=0.0),
        stopping=common_pb2.Stopping(max_tokens=12),
    )
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = dialogue_pb2_grpc.DialogueServiceStub(channel)
        unary = stub.Respond(request)
        events = list(stub.RespondStream(request))
    deltas = [item["delta"] for name, item in zip(names, data, strict=True) if name == "delta"]

    assert names == ["knowledge"] * len(whole["knowledge"]) + ["delta"] * len(deltas) + ["finished"]
    assert "".join(deltas) == whole["candidates"][0]["text"] == data[-1]["candidates"][0]["text"]
    assert unary.candidates[0].text == whole["candidates"][0]["text"]
    assert "".join(event.delta for event in events) == whole["candidates"][0]["text"]
    assert [k.text for k in unary.knowledge] == [item["text"] for item in whole["knowledge"]]
    assert events[-1].finished.candidates[0].text == unary.candidates[0].text


def test_E3_what_a_request_leaves_out_means_the_same_by_both_protocols(server: Server) -> None:
    """
    Documents come in the place of those that are there, and the knowledge that is used is told, unless a request says
    no. Inverse seen: over gRPC documents were added, and nothing was told.
    """
    path = "/v1/knowledge/both"
    document = dialogue_pb2.Document(**DOCUMENTS[0])
    question = dialogue_pb2.Conversation(turns=[dialogue_pb2.Turn(speaker=OTHER, text=TALK[0]["text"])])
    http = [post(server, {"documents": [one]}, path=path, method="PUT").json()["documents"] for one in DOCUMENTS]
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = dialogue_pb2_grpc.DialogueServiceStub(channel)
        put = stub.PutKnowledge(dialogue_pb2.PutKnowledgeRequest(kb_id="both", documents=[document]))
        other = dialogue_pb2.Document(**DOCUMENTS[1])
        added = stub.PutKnowledge(dialogue_pb2.PutKnowledgeRequest(kb_id="both", documents=[other], replace=False))
        told = [
            stub.Respond(
                dialogue_pb2.RespondRequest(
                    conversation=question, knowledge=known, stopping=common_pb2.Stopping(max_tokens=4)
                )
            ).knowledge
            for known in (
                dialogue_pb2.KnowledgeOptions(kb_id="both"),
                dialogue_pb2.KnowledgeOptions(kb_id="both", return_knowledge=False),
            )
        ]

    assert [*http, put.documents, added.documents] == [1, 1, 1, 2]
    assert [one.text for one in told[0]] == [
        one["text"] for one in answer(server, knowledge={"kb_id": "both"})["knowledge"]
    ]
    assert len(told[0]) > 0
    assert len(told[1]) == 0


def test_acc_D08_a_stored_actor_is_the_same_actor_and_hits_the_cache(server: Server) -> None:
    """
    A stored actor answers as the same references given with the request, the second time from the prefix cache; and
    the answer doesn't change by it.
    """
    put = post(server, {"conversations": MILLER}, path="/v1/dialogue/actors/miller", method="PUT").json()
    first, second = (answer(server, actor_id="miller") for _ in range(2))
    given = answer(server, references=MILLER, bypass_cache=True)
    other = answer(server, actor_id="miller", knowledge={"documents": DOCUMENTS})

    assert put == {"actor_id": "miller", "conversations": 20, "turns": 20, "version": 1}
    assert first["candidates"] == second["candidates"] == given["candidates"]
    assert given["usage"]["cached_tokens"] == 0
    assert second["usage"]["cached_tokens"] >= second["reference_tokens"] // 16 * 16
    assert other["usage"]["cached_tokens"] >= other["reference_tokens"] // 16 * 16
    assert post(server, {"conversations": MILLER[:3]}, path="/v1/dialogue/actors/miller", method="PUT").json() == {
        "actor_id": "miller", "conversations": 3, "turns": 3, "version": 2,
    }  # fmt: skip
    assert httpx.delete(f"{server.url}/v1/dialogue/actors/miller").status_code == 200
    assert httpx.get(f"{server.url}/v1/dialogue/actors/miller").status_code == 404
    assert post(server, {"conversation": TALK, "actor_id": "miller"}).json()["error"]["code"] == "actor_not_found"


def test_acc_D08_S8_the_second_turn_is_cached_for_its_own_tenant_alone(model_dir: Path, tmp_path: Path) -> None:
    """
    Over HTTP and over gRPC the second turn of a stored actor finds the references in the cache, whichever protocol
    wrote the first; another tenant's actor of the same name, of the same references, and the same conversation finds
    nothing there, and then what is its own. The replies are all one.

    Inverse check: seen to fail with blocks whose keys leave the tenant out, and with keys that never meet.
    """
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    request = dialogue_pb2.RespondRequest(
        conversation=dialogue_pb2.Conversation(turns=[dialogue_pb2.Turn(speaker=OTHER, text=TALK[0]["text"])]),
        actor_id="miller",
        sampling=common_pb2.Sampling(temperature=0.0),
        stopping=common_pb2.Stopping(max_tokens=12),
    )
    flags = ("--dtype", "float32", "--api-keys-file", str(keys), "--set", f"server.store={tmp_path / 'store'}")
    told: list[list[tuple[str, int, int]]] = []
    with (
        serving(model_dir, *flags) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        stub = dialogue_pb2_grpc.DialogueServiceStub(channel)

        def by_http(headers: dict[str, str]) -> tuple[str, int, int]:
            asked = {"conversation": TALK, "actor_id": "miller", **GREEDY}
            found = http.post("/v1/dialogue", json=asked, headers=headers).json()
            return found["candidates"][0]["text"], found["usage"]["cached_tokens"], found["reference_tokens"]

        def by_grpc(headers: dict[str, str]) -> tuple[str, int, int]:
            found = stub.Respond(request, metadata=tuple(headers.items()))
            return found.candidates[0].text, found.usage.cached_tokens, found.reference_tokens

        for line, ways in zip(KEYS.splitlines(), ([by_http, by_grpc], [by_grpc, by_http]), strict=True):
            headers = {"authorization": f"Bearer {line.split()[0]}"}
            stored = http.put("/v1/dialogue/actors/miller", json={"conversations": MILLER}, headers=headers)
            assert stored.status_code == 200, stored.text
            told.append([way(headers) for way in (ways[0], *ways)])

    references = told[0][0][2]
    assert references >= 32
    assert {(text, count) for turns in told for text, _, count in turns} == {(told[0][0][0], references)}
    for first, *later in told:
        assert first[1] == 0
        assert all(cached >= references // 16 * 16 for _, cached, _ in later)


def test_a_stored_base_grows_and_is_replaced(server: Server) -> None:
    """Documents come beside those that are there or in their place, a document of the same id in its own place."""
    path = "/v1/knowledge/walks"
    sizes = []
    for documents, replace in (
        (DOCUMENTS[:1], True),
        (DOCUMENTS[1:], False),
        (DOCUMENTS[:1], False),
        (DOCUMENTS, True),
    ):
        told = post(server, {"documents": documents, "replace": replace}, path=path, method="PUT").json()
        sizes.append((told["documents"], told["sentences"], told["version"]))
    stored = answer(server, knowledge={"kb_id": "walks"})
    given = answer(server, knowledge={"documents": DOCUMENTS})

    assert sizes == [(1, 2, 1), (2, 3, 2), (2, 3, 3), (2, 3, 4)]
    assert stored["knowledge"] == given["knowledge"]
    assert stored["candidates"] == given["candidates"]
    assert httpx.get(server.url + path).json() == {"documents": 2, "sentences": 3, "version": 4}
    assert httpx.delete(server.url + path).status_code == 200
    assert post(server, {"conversation": TALK, "knowledge": {"kb_id": "walks"}}).status_code == 404


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({"conversation": []}, "conversation", "must hold from 1 to 1024 turns"),
        ({"conversation": [{"speaker": "me", "text": "x"}]}, "conversation[0].speaker", "'target' or 'other'"),
        ({"conversation": [{"speaker": "other", "text": " "}]}, "conversation[0].text", "must not be empty"),
        ({"conversation": TALK, "actor_id": "a", "references": PAST}, "references", "must not both be set"),
        ({"conversation": TALK, "actor_id": "nobody"}, None, "nothing is stored under"),
        ({"conversation": TALK, "knowledge": {}}, "knowledge.documents", "must be set"),
        (by([{"id": "a", "text": "x", "html": "y"}]), "knowledge.documents[0]", "text or html"),
        (
            {"conversation": TALK, "knowledge": {"documents": DOCUMENTS, "scorer": "oracle"}},
            "knowledge.scorer",
            "tfidf",
        ),
        (
            {"conversation": TALK, "knowledge": {"documents": DOCUMENTS, "scorer": "dense"}},
            None,
            "no encoder is served",
        ),
        ({"conversation": TALK, "knowledge": {"documents": DOCUMENTS * 2}}, None, "must be given once"),
        ({"conversation": TALK, "echo": True}, "echo", "unknown parameter"),
        ({"conversation": TALK, "topic": "Mills"}, "topic", "this model is not prompted by examples"),
        (by(DOCUMENTS, min_score=1e300), "knowledge.min_score", "must be a finite number of 32 bits"),
        (by([{"id": "big", "text": "a " * 600_000}]), "knowledge.documents", "bytes in all"),
        (by([{"id": "a\ud800", "text": "x"}]), "knowledge.documents[0].id", "sound Unicode"),
        (by([{"id": "a", "text": "x", "title": "\udfff"}]), "knowledge.documents[0].title", "sound Unicode"),
        (by([{"id": "a", "text": "x", "url": "\ud800"}]), "knowledge.documents[0].url", "sound Unicode"),
        ({"conversation": TALK, "max_tokens": 2047}, "max_tokens", "must leave room for a turn in the 2048 tokens"),
        (by([{"id": "deep", "html": "<div>" * 100_000}]), "knowledge.documents[0].html", "at most 100 levels"),
    ],
)
def test_R11_what_cannot_be_answered_is_told(
    server: Server, body: dict[str, Any], field: str | None, says: str
) -> None:
    """One sentence with the field; the server answers the next request."""
    response = post(server, {**({} if "echo" in body else GREEDY), **body})
    error = response.json()["error"]

    assert 400 <= response.status_code < 500
    assert says in error["message"]
    if field is not None:
        assert error["param"] == field
    assert answer(server)["candidates"]


def test_R11_a_base_takes_sound_text_alone(server: Server) -> None:
    """What cannot be written down is refused with its field. Inverse seen: an internal error, as it was written."""
    documents = [{**DOCUMENTS[0], "id": "a\ud800"}]
    response = post(server, {"documents": documents}, path="/v1/knowledge/broken", method="PUT")

    assert (response.status_code, response.json()["error"]["param"]) == (400, "documents[0].id")
    assert httpx.get(f"{server.url}/v1/knowledge/broken").status_code == 404


def test_of_several_the_best_are_told(server: Server) -> None:
    """
    `best_of` writes three, and `n` of them are left, the likeliest first, by both protocols; all are counted.
    Inverse seen: three candidates.
    """
    drawn = {"seed": 6, "temperature": 1.0}
    three = answer(server, n=3, **drawn)
    two = answer(server, n=2, best_of=3, **drawn)
    request = dialogue_pb2.RespondRequest(
        conversation=dialogue_pb2.Conversation(turns=[dialogue_pb2.Turn(speaker=OTHER, text=TALK[0]["text"])]),
        sampling=common_pb2.Sampling(temperature=1.0, seed=6, n=2, best_of=3),
        stopping=common_pb2.Stopping(max_tokens=12),
    )
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        unary = dialogue_pb2_grpc.DialogueServiceStub(channel).Respond(request)
    best = sorted(three["candidates"], key=lambda one: -one["mean_logprob"])[:2]

    assert {one["finish_reason"] for one in three["candidates"]} == {"max_tokens"}  # of one length: one order
    assert best != three["candidates"][:2]
    assert two["candidates"] == best
    assert [one.text for one in unary.candidates] == [one["text"] for one in best]
    assert two["usage"]["generated_tokens"] == three["usage"]["generated_tokens"]


def test_acc_B07_S8_ten_thousand_sentences_are_one_tenant_s(model_dir: Path, tmp_path: Path) -> None:
    """
    Of a stored base of 10,000 sentences a turn stands on the one that it asks for, by either scorer, over either
    protocol; another tenant has no such base, and with one of the same name is told what its own says.
    `benchmarks/knowledge.py` says how fast.

    Inverse check: seen to fail with a shelf that all tenants share.
    """
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    said = [f"Stone number {n} stands {n * 7} steps from the river." for n in range(10_000)]
    pages = [{"id": f"page{first}", "text": " ".join(said[first : first + 500])} for first in range(0, 10_000, 500)]
    turns = [{"speaker": "other", "text": "How far from the river is stone number 7531?"}]
    own = "Stone number 7531 fell into the sea."
    request = dialogue_pb2.RespondRequest(
        conversation=dialogue_pb2.Conversation(turns=[dialogue_pb2.Turn(speaker=OTHER, text=turns[0]["text"])]),
        knowledge=dialogue_pb2.KnowledgeOptions(kb_id="stones", top_k=1, return_knowledge=True),
        sampling=common_pb2.Sampling(temperature=0.0),
        stopping=common_pb2.Stopping(max_tokens=2),
    )
    flags = ("--dtype", "float32", "--api-keys-file", str(keys), "--set", f"server.store={tmp_path / 'store'}")
    with (
        serving(model_dir, *flags) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        alice, bob = ({"authorization": f"Bearer {line.split()[0]}"} for line in KEYS.splitlines())
        stub = dialogue_pb2_grpc.DialogueServiceStub(channel)

        def stands_on(headers: dict[str, str], scorer: str = "tfidf") -> list[str]:
            knowledge = {"kb_id": "stones", "top_k": 1, "scorer": scorer}
            body = {"conversation": turns, "knowledge": knowledge, "temperature": 0, "max_tokens": 2}
            response = http.post("/v1/dialogue", json=body, headers=headers)
            assert response.status_code == 200, response.text
            return [item["text"] for item in response.json()["knowledge"]]

        def stands_on_by_grpc(headers: dict[str, str]) -> list[str]:
            return [item.text for item in stub.Respond(request, metadata=tuple(headers.items())).knowledge]

        kept = http.put("/v1/knowledge/stones", json={"documents": pages}, headers=alice).json()
        found = [stands_on(alice), stands_on(alice, "bm25"), stands_on_by_grpc(alice)]
        body = {"conversation": turns, "knowledge": {"kb_id": "stones"}}
        refused = http.post("/v1/dialogue", json=body, headers=bob)
        with pytest.raises(grpc.RpcError) as gone:
            stands_on_by_grpc(bob)
        http.put("/v1/knowledge/stones", json={"documents": [{"id": "own", "text": own}]}, headers=bob)
        others = [stands_on(bob), stands_on_by_grpc(bob)]
        again = stands_on(alice)

    assert (kept["documents"], kept["sentences"]) == (20, 10_000)
    assert found == [[said[7531]]] * 3
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "knowledge_not_found")
    assert gone.value.code() == grpc.StatusCode.NOT_FOUND
    assert others == [[own]] * 2
    assert again == [said[7531]]


def test_nothing_found_is_no_error(server: Server) -> None:
    """Knowledge that doesn't go with the conversation is left out; the turn is written without."""
    told = answer(server, knowledge={"documents": [{"id": "x", "text": "Quarks have colours and flavours, they say."}]})

    assert told["knowledge"] == []
    assert told["candidates"] == answer(server)["candidates"]


def test_what_is_kept_counts_by_both_protocols(model_dir: Path, tmp_path: Path) -> None:
    """
    A put parses pages, so it takes one of the key's requests as a turn does, and so does what reads or forgets what is
    kept. Inverse seen: over HTTP there was no end to them.
    """
    assert [route.path for route in (*http_dialogue.ROUTES, *http_stories.ROUTES) if not route.counted] == []
    keys = tmp_path / "keys"
    keys.write_text("".join(f"{line} requests_per_minute=2\n" for line in KEYS.splitlines()))
    keys.chmod(0o600)
    flags = ("--dtype", "float32", "--api-keys-file", str(keys), "--set", f"server.store={tmp_path / 'store'}")
    alice, bob = (f"Bearer {line.split()[0]}" for line in KEYS.splitlines())
    codes = []
    with serving(model_dir, *flags) as server:
        with httpx.Client(base_url=server.url, timeout=60, headers={"authorization": alice}) as http:
            http.put("/v1/knowledge/a", json={"documents": DOCUMENTS})
            http.get("/v1/knowledge/a")
            refused = http.delete("/v1/knowledge/a")
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            stub = dialogue_pb2_grpc.DialogueServiceStub(channel)
            for _ in range(3):
                try:
                    stub.PutKnowledge(
                        dialogue_pb2.PutKnowledgeRequest(
                            kb_id="a", documents=[dialogue_pb2.Document(**document) for document in DOCUMENTS]
                        ),
                        metadata=(("authorization", bob),),
                    )
                    codes.append(grpc.StatusCode.OK)
                except grpc.RpcError as error:
                    codes.append(error.code())

    assert refused.status_code == 429
    assert codes == [grpc.StatusCode.OK, grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED]


def test_S8_what_a_tenant_keeps_is_its_own(model_dir: Path, tmp_path: Path) -> None:
    """Another tenant's actor and base of the same name are not seen; without a store nothing can be kept."""
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    store = tmp_path / "store"
    flags = ("--dtype", "float32", "--api-keys-file", str(keys), "--set", f"server.store={store}")
    with serving(model_dir, *flags) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        alice, bob = ({"authorization": f"Bearer {line.split()[0]}"} for line in KEYS.splitlines())
        for path, body in (
            ("/v1/dialogue/actors/a", {"conversations": PAST}),
            ("/v1/knowledge/a", {"documents": DOCUMENTS}),
        ):
            assert http.get(path).status_code == 401
            assert http.put(path, json=body, headers=alice).status_code == 200
            assert http.get(path, headers=alice).status_code == 200
            assert http.get(path, headers=bob).status_code == 404
            assert http.delete(path, headers=bob).status_code == 404
        asked = {"conversation": TALK, "actor_id": "a", **GREEDY}
        assert http.post("/v1/dialogue", json=asked, headers=alice).status_code == 200
        assert http.post("/v1/dialogue", json=asked, headers=bob).json()["error"]["code"] == "actor_not_found"
        names = [path.name for path in store.rglob("*") if path.is_file()]
        assert all("alice" not in name for name in names)
    with serving(model_dir, "--dtype", "float32") as server:
        error = post(server, {"conversations": PAST}, path="/v1/dialogue/actors/a", method="PUT").json()["error"]
        assert error["code"] == "store_missing"
