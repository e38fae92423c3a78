"""
What retrieval finds on real questions.

    python benchmarks/quality/retrieval.py zero_shot
    python benchmarks/quality/retrieval.py ict --seed 1
    python benchmarks/quality/retrieval.py dpr --seed 1
    python benchmarks/quality/retrieval.py dpr_new --seed 1
    python benchmarks/quality/retrieval.py sentences

zero_shot  all-MiniLM-L6-v2 as it is, BM25, and both together: XQuAD in passages of 100 words, QED in whole paragraphs;
           and the same encoder by its first token alone, which it was not trained for.
ict        two small encoders from new weights, by inverse cloze on XQuAD's training paragraphs and articles of an
           encyclopedia.
dpr        all-MiniLM-L6-v2 on QED's training questions with BM25's negatives, judged on its held-out ones.
dpr_new    the same from new weights of that shape, as two encoders.
sentences  sentences of knowledge for the dialogue system, by each of its scorers; see `sentences.py`.

A passage counts as right where it holds an answer, word by word. Numbers are written to `results/`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runs import Result, data_dir, model_dir, record, run_job, settings, write_rows
from sentences import found as sentences_found
from vocabulary import random_start, word_pieces

from trilithon_finetune.converters.questions import json_lines
from trilithon_finetune.metrics.retrieval import has_answer, top_k_accuracy
from trilithon_server.knowledge.passages import Passage
from trilithon_server.knowledge.sparse import SparseIndex
from trilithon_server.knowledge.version import Hit, Mode, Queries, search_passages
from trilithon_server.knowledge.words import chunks
from trilithon_server.local_index import LocalEncoder

MINILM = "all-minilm-l6-v2"
TOP = (1, 5, 20)
MODES: tuple[Mode, ...] = ("dense", "bm25", "hybrid")
HELD_OUT = 5


@dataclass(frozen=True)
class Question:
    """A question, its answers, and the row of its own passage; `held_out`: not to be trained on."""

    text: str
    answers: list[str]
    passage: int
    held_out: bool


@dataclass(frozen=True)
class Corpus:
    """Passages, and questions about them."""

    passages: list[Passage]
    questions: list[Question]

    def cut(self, words: int) -> Corpus:
        """In passages of so many words; questions then have no passage of their own."""
        pieces = [(p.title, piece.text) for p in self.passages for piece in chunks(p.text, words)]
        cut = [Passage(str(i), title, text) for i, (title, text) in enumerate(pieces)]
        return Corpus(cut, [replace(question, passage=-1) for question in self.questions])

    def first(self, limit: int | None) -> Corpus:
        """So many passages and questions, to try a script; a question's own passage is never after as many others."""
        return Corpus(self.passages[:limit], self.questions[:limit])


def xquad() -> Corpus:
    """Every fifth article is held out; titles are names of pages, which write spaces as `_`."""
    passages: list[Passage] = []
    questions: list[Question] = []
    articles = json.loads((data_dir() / "qa/xquad_en.json").read_bytes())["data"]
    for number, article in enumerate(articles):
        for paragraph in article["paragraphs"]:
            for item in paragraph["qas"]:
                answers = [answer["text"] for answer in item["answers"]]
                questions.append(Question(item["question"], answers, len(passages), number % HELD_OUT == 0))
            title = article["title"].replace("_", " ")
            passages.append(Passage(str(len(passages)), title, paragraph["context"]))
    return Corpus(passages, questions)


def qed() -> Corpus:
    """Every fifth question is held out; several share a paragraph."""
    rows: dict[tuple[str, str], int] = {}
    questions = []
    for number, item in enumerate(json_lines((data_dir() / "qa/qed_nq_dev.jsonl").read_bytes())):
        row = rows.setdefault((item["title"], item["context"]), len(rows))
        answers = [answer["text"] for answer in item["answers"]]
        questions.append(Question(item["question"], answers, row, number % HELD_OUT == 0))
    passages = [Passage(str(row), title, text) for (title, text), row in rows.items()]
    return Corpus(passages, questions)


