"""Open questions on tiny models: what is answered, what it stands on, what is told when there is no answer."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from open_questions import DOCUMENTS, ENCODER, INDEXES, INDIVIDUAL, JOINT, QUESTION, SPANS, WRITER, Open
from served import serving
from tiny import tiny_llama
from under_load import wait_until

from trilithon import Client
from trilithon.api.v1 import common_pb2, dialogue_pb2, openqa_pb2
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server import LLM, SamplingParams
from trilithon_server.tasks.answer_format import read_answer
from trilithon_server.tasks.reading import answer_tokens, log_sum, pack

ASK, SEARCH = "/v1/openqa", "/v1/retrieval/search"
SHORT = {"max_tokens": 6}
FLOAT32 = 1e-5


@pytest.fixture(scope="module")
def index(served: Open) -> Iterator[str]:
    """An index of the documents."""
    assert served.create("asked")["state"] == "ready"
    yield "asked"
    served.http.delete(f"{INDEXES}/asked")


def search(served: Open, index: str, **more: Any) -> list[dict[str, Any]]:
    hits: list[dict[str, Any]] = served.post(SEARCH, index=index, queries=[QUESTION], top_k=3, **more)["results"][0][
        "passages"
    ]
    return hits


def test_acc_A12_a_span_is_the_best_of_its_passages(served: Open, index: str) -> None:
    """
    The answer is the span with the highest log p(z|q) + log p(span) of those that the extraction route marks in each
    passage alone; a passage that by the model's own threshold holds none is left out. Inverse seen: a threshold
    that is not looked at.
    """
    told = served.post(ASK, model=SPANS, index=index, question=QUESTION, top_k=3, return_evidence=True)
    expected = []
    for hit, place in zip(search(served, index), told["evidence"], strict=True):
        alone = served.post("/v1/extract/spans", model=SPANS, question=QUESTION, contexts=[hit["text"]], n_best=1)
        span = alone["answers"][0]
        assert place["passage"] == hit
        assert place["retrieval_logprob"] == hit["logprob"]
        if alone["no_answer"]:
            assert (place["candidate"], place["answer_logprob"], place["end"]) == ("", None, 0)
            continue
        assert hit["text"][place["start"] : place["end"]] == place["candidate"] == span["text"]
        assert place["answer_logprob"] == pytest.approx(math.log(span["probability"]), abs=FLOAT32)
        expected.append((hit["logprob"] + place["answer_logprob"], span["text"]))

    assert 0 < len(expected) < 3
    assert (told["logprob"], told["answer"]) == max(expected)
    assert (told["reader"], told["model"], told["no_answer"], told["finish_reason"]) == ("span", SPANS, False, None)
    assert told["index_version"] == 1


def test_acc_A12_a_written_answer_is_weighed_over_all_passages(served: Open, index: str) -> None:
    """
    Each passage's answer is what the plain route writes behind the packed prompt, and the best has the highest sum of
    p(z|q) p(a|q, z) by the scoring route's log-probabilities. Inverse seen: the likeliest passage in place of the sum.
    """
    tokenizer = load_tokenizer(served.folder / WRITER)
    newline = tokenizer.encode("\n", add_special_tokens=False)
    told = served.post(ASK, model=WRITER, index=index, question=QUESTION, top_k=3, sampling=SHORT, return_evidence=True)
    hits = search(served, index)
    prompts = [list(pack(QUESTION, hit["title"], hit["text"], tokenizer, room=1000).tokens) for hit in hits]
    written = []
    for prompt in prompts:
        body = {"model": WRITER, "prompt": prompt, "stop": ["\n"], "temperature": 0, **SHORT}
        written.append(read_answer(served.post("/v1/generate", **body)["choices"][0]["text"]))
    sums: dict[str, float] = {}
    for text in dict.fromkeys(filter(None, written)):
        ends = [[*answer_tokens(text, tokenizer), end] for end in (*tokenizer.eos_ids, *newline)]
        items = [{"context": prompt, "continuation_tokens": ends} for prompt in prompts]
        told_scores = served.post("/v1/score", model=WRITER, items=items)["items"]
        scores = [log_sum(item["sum_logprob"]) for item in told_scores]
        sums[text] = sum(math.exp(hit["logprob"] + score) for hit, score in zip(hits, scores, strict=True))
        if text == told["answer"]:
            assert [place["answer_logprob"] for place in told["evidence"]] == pytest.approx(scores, abs=FLOAT32)

    assert [place["candidate"] for place in told["evidence"]] == written
    assert len(sums) > 1
    assert told["answer"] == max(sums, key=sums.__getitem__)
    assert told["logprob"] == pytest.approx(math.log(max(sums.values())), abs=1e-4)
    assert told["reader"] == "causal"
    assert told["usage"]["generated_tokens"] > 0


@pytest.mark.parametrize("model", [SPANS, WRITER, JOINT, INDIVIDUAL])
def test_E3_both_protocols_and_documents_in_place_of_their_index_are_one(served: Open, index: str, model: str) -> None:
    """gRPC says what HTTP says; documents given with the question answer it as their index does."""
    drawn = {"sampling": SHORT} if model == WRITER else {}
    body = {"model": model, "question": QUESTION, "top_k": 3, "return_evidence": True, **drawn}
    of_index = served.post(ASK, index=index, **body)
    of_documents = served.post(ASK, documents=DOCUMENTS, retriever=ENCODER, **body)
    message = served.openqa.Answer(
        openqa_pb2.AnswerRequest(
            meta=common_pb2.RequestMeta(model=model),
            question=QUESTION,
            documents=[dialogue_pb2.Document(**document) for document in DOCUMENTS],
            retriever=ENCODER,
            top_k=3,
            stopping=common_pb2.Stopping(max_tokens=6) if model == WRITER else None,
            return_evidence=True,
        ),
        metadata=served.metadata,
    )

    assert of_documents["answer"] == of_index["answer"] == message.answer != ""
    assert of_documents["logprob"] == pytest.approx(of_index["logprob"], abs=FLOAT32)
    assert message.logprob == pytest.approx(of_index["logprob"], abs=FLOAT32)
    for a, b, c in zip(of_index["evidence"], of_documents["evidence"], message.evidence, strict=True):
        assert a["passage"]["id"] == b["passage"]["id"] == c.passage.id
        assert (a["candidate"], a["start"], a["end"]) == (c.candidate, c.start, c.end)
        assert c.HasField("answer_logprob") == (a["answer_logprob"] is not None)
        assert c.retrieval_logprob == pytest.approx(a["retrieval_logprob"], abs=FLOAT32)
    assert (of_index["index_version"], of_documents["index_version"], message.index_version) == (1, 0, 0)
    assert of_documents["usage"]["prompt_tokens"] > of_index["usage"]["prompt_tokens"]
    assert served.post(ASK, index=index, **{**body, "return_evidence": False})["evidence"] == []


def test_nothing_found_is_an_answer_too(served: Open, index: str) -> None:
    """Words that stand nowhere find nothing to read; passages that hold no answer are told as such."""
    for where in ({"index": index}, {"documents": DOCUMENTS}):
        for model in (SPANS, WRITER):
            told = served.post(ASK, model=model, question="quarks", mode="bm25", return_evidence=True, **where)
            assert (told["answer"], told["logprob"], told["no_answer"], told["evidence"]) == ("", 0.0, True, [])
            assert told["usage"]["prompt_tokens"] == 0
    texts = [hit["text"] for hit in search(served, index)]
    found = [
        served.post(ASK, model=SPANS, documents=[{"id": "d", "text": text}], retriever=ENCODER, question=QUESTION)
        for text in texts
    ]
    assert {told["no_answer"] for told in found} == {True, False}
    assert all(told["no_answer"] == (told["answer"] == "") == (told["logprob"] == 0) for told in found)
    # A first character that stops at once: nothing is written behind any passage.
    told = served.post(ASK, model=WRITER, index=index, question=QUESTION, top_k=1, return_evidence=True, sampling=SHORT)
    stop = [character for character in told["answer"] + " " if character]
    silent = served.post(
        ASK, model=WRITER, index=index, question=QUESTION, top_k=1, sampling={**SHORT, "stop": stop[:16]}
    )
    assert (silent["answer"], silent["no_answer"]) == ("", True)


def test_acc_A12_a_refresh_fails_no_running_answer(served: Open) -> None:
    """
    The index is refreshed with another encoder and back while all kinds of readers answer: none fails, and each stands
    on what the version that it names finds. Every version answers each of them before it is replaced. Inverse seen: an
    index that is not served while it is refreshed; the served version read anew after the search.
    """
    served.create("busy")
    seen: dict[str, list[dict[str, Any]]] = {model: [] for model in (SPANS, WRITER, JOINT, INDIVIDUAL)}
    failed: list[str] = []
    ended = threading.Event()

    def ask(model: str) -> None:
        body = {"model": model, "index": "busy", "question": QUESTION, "top_k": 3, "return_evidence": True}
        drawn = {} if model == SPANS else {"sampling": SHORT}
        with httpx.Client(base_url=served.server.url, headers=dict(served.metadata), timeout=60) as http:
            while not ended.is_set():
                response = http.post(ASK, json={**body, **drawn})
                if response.status_code != 200:
                    failed.append(response.text)
                    return
                seen[model].append(response.json())

    def all_answered(version: int) -> bool:
        return bool(failed) or all(mine and mine[-1]["index_version"] == version for mine in seen.values())

    threads = [threading.Thread(target=ask, args=(model,)) for model in seen]
    for thread in threads:
        thread.start()
    found = {1: search(served, "busy")}
    for version, encoder in ((2, SPANS), (3, ENCODER)):
        wait_until(lambda: all_answered(max(found)), seconds=60)
        served.post(f"{INDEXES}/busy/refresh", model=encoder)
        assert served.built("busy")["version"] == version
        found[version] = search(served, "busy")
    wait_until(lambda: all_answered(3), seconds=60)
    ended.set()
    for thread in threads:
        thread.join()
    expected = {version: [hit["logprob"] for hit in hits] for version, hits in found.items()}

    assert not failed
    assert expected[1] != pytest.approx(expected[2], abs=1e-3)
    for mine in seen.values():
        versions = [answer["index_version"] for answer in mine]
        assert list(dict.fromkeys(versions)) == [1, 2, 3]
        for answer in mine:
            stands_on = [place["retrieval_logprob"] for place in answer["evidence"]]
            assert stands_on == pytest.approx(expected[answer["index_version"]], abs=FLOAT32)


def test_a_whole_number_is_one_however_it_is_spelt(served: Open, index: str) -> None:
    """JSON does not tell 100.0 from 100: an answer of so many tokens is weighed. Inverse seen: it was none."""
    body = {"model": WRITER, "index": index, "question": QUESTION, "top_k": 1, "mode": "bm25"}
    whole, spelt = (served.post(ASK, **body, sampling={"max_tokens": n, "ignore_eos": True}) for n in (100, 100.0))

    assert whole["usage"]["generated_tokens"] > 64
    assert whole["answer"] == spelt["answer"] != ""


def test_time_that_runs_out_is_told(served: Open, index: str) -> None:
    """What was scored by then, or a refusal that says that time passed; never a half-written answer as a whole one."""
    body = {"model": WRITER, "index": index, "question": QUESTION, "sampling": {"max_tokens": 900, "ignore_eos": True}}
    response = served.http.post(ASK, json={**body, "time_limit_ms": 250})

    if response.status_code == 200:
        assert response.json()["finish_reason"] == "time_limit"
    else:
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")


def test_without_a_name_the_first_model_that_reads_so_answers(served: Open, index: str) -> None:
    """By the reader that is asked for, or in the order of what can read."""
    asked = {"index": index, "question": QUESTION, "top_k": 1}

    assert served.post(ASK, reader="causal", **asked, sampling=SHORT)["model"] == WRITER
    assert served.post(ASK, reader="span", **asked)["model"] == SPANS
    assert served.post(ASK, reader="joint", **asked)["model"] == JOINT
    assert served.post(ASK, reader="individual", **asked)["model"] == INDIVIDUAL
    assert served.post(ASK, **asked)["model"] == SPANS


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"question": " ", "index": "asked"}, "question", "must not be empty"),
        ({"question": "x", "index": "asked", "documents": DOCUMENTS}, "index", "one of the two"),
        ({"question": "x"}, "index", "one of the two"),
        ({"question": "x", "index": "nobody"}, None, "does not exist"),
        ({"question": "x", "index": "asked", "top_k": 51}, "top_k", "less than or equal to 50"),
        ({"question": "x", "index": "asked", "reader": "both"}, "reader", "span"),
        ({"question": "x", "index": "asked", "model": JOINT, "reader": "individual"}, None, "It reads as joint"),
        ({"question": "x", "index": "asked", "model": INDIVIDUAL, "reader": "causal"}, None, "It reads as individual"),
        ({"question": "x", "index": "asked", "model": WRITER, "reader": "span"}, None, "cannot read as span"),
        ({"question": "x", "index": "asked", "model": ENCODER}, None, "cannot read passages"),
        ({"question": "x", "index": "asked", "model": SPANS, "sampling": SHORT}, "max_tokens", "found, not drawn"),
        ({"question": "x", "index": "asked", "sampling": {"echo": True}}, "sampling.echo", "unknown parameter"),
        ({"question": "x", "index": "asked", "model": WRITER, "sampling": {"top_p": 7}}, "top_p", "at most 1"),
        *(
            (
                {"question": "x", "index": "asked", "model": WRITER, "sampling": {"n": n, "temperature": 1}},
                "n",
                "times `top_k` must be at most 64. Given: 80",
            )
            for n in (16, 16.0)
        ),
        ({"question": "x", "index": "asked", "min_version": 9}, None, "version 1 is served"),
        ({"question": "x", "documents": DOCUMENTS, "min_version": 1}, "min_version", "must be unset"),
        ({"question": "x", "index": "asked", "retriever": SPANS}, None, "holds vectors of the encoder"),
        ({"question": "x", "documents": DOCUMENTS, "retriever": WRITER}, None, "cannot embed"),
        ({"question": "wh " * 1365, "index": "asked", "model": WRITER}, "question", "must leave room"),
        ({"question": "x", "documents": [{"id": "a", "html": "<p> </p>"}]}, None, "at least one word"),
    ],
)
def test_R11_what_cannot_be_answered_is_told(
    served: Open, index: str, body: dict[str, Any], param: str | None, says: str
) -> None:
    """One sentence with the field."""
    error = served.refused(ASK, **body)

    assert 400 <= error["status"] < 500
    assert says in error["message"]
    assert param is None or error["param"] == param


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["tiny", "smollm2"])
def test_acc_A12_the_layout_does_not_matter(tmp_path: Path, request: pytest.FixtureRequest, real: bool) -> None:
    """
    The same answer, its log-probability and its evidence at (tp, pp) of (1, 1), (2, 1) and (1, 2), over HTTP and over
    gRPC; and an engine of that layout without a server writes the same behind each passage's prompt.

    Inverse check: seen to fail with prompts without titles.
    """
    model = request.getfixturevalue("smollm2_dir") if real else tiny_llama(tmp_path / WRITER, context=2048)
    tokenizer = load_tokenizer(model)
    body: dict[str, Any] = {
        "question": QUESTION, "documents": DOCUMENTS, "mode": "bm25", "top_k": 3, "sampling": SHORT,
        "return_evidence": True,
    }  # fmt: skip
    told = []
    for tp, pp in ((1, 1), (2, 1), (1, 2)):
        with (
            serving(model, "--dtype", "float32", "--tp", str(tp), "--pp", str(pp)) as server,
            Client(server.grpc_target) as client,
        ):
            response = httpx.post(server.url + ASK, json=body, timeout=300)
            assert response.status_code == 200, response.text
            told.append(response.json())
            by_grpc = client.openqa.answer(**body)
        places = told[-1]["evidence"]
        passages = [place["passage"] for place in places]
        prompts = [list(pack(QUESTION, p["title"], p["text"], tokenizer, room=1000).tokens) for p in passages]
        with LLM(model, tp=tp, pp=pp, num_threads=1, kv_cache_bytes=64 << 20, dtype="float32") as llm:
            outputs = llm.generate(prompts, SamplingParams(temperature=0, stop=["\n"], **SHORT))
        assert [read_answer(output.choices[0].text) for output in outputs] == [place["candidate"] for place in places]
        assert (by_grpc.answer, by_grpc.reader) == (told[-1]["answer"], told[-1]["reader"])
        assert by_grpc.logprob == pytest.approx(told[-1]["logprob"], abs=FLOAT32)
        for found, place in zip(by_grpc.evidence, places, strict=True):
            assert (found.passage.id, found.candidate) == (place["passage"]["id"], place["candidate"])
            assert found.answer_logprob == pytest.approx(place["answer_logprob"], abs=FLOAT32)
    one = told[0]

    assert one["answer"]
    for other in told[1:]:
        assert other["answer"] == one["answer"]
        assert other["logprob"] == pytest.approx(one["logprob"], abs=FLOAT32)
        for a, b in zip(one["evidence"], other["evidence"], strict=True):
            assert (a["candidate"], a["passage"]) == (b["candidate"], b["passage"])
            assert a["answer_logprob"] == pytest.approx(b["answer_logprob"], abs=FLOAT32)
