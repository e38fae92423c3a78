"""
Entities in biomedical text: our job against the same training in plain transformers, seed by seed, in one run.

    python benchmarks/quality/entities.py ncbi --seeds 1 2 3
    python benchmarks/quality/entities.py bc5cdr --seeds 1 2 3 --epochs 2
    python benchmarks/quality/entities.py ncbi --seeds 1 --labelling whole --alone

Both start from all-MiniLM-L6-v2 with a new head, see the same samples (tokens and labels, in the same batches), learn
with the same AdamW, the same schedule, and are judged by the same span F1 of the same decoding on the devel file.
transformers' loop is written here: BertForTokenClassification, torch.optim.AdamW, batches padded to their longest row
and sorted by length within, two threads. Its time is that of the steps; so is ours.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from runs import Result, data_dir, model_dir, record, run_job

from trilithon_finetune.config import JobConfig
from trilithon_finetune.data.batches import Order
from trilithon_finetune.data.prepared import Part
from trilithon_finetune.recipes.base import IGNORE, Output
from trilithon_finetune.setup import read_job, read_rows_of
from trilithon_finetune.train.schedule import schedule_of
from trilithon_finetune.train.stream import learning_rate_of
from trilithon_finetune.train.work import Work, open_work

FILES = {"ncbi": "ncbi_disease", "bc5cdr": "bc5cdr"}
DICTIONARY_FLOOR = {"ncbi": 0.648, "bc5cdr": 0.710}
"""Span F1 of the longest match with mentions of the training file (`floors.py`)."""


def train_transformers(work: Work) -> tuple[float, float, dict[str, float]]:
    """The same training without us: seconds of its steps, of its evaluation, and the numbers."""
    config = work.config
    assert config.seed is not None
    torch.manual_seed(config.seed)
    labels, dropout = list(work.prepared.facts.labels), config.training.dropout
    model = transformers.BertForTokenClassification.from_pretrained(
        work.job.model_dir,
        num_labels=len(labels),
        dtype=torch.float32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,  # ours has none of these
    )
    model.train()
    optimizer = torch.optim.AdamW(_groups(model, config), betas=config.optimizer.betas, eps=config.optimizer.eps)
    schedule = schedule_of(config, work.prepared.train.num_units)
    _, units = schedule.whole_run()
    rates = learning_rate_of(config, units)
    began = time.monotonic()
    for step in schedule.steps(units):
        rate = rates.at(step.consumed)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        loss = loss_of_batch(model, work.prepared.train, schedule.order, step.step)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's method is untyped
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
    trained = time.monotonic() - began
    began = time.monotonic()
    numbers = evaluate(model, work)
    return trained, time.monotonic() - began, numbers


def _groups(model: torch.nn.Module, config: JobConfig) -> list[dict[str, Any]]:
    """Norms and biases don't decay; the new head learns faster."""
    assert config.optimizer.head_lr is not None
    assert config.optimizer.lr is not None
    factor = config.optimizer.head_lr / config.optimizer.lr
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        key = (parameter.ndim > 1, factor if name.startswith("classifier") else 1.0)
        groups.setdefault(key, []).append(parameter)
    decay = config.optimizer.weight_decay
    return [
        {"params": held, "weight_decay": decay if decays else 0.0, "factor": rate}
        for (decays, rate), held in groups.items()
    ]


def loss_of_batch(model: torch.nn.Module, part: Part, order: Order, step: int) -> torch.Tensor:
    """The mean loss of a step's samples, padded to the longest."""
    samples = [part.sample(index) for unit in order.units(step) for index in part.samples_of(unit)]
    tokens, mask, targets = padded([s.tokens for s in samples], [s.targets for s in samples])
    loss: torch.Tensor = model(input_ids=tokens, attention_mask=mask, labels=targets).loss
    return loss


def padded(
    tokens: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of one length, their mask, and targets with -100 where none counts."""
    longest = max(map(len, tokens))
    shape = len(tokens), longest
    ids, mask, wanted = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, -100)
    for i, (row, target) in enumerate(zip(tokens, targets, strict=True)):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        wanted[i, : len(row)] = [-100 if item == IGNORE else item for item in target]
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(wanted)


@torch.inference_mode()
def evaluate(model: torch.nn.Module, work: Work) -> dict[str, float]:
    """The recipe's own numbers of the devel file."""
    model.eval()
    part, outputs = work.prepared.valid, []
    order = np.argsort([-length for length in part.lengths.tolist()], kind="stable")
    for first in range(0, len(order), 32):
        samples = [part.sample(int(i)) for i in order[first : first + 32]]
        tokens, mask, _ = padded([s.tokens for s in samples], [s.targets for s in samples])
        logits = model(input_ids=tokens, attention_mask=mask).logits.numpy()
        outputs += [Output(s, row[: len(s.tokens)]) for s, row in zip(samples, logits, strict=True)]
    rows = read_rows_of(work.job, work.recipe, {output.sample.row for output in outputs})
    return dict(work.recipe.metrics(sorted(outputs, key=_place), rows, work.context))


def _place(output: Output) -> tuple[int, int]:
    return output.sample.row, output.sample.part


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("corpus", choices=FILES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--labelling", choices=("first", "whole"), default="first", help="pieces of a word")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--dropout", type=float, default=0.1)
    args = parser.parse_args()
    model, data = model_dir("all-minilm-l6-v2"), data_dir() / "biomed"
    files = [data / f"{FILES[args.corpus]}_{part}.tsv" for part in ("train", "devel")]
    ours: list[Result] = []
    theirs: list[tuple[float, float, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            config = {
                "task": "ner",
                "seed": seed,
                "training": {"epochs": args.epochs, "dropout": args.dropout},
                "eval": {"every_steps": 10**9},
                "options": {"method": args.labelling},
            }
            ours.append(run_job(Path(folder), model, files[0], files[1], config))
            work = open_work(read_job(ours[-1].export.parent))
            if not args.alone:
                theirs.append(train_transformers(work))
    f1 = [result.last["f1"] for result in ours], [numbers["f1"] for _, _, numbers in theirs]
    record(
        f"entities_{args.corpus}" + ("" if args.labelling == "first" else f"_{args.labelling}"),
        {
            "seeds": args.seeds,
            "epochs": args.epochs,
            "labelling": args.labelling,
            "floor_f1": DICTIONARY_FLOOR[args.corpus],
            "ours_f1": f1[0],
            "transformers_f1": f1[1],
            "ours_mean": statistics.mean(f1[0]),
            "transformers_mean": statistics.mean(f1[1]) if f1[1] else None,
            "transformers_sd": statistics.stdev(f1[1]) if len(f1[1]) > 1 else None,
            "ours_numbers": [dict(result.last) for result in ours],
            "transformers_numbers": [numbers for _, _, numbers in theirs],
            "ours_step_seconds": [result.step_seconds for result in ours],
            "transformers_step_seconds": [seconds for seconds, _, _ in theirs],
            "time_ratio": statistics.median(
                result.step_seconds / seconds for result, (seconds, _, _) in zip(ours, theirs, strict=True)
            )
            if theirs
            else None,
            "ours_tokens_per_s": [result.tokens / result.step_seconds for result in ours],
            "peak_bytes": [result.peak_bytes for result in ours],
            "estimated_bytes": ours[0].estimate["peak_bytes_per_rank"],
        },
    )


if __name__ == "__main__":
    main()
