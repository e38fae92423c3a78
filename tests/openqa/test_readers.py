"""Encoder-decoders that read passages, served: their numbers are training's, in process and at any layout."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from open_questions import ALICE, DOCUMENTS, ENCODER, INDEXES, INDIVIDUAL, JOINT, QUESTION, READERS, Open, reader_model
from served import serving
from tiny import tiny_t5

from trilithon import Client, OpenAnswer
from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelError, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.models import build_seq2seq
from trilithon_parallel.reading import ReaderBatch, individual_losses, joint_losses
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_parallel.weights.loader import load_stage
from trilithon_server import LLM, SamplingParams
from trilithon_server.llm import Completion
from trilithon_server.prompts import Sequenced
from trilithon_server.task_model import load_reader
from trilithon_server.tasks.reader_format import ReaderFormat, frame, read_answer
from trilithon_server.tasks.writing import literal

ASK, SEARCH, COMPLETE, SCORE = "/v1/openqa", "/v1/retrieval/search", "/v1/completions", "/v1/score"
FLOAT32 = 5e-5
START = 0


@pytest.fixture(scope="module")
def index(served: Open) -> Iterator[str]:
    """An index of the documents."""
    assert served.create("read")["state"] == "ready"
    yield "read"
    served.http.delete(f"{INDEXES}/read")


def hits_of(served: Open, index: str) -> list[dict[str, Any]]:
    """The passages that are read, best first."""
    found = served.post(SEARCH, index=index, queries=[QUESTION], top_k=3)["results"][0]["passages"]
    return list(found)


class Trained:
    """What a reader's recipe would compute with the same weights, and the engine without a server."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.format = directory, READERS[directory.name]
        self.tokenizer = load_tokenizer(directory)
        config, grid = load_config(directory), Grid.single()
        self.stage = build_seq2seq(config, grid=grid, backend=select("torch"), dtype=torch.float32)
        load_stage(self.stage, directory, config=config, grid=grid)

    def sources(self, hits: list[dict[str, Any]]) -> list[list[int]]:
        """What the encoder reads of each passage."""
        return [list(self.format.pack(QUESTION, hit["title"], hit["text"], self.tokenizer).tokens) for hit in hits]

    def batch(self, sources: list[list[int]], answer: str) -> ReaderBatch:
        """One question with its passages, and an answer."""
        targets = [*literal(answer, self.tokenizer), frame(self.tokenizer)[1]]  # not cut: what is asked may be longer
        return ReaderBatch(
            encoder_tokens_E=torch.tensor([token for source in sources for token in source]),
            encoder_cu_seqlens=[0, *torch.tensor([len(source) for source in sources]).cumsum(0).tolist()],
            tokens_T=torch.tensor([START, *targets[:-1]]),
            targets_T=torch.tensor(targets),
            cu_seqlens=[0, len(targets)],
        )

    def run(self, prompts: list[Sequenced], **layout: int) -> list[Completion]:
        """Greedy answers, by the engine without a server: in this process, or its ranks in a process each."""
        _, end = frame(self.tokenizer)
        params = SamplingParams(
            temperature=0, max_tokens=self.format.max_answer_tokens, stop_token_ids=[end], logprobs=0
        )
        with LLM(self.directory, num_threads=1, kv_cache_bytes=8 << 20, **layout) as llm:
            return [output.choices[0] for output in llm.generate(prompts, params)]

    def write(self, prompts: list[Sequenced], **layout: int) -> list[str]:
        """Their texts."""
        return [read_answer(answer.text) for answer in self.run(prompts, **layout)]

    def prompts(self, hits: list[dict[str, Any]]) -> list[Sequenced]:
        """What is asked of the engine for an answer: of a joint reader all passages at once, else each alone."""
        sources = self.sources(hits)
        if self.format.kind == "individual":
            return [Sequenced(ids=[START], sources=[source]) for source in sources]
        biases = [self.format.strength * math.exp(hit["logprob"]) for hit in hits]
        return [Sequenced(ids=[START], sources=sources, biases=biases)]