def accuracies(
    corpus: Corpus, questions: Sequence[Question], model: Path, *, pooling: str = "", modes: Sequence[Mode] = MODES
) -> dict[str, Any]:
    """Top-1, top-5 and top-20 of each way of searching, in percent; so many are asked for each time."""
    texts = [question.text for question in questions]
    with LocalEncoder(model, name=model.name) as encoder:
        if pooling:
            encoder.facts = encoder.facts.model_copy(update={"pooling": pooling})
        known_MH, asked_NH = encoder.passages(corpus.passages), encoder.queries(texts)
        scale = encoder.facts.score_scale
    queries = Queries(texts=texts, vectors_NH=asked_NH)
    found = {}
    for mode in modes:
        hits = {
            k: search_passages(corpus.passages, queries, k, mode=mode, vectors_MH=known_MH, scale=scale) for k in TOP
        }
        found[mode] = {f"top_{k}": accuracy(hits[k], questions, k) for k in TOP}
    return found


def accuracy(hits: Sequence[Sequence[Hit]], questions: Sequence[Question], k: int) -> float:
    """How often one of the first `k` holds an answer, in percent."""
    texts = [[hit.passage.text for hit in found] for found in hits]
    return 100 * top_k_accuracy(texts, [question.answers for question in questions], (k,))[k]


def zero_shot(limit: int | None) -> dict[str, Any]:
    """The encoder as it is."""
    found: dict[str, Any] = {}
    for name, whole in (("xquad_100_words", xquad().cut(100)), ("qed_paragraphs", qed())):
        corpus, model = whole.first(limit), model_dir(MINILM)
        questions = corpus.questions
        found[name] = {"passages": len(corpus.passages), "questions": len(questions)}
        found[name] |= accuracies(corpus, questions, model)
        found[name]["dense_by_first_token"] = accuracies(
            corpus, questions, model, pooling="first", modes=("dense",)
        )["dense"]  # fmt: skip
    return found


def ict(folder: Path, seed: int, epochs: int, limit: int | None) -> dict[str, Any]:
    """From new weights, two encoders, without a question."""
    whole = xquad()
    trained = {question.passage for question in whole.questions if not question.held_out}
    rows = [{"title": whole.passages[i].title, "text": whole.passages[i].text} for i in sorted(trained)]
    articles = list(json_lines((data_dir() / "pretrain/wikipedia_en_articles.jsonl").read_bytes()))[:limit]
    rows += [{"title": row.get("title", ""), "text": row["text"]} for row in articles]
    tokenizer = word_pieces(folder, "ict", (row["text"] for row in rows), 8000)
    shape = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}
    start = random_start(folder, tokenizer=tokenizer, seed=seed, **shape)
    pool_as_minilm(start, shape["hidden_size"])
    train = write_rows(folder / "ict.jsonl", rows)
    config = {
        "task": "ict", "seed": seed, "data": {"max_tokens": 128, "bad_rows_allowed": 0.1}, "options": {"shared": False},
        "training": {"epochs": epochs, "batch_size": 64}, "optimizer": {"lr": 1e-3},
    }  # fmt: skip
    result = run_job(folder, start, train, None, config)
    corpus = whole.cut(100).first(limit)
    return {
        "seconds": result.seconds,
        "before": accuracies(corpus, corpus.questions, start, modes=("dense",)),
        "after": accuracies(corpus, corpus.questions, result.export, modes=("dense",)),
    }


def pool_as_minilm(start: Path, size: int) -> None:
    """Let vectors be the mean of all tokens, at length 1: what new weights know is then which words occur."""
    minilm = model_dir(MINILM)
    shutil.copy(minilm / "modules.json", start)
    described = json.loads((minilm / "1_Pooling/config.json").read_text())
    (start / "1_Pooling").mkdir()
    (start / "1_Pooling/config.json").write_text(json.dumps({**described, "word_embedding_dimension": size}))


