"""Small encoders with task heads and a decoder for preferences: their descriptions, and batches to learn from."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from tiny_configs import BERT, LLAMA
from torch import Tensor

from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelConfig, TaskHead
from trilithon_parallel.contrast_terms import QUERY, Contrast
from trilithon_parallel.grid import Grid
from trilithon_parallel.init import initialise
from trilithon_parallel.layout import Layout
from trilithon_parallel.objective import (
    Batch,
    ClassBatch,
    JointSpanBatch,
    PackedBatch,
    PreferenceBatch,
    SpanBatch,
    TagBatch,
)
from trilithon_parallel.optimizer import AdamWSettings
from trilithon_parallel.step import TrainingModel
from trilithon_parallel.task_head import SPAN_LABELS, for_task, span_lengths
from trilithon_parallel.vector_batch import VectorBatch

# 6 heads and an ffn of 96: tp 2 and 3 cut them evenly.
ENCODER = replace(BERT, num_heads=6, num_kv_heads=6, head_dim=8, ffn_size=96, num_layers=4)
HEADS = {
    "tokens": TaskHead("tokens", ("O", "B-Drug", "I-Drug", "B-Gene", "I-Gene")),
    "sequence": TaskHead("sequence", ("yes", "no", "maybe")),
    "span": TaskHead("span", SPAN_LABELS),
    "joint_span": TaskHead("joint_span", span_lengths(5)),
}
MODELS: dict[str, ModelConfig] = {
    **{kind: for_task(ENCODER, head) for kind, head in HEADS.items()},
    "vectors": replace(ENCODER, pooling="mean", normalize=True),
    "preference": replace(LLAMA, num_heads=6, num_kv_heads=3, head_dim=16, ffn_size=96),
}
CONFIGS = {**MODELS, "margin": MODELS["vectors"], "twins": replace(MODELS["vectors"], has_twin=True)}
MARGIN = 0.5
# Of each sequence of a global batch: a query, its answer or another passage; whose it is; which text. Queries and their
# answers stand on different dp ranks, one passage has the text of the first answer, and two sequences ask for nothing.
ROLES, PAIRS, KEYS = (0, 0, 1, 1, 0, 1, 2, 2), (0, 1, 0, 1, 2, 2, 2, 0), (10, 11, 12, 13, 14, 15, 16, 12)
FACTS = {"roles_B": ROLES, "pairs_B": PAIRS, "keys_B": KEYS}
SETTINGS = AdamWSettings(eps=1e-4, clip_norm=0.7)
BETA = 0.3
# Of one global batch; neighbours make a micro-batch. Even, so that sequence parallelism can cut every one in two.
LENGTHS = (6, 14, 10, 8, 22, 4, 12, 16)


def sequences(
    kind: str, step: int = 0, *, lengths: tuple[int, ...] = LENGTHS, vocab: int = 391
) -> list[dict[str, Any]]:
    """What every sequence of a global batch holds: tokens, types, and what its head should say; some of it masked."""
    generator = torch.Generator().manual_seed(100 + step)
    labels = len(HEADS[kind].labels) if kind in HEADS else vocab

    def draw(high: int, size: int) -> Tensor:
        return torch.randint(high, (size,), generator=generator)

    made = []
    for number, length in enumerate(lengths):
        question = 1 + length // 4  # with the first token: what an answer may not lie in
        start = question + int(draw(length - question, 1))
        made.append(
            {
                "tokens": draw(vocab - 1, length) + 1,  # not 0: transformers gives the padding token no gradient
                "types": draw(2, length),
                "targets": draw(labels, length),
                "weights": (draw(3, length) > 0).float() if number else torch.zeros(length),
                "label": int(draw(labels, 1)),
                "start": start if number % 3 else 0,
                "end": min(start + 1, length - 1) if number % 3 else 0,
                "context": torch.arange(length) >= question,
                "reference": -3.0 * torch.rand(1, generator=generator, dtype=torch.float64),
            }
        )
    return made


def batch_of(kind: str, rows: list[dict[str, Any]], first: int) -> PackedBatch:
    """Sequences as one micro-batch; `first`: the number of the first one among all."""
    lengths = [len(row["tokens"]) for row in rows]
    bounds = [0, *accumulate(lengths)]
    common: dict[str, Any] = {
        "tokens_T": torch.cat([row["tokens"] for row in rows]),
        "positions_T": torch.cat([torch.arange(length) for length in lengths]),
        "cu_seqlens": bounds,
        "sample_ids": [first + i for i in range(len(rows))],
        "lengths": lengths,
        "types_T": None if kind == "preference" else torch.cat([row["types"] for row in rows]),
    }
    targets = {
        "targets_T": torch.cat([row["targets"] for row in rows]),
        "weights_T": torch.cat([row["weights"] for row in rows]),
    }
    if kind == "tokens":
        return TagBatch(**common, **targets)
    if kind == "sequence":
        labels = torch.tensor([row["label"] for row in rows])
        return ClassBatch(**common, labels_B=labels, weights_B=torch.ones(len(rows)))
    if kind == "span":
        places = {
            f"{end}s_B": torch.tensor([row[end] + bound for row, bound in zip(rows, bounds, strict=False)])
            for end in ("start", "end")
        }
        return SpanBatch(**common, **places, context_T=torch.cat([row["context"] for row in rows]))
    if kind == "joint_span":  # of the same rows; what has no answer there learns the context's first token
        firsts = [row["start"] or 1 + len(row["tokens"]) // 4 for row in rows]
        starts = [bound + first for bound, first in zip(bounds, firsts, strict=False)]
        ends = [bound + max(row["end"], first) for row, bound, first in zip(rows, bounds, firsts, strict=False)]
        context_T = torch.cat([row["context"] for row in rows])
        return JointSpanBatch(**common, starts_B=torch.tensor(starts), ends_B=torch.tensor(ends), context_T=context_T)
    if kind in ("vectors", "margin", "twins"):
        chosen = slice(first % len(LENGTHS), first % len(LENGTHS) + len(rows))
        facts: dict[str, Any] = {name: torch.tensor(values[chosen]) for name, values in FACTS.items()}
        facts["is_query_B"] = [role == QUERY for role in ROLES[chosen]]
        if kind == "margin":
            return VectorBatch(**common, **facts, contrast=Contrast(1.0, MARGIN))
        return VectorBatch(**common, **facts, contrast=Contrast(5.0))
    if kind == "preference":
        reference = torch.cat([row["reference"] for row in rows]).view(-1, 2)
        return PreferenceBatch(**common, **targets, reference_P2=reference, beta=BETA)
    return Batch(**common, **targets)


def batches_of(kind: str, step: int, layout: Layout, dp_rank: int) -> list[PackedBatch]:
    """The micro-batches of one dp rank in a global batch that depends on the step alone."""
    rows, size = sequences(kind, step), layout.micro_batch_size
    firsts = range(0, len(rows), size)
    return [
        batch_of(kind, rows[first : first + size], step * len(rows) + first)
        for index, first in enumerate(firsts)
        if index % layout.dp == dp_rank
    ]


def make_model(
    config: ModelConfig,
    grid: Grid | None = None,
    layout: Layout | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> TrainingModel:
    """A model with initial weights, biases and gains that are no zeros and ones."""
    grid, layout = grid or Grid.single(), layout or Layout()
    options = {"optimizer": SETTINGS, "seed": 5} | options
    model = TrainingModel(config, grid, layout, select("torch"), dtype=dtype, **options)
    for chunk in model.chunks:
        initialise(chunk.stage, config=config, grid=chunk.grid, seed=3, sigma=0.1)
    model.optimizer.adopt_weights()
    model.weights_changed()
    return model


def weights_of(model: TrainingModel) -> dict[str, Tensor]:
    """Every tensor of a model that one process holds."""
    return {slot.owner: slot.parameter.detach() for _, slot in model.buckets.slots()}


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, by the largest value (or 1)."""
    return float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))
