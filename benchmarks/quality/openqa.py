"""
What readers make of retrieved passages on real questions, through a server; and an index that is refreshed under load.

    python benchmarks/quality/openqa.py readers --seed 1
    python benchmarks/quality/openqa.py refresh

readers    `span` and `causal` readers on held-out questions of XQuAD: with the passages that are found, with drawn ones
           (span), without any (causal); `causal` by the sum over passages, and by the first passage alone.
refresh    an index on a server, searched without a pause while it is built again: searches that failed.

Exact match in percent. Numbers are written to `results/`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from retrieval import MINILM, Corpus, Question, qed, tell, xquad
from runs import data_dir, model_dir, run_job, write_rows

from trilithon import Client, Document, OpenAnswer, TrilithonError
from trilithon_finetune.converters import convert
from trilithon_finetune.metrics.retrieval import open_exact_match
from trilithon_parallel.lora.merge import merge_adapter
from trilithon_server.knowledge.passages import Passage, write_passages
from trilithon_server.tasks.answer_format import ANSWER_END, answer_prompt, read_answer
from trilithon_server.tasks.reading import passage_context

SMOLLM = "smollm2-135m-instruct"
READ = 5
"""Passages that a reader of spans gets; one that writes gets one less."""

CAUSAL_ROWS, CAUSAL_QUESTIONS = 300, 60
COMMAND = [sys.executable, "-c", "import sys; from trilithon.cli import main; sys.exit(main())"]
START_S = 300.0


def readers(folder: Path, seed: int, limit: int | None) -> dict[str, Any]:
    """Two readers, finetuned here, on a server with the retriever."""
    spans, causal = span_reader(folder, seed, limit), causal_reader(folder, seed, limit)
    corpus = xquad().cut(100)
    questions = [question for question in corpus.questions if question.held_out][:limit]
    few, drawn = questions[:CAUSAL_QUESTIONS], random.Random(seed)
    with serving(folder, {"writer": causal, "encoder": model_dir(MINILM), "spans": spans}) as client:
        build(client, "xquad", corpus.passages, folder)
        first = [client.retrieval.search("xquad", [question.text], top_k=1)[0][0] for question in few]
        one = [[Passage(hit.id, hit.title, hit.text)] for hit in first]
        others = [drawn.sample(corpus.passages, READ) for _ in questions]
        return {
            "questions": len(questions),
            "span": exact([ask(client, q, "spans", index="xquad", top_k=READ) for q in questions], questions),
            "span_drawn_passages": exact(given(client, "spans", questions, others), questions),
            "causal_questions": len(few),
            "causal": exact([ask(client, q, "writer", index="xquad", top_k=READ - 1) for q in few], few),
            "causal_first_passage": exact(given(client, "writer", few, one), few),
            "causal_closed_book": closed_book(client, few, "writer"),
        }


def span_reader(folder: Path, seed: int, limit: int | None) -> Path:
    """Of XQuAD's training articles and QED's training questions."""
    squad = convert("squad", (data_dir() / "qa/xquad_en.json").read_bytes())
    asked = convert("qed", (data_dir() / "qa/qed_nq_dev.jsonl").read_bytes())
    train = write_rows(folder / "spans.jsonl", [*squad.train, *asked.train][:limit])
    dev = write_rows(folder / "spans-dev.jsonl", squad.dev[:limit])
    return run_job(
        folder, model_dir(MINILM), train, dev, {"task": "span_qa", "seed": seed, "training": {"epochs": 3}}
    ).export


def causal_reader(folder: Path, seed: int, limit: int | None) -> Path:
    """A model that learned a few training questions of QED with an adapter, each with its own paragraph."""
    corpus = qed()
    rows = [answer_row(q, corpus) for q in corpus.questions if not q.held_out][: min(CAUSAL_ROWS, limit or CAUSAL_ROWS)]
    config = {
        "task": "answer_qa",
        "seed": seed,
        "tuning": {"kind": "lora"},
        "training": {"epochs": 1, "batch_size": 8},
        "data": {"max_tokens": 256, "on_long": "truncate"},
    }
    train, merged = write_rows(folder / "causal.jsonl", rows), folder / "causal"
    adapter = run_job(folder, model_dir(SMOLLM), train, None, config).export
    merge_adapter(model_dir(SMOLLM), adapter, merged)
    return merged


def answer_row(question: Question, corpus: Corpus) -> dict[str, Any]:
    """A row of the task `answer_qa`, with the passage as readers are given it."""
    own = corpus.passages[question.passage]
    return {"question": question.text, "answers": question.answers, "context": passage_context(own.title, own.text)}


def refresh(folder: Path, seed: int, limit: int | None) -> dict[str, Any]:
    """Two refreshes under four searchers."""
    corpus = qed()
    passages = corpus.passages[:limit]
    questions = itertools.cycle([question.text for question in corpus.questions])
    answered: list[int] = []
    failed: list[str] = []
    ended, turn = threading.Event(), threading.Lock()

    def ask_on(client: Client) -> None:
        while not ended.is_set():
            with turn:
                question = next(questions)
            try:
                answered.append(client.retrieval.search("qed", [question]).index_version)
            except TrilithonError as error:
                failed.append(str(error))

    with serving(folder, {"encoder": model_dir(MINILM)}) as client:
        build(client, "qed", passages, folder)
        threads = [threading.Thread(target=ask_on, args=(client,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(2):
            client.retrieval.refresh_index("qed")
            wait(client, "qed")
        ended.set()
        for thread in threads:
            thread.join()
    versions = {version: answered.count(version) for version in sorted(set(answered))}
    return {"passages": len(passages), "searches_by_version": versions, "failed": failed}


# -- a server -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(folder: Path, models: dict[str, Path]) -> Iterator[Client]:
    """`trilithon serve` of models under their names."""
    with socket.socket() as http, socket.socket() as rpc:
        http.bind(("127.0.0.1", 0))
        rpc.bind(("127.0.0.1", 0))
        ports = http.getsockname()[1], rpc.getsockname()[1]
    settings: dict[str, Any] = {"server.store": folder / "store", "jobs.store": folder / "files", "jobs.slots": 0}
    for i, (name, model) in enumerate(models.items()):
        settings |= {f"engines.{i}.served_name": name, f"engines.{i}.name": name}
        settings |= {f"engines.{i}.model": model} if i else {}
    flags = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    command = [*COMMAND, "serve", str(next(iter(models.values()))), *flags]
    command += ["--http-port", str(ports[0]), "--grpc-port", str(ports[1])]
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        with Client(f"http://127.0.0.1:{ports[0]}", timeout=600.0) as client:
            wait_ready(client, process, log)
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_ready(client: Client, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server answers; its own words are the message when it never does."""
    until = time.monotonic() + START_S
    while True:
        with contextlib.suppress(TrilithonError):
            if client.health().status == "ok":
                return
        if process.poll() is not None or time.monotonic() > until:
            sys.exit(f"the server did not start:\n{log.read_text()}")
        time.sleep(0.2)