def dpr(folder: Path, seed: int, epochs: int, limit: int | None) -> dict[str, Any]:
    """From the trained encoder."""
    return supervised(folder, model_dir(MINILM), epochs, limit, {"seed": seed})


def dpr_new(folder: Path, seed: int, epochs: int, limit: int | None) -> dict[str, Any]:
    """From new weights of its shape."""
    start = random_start(folder, tokenizer=model_dir(MINILM), seed=seed)
    pool_as_minilm(start, 384)
    config = {"seed": seed, "options": {"shared": False}, "optimizer": {"lr": 3e-4}}
    return supervised(folder, start, epochs, limit, config)


def supervised(folder: Path, start: Path, epochs: int, limit: int | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """What an encoder finds before and after it has seen questions with their passages."""
    corpus = qed().first(limit)
    train = write_rows(folder / "dpr.jsonl", dpr_rows(corpus, held_out=False))
    dev = write_rows(folder / "dpr-dev.jsonl", dpr_rows(corpus, held_out=True))
    questions = [question for question in corpus.questions if question.held_out]
    config = {"task": "dpr", "training": {"epochs": epochs, "batch_size": 32}, **config}
    config |= {"data": {"max_tokens": 192, "on_long": "truncate"}, "eval": {"every_steps": 10}}
    result = run_job(folder, start, train, dev, config)
    return {
        "train_rows": sum(1 for _ in train.open()),
        "questions": len(questions),
        "seconds": result.seconds,
        "valid_loss_first": first_loss(result),
        "valid_loss_best": result.metrics["valid_loss"],
        "before": accuracies(corpus, questions, start),
        "after": accuracies(corpus, questions, result.export),
    }


def dpr_rows(corpus: Corpus, *, held_out: bool) -> list[dict[str, Any]]:
    """Questions with their own passage and the first one of BM25's that holds no answer."""
    index = SparseIndex.build([passage.searched for passage in corpus.passages])
    rows = []
    for question in corpus.questions:
        if question.held_out != held_out:
            continue
        found = [corpus.passages[row] for row in index.search([question.text], 50)[0].rows]
        wrong = (passage for passage in found if not has_answer(passage.searched, question.answers))
        own = corpus.passages[question.passage]
        rows.append(
            {
                "question": question.text,
                "answers": question.answers,
                "positive_ctxs": [{"title": own.title, "text": own.text}],
                "hard_negative_ctxs": [{"title": p.title, "text": p.text} for p in itertools.islice(wrong, 1)],
            }
        )
    return rows


def first_loss(result: Result) -> float:
    """Of the first evaluation, a few steps into the warm-up."""
    events = (result.export.parent / "attempts" / "1" / "events.jsonl").read_text("utf-8").splitlines()
    return float(next(e["data"]["valid_loss"] for e in map(json.loads, events) if e["kind"] == "eval"))


def main() -> None:
    """Run one case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("case", choices=("zero_shot", "ict", "dpr", "dpr_new", "sentences"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--limit", type=int, help="questions or rows, to try the script [all]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if args.case == "zero_shot":
            numbers: Mapping[str, Any] = zero_shot(args.limit)
        elif args.case == "sentences":
            numbers = sentences_found(model_dir(MINILM), ("tfidf", "bm25", "dense", "hybrid"), args.limit)
        else:
            numbers = {"ict": ict, "dpr": dpr, "dpr_new": dpr_new}[args.case](
                Path(name), args.seed, args.epochs, args.limit
            )
    tell(f"retrieval_{args.case}", args, numbers)


def tell(name: str, args: argparse.Namespace, numbers: Mapping[str, Any]) -> None:
    """Write numbers of all the data down; print those of a try."""
    if args.limit is None:
        record(name, {"settings": settings(args), **numbers})
    else:
        print(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