def test_acc_A12_a_joint_answer_is_what_training_says_of_all_passages(served: Open, index: str) -> None:
    """
    The answer is the in-process engine's greedy one to all passages with their biases, and its log-probability that of
    the trained objective. Inverse seen: biases by log p(z|q), and none at all.
    """
    told = served.post(ASK, model=JOINT, index=index, question=QUESTION, top_k=3, return_evidence=True)
    hits, trained = hits_of(served, index), Trained(served.folder / JOINT)
    sources = trained.sources(hits)
    priors = torch.tensor([[hit["logprob"] for hit in hits]], dtype=torch.float64)
    (answer,) = trained.write(trained.prompts(hits))
    with torch.no_grad():
        strength = torch.tensor(trained.format.strength)
        loss = joint_losses(trained.stage, trained.batch(sources, answer), priors, strength=strength)

    assert told["answer"] == answer != ""
    assert told["logprob"] == pytest.approx(-float(loss), abs=FLOAT32)
    assert (told["reader"], told["model"], told["no_answer"], told["finish_reason"]) == ("joint", JOINT, False, None)
    for hit, place in zip(hits, told["evidence"], strict=True):
        assert (place["passage"], place["retrieval_logprob"]) == (hit, hit["logprob"])
        assert (place["answer_logprob"], place["candidate"]) == (None, "")


def test_acc_A12_an_individual_answer_is_weighed_over_all_passages(served: Open, index: str) -> None:
    """
    Each passage's answer is the in-process engine's, and the best has the highest sum of p(z|q) p(a|q, z) by what is
    trained. Inverse seen: passages that all weigh alike.
    """
    told = served.post(ASK, model=INDIVIDUAL, index=index, question=QUESTION, top_k=3, return_evidence=True)
    hits, trained = hits_of(served, index), Trained(served.folder / INDIVIDUAL)
    sources = trained.sources(hits)
    written = trained.write(trained.prompts(hits))
    priors = torch.tensor([[hit["logprob"] for hit in hits]], dtype=torch.float64)
    sums: dict[str, float] = {}
    with torch.no_grad():
        for text in filter(None, written):
            sums[text] = -float(individual_losses(trained.stage, trained.batch(sources, text), priors))
        certain, answer = torch.zeros(1, 1, dtype=torch.float64), told["answer"]
        alone = [-float(individual_losses(trained.stage, trained.batch([s], answer), certain)) for s in sources]

    assert [place["candidate"] for place in told["evidence"]] == written
    assert len(sums) > 1
    assert answer == max(sums, key=sums.__getitem__)
    assert told["logprob"] == pytest.approx(sums[answer], abs=FLOAT32)
    assert [place["answer_logprob"] for place in told["evidence"]] == pytest.approx(alone, abs=FLOAT32)
    assert told["reader"] == "individual"


def test_acc_A06_a_joint_answer_does_not_depend_on_the_order_of_documents(served: Open) -> None:
    """Documents in another order: the same answer, its log-probability within 1e-4."""
    body = {"model": JOINT, "question": QUESTION, "retriever": ENCODER, "top_k": 4}
    one = served.post(ASK, documents=DOCUMENTS, **body)
    other = served.post(ASK, documents=DOCUMENTS[::-1], **body)

    assert one["answer"] == other["answer"] != ""
    assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)


@pytest.mark.parametrize("model", [JOINT, INDIVIDUAL])
def test_an_empty_answer_is_no_answer(served: Open, index: str, model: str) -> None:
    """A reader that ends at once says that there is none. Here its first token ends it."""
    trained = Trained(served.folder / model)
    source = trained.sources(hits_of(served, index))[0]
    (spoken,) = trained.run([Sequenced(ids=[START], sources=[source])])
    body = {"model": model, "index": index, "question": QUESTION, "top_k": 1}
    silent = served.post(ASK, **body, sampling={"stop_token_ids": [spoken.token_ids[0]]})

    assert (silent["answer"], silent["no_answer"], silent["logprob"]) == ("", True, 0.0)
    assert silent["usage"]["generated_tokens"] == 1


