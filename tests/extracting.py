"""A server of all four kinds of task models, and the ways to ask it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
from served import Server, serving
from tiny import tiny_bert
from tiny_tasks import Task

from trilithon.api.v1 import common_pb2, extract_pb2, extract_pb2_grpc

TEXT = "The mason set two stones (upright) and laid 12 across. Care held it up, said Ada. A third fell."
LONG = " ".join(f"{TEXT} Number {i} is caf\u0065\u0301 \U0001f600." for i in range(12))
QUESTION = "what holds the stones up?"
PATHS: dict[Task, str] = {
    "ner": "/v1/extract/entities",
    "relation": "/v1/extract/relations",
    "span_qa": "/v1/extract/spans",
    "classify": "/v1/extract/classes",
}
RPCS: dict[Task, tuple[str, Any]] = {
    "ner": ("Annotate", extract_pb2.AnnotateRequest),
    "relation": ("ExtractRelations", extract_pb2.RelationsRequest),
    "span_qa": ("Answer", extract_pb2.SpanAnswerRequest),
    "classify": ("Classify", extract_pb2.ClassifyRequest),
}
A = {"start": 4, "end": 9, "type": "CHEMICAL"}
B = {"start": 18, "end": 24, "type": "GENE", "text": "stones"}
BODIES: dict[Task, dict[str, Any]] = {
    "ner": {"texts": [TEXT, LONG, "   "]},
    "relation": {"text": TEXT, "pairs": [{"a": A, "b": B}, {"a": B, "b": A}]},
    "span_qa": {"question": QUESTION, "contexts": [TEXT, LONG], "n_best": 7},
    "classify": {"texts": [TEXT, "yes", LONG], "text_pairs": ["a stone", "no", "it fell"]},
}


@dataclass
class Served:
    """The server and ways to ask it."""

    server: Server
    http: httpx.Client
    stub: extract_pb2_grpc.ExtractServiceStub
    dirs: Mapping[Task, Path]

    def ask(self, task: Task, **body: Any) -> httpx.Response:
        """POST to the task's route, of its own model unless another is named."""
        return self.http.post(PATHS[task], json={"model": task, **body})

    def call(self, task: Task, *, timeout: float = 60.0, **body: Any) -> Any:
        """The same over gRPC; the answer's message."""
        name, kind = RPCS[task]
        meta = common_pb2.RequestMeta(model=body.pop("model", task))
        return getattr(self.stub, name)(kind(meta=meta, **body), timeout=timeout)

    def in_flight(self) -> int:
        """Requests that any engine holds."""
        engines = self.http.get("/admin/v1/status").json()["engines"]
        return sum(engine["running"] + engine["waiting"] for engine in engines)


@contextlib.contextmanager
def serving_tasks(task_dirs: Mapping[Task, Path], folder: Path) -> Iterator[Served]:
    """All four models and a plain encoder behind one front."""
    plain = tiny_bert(folder / "plain")
    flags: list[str] = []
    for i, directory in enumerate((task_dirs["relation"], task_dirs["span_qa"], task_dirs["classify"], plain), 1):
        flags += ["--set", f"engines.{i}.name=e{i}", "--set", f"engines.{i}.model={directory}"]
        flags += ["--set", f"engines.{i}.num_threads=1", "--set", f"engines.{i}.dtype=float32"]
    with (
        serving(task_dirs["ner"], "--dtype", "float32", *flags) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        yield Served(server, http, extract_pb2_grpc.ExtractServiceStub(channel), task_dirs)
