"""
What synthetic questions reach on real data, part by part and end to end, beside floors that no model is needed for.

    python benchmarks/quality/synthetic_qa.py answers
    python benchmarks/quality/synthetic_qa.py questions --folder runs/synthetic
    python benchmarks/quality/synthetic_qa.py filter --folder runs/synthetic
    python benchmarks/quality/synthetic_qa.py readers --folder runs/synthetic --answers 8 --seeds 1 2 3

answers    all-MiniLM-L6-v2 learns to propose answers on XQuAD's training articles: how many of the held-out answers are
           among five, by the joint model and by independent starts and ends.
questions  SmolLM2-135M-Instruct with LoRA learns to ask on XQuAD's training articles and FairytaleQA: ROUGE-L of greedy
           questions about held-out answers, how many can be read, and how many ask.
filter     the held-out paragraphs end to end, with a reader that learned from QED alone: what is kept, and how much
           better a second reader, which learned from XQuAD's training articles, answers what is kept than what is not.
readers    MiniLM learns to answer from the questions made of XQuAD's training paragraphs alone: F1 on what people asked
           about held-out ones, from the questions that were kept and from as many of all.

The folder keeps models and questions from one case to the next: what is there is not made again. Without one the base
is asked in words. `--rows` makes small runs of them. Numbers, seeds, times and versions are written to `results/`.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runs import Result, data_dir, judge, model_dir, record, run_job, settings, write_rows

from trilithon_finetune.converters import Split, convert
from trilithon_finetune.converters.squad import read_squad
from trilithon_finetune.metrics.questions import proposal_recall
from trilithon_finetune.metrics.squad import token_f1
from trilithon_finetune.phases.verify import loaded_stage, outputs_of_stage
from trilithon_finetune.recipes.answer_gen import PROPOSALS
from trilithon_finetune.recipes.base import Sample
from trilithon_parallel.config import load_config
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.tasks import read_task
from trilithon_server.tasks.pieces import word_pieces
from trilithon_server.tasks.spans import SpanFormat

Rows = Sequence[Mapping[str, Any]]

ENCODER, DECODER = "all-minilm-l6-v2", "smollm2-135m-instruct"
FLOORS = {"answer_recall": 0.109, "rouge_l": 0.259, "f1": 0.155}
"""Random runs of capitals and numbers; "what" and the answer's sentence; the sentence that is most like a question."""

ASKER = "asker"
"""Of the folder: the model that `questions` leaves there, its adapter merged."""

READER = {"task": "span_qa", "training": {"epochs": 3}, "data": {"max_tokens": 256}, "optimizer": {"lr": 2e-4}}


def xquad(rows: int | None) -> Split:
    """Training and held-out articles, or the first rows of each."""
    split = convert("squad", (data_dir() / "qa/xquad_en.json").read_bytes())
    return Split(split.train[:rows], split.dev[:rows])


def files(folder: Path, name: str, train: Iterable[Mapping[str, Any]], dev: Rows) -> tuple[Path, Path]:
    """Training and validation rows as files."""
    return write_rows(folder / f"{name}.jsonl", train), write_rows(folder / f"{name}-dev.jsonl", dev)


def summed(result: Result) -> dict[str, Any]:
    """What is told of a job."""
    return {"best": dict(result.metrics), "seconds": result.seconds, "verified": result.verified["max_abs"]}


def propose(folder: Path, split: Split, seed: int, epochs: int) -> Result:
    """A model that proposes answers."""
    train, dev = files(folder, "answers", split.train, split.dev)
    config = {"task": "answer_gen", "seed": seed, "training": {"epochs": epochs}, "data": {"on_long": "drop"}}
    return run_job(folder, model_dir(ENCODER), train, dev, config)