def test_acc_A12_the_layout_does_not_matter(tmp_path: Path) -> None:
    """
    Both readers say the same at (tp, pp) of (1, 1), (2, 1) and (1, 2), over HTTP and over gRPC; so does an engine of
    that layout without a server, asked for what the server asks a joint reader for.

    Inverse check: seen to fail with biases that do not reach the ranks, and with a passage less over gRPC.
    """
    joint, individual = (reader_model(tmp_path / kind, kind) for kind in (JOINT, INDIVIDUAL))
    body = {"question": QUESTION, "documents": DOCUMENTS, "mode": "bm25", "top_k": 3, "return_evidence": True}
    told: dict[str, list[dict[str, Any]]] = {JOINT: [], INDIVIDUAL: []}
    drawn = []
    for tp, pp in ((1, 1), (2, 1), (1, 2)):
        flags = ["--dtype", "float32", "--tp", str(tp), "--pp", str(pp)]
        for name, value in {
            "name": "e1",
            "model": individual,
            "num_threads": 1,
            "dtype": "float32",
            "tp": tp,
            "pp": pp,
        }.items():
            flags += ["--set", f"engines.1.{name}={value}"]
        with (
            serving(joint, *flags) as server,
            Client(server.url) as by_http,
            Client(server.grpc_target) as by_grpc,
        ):
            for kind, answers in told.items():
                response = httpx.post(server.url + ASK, json={**body, "model": kind}, timeout=60)
                assert response.status_code == 200, response.text
                answers.append(response.json())
                both = [client.openqa.answer(**body, model=kind) for client in (by_http, by_grpc)]  # type: ignore[arg-type]
                assert_same(answers[-1], *both)
        served, trained = told[JOINT][-1], Trained(joint)
        hits = [{**place["passage"], "logprob": place["retrieval_logprob"]} for place in served["evidence"]]
        (written,) = trained.run(trained.prompts(hits), tp=tp, pp=pp)
        assert read_answer(written.text) == served["answer"]
        drawn.append(written.cumulative_logprob)

    assert drawn == pytest.approx([drawn[0]] * 3, abs=FLOAT32)
    for one, *others in told.values():
        assert one["answer"]
        for other in others:
            assert other["answer"] == one["answer"]
            assert other["logprob"] == pytest.approx(one["logprob"], abs=FLOAT32)
            for a, b in zip(one["evidence"], other["evidence"], strict=True):
                assert (a["candidate"], a["passage"]) == (b["candidate"], b["passage"])
                assert a["answer_logprob"] == pytest.approx(b["answer_logprob"], abs=FLOAT32)


def assert_same(plain: dict[str, Any], *typed: OpenAnswer) -> None:
    """One answer as JSON and as the client has it by each protocol, from the same ranks."""
    for one in typed:
        assert (one.answer, one.reader, one.model, one.no_answer) == tuple(
            plain[name] for name in ("answer", "reader", "model", "no_answer")
        )
        assert one.logprob == pytest.approx(plain["logprob"], abs=FLOAT32)
        for place, found in zip(plain["evidence"], one.evidence, strict=True):
            assert (found.passage.id, found.candidate) == (place["passage"]["id"], place["candidate"])
            assert found.retrieval_logprob == pytest.approx(place["retrieval_logprob"], abs=FLOAT32)
            assert found.answer_logprob == pytest.approx(place["answer_logprob"], abs=FLOAT32)


