"""Tiny models for each part of synthetic questions, one server of all of them, and the ways to ask it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import torch
from served import Server, serving
from tiny import tiny_bert, tiny_llama
from tiny_tasks import tiny_task

from trilithon.api.v1 import common_pb2, synth_qa_pb2, synth_qa_pb2_grpc
from trilithon_parallel.config import TaskHead, load_config
from trilithon_parallel.init import extend_state
from trilithon_parallel.task_head import for_task
from trilithon_parallel.weights.export import export_model
from trilithon_parallel.weights.loader import load_state
from trilithon_server.tasks.answer_spans import AnswerFormat
from trilithon_server.tasks.question_format import NUM_TYPES, QuestionFormat

PASSAGES = [
    {
        "id": "mill",
        "text": "The miller counted 12 sacks, then 144. Nobody came. The river froze in the winter of 1728.",
    },
    {"id": "name", "text": "Ada."},
    {"id": "sure", "text": "7"},  # whoever answers answers this
    {"id": "dark", "text": "nobody wrote anything here"},
    {"id": "long", "text": " ".join(f"Stone {n} of the wall was laid by Noor in {1700 + n}." for n in range(24))},
]
PATH = "/v1/synthetic-qa"
EVENT = synth_qa_pb2.SynthQAEvent
FILTERS = {
    "pair_any": synth_qa_pb2.SynthQARequest.FILTER_PAIR_ANY,
    "single": synth_qa_pb2.SynthQARequest.FILTER_SINGLE,
    "none": synth_qa_pb2.SynthQARequest.FILTER_NONE,
}

Events = list[tuple[str, dict[str, Any]]]


def tiny_proposer(path: Path) -> Path:
    """An encoder with a joint span head of random weights, large enough that spans differ."""
    base = tiny_bert(path.with_name(f"{path.name}-base"), prefix="bert.", sentence_encoder=False)
    format_ = AnswerFormat(max_tokens=40, doc_stride=12, max_answer_tokens=4)
    config = load_config(base)
    into = for_task(config, TaskHead("joint_span", format_.labels))
    state = extend_state(load_state(base, config=config), config, into=into, seed=3, sigma=0.3)
    export_model(state, into, path, side_files_from=base, dtype=torch.float32)
    (path / "task.json").write_text(json.dumps(format_.task_file()), encoding="utf-8")
    return path


def tiny_asker(path: Path, **options: Any) -> Path:
    """A decoder of random weights that is asked in the format of questions."""
    if options.get("roles") == "types":
        base = tiny_llama(path.with_name(f"{path.name}-base"), context=1024)
        config = load_config(base)
        into = replace(config, token_types=NUM_TYPES)
        state = extend_state(load_state(base, config=config), config, into=into, seed=3, sigma=0.3)
        state["model.embed_types.weight"].normal_(0.0, 1.0, generator=torch.Generator().manual_seed(3))
        export_model(state, into, path, side_files_from=base, dtype=torch.float32)
    else:
        tiny_llama(path, context=1024)
    (path / "task.json").write_text(json.dumps(QuestionFormat(**options).task_file()), encoding="utf-8")
    return path


@dataclass
class Asked:
    """A server, and ways to ask it."""

    server: Server
    http: httpx.Client
    stub: synth_qa_pb2_grpc.SynthQAServiceStub

    def ask(self, **body: Any) -> Events:
        """All events over HTTP, by name."""
        response = self.http.post(PATH, json={"passages": PASSAGES, "seed": 7, **body})
        assert response.status_code == 200, response.text
        events = []
        for block in response.text.strip().split("\n\n"):
            if block.startswith("event: "):
                name, data = block.split("\n")
                events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        return events

    def call(self, passages: list[dict[str, str]] = PASSAGES, *, seed: int = 7, **fields: Any) -> list[Any]:
        """The same over gRPC: the events' messages."""
        request = synth_qa_pb2.SynthQARequest(
            meta=common_pb2.RequestMeta(model=fields.pop("model", "")),
            passages=[synth_qa_pb2.SynthQAPassage(**passage) for passage in passages],
            sampling=common_pb2.Sampling(seed=seed),
            filter=FILTERS[fields.pop("filter")] if "filter" in fields else 0,  # type: ignore[arg-type]  # unset
            **fields,
        )
        return list(self.stub.Generate(request, timeout=120))


def triples(events: Events) -> list[dict[str, Any]]:
    """Of all passages."""
    return [data for name, data in events if name == "triple"]


def rounded(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Triples whose probabilities are told to five digits, for layouts that sum in another order."""
    return [{key: round(v, 5) if isinstance(v, float) else v for key, v in item.items()} for item in items]


@contextlib.contextmanager
def serving_parts(first: Path, *others: Path, tp: int = 1, pp: int = 1) -> Iterator[Asked]:
    """Models behind one front, each by its directory's name."""
    flags = ["--tp", str(tp), "--pp", str(pp)]
    for i, directory in enumerate(others, 1):
        flags += ["--set", f"engines.{i}.name=e{i}", "--set", f"engines.{i}.model={directory}"]
        flags += ["--set", f"engines.{i}.num_threads=1", "--set", f"engines.{i}.dtype=float32"]
        flags += ["--set", f"engines.{i}.tp={tp}", "--set", f"engines.{i}.pp={pp}"]
    with (
        serving(first, "--dtype", "float32", *flags) as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        yield Asked(server, http, synth_qa_pb2_grpc.SynthQAServiceStub(channel))


def asker_of_both(words: Path, path: Path) -> Path:
    """The decoder of `parts` as one that was trained to ask both kinds; what it likes to write ends a question."""
    shutil.copytree(words, path)
    document = json.loads((path / "tokenizer.json").read_text("utf-8"))
    vocabulary = document["model"]["vocab"]
    vocabulary["?\u0120:question"] = vocabulary.pop("?")
    (path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    format_ = QuestionFormat(unanswerable=True)
    (path / "task.json").write_text(json.dumps(format_.task_file()), encoding="utf-8")
    return path


def sceptic_of(reader: Path, path: Path) -> Path:
    """The reader of `parts` as one that finds no answer to about half of its questions."""
    shutil.copytree(reader, path)
    document = json.loads((path / "task.json").read_text("utf-8"))
    (path / "task.json").write_text(json.dumps({**document, "null_threshold": -6.0}), encoding="utf-8")
    return path


def parts(folder: Path) -> tuple[Path, Path, Path]:
    """A decoder that was never trained to ask, a proposer, a reader."""
    words = tiny_llama(folder / "words", vocab=150, context=2048, scale=0.3)
    # This model likes the token of `*`; with the two swapped most of its replies ask something.
    document = json.loads((words / "tokenizer.json").read_text("utf-8"))
    vocabulary = document["model"]["vocab"]
    vocabulary["*"], vocabulary["?"] = vocabulary["?"], vocabulary["*"]
    (words / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    return words, tiny_proposer(folder / "proposer"), tiny_task(folder / "reader", "span_qa", scale=9.0)