def answers(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """acc-E05: the joint model beside one that chooses starts and ends on their own."""
    split = xquad(args.rows)
    found: dict[str, Any] = {"floor": FLOORS["answer_recall"], "joint": [], "independent": []}
    for seed in args.seeds:
        found["joint"].append(summed(propose(folder, split, seed, args.epochs or 4)))
        # The same texts with nothing asked: a span head that knows the context alone proposes starts and ends.
        silent = [{**row, "question": "?"} for row in (*split.train, *split.dev)]
        train, dev = files(folder, "independent", silent[: len(split.train)], silent[len(split.train) :])
        config = {
            "task": "span_qa",
            "seed": seed,
            "training": {"epochs": args.epochs or 4},
            "data": {"max_tokens": 256},
        }
        result = run_job(folder, model_dir(ENCODER), train, dev, config)
        found["independent"].append({**summed(result), "answer_recall": recall_of_spans(result.export, split.dev)})
    return found


def recall_of_spans(export: Path, rows: Rows) -> float:
    """Of the different answers, how many are among the five likeliest of independent starts and ends."""
    golds: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        golds[row["context"]].append(row["answers"][0]["text"])
    replies = read(export, [("?", text) for text in golds], count=PROPOSALS)
    return proposal_recall(list(zip(replies, golds.values(), strict=True)))


def read(export: Path, asked: Sequence[tuple[str, str]], *, count: int = 1) -> list[list[str]]:
    """The likeliest answers of a reader to (question, context)."""
    format_ = read_task(export)
    assert isinstance(format_, SpanFormat)
    pieces = word_pieces(load_tokenizer(export))
    stage = loaded_stage(load_config(export), export, dtype=torch.float32)
    stage.prepare()
    found = []
    for question, context in asked:
        windows = format_.encode(question, context, pieces)
        samples = [Sample(window.encoded.tokens, types=window.encoded.types) for window in windows]
        logits = outputs_of_stage(stage, [(sample, np.empty(0, np.float32)) for sample in samples])
        found.append([answer.text for answer in format_.decode(context, windows, logits).answers[:count]])
    return found


def questions(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """acc-E06: the export writes its own questions; the phase `verify` measures them."""
    split = xquad(args.rows)
    names = ("qa/fairytaleqa_train.jsonl", "stories/fairytaleqa_stories_train.jsonl")
    tales = convert("fairytaleqa", *((data_dir() / name).read_bytes() for name in names)).train
    tales = tuple(random.Random(args.seeds[0]).sample(tales, min(args.tales, len(tales))))
    train, dev = files(folder, "questions", (*split.train, *tales), split.dev)
    config = {
        "task": "question_gen",
        "seed": args.seeds[0],
        "training": {"epochs": args.epochs or 2, "batch_size": 8},
        "optimizer": {"lr": 5e-4},
        "data": {"on_long": "drop"},
        "options": {"written_answers": len(split.dev)},
    }
    result = run_job(folder, model_dir(DECODER), train, dev, config)
    told = {"floor": FLOORS["rouge_l"], "rows": len(split.train) + len(tales), **summed(result)}
    if args.folder is not None:
        merge = [sys.executable, "-m", "trilithon_finetune.merging", model_dir(DECODER), result.export, folder / ASKER]
        subprocess.run(merge, check=True)
    return {**told, "written": result.verified["numbers"]}


def made(
    folder: Path, name: str, models: Mapping[str, Path], passages: Sequence[str], args: argparse.Namespace
) -> Path:
    """The command's file of kept questions about passages, with `NAME.all.json` beside it, of all that can be read."""
    corpus = write_rows(folder / f"{name}.jsonl", ({"text": text} for text in passages))
    local = [part for model, path in models.items() for part in ("--local", f"{model}={path}")]
    for suffix, mode in (("", args.filter), (".all", "none")):
        out = folder / f"{name}{suffix}.json"
        if out.exists():
            continue
        command = [sys.executable, "-m", "trilithon.cli", "synth-qa", str(corpus), "-o", str(out), "--filter", mode]
        command += ["--answers", str(args.answers), "--seed", str(args.seeds[0]), "--format", "json"]
        subprocess.run([*command, *local], check=True)
    return folder / f"{name}.json"


def parts(folder: Path, split: Split, args: argparse.Namespace) -> dict[str, Path]:
    """The three models: the asker of `questions`, a proposer, and a reader that learned from QED alone."""
    reader, proposer, asker = folder / "reader", folder / "proposer", folder / ASKER
    if not reader.exists():
        qed = convert("qed", (data_dir() / "qa/qed_nq_dev.jsonl").read_bytes())
        train, dev = files(folder, "qed", qed.train[: args.rows], qed.dev[: args.rows])
        made = run_job(folder, model_dir(ENCODER), train, dev, {**READER, "seed": args.seeds[0]})
        shutil.copytree(made.export, reader)
    if not proposer.exists():
        shutil.copytree(propose(folder, split, args.seeds[0], args.epochs or 4).export, proposer)
    return {"asker": asker if asker.exists() else model_dir(DECODER), "proposer": proposer, "reader": reader}


def triples_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a SQuAD file."""
    rows = read_squad(path.read_bytes(), file=path.name)
    return [dict(row) for row in rows or () if isinstance(row, Mapping)]


def filtered(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """acc-E07: whether a second reader agrees with the filter."""
    split = xquad(args.rows)
    passages = list(dict.fromkeys(row["context"] for row in split.dev))
    kept_file = made(folder, "dev", parts(folder, split, args), passages, args)
    kept, every = triples_of(kept_file), triples_of(kept_file.with_name("dev.all.json"))
    names = {(row["context"], row["question"], row["answers"][0]["answer_start"]) for row in kept}
    dropped = [r for r in every if (r["context"], r["question"], r["answers"][0]["answer_start"]) not in names]
    train, dev = files(folder, "second", split.train, split.dev)
    second = run_job(folder, model_dir(ENCODER), train, dev, {**READER, "seed": args.seeds[0]})
    scores = {name: mean_f1(second.export, rows) for name, rows in (("kept", kept), ("dropped", dropped))}
    stands = all(row["context"][a["answer_start"] :].startswith(a["text"]) for row in every for a in row["answers"])
    return {
        "passages": len(passages), "readable": len(every), "kept": len(kept),
        "keep_rate": len(kept) / max(1, len(every)), "second_reader_f1": scores, "answers_stand": stands,
    }  # fmt: skip


def mean_f1(export: Path, rows: Rows) -> float:
    """Of a reader's best answers."""
    replies = read(export, [(row["question"], row["context"]) for row in rows])
    pairs = zip(replies, rows, strict=True)
    return float(np.mean([token_f1(r[0] if r else "", row["answers"][0]["text"]) for r, row in pairs] or [0.0]))


def readers(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """acc-E08: readers of synthetic questions alone, judged by what people asked."""
    split = xquad(args.rows)
    passages = list(dict.fromkeys(row["context"] for row in split.train))
    kept_file = made(folder, "train", parts(folder, split, args), passages, args)
    kept, every = triples_of(kept_file), triples_of(kept_file.with_name("train.all.json"))
    found: dict[str, Any] = {"floor": FLOORS["f1"], "kept": [], "unfiltered": [], "rows": len(kept)}
    for seed in args.seeds:
        same = random.Random(seed).sample(every, min(len(kept), len(every)))
        for name, rows in (("kept", kept), ("unfiltered", same)):
            # Without validation: the last step is judged, not the one that answers the judging questions best.
            train = write_rows(folder / f"{name}-{seed}.jsonl", rows)
            config = {**READER, "seed": seed, "training": {"epochs": args.epochs or 5}}
            result = run_job(folder, model_dir(ENCODER), train, None, config)
            found[name].append({"seconds": result.seconds, "human": judge(result, split.dev)})
    return found


CASES = {"answers": answers, "questions": questions, "filter": filtered, "readers": readers}


def main() -> None:
    """Run one case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--tales", type=int, default=200, help="rows of FairytaleQA to learn to ask from")
    parser.add_argument("--answers", type=int, default=5, help="of a passage, to ask about")
    parser.add_argument("--filter", choices=("pair_any", "single"), default="pair_any")
    parser.add_argument("--folder", type=Path, help="keeps models and questions")
    parser.add_argument("--rows", type=int, help="of each file, at most: for a small run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        numbers = CASES[args.case](args.folder or Path(scratch), args)
    name = f"synthetic_{args.case}"
    record(name if args.rows is None else f"{name}_small", {"settings": settings(args), **numbers})


if __name__ == "__main__":
    main()