def test_E3_a_plain_prompt_is_what_the_encoder_reads(served: Open) -> None:
    """
    Completions of a text are those of the engine in this process, over both protocols; the text's tokens are counted,
    and scores of what was written are those that it was written with.
    """
    trained, text = Trained(served.folder / INDIVIDUAL), "how far is the sea?"
    ids = trained.tokenizer.encode(text, add_special_tokens=True)
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=0, ignore_eos=True)
    with LLM(trained.directory, num_threads=1, kv_cache_bytes=8 << 20) as llm:
        (output,) = llm.generate(text, params)
    body = {"model": INDIVIDUAL, "temperature": 0, "max_tokens": 6, "ignore_eos": True, "logprobs": 0}
    by_text, by_ids = (served.post(COMPLETE, prompt=prompt, **body) for prompt in (text, ids))
    with Client(served.server.grpc_target, api_key=ALICE) as client:
        by_grpc = client.generate(text, model=INDIVIDUAL, temperature=0, max_tokens=6, ignore_eos=True)
    items = [{"context": text, "continuation_tokens": [list(output.choices[0].token_ids)]}]
    (item,) = served.post(SCORE, model=INDIVIDUAL, items=items)["items"]

    assert by_text["choices"][0]["text"] == by_ids["choices"][0]["text"] == output.choices[0].text == by_grpc.text
    assert list(output.prompt_token_ids) == ids
    assert by_text["usage"]["prompt_tokens"] == len(ids)
    assert item["sum_logprob"][0] == pytest.approx(output.choices[0].cumulative_logprob, abs=FLOAT32)
    assert math.isfinite(item["sum_logprob"][0])


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        (COMPLETE, {"prompt": "the sea", "echo": True}, "echo", "is for decoders"),
        (COMPLETE, {"prompt": "the sea", "prompt_logprobs": 1}, "prompt_logprobs", "read, not gone on with"),
        (COMPLETE, {"prompt": []}, "prompt", "must"),
        (COMPLETE, {"prompt": [5] * 513}, "prompt", "at most 512 tokens"),
        (COMPLETE, {"prompt": "the sea", "max_tokens": 512}, "max_tokens", "from 1 to 511"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, None, "cannot chat"),
        ("/v1/embeddings", {"input": "the sea"}, None, "cannot embed"),
        (SCORE, {"items": [{"continuations": ["x"]}]}, "items[0].context", "an encoder-decoder reads it"),
    ],
)
def test_R11_what_an_encoder_decoder_cannot_do_is_told(
    served: Open, path: str, body: dict[str, Any], param: str | None, says: str
) -> None:
    """One sentence, with the field where there is one."""
    error = served.refused(path, model=INDIVIDUAL, **body)

    assert 400 <= error["status"] < 500
    assert says in error["message"]
    assert param is None or error["param"] == param


def test_R4_passages_that_do_not_fit_the_cache_are_refused(tmp_path: Path) -> None:
    """A joint reader takes all passages at once: more than the cache holds is told with numbers, fewer are answered."""
    model = reader_model(tmp_path / JOINT, JOINT)
    block = 16 * 2 * 2 * 4 * 32 * 4  # tokens x decoder layers x kinds x heads x channels x fp32
    text = "the mason set two stones upright and laid a third across them. " * 8
    documents = [{"id": str(i), "text": f"{i} the sea {text}"} for i in range(6)]
    body = {"question": "the sea?", "documents": documents, "mode": "bm25"}
    with serving(model, "--dtype", "float32", "--kv-cache-bytes", str(20 * block)) as server:
        full = httpx.post(server.url + ASK, json={**body, "top_k": 6}, timeout=60)
        fewer = httpx.post(server.url + ASK, json={**body, "top_k": 2}, timeout=60)

    assert (full.status_code, full.json()["error"]["code"]) == (400, "kv_capacity_exceeded")
    assert "at most 320 cache tokens on this server. Given: 592 (576 for the encoder" in full.json()["error"]["message"]
    assert fewer.json()["answer"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (ReaderFormat(max_passage_tokens=600), "max_passage_tokens must be at most 512, the window. Given: 600"),
        (ReaderFormat(max_answer_tokens=512), "max_answer_tokens must be below 512"),
    ],
)
def test_R11_a_task_file_of_another_model_is_refused(tmp_path: Path, given: ReaderFormat, says: str) -> None:
    """At start, by what the model cannot hold."""
    directory = tiny_t5(tmp_path, tokenizer="metaspace")
    with pytest.raises(ModelError, match=says) as caught:
        load_reader(given, load_config(directory), load_tokenizer(directory), 512)
    assert caught.value.code == "task_invalid"


def test_a_model_that_was_not_trained_to_read_does_not(tmp_path: Path) -> None:
    """An encoder-decoder without a task file writes, as the line says that its start prints, and is no reader."""
    with serving(tiny_t5(tmp_path / "plain", tokenizer="metaspace"), "--dtype", "float32") as server:
        body = {"question": "x", "documents": DOCUMENTS, "mode": "bm25"}
        unnamed = httpx.post(server.url + ASK, json=body, timeout=60).json()["error"]
        named = httpx.post(server.url + ASK, json={**body, "model": "plain"}, timeout=60).json()["error"]
        curl = next(line for line in server.output().splitlines() if line.strip().startswith("curl -s"))
        *_, example = shlex.split(curl)
        done = httpx.post(server.url + COMPLETE, json=json.loads(example), timeout=60)

    assert "no model is served that reads passages" in unnamed["message"]
    assert "cannot read passages. It can: generate, score, tokenize" in named["message"]
    assert COMPLETE in curl
    assert done.json()["object"] == "text_completion"
