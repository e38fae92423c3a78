"""
What finetuning reaches on real data, task by task, beside the floor that no model is needed for.

    python benchmarks/quality/tasks.py answers --seeds 1
    python benchmarks/quality/tasks.py relations --seeds 1 2 3
    python benchmarks/quality/tasks.py decisions
    python benchmarks/quality/tasks.py overfit

answers    extractive question answering from all-MiniLM-L6-v2: XQuAD's training articles, QED and COVID-QA; the export
           is chosen on XQuAD's held-out articles, and judged on what is held out of QED and COVID-QA too.
relations  DrugProt in five groups from all-MiniLM-L6-v2; micro-F1 of the positive ones on held-out abstracts.
decisions  PubMedQA, yes, no or maybe, from SmolLM2-135M-Instruct with LoRA; accuracy on held-out questions.
overfit    50 questions and 64 sentences learned by heart from all-MiniLM-L6-v2: exact match and span F1 on the same.

Numbers, seeds, times and versions are written to `results/`.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs import Result, data_dir, judge, model_dir, record, run_job, write_rows

from trilithon_finetune.converters import Split, convert
from trilithon_finetune.converters.questions import json_lines


@dataclass(frozen=True)
class Case:
    """
    One task: where its rows come from, what it starts from, and what is reached without a model.

    Attributes:
        files: (converter, file) of each part; the first one's held-out rows judge the job.
        floors: number by name.
    """

    model: str
    files: tuple[tuple[str, str], ...]
    config: Mapping[str, Any]
    floors: Mapping[str, float]


BY_HEART: Mapping[str, Mapping[str, Any]] = {
    "answers": {"task": "span_qa", "training": {"epochs": 20, "batch_size": 10}, "optimizer": {"lr": 2e-4}},
    "entities": {"task": "ner", "training": {"epochs": 20, "batch_size": 8}, "optimizer": {"lr": 2e-4}},
}
"""Jobs that learn a few rows by heart, without dropout."""

CASES: Mapping[str, Case] = {
    "answers": Case(
        "all-minilm-l6-v2",
        (("squad", "qa/xquad_en.json"), ("qed", "qa/qed_nq_dev.jsonl"), ("covidqa", "qa/covidqa_windows.jsonl")),
        {"task": "span_qa", "training": {"epochs": 3}},
        {"f1": 0.155},
    ),
    "relations": Case(
        "all-minilm-l6-v2",
        (("drugprot", "biomed/drugprot_re.jsonl"),),
        {
            "task": "relation",
            "training": {"epochs": 4, "dropout": 0.1},
            "optimizer": {"lr": 1.5e-4},
            "data": {"max_tokens": 160},
        },
        {"f1": 0.240},
    ),
    "decisions": Case(
        "smollm2-135m-instruct",
        (("pubmedqa", "qa/pubmedqa_pqal.jsonl"),),
        {
            "task": "yes_no_maybe",
            "training": {"epochs": 1, "batch_size": 8},
            "data": {"max_tokens": 640, "on_long": "truncate"},
        },
        {"accuracy": 0.552},
    ),
}


def splits(name: str) -> list[Split]:
    """The parts of a case."""
    if name == "decisions":  # as questions with contexts, rather than as texts to classify
        rows = list(json_lines((data_dir() / CASES[name].files[0][1]).read_bytes()))
        kept = [{key: row[key] for key in ("question", "contexts", "answer")} for row in rows]
        return [Split(tuple(r for i, r in enumerate(kept) if i % 5), tuple(kept[::5]))]
    return [convert(converter, (data_dir() / path).read_bytes()) for converter, path in CASES[name].files]


def main() -> None:
    """Run one case for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("case", choices=[*CASES, "overfit"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--lr", type=float, default=None)
    args = parser.parse_args()
    if args.case == "overfit":
        record("overfit", overfit(args.seeds[0]))
        return
    case = CASES[args.case]
    parts = splits(args.case)
    model = model_dir(case.model)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        train = write_rows(Path(folder) / "train.jsonl", itertools.chain(*(part.train for part in parts)))
        dev = write_rows(Path(folder) / "dev.jsonl", parts[0].dev)
        for seed in args.seeds:
            training = {**case.config["training"], **({"epochs": args.epochs} if args.epochs else {})}
            config = {**case.config, "seed": seed, "training": training}
            if args.lr is not None:
                config["optimizer"] = {**case.config.get("optimizer", {}), "lr": args.lr}
            results.append(run_job(Path(folder), model, train, dev, config))
        names = [name for name, _ in case.files[1:]]
        others = {name: [judge(r, part.dev) for r in results] for name, part in zip(names, parts[1:], strict=True)}
    record(args.case, {**numbers_of(case, args.seeds, results, parts), "others": others})


def overfit(seed: int) -> dict[str, Any]:
    """Rows learned by heart, and what is known of them then."""
    questions = convert("squad", (data_dir() / "qa/xquad_en.json").read_bytes())
    sentences = convert("conll", (data_dir() / "biomed/ncbi_disease_train.tsv").read_bytes())
    rows = {"answers": questions.train[:50], "entities": sentences.train[:64]}
    held = {"answers": questions.dev[:1], "entities": sentences.train[64:65]}
    found: dict[str, Any] = {"seed": seed}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, config in BY_HEART.items():
            train = write_rows(folder / f"{part}.jsonl", rows[part])
            dev = write_rows(folder / f"{part}-dev.jsonl", held[part])
            training = {**config["training"], "dropout": 0.0}
            settings = {**config, "seed": seed, "training": training, "eval": {"every_steps": 10**9}}
            result = run_job(folder, model_dir("all-minilm-l6-v2"), train, dev, settings)
            found[part] = {**judge(result, rows[part]), "seconds": result.seconds}
    return found


def numbers_of(case: Case, seeds: Sequence[int], results: Sequence[Result], parts: Sequence[Split]) -> dict[str, Any]:
    """What is written down."""
    return {
        "model": case.model,
        "seeds": list(seeds),
        "train_rows": sum(len(part.train) for part in parts),
        "dev_rows": len(parts[0].dev),
        "floors": dict(case.floors),
        "best": [dict(result.metrics) for result in results],
        "last": [dict(result.last) for result in results],
        "seconds": [result.seconds for result in results],
        "tokens_per_s": [result.tokens / result.step_seconds for result in results],
        "peak_bytes": [result.peak_bytes for result in results],
        "estimated_bytes": [result.estimate["peak_bytes_per_rank"] for result in results],
        "estimated_seconds": [result.estimate["seconds"] for result in results],
        "verified_max_abs": [result.verified["max_abs"] for result in results],
    }


if __name__ == "__main__":
    main()