def build(client: Client, name: str, passages: Sequence[Passage], folder: Path) -> None:
    """An index, when it is built."""
    file = folder / f"{name}-passages.jsonl"
    write_passages(file, passages)
    client.retrieval.create_index(name, file=client.files.upload(file, purpose="evidence").id, model="encoder")
    wait(client, name)


def wait(client: Client, name: str) -> None:
    """Until nothing is built of an index."""
    while (index := client.retrieval.get_index(name)).state == "building":
        time.sleep(0.2)
    if index.error:
        sys.exit(f"index {name}: {index.error}")


def ask(client: Client, question: Question, model: str, **where: Any) -> OpenAnswer:
    """One answer."""
    return client.openqa.answer(question.text, model=model, **where)


def given(
    client: Client, model: str, questions: Sequence[Question], passages: Sequence[Sequence[Passage]]
) -> list[OpenAnswer]:
    """Answers from passages that come with the questions."""
    found = []
    for question, some in zip(questions, passages, strict=True):
        documents: list[Document] = [{"id": p.id, "title": p.title, "text": p.text} for p in some]
        found.append(ask(client, question, model, documents=documents, retriever="encoder", top_k=len(documents)))
    return found


def exact(answers: Sequence[OpenAnswer], questions: Sequence[Question]) -> float:
    """Exact match, in percent."""
    told = zip(answers, questions, strict=True)
    return 100 * sum(max(open_exact_match(a.answer, gold) for gold in q.answers) for a, q in told) / len(questions)


def closed_book(client: Client, questions: Sequence[Question], model: str) -> float:
    """Exact match of the same model without a passage."""
    found = 0.0
    for question in questions:
        asked = answer_prompt(question.text)
        text = client.generate(asked, model=model, temperature=0.0, max_tokens=32, stop=ANSWER_END).text
        found += max(open_exact_match(read_answer(text), gold) for gold in question.answers)
    return 100 * found / len(questions)


def main() -> None:
    """Run one case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("case", choices=("readers", "refresh"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=int, help="questions, rows or passages, to try the script [all]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        numbers = {"readers": readers, "refresh": refresh}[args.case](Path(name), args.seed, args.limit)
    tell(f"openqa_{args.case}", args, numbers)


if __name__ == "__main__":
    main()
