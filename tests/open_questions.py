"""
A server of small models that keeps indexes and files: one writes, one makes vectors, one marks spans, two are readers.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
from served import Server, serving
from tiny import tiny_bert, tiny_llama, tiny_t5
from tiny_tasks import tiny_task

from trilithon.api.v1 import openqa_pb2_grpc, retrieval_pb2_grpc
from trilithon_server.tasks.reader_format import ReaderFormat

ALICE, BOB = "alice-key-0001", "bob-key-000001"
WRITER, ENCODER, SPANS, JOINT, INDIVIDUAL = "writer", "encoder", "spans", "joint", "individual"
SIZES = {"max_question_tokens": 32, "max_passage_tokens": 96, "max_answer_tokens": 8}
READERS = {
    JOINT: ReaderFormat(kind="joint", strength=1.5, **SIZES),
    INDIVIDUAL: ReaderFormat(kind="individual", **SIZES),
}
VOCABULARIES = {JOINT: "wordpiece", INDIVIDUAL: "metaspace"}
INDEXES = "/v1/retrieval/indexes"
QUESTION = "How far is the sea from the old mill?"
DOCUMENTS = [
    {"id": "coast", "title": "The coast", "text": "The sea is two days from the old mill.\n\nNobody counts the gulls."},
    {"id": "town", "html": "<html><body><p>The town has a market on every Friday of the year.</p></body></html>"},
    {"id": "mill", "title": "Mills!", "text": "A mill grinds grain with the force of water or of wind."},
    {"id": "hills", "text": "Behind the mill the hills begin, and behind the hills there is snow until May."},
]
BUILD_S = 60.0
THRESHOLD = -5.5  # so that the spans model finds an answer in some of these passages and none in others


class Asked:
    """A server by HTTP."""

    http: httpx.Client

    def post(self, path: str, **body: Any) -> Any:
        """The answer's JSON; anything but 200 is an error."""
        response = self.http.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, path: str, **body: Any) -> dict[str, Any]:
        """The error of a request that must fail."""
        response = self.http.post(path, json=body)
        assert response.status_code >= 400, response.text
        error: dict[str, Any] = response.json()["error"]
        return {**error, "status": response.status_code}

    def built(self, name: str) -> dict[str, Any]:
        """The index, when nothing is being built of it any more."""
        deadline = time.monotonic() + BUILD_S
        while True:
            told: dict[str, Any] = self.http.get(f"{INDEXES}/{name}").json()
            if told.get("state") != "building":
                return told
            assert time.monotonic() < deadline, told
            time.sleep(0.02)


@dataclass
class Open(Asked):
    """The server, and one tenant's ways to ask it."""

    server: Server
    http: httpx.Client
    retrieval: retrieval_pb2_grpc.RetrieverServiceStub
    openqa: openqa_pb2_grpc.OpenQAServiceStub
    metadata: tuple[tuple[str, str], ...]
    folder: Path
    """Where each model's directory is, by its name."""

    def create(self, name: str, **body: Any) -> dict[str, Any]:
        """A new index, built; of `DOCUMENTS` by the encoder unless the body says otherwise."""
        source = {} if "file_id" in body or "documents" in body else {"documents": DOCUMENTS}
        self.post(INDEXES, **{"name": name, "model": ENCODER, **source, **body})
        return self.built(name)

    def upload(self, lines: bytes) -> str:
        """The id of a file of passages."""
        parts = {"purpose": (None, "evidence"), "file": ("evidence.jsonl", lines)}
        response = self.http.post("/v1/files", files=parts)
        assert response.status_code == 200, response.text
        return str(response.json()["id"])


def reader_model(path: Path, kind: str) -> Path:
    """An encoder-decoder of random weights that reads as its name says."""
    shape = {"hidden": 128, "head_dim": 32, "ffn": 256, "gated": True, "tied": False}
    tiny_t5(path, **shape, scale=0.3, seed=2, tokenizer=VOCABULARIES[kind])
    (path / "task.json").write_text(json.dumps(READERS[kind].task_file()))
    return path


@contextlib.contextmanager
def serving_open(folder: Path) -> Iterator[Open]:
    """All of them behind one front, for two tenants."""
    writer = tiny_llama(folder / WRITER, context=2048)
    encoder = tiny_bert(folder / ENCODER)
    spans = tiny_task(folder / SPANS, "span_qa", hidden=48, seed=3)
    task = json.loads((spans / "task.json").read_text())
    (spans / "task.json").write_text(json.dumps({**task, "null_threshold": THRESHOLD}))
    keys = folder / "keys"
    keys.write_text(f"{ALICE} tenant=alice\n{BOB} tenant=bob\n")
    keys.chmod(0o600)
    flags = ["--dtype", "float32", "--api-keys-file", str(keys), "--public-ui"]
    readers = [reader_model(folder / kind, kind) for kind in READERS]
    for i, directory in enumerate((encoder, spans, *readers), 1):
        for name, value in {"name": f"e{i}", "model": directory, "num_threads": 1, "dtype": "float32"}.items():
            flags += ["--set", f"engines.{i}.{name}={value}"]
    for name, value in {"server.store": folder / "store", "jobs.store": folder / "jobs", "jobs.slots": 0}.items():
        flags += ["--set", f"{name}={value}"]
    with (
        serving(writer, *flags) as server,
        httpx.Client(base_url=server.url, timeout=60, headers=bearer(ALICE)) as http,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        yield Open(
            server,
            http,
            retrieval_pb2_grpc.RetrieverServiceStub(channel),
            openqa_pb2_grpc.OpenQAServiceStub(channel),
            tuple(bearer(ALICE).items()),
            folder,
        )


def bearer(key: str) -> dict[str, str]:
    """The header that a key travels in."""
    return {"authorization": f"Bearer {key}"}
